"""@ucx: the headers of the system's UCX, or of the installation that UCX_ROOT names."""

# Of Debian 12; what backends/ucx calls is there since 1.11.
_PACKAGE = "libucx-dev"
_OLDEST = (1, 11)

_HEADERS = ["ucm", "ucp", "ucs", "uct"]
_VERSION = "include/ucp/api/ucp_version.h"

def _version(ctx, root):
    """The API version that the headers state, as a pair."""
    text = ctx.read(ctx.path("%s/%s" % (root, _VERSION)))
    numbers = []
    for part in ["MAJOR", "MINOR"]:
        before = "#define UCP_API_%s" % part
        if before not in text:
            fail("@%s: %s/%s does not state UCP_API_%s" % (ctx.name, root, _VERSION, part))
        numbers.append(int(text.split(before)[1].split("\n")[0].strip()))
    return (numbers[0], numbers[1])

def _impl(ctx):
    own = ctx.os.environ.get("UCX_ROOT")
    roots = [own] if own else ["/usr/local", "/usr"]
    found = [r for r in roots if ctx.path("%s/%s" % (r, _VERSION)).exists]
    if not found:
        fail(("@%s: UCX was not found; looked at %s. Install it (Debian: %s), run the build through ./bazelw, which does, or set " +
              "UCX_ROOT to an installation (with include/ and lib/ below).") %
             (ctx.name, ", ".join(["%s/%s" % (r, _VERSION) for r in roots]), _PACKAGE))
    root = found[0]
    version = _version(ctx, root)
    if version < _OLDEST:
        fail("@%s: %s has UCX %d.%d, but %d.%d or newer is needed; set UCX_ROOT to another one." %
             ((ctx.name, root) + version + _OLDEST))
    for name in _HEADERS:
        folder = ctx.path("%s/include/%s" % (root, name))
        if folder.exists:
            ctx.symlink(folder, "include/" + name)

    # The loader knows the system's folders by itself.
    linkopts = ["-ldl"]
    if own:
        folders = [f for f in ["lib", "lib64"] if ctx.path("%s/%s/libucp.so.0" % (root, f)).exists]
        if not folders:
            fail("@%s: UCX_ROOT=%s has no lib/libucp.so.0" % (ctx.name, root))
        linkopts.append("-Wl,-rpath,%s/%s" % (root, folders[0]))

        # buildifier: disable=print
        print("@%s is %s (UCX_ROOT)" % (ctx.name, root))
    ctx.file("WORKSPACE", "workspace(name = \"ucx\")\n")
    ctx.template("BUILD.bazel", ctx.attr._build_file, {"%{linkopts}": repr(linkopts)})

ucx = repository_rule(
    implementation = _impl,
    attrs = {"_build_file": attr.label(default = Label("//third_party/ucx:ucx.BUILD"))},
    environ = ["UCX_ROOT"],
)
