"""A disk that fills up while a forecast, a model or scores are written: one sentence, and what stood there is whole."""

from collections.abc import Callable
from pathlib import Path

import pytest

from spatspark_fast.evaluate.__main__ import main as evaluate
from spatspark_fast.experiments.__main__ import main as experiments
from spatspark_fast.forecast.__main__ import main as forecast

from ..common.scarce import small_disk
from ..matrix import rest_but
from ..refusals import refusal
from .forecasts import moving_rain, save_checkpoint, write_windows

Inputs = tuple[Path, Path]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    rain = write_windows(folder / "windows.h5", moving_rain(2, 8, 64, 64))
    options = {"encoder": "test_resnet", "decoder": "light", "decoder_width": 16}
    return rain, save_checkpoint(folder / "best.ckpt", lengths=(4, 3), **options)


def forecasting(inputs: Inputs, out: Path) -> list[str]:
    return [f"--data.path={inputs[0]}", f"--checkpoint={inputs[1]}", f"--out={out}", "--overwrite"]


def exporting(inputs: Inputs, out: Path) -> list[str]:
    return [f"--checkpoint={inputs[1]}", f"--export={out / 'model.onnx'}", "--overwrite"]


def evaluating(inputs: Inputs, out: Path) -> list[str]:
    return [f"--data.path={inputs[0]}", f"--out={out}", "--overwrite", "--panels=1", "--thresholds=1", "--fss_scales"]


COMMANDS: dict[str, tuple[Callable[[list[str]], int], Callable[[Inputs, Path], list[str]]]] = {
    "forecast": (forecast, forecasting),
    "export": (forecast, exporting),
    "evaluate": (evaluate, evaluating),
}


def sizes_of(name: str, inputs: Inputs, out: Path) -> dict[str, int]:
    """Return the sizes of what a command writes where there is room."""
    command, words = COMMANDS[name]
    assert command(words(inputs, out)) == 0
    return {path.name: path.stat().st_size for path in out.iterdir()}


@pytest.mark.parametrize(
    ("name", "share"),
    rest_but(
        [("forecast", 0.9), ("evaluate", 0.5)],
        [(name, share) for name in COMMANDS for share in (0.1, 0.3, 0.5, 0.7, 0.9)],
    ),
)
def test_a_full_disk_is_said_and_old_files_stay(
    name: str, share: float, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "export":
        pytest.importorskip("onnxscript", reason='no onnx: pip install "spatspark-fast[onnx]"')
    command, words = COMMANDS[name]
    sizes = sizes_of(name, inputs, tmp_path)
    room = int(share * sum(sizes.values())) + 4096 * (len(sizes) + 2)
    with small_disk(room) as disk:
        out = disk / "out"
        out.mkdir()
        for file in sizes:
            (out / file).write_text("old")
        (disk / "filler").write_bytes(bytes(4096))
        capsys.readouterr()
        assert command(words(inputs, out)) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1, said
        assert "No space left on device; make room on that disk" in said
        assert str(out) in said
        assert {path.name for path in out.iterdir()} == set(sizes), "nothing is left behind"
        for path in out.iterdir():
            assert path.read_bytes() == b"old" or path.stat().st_size > 0.9 * sizes[path.name]


def test_an_experiment_needs_room_for_its_plan(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    rain = write_windows(inputs[0].parent / "both.h5", moving_rain(10, 8, 64, 64), split="train")
    import h5py

    with h5py.File(rain, "a") as file:
        file.copy("train", "test")
    with small_disk(3 * 4096) as disk:
        (disk / "out").mkdir()
        with pytest.raises(OSError, match="No space"):
            (disk / "filler").write_bytes(bytes(1 << 20))
        words = ["--finetune", "data.input_length=3", "--pretrain", "data.input_length=3"]
        said = refusal(capsys, experiments, [f"--data.path={rain}", f"--out={disk / 'out'}", *words])
        assert "experiment.json: No space left on device" in said
        assert not list((disk / "out").iterdir())
