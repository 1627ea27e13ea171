"""The lecture's networks of fastconv's layers, and the arithmetic of parameters, FLOPs and receptive fields."""

from __future__ import annotations

from fastconv.models.lenet import LeNet5

__all__ = ["LeNet5"]
