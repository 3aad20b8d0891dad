"""The conformance suite as a test per backend."""

load("//third_party/bazel:cc.bzl", "dsd_cc_test")

def conformance_test(name, backends, cases, variants = {}):
    """Declares <name>_<backend> for each backend and variant, and <name> for all.

    Args:
      name: of the suite of all.
      backends: names of folders in //backends.
      cases: libraries of cases, with alwayslink.
      variants: {"<backend>_<variant>": (backend, environment)}.
    """
    tests = {backend: (backend, {}) for backend in backends}
    tests.update(variants)
    for test, (backend, environment) in tests.items():
        dsd_cc_test(
            name = "%s_%s" % (name, test),
            size = "large",
            srcs = ["conformance_test.cc"],
            env = environment,
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
        tests = [":%s_%s" % (name, test) for test in tests],
    )
