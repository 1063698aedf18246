"""What a new mask costs the host: operators that PyTorch dispatches, and kernels that are started, for each table."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from patchsparse.geometry import Stencil

tables = pytest.importorskip("patchsparse.backends.triton.row_tables", reason="Triton is not installed")

SAME, STRIDED = Stencil((3, 3), (1, 1), (1, 1)), Stencil((3, 3), (2, 2), (1, 1))


class Dispatched(TorchDispatchMode):
    """Keep the name of every operator that runs inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._overloadpacket.__name__)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    ("build", "kernels", "operators"),
    [
        (lambda *maps: tables.row_table(*maps, (8, 8), SAME), 1, ["new_empty"]),
        (lambda *maps: tables.row_table(*maps, (8, 8), STRIDED, transposed=True), 1, ["new_empty"] * 3),
        (lambda *maps: tables.row_table(*maps, (2, 2), SAME, by_taps=True), 3, ["new_empty"] * 5 + ["sort"]),
        (lambda *maps: tables.listed_rows(*maps, (2, 2), SAME), 2, ["cumsum"] + ["new_empty"] * 3 + ["new_zeros"]),
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
