"""What is built, what is shipped, and what a person reads when something is missing."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = next(iter(sorted((ROOT / "fastconv").glob("_C_cpu*.so"))), None)

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="runs from a checkout only")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the build reads, so that builds leave no traces in the working tree."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "CONTRIBUTING.md", "Makefile"):
        shutil.copy(ROOT / name, copy)
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("build_tools", "csrc", "fastconv", "triton_kernels", "tests", "benchmarks", "examples"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    return copy


@pytest.fixture
def torch_out_of_reach(tmp_path: Path) -> dict[str, str]:
    """Environment in which `import torch` fails as where it is not installed."""
    folder = tmp_path / "poison"
    folder.mkdir()
    (folder / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    return {**os.environ, "PYTHONPATH": str(folder)}


def setup_py(folder: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "setup.py", *arguments], cwd=folder, env=env, capture_output=True, text=True)


def load_setup_py() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fastconv_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_metadata_needs_no_torch(checkout, torch_out_of_reach):
    result = setup_py(checkout, "--quiet", "egg_info", env=torch_out_of_reach)
    assert result.returncode == 0, result.stderr
    metadata = (checkout / "fastconv.egg-info" / "PKG-INFO").read_text()
    assert "Name: fastconv" in metadata
    assert "License-Expression: BSD-3-Clause" in metadata
    requirements = re.findall(r"^Requires-Dist: ([^;\n]*)$", metadata, re.MULTILINE)
    assert requirements == ["torch>=2.10"]


def test_sdist_needs_no_torch_and_holds_all_that_a_build_reads(checkout, torch_out_of_reach):
    result = setup_py(checkout, "--quiet", "sdist", env=torch_out_of_reach)
    assert result.returncode == 0, result.stderr
    [archive] = (checkout / "dist").glob("fastconv-*.tar.gz")
    with tarfile.open(archive) as sdist:
        shipped = {name.partition("/")[2] for name in sdist.getnames()}
    wanted = {
        str(path.relative_to(ROOT))
        for folder in ("build_tools", "csrc", "triton_kernels", "fastconv")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in {".so", ".pyc"}
    }
    assert wanted - shipped == set()
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= shipped
    assert not [name for name in shipped if name.endswith((".so", ".o", ".pyc"))]


@pytest.mark.slow
def test_wheel_has_the_package_and_no_sources(tmp_path):
    # From the working tree: its compiled objects are up to date, so this compiles nothing.
    result = setup_py(
        ROOT, "--quiet", "bdist_wheel", "--dist-dir", str(tmp_path), "--bdist-dir", str(tmp_path / "tree")
    )
    assert result.returncode == 0, result.stderr
    [wheel] = tmp_path.glob("*.whl")
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert wheel.name.endswith(f"-{python}-{python}-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "fastconv/_C_cpu.abi3.so" in names
    assert f"fastconv/_C{sysconfig.get_config_var('EXT_SUFFIX')}" in names
    assert {"fastconv/__init__.py", "fastconv/py.typed", "fastconv/triton_kernels/__init__.py"} <= set(names)
    python_files = {str(path.relative_to(ROOT)) for path in (ROOT / "fastconv").rglob("*.py")}
    assert python_files - set(names) == set()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fastconv"}
    assert not [name for name in names if name.endswith((".cpp", ".h"))]


def without_compiler(tmp_path: Path) -> dict[str, str]:
    empty = tmp_path / "empty"
    empty.mkdir()
    return {**{key: value for key, value in os.environ.items() if key not in {"CXX", "CC"}}, "PATH": str(empty)}


def test_a_missing_compiler_is_named_with_the_remedy(checkout, tmp_path):
    result = setup_py(checkout, "build_ext", env=without_compiler(tmp_path))
    assert result.returncode != 0
    assert "no C++ compiler found" in result.stderr
    assert "apt-get install g++" in result.stderr


def test_a_wrong_cxx_is_named(checkout):
    result = setup_py(checkout, "build_ext", env={**os.environ, "CXX": "no-such-compiler"})
    assert result.returncode != 0
    assert "CXX is 'no-such-compiler'" in result.stderr


def test_missing_build_requirements_are_named(checkout, torch_out_of_reach):
    result = setup_py(checkout, "build_ext", env=torch_out_of_reach)
    assert result.returncode != 0
    assert "torch is not installed" in result.stderr
    assert "pip install torch pybind11 ninja" in result.stderr


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("FASTCONV_CUDA", "yes", "FASTCONV_CUDA is 'yes', expected 1 (with CUDA kernels) or 0 (without)"),
        ("FASTCONV_ONLY", "_C_gpu", "FASTCONV_ONLY is '_C_gpu', expected one of _C_cpu, _C, _C_cuda"),
    ],
)
def test_a_wrong_choice_of_libraries_is_named(checkout, variable, value, expected):
    result = setup_py(checkout, "build_ext", env={**os.environ, variable: value})
    assert result.returncode != 0
    assert expected in result.stderr


def test_a_toolkit_that_is_not_there_is_named(checkout, tmp_path):
    environment = {**os.environ, "FASTCONV_CUDA": "1", "FASTCONV_ONLY": "_C_cuda", "CUDA_HOME": str(tmp_path)}
    result = setup_py(checkout, "build_ext", env=environment)
    assert result.returncode != 0
    assert f"CUDA_HOME is '{tmp_path}', but {tmp_path}/bin/nvcc does not exist" in result.stderr
    assert "FASTCONV_CUDA=0 builds without the CUDA kernels" in result.stderr


def test_cuda_kernels_without_nvcc_are_refused_with_the_remedy(monkeypatch):
    module = load_setup_py()
    monkeypatch.setattr(module.nvcc, "find_toolkit", lambda: None)
    with pytest.raises(module.CompileError, match="there is no nvcc.*make cuda.*nvidia-cuda-nvcc.*CUDA_HOME"):
        module.cuda_toolkit()


@pytest.mark.parametrize("wish", ["", "0", "1"])
@pytest.mark.parametrize("toolkit", ["none", "one", "too old"])
@pytest.mark.parametrize("torchs_cuda", [None, "13.0"])
def test_when_the_cuda_library_is_built(monkeypatch, wish, toolkit, torchs_cuda):
    module = load_setup_py()

    def find_toolkit() -> object:
        if toolkit == "too old":
            raise module.nvcc.ToolkitError("nvcc is of CUDA 11.8")
        return None if toolkit == "none" else toolkit

    monkeypatch.setenv("FASTCONV_CUDA", wish)
    monkeypatch.delenv("FASTCONV_ONLY", raising=False)
    monkeypatch.setattr(module.nvcc, "find_toolkit", find_toolkit)
    monkeypatch.setattr(torch.version, "cuda", torchs_cuda)
    everything = [module.OPERATORS, module.INTROSPECTION, module.CUDA]
    wanted = wish == "1" or (wish == "" and toolkit == "one" and torchs_cuda is not None)
    assert module.wanted_extensions(everything) == (everything if wanted else everything[:2])
    monkeypatch.setenv("FASTCONV_ONLY", "_C")
    assert module.wanted_extensions(everything) == [module.INTROSPECTION]


def test_short_memory_means_fewer_compilers(monkeypatch):
    module = load_setup_py()
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: set(range(64)))
    for available_kb, wanted in [(512 * 1024, 1), (7 * 2**20, 4), (2**30, 64)]:
        text = f"MemTotal: 1 kB\nMemAvailable: {available_kb} kB\n"
        monkeypatch.setattr(module.Path, "read_text", lambda _, text=text: text)
        assert module.compilers_at_once() == wanted


def symbols_wanted_by(library: Path) -> list[str]:
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", library], check=True, capture_output=True, text=True
    ).stdout
    return [line.split()[-1] for line in listing.splitlines()]


@pytest.mark.skipif(shutil.which("nm") is None or sys.platform != "linux", reason="needs binutils")
def test_operators_speak_to_torch_through_the_stable_abi_only():
    assert LIBRARY is not None, "fastconv/_C_cpu*.so is not there; run `make setup`"
    wanted = symbols_wanted_by(LIBRARY)
    assert [symbol for symbol in wanted if symbol.startswith(("aoti_torch_", "torch_"))]
    # C++ names of torch change between releases, Python's between versions.
    unstable = [symbol for symbol in wanted if re.match(r"_ZNK?(2at|3c10|5torch)|_?Py", symbol)]
    assert unstable == []


@pytest.mark.skipif(shutil.which("readelf") is None or sys.platform != "linux", reason="needs binutils")
def test_operators_link_libtorch_but_no_python():
    assert LIBRARY is not None, "fastconv/_C_cpu*.so is not there; run `make setup`"
    dynamic = subprocess.run(["readelf", "-d", LIBRARY], check=True, capture_output=True, text=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    # Linked to no library of torch it would not load: torch's own are loaded privately.
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if "python" in name or "cuda" in name]
    # A search path of the machine that built it would be wrong everywhere else.
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def test_lint_tools_have_one_version_everywhere():
    pyproject = (ROOT / "pyproject.toml").read_text()
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    for tool, repository in [("ruff", "ruff-pre-commit"), ("clang-format", "mirrors-clang-format")]:
        [ours] = re.findall(rf'"{tool}==([\d.]+)"', pyproject)
        [theirs] = re.findall(rf"{repository}\n\s+rev: v([\d.]+)", hooks)
        assert ours == theirs, tool


def test_every_make_target_is_described():
    text = (ROOT / "Makefile").read_text()
    [phony] = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    for target in phony.split():
        assert re.search(rf"^{target}:.*## \w", text, re.MULTILINE), f"make {target} has no `## description`"
