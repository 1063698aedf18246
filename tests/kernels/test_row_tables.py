"""What a new mask costs the host: operators that PyTorch dispatches, and kernels that are started, for each table."""

import pytest
import torch

from patchsparse.geometry import Stencil

from .dispatched import Dispatched

tables = pytest.importorskip("patchsparse.backends.triton.row_tables", reason="Triton is not installed")

SAME, STRIDED = Stencil((3, 3), (1, 1), (1, 1)), Stencil((3, 3), (2, 2), (1, 1))


@pytest.mark.parametrize(
    ("build", "kernels", "operators"),
    [
        (lambda *maps: tables.row_table(*maps, (8, 8), SAME), 1, ["new_empty"]),
        (lambda *maps: tables.row_table(*maps, (8, 8), STRIDED, transposed=True), 1, ["new_empty"] * 3),
        (lambda *maps: tables.row_table(*maps, (2, 2), SAME, by_taps=True), 3, ["new_empty"] * 5 + ["sort"]),
        (lambda *maps: tables.listed_rows(*maps, (2, 2), SAME), 2, ["cumsum"] + ["new_empty"] * 4),
    ],
)
def test_a_table_is_a_few_starts(build, kernels, operators, monkeypatch):
    started = []
    monkeypatch.setattr(tables.Launch, "run", lambda launch: started.append(launch))
    slot, coords = (torch.empty(shape, dtype=torch.int32, device="meta") for shape in ((128, 9, 9), (4096, 3)))
    with Dispatched() as dispatched:
        build(slot, coords)
    assert len(started) == kernels
    assert sorted(dispatched.names) == operators
