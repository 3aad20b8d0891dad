"""Stand-ins for repositories that Debian's Bazel 4.2.3 would otherwise download."""

_RULES = [
    "cc_binary",
    "cc_import",
    "cc_library",
    "cc_test",
    "cc_toolchain",
    "cc_toolchain_suite",
    "objc_library",
]

def _rules_cc_impl(ctx):
    ctx.file("WORKSPACE", "workspace(name = \"rules_cc\")\n")
    ctx.file("BUILD.bazel", "")
    ctx.file("cc/BUILD.bazel", "")
    ctx.file("cc/defs.bzl", "".join(["{0} = native.{0}\n".format(rule) for rule in _RULES]))

rules_cc_stub = repository_rule(
    implementation = _rules_cc_impl,
    doc = "@rules_cc//cc:defs.bzl, with Bazel's own rules behind the names.",
)

_COVERAGE_BUILD = """
package(default_visibility = ["//visibility:public"])

[filegroup(name = name, srcs = ["nothing.sh"]) for name in ("coverage_report_generator", "lcov_merger")]
"""

def _coverage_tools_impl(ctx):
    ctx.file("WORKSPACE", "workspace(name = \"remote_coverage_tools\")\n")
    ctx.file("BUILD.bazel", _COVERAGE_BUILD)
    ctx.file("nothing.sh", "#!/bin/sh\nexit 0\n", executable = True)

coverage_tools_stub = repository_rule(
    implementation = _coverage_tools_impl,
    doc = "Every cc_test names these tools; only `bazel coverage` runs them.",
)
