"""The backends of this repository."""

# Each is a folder here with a target of its name that registers it.
BACKENDS = [
    "gloo",
    "local",
    "nccl",
    "ucx",
]

StringFlagInfo = provider(
    doc = "The value of a string_flag.",
    fields = {"value": "The value."},
)

def _string_flag_impl(ctx):
    value = ctx.build_setting_value
    if value not in ctx.attr.values:
        fail("--%s=%s: the value must be one of %s" %
             (ctx.label, value, ", ".join(ctx.attr.values)))
    return [StringFlagInfo(value = value)]

string_flag = rule(
    implementation = _string_flag_impl,
    doc = "A flag of the command line with a fixed set of values.",
    attrs = {"values": attr.string_list(mandatory = True, doc = "The values allowed.")},
    build_setting = config.string(flag = True),
)
