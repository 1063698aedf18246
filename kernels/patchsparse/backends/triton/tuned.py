"""The table of tuned configurations that ships with the package: ``tuned.json``, one line for each kind of call.

``python -m benchmarks gpu --tune`` writes it on a GPU; no line of it is written by hand. A line names the configuration
that was fastest, its time and that of the default, and the run that measured them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...geometry import Call, Stencil

__all__ = ["TABLE", "Entry", "Kind", "Table", "card_of", "shipped", "tuned_for"]

TABLE = Path(__file__).with_name("tuned.json")
Size = tuple[int, int]


class Kind(NamedTuple):
    """A kind of call: all that the choice of a configuration depends on; rows and density in coarse steps.

    Attributes:
        operation: ``"conv2d"``, ``"conv2d_dgrad"`` or ``"conv2d_wgrad"``.
        card: compute capability, such as ``"sm_90"``; ``"cpu"`` in the interpreter.
        dtype: of the operands.
        precision: of products of float32.
        size: pixels of a patch that is read.
        stencil: kernel, stride, padding and dilation.
        channels: summed over and written, per group.
        groups: of the convolution.
        rows: bits of the number of rows that are read.
        eighths: visible share of the patches.
    """

    operation: str
    card: str
    dtype: torch.dtype
    precision: str
    size: Size
    stencil: Stencil
    channels: Size
    groups: int
    rows: int
    eighths: int

    def __str__(self) -> str:
        return f"{self.shape} visible {self.eighths}/8 rows 2^{self.rows}"

    @property
    def shape(self) -> str:
        """Name of all but rows and density."""
        dtype = str(self.dtype).removeprefix("torch.")
        kernel, stride, padding, dilation = (f"{v}x{h}" for v, h in self.stencil)
        return (
            f"{self.operation} {dtype} {self.precision} patch {self.size[0]}x{self.size[1]} kernel {kernel} "
            f"stride {stride} padding {padding} dilation {dilation} channels {self.channels[0]}-{self.channels[1]} "
            f"groups {self.groups}"
        )

    def near(self) -> tuple[Kind, ...]:
        """Return this kind, and those with up to half and twice as many rows."""
        return tuple(self._replace(rows=self.rows + step) for step in (0, 1, -1))


@cache
def card_of(device: torch.device) -> str:
    """Return the family of a device that shares tuned configurations."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@dataclass(frozen=True)
class Entry:
    """What was measured for one kind of call.

    Attributes:
        tile: fields of the fastest configuration.
        ms: milliseconds that it took.
        default_ms: milliseconds of the default.
        run: number of the run that measured it, in the table's list.
    """

    tile: Mapping[str, Any]
    ms: float
    default_ms: float
    run: int


@dataclass
class Table:
    """Tuned configurations by card and kind of call, and the runs that measured them.

    Attributes:
        runs: card and origin (versions, commit, command, date) of each run that has entries.
        entries: by card, then by the kind's name.
    """

    runs: list[dict[str, str]] = field(default_factory=list)
    entries: dict[str, dict[str, Entry]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Table:
        """Return the table of a file."""
        content = json.loads(path.read_text())
        entries = {
            card: {name: Entry(**entry) for name, entry in found.items()} for card, found in content["tiles"].items()
        }
        return cls(content["runs"], entries)

    def write(self, path: Path) -> None:
        """Write the table, one line for each entry; runs of which no entry is left are dropped."""
        used = sorted({entry.run for found in self.entries.values() for entry in found.values()})
        number = {run: index for index, run in enumerate(used)}
        cards = []
        for card, found in sorted(self.entries.items()):
            lines = (
                f"   {json.dumps(name)}: {json.dumps(asdict(entry) | {'run': number[entry.run]})}"
                for name, entry in sorted(found.items())
            )
            cards.append(f"  {json.dumps(card)}: {{\n" + ",\n".join(lines) + "\n  }")
        runs = ",\n".join(f"  {json.dumps(self.runs[run])}" for run in used)
        tiles = ",\n".join(cards)
        path.write_text(
            f'{{\n "runs": [{_block(runs)}],\n "tiles": {{{_block(tiles)}}}\n}}\n'  # as a reader wants to see it
        )

    def add(self, run: Mapping[str, str], kind: Kind, entry: Entry) -> None:
        """Put in what a run measured; its ``run`` is that of ``run``, which is added if it is new."""
        if dict(run) not in self.runs:
            self.runs.append(dict(run))
        found = self.entries.setdefault(kind.card, {})
        found[str(kind)] = Entry(entry.tile, entry.ms, entry.default_ms, self.runs.index(dict(run)))

    def remove(self, kind: Kind) -> None:
        """Leave a kind of call to the default; cards without entries are dropped."""
        self.entries.get(kind.card, {}).pop(str(kind), None)
        self.entries = {card: found for card, found in self.entries.items() if found}

    def entry(self, kind: Kind) -> Entry | None:
        """Return what is known of a kind of call, or of one with up to half or twice as many rows."""
        known = self.entries.get(kind.card)
        if not known:
            return None
        return next((known[name] for near in kind.near() if (name := str(near)) in known), None)

    def choose(self, kind: Kind, configs: Sequence[Any]) -> Any | None:
        """Return the tuned configuration among ``configs``; None if there is none, or it is offered no more."""
        entry = self.entry(kind)
        return None if entry is None else next((c for c in configs if asdict(c) == entry.tile), None)

    def card(self, entry: Entry) -> str:
        """Return the name of the card that an entry was measured on."""
        return self.runs[entry.run]["card"]


def _block(lines: str) -> str:
    return f"\n{lines}\n " if lines else ""


@cache
def shipped() -> Table:
    """Return the table that comes with the package."""
    return Table.read(TABLE)


def tuned_for(call: Call) -> str:
    """Return ", tuned for CARD" if the table knows the shape of a convolution's forward pass on this device."""
    if call.device != "cuda" or call.operation != "conv2d":
        return ""
    table, channels = shipped(), (call.in_channels // call.groups, call.out_channels // call.groups)
    card = card_of(torch.device("cuda", torch.cuda.current_device()))
    known = table.entries.get(card, {})
    shapes = {
        Kind(call.operation, card, call.dtype, precision, call.size, call.stencil, channels, call.groups, 0, 0).shape
        for precision in ("ieee", "tf32")
    }
    found = (entry for name, entry in known.items() if name.split(" visible ")[0] in shapes)
    cards = sorted({table.card(entry) for entry in found})
    return f", tuned for {' and '.join(cards)}" if cards else ""
