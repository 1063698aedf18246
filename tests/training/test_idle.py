"""Options that change nothing are named at the start of a run."""

from pathlib import Path
from typing import Any

import pytest

from spatspark_fast.common.options import notes_on_idle
from spatspark_fast.finetune.cli import parse_finetune
from spatspark_fast.finetune.config import idle_options as idle_finetuning
from spatspark_fast.pretrain.cli import parse_pretrain
from spatspark_fast.pretrain.config import idle_options as idle_pretraining

from ..pretrain.runs import pretrain

TRAININGS: dict[str, tuple[Any, Any]] = {
    "pretrain": (parse_pretrain, idle_pretraining),
    "finetune": (parse_finetune, idle_finetuning),
}
IDLE: list[tuple[str, list[str], list[str]]] = [
    ("pretrain", [], []),
    ("finetune", [], []),
    ("pretrain", ["--model.decoder=light", "--model.decoder_norm=layer"], ["model.decoder_norm layer"]),
    ("finetune", ["--model.decoder=light", "--model.decoder_norm=group"], ["model.decoder_norm group"]),
    ("pretrain", ["--model.decoder_norm=layer"], []),
    ("finetune", ["--data.path=x.h5", "--data.synthetic_size=64"], ["data.synthetic_size 64"]),
    ("pretrain", ["--mask.strength=1"], ["mask.strength 1"]),
    ("pretrain", ["--mask.strength=1", "--mask.strategy=rain"], []),
    ("pretrain", ["--trainer.exact_finish=0.5"], ["trainer.exact_finish 0.5"]),
    ("pretrain", ["--trainer.exact_finish=0.5", "--model.decode_ratio=0.5"], []),
    ("finetune", ["--model.base_width=8"], ["model.base_width 8"]),
    (
        "finetune",
        ["--model.kind=smaat", "--model.base_width=8", "--model.encoder=resnet50"],
        ["model.encoder resnet50"],
    ),
    ("finetune", ["--model.kind=spark", "--model.translation=attention"], ["model.translation attention"]),
    (
        "finetune",
        ["--model.kind=smaat", "--data.validation_fraction=0", "--trainer.patience=0", "--trainer.score=csi"],
        ["trainer.score csi"],
    ),
]


@pytest.mark.parametrize(("command", "words", "named"), IDLE)
def test_options_that_change_nothing_are_named(command: str, words: list[str], named: list[str]) -> None:
    parse, idle = TRAININGS[command]
    base = parse([]).config
    config = parse(words).config
    said = [note for note in notes_on_idle(config, idle(config)) if note not in notes_on_idle(base, idle(base))]
    for note, name in zip(said, named, strict=True):
        assert note.startswith(f"Note: --{name}")


def test_the_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain(tmp_path / "run", model__decoder_norm="layer", trainer__epochs=1) == 0
    assert "--model.decoder_norm layer changes nothing here: the light decoder has" in capsys.readouterr().out
