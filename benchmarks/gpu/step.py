"""Count what starts in a training step of ResNet-18, and time its host part, on a fake GPU (``fake.py``).

``python -m benchmarks.gpu.step`` counts at real size (batch 128, 288x288, 12 frames, 60 % masked) what a step starts:
kernels of PyTorch, of Triton, and copies; as it is, and as a captured step (``trainer.graph``), which replays. Lists of
tensors count as often as PyTorch starts a kernel for them. Then it times the host on few windows and a narrow
ResNet-18, where computing on the CPU takes little: median time of the processor. ``--against CHECKOUT`` does the same
with the packages of another checkout, in a process of its own.

Not seen: the launches of a convolution or a product inside PyTorch (one is counted), and the time of the driver.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .fake import fake_gpu

__all__ = ["found", "list_launches", "main"]

ROOT = Path(__file__).parents[2]
LISTS = {1: 110, 2: 64, 3: 48, 4: 36}  # most tensors of a launch, by the number of lists (MultiTensorApply.cuh)
CHUNK, BLOCKS = 1 << 16, 320  # elements of a block, and blocks of a launch
WARM, TIMED = 4, 30
DECODERS = {"light": 512, "unet": 768}
NARROW = {"light": 16, "unet": 32}
CHANNELS = (32, 32, 64, 64)


def list_launches(sizes: Sequence[int], lists: int) -> int:
    """Return how many kernels PyTorch starts for tensors of these sizes, of which an operator reads some ``lists``."""
    launches = tensors = blocks = 0
    for size in sizes:
        tensors += 1
        for left in reversed(range(-(-size // CHUNK))):
            blocks += 1
            if blocks == BLOCKS or (tensors == LISTS[lists] and not left):
                launches, blocks, tensors = launches + 1, 0, int(left > 0)
    return launches + (blocks > 0)


class _Lists(TorchDispatchMode):
    """Count the kernels that operators on lists of tensors start."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith(("_foreach", "_fused")):
            self.launches += _launches_of(name, args)
        return func(*args, **(kwargs or {}))


def _launches_of(name: str, args: Sequence[Any]) -> int:
    lists = [arg for arg in args if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], Tensor)]
    lists = [each for each in lists if (len(each) == len(lists[0]) and each[0] is not each[-1]) or len(each) == 1]
    sizes = [tensor.numel() for tensor in lists[0]]
    if any(tensor.shape != first.shape for each in lists for tensor, first in zip(each, lists[0], strict=True)):
        return len(sizes)  # no fast way: one kernel for each tensor
    count = list_launches(sizes, min(len(lists), 4))
    return 2 * count + 1 if name == "_foreach_norm" else count  # zeros, partial sums, their sum


def _build(decoder: str, width: int, narrow: bool) -> Any:
    """Return a model in training mode on the card."""
    import timm

    from spatspark_fast.models.spark import build_spark

    make = partial(timm.create_model, channels=CHANNELS) if narrow else timm.create_model
    with mock.patch.object(timm, "create_model", make):
        torch.manual_seed(0)
        return build_spark("resnet18", decoder=decoder, decoder_width=width, in_chans=12).cuda().train()  # type: ignore[arg-type]


@dataclass
class _Way:
    """Take a step; count the graphs that were replayed."""

    run: Callable[[], None]
    graphs: Callable[[], int] = lambda: 0


