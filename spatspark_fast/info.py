"""Say what this installation can do: ``python -m spatspark_fast.info``.

Versions, devices, the CPU's instruction set, which engine of `patchsparse` a convolution would take and why
not the others, and with ``--model NAME`` the multiply-adds of an encoder and its decoder, dense and on
visible patches.
"""

import os
import platform
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from spatspark_fast.cli import run_command
from spatspark_fast.errors import UserError
from spatspark_fast.runs import package_versions

__all__ = ["main"]

# Stages of a ResNet-18 on 288 x 288 pixels in patches of 32: channels, and pixels along a patch.
STAGES = ((64, 8), (128, 4), (256, 2), (512, 1))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: info(sys.argv[1:] if argv is None else argv))


def info(argv: Sequence[str]) -> None:
    """Write the report to standard output."""
    options = _parser().parse_args(list(argv))
    if not 0 < options.ratio < 1:
        raise UserError(f"--ratio is {options.ratio}: give the hidden share, strictly between 0 and 1")
    if min(options.size, options.patch, options.frames, options.decoder_width) < 1:
        raise UserError("--size, --patch, --frames and --decoder_width must be at least 1")
    sections = [
        ("Versions", list(_versions())),
        ("Devices", list(_devices())),
        ("Engines of patchsparse", list(_engines())),
    ]
    if options.model is not None:
        title = f"{options.model}, {options.frames} x {options.size} x {options.size}, {options.ratio:.0%} hidden"
        sections.append((title, list(_macs(options))))
    for title, lines in sections:
        sys.stdout.write("\n".join([title, *(f"  {line}" for line in lines), "", ""]))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m spatspark_fast.info",
        description="Report versions, devices and engines; with --model also multiply-adds.",
        exit_on_error=False,
    )
    parser.add_argument("--model", type=str, help="timm name of an encoder whose multiply-adds are counted")
    parser.add_argument("--frames", type=int, default=12, help="frames of a window, the input channels")
    parser.add_argument("--size", type=int, default=288, help="side of the square image in pixels")
    parser.add_argument("--patch", type=int, default=32, help="side of a patch in pixels")
    parser.add_argument("--decoder_width", type=int, default=768, help="channels of the decoder's first block")
    parser.add_argument("--ratio", type=float, default=0.6, help="share of hidden patches")
    return parser


def _versions() -> Iterable[str]:
    for name, version in package_versions().items():
        yield f"{name:18s}{version or 'not installed'}"


def _devices() -> Iterable[str]:
    import torch

    threads, capability = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    yield f"cpu: {_cpu_name()}, {os.cpu_count()} cores, torch uses {threads} threads and {capability}"
    if flags := _cpu_flags():
        yield f"     instructions: {' '.join(flags)}"
    if not torch.cuda.is_available():
        yield f"cuda: none (torch is built for {torch.version.cuda or 'the CPU only'})"
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        memory = found.total_memory / 2**30
        yield f"cuda:{index}: {found.name}, {memory:.0f} GiB, compute capability {found.major}.{found.minor}"


def _cpu_name() -> str:
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cpu_flags() -> list[str]:
    """Return those instruction sets that matter for the engines; nothing where the system does not say."""
    known = ("avx", "avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
    for line in _cpuinfo():
        if line.startswith(("flags", "Features")):
            present = set(line.split(":", 1)[1].split())
            return [flag for flag in known if flag in present]
    return []


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _engines() -> Iterable[str]:
    import torch

    from patchsparse import PatchGrid, available_backends, explain

    yield f"available: {', '.join(available_backends())}"
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        grid = PatchGrid.random(4, (9, 9), 32, generator=torch.Generator().manual_seed(0)).to(device)
        for channels, pixels in STAGES:
            packed = torch.empty(grid.num_active, channels, pixels, pixels, device=device)
            packed = packed.contiguous(memory_format=torch.channels_last)
            weight = torch.empty(channels, channels, 3, 3, device=device)
            yield from explain(packed, weight, grid, padding=1).splitlines()


def _macs(options: Namespace) -> Iterable[str]:
    from spatspark_fast.masks import num_visible
    from spatspark_fast.models.geometry import grid_shape
    from spatspark_fast.models.macs import count_macs
    from spatspark_fast.models.spark import build_spark

    size, patch, width = options.size, options.patch, options.decoder_width
    rows, cols = grid_shape((size, size), patch)
    visible = num_visible(rows * cols, options.ratio) / (rows * cols)
    model = build_spark(options.model, in_chans=options.frames, patch=patch, decoder_width=width)
    macs = count_macs(model, (size, size), visible)
    giga = 1e9
    encoder = macs.encoder
    yield "multiply-adds of one window, forward, in G    dense-and-mask   visible patches      active pairs"
    columns = (encoder.dense, encoder.visible, encoder.pairs)
    yield f"{'encoder':42s}" + "".join(f"{value / giga:18.2f}" for value in columns)
    yield f"{'densify':42s}{macs.densify / giga:18.2f}{macs.densify / giga:18.2f}"
    yield f"{f'decoder (unet, width {width})':42s}{macs.decoder / giga:18.2f}{macs.decoder / giga:18.2f}"
    yield f"{'whole model':42s}{macs.dense_step / giga:18.2f}{macs.sparse_step / giga:18.2f}"
    yield (
        f"saving: encoder {encoder.dense / encoder.visible:.2f}x, whole model {macs.saving:.2f}x; "
        "a backward pass costs twice the forward, in the same proportions"
    )


if __name__ == "__main__":
    sys.exit(main())
