"""Say what this installation can do: ``python -m spatspark_fast.info``.

Versions, devices, the CPU's instruction set, which engine of `patchsparse` a convolution would take and why
not the others, and with ``--model NAME`` what pretraining that encoder costs: multiply-adds of every block,
dense and on the patches that it runs on, and memory.
"""

import os
import platform
import sys
from collections.abc import Iterable, Sequence
from typing import Literal, cast

from jsonargparse import ArgumentParser

from spatspark_fast.common.cli import program, run_command
from spatspark_fast.common.errors import UserError
from spatspark_fast.common.files import package_versions

__all__ = ["main"]

# Stages of a ResNet-18 on 288 x 288 pixels in patches of 32: channels, and pixels along a patch.
STAGES = ((64, 8), (128, 4), (256, 2), (512, 1))
# Instruction sets that matter for the engines.
INSTRUCTIONS = ("avx", "avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(info, argv)


def info(argv: Sequence[str]) -> None:
    """Write the report to standard output."""
    options = _parser().parse_args(list(argv))
    if not 0 < options.ratio < 1:
        raise UserError(f"--ratio is {options.ratio}: give the hidden share, strictly between 0 and 1")
    if min(options.size, options.patch, options.frames, options.decoder_width, options.batch) < 1:
        raise UserError("--size, --patch, --frames, --decoder-width and --batch must be at least 1")
    if not 0 < options.decode_ratio <= 1:
        raise UserError(f"--decode-ratio is {options.decode_ratio}: give a share above 0, at most 1")
    sections = [
        ("Versions", list(_versions())),
        ("Devices", list(_devices())),
        ("Engines of patchsparse", list(_engines())),
    ]
    if options.model is not None:
        title = f"{options.model}, {options.frames} x {options.size} x {options.size}, {options.ratio:.0%} hidden"
        from spatspark_fast.info.costs import CostOptions, model_costs

        sections.append((title, list(model_costs(cast(CostOptions, options)))))
    for title, lines in sections:
        sys.stdout.write("\n".join([title, *(f"  {line}".rstrip() for line in lines), "", ""]))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=program("info"),
        description="Report versions, devices and engines; with --model also what pretraining costs.",
        exit_on_error=False,
    )
    parser.add_argument("--model", type=str, help="timm name of an encoder whose costs are counted")
    parser.add_argument("--frames", type=int, default=12, help="frames of a window, the input channels")
    parser.add_argument("--size", type=int, default=288, help="side of the square image in pixels")
    parser.add_argument("--patch", type=int, default=32, help="side of a patch in pixels")
    parser.add_argument("--decoder", type=Literal["unet", "light"], default="unet", help="the published one, or light")
    names = ("--decoder_width", "--decoder-width")
    parser.add_argument(*names, type=int, default=768, help="channels of the decoder's first block")
    parser.add_argument("--ratio", "--mask_ratio", type=float, default=0.6, help="share of hidden patches")
    names = ("--decode_ratio", "--decode-ratio")
    parser.add_argument(*names, type=float, default=1.0, help="share of patches that a U-Net reconstructs")
    parser.add_argument("--batch", type=int, default=128, help="windows of a step on one device")
    parser.add_argument("--precision", type=Literal["fp32", "bf16"], default="fp32", help="of the training step")
    return parser


def _versions() -> Iterable[str]:
    for name, version in package_versions().items():
        yield f"{name:18s}{version or 'not installed'}"


def _devices() -> Iterable[str]:
    import torch

    from patchsparse.processor import processor_fields

    cpu = processor_fields()
    name = cpu.get("model name") or platform.processor() or platform.machine()
    present = (cpu.get("flags") or cpu.get("Features", "")).split()
    threads, capability = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    yield f"cpu: {name}, {os.cpu_count()} cores, torch uses {threads} threads and {capability}"
    if flags := [flag for flag in INSTRUCTIONS if flag in present]:
        yield f"     instructions: {' '.join(flags)}"
    if not torch.cuda.is_available():
        yield f"cuda: none (torch is built for {torch.version.cuda or 'the CPU only'})"
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        memory = found.total_memory / 2**30
        yield f"cuda:{index}: {found.name}, {memory:.0f} GiB, compute capability {found.major}.{found.minor}"


def _engines() -> Iterable[str]:
    import torch

    from patchsparse import PatchGrid, available_backends, explain, patch_conv2d
    from patchsparse.backends.cpp import native

    yield f"available: {', '.join(available_backends())}"
    loaded = native.library()
    if loaded.problem is None:
        try:
            yield f"cpp: runs on {native.ISAS[loaded.isa()]}; {native.ISA} chooses one of {', '.join(loaded.isas)}"
        except RuntimeError as error:
            raise UserError(str(error)) from None
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        grid = PatchGrid.random(4, (9, 9), 32, generator=torch.Generator().manual_seed(0)).to(device)
        for channels, pixels in STAGES:
            packed = torch.empty(grid.num_active, channels, pixels, pixels, device=device)
            packed = packed.contiguous(memory_format=torch.channels_last)
            weight = torch.empty(channels, channels, 3, 3, device=device)
            yield from explain(patch_conv2d, packed, weight, None, grid, padding=1).splitlines()


if __name__ == "__main__":
    sys.exit(main())
