"""The table of tuned configurations: read by default, and by nobody believed who cannot offer its tiles."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from patchsparse.geometry import Call, Stencil

tuned = pytest.importorskip("patchsparse.backends.triton.tuned", reason="Triton is not installed")
from patchsparse.backends import triton as engine  # noqa: E402
from patchsparse.backends.triton import tuning  # noqa: E402
from patchsparse.backends.triton.configs import conv_tiles  # noqa: E402

SAME = Stencil((3, 3), padding=(1, 1))
KIND = tuned.Kind("conv2d", "sm_90", torch.bfloat16, "ieee", (8, 8), SAME, (64, 64), 1, 18, 3)
RUN = {"card": "NVIDIA H100", "from": "torch 2.11.0; commit abc; a test"}
TILES = conv_tiles(2**18, 64, 64, 2, True, 0.8)
SECOND = TILES[1]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Let the package read a table with one entry."""
    found = tuned.Table()
    found.add(RUN, KIND, tuned.Entry(asdict(SECOND), 0.049, 0.061, 0))
    found.write(tmp_path / "tuned.json")
    monkeypatch.setattr(tuned, "TABLE", tmp_path / "tuned.json")
    tuning.forget()
    yield tmp_path / "tuned.json"
    monkeypatch.undo()
    tuning.forget()


def ran(kind: object, tiles: Sequence[object]) -> object:
    """Return the configuration that a call runs."""
    asked: list[object] = []

    def run(tile: object) -> Tensor:
        asked.append(tile)
        return torch.ones(1)

    tuning.best(kind, tiles, run)
    (tile,) = asked
    return tile


def test_what_the_table_knows_is_run(table: Path) -> None:
    assert TILES[0] != SECOND
    assert ran(KIND, TILES) == SECOND
    for near in (19, 17):
        assert ran(KIND._replace(rows=near), TILES) == SECOND
    for other in (
        {"rows": 20},
        {"eighths": 4},
        {"card": "sm_80"},
        {"dtype": torch.float16},
        {"operation": "conv2d_dgrad"},
        {"channels": (64, 128)},
        {"size": (4, 4)},
        {"stencil": Stencil((3, 3), (2, 2), (1, 1))},
    ):
        assert ran(KIND._replace(**other), TILES) == TILES[0], other
    assert ran(("no kind of call",), TILES) == TILES[0]


def test_a_tile_that_is_offered_no_more_is_ignored(table: Path) -> None:
    table.write_text(re.sub(r'"warps": \d+', '"warps": 77', table.read_text()))
    tuning.forget()
    assert ran(KIND, TILES) == TILES[0]
    changed = json.loads(table.read_text())
    del changed["tiles"]["sm_90"][str(KIND)]["tile"]["warps"]  # written before configurations had warps
    table.write_text(json.dumps(changed))
    tuning.forget()
    assert ran(KIND, TILES) == TILES[0]


def test_a_kind_is_looked_up_once(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ran(KIND, TILES) == SECOND
    monkeypatch.setattr(tuning, "shipped", None)  # the memo alone answers
    assert ran(KIND, TILES) == SECOND
    monkeypatch.setitem(tuning._chosen, KIND, None)  # the default, which may differ from call to call
    assert ran(KIND, TILES) == TILES[0]
    assert ran(KIND, TILES[2:]) == TILES[2]


def test_what_this_process_measures_comes_first(table: Path) -> None:
    kind = KIND._replace(groups=2)
    assert ran(kind, TILES) == TILES[0]
    slow = replace(TILES[0], m=1)

    def run(tile: object) -> Tensor:
        if tile == slow:
            torch.linalg.svd(torch.ones(100, 100))
        return torch.ones(1)

    with tuning.tune(repetitions=3):
        tuning.best(kind, (slow, TILES[2]), run)
    assert ran(kind, TILES) == TILES[2]
    tuning.forget()
    assert ran(kind, TILES) == TILES[2]


def test_calls_of_other_threads_are_measured_too(table: Path) -> None:
    """On a GPU, autograd runs the backward pass in a thread of its own."""
    kind = KIND._replace(operation="conv2d_wgrad", groups=3)
    with tuning.tune(repetitions=1) as tuner, ThreadPoolExecutor(1) as pool:
        pool.submit(tuning.best, kind, TILES[:2], lambda tile: torch.ones(1)).result()
    assert [measured.config for measured in tuner.found[kind]] == list(TILES[:2])
    later = kind._replace(groups=4)
    assert ran(later, TILES) == TILES[0]
    assert later not in tuner.found  # the block has ended


def test_the_table_is_small_readable_and_says_where_it_comes_from(table: Path) -> None:
    text = table.read_text()
    assert len(text.splitlines()) == 10
    name = (
        "conv2d bfloat16 ieee patch 8x8 kernel 3x3 stride 1x1 padding 1x1 dilation 1x1 channels 64-64 groups 1 "
        "visible 3/8 rows 2^18"
    )
    assert str(KIND) == name
    assert f'"{name}": {{"tile": {{"m": {SECOND.m}, ' in text
    found = tuned.Table.read(table)
    later = RUN | {"from": "torch 2.12.0"}
    found.add(later, KIND, tuned.Entry(asdict(SECOND), 0.05, 0.06, 0))
    assert found.entry(KIND).run == 1
    found.write(table)
    again = tuned.Table.read(table)
    assert again.runs == [later]  # no entry of the first is left
    assert again.entry(KIND) == tuned.Entry(asdict(SECOND), 0.05, 0.06, 0)
    again.write(table)
    assert tuned.Table.read(table) == again


def test_explain_names_the_card(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tuned, "card_of", lambda _: "sm_90")
    call = Call("conv2d", "cuda", torch.bfloat16, 4096, (8, 8), 64, 64, SAME)
    assert engine.how(call) == "implicit GEMM, tuned for NVIDIA H100"
    assert engine.how(call._replace(out_channels=128)) == "implicit GEMM"
    monkeypatch.setattr(tuned, "card_of", lambda _: "sm_80")
    assert engine.how(call) == "implicit GEMM"


def test_every_shipped_entry_was_measured() -> None:
    """Until a GPU has run there are none."""
    found = tuned.shipped()
    for card, entries in found.entries.items():
        for name, entry in entries.items():
            assert re.fullmatch(r"sm_\d+", card)
            assert 0 < entry.ms <= entry.default_ms, name
            assert {"card", "from"} == set(found.runs[entry.run])
    assert bool(found.runs) == bool(found.entries)
