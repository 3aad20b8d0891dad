"""The C++ rules that every package of this project uses.

They add what must be the same everywhere: the include path "dsd/<package>/<file>.h", the warnings, static linking of
libraries and tests. Every header of a target goes into `hdrs`, also one that only the target itself includes: a header in `srcs`
is not found as "dsd/<package>/<file>.h".
"""

load("@rules_cc//cc:defs.bzl", "cc_binary", "cc_library", "cc_test")

_WARNINGS = [
    "-Wall",
    "-Wextra",
    "-Wno-sign-compare",
    # GCC 12 reports these for correct code inlined out of the standard library and LibTorch.
    "-Wno-maybe-uninitialized",
    "-Wno-missing-field-initializers",
]

# Files that read LibTorch compile a tenth faster in 1.2 GB than in 0.9 with garbage collected.
_GCC_MEMORY = ["--param=ggc-min-heapsize=524288"]

# Of this repository, whichever workspace embeds it and calls the rules.
_WERROR = str(Label("//third_party/bazel:warnings_are_errors"))
_CLANG = str(Label("//third_party/bazel:clang"))

def _copts(copts):
    return _WARNINGS + select({
        _WERROR: ["-Werror"],
        "//conditions:default": [],
    }) + select({
        _CLANG: [],
        "//conditions:default": _GCC_MEMORY,
    }) + copts

def dsd_compile_settings():
    """Declares what the rules ask: whether warnings of this project, and of nothing else, are errors; the compiler."""
    native.config_setting(
        name = "warnings_are_errors",
        define_values = {"dsd_werror": "1"},
        visibility = ["//visibility:public"],
    )
    native.config_setting(
        name = "clang",
        flag_values = {"@bazel_tools//tools/cpp:compiler": "clang"},
        visibility = ["//visibility:public"],
    )

def dsd_cc_library(name, copts = [], linkstatic = True, **kwargs):
    """A cc_library whose headers are included as "dsd/<package>/<file>.h".

    It is linked statically, also into an embedder's cc_test, for which Bazel otherwise makes a shared library of each
    target. Such a library would look in vain for what the program has of OpenSSL and Zstandard and does not export.

    Args:
      name: the target's name.
      copts: added to the project's own.
      linkstatic: as for cc_library.
      **kwargs: as for cc_library.
    """
    package = native.package_name()
    cc_library(
        name = name,
        copts = _copts(copts),
        include_prefix = "dsd/" + package if package else "dsd",
        linkstatic = linkstatic,
        **kwargs
    )

def dsd_cc_binary(name, copts = [], **kwargs):
    """A cc_binary with the project's warnings.

    Args:
      name: the target's name.
      copts: added to the project's own.
      **kwargs: as for cc_binary.
    """
    cc_binary(name = name, copts = _copts(copts), **kwargs)

def dsd_cc_sized_tests(stem, size, amount, long_amount, **kwargs):
    """The test `<stem>_test` of `amount` cases, and, tagged t3, `<stem>_long_test` of `long_amount`.

    Args:
      stem: <stem>_test.cc has a main function of its own, whose argument is the amount.
      size: of the first; the second is enormous.
      amount: None: as without an argument.
      long_amount: of the second.
      **kwargs: as for dsd_cc_test.
    """
    for name, args, test_size, tags in [
        (stem + "_test", [] if amount == None else [str(amount)], size, []),
        (stem + "_long_test", [str(long_amount)], "enormous", ["t3"]),
    ]:
        dsd_cc_test(
            name = name,
            size = test_size,
            srcs = [stem + "_test.cc"],
            args = args,
            main = "@com_google_googletest//:gtest",
            tags = tags,
            **kwargs
        )

def dsd_cc_test(
        name,
        copts = [],
        deps = [],
        main = "@com_google_googletest//:gtest_main",
        size = "small",
        linkstatic = True,
        **kwargs):
    """A cc_test on GoogleTest, linked statically.

    By default Bazel makes a shared library of each target that a test needs, and then a library that registers itself
    does so in the test even where it would be dropped from a program.

    Args:
      name: the target's name.
      copts: added to the project's own.
      deps: libraries; `main` is added.
      main: the library with the main function and GoogleTest; None where the test has its own main.
      size: as for cc_test; a size that says how long the test runs is also its time limit.
      linkstatic: as for cc_test.
      **kwargs: as for cc_test.
    """
    cc_test(
        name = name,
        copts = _copts(copts),
        linkstatic = linkstatic,
        size = size,
        deps = deps + ([main] if main else []),
        **kwargs
    )
