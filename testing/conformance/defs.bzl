"""The conformance suite as a test of a backend, of this repository or another."""

load("//third_party/bazel:cc.bzl", "dsd_cc_test")

def conformance_test(name, backend, target, deps = [], data = [], env = {}, every_world_size = True, tags = []):
    """Declares a test that runs all cases on one backend.

    Args:
      name: of the test.
      backend: the name under which it is registered.
      target: the library that registers it.
      deps: what else is linked.
      data: what `env` names.
      env: added to the environment of the ranks. With DSD_TEST_RANK_THREADS=1 these are threads of the test.
      every_world_size: whether each case runs in all its world sizes; else in one of them, in turn, and
        `<name>_every_world_size`, tagged t3, runs it in all.
      tags: as for cc_test.
    """
    _conformance_test(name, backend, target, deps, data, env, every_world_size, tags)
    if not every_world_size:
        _conformance_test(name + "_every_world_size", backend, target, deps, data, env, True, ["t3"])

def _conformance_test(name, backend, target, deps, data, env, every_world_size, tags):
    dsd_cc_test(
        name = name,
        size = "large",
        srcs = [Label("//testing/conformance:conformance_test.cc")],
        data = data,
        env = dict(env, DSD_EVERY_WORLD_SIZE = "1" if every_world_size else "0"),
        local_defines = ["DSD_BACKEND=\\\"%s\\\"" % backend],
        main = Label("//testing/harness:rank_main"),
        tags = tags,
        deps = deps + [
            target,
            Label("//core/base"),
            Label("//core/comm"),
            Label("//testing/conformance"),
            Label("//testing/conformance:cases"),
            Label("//testing/harness:rank_processes"),
            Label("//testing/harness:rank_threads"),
            Label("@com_google_absl//absl/log:check"),
            Label("@com_google_absl//absl/strings"),
            Label("@com_google_absl//absl/synchronization"),
        ],
    )
