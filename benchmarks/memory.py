"""Peak memory of forward passes of a network in a fresh process: torch, ours converted, ours fused.

python -m benchmarks.memory ResNet-18 16        prints bytes above what was resident before the pass, as JSON

Linux only: the kernel keeps the peak of the resident set, and lets it be reset.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Freed blocks go back to the system at once; otherwise the peak would depend on what the allocator had kept.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def measure(name: str, batch: int) -> dict[str, int] | None:
    """Bytes of each; None where the system does not tell."""
    if not RESET.exists():
        return None
    environment = {**os.environ, **ALLOCATOR, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    command = [sys.executable, "-m", "benchmarks.memory", name, str(batch), str(torch.get_num_threads())]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"measuring memory failed:\n{result.stderr}")
    found: dict[str, int] = json.loads(result.stdout.splitlines()[-1])
    return found


def _status(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _peak(call: Callable[[], object]) -> int:
    """Of two calls, above what was resident before: what the first one keeps for the second counts too."""
    gc.collect()
    RESET.write_text("5")  # the peak becomes what is resident now
    before = _status("VmRSS")
    call()
    call()
    return _status("VmHWM") - before


def main(name: str, batch: int, threads: int) -> None:
    import fastconv
    from benchmarks import networks

    torch.set_num_threads(threads)
    model = networks.make(name).eval()
    x = torch.randn(batch, *networks.IMAGE)
    found = {}
    small = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2)).eval()
    with torch.inference_mode():
        for change in (fastconv.convert, fastconv.fuse):  # thread pools are made
            small(x), change(small)(x)
        for title, change in (("torch", None), ("converted", fastconv.convert), ("fused", fastconv.fuse)):
            changed = model if change is None else change(model)
            found[title] = _peak(lambda changed=changed: changed(x))  # type: ignore[misc]
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else torch.get_num_threads())