def _ways(model: Any, frames: Tensor) -> dict[str, _Way]:
    """Return the step as a run without graphs takes it, its end, and the captured one where there is such a thing."""
    from spatspark_fast.models import masks as drawing
    from spatspark_fast.training.lamb import Lamb, clip_gradients
    from spatspark_fast.training.optim import parameter_groups, set_rates

    masks, position = drawing.MaskSampler(ratio=0.6), 0
    optimizer = Lamb(parameter_groups(model.named_parameters()), betas=(0.9, 0.95))
    set_rates(optimizer.param_groups, 2e-4, 0.04)

    def eager() -> None:
        nonlocal position
        position += 1
        grid, decoded = drawing.masks_of_step(model, masks, frames, 1.0, position)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(frames, grid, decoded).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        end()

    def end() -> None:
        clip_gradients(model.parameters(), 5.0)
        optimizer.step()

    ways = {"step": _Way(eager), "its clipping and LAMB": _Way(end)}
    if not hasattr(drawing, "draw_masks"):
        return ways
    from spatspark_fast.training.captured import CapturedStep, Inputs
    from spatspark_fast.training.cuda_graphs import CudaGraphs

    def loss_of(frames: Tensor, noise: Sequence[Tensor], counts: tuple[int, ...]) -> Tensor:
        visible, *decoded = counts
        grids = drawing.grids_of(model, masks, frames, visible, decoded, noise)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return model(frames, *grids).loss

    step = CapturedStep(model, loss_of, optimizer, CudaGraphs(frames.device), clip=5.0)

    def captured() -> None:
        nonlocal position
        position += 1
        draw = drawing.draw_masks(model, masks, tuple(frames.shape), 1.0, position)
        step(Inputs(frames, draw.noise, (draw.visible, *draw.decoded)))

    return ways | {"captured step": _Way(captured, lambda: step.replayed)}


def _warm(run: Callable[[], None]) -> None:
    """Take the steps that a capture waits for; what a replay computes is not compared on a fake GPU."""
    with ExitStack() as stack:
        if captured := sys.modules.get("spatspark_fast.training.captured"):
            for name in ("differences", "ways_apart"):
                stack.enter_context(mock.patch.object(captured, name, return_value=[]))
        for _ in range(WARM):
            run()


def found(decoder: str, timed: bool = True) -> dict[str, dict[str, float]]:
    """Return what a step starts at real size, and milliseconds of the host where ``timed``, by the way of a step."""
    results: dict[str, dict[str, float]] = {}
    with fake_gpu("h100", hollow=True, compiles=False) as seen:
        model = _build(decoder, DECODERS[decoder], narrow=False)
        for name, way in _ways(model, torch.zeros(128, 12, 288, 288).cuda()).items():
            _warm(way.run)
            seen.operators.clear()
            seen.launches.clear()
            replayed = way.graphs()
            with _Lists() as lists:
                way.run()
            plain = sum(n for op, n in seen.operators.items() if not op.startswith(("_foreach", "_fused")))
            results[name] = {"pytorch": plain + lists.launches, "triton": sum(seen.launches.values())}
            results[name]["graphs"] = way.graphs() - replayed
            results[name]["host_ms"] = math.nan
    if not timed:
        return results
    torch.set_num_threads(1)
    with fake_gpu("h100"):
        model = _build(decoder, NARROW[decoder], narrow=True)
        for name, way in _ways(model, torch.zeros(2, 12, 64, 64)).items():
            _warm(way.run)
            times = []
            for _ in range(TIMED):
                begun = time.process_time()
                way.run()
                times.append(time.process_time() - begun)
            results[name]["host_ms"] = statistics.median(times) * 1e3
    return results


def _of(checkout: Path, decoder: str, timed: bool) -> dict[str, dict[str, float]]:
    """Return what is found with the packages of a checkout."""
    paths = [str(ROOT), str(checkout / "kernels"), str(checkout)]
    code = (
        f"import sys; sys.path[:0] = {paths[:1]}; from benchmarks.gpu.step import found; sys.path[:0] = {paths[1:]}; "
        f"import json; print(json.dumps(found({decoder!r}, {timed})))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"counting with {checkout} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.step", description=__doc__)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="root of another checkout")
    parser.add_argument("--decoders", nargs="*", choices=[*DECODERS], default=[*DECODERS])
    parser.add_argument("--no-times", action="store_true", help="count only: nothing is compiled, and no time is taken")
    asked = parser.parse_args(argv)
    checkouts = ([] if asked.against is None else [asked.against.resolve()]) + [ROOT]
    heads = ("checkout", "decoder", "way", "kernels and copies of PyTorch", "kernels of Triton", "graphs", "host ms")
    sys.stdout.write(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}\n")
    for decoder in asked.decoders:
        for checkout in checkouts:
            for way, counts in _of(checkout, decoder, not asked.no_times).items():
                row = " | ".join(f"{counts[name]:.0f}" for name in ("pytorch", "triton", "graphs"))
                row += f" | {counts['host_ms']:.2f}"
                sys.stdout.write(f"| {checkout.name} | {decoder} | {way} | {row} |\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
