"""What the lines of a GPU's plan run, as far as a CPU can tell: pretraining, tuning, the machine, the clock."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from benchmarks import test_encoder as encoder_suite
from benchmarks.gpu import identify, kernel_times, training
from benchmarks.gpu.fake import fake_gpu
from benchmarks.measure import machine, timing
from benchmarks.measure.device import aside, has_gpu
from benchmarks.measure.rows import COLUMNS, merge
from benchmarks.measure.scales import scale_of
from benchmarks.subjects import encoders
from benchmarks.subjects.steps import DRAWN, build, windows, windows_on
from patchsparse import PatchGrid
from patchsparse.adoption.graphed import Run
from spatspark_fast.data.augment import Augmentation
from spatspark_fast.training.cuda_graphs import choose_graphs

from ..kernels.recorded_cuda import recorded_gpu
from .test_gate import Noted

TINY = {
    "data.synthetic_size": "96",
    "data.input_length": "2",
    "model.encoder": "test_resnet",
    "model.decoder": "light",
    "model.decoder_width": "32",
    "trainer.threads": "1",
}


@pytest.mark.rest
def test_pretraining_is_killed_resumed_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [f"{name}={value}" for name, value in TINY.items()]
    assert training.main(["--out", str(tmp_path), "--options", *pairs]) == 0
    said = capsys.readouterr().out
    assert "float32, killed and resumed over float32: a loss differs by 0.0e+00 at most" in said  # bits, on a CPU
    kept = json.loads((tmp_path / "pretrain.json").read_text())
    assert all(loss > 0 for losses in kept["losses"].values() for loss in losses), "nothing was hidden"
    assert set(kept["losses"]) == set(training.RUNS)
    assert all(len(losses) == training.STEPS for losses in kept["losses"].values())
    assert kept["origin"]["commit"]


def test_what_a_run_says_of_graphs_is_kept(tmp_path: Path) -> None:
    assert training.graphs(tmp_path / "run") == []
    say: list[str] = []
    choose_graphs("on", torch.device("cpu"), 1, say.append)
    (tmp_path / "run.log").write_text(f"Pretraining\n{say[0]}\nepoch 1\n")
    assert training.graphs(tmp_path / "run") == say


def test_a_training_that_fails_or_disagrees_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = [1.0 - step / 100 for step in range(training.STEPS)]
    found: dict[str, list[float] | str] = dict.fromkeys(training.RUNS, good)
    text, right = training.report(found)
    assert right
    assert text.count("differs by 0.0e+00") == len(training.PAIRS)
    for name, values, said in (
        ("bfloat16", good[:-1], "19 steps  WRONG"),
        ("bfloat16", [float("nan")] * 20, "WRONG"),
        ("float32, dense-and-mask", [loss * 1.05 for loss in good], "a loss differs by 5.0e-02 at most  WRONG"),
        ("float32", "exit code 1: no memory", "FAILED: exit code 1: no memory"),
    ):
        text, right = training.report(found | {name: values})
        assert not right
        assert said in text
    run = training.Run({"trainer.precision": "fp8"})
    with pytest.raises(RuntimeError, match=r"exit code 2: .*fp8"):
        training.train([sys.executable], run, tmp_path / "run", TINY)
    monkeypatch.setattr(training, "find_spec", lambda _: None)
    assert training.main([]) == 3


def test_losses_are_read_while_they_are_written(tmp_path: Path) -> None:
    assert training.losses(tmp_path) == []
    (tmp_path / "metrics.csv").write_text("step,loss,lr\n1,0.5,1\n2,0.4,1\n3,0.")
    assert training.losses(tmp_path) == [0.5, 0.4]


def test_tuning_enters_what_is_faster_and_only_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from benchmarks.gpu import tune
    from patchsparse.backends.triton import tuned, tuning
    from patchsparse.backends.triton.configs import Tile
    from patchsparse.backends.triton.tuning import Measured
    from patchsparse.geometry import Stencil

    tiles = [Tile(64, 64, 64, 4, 3), Tile(128, 64, 64, 4, 3), Tile(64, 128, 64, 8, 3)]

    def measured(*seconds: float) -> list[Measured]:
        return [Measured(tile, value, 0.0) for tile, value in zip(tiles, seconds, strict=True)]

    assert tune.entry_of(measured(1e-3, 0.99e-3, float("inf"))) is None
    entry = tune.entry_of(measured(1e-3, 2e-3, 0.5e-3))
    assert entry is not None
    assert (entry.tile["n"], entry.ms, entry.default_ms) == (128, 0.5, 1.0)
    kind = tuned.Kind(
        "conv2d", "sm_90", torch.bfloat16, "ieee", (8, 8), Stencil((3, 3), padding=(1, 1)), (64, 64), 1, 18, 3
    )
    other = kind._replace(size=(4, 4))
    table = tmp_path / "tuned.json"
    tuned.Table().write(table)
    monkeypatch.setattr(tuned, "TABLE", table)
    monkeypatch.setattr(tune, "has_gpu", lambda: True)
    monkeypatch.setattr(tune, "aside", lambda: aside())
    found = [(kind, measured(1e-3, 2e-3, 0.5e-3)), (other, measured(1e-3, 2e-3, 0.9e-3))]
    monkeypatch.setattr(tune, "measure", lambda seconds, where: iter(found))
    assert tune.main(["--out", str(tmp_path / "rows")]) == 0
    written = tuned.Table.read(table)
    assert set(written.entries["sm_90"]) == {str(kind), str(other)}
    assert (tmp_path / "rows" / "tuned.json").read_text() == table.read_text()
    assert "torch " in written.runs[0]["from"]
    found[:] = [(kind, measured(1e-3, 2e-3, 1e-3))]  # now the default is as good
    assert tune.main(["--out", str(tmp_path / "rows")]) == 0
    assert set(tuned.Table.read(table).entries["sm_90"]) == {str(other)}
    monkeypatch.setattr(tuning, "_tuner", tuning.Tuner(found={kind: measured(1e-3, 2e-3, 0.4e-3), "no kind": []}))
    tune.keep_all(tmp_path / "layers")  # beside the rows of layers, the package's own stays
    kept = tuned.Table.read(tmp_path / "layers" / "tuned.json")
    assert kept.entries["sm_90"][str(kind)].ms == 0.4
    assert set(kept.entries["sm_90"]) == {str(kind), str(other)}
    assert set(tuned.Table.read(table).entries["sm_90"]) == {str(other)}
    assert {(s.k, s.stride) for s, _, _ in tune.shapes()} == {(3, 1), (3, 2), (7, 2)}


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_tuning_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from benchmarks.gpu import tune

    assert tune.main([]) == 2
    assert "a table of guesses helps nobody" in capsys.readouterr().err


def test_a_timing_is_filled_with_calls_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [timing.calls_to_fill(s) for s in (1.0, 0.02, 0.005, 1e-6, 0.0)] == [1, 1, 4, timing.MOST, timing.MOST]
    clock, calls = [0.0], {"slow": 0, "fast": 0}

    def way(name: str, seconds: float):
        def run() -> None:
            calls[name] += 1
            clock[0] += seconds

        return run

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(timing, "wait", lambda: None)
    timing.GATE.let("a check", 0.0, 1.0)
    ways = {"slow": way("slow", 0.03), "fast": way("fast", 0.002)}
    for gpu, expected in ((False, {"slow": 5, "fast": 5}), (True, {"slow": 5, "fast": 2 + 3 * 10})):
        calls.update(slow=0, fast=0)
        monkeypatch.setattr(timing, "has_gpu", lambda gpu=gpu: gpu)
        found = timing.in_turn(ways, rounds=3, warmup=2)
        assert calls == expected
        assert found.median("slow") == pytest.approx(0.03)  # of one call
        assert found.ratio("slow", "fast").median == pytest.approx(15)
    timing.GATE.close()


def test_a_copy_without_history_takes_its_commit_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.commit.cache_clear()
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.commit() == "unknown"
    machine.commit.cache_clear()
    monkeypatch.setenv(machine.COMMIT, "abc1234")
    assert machine.commit() == "abc1234"
    machine.commit.cache_clear()


def test_rows_of_a_gpu_name_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    machine.versions.cache_clear()
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    monkeypatch.setattr(machine, "driver", lambda: "580.159.04")
    assert machine.versions().endswith("; driver 580.159.04")
    machine.versions.cache_clear()


def test_a_writer_that_is_killed_leaves_the_table_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = dict.fromkeys(COLUMNS, "x") | {"suite": "conv"}
    merge([row], tmp_path)
    before = (tmp_path / "conv.csv").read_text()

    class KilledError(Exception):
        pass

    def kill(self, rows) -> None:
        raise KilledError

    monkeypatch.setattr("benchmarks.measure.rows.csv.DictWriter.writerows", kill)
    with pytest.raises(KilledError):
        merge([row | {"case": "another"}], tmp_path)
    assert (tmp_path / "conv.csv").read_text() == before


def test_windows_are_drawn_once_and_repeated() -> None:
    store = windows(20, 2, 64)
    assert windows(20, 2, 64) is store
    assert len(store) == 20
    assert (store.codes[0] == store.codes[DRAWN]).all()
    assert (store.codes[0] != store.codes[1]).any()
    place = windows_on(torch.device("cpu"), 20, 64, 2, Augmentation())
    (frames,) = place.batches([[(0, index) for index in range(20)]])
    assert frames.shape == (20, 2, 64, 64)
    assert torch.equal(frames[1], frames[DRAWN + 1])


def test_encoders_are_replayed_beside_dense_ones_that_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU a captured run is run again, and nothing is compiled."""
    scale = replace(scale_of("tiny", torch.device("cpu")), compiled=("dense",))
    ways = encoders.encoders("test_resnet", ("auto",), 0.6, scale)
    ways.check()
    monkeypatch.setattr(encoders, "capture", lambda run: (run, run()))
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: compiled.append(model))
    record = Noted()
    encoder_suite._replayed(record, ways, 0.6, 2.6, 0.01)
    assert compiled == [ways.models["dense"]]
    assert [(row["way"], row["against"]) for row in record] == [
        ("auto graphed", ""),
        *(("auto graph", rival) for rival in ("dense graph", "dense-and-mask", "dense compiled")),
    ]
    assert record[0]["reason"] == "a CUDA graph needs a GPU, and the images are on cpu"
    assert [row["limit"] for row in record] == ["", "2.6", "", "2.6"]

    def refuses(run):
        run()
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(encoders, "capture", refuses)
    record.clear()
    encoder_suite._replayed(record, replace(ways, scale=replace(scale, compiled=())), 0.6, 2.6, 0.01)
    assert [(row["suite"], row["way"], row["against"]) for row in record] == [
        ("left_out", "auto graph", ""),
        ("left_out", "dense graph", ""),
        ("left_out", "auto graphed", ""),
        ("encoder", "auto", "dense-and-mask"),
        ("encoder", "auto", "dense"),
    ]
    monkeypatch.setattr(encoders, "capture", lambda run: (lambda: None, run()))  # a replay that computes nothing
    record.clear()
    encoder_suite._replayed(record, replace(ways, scale=replace(scale, compiled=())), 0.6, 2.6, 0.01)
    assert "replayed differs by" in record[0]["reason"]


