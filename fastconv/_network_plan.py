"""Programs for ``torch.ops.fastconv.network``: steps on places in memory, for one run of layers and one kind of input.

The numbers are those of ``csrc/network/network.h``. Activations lie in channels_last; what a run gives to others has
the memory format that the layers by themselves would have given it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fastconv._packed import PackedWeight
from fastconv.ops._autograd import suggested_format
from fastconv.ops.conv2d import output_size

MARK = 0x66636E01
NOTHING = 2**63 - 1
NUMBERS = 18
STEP = 10 + NUMBERS  # numbers of a row
CONVOLVE, MAX_POOL, AVERAGE_POOL, ADAPTIVE_AVERAGE_POOL, TO_CHANNELS_LAST, TO_CONTIGUOUS = range(6)
ALIGNMENT = 64  # bytes, of places in the workspace
CACHED = 8 << 20  # bytes that a step reads and writes; a stage takes no more images at a time than that holds


class Unplannable(Exception):
    """These layers on this input have no program; they run one by one, and say what is wrong, if anything is."""


@dataclass(eq=False)
class Buffer:
    """Memory of ``size`` bytes from the step that writes it to the last that reads it. ``whole``: of the whole batch,
    not of the images that a stage runs at a time."""

    size: int
    first: int
    last: int
    place: int = NOTHING
    whole: bool = True


@dataclass(frozen=True)
class Value:
    """``like`` has no data: the shape, and the strides that the layers by themselves would give. ``last``: how it
    really lies in its buffer."""

    like: Tensor
    buffer: Buffer
    last: bool


@dataclass
class Step:
    kind: int
    input: Buffer
    output: Buffer
    numbers: tuple[int, ...]
    residual: Buffer | None = None
    weight: int = NOTHING
    shift: int = NOTHING
    packed: int = NOTHING

    @property
    def images(self) -> int:
        return self.numbers[0]

    def buffers(self) -> list[Buffer]:
        return [buffer for buffer in (self.input, self.output, self.residual) if buffer is not None]

    def row(self, first: int, count: int, images: int) -> list[int]:
        """The step on ``count`` images from ``first`` on, of the batch's."""
        places = []
        for buffer in (self.input, self.output, self.residual):
            offset = 0 if buffer is None or not buffer.whole else buffer.size // images * first
            places += [NOTHING if buffer is None else buffer.place, offset]
        numbers = (count, *self.numbers[1:])
        tensors = (self.weight, self.shift, self.packed)
        return [self.kind, *places, *tensors, *numbers, *[0] * (NUMBERS - len(numbers))]


@dataclass(frozen=True)
class Stage:
    """Steps [begin, end), run for ``images`` of the batch at a time, so that what they pass on stays in the caches."""

    begin: int
    end: int
    images: int


@dataclass
class Plan:
    program: Tensor
    constants: list[Tensor]
    outputs: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]
    workspace: int  # bytes


