"""A small library that the system has installed, as a repository.

Only the named headers and libraries are linked in, so that nothing else of the system's folders is found by accident.
"""

load(":elf.bzl", "elf_entries")

_PREFIXES = "DSD_LIBRARY_PREFIXES"

def _find(ctx, prefixes, folders, name):
    looked = []
    for prefix in prefixes:
        for folder in folders:
            path = ctx.path("%s/%s/%s" % (prefix, folder, name))
            if path.exists:
                return path
            looked.append(str(path))
    fail(("@%s: %s was not found; looked at %s. Install it (Debian: %s), run the build through ./bazelw, which does, or " +
          "set %s to the prefixes (with include/ and lib/ below) to search first, separated by colons.") %
         (ctx.name, name, ", ".join(looked), ctx.attr.package, _PREFIXES))

def _impl(ctx):
    prefixes = [p for p in ctx.os.environ.get(_PREFIXES, "").split(":") if p] + ["/usr/local", "/usr"]
    for header in ctx.attr.headers:
        ctx.symlink(_find(ctx, prefixes, ["include"], header), "include/" + header)
    for library in ctx.attr.libraries:
        path = _find(ctx, prefixes, ["lib/x86_64-linux-gnu", "lib/aarch64-linux-gnu", "lib64", "lib"], library)

        # The loader looks a shared library up by its own name, which the program records.
        name = elf_entries(ctx, path.realpath, "SONAME")[0] if library.endswith(".so") else library
        ctx.symlink(path, "lib/" + name)
    ctx.file("WORKSPACE", "workspace(name = \"%s\")\n" % ctx.name)
    ctx.template("BUILD.bazel", ctx.attr.build_file)

system_library = repository_rule(
    implementation = _impl,
    attrs = {
        "build_file": attr.label(mandatory = True),
        "headers": attr.string_list(doc = "Files and folders below an include folder."),
        "libraries": attr.string_list(doc = "File names below a library folder."),
        "package": attr.string(mandatory = True, doc = "The Debian package, for the failure text."),
    },
    environ = [_PREFIXES],
)
