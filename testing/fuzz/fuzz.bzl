"""Coverage-guided fuzzers whose corpora ordinary tests replay."""

load("//third_party/bazel:cc.bzl", "dsd_cc_binary", "dsd_cc_test")

def dsd_cc_fuzz(name, srcs, corpus, deps):
    """A fuzzer `name`, for --config=fuzz, and `<name>_replay_test`, which feeds it its corpus.

    Args:
      name: the fuzzer's name.
      srcs: they define LLVMFuzzerTestOneInput.
      corpus: the inputs to begin with and to replay.
      deps: libraries.
    """
    native.filegroup(
        name = name + "_corpus",
        testonly = True,
        srcs = corpus,
    )
    dsd_cc_binary(
        name = name,
        testonly = True,
        srcs = srcs,
        linkopts = ["-fsanitize=fuzzer"],
        tags = ["manual"],
        deps = deps,
    )
    dsd_cc_test(
        name = name + "_replay_test",
        srcs = srcs + ["//testing/fuzz:replay_main.cc"],
        args = ["$(rootpaths :%s_corpus)" % name],
        data = [":%s_corpus" % name],
        main = None,
        deps = deps,
    )
