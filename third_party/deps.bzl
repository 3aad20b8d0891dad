"""The repositories that this project needs.

An embedder declares `@dsd`, loads this file and calls `dsd_dependencies()`. A repository that the embedder declared
before the call is left as it is. Each repository is fetched when a build first needs it, and not before.
"""

load("//third_party/abseil:repo.bzl", "abseil")
load("//third_party/bazel:system_library.bzl", "system_library")
load("//third_party/digits:repo.bzl", "digits")
load("//third_party/gloo:repo.bzl", "gloo")
load("//third_party/googletest:repo.bzl", "googletest")
load("//third_party/libtorch:repo.bzl", "libtorch", "libtorch_cuda")
load("//third_party/nccl:repo.bzl", "nccl_headers")
load("//third_party/pytorch_python:repo.bzl", "pytorch_python")
load("//third_party/rules_cc:repo.bzl", "coverage_tools_stub", "rules_cc_stub")
load("//third_party/ucx:repo.bzl", "ucx")

def _maybe(rule, name, **kwargs):
    if not native.existing_rule(name):
        rule(name = name, **kwargs)

def _debian_bazel_repositories():
    """What Debian's Bazel would download: it finds these on the system instead."""
    _maybe(rules_cc_stub, name = "rules_cc")
    _maybe(coverage_tools_stub, name = "remote_coverage_tools")
    for name, path in {
        "bazel_skylib": "/usr/share/bazel/tools/skylib",
        "platforms": "/usr/share/bazel/tools/platforms",
        "rules_java": "/usr/share/bazel/rules/java",
        "rules_proto": "/usr/share/bazel/rules/proto",
    }.items():
        _maybe(native.local_repository, name = name, path = path)

def _system_libraries():
    """Small libraries that every distribution packages."""
    for name, (package, headers, libraries) in {
        "cli11": ("libcli11-dev", ["CLI"], []),
        "libdeflate": ("libdeflate-dev", ["libdeflate.h"], ["libdeflate.a"]),
        "nlohmann_json": ("nlohmann-json3-dev", ["nlohmann"], []),
        "openssl": ("libssl-dev", ["openssl"], ["libcrypto.a"]),
        "xxhash": ("libxxhash-dev", ["xxhash.h", "xxh3.h"], []),
        "zstd": ("libzstd-dev", ["zstd.h"], ["libzstd.a"]),
    }.items():
        _maybe(
            system_library,
            name = name,
            build_file = "@dsd//third_party/%s:%s.BUILD" % (name, name),
            headers = headers,
            libraries = libraries,
            package = package,
        )
    _maybe(
        system_library,
        name = "google_benchmark",
        build_file = "@dsd//third_party/benchmark:benchmark.BUILD",
        headers = ["benchmark"],
        libraries = ["libbenchmark.so", "libbenchmark_main.a"],
        package = "libbenchmark-dev",
    )

def dsd_dependencies():
    """Declares every repository of this project that is not declared yet."""

    # Debian's build of Bazel 4.2.3 states no version. All others bring these repositories along.
    if not getattr(native, "bazel_version", ""):
        _debian_bazel_repositories()
    _maybe(abseil, name = "com_google_absl")
    _maybe(digits, name = "digits")
    _maybe(gloo, name = "gloo")
    _maybe(googletest, name = "com_google_googletest")
    _maybe(libtorch, name = "libtorch")
    _maybe(libtorch_cuda, name = "libtorch_cuda")
    _maybe(nccl_headers, name = "nccl_headers")
    _maybe(pytorch_python, name = "pytorch_python")
    _maybe(ucx, name = "ucx")
    _system_libraries()
