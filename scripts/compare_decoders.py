"""Does sparse decoding learn as well? Pretrain with each decoder, measure the loss of exact decoding, finetune, score.

    python scripts/compare_decoders.py --data knmi.h5 --more mch.h5 fmi.h5 --out runs/decoders

``--data`` is a file of `spatspark_fast.prepare` with a test split, ``--more`` are others whose training windows are
added. Every way takes the same windows in the same order and the same masks, for every seed the same number of steps;
with ``--equal-time`` the same number of seconds. Runs that are there are not repeated, so that it can be interrupted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
import numpy as np
import torch

from spatspark_fast import finetune, pretrain
from spatspark_fast.config import from_plain
from spatspark_fast.data.nl50 import NowcastDataset
from spatspark_fast.evaluation.scoring import evaluate_forecaster
from spatspark_fast.masks import MaskSampler
from spatspark_fast.training.build import build_model
from spatspark_fast.training.checkpoints import read_checkpoint

WAYS = {
    "exact": (),
    "decode_ratio 0.5": ("--model.decode_ratio", "0.5"),
    "decode_ratio 0.25": ("--model.decode_ratio", "0.25"),
    "light": ("--model.decoder", "light"),
}
BATCH, MASK_DRAWS = 4, 8


def merge(files: Sequence[Path], out: Path) -> None:
    """Write one archive with the training windows of all ``files`` and the test windows of the first."""
    if out.exists():
        return
    with h5py.File(files[0]) as first, h5py.File(out, "w") as target:
        target.attrs.update(first.attrs)
        first.copy("test", target)
        parts: dict[str, list[np.ndarray]] = {"images": [], "timestamps": []}
        for path in files:
            with h5py.File(path) as file:
                if file.attrs["scale_mm_per_5min"] != first.attrs["scale_mm_per_5min"]:
                    raise SystemExit(f"{path} has another scale than {files[0]}: prepare all with one --scale")
                for name, values in parts.items():
                    values.append(np.asarray(file[f"train/{name}"]))
        for name, values in parts.items():
            target[f"train/{name}"] = np.concatenate(values)


def checked(code: int, what: str) -> None:
    if code:
        raise SystemExit(f"{what} ended with exit code {code}")


def pretrained(out: Path, data: Path, seed: int, steps: int, width: int, options: Sequence[str]) -> Path:
    """Pretrain unless that is done; return the checkpoint. Seconds of the command are noted beside it."""
    checkpoint = out / "checkpoints" / "last.ckpt"
    if not (out / "seconds.txt").exists():
        light = "light" in options
        started = time.perf_counter()
        fixed = [
            "--preset",
            "nl50-resnet18",
            "--data.path",
            str(data),
            "--data.batch_size",
            str(BATCH),
            "--data.flip",
            "true",
        ]
        fixed += ["--model.decoder_width", str(4 * width if light else width), "--trainer.seed", str(seed)]
        fixed += ["--optim.name", "adamw", "--optim.base_lr", "0.06", "--trainer.max_steps", str(steps)]
        fixed += ["--trainer.savings", "false", "--trainer.picture_every", "0", "--trainer.tensorboard", "false"]
        checked(pretrain.main([*fixed, *options, "--out", str(out)]), f"pretraining {out}")
        (out / "seconds.txt").write_text(f"{time.perf_counter() - started:.1f}\n")
    return checkpoint


@torch.no_grad()
def reconstruction(checkpoint: Path, data: Path) -> float:
    """Return the mean loss of exact decoding on masked patches of the test windows, under fixed masks."""
    state = read_checkpoint(checkpoint)
    model = build_model(from_plain(state["config"]))
    weights = {
        name.removeprefix("spark."): value for name, value in state["state_dict"].items() if name.startswith("spark.")
    }
    model.load_state_dict(weights)
    model.eval()
    windows = NowcastDataset(data, "test", input_length=model.in_chans, output_length=0)
    frames = torch.stack([torch.as_tensor(windows[i]["input"]) for i in range(len(windows))])
    sampler = MaskSampler(0.6, seed=12345)
    losses = [float(model(f, sampler(f, step)).loss) for step in range(MASK_DRAWS) for f in frames.split(BATCH)]
    return statistics.fmean(losses)


def finetuned(out: Path, data: Path, seed: int, steps: int, width: int, init: Path | None) -> dict[str, float]:
    """Finetune unless that is done; return scores on the test split."""
    result = out / "scores.json"
    if not result.exists():
        options = ["--data.path", str(data), "--data.batch_size", str(BATCH), "--trainer.seed", str(seed)]
        options += ["--trainer.max_steps", str(steps), "--trainer.patience", "0", "--trainer.tensorboard", "false"]
        options += ["--data.flip", "true", "--data.validation_fraction", "0", "--optim.base_lr", "0.06"]
        options += ["--init", str(init)] if init else ["--model.decoder_width", str(width)]
        checked(finetune.main(["--preset", "nl50-resnet18", *options, "--out", str(out)]), f"finetuning {out}")
        scores = evaluate_forecaster(out / "checkpoints" / "last.ckpt", data, fss_scales=(), spectrum=False)
        kept = {key: scores["all"][key] for key in ("pmse", "csi@0.5", "csi@1")}
        result.write_text(json.dumps(kept))
    return json.loads(result.read_text())


def spread(values: Sequence[float], digits: str) -> str:
    """Return the mean and the range of the seeds."""
    return f"{statistics.fmean(values):{digits}} ({min(values):{digits}}-{max(values):{digits}})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--more", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=150, help="pretraining steps of the exact way")
    parser.add_argument("--finetune-steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=128, help="decoder width of the U-Net")
    parser.add_argument("--equal-time", action="store_true", help="as many steps as the exact way has time for")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    data = args.out / "windows.h5"
    merge([args.data, *args.more], data)

    def run(way: str, seed: int, steps: int, kind: str) -> tuple[float, float, dict[str, float]]:
        folder = args.out / kind / way.replace(" ", "-") / f"seed{seed}"
        checkpoint = pretrained(folder / "pretrain", data, seed, steps, args.width, WAYS[way])
        seconds = float((folder / "pretrain" / "seconds.txt").read_text())
        loss = reconstruction(checkpoint, data)
        return seconds, loss, finetuned(folder / "finetune", data, seed, args.finetune_steps, args.width, checkpoint)

    rows = table(run, args.seeds, args.steps, "equal-steps")
    report(args.out, "equal-steps", rows, f"{args.steps} steps")
    if args.equal_time:
        timed: dict[str, dict[str, list[float]]] = {}
        for way in WAYS:
            ratio = statistics.median(rows["exact"]["seconds"]) / statistics.median(rows[way]["seconds"])
            timed |= table(run, args.seeds, round(args.steps * ratio), "equal-time", (way,))
        report(args.out, "equal-time", timed, "the time of the exact way")


def table(
    run: Callable[..., tuple[float, float, dict[str, float]]],
    seeds: int,
    steps: int,
    kind: str,
    ways: Sequence[str] = tuple(WAYS),
) -> dict[str, dict[str, list[float]]]:
    """Run every way with every seed, seed by seed, so that an interrupted study compares equal numbers of them."""
    rows: dict[str, dict[str, list[float]]] = {way: {} for way in ways}
    for seed in range(seeds):
        for way in ways:
            seconds, loss, scores = run(way, seed, steps, kind)
            for key, value in {"seconds": seconds, "loss": loss, **scores}.items():
                rows[way].setdefault(key, []).append(value)
    return rows


def markdown(rows: dict[str, dict[str, list[float]]], title: str) -> str:
    """Return a table of means and ranges."""
    heads = ("decoder", "seconds", "reconstruction loss", "finetuned pMSE", "CSI 0.5 mm/h", "CSI 1 mm/h")
    lines = [
        f"Pretrained for {title}; mean (range) over seeds",
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    for way, row in rows.items():
        cells = [spread(row["seconds"], ".0f"), spread(row["loss"], ".4f"), spread(row["pmse"], ".5f")]
        cells += [spread(row[f"csi@{t}"], ".3f") for t in ("0.5", "1")]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def report(out: Path, name: str, rows: dict[str, dict[str, list[float]]], title: str) -> None:
    """Write the numbers of every seed and the table; show the table."""
    (out / f"{name}.json").write_text(json.dumps(rows, indent=1))
    (out / f"{name}.md").write_text(markdown(rows, title))
    sys.stdout.write("\n" + markdown(rows, title))


if __name__ == "__main__":
    main()