@dataclass
class Builder:
    """Steps for layers in the order in which they run; see ``_network_layers`` for the layers."""

    packed_of: Callable[[Any], PackedWeight]
    values: dict[fx.Node, Value] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    constants: list[Tensor] = field(default_factory=list)
    external: list[Buffer] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)

    def add_input(self, node: fx.Node, tensor: Tensor) -> None:
        """An input that is dense in one of the two formats."""
        if tensor.numel() == 0:
            raise Unplannable("it is empty")
        buffer = Buffer(tensor.nbytes, 0, 0, -1 - len(self.external))
        self.external.append(buffer)
        last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        if not last and not tensor.is_contiguous():
            raise Unplannable("it is not dense")
        self.values[node] = Value(tensor.to("meta"), buffer, last)

    def value(self, node: Any) -> Value:
        found = self.values.get(node) if isinstance(node, fx.Node) else None
        if found is None:
            raise Unplannable("a layer's argument is no tensor of this run")
        return found

    def image(self, node: Any) -> Value:
        """A batch of images, made channels_last if it is not."""
        value = self.value(node)
        if value.like.dim() != 4:
            raise Unplannable("it is no batch of images")
        if not value.last and value.like.is_contiguous(memory_format=torch.channels_last):
            value = Value(value.like, value.buffer, True)  # one channel or one pixel: the same memory
        if not value.last:
            buffer = self.reserve(value.buffer.size)
            self.step(TO_CHANNELS_LAST, value.buffer, buffer, tuple(value.like.shape))
            value = Value(value.like, buffer, True)
            self.values[node] = value
        return value

    def contiguous(self, value: Value) -> Buffer:
        """The memory of ``value`` in torch's default order."""
        if not value.last or value.like.dim() != 4:
            return value.buffer
        shape = tuple(value.like.shape)
        if shape[1] == 1 or shape[2] * shape[3] == 1:
            return value.buffer
        buffer = self.reserve(value.buffer.size)
        self.step(TO_CONTIGUOUS, value.buffer, buffer, shape)
        return buffer

    def reserve(self, size: int) -> Buffer:
        self.buffers.append(Buffer(size, len(self.steps), len(self.steps)))
        return self.buffers[-1]

    def result(self, node: fx.Node, shape: Sequence[int], memory_format: torch.memory_format, input: Value) -> Buffer:
        """Memory for the images that ``node`` gives."""
        if min(shape) < 1:
            raise Unplannable("its result is empty")
        like = torch.empty(tuple(shape), dtype=input.like.dtype, device="meta", memory_format=memory_format)
        buffer = self.reserve(like.nbytes)
        self.values[node] = Value(like, buffer, True)
        return buffer

    def step(self, kind: int, input: Buffer, output: Buffer, numbers: tuple[int, ...], **more: Any) -> None:
        step = Step(kind, input, output, numbers, **more)
        for buffer in step.buffers():
            buffer.last = len(self.steps)
        self.steps.append(step)

    def constant(self, tensor: Tensor) -> int:
        self.constants.append(tensor.detach())
        return len(self.constants) - 1

    def convolve(
        self,
        node: fx.Node,
        input: Value,
        weight: Tensor,
        bias: Tensor | None,
        geometry: tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int], int],
        activation: int,
        residual: Value | None,
        packed: PackedWeight | None,
    ) -> None:
        stride, padding, dilation, groups = geometry
        like = input.like
        if weight.dtype != like.dtype or not weight.is_cpu or weight.shape[1] * groups != like.shape[1]:
            raise Unplannable("the weight does not fit the input")
        shape = (like.shape[0], weight.shape[0], *output_size(like.shape[2:], weight.shape[2:], *geometry[:3]))
        if residual is not None and (residual.like.shape != shape or residual.like.dtype != like.dtype):
            raise Unplannable("the residual does not fit the output")
        output = self.result(node, shape, suggested_format(like, weight), input)
        form = None if packed is None else self._packed(packed, input, weight, geometry)
        last = weight.is_contiguous(memory_format=torch.channels_last)
        if form is None and not last:  # its kernel would turn it round in every call
            weight, last = weight.contiguous(memory_format=torch.channels_last), True
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.step(
            CONVOLVE,
            input.buffer,
            output,
            (
                *like.shape,
                weight.shape[0],
                *weight.shape[2:],
                *stride,
                *padding,
                *dilation,
                groups,
                activation,
                int(not last),
            ),
            residual=None if residual is None else residual.buffer,
            weight=self.constant(weight if last else weight.contiguous()),
            shift=NOTHING if bias is None else self.constant(bias.to(wide).contiguous()),
            packed=NOTHING if form is None else self.constant(form),
        )

    def _packed(self, packed: PackedWeight, input: Value, weight: Tensor, geometry: Any) -> Tensor | None:
        stride, padding, dilation, groups = geometry
        inside = torch.empty_like(input.like, memory_format=torch.channels_last)
        return packed.find(inside, weight, stride + padding + dilation, groups)

    def finish(self, outputs: Sequence[fx.Node]) -> Plan:
        described = []
        taken: set[int] = set()
        for node in outputs:
            value = self.value(node)
            like = value.like
            wants_last = like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last)
            buffer = value.buffer if wants_last and value.last else self.contiguous(value)
            if buffer in self.external or id(buffer) in taken:
                raise Unplannable("two results share memory")
            taken.add(id(buffer))
            described.append((tuple(like.shape), like.stride(), like.dtype))
            buffer.place = -1 - len(self.external) - len(described) + 1
        self._check_dtypes()
        inside = [buffer for buffer in self.buffers if buffer.place == NOTHING]
        stages = self._stages()
        for stage in stages:
            self._confine(stage, inside)
        workspace = self._arrange(inside)
        numbers = [MARK]
        for stage in stages:
            images = self.steps[stage.begin].images
            for first in range(0, images, stage.images):
                for step in self.steps[stage.begin : stage.end]:
                    numbers += step.row(first, min(stage.images, images - first), images)
        return Plan(torch.tensor(numbers, dtype=torch.int64), self.constants, described, workspace)

    def _stages(self) -> list[Stage]:
        images = self.steps[0].images if self.steps else 0
        if any(step.images != images for step in self.steps):
            return [Stage(0, len(self.steps), images)]
        stages: list[Stage] = []
        most = images
        for index in reversed(range(len(self.steps))):
            bytes_of_one = sum(buffer.size for buffer in self.steps[index].buffers()) // images
            while most > 1 and most * bytes_of_one > CACHED:
                most = -(-most // 2)
            if stages and stages[-1].images == most:
                stages[-1] = Stage(index, stages[-1].end, most)
            else:
                stages.append(Stage(index, index + 1, most))
        return stages[::-1]

    def _confine(self, stage: Stage, buffers: list[Buffer]) -> None:
        """Buffers of one stage need room for its images only; others live as long as all of its rounds."""
        images = self.steps[stage.begin].images
        if stage.images == images:
            return
        for buffer in buffers:
            if stage.begin <= buffer.first and buffer.last < stage.end:
                buffer.size, buffer.whole = buffer.size // images * stage.images, False
            elif stage.begin <= buffer.first < stage.end:
                buffer.first = stage.begin
            elif stage.begin <= buffer.last < stage.end:
                buffer.last = stage.end - 1

    def _check_dtypes(self) -> None:
        if len({value.like.dtype for value in self.values.values()}) != 1:
            raise Unplannable("its tensors have several dtypes")

    def _arrange(self, buffers: list[Buffer]) -> int:
        """Gives every buffer the lowest place that is free while it lives, the largest first; the bytes in all."""
        placed: list[Buffer] = []
        end = 0
        for buffer in sorted(buffers, key=lambda one: -one.size):
            place = 0
            for other in sorted(placed, key=lambda one: one.place):
                together = buffer.first <= other.last and other.first <= buffer.last
                if together and other.place < place + buffer.size:
                    place = max(place, -(-(other.place + other.size) // ALIGNMENT) * ALIGNMENT)
            buffer.place = place
            placed.append(buffer)
            end = max(end, place + buffer.size)
        return end
