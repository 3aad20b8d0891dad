"""For repository rules: parts of pinned packages of the Python index, by way of pip.

pip is the one client of a package registry that works behind mirrors and proxies as its user has set it up.
"""

load(":versions.bzl", "TORCH_VERSION")

# The attribute that a rule needs to call pypi_parts.
PYPI_ATTRS = {
    "_fetch": attr.label(default = Label("//third_party/bazel:fetch.py")),
}

def find_python(ctx):
    """A Python 3 interpreter that has pip, preferably the system's own.

    Args:
      ctx: the repository context.

    Returns:
      Its path as a string.
    """
    looked = []
    for path in ["/usr/bin/python3", ctx.which("python3")]:
        if not path or not ctx.path(path).exists:
            continue
        looked.append(str(path))
        if ctx.execute([path, "-m", "pip", "--version"], timeout = 60).return_code == 0:
            return str(path)
    fail(("@%s needs python3 with pip; looked at %s. Install them (Debian: python3 python3-pip) or run the build " +
          "through ./bazelw, which does.") % (ctx.name, looked or "/usr/bin/python3 and PATH"))

def pypi_parts(ctx, name, requirements, take, kind = "sdist", dest = ".", instead = ""):
    """Unpacks parts of pinned packages into the repository.

    Args:
      ctx: the repository context; the rule has PYPI_ATTRS.
      name: name and version, for the folder in the user's cache.
      requirements: pip requirement lines with hashes.
      take: what to take: {path or folder/ in the archive: path or folder/ below dest, or None to leave it out}; the
        longest that fits decides.
      kind: "sdist"; "wheel" for CPython 3.11, whatever is installed; or "own wheel" for the Python of find_python.
      dest: folder below the repository's root.
      instead: for the failure text: what to set where the index cannot be reached.
    """
    script = ctx.path(ctx.attr._fetch)
    request = struct(
        name = name,
        requirements = requirements,
        kind = kind,
        take = take,
        dest = str(ctx.path(dest)),
    )
    ctx.report_progress("fetching " + name)
    result = ctx.execute(
        [find_python(ctx), "-B", script, json.encode(request)],
        timeout = 3600,
        environment = {"PIP_REQUIRE_VIRTUALENV": "false", "PYTHONPATH": ""},
    )
    if result.return_code:
        fail("@%s: %s could not be fetched through pip into %s.\n%s%s\n%s" % (
            ctx.name,
            name,
            "${XDG_CACHE_HOME:-~/.cache}/dsd",
            result.stdout,
            result.stderr,
            instead or "Check that pip reaches a package index (PIP_INDEX_URL, pip.conf).",
        ))

# Finds the package without importing it, which takes seconds.
_FIND_TORCH = """
import importlib.util, os, re
spec = importlib.util.find_spec("torch")
if spec and spec.origin:
    folder = os.path.dirname(os.path.realpath(spec.origin))
    text = open(os.path.join(folder, "version.py")).read()
    print(re.search(r"__version__ = '([0-9.]*)", text).group(1), folder, sep=chr(10))
"""

def find_torch(ctx):
    """A Python interpreter with the pinned version of PyTorch: $DSD_PYTHON, else python3.

    Args:
      ctx: the repository context; the rule lists DSD_PYTHON in `environ`.

    Returns:
      The interpreter and the folder of its torch package, or (None, None).
    """
    for python in [ctx.os.environ.get("DSD_PYTHON"), ctx.which("python3")]:
        if not python:
            continue
        result = ctx.execute([python, "-B", "-c", _FIND_TORCH], timeout = 60)
        lines = result.stdout.split("\n")
        if result.return_code == 0 and lines[0] == TORCH_VERSION:
            return str(python), lines[1]
    return None, None
