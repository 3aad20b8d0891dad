"""@pytorch_python: a Python with PyTorch for the CPU, for tests against the original.

`@pytorch_python//:python` is a script that runs it; a test names it in `data` and finds it by $(rootpath).
"""

load("//third_party/bazel:pypi.bzl", "PYPI_ATTRS", "find_python", "pypi_parts")
load("//third_party/bazel:versions.bzl", "NVIDIA_CUPTI", "NVIDIA_RUNTIME", "TORCH_VERSION")
load(":requirements.bzl", "REQUIREMENTS")

# What tests import. Running it once also leaves compiled modules behind, which tests in a sandbox cannot write.
_CHECK = """
import numpy, safetensors.torch, torch
import torch.distributed.checkpoint, torch.distributed.fsdp, torch.distributed.tensor.parallel, torch.multiprocessing
version = torch.__version__.split("+")[0]
assert version == "%s", "torch is " + version
torch.ones(2).sum()
""" % TORCH_VERSION

# libtorch_cuda.so, without which the wheel's Python module does not load, names two gigabytes of libraries that
# nothing calls on a CPU. Empty ones of the same names take their place: the file name, then the symbol versions that
# its users ask for.
_EMPTY = {
    "libcublas.so.13": "libcublas.so.13 { };",
    "libcublasLt.so.13": "libcublasLt.so.13 { };",
    "libcudnn.so.9": "libcudnn.so.9 { };",
    "libcufft.so.12": "libcufft.so.12 { };",
    "libcufile.so.0": "",
    "libcurand.so.10": "libcurand.so.10 { };",
    "libcusparse.so.12": "libcusparse.so.12 { };",
    "libcusparseLt.so.0": "",
    "libnccl.so.2": "",
    "libnvshmem_host.so.3": "NVSHMEM { };",
}

# The one function whose address is taken when a library is loaded.
_EMPTY_SOURCE = "int nvshmem_init(void) { return -1; }\n"

# Python asks the loader to resolve every function at once; with this, one that is missing is missed when called.
_LAZY = """import os
import sys

sys.setdlopenflags(os.RTLD_LAZY)
"""

def _empty_libraries(ctx, folder):
    """Compiles the libraries of _EMPTY into a folder."""
    compiler = [c for c in [ctx.os.environ.get("CC"), ctx.which("gcc"), ctx.which("cc"), ctx.which("clang")] if c]
    if not compiler:
        fail("@%s needs a C compiler; looked for $CC, gcc, cc and clang on PATH (Debian: g++)" % ctx.name)
    ctx.file("empty.c", _EMPTY_SOURCE)
    for name, versions in _EMPTY.items():
        command = [compiler[0], "-shared", "-fPIC", "-o", folder + "/" + name, "-Wl,-soname," + name, "empty.c"]
        if versions:
            ctx.file("versions", versions + "\nOTHER { global: *; };\n")
            command.append("-Wl,--version-script=versions")
        result = ctx.execute(command, timeout = 60)
        if result.return_code:
            fail("@%s: %s failed: %s" % (ctx.name, " ".join([str(c) for c in command]), result.stderr))

def _script(python, settings):
    return "#!/bin/sh\n# PyTorch %s for the CPU.\n%s\nexport CUDA_VISIBLE_DEVICES=\nexec '%s' -s \"$@\"\n" % (
        TORCH_VERSION,
        settings,
        python,
    )

def _check(ctx):
    return ctx.execute([ctx.path("python.sh"), "-c", _CHECK], timeout = 600, environment = {
        "PYTHONDONTWRITEBYTECODE": "",
    })

def _from_user(ctx, python):
    """Takes the user's Python if it can do what tests need; says so if not."""
    search = ctx.os.environ.get("LD_LIBRARY_PATH")
    settings = "export LD_LIBRARY_PATH='%s'" % search if search else ""
    ctx.file("python.sh", _script(python, settings), executable = True)
    result = _check(ctx)
    if result.return_code == 0:
        return True

    # buildifier: disable=print
    print("@%s: DSD_PYTHON=%s is not used, because it cannot import what the tests need:\n%s" %
          (ctx.name, python, result.stderr))
    return False

def _from_wheels(ctx):
    pypi_parts(
        ctx,
        name = "pytorch-python-" + TORCH_VERSION,
        requirements = REQUIREMENTS + [NVIDIA_RUNTIME, NVIDIA_CUPTI],
        kind = "own wheel",
        take = {
            "": "site/",
            "torch/include/": None,
            "torch/share/": None,
        },
        instead = "Without a package index: set DSD_PYTHON to a Python with torch %s, numpy and safetensors." %
                  TORCH_VERSION,
    )
    _empty_libraries(ctx, "site/torch/lib")
    ctx.file("site/sitecustomize.py", _LAZY)

    # The script finds its packages from where it really lies, so that it reads the same in every checkout and results
    # of tests can be shared between them.
    settings = "here=$(dirname \"$(readlink -f \"$0\")\")\nexport PYTHONPATH=\"$here/site${PYTHONPATH:+:$PYTHONPATH}\""
    ctx.file("python.sh", _script(find_python(ctx), settings), executable = True)
    result = _check(ctx)
    if result.return_code:
        fail("@%s: PyTorch was fetched, but cannot be imported; set DSD_PYTHON to a Python with torch %s, numpy and safetensors.\n%s" %
             (ctx.name, TORCH_VERSION, result.stderr))

def _impl(ctx):
    python = ctx.os.environ.get("DSD_PYTHON")
    if not python or not _from_user(ctx, python):
        _from_wheels(ctx)
    ctx.file("WORKSPACE", "workspace(name = \"pytorch_python\")\n")
    ctx.file("BUILD.bazel", """package(default_visibility = ["//visibility:public"])

licenses(["notice"])

filegroup(
    name = "python",
    srcs = ["python.sh"],
)
""")

pytorch_python = repository_rule(
    implementation = _impl,
    attrs = PYPI_ATTRS,
    environ = ["DSD_PYTHON"],
)
