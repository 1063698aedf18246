"""Say what this installation can do: ``python -m spatspark_fast.info``.

Versions, devices, the CPU's instruction set, which engine of `patchsparse` a convolution would take and why not the
others. With ``--model.encoder NAME`` also what pretraining that encoder costs: multiply-adds of every block, dense and
on the patches that it runs on, and memory. The options are those of `pretrain`.
"""

import os
import platform
import sys
from collections.abc import Iterable, Sequence

from jsonargparse import ArgumentParser, Namespace

from spatspark_fast.common.cli import command_parser, run_command
from spatspark_fast.common.errors import UserError
from spatspark_fast.common.files import package_versions
from spatspark_fast.common.options import need
from spatspark_fast.models.choices import DecoderKind
from spatspark_fast.training.options import DataOptions, ModelOptions, Precision, TrainerOptions

__all__ = ["check", "main"]

# Stages of a ResNet-18 on 288 x 288 pixels in patches of 32: channels, and pixels along a patch.
STAGES = ((64, 8), (128, 4), (256, 2), (512, 1))
# Instruction sets that matter for the engines.
INSTRUCTIONS = ("avx", "avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")

AT_LEAST_ONE = (
    *("model.patch", "model.levels", "model.decoder_width"),
    *("data.input_length", "data.crop", "data.batch_size"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(info, argv)


def info(argv: Sequence[str]) -> None:
    """Write the report to standard output; raise `UserError` for options that mean nothing."""
    options = _parser().parse_args(list(argv))
    check(options)
    sections = [
        ("Versions", list(_versions())),
        ("Devices", list(_devices())),
        ("Engines of patchsparse", list(_engines())),
    ]
    if options.model.encoder is not None:
        from spatspark_fast.info.costs import model_costs

        title = "{0.model.encoder}, {0.data.input_length} x {0.data.crop} x {0.data.crop}, {0.mask.ratio:.0%} hidden"
        sections.append((title.format(options), list(model_costs(options))))
    for title, lines in sections:
        sys.stdout.write("\n".join([title, *(f"  {line}".rstrip() for line in lines), "", ""]))


def check(options: Namespace) -> None:
    """Raise `UserError` for options that mean nothing."""
    for name in AT_LEAST_ONE:
        need(options[name] >= 1, name, options[name], "give a number of at least 1")
    ratio, decoded = options.mask.ratio, options.model.decode_ratio
    need(0 < ratio < 1, "mask.ratio", ratio, "give the hidden share, strictly between 0 and 1")
    need(0 < decoded <= 1, "model.decode_ratio", decoded, "give a share above 0, at most 1")


def _parser() -> ArgumentParser:
    parser = command_parser(
        "info",
        "Report versions, devices and engines; with --model.encoder also what pretraining costs.",
    )
    add = parser.add_argument
    add("--model.encoder", type=str, help="timm name of an encoder whose costs are counted")
    add("--model.patch", type=int, default=ModelOptions.patch, help="side of a patch in pixels")
    add("--model.levels", type=int, default=ModelOptions.levels, help="feature maps used, at strides 4, 8, 16, 32")
    add("--model.decoder", type=DecoderKind, default=ModelOptions.decoder, help="the published one, or light")
    width = "channels of the decoder's first block"
    add("--model.decoder_width", type=int, default=ModelOptions.decoder_width, help=width)
    add("--model.decode_ratio", type=float, default=1.0, help="share of patches that are reconstructed")
    add("--mask.ratio", type=float, default=0.6, help="share of patches that is hidden")
    add("--data.input_length", type=int, default=DataOptions.input_length, help="frames of a window, the channels")
    add("--data.crop", type=int, default=288, help="side in pixels of the square images that are trained on")
    add("--data.batch_size", type=int, default=DataOptions.batch_size, help="windows of a step on one device")
    add("--trainer.precision", type=Precision, default=TrainerOptions.precision, help="of the training step")
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
    from patchsparse.backends.cpp import library

    yield f"available: {', '.join(available_backends())}"
    loaded = library.load()
    if loaded.problem is None:
        try:
            yield f"cpp: runs on {loaded.isa()}; {library.ISA} chooses one of {', '.join(loaded.isas)}"
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
