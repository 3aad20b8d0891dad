"""@gloo: a source tree or archive of the user's, else the Gloo that the source package of Horovod carries."""

load("//third_party/bazel:pypi.bzl", "PYPI_ATTRS", "pypi_parts")

_HOROVOD = "horovod==0.28.1 --hash=sha256:92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"

# As CMake writes it for a build with the TCP transport only.
_OFF = [
    "GLOO_USE_CUDA",
    "GLOO_USE_NCCL",
    "GLOO_USE_ROCM",
    "GLOO_USE_RCCL",
    "GLOO_USE_REDIS",
    "GLOO_USE_IBVERBS",
    "GLOO_USE_MPI",
    "GLOO_USE_AVX",
    "GLOO_USE_LIBUV",
    "GLOO_USE_TORCH_DTYPES",
    "GLOO_HAVE_TRANSPORT_TCP_TLS",
    "GLOO_HAVE_TRANSPORT_IBVERBS",
    "GLOO_HAVE_TRANSPORT_UV",
]

def _config(ctx, tree):
    """The text of gloo/config.h, with the version that the tree's CMakeLists.txt states."""
    cmake = ctx.read(tree.get_child("CMakeLists.txt"))
    lines = ["#pragma once"]
    for part in ["MAJOR", "MINOR", "PATCH"]:
        before = "set(GLOO_VERSION_%s " % part
        if before not in cmake:
            fail("@%s: %s does not state GLOO_VERSION_%s" % (ctx.name, tree.get_child("CMakeLists.txt"), part))
        lines.append("#define GLOO_VERSION_%s %s" % (part, cmake.split(before)[1].split(")")[0]))
    lines.append("#define GLOO_VERSION (GLOO_VERSION_MAJOR * 10000 + GLOO_VERSION_MINOR * 100 + GLOO_VERSION_PATCH)")
    lines += ["#define %s 0" % macro for macro in _OFF] + ["#define GLOO_HAVE_TRANSPORT_TCP 1"]
    return "\n".join(lines) + "\n"

def _tree(ctx, root):
    """The source tree that GLOO_ROOT names, unpacked if it is an archive."""
    path = ctx.path(root)
    candidates = [path]
    if root.endswith((".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".zip")):
        ctx.extract(path, "archive")
        candidates = [ctx.path("archive")] + ctx.path("archive").readdir()
    for candidate in candidates:
        if candidate.get_child("gloo").get_child("context.h").exists:
            return candidate
    fail("@%s: GLOO_ROOT=%s is no source tree of Gloo and no archive of one: no gloo/context.h in %s" %
         (ctx.name, root, ", ".join([str(c) for c in candidates])))

def _impl(ctx):
    root = ctx.os.environ.get("GLOO_ROOT")
    if root:
        tree = _tree(ctx, root)
        for child in tree.get_child("gloo").readdir():
            if child.basename != "config.h":
                ctx.symlink(child, "gloo/" + child.basename)

        # buildifier: disable=print
        print("@%s is %s (GLOO_ROOT)" % (ctx.name, root))
    else:
        pypi_parts(
            ctx,
            name = "gloo-horovod-0.28.1",
            requirements = [_HOROVOD],
            take = {
                "horovod-0.28.1/third_party/gloo/CMakeLists.txt": "CMakeLists.txt",
                "horovod-0.28.1/third_party/gloo/gloo/": "gloo/",
            },
            instead = "Without a package index: set GLOO_ROOT to a source tree or archive of Gloo.",
        )
        tree = ctx.path(".")
    ctx.file("gloo/config.h", _config(ctx, tree))
    ctx.file("WORKSPACE", "workspace(name = \"gloo\")\n")
    ctx.template("BUILD.bazel", ctx.attr._build_file)

gloo = repository_rule(
    implementation = _impl,
    attrs = dict(
        PYPI_ATTRS,
        _build_file = attr.label(default = Label("//third_party/gloo:gloo.BUILD")),
    ),
    environ = ["GLOO_ROOT"],
)