def test_an_encoder_by_graphed_is_replayed_on_other_masks_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    with recorded_gpu():
        scale = scale_of("tiny", torch.device("cuda"))
        ways = encoders.encoders("test_resnet", ("gather",), 0.6, scale)
        step = ways.graphed("gather")
        monkeypatch.setattr(encoders, "_packed", None)  # what is compared with is not what is timed
        step()
        step()
    assert all(p.grad is None for p in ways.models["gather"].parameters())  # graphs read places of their own
    monkeypatch.undo()
    monkeypatch.setattr(encoders, "graphed", lambda model, frames, grid: Stuck(model, frames, grid))
    with recorded_gpu(), pytest.raises(AssertionError, match="test_resnet batch 2 gather graphed differs"):
        ways.graphed("gather")


class Stuck(Run):
    """A replay that does not see another mask."""

    captured = True

    def __init__(self, model: torch.nn.Module, frames: torch.Tensor, grid: PatchGrid):
        super().__init__(model, "")
        self.grid = grid

    def __call__(self, images: torch.Tensor, grid: PatchGrid) -> list[torch.Tensor]:
        return super().__call__(images, self.grid)


def test_models_of_equal_weights_share_none() -> None:
    one, other = (build("light", 32, torch.device("cpu"), "test_resnet", 2) for _ in range(2))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["kernel_times", "kernels", "small", "tune"])
