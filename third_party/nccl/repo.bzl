"""@nccl_headers: nccl.h and the headers of the CUDA runtime, where this machine has them."""

def _find(ctx, places, name):
    for place in places:
        path = ctx.path(place + "/include/" + name)
        if path.exists:
            return path.dirname
    return None

def _impl(ctx):
    cuda_places = [p for p in [ctx.os.environ.get("CUDA_HOME")] if p] + ["/usr/local/cuda", "/usr/local", "/usr"]
    nccl_places = [p for p in [ctx.os.environ.get("NCCL_ROOT")] if p] + cuda_places
    nccl = _find(ctx, nccl_places, "nccl.h")
    cuda = _find(ctx, cuda_places, "cuda_runtime.h")
    missing = ""
    if nccl == None:
        missing = "no nccl.h in include/ of %s" % ", ".join(nccl_places)
    elif cuda == None:
        missing = "no cuda_runtime.h in include/ of %s" % ", ".join(cuda_places)
    else:
        ctx.symlink(nccl.get_child("nccl.h"), "nccl/nccl.h")
        ctx.symlink(cuda, "cuda")
    ctx.file("WORKSPACE", "workspace(name = \"nccl_headers\")\n")
    ctx.template("BUILD.bazel", ctx.attr._build_file, {"%{missing}": missing})

nccl_headers = repository_rule(
    implementation = _impl,
    attrs = {"_build_file": attr.label(default = Label("//third_party/nccl:nccl_headers.BUILD"))},
    environ = [
        "CUDA_HOME",
        "NCCL_ROOT",
    ],
)
