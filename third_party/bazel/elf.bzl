"""What shared objects say about themselves, for repository rules."""

def elf_entries(ctx, library, tag):
    """The values of one kind of entry in a shared object's dynamic section.

    Args:
      ctx: the repository context.
      library: path of the shared object.
      tag: "NEEDED" or "SONAME".

    Returns:
      A list of strings.
    """
    result = ctx.execute(["readelf", "-d", library], timeout = 60)
    if result.return_code:
        fail("@%s: `readelf -d %s` failed (Debian package: binutils): %s" % (ctx.name, library, result.stderr))
    return [
        line.split("[")[1].split("]")[0]
        for line in result.stdout.split("\n")
        if "(%s)" % tag in line
    ]