def test_what_needs_a_gpu_says_so_in_one_sentence(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert import_module(f"benchmarks.gpu.{name}").main([]) == 2
    said = capsys.readouterr()
    assert not said.out
    assert said.err.startswith(f"python -m benchmarks.gpu.{name} needs a CUDA device")
    assert said.err.count("\n") == 1


def test_the_start_of_a_kernel_is_timed_by_pytorch_and_by_triton() -> None:
    with fake_gpu("h100", compiles=False) as seen:
        found = identify.starts(count=3, rounds=2)
    assert set(found) == {"pytorch", "triton"}
    assert all(us > 0 for us in found.values())
    assert dict(seen.launches) == {"round_to_tf32_kernel": 6}


def test_times_of_kernels_are_kept_by_what_runs(tmp_path: Path) -> None:
    path = tmp_path / kernel_times.NAME
    found = kernel_times.measured("nothing", lambda: None)
    assert (found.gpu_ms, found.started) == (0, 0)
    one = kernel_times.Found("encoder", 35.0, 5.9, (("patch_conv2d_fwd_kernel", 32.0, 1.3), ("copy", 1.5, 0.2)))
    for each in (found, one, replace(one, clock_ms=20.0)):
        kernel_times.keep(each, path)
    kept = json.loads(path.read_text())
    assert list(kept) == ["nothing", "encoder"]
    assert kept["encoder"]["clock_ms"] == 20.0
    assert kept["encoder"]["origin"]["commit"]
    assert kernel_times.table(one).splitlines() == [
        "encoder: 35.00 ms by the clock, 5.90 ms of kernels, 34 started",
        "     1.300 ms     32  patch_conv2d_fwd_kernel",
        "     0.200 ms      2  copy",
    ]
    names = [name for name, _ in kernel_times.subjects(scale_of("tiny", torch.device("cpu")))]
    assert "step resnet18, exact" in names


def test_the_name_of_a_kernel_is_cut_to_what_tells_it_from_others() -> None:
    name = "void at::native::(anonymous namespace)::gather<c10::BFloat16, 4>(int, T1, T2)"
    assert kernel_times._short(name) == "gather<c10::BFloat16, 4>"
