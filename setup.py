"""The one part of the build that is not data: the native core, which the package does without where there is no compiler."""

import sys
from pathlib import Path

from setuptools import Extension, setup

CORE = Path("kappaquant/kernels/cpu")
FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wno-psabi", "-pthread"]

core = Extension(
    "kappaquant.kernels.cpu._core",
    sources=sorted(str(path) for path in CORE.glob("*.cpp")),
    depends=sorted(str(path) for pattern in ("*.h", "*.inl") for path in CORE.glob(pattern)),
    language="c++",
    extra_compile_args=FLAGS,
    extra_link_args=["-pthread"],
    py_limited_api=True,
    optional=True,
)
# Windows has other flags, and has not been tried
setup(ext_modules=[] if sys.platform == "win32" else [core], options={"bdist_wheel": {"py_limited_api": "cp311"}})
