"""build_tools/nvcc.py: finding the toolkit, and one compilation with its log, over programs that play nvcc."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "build_tools").is_dir():
    pytest.skip("runs from a checkout only", allow_module_level=True)

SPEC = importlib.util.spec_from_file_location("fastconv_nvcc", ROOT / "build_tools" / "nvcc.py")
assert SPEC is not None
assert SPEC.loader is not None
nvcc = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = nvcc  # dataclasses look their module up
SPEC.loader.exec_module(nvcc)

REPORT = """ptxas info    : Compiling entry function 'f' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 9 registers
"""


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def toolkit(folder: Path, *, release: str = "13.0", missing: str = "") -> Path:
    """A folder with the layout of NVIDIA's packages, whose nvcc answers the two questions that are asked of it."""
    for name in ("include/cuda_runtime.h", "include/cccl/nv/target", "lib/libcudart_static.a"):
        if not name.endswith(missing or "?"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
    return program(
        folder / "bin" / "nvcc",
        f"""case $1 in
--version) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
--dryrun) cat >&2 <<'END'
#$ TOP={folder}/bin/..
#$ INCLUDES="-I{folder}/bin/../include"
#$ SYSTEM_INCLUDES="-isystem" "{folder}/bin/../include/cccl"
#$ LIBRARIES=  "-L{folder}/lib/stubs" "-L{folder}/lib"
END
esac""",
    )


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch, tmp_path):
    """No toolkit but the test's own."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(nvcc.shutil, "which", lambda name: None)
    monkeypatch.setattr(nvcc, "USUAL_PLACE", tmp_path / "usual" / "bin" / "nvcc")
    monkeypatch.setattr(nvcc.sys, "path", [str(tmp_path / "site-packages")])


def test_there_may_be_none():
    assert nvcc.find_nvcc() is None
    assert nvcc.find_toolkit() is None


def test_places_are_searched_in_order(monkeypatch, tmp_path):
    packages = toolkit(tmp_path / "site-packages" / "nvidia" / "cu13")
    assert nvcc.find_nvcc() == packages
    usual = toolkit(tmp_path / "usual")
    assert nvcc.find_nvcc() == usual
    on_path = program(tmp_path / "script", "exec real-nvcc")
    monkeypatch.setattr(nvcc.shutil, "which", lambda name: str(on_path))
    assert nvcc.find_nvcc() == on_path
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "usual"))
    assert nvcc.find_nvcc() == usual


def test_headers_and_runtime_are_those_of_the_nvcc_behind_a_script(monkeypatch, tmp_path):
    real = toolkit(tmp_path / "cuda")
    script = program(tmp_path / "bin" / "nvcc", f'exec {real} "$@"')
    monkeypatch.setattr(nvcc.shutil, "which", lambda name: str(script))
    found = nvcc.find_toolkit()
    assert found.nvcc == real
    assert found.release == "13.0"
    assert found.include_dirs == (tmp_path / "cuda" / "include", tmp_path / "cuda" / "include" / "cccl")
    assert found.static_runtime == tmp_path / "cuda" / "lib" / "libcudart_static.a"


@pytest.mark.parametrize(
    ("release", "missing", "expected"),
    [
        ("12.4", "", r"is of CUDA 12.4, expected 12.5 or later"),
        ("13.0", "libcudart_static.a", r"no libcudart_static.a \(looked in .*nvidia-cuda-runtime"),
        ("13.0", "cuda_runtime.h", r"no cuda_runtime.h"),
    ],
)
def test_a_toolkit_that_cannot_be_used_is_refused(monkeypatch, tmp_path, release, missing, expected):
    toolkit(tmp_path, release=release, missing=missing)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(nvcc.ToolkitError, match=expected):
        nvcc.find_toolkit()


def test_a_wrong_folder_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_PATH", str(tmp_path))
    with pytest.raises(nvcc.ToolkitError, match=f"CUDA_PATH is '{tmp_path}'"):
        nvcc.find_nvcc()


@pytest.fixture
def compile_file(monkeypatch, tmp_path):
    """compile_file(name, script) runs `script` as nvcc for csrc/pool/<name>; gives the exit status and the log."""
    monkeypatch.setattr(nvcc, "ROOT", tmp_path)
    monkeypatch.setattr(nvcc, "LOGS", tmp_path / "build" / "cuda")

    def run(name: str, script: str) -> tuple[int, Path]:
        source = tmp_path / "csrc" / "pool" / name
        source.parent.mkdir(parents=True, exist_ok=True)
        compiler = program(tmp_path / "nvcc", script)
        command = [str(compiler), "-c", str(source), "-o", str(tmp_path / "object"), *nvcc.FLAGS]
        return nvcc.compile_one(command), (tmp_path / "build" / "cuda" / "pool" / name).with_suffix(".ptxas")

    return run


def test_ptxas_report_is_kept_and_not_shown(compile_file, capfd):
    status, log = compile_file("cuda_max.cu", f"cat >&2 <<'END'\n{REPORT}END")
    assert status == 0
    assert log.read_text() == REPORT
    assert capfd.readouterr().out == ""


def test_warnings_are_kept_and_shown(compile_file, capfd):
    warning = "cuda_max.cu(3): warning #177-D: variable x was declared but never referenced\n"
    status, log = compile_file("cuda_max.cu", f"cat <<'END'\n{warning}{REPORT}END")
    assert status == 0
    assert log.read_text() == warning + REPORT
    assert capfd.readouterr().out == warning


def test_a_failed_compilation_leaves_no_log(compile_file, capfd):
    _, log = compile_file("cuda_max.cu", "echo fine")
    assert log.exists()
    status, log = compile_file("cuda_max.cu", "echo 'cuda_max.cu(3): error: x is undefined' >&2; exit 2")
    assert status == 2
    assert not log.exists()
    assert "error: x is undefined" in capfd.readouterr().out


def test_a_files_name_says_for_which_architectures(compile_file):
    show = 'for word in "$@"; do echo "$word"; done'
    _, log = compile_file("cuda_max.cu", show)
    assert set(nvcc.SM80_FLAGS + nvcc.SM90_FLAGS) <= set(log.read_text().split())
    _, log = compile_file("cuda_max_sm90.cu", show)
    assert set(nvcc.SM90_FLAGS) <= set(log.read_text().split())
    assert not set(nvcc.SM80_FLAGS) & set(log.read_text().split())
