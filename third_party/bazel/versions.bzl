"""Versions and hashes that more than one repository names."""

TORCH_VERSION = "2.11.0"

# Wheels for Python 3.11; LibTorch itself does not depend on Python.
TORCH = "torch==2.11.0 --hash=sha256:7aa2f9bbc6d4595ba72138026b2074be1233186150e9292865e04b7a63b8c67a"

NVIDIA_RUNTIME = "nvidia-cuda-runtime==13.0.96 --hash=sha256:7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548"

NVIDIA_CUPTI = "nvidia-cuda-cupti==13.0.85 --hash=sha256:4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8"
