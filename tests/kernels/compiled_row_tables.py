"""The launches that build row tables, for ``compiled.py``."""

from collections.abc import Iterator

import torch

from patchsparse.backends.triton import row_tables as tables
from patchsparse.backends.triton.launch import Launch
from patchsparse.geometry import Stencil

__all__ = ["row_table_launches"]


def row_table_launches() -> Iterator[tuple[str, Launch]]:
    """Yield a name and a launch for every kernel, for 3x3 convolutions of 4x4 patches, 32 of 9x9 visible."""
    slot, coords = (torch.empty(s, dtype=torch.int32, device="meta") for s in ((128, 9, 9), (4096, 3)))
    for name, stride, transposed, by_taps in (
        ("plain", 1, False, False),
        ("transposed", 2, True, False),
        ("sorted", 1, False, True),
    ):
        maps = tables.Maps.of(slot, coords, (4, 4), Stencil((3, 3), (stride, stride), (1, 1)), transposed)
        table = tables.empty_table(maps, ordered=transposed or by_taps)
        launches = tables.sorted_launches(table, maps) if by_taps else (tables.plain_launch(table, maps),)
        for launch in launches:
            yield f"row table {name} {launch.kernel.__name__}", launch
    maps = tables.Maps.of(slot, coords, (4, 4), Stencil((3, 3), (1, 1), (1, 1)), False)
    for launch in tables.listed_launches(tables.empty_lists(maps, 3), maps, 3):
        yield f"row table listed {launch.kernel.__name__}", launch
