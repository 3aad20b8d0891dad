"""@digits: 1,797 handwritten digits (64 pixels and a label per line) out of the scikit-learn wheel."""

load("//third_party/bazel:pypi.bzl", "PYPI_ATTRS", "find_python", "pypi_parts")

_SCIKIT_LEARN = "scikit-learn==1.7.2 --hash=sha256:89877e19a80c7b11a2891a27c21c4894fb18e2c2e077815bcade10d34287b20d"

_UNZIP = "import gzip, shutil; shutil.copyfileobj(gzip.open('digits.csv.gz'), open('digits.csv', 'wb'))"

def _impl(ctx):
    pypi_parts(
        ctx,
        name = "digits-scikit-learn-1.7.2",
        requirements = [_SCIKIT_LEARN],
        kind = "wheel",
        take = {
            "scikit_learn-1.7.2.dist-info/licenses/COPYING": "COPYING",
            "sklearn/datasets/data/digits.csv.gz": "digits.csv.gz",
        },
    )
    result = ctx.execute([find_python(ctx), "-c", _UNZIP], timeout = 60)
    if result.return_code:
        fail("@%s: digits.csv.gz could not be unpacked: %s" % (ctx.name, result.stderr))
    ctx.file("WORKSPACE", "workspace(name = \"digits\")\n")
    ctx.file("BUILD.bazel", "licenses([\"notice\"])\n\nexports_files([\"digits.csv\"])\n")

digits = repository_rule(
    implementation = _impl,
    attrs = PYPI_ATTRS,
)
