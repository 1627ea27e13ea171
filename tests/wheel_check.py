"""Builds the wheel once and runs it beside several releases of torch, each in a fresh environment of its own.

    python tests/wheel_check.py 2.13.0 2.10.0       # what `make wheel-check TORCH_VERSIONS=...` calls

Nothing is rebuilt between the releases: that is what the stable ABI promises.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Run by the fresh environment's Python, outside the repository, so that the installed package is the one found.
CHECK = """
import torch, fastconv
from pathlib import Path
from torch import nn

assert "site-packages" in fastconv.__file__, fastconv.__file__
torch.manual_seed(0)
x = torch.randn(2, 8, 19, 23, requires_grad=True)
pairs = [
    (lambda: nn.Conv2d(8, 16, 3, stride=2, padding=1), lambda: fastconv.Conv2d(8, 16, 3, stride=2, padding=1)),
    (lambda: nn.Conv2d(8, 8, 5, groups=8, padding="same"), lambda: fastconv.Conv2d(8, 8, 5, groups=8, padding="same")),
    (lambda: nn.MaxPool2d(3, 2, 1), lambda: fastconv.MaxPool2d(3, 2, 1)),
    (lambda: nn.AvgPool2d(2), lambda: fastconv.AvgPool2d(2)),
]
for theirs, ours in pairs:
    results = []
    for make in (theirs, ours):
        torch.manual_seed(1)
        layer = make()
        x.grad = None
        y = layer(x)
        y.square().sum().backward()
        with torch.no_grad():
            plain = layer(x)
        per_image = torch.func.vmap(layer)(x.detach()[:, None])
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
        results.append([y.detach(), plain, per_image, compiled, x.grad, *(value.grad for value in layer.parameters())])
    for wanted, got in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
stats = fastconv.stats()
assert stats and not [kernel for kernel in stats if kernel.startswith("torch/")], stats
print(f"torch {torch.__version__}: imported, and", sum(stats.values()), "kernel calls agree with torch.nn")
"""


def build_wheel(folder: Path) -> Path:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, ROOT],
        check=True,
    )
    [wheel] = folder.glob("fastconv-*.whl")
    return wheel


def check(wheel: Path, torch_version: str, folder: Path) -> bool:
    """Whether the wheel runs under this release."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, f"torch=={torch_version}", "numpy"], check=True)
    subprocess.run([*install, "--no-deps", wheel], check=True)
    return subprocess.run([python, "-c", CHECK], cwd=folder).returncode == 0


def main(torch_versions: list[str]) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        wheel = build_wheel(Path(scratch))
        print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB", flush=True)
        failed = []
        for version in torch_versions:
            # One after the other and each removed: a CUDA build of torch fills 5 GB.
            with tempfile.TemporaryDirectory() as folder:
                if not check(wheel, version, Path(folder)):
                    failed.append(version)
    if failed:
        print(f"FAILED under torch {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["2.13.0"]))
