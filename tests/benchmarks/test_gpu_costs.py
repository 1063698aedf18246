"""What a GPU run costs the host: the counts, the table, and a checkout asked in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import counts
from benchmarks.gpu.costs import Cost, counted_conv, counted_step
from benchmarks.gpu.starts import starts


def test_lists_of_tensors_are_packed_as_pytorch_packs_them():
    few = [torch.empty(size, device="meta") for size in (1, 65536, 65537)]
    many = [torch.empty(8, device="meta")] * 65
    large = [torch.empty(321 * 65536, device="meta")]
    scalars = [torch.empty((), device="meta")] * 3
    assert starts("add", (few[0], few[0])) == 1
    assert starts("_foreach_add_", (few, few)) == 1
    assert starts("_foreach_add_", (many, many)) == 2  # 64 tensors at most in two lists
    assert starts("_foreach_mul_", (large, 2.0)) == 2  # 320 chunks at most
    assert starts("_foreach_norm", (few,)) == 2  # partial sums, and their sum
    assert starts("_foreach_addcmul_", (few, few, scalars)) == 3  # one for each tensor: they differ in shape
    assert starts("_fused_adam_", (few, few, few, few, [], scalars)) == 1


def test_a_convolution_starts_its_kernels_and_little_else():
    (cost,) = counted_conv()
    assert cost.unit == "launches"
    assert 3 <= cost.value <= 5  # forward, both gradients, and the sum of the parts of one of them


@pytest.mark.rest
def test_counts_of_a_step_are_the_same_in_every_run_and_its_parts_are_less():
    first = counted_step("light", batch=2, size=64)
    assert first == counted_step("light", batch=2, size=64)
    whole, kernels, mask, update = (cost.value for cost in first)
    assert whole > kernels + update
    assert whole > mask + update
    assert min(kernels, mask, update) > 0


def test_a_table_says_before_after_and_ratio():
    after = {"launches": (4.0, "launches"), "host": (100.0, "us"), "new": (1.5, "ms")}
    before = {"launches": (8.0, "launches"), "host": (534.2, "us")}
    assert counts.table(after, before).splitlines()[2:] == [
        "| launches | 8 | 4 | 2.00 |",
        "| host | 534 us | 100 us | 5.34 |",
        "| new | - | 1.5 ms | - |",
    ]
    assert counts.table(after, None).splitlines()[2:] == ["| launches | 4 |", "| host | 100 us |", "| new | 1.5 ms |"]


def test_two_checkouts_are_asked_in_turn_and_the_quietest_round_counts(monkeypatch, tmp_path, capsys):
    asked: list[Path] = []
    seconds = iter([5.0, 30.0, 4.0, 20.0])

    def ask(checkout: Path) -> counts.Figures:
        asked.append(checkout)
        return {"host": (next(seconds), "us")}

    monkeypatch.setattr(counts, "ask", ask)
    json_file = tmp_path / "costs.json"
    assert counts.main(["--against", str(tmp_path), "--rounds", "2", "--json", str(json_file)]) == 0
    assert asked == [counts.ROOT, tmp_path, counts.ROOT, tmp_path]
    assert capsys.readouterr().out.splitlines()[-1] == "| host | 20 us | 4 us | 5.00 |"
    assert json.loads(json_file.read_text()) == {"after": {"host": [4.0, "us"]}, "before": {"host": [20.0, "us"]}}


@pytest.mark.rest
def test_a_checkout_is_asked_with_its_own_packages(monkeypatch, capfd):
    told = "import patchsparse, spatspark_fast; print(patchsparse.__file__, spatspark_fast.__file__); print('[]')"
    monkeypatch.setattr(counts, "ASK", counts.ASK.split("sys.path[:2]")[0] + told)
    assert counts.ask(counts.ROOT) == {}
    monkeypatch.setattr(counts, "ASK", "raise SystemExit('no such package')")
    with pytest.raises(RuntimeError, match="cannot be counted: no such package"):
        counts.ask(counts.ROOT)
    assert Cost("host", 1.0, "us").unit == "us"
