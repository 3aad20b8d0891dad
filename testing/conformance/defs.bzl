"""The conformance suite as a test per backend."""

load("//third_party/bazel:cc.bzl", "dsd_cc_test")

def conformance_test(name, backends, cases, variants = {}):
    """Declares <name>_<backend> for each backend, one more for each variant, and <name> for all.

    Args:
      name: of the suite of all.
      backends: names of folders in //backends.
      cases: libraries of cases, with alwayslink.
      variants: name -> a dict: "backend", "env" (an environment) and "data" (what that names).
    """
    runs = {backend: {"backend": backend} for backend in backends}
    runs.update(variants)
    for run, how in runs.items():
        dsd_cc_test(
            name = "%s_%s" % (name, run),
            size = "large",
            srcs = ["conformance_test.cc"],
            data = how.get("data", []),
            env = how.get("env", {}),
            local_defines = ["DSD_BACKEND=\\\"%s\\\"" % how["backend"]],
            main = "//testing/harness:rank_main",
            tags = ["cpu:2"],
            deps = cases + [
                ":conformance",
                "//backends/" + how["backend"],
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
        tests = [":%s_%s" % (name, run) for run in runs],
    )
