"""Row tables of the Triton engine in Triton's interpreter: against the definition, and against the image itself.

``test_triton.py`` runs this file with ``TRITON_INTERPRET=1``.
"""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchsparse import PatchGrid, pack
from patchsparse.backends.triton import row_tables as tables
from patchsparse.geometry import Stencil

from ..matrix import one_of_each, pairwise
from . import interpreted_triton, row_table_definition
from .cases import Case, cases
from .interpreted_triton import FEW

poison = interpreted_triton._poison  # uninitialised memory is not 0

CASES = [
    ((1, 1), Stencil((3, 3), padding=(1, 1))),
    ((2, 3), Stencil((4, 5), padding=(2, 2))),
    ((4, 2), Stencil((3, 3), (2, 2), (1, 1))),
    ((2, 2), Stencil((3, 1), padding=(2, 0), dilation=(2, 1))),
    ((4, 4), Stencil((3, 3), (4, 2), (1, 1))),
]


def grid_of(seed: int = 0, keep: float = 0.5, batch: int = 2) -> PatchGrid:
    return PatchGrid.random(batch, (3, 4), keep, torch.Generator().manual_seed(seed))


def sources_by_hand(grid: PatchGrid, size: tuple[int, int], stencil: Stencil, transposed: bool) -> torch.Tensor:
    """Return ``(taps, M)``: write row numbers into an image and look where each pixel finds them."""
    out = stencil.output_size(size)
    sides = {False: size, True: out}  # patches of the side that is read
    (rows, columns), read, written = grid.shape, sides[transposed], sides[not transposed]
    image = torch.full((grid.batch_size, rows * read[0], columns * read[1]), -1)
    for n, (b, i, j) in enumerate(grid.coords.tolist()):
        numbers = torch.arange(read[0] * read[1]).view(read) + n * read[0] * read[1]
        image[b, i * read[0] : (i + 1) * read[0], j * read[1] : (j + 1) * read[1]] = numbers
    result = torch.full((stencil.taps, grid.num_active * written[0] * written[1]), -1)
    for n, (b, i, j) in enumerate(grid.coords.tolist()):
        for v, h, tap in product(range(written[0]), range(written[1]), range(stencil.taps)):
            pixel = (i * written[0] + v, j * written[1] + h)
            at = []
            for axis, t in enumerate(divmod(tap, stencil.kernel[1])):
                pad, reach, stride = stencil.padding[axis], t * stencil.dilation[axis], stencil.stride[axis]
                place = pixel[axis] + pad - reach if transposed else pixel[axis] * stride - pad + reach
                whole = not transposed or place % stride == 0
                at.append(place // stride if transposed and whole else place if whole else -1)
            if 0 <= at[0] < image.shape[1] and 0 <= at[1] < image.shape[2]:
                result[tap, (n * written[0] + v) * written[1] + h] = image[b, at[0], at[1]]
    return result


@pytest.mark.parametrize(("case", "transposed", "by_taps"), pairwise(CASES, [False, True], [False, True]))
def test_sources_of_every_pixel(case, transposed, by_taps):
    size, stencil = case
    grid = grid_of(1)
    table = tables.row_table(grid.slot, grid.coords, size, stencil, transposed, by_taps)
    expected = sources_by_hand(grid, size, stencil, transposed)
    order = torch.arange(expected.shape[1]) if table.order is None else table.order.long()
    assert torch.equal(order.sort().values, torch.arange(expected.shape[1]))
    assert table.sources.dtype == torch.int32
    assert torch.equal(table.sources.clamp(min=-1).long(), expected[:, order])
    assert (table.order is None) == (table.taps is None) == (not transposed and not by_taps)
    if table.taps is not None:
        bits = table.taps >> torch.arange(stencil.taps)[:, None] & 1
        assert torch.equal(bits.bool(), table.sources >= 0)


def test_sorted_rows_let_tiles_skip_taps_and_the_longest_come_first():
    grid = grid_of(2, 0.4, batch=300)
    table = tables.row_table(grid.slot, grid.coords, (1, 1), Stencil((3, 3), padding=(1, 1)), by_taps=True)
    whole = table.sources.shape[1] // tables.GROUP * tables.GROUP
    needed = (table.sources[:, :whole].view(9, -1, tables.GROUP) >= 0).any(2).sum(0)
    assert torch.equal(needed, needed.sort(descending=True).values)
    assert needed.float().mean() < 6.5  # unsorted tiles of as many rows need all 9


def test_transposed_rows_come_by_position_modulo_the_stride():
    grid, stencil = grid_of(3), Stencil((3, 3), (2, 2), (1, 1))
    table = tables.row_table(grid.slot, grid.coords, (4, 4), stencil, transposed=True)
    assert table.order is not None
    v, h = table.order % 16 // 4 % 2, table.order % 4 % 2
    assert torch.equal(v * 2 + h, torch.arange(4).repeat_interleave(grid.num_active * 4))


def test_a_symmetric_stencil_has_one_table_for_both_directions():
    same, stem = Stencil((3, 3), padding=(1, 1)), Stencil((4, 4), padding=(2, 2))
    assert tables.turned(same) == same
    assert tables.turned(stem) == Stencil((4, 4), padding=(1, 1))
    grid = grid_of(4)
    for stencil in (same, stem):
        table = tables.row_table(grid.slot, grid.coords, (2, 2), tables.turned(stencil))
        assert torch.equal(table.sources.clamp(min=-1).long().flip(0), sources_by_hand(grid, (2, 2), stencil, True))


@pytest.mark.parametrize(("together", "keep"), one_of_each([1, 3, 9], [1.0, 0.4, 0]))
def test_listed_rows_are_those_with_a_source(together, keep):
    grid, stencil = grid_of(5, keep), Stencil((3, 3), padding=(1, 1))
    sources, targets, counts = tables.listed_rows(grid.slot, grid.coords, (1, 1), stencil, together)
    expected = sources_by_hand(grid, (1, 1), stencil, False)
    assert sources.shape == (9, grid.num_active)
    assert targets.shape == (9 // together, grid.num_active)
    for group in range(9 // together):
        taps = slice(group * together, (group + 1) * together)
        rows = (expected[taps] >= 0).any(0).nonzero()[:, 0]
        count = int(counts[group])
        assert torch.equal(targets[group, :count].long(), rows)
        assert torch.equal(sources[taps, :count].clamp(min=-1).long(), expected[taps][:, rows])
        assert (sources[taps, count:] < 0).all()
    with pytest.raises(ValueError, match="together must divide the 9 taps"):
        tables.listed_rows(grid.slot, grid.coords, (1, 1), stencil, 2)


def test_tables_are_remembered_with_their_slot_map():
    grid, stencil = grid_of(6), Stencil((3, 3), padding=(1, 1))
    first, again = (tables.row_table(grid.slot, grid.coords, (2, 2), stencil) for _ in range(2))
    assert first.sources is again.sources
    grid.slot.add_(0)  # changed in place
    assert tables.row_table(grid.slot, grid.coords, (2, 2), stencil).sources is not first.sources


def test_row_tables_convolve():
    grid, stencil = grid_of(7), Stencil((3, 3), padding=(1, 1))
    image = torch.randn(2, 5, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, weight = pack(image, grid), torch.randn(4, 5, 3, 3, dtype=torch.float64)
    rows = torch.cat((x.permute(0, 2, 3, 1).reshape(-1, 5), torch.zeros(1, 5, dtype=torch.float64)))
    sources = tables.row_table(grid.slot, grid.coords, (2, 2), stencil).sources.clamp(min=-1)
    y = torch.einsum("tmc,oct->mo", rows[sources.long()], weight.flatten(2))
    visible = image * grid.active.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
    expected = pack(torch.conv2d(visible, weight, padding=1), grid).permute(0, 2, 3, 1).reshape(-1, 4)
    torch.testing.assert_close(y, expected)


def assert_equal(got, expected):
    """Every integer and every dtype is the same."""
    for g, e in zip(got, expected, strict=True):
        assert (g is None) == (e is None)
        if g is not None:
            assert g.dtype == e.dtype
            assert torch.equal(g, e)


def size_of(case: Case) -> tuple[int, int]:
    (height, width), (rows, columns) = case.image.shape[2:], case.grid.shape
    return height // rows, width // columns


@pytest.mark.rest
@given(case=cases(channels=(1,), patches=(1, 2, 3, 4)), transposed=st.booleans(), by_taps=st.booleans())
@settings(FEW, max_examples=25)
def test_any_table_equals_its_definition(case, transposed, by_taps):
    size, stencil = size_of(case), Stencil(case.kernel, **case.stencil)
    got = tables.row_table(case.grid.slot, case.grid.coords, size, stencil, transposed, by_taps)
    assert_equal(got, row_table_definition.row_table(case.grid, size, stencil, transposed, by_taps))


@pytest.mark.rest
@given(case=cases(channels=(1,), patches=(1, 2, 3)), divisor=st.integers(1, 9))
@settings(FEW, max_examples=25)
def test_any_list_equals_its_definition(case, divisor):
    size, stencil = size_of(case), Stencil(case.kernel, **case.stencil)
    together = divisor if stencil.taps % divisor == 0 else 1
    got = tables.listed_rows(case.grid.slot, case.grid.coords, size, stencil, together)
    assert_equal(got, row_table_definition.listed_rows(case.grid, size, stencil, together))


def test_many_groups_equal_the_definition(monkeypatch):
    """More groups than one program compares at once, and rows beyond the last whole group."""
    monkeypatch.setattr(tables, "BLOCK", 16)
    for module in (tables, row_table_definition):
        monkeypatch.setattr(module, "GROUP", 4)
    grid, stencil = grid_of(8, 0.4, batch=15), Stencil((3, 3), padding=(1, 1))
    table = tables.row_table(grid.slot, grid.coords, (1, 1), stencil, by_taps=True)
    assert table.sources.shape[1] > (tables.BLOCK + 1) * tables.GROUP
    assert table.sources.shape[1] % tables.GROUP
    assert_equal(table, row_table_definition.row_table(grid, (1, 1), stencil, False, True))
