"""A string build setting that refuses values outside a list."""

def _impl(ctx):
    value = ctx.build_setting_value
    if value not in ctx.attr.values:
        fail("--%s=%s: expected one of %s" % (ctx.label, value, ", ".join(ctx.attr.values)))
    return []

string_setting = rule(
    implementation = _impl,
    build_setting = config.string(flag = True),
    attrs = {
        "values": attr.string_list(
            doc = "The values that are allowed.",
            mandatory = True,
        ),
    },
)
