"""Repeat the paper's ablations on any file of radar windows: ``python -m spatspark_fast.experiments``.

Pretrained or from scratch, which translation network, which mask ratio; several seeds each; one table with mean and
spread. Every run is a run directory of `pretrain` or `finetune`; what is there already is not trained again.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from spatspark_fast.common.cli import command_parser, run_command, underscored
from spatspark_fast.common.errors import RunStopped, UserError
from spatspark_fast.common.files import atomic_path, check_folder, package_versions, used
from spatspark_fast.common.locks import owned
from spatspark_fast.common.options import need
from spatspark_fast.experiments.tables import Results, markdown
from spatspark_fast.finetune.cli import parse_finetune
from spatspark_fast.finetune.config import ModelConfig
from spatspark_fast.forecast.baselines import BASELINES_HELP, Baseline, load_baselines
from spatspark_fast.models.choices import TranslationKind
from spatspark_fast.pretrain.config import MaskConfig
from spatspark_fast.training.options import ModelOptions

__all__ = ["Arm", "arms_of", "main"]

Study = Literal["pretraining", "translation", "mask_ratio", "smaat"]
USUAL_STUDIES = ["pretraining", "translation", "mask_ratio"]
FIXED = ("--trainer.patience=0",)  # all arms take as many steps, so that only one thing differs
SCORES = ("pmse", "csi@0.5", "csi@1", "hss@0.5", "bias@0.5")


@dataclass(frozen=True)
class Arm:
    """Say how a model is trained: from a pretraining with ``ratio`` masked (None = from scratch), and as what."""

    name: str
    ratio: float | None
    options: tuple[str, ...] = ()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(experiments, argv)


def experiments(argv: Sequence[str]) -> None:
    """Read the command line, train what is missing, score, and write the table after every run."""
    options = _parser().parse_args(list(argv))
    arms, pairs = arms_of(options)
    out, data = Path(options.out), Path(options.data.path)
    plan = _plan(options)
    check_folder(out, overwrite=True)
    with owned(out):
        _check(options, out, data, plan, arms)
        with atomic_path(out / "experiment.json") as temporary:
            temporary.write_text(json.dumps(plan, indent=1) + "\n")
        _run(options, out, data, plan, arms, pairs)


def _run(
    options: Namespace, out: Path, data: Path, plan: dict[str, Any], arms: list[Arm], pairs: list[tuple[str, str]]
) -> None:
    """Train and score what is missing; write the table after every run."""
    results: Results = {}
    for name, scores in _baselines(options, data).items():
        results[name] = {"-": scores}
    for seed in range(options.seeds):
        for arm in arms:
            run = out / "finetune" / _slug(arm.name) / f"seed-{seed}"
            if not (run / "scores.json").exists():
                init = None if arm.ratio is None else _pretrained(options, out, data, arm.ratio, seed)
                _finetuned(options, run, data, arm, init, seed)
            results.setdefault(arm.name, {})[str(seed)] = _read_scores(run / "scores.json")
            _write(out, results, pairs, plan)
    sys.stdout.write(
        markdown(results, pairs, SCORES) + f"\nFiles in {out}: results.md, results.json, finetune/, pretrain/\n"
    )


def arms_of(options: Namespace) -> tuple[list[Arm], list[tuple[str, str]]]:
    """Return what is trained, each once, and which pairs of names are compared (the second is the reference)."""
    mask_ratio, translation = options.mask.ratio, options.model.translation
    translations = [translation, *options.model.translations]

    def arm(ratio: float | None, kind: str = translation) -> Arm:
        start = "from scratch" if ratio is None else f"pretrained, {ratio:g} masked"
        return Arm(f"{start}, {kind}", ratio, (f"--model.translation={kind}",))

    usual, scratch = arm(mask_ratio), arm(None)
    compared = [(usual, scratch)] if "pretraining" in options.studies else []
    if "translation" in options.studies:
        reference = arm(mask_ratio, "identity")
        compared += [(arm(mask_ratio, kind), reference) for kind in dict.fromkeys(translations) if kind != "identity"]
    if "mask_ratio" in options.studies:
        compared += [(arm(ratio), usual) for ratio in options.mask.ratios if ratio != mask_ratio]
    if "smaat" in options.studies:
        compared.append((Arm("SmaAt-UNet", None, ("--model.kind=smaat",)), scratch))
    arms = {one.name: one for pair in compared for one in reversed(pair)}
    return list(arms.values()), [(ours.name, theirs.name) for ours, theirs in compared]


def _parser() -> ArgumentParser:
    parser = command_parser(
        "experiments",
        "Train and score the paper's ablations on one file: pretrained or from scratch, translation "
        "networks, mask ratios, several seeds each. Can be stopped and started again.",
    )
    add = parser.add_argument
    add("--data.path", required=True, help="HDF5 file in the NL-50 layout with the splits train and test")
    add("--out", required=True, help="folder for all runs and the table; a stopped experiment goes on in it")
    add("--seeds", type=int, default=3, help="runs of each kind, with seeds 0, 1, ... in pretraining and finetuning")
    add("--studies", type=Study, nargs="+", default=USUAL_STUDIES, help="what is compared")
    add("--mask.ratio", type=float, default=MaskConfig.ratio, help="masked share of the usual pretraining")
    add("--mask.ratios", type=float, nargs="+", default=[0.3, 0.75], help="masked shares that are compared with it")
    usual = ModelConfig.translation
    add("--model.translation", type=TranslationKind, default=usual, help="network of all models outside that study")
    others = "other networks to compare with identity"
    add("--model.translations", type=TranslationKind, nargs="*", default=[], help=others)
    add("--pretrain", nargs="*", default=[], metavar="KEY=VALUE", help="options of pretrain, such as trainer.epochs=50")
    add("--finetune", nargs="*", default=[], metavar="KEY=VALUE", help="options of finetune, such as trainer.epochs=20")
    add("--baselines", type=Baseline, nargs="*", default=["persistence"], help=BASELINES_HELP)
    add("--device", default="auto", help="device for scoring: auto, cpu, cuda or cuda:N")
    return parser


def _plan(options: Namespace) -> dict[str, Any]:
    """Return what must stay the same when an experiment goes on; seeds and studies may be added."""
    return {"data": options.data.path, "pretrain": sorted(options.pretrain), "finetune": sorted(options.finetune)}


def _lengths(options: Namespace) -> tuple[int, int | None]:
    """Return how many frames are seen and forecast, by the options of finetune."""
    argv = [f"--data.path={options.data.path}", *FIXED, *_spelled(options.finetune)]
    data = parse_finetune(argv).config.data
    return data.input_length, data.output_length


def _check(options: Namespace, out: Path, data: Path, plan: dict[str, Any], arms: Sequence[Arm]) -> None:
    need(options.seeds >= 1, "seeds", options.seeds, "give a number of at least 1")
    for word in (*options.pretrain, *options.finetune):
        if "=" not in word or word.startswith("-"):
            raise UserError(f"{word} is no option: write it as in --pretrain trainer.epochs=50 optim.name=adamw")
    from spatspark_fast.data.nl50 import NowcastDataset

    for split in ("train", "test"):
        NowcastDataset(data, split, *_lengths(options))
    for arm in arms:
        _check_arm(options, data, arm)
    note = out / "experiment.json"
    if not note.exists() and used(out):
        raise UserError(f"--out {out} is not empty and holds no experiment: choose another folder")
    if note.exists() and _read_json(note) != plan:
        raise UserError(
            f"--out {out} holds an experiment with other data or options (see {note}): choose another folder"
        )


def _check_arm(options: Namespace, data: Path, arm: Arm) -> None:
    """Read the options of the trainings of an arm, so that no hours pass before one is refused."""
    from spatspark_fast.pretrain.build import check_masks
    from spatspark_fast.pretrain.cli import parse_pretrain
    from spatspark_fast.training.windows import open_windows

    here = f"--data.path={data}"
    words = options.finetune if arm.ratio is None else _free(options.finetune)
    parse_finetune([here, *FIXED, *arm.options, *_spelled(words)])
    if arm.ratio is not None:
        config = parse_pretrain([here, *_of_pretraining(arm.ratio), *_spelled(options.pretrain)]).config
        check_masks(config, open_windows(config.data, output_length=0).image_size)


def _baselines(options: Namespace, data: Path) -> dict[str, dict[str, float]]:
    """Score what needs no training."""
    from spatspark_fast.data.nl50 import NowcastDataset
    from spatspark_fast.evaluate.scoring import ScoringOptions, evaluate_predictors
    from spatspark_fast.forecast.predictors import choose_device

    if not options.baselines:
        return {}
    settings = ScoringOptions(fss_scales=(), spectrum=False, device=choose_device(options.device))
    windows = NowcastDataset(data, "test", *_lengths(options), include_valid=True)
    found = evaluate_predictors(load_baselines(options.baselines), windows, settings).scores
    return {name: _kept(scores) for name, scores in found.items()}


def _pretrained(options: Namespace, out: Path, data: Path, ratio: float, seed: int) -> Path:
    """Pretrain unless that is done; return the checkpoint."""
    from spatspark_fast.pretrain import __main__ as pretrain

    run = out / "pretrain" / f"ratio-{ratio:g}" / f"seed-{seed}"
    checkpoint = run / "checkpoints" / "last.ckpt"
    if not (run / "encoder.safetensors").exists():  # written at the end
        _train(pretrain.main, run, data, seed, _of_pretraining(ratio), options.pretrain)
    return checkpoint


def _finetuned(options: Namespace, run: Path, data: Path, arm: Arm, init: Path | None, seed: int) -> None:
    """Finetune unless that is done, and write the scores of the best checkpoint on the test split."""
    from spatspark_fast.evaluate.report import without_nan
    from spatspark_fast.evaluate.scoring import evaluate_forecaster
    from spatspark_fast.finetune import __main__ as finetune
    from spatspark_fast.forecast.predictors import choose_device

    if not (run / "forecast.png").exists():  # written at the end
        fixed = [*FIXED, *arm.options]
        fixed += [] if init is None else [f"--init={init}"]
        words = options.finetune if init is None else _free(options.finetune)
        _train(finetune.main, run, data, seed, fixed, words)
    device = choose_device(options.device)
    path = run / "checkpoints" / "best.ckpt"
    scores = evaluate_forecaster(path, data, split="test", fss_scales=(), spectrum=False, device=device)
    with atomic_path(run / "scores.json") as temporary:
        temporary.write_text(json.dumps(without_nan(_kept(scores)), allow_nan=False) + "\n")


def _of_pretraining(ratio: float) -> list[str]:
    """Return the options of a pretraining that the experiment decides."""
    return [f"--mask.ratio={ratio}", "--trainer.savings=false", "--trainer.picture_every=0"]


def _free(words: Sequence[str]) -> list[str]:
    """Return the options of finetuning that pretrained weights leave open."""
    return [word for word in words if not _of_weights(word)]


def _of_weights(word: str) -> bool:
    """Tell whether pretrained weights decide an option, which is then for models from scratch only."""
    names = {"data.input_length", *(f"model.{field.name}" for field in fields(ModelOptions))}
    return _spelled([word])[0].split("=")[0].removeprefix("--") in names


def _spelled(words: Sequence[str]) -> list[str]:
    """Return options such as ``trainer.epochs=50`` as they stand on a command line."""
    return underscored([f"--{word}" for word in words])


def _train(
    command: Callable[[Sequence[str]], int],
    run: Path,
    data: Path,
    seed: int,
    fixed: Sequence[str],
    words: Sequence[str],
) -> None:
    """Run a training command in this process, or go on with it; end this command where that one ends badly."""
    argv = [f"--data.path={data}", f"--out={run}", "--trainer.tensorboard=false", *fixed, *_spelled(words)]
    code = command([*argv, f"--trainer.seed={seed}", "--resume"])
    if code > 128:
        raise RunStopped(code - 128, f"stopped; the same command goes on with {run}")
    if code:
        raise UserError(f"the experiment ends here, since {run} could not be trained (see above)")


def _read_scores(path: Path) -> dict[str, float]:
    """Return the scores of a run; null, which JSON has for what is undefined, becomes NaN."""
    return {name: math.nan if value is None else value for name, value in _read_json(path).items()}


def _read_json(path: Path) -> dict[str, Any]:
    """Return what the experiment wrote; raise `UserError` for a damaged file."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; remove it, and it is made again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no table of values: remove it, and it is made again")
    return found


def _kept(scores: dict[str, Any]) -> dict[str, float]:
    return {name: scores["all"][name] for name in SCORES}


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._" else "-" for letter in name).replace("--", "-")


def _write(out: Path, results: Results, pairs: Sequence[tuple[str, str]], plan: dict[str, Any]) -> None:
    from spatspark_fast.evaluate.report import without_nan

    record = {**plan, "versions": package_versions(), "compared": [list(pair) for pair in pairs], "scores": results}
    with atomic_path(out / "results.json") as temporary:
        temporary.write_text(json.dumps(without_nan(record), indent=1, allow_nan=False) + "\n")
    with atomic_path(out / "results.md") as temporary:
        temporary.write_text(markdown(results, pairs, SCORES))


if __name__ == "__main__":
    sys.exit(main())
