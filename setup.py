"""Builds the extensions; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import glob
import os

from setuptools import setup


def extensions():
    from torch.utils.cpp_extension import CppExtension

    sources = sorted(["csrc/ops.cpp", *glob.glob("csrc/common/*.cpp"), *glob.glob("csrc/*/cpu*.cpp")])
    flags = ["-O3", "-std=c++20", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi", "-ffp-contract=off",
             "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    return [CppExtension("fastconv._C_cpu", sources, include_dirs=[os.path.abspath("csrc")], extra_compile_args=flags, py_limited_api=True)]


def build_ext():
    from torch.utils.cpp_extension import BuildExtension

    return BuildExtension


setup(name="fastconv", version="0.1.0", packages=["fastconv"], ext_modules=extensions(), cmdclass={"build_ext": build_ext()})
