"""@libtorch, @libtorch_cuda: an installed LibTorch where there is one, else out of the wheel of the same version."""

load("//third_party/bazel:elf.bzl", "elf_entries")
load("//third_party/bazel:pypi.bzl", "PYPI_ATTRS", "find_torch", "pypi_parts")
load("//third_party/bazel:versions.bzl", "NVIDIA_CUPTI", "NVIDIA_RUNTIME", "TORCH", "TORCH_VERSION")

# Shared objects of libtorch_cpu.so's closure that LibTorch's own folder may lack, by the beginning of their names.
_BESIDE = ["libcudart", "libcupti", "libgomp"]

_NVIDIA_LIB = "nvidia/cu13/lib/"

def _from_wheels(ctx):
    pypi_parts(
        ctx,
        name = "libtorch-" + TORCH_VERSION,
        requirements = [TORCH, NVIDIA_RUNTIME, NVIDIA_CUPTI],
        kind = "wheel",
        take = {
            "torch/include/": "include/",
            "torch/lib/libc10.so": "lib/libc10.so",
            "torch/lib/libgomp.so.1": "lib/libgomp.so.1",
            "torch/lib/libtorch_cpu.so": "lib/libtorch_cpu.so",
            "torch-%s.dist-info/licenses/" % TORCH_VERSION: "licenses/",
            _NVIDIA_LIB + "libcudart.so.13": "lib/libcudart.so.13",
            _NVIDIA_LIB + "libcupti.so.13": "lib/libcupti.so.13",
            "nvidia_cuda_runtime-13.0.96.dist-info/licenses/License.txt": "licenses/nvidia_cuda_runtime.txt",
        },
        instead = "Without a package index: set LIBTORCH_ROOT to an unpacked LibTorch %s, or DSD_PYTHON to a Python that has torch %s." %
                  (TORCH_VERSION, TORCH_VERSION),
    )

def _from_folder(ctx, root, origin):
    root = ctx.path(root)
    core = root.get_child("lib").get_child("libtorch_cpu.so")
    version = root.get_child("include").get_child("torch").get_child("headeronly").get_child("version.h")
    advice = "Set LIBTORCH_ROOT to a LibTorch %s, the folder with include/ and lib/, or leave it and DSD_PYTHON unset." % TORCH_VERSION
    for part in [version, core]:
        if not part.exists:
            fail("@%s: %s is no LibTorch (%s): there is no %s. %s" % (ctx.name, root, origin, part, advice))
    text = ctx.read(version)
    for number, part in zip(TORCH_VERSION.split("."), ["MAJOR", "MINOR"]):
        if "#define TORCH_VERSION_%s %s\n" % (part, number) not in text:
            fail("@%s: %s (%s) is another version: %s lacks %s = %s. %s" %
                 (ctx.name, root, origin, version, part, number, advice))

    cuda = ctx.os.environ.get("CUDA_HOME", "/usr/local/cuda")
    places = [
        str(root) + "/lib",
        str(root.dirname) + "/nvidia/cu13/lib",
        cuda + "/lib64",
        cuda + "/extras/CUPTI/lib64",
    ]
    pending = ["libtorch_cpu.so", "libc10.so"] + elf_entries(ctx, core, "NEEDED")
    found = {}
    for name in pending:
        if name in found:
            continue
        for place in places:
            if ctx.path(place).get_child(name).exists:
                found[name] = place
                ctx.symlink(place + "/" + name, "lib/" + name)
                break
        if name not in found and [prefix for prefix in _BESIDE if name.startswith(prefix)]:
            fail("@%s: %s needs %s; looked in %s. Set CUDA_HOME, or leave LIBTORCH_ROOT and DSD_PYTHON unset." %
                 (ctx.name, core, name, ", ".join(places)))
    ctx.symlink(root.get_child("include"), "include")
    for name in ["LICENSE", "NOTICE"]:
        if root.get_child(name).exists:
            ctx.symlink(root.get_child(name), "licenses/" + name)

    # buildifier: disable=print
    print("@%s is %s (%s)" % (ctx.name, root, origin))

def _impl(ctx):
    root = ctx.os.environ.get("LIBTORCH_ROOT")
    python, package = (None, None) if root else find_torch(ctx)
    if root:
        _from_folder(ctx, root, "LIBTORCH_ROOT")
    elif package:
        _from_folder(ctx, package, "the torch package of " + python)
    else:
        _from_wheels(ctx)
    ctx.file("WORKSPACE", "workspace(name = \"libtorch\")\n")
    ctx.template("BUILD.bazel", ctx.attr._build_file)

libtorch = repository_rule(
    implementation = _impl,
    attrs = dict(
        PYPI_ATTRS,
        _build_file = attr.label(default = Label("//third_party/libtorch:libtorch.BUILD")),
    ),
    environ = ["DSD_PYTHON", "LIBTORCH_ROOT"],
)

_CUDA_LIBRARIES = ["libtorch_cuda.so", "libc10_cuda.so"]

def _cuda_impl(ctx):
    root = ctx.os.environ.get("LIBTORCH_ROOT")
    if not root:
        root = find_torch(ctx)[1]
    if root:
        for name in _CUDA_LIBRARIES:
            library = ctx.path(root).get_child("lib").get_child(name)
            if not library.exists:
                fail("@%s: there is no %s: this LibTorch was built without CUDA" % (ctx.name, library))
            ctx.symlink(library, "lib/" + name)
    else:
        pypi_parts(
            ctx,
            name = "libtorch-cuda-" + TORCH_VERSION,
            requirements = [TORCH],
            kind = "wheel",
            take = {"torch/lib/" + name: "lib/" + name for name in _CUDA_LIBRARIES},
            instead = "Without a package index: set LIBTORCH_ROOT or DSD_PYTHON, see //third_party/libtorch.",
        )
    ctx.file("WORKSPACE", "workspace(name = \"libtorch_cuda\")\n")
    ctx.template("BUILD.bazel", ctx.attr._build_file)

libtorch_cuda = repository_rule(
    implementation = _cuda_impl,
    attrs = dict(
        PYPI_ATTRS,
        _build_file = attr.label(default = Label("//third_party/libtorch:libtorch_cuda.BUILD")),
    ),
    environ = ["DSD_PYTHON", "LIBTORCH_ROOT"],
)
