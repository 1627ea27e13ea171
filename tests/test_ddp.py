"""DistributedDataParallel over gloo: two processes with half of the batch each end with the whole batch's gradients."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastconv

SCRIPT = """
import sys
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import fastconv

def network(module):
    torch.manual_seed(0)
    return nn.Sequential(
        module.Conv2d(3, 8, 3, padding=1), nn.ReLU(), module.MaxPool2d(2), module.Conv2d(8, 8, 3, groups=8),
        module.AvgPool2d(2), module.LocalResponseNorm(3), module.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ).double()

rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
images = torch.randn(8, 3, 14, 14, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
net = DistributedDataParallel(network(fastconv))
net(images[4 * rank : 4 * rank + 4]).square().mean().backward()
whole = network(nn)
whole(images).square().mean().backward()
for (name, mine), theirs in zip(net.module.named_parameters(), whole.parameters()):
    torch.testing.assert_close(mine.grad, theirs.grad, msg=lambda text: name + ": " + text)
counts = fastconv.stats()
assert counts["conv2d_weight_grad/tiled"] >= 1 and not [name for name in counts if name.startswith("torch/")], counts
dist.destroy_process_group()
print("equal")
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_gradients_are_the_whole_batchs(tmp_path):
    folder = str(Path(fastconv.__file__).resolve().parent.parent)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])}
    if "lo" in {name for _, name in socket.if_nameindex()}:
        env["GLOO_SOCKET_IFNAME"] = "lo"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), str(tmp_path / "store")],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=240) for process in processes]
    for process, (out, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, err
        assert "equal" in out
