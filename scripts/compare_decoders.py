"""Does sparse decoding learn as well? Pretrain with each decoder, measure the loss of exact decoding, finetune, score.

    python scripts/compare_decoders.py --data.path knmi.h5 --out runs/decoders
    python scripts/compare_decoders.py --data.path knmi.h5 --out runs/decoders --measure      (on an idle machine)
    python scripts/compare_decoders.py --data.path knmi.h5 --out runs/decoders --equal_time

The file is one of `spatspark_fast.prepare` with a test split; ``--pretrain data.path=FILE`` pretrains on another. Every
way takes the same windows in the same order and the same masks, for every seed the same number of steps. With
``--equal_time`` the steps are in proportion to the images/s of ``--measure``, taken in turn in one process, so that
nothing depends on what else the machine does meanwhile. Runs that are there are not repeated, and stopped ones go on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from patchsparse import PatchGrid
from spatspark_fast.common.cli import underscored
from spatspark_fast.common.options import from_plain
from spatspark_fast.data.nl50 import NowcastDataset
from spatspark_fast.evaluate.scoring import evaluate_forecaster
from spatspark_fast.finetune import __main__ as finetune
from spatspark_fast.models.choices import DECODE_RATIO
from spatspark_fast.models.masks import MaskSampler, masks_of_step
from spatspark_fast.models.patch_loss import reconstruction_loss
from spatspark_fast.pretrain import __main__ as pretrain
from spatspark_fast.pretrain.build import build_masks, build_model
from spatspark_fast.pretrain.cli import parse_pretrain
from spatspark_fast.pretrain.config import PretrainConfig
from spatspark_fast.training.checkpoints import read_checkpoint
from spatspark_fast.training.lamb import clip_gradients
from spatspark_fast.training.optim import build_optimizer

WAYS = {
    "exact": ("--model.decode_ratio=1",),
    "sparse": (f"--model.decode_ratio={DECODE_RATIO}",),
    "sparse 0.37": ("--model.decode_ratio=0.37",),
    "sparse 0.25": ("--model.decode_ratio=0.25",),
    "sparse, no finish": (f"--model.decode_ratio={DECODE_RATIO}", "--trainer.exact_finish=0"),
    "sparse, finish 0.3": (f"--model.decode_ratio={DECODE_RATIO}", "--trainer.exact_finish=0.3"),
    "exact, group norm": ("--model.decode_ratio=1", "--model.decoder_norm=group"),
    "exact, layer norm": ("--model.decode_ratio=1", "--model.decoder_norm=layer"),
    "light": ("--model.decoder=light", "--model.decode_ratio=1"),
    "light 0.5": ("--model.decoder=light", "--model.decode_ratio=0.5"),
    "light 0.25": ("--model.decoder=light", "--model.decode_ratio=0.25"),
}
SCRATCH = "no pretraining"
BATCH, MASK_DRAWS = 4, 4
WARM_UP, MEASURED_STEPS, LIGHT_WIDTH = 2, 11, 512
SCORES, DIGITS = ("pmse", "csi@0.5", "csi@1"), (".5f", ".3f", ".3f")


@dataclass(frozen=True)
class Options:
    """Hold what all runs share: decoder width, finetuning steps, options of the two commands as ``name=value``."""

    width: int
    finetune_steps: int
    pretrain: Sequence[str]
    finetune: Sequence[str]


def checked(code: int, what: str) -> None:
    """Raise SystemExit unless the exit code of a command is 0."""
    if code:
        raise SystemExit(f"{what} ended with exit code {code}")


def common(data: Path, out: Path, seed: int, words: Sequence[str]) -> list[str]:
    """Return the options that pretraining and finetuning share; ``words`` win."""
    fixed = [f"--data.path={data}", f"--data.batch_size={BATCH}", "--optim.name=adamw", "--optim.base_lr=0.15"]
    fixed += ["--optim.warmup_epochs=1", "--trainer.epochs=1000000", "--trainer.tensorboard=false"]
    return [*fixed, *(f"--{word}" for word in words), f"--trainer.seed={seed}", f"--out={out}"]


def pretraining(out: Path, data: Path, seed: int, options: Options, way: str) -> list[str]:
    """Return the command line that pretrains by a way."""
    width = LIGHT_WIDTH if way.startswith("light") else options.width
    return [*common(data, out, seed, options.pretrain), f"--model.decoder_width={width}", *WAYS[way]]


def pretrained(out: Path, data: Path, seed: int, steps: int, options: Options, way: str) -> Path:
    """Pretrain unless that is done, or go on with it; return the run."""
    if not (out / "encoder.safetensors").exists():  # written at the end
        words = [f"--trainer.max_steps={steps}", "--trainer.savings=false", "--trainer.picture_every=0", "--resume"]
        checked(pretrain.main([*pretraining(out, data, seed, options, way), *words]), f"pretraining {out}")
    return out


def stepper(out: Path, data: Path, options: Options, way: str) -> Callable[[], None]:
    """Return what takes a step of a way, from the masks to the new weights, on windows that are in memory."""
    config = parse_pretrain(pretraining(out, data, 0, options, way)).config
    torch.set_num_threads(config.trainer.threads or torch.get_num_threads())
    windows = NowcastDataset(config.data.path or data, "train", input_length=12, output_length=0, crop=config.data.crop)
    frames = torch.stack([torch.as_tensor(windows[i]["input"]) for i in range(BATCH)])
    model, masks, positions = build_model(config).train(), build_masks(config), count()
    optimizer = build_optimizer(model.named_parameters(), config.optim, lr=1e-4)

    def step() -> None:
        grid, decoded = masks_of_step(model, masks, frames, config.model.decode_ratio, next(positions))
        model(frames, grid, decoded).loss.backward()
        clip_gradients(model.parameters(), config.optim.clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measured(out: Path, data: Path, options: Options, ways: Sequence[str]) -> dict[str, float]:
    """Return images per second of each way: the median of steps that are taken in turn in this process."""
    result = out / "rates.json"
    if not result.exists():
        steps = {way: stepper(out, data, options, way) for way in ways if way != SCRATCH}
        seconds: dict[str, list[float]] = {way: [] for way in steps}
        for _ in range(WARM_UP + MEASURED_STEPS):
            for way, step in steps.items():
                started = time.perf_counter()
                step()
                seconds[way].append(time.perf_counter() - started)
        rates = {way: BATCH / statistics.median(found[WARM_UP:]) for way, found in seconds.items()}
        result.write_text(json.dumps(rates, indent=1))
    return json.loads(result.read_text())


def in_the_mean(way: str, rates: Mapping[str, float], options: Options) -> float:
    """Return the images per second of a whole training, of which the last steps may decode exactly."""
    config = parse_pretrain(pretraining(Path("unused"), Path("unused"), 0, options, way)).config
    finish = config.trainer.exact_finish if config.model.decode_ratio < 1 else 0.0
    whole = rates["light" if way.startswith("light") else "exact"]
    return 1 / ((1 - finish) / rates[way] + finish / whole)


def reconstruction(run: Path, data: Path) -> float:
    """Return the mean loss of exact decoding on masked patches of the test windows, under fixed masks; note it."""
    result = run / "reconstruction.json"
    if not result.exists():
        result.write_text(json.dumps(_reconstruction(run / "checkpoints" / "last.ckpt", data)))
    return json.loads(result.read_text())


@torch.no_grad()
def _reconstruction(checkpoint: Path, data: Path) -> float:
    state = read_checkpoint(checkpoint)
    model = build_model(from_plain(PretrainConfig, state["config"]))
    weights = {
        name.removeprefix("spark."): value for name, value in state["state_dict"].items() if name.startswith("spark.")
    }
    model.load_state_dict(weights)
    model.eval()
    return mean_loss(lambda part, grid: float(model(part, grid).loss), data, model.in_chans)


def blank(data: Path) -> float:
    """Return the loss of reconstructing every patch by its mean: what a model has to beat."""
    return mean_loss(lambda part, grid: float(reconstruction_loss(torch.zeros_like(part), part, grid)), data)


def mean_loss(loss: Callable[[Tensor, PatchGrid], float], data: Path, frames: int = 12) -> float:
    """Return the mean of a loss over the test windows under fixed masks."""
    windows = NowcastDataset(data, "test", input_length=frames, output_length=0)
    stack = torch.stack([torch.as_tensor(windows[i]["input"]) for i in range(len(windows))])
    sampler = MaskSampler(0.6, seed=12345)
    parts = [part for part in stack.split(BATCH) for _ in range(MASK_DRAWS)]
    sums = [len(part) * loss(part, sampler(part, step)) for step, part in enumerate(parts)]
    return sum(sums) / (len(stack) * MASK_DRAWS)


def finetuned(out: Path, data: Path, seed: int, options: Options, init: Path | None) -> dict[str, float]:
    """Finetune unless that is done, or go on with it; return scores on the test split."""
    result = out / "scores.json"
    if not options.finetune_steps:
        return {}
    if not result.exists():
        fixed = [*common(data, out, seed, options.finetune), f"--trainer.max_steps={options.finetune_steps}"]
        fixed += ["--trainer.patience=0", "--data.validation_fraction=0"]
        fixed += [f"--init={init}"] if init else []
        fixed += [] if init and init.suffix == ".ckpt" else [f"--model.decoder_width={options.width}"]
        if not (out / "trained").exists():  # it may have been stopped while it was scored
            checked(finetune.main([*fixed, "--resume"]), f"finetuning {out}")
            (out / "trained").touch()
        scores = evaluate_forecaster(out / "checkpoints" / "last.ckpt", data, fss_scales=(), spectrum=False)
        result.write_text(json.dumps({key: scores["all"][key] for key in SCORES}))
    return json.loads(result.read_text())


def spread(values: Sequence[float], digits: str) -> str:
    """Return the mean and the range of the seeds."""
    return f"{statistics.fmean(values):{digits}} ({min(values):{digits}}-{max(values):{digits}})"


def main() -> None:
    """Train with each decoder, and print what finetuning makes of the encoders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data.path", dest="data", type=Path, required=True, help="file with the splits train and test")
    add("--out", type=Path, required=True, help="folder for all runs and the table")
    add("--pretrain_steps", type=int, default=300, help="at equal time, those of the exact decoder")
    add("--finetune_steps", type=int, default=150, help="0 leaves finetuning out")
    add("--seeds", type=int, default=3, help="runs of each way, with seeds 0, 1, ...")
    add("--model.decoder_width", dest="width", type=int, default=256, help="of the U-Net")
    add("--ways", nargs="+", default=[*WAYS, SCRATCH], choices=[*WAYS, SCRATCH], metavar="WAY", help="default: all")
    add("--measure", action="store_true", help="only measure images/s into OUT/rates.json; wants an idle machine")
    add("--equal_time", action="store_true", help="give each way steps in proportion to its images/s")
    add("--pretrain", nargs="*", default=[], metavar="OPTION=VALUE", help="options of pretrain")
    add("--finetune", nargs="*", default=[], metavar="OPTION=VALUE", help="options of finetune")
    args = parser.parse_args(underscored(sys.argv[1:]))
    args.out.mkdir(parents=True, exist_ok=True)
    options = Options(args.width, args.finetune_steps, args.pretrain, args.finetune)
    if args.measure:
        sys.stdout.write(json.dumps(measured(args.out, args.data, options, args.ways), indent=1) + "\n")
        return
    rates = measured(args.out, args.data, options, args.ways) if args.equal_time else dict.fromkeys(WAYS, 1.0)
    kind = "equal-time" if args.equal_time else "equal-steps"
    steps = {way: round(args.pretrain_steps * in_the_mean(way, rates, options) / rates["exact"]) for way in rates}
    rows: dict[str, dict[str, list[float]]] = {}
    for seed in range(args.seeds):
        for way in args.ways:
            if way == SCRATCH:
                scores = finetuned(args.out / "runs" / "scratch" / f"seed-{seed}", args.data, seed, options, None)
                add_row(rows, way, {"steps": 0, "loss": blank(args.data), **scores})
                continue
            folder = args.out / "runs" / way.replace(" ", "-").replace(",", "") / f"{steps[way]}-steps" / f"seed-{seed}"
            run = pretrained(folder / "pretrain", args.data, seed, steps[way], options, way)
            # The light decoder is thrown away, as it has other parameters than the U-Net.
            init = run / ("encoder.safetensors" if way.startswith("light") else "checkpoints/last.ckpt")
            scores = finetuned(folder / "finetune", args.data, seed, options, init)
            add_row(rows, way, {"steps": steps[way], "loss": reconstruction(run, args.data), **scores})
        report(args.out, kind, rows)


def add_row(rows: dict[str, dict[str, list[float]]], way: str, found: Mapping[str, float]) -> None:
    """Append what one seed gave."""
    for key, value in found.items():
        rows.setdefault(way, {}).setdefault(key, []).append(value)


def markdown(rows: dict[str, dict[str, list[float]]], title: str) -> str:
    """Return a table of means and ranges."""
    heads = ("decoder", "steps", "reconstruction loss", "finetuned pMSE", "CSI 0.5 mm/h", "CSI 1 mm/h")
    lines = [f"{title}; mean (range) over seeds", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for way, row in rows.items():
        cells = [f"{row['steps'][0]:.0f}", spread(row["loss"], ".4f")]
        cells += [spread(row[key], digits) if key in row else "" for key, digits in zip(SCORES, DIGITS, strict=True)]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def report(out: Path, name: str, rows: dict[str, dict[str, list[float]]]) -> None:
    """Write the numbers of every seed and the table; show the table."""
    text = markdown(rows, name.replace("-", " ").capitalize())
    (out / f"{name}.json").write_text(json.dumps(rows, indent=1))
    (out / f"{name}.md").write_text(text)
    sys.stdout.write("\n" + text)


if __name__ == "__main__":
    main()
