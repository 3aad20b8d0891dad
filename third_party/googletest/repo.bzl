"""@com_google_googletest: GoogleTest and GoogleMock, compiled from the sources that Debian installs."""

_PLACE = "/usr/src/googletest"

def _impl(ctx):
    for part in ["googlemock", "googletest"]:
        place = ctx.path(_PLACE).get_child(part)
        if not place.get_child("src").exists:
            fail(("@%s: no sources of GoogleTest; looked at %s. Install them (Debian: googletest), run the build " +
                  "through ./bazelw, which does, or declare your own com_google_googletest before " +
                  "dsd_dependencies().") % (ctx.name, place))

        # Not the whole folder: it has build files of its own kind that would cut the globs off.
        for folder in ["include", "src"]:
            ctx.symlink(place.get_child(folder), part + "/" + folder)
    ctx.file("WORKSPACE", "workspace(name = \"com_google_googletest\")\n")
    ctx.template("BUILD.bazel", ctx.attr._build_file)

googletest = repository_rule(
    implementation = _impl,
    attrs = {
        "_build_file": attr.label(default = Label("//third_party/googletest:googletest.BUILD")),
    },
)
