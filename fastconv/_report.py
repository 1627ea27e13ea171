"""What convert, revert and fuse did to a model, and what they left alone and why."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

_ATTRIBUTE = "fastconv_report"


@dataclass
class Entry:
    """One module: its name in the model (the first of several), its class, and the new class or the reason."""

    name: str
    layer: str
    note: str


@dataclass
class ConversionReport:
    """What :func:`fastconv.convert`, :func:`fastconv.revert` or :func:`fastconv.fuse` did.

    Attributes:
        action: ``"convert"``, ``"revert"`` or ``"fuse"``.
        swapped: modules that were exchanged; their note is what took their place.
        left: modules that were looked at and left; their note is the reason.
        remarks: about the model as a whole.
    """

    action: str
    swapped: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"fastconv.{self.action}: {len(self.swapped)} swapped, {len(self.left)} left"]
        entries = self.swapped + self.left
        width = max((len(entry.name or "(root)") for entry in entries), default=0)
        for title, group, joint in (("swapped", self.swapped, " -> "), ("left", self.left, ": ")):
            if group:
                lines.append(f"  {title}")
            lines += [f"    {entry.name or '(root)':<{width}}  {entry.layer}{joint}{entry.note}" for entry in group]
        return "\n".join(lines + [f"  {remark}" for remark in self.remarks])


def attach(model: nn.Module, report: ConversionReport) -> None:
    setattr(model, _ATTRIBUTE, report)


def conversion_report(model: nn.Module) -> ConversionReport:
    """The report of the last :func:`fastconv.convert`, ``revert`` or ``fuse`` of ``model``; ``str()`` makes it text.

    Wrappers such as DistributedDataParallel and compiled modules are looked through.

    Raises:
        ValueError: if ``model`` comes from none of them.
    """
    current: object = model
    while isinstance(current, nn.Module):
        report = current.__dict__.get(_ATTRIBUTE)
        if isinstance(report, ConversionReport):
            return report
        current = current._modules.get("_orig_mod") or current._modules.get("module")
    raise ValueError(
        f"{type(model).__name__} carries no report; expected a model that fastconv.convert, revert or fuse returned"
    )
