"""@com_google_absl: Abseil out of the source package of grpcio, which carries it without its build files."""

load("//third_party/bazel:pypi.bzl", "PYPI_ATTRS", "pypi_parts")

_GRPCIO = "grpcio==1.76.0 --hash=sha256:7be78388d6da1a25c0d5ec506523db58b18be22d9c37d8d3a32c08be4987bd73"

# Upstream's labels, by package; a target that is named like its package is left out. All stand for one library.
_LABELS = {
    "algorithm": ["container"],
    "base": [
        "config",
        "core_headers",
        "dynamic_annotations",
        "endian",
        "log_severity",
        "no_destructor",
        "nullability",
        "prefetch",
    ],
    "cleanup": [],
    "container": [
        "btree",
        "fixed_array",
        "flat_hash_map",
        "flat_hash_set",
        "inlined_vector",
        "linked_hash_map",
        "node_hash_map",
        "node_hash_set",
    ],
    "crc": [
        "crc32c",
    ],
    "debugging": [
        "failure_signal_handler",
        "leak_check",
        "stacktrace",
        "symbolize",
    ],
    "flags": [
        "commandlineflag",
        "config",
        "flag",
        "marshalling",
        "parse",
        "reflection",
        "usage",
    ],
    "functional": [
        "any_invocable",
        "bind_front",
        "function_ref",
        "overload",
    ],
    "hash": [],
    "log": [
        "absl_check",
        "absl_log",
        "check",
        "die_if_null",
        "globals",
        "initialize",
        "log_entry",
        "log_sink",
        "log_sink_registry",
        "vlog_is_on",
    ],
    "memory": [],
    "meta": ["type_traits"],
    "numeric": [
        "bits",
        "int128",
    ],
    "random": [
        "bit_gen_ref",
        "distributions",
        "seed_sequences",
    ],
    "status": ["statusor"],
    "strings": [
        "charset",
        "cord",
        "has_absl_stringify",
        "str_format",
        "string_view",
    ],
    "synchronization": [],
    "time": [
        "civil_time",
        "clock_interface",
        "simulated_clock",
    ],
    "types": [
        "any",
        "compare",
        "optional",
        "span",
        "variant",
    ],
    "utility": [],
}

# Labels of other libraries.
_TEST_LABELS = {
    "log": ["scoped_mock_log"],
    "status": ["status_matchers"],
}

_ALIAS = """
alias(
    name = "{name}",
    actual = "{actual}",
)
"""

def _impl(ctx):
    pypi_parts(
        ctx,
        name = "abseil-20250512",
        requirements = [_GRPCIO],
        take = {
            "grpcio-1.76.0/third_party/abseil-cpp/absl/": "src/absl/",
            "grpcio-1.76.0/LICENSE": "LICENSE",
        },
        instead = "Without a package index: declare your own com_google_absl before dsd_dependencies().",
    )
    for package, names in _LABELS.items():
        # crc, log and others are packages and libraries at once; `types` and a few more are packages only.
        text = "package(default_visibility = [\"//visibility:public\"])\n"
        for name in names + ([] if package in names else [package]):
            text += _ALIAS.format(name = name, actual = "//:absl")
        for name in _TEST_LABELS.get(package, []):
            text += _ALIAS.format(name = name, actual = "//:" + name)
        ctx.file("absl/%s/BUILD.bazel" % package, text)
    ctx.file("WORKSPACE", "workspace(name = \"com_google_absl\")\n")
    ctx.template("BUILD.bazel", ctx.attr._build_file)

abseil = repository_rule(
    implementation = _impl,
    attrs = dict(
        PYPI_ATTRS,
        _build_file = attr.label(default = Label("//third_party/abseil:abseil.BUILD")),
    ),
)
