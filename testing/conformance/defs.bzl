"""The conformance suite as a test per backend."""

load("//third_party/bazel:cc.bzl", "dsd_cc_test")

def conformance_test(name, backends, cases):
    """Declares <name>_<backend> for each backend, and <name> for all.

    Args:
      name: of the suite of all.
      backends: names of folders in //backends.
      cases: libraries of cases, with alwayslink.
    """
    for backend in backends:
        dsd_cc_test(
            name = "%s_%s" % (name, backend),
            size = "large",
            srcs = ["conformance_test.cc"],
            local_defines = ["DSD_BACKEND=\\\"%s\\\"" % backend],
            main = "//testing/harness:rank_main",
            tags = ["cpu:2"],
            deps = cases + [
                ":conformance",
                "//backends/" + backend,
                "//core/base",
                "//core/comm",
                "//testing/harness:rank_processes",
                "//testing/harness:rank_threads",
                "@com_google_absl//absl/strings",
                "@com_google_absl//absl/synchronization",
            ],
        )
    native.test_suite(
        name = name,
        tests = [":%s_%s" % (name, backend) for backend in backends],
    )
