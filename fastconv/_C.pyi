from collections.abc import Sequence
from typing import Any

def kernel_names(device: str = "cpu") -> list[str]: ...
def same_entries(
    dicts: tuple[dict[str, Any], ...],
    keys: tuple[str, ...],
    values: tuple[Any, ...],
    sized: tuple[dict[Any, Any], ...],
    sizes: tuple[int, ...],
    /,
) -> bool: ...
def supported_isas() -> list[str]: ...
def active_isa() -> str: ...
def build_info() -> dict[str, Any]: ...
def plan_conv2d(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
    dtype: str,
    pass_name: str,
    algo: str | None = None,
    device: str = "cpu",
    packed: bool = False,
) -> dict[str, Any]: ...
def plan_pool(
    op: str,
    input_shape: Sequence[int],
    *,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    divisor_override: bool,
    dtype: str,
    device: str = "cpu",
) -> dict[str, Any]: ...
