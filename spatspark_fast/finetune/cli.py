"""The command line of `finetune`.

Later wins: defaults, preset, what ``--init`` demands, ``--config FILE``, options on the command line.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from spatspark_fast.common.cli import add_run_options, add_start_options, asked, config_first, preset_path, read_yaml
from spatspark_fast.common.errors import UserError
from spatspark_fast.finetune.config import GROUPS, FinetuneConfig, from_plain, to_plain, validate

__all__ = ["FinetuneRequest", "asked_init", "parse_finetune"]

PRESETS = "spatspark_fast.finetune.presets"


@dataclass
class FinetuneRequest:
    """Hold what the command line asks of `finetune`; see `spatspark_fast.common.cli.Request`."""

    config: FinetuneConfig
    preset: str
    out: str | None
    resume: str | None


def _parser(prog: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog=prog,
        description="Finetune a forecaster of rain on whole images, from pretrained or from random weights. "
        "Without options: the preset `demo` on built-in synthetic radar, about a minute on two CPU cores.",
        exit_on_error=False,
    )
    add_start_options(parser, PRESETS)
    parser.add_argument(
        "--init",
        help="weights to start from: a checkpoint of pretrain or of finetune, or an encoder.safetensors; "
        '"none" (the default) trains from scratch. Its encoder, decoder and input length become those of the model',
    )
    add_run_options(parser, "runs/finetune-PRESET-DATE-TIME", GROUPS)
    return parser


def parse_finetune(
    argv: Sequence[str],
    base: Mapping[str, Any] | None = None,
    demands: Mapping[str, Any] | None = None,
    prog: str = "finetune",
) -> FinetuneRequest:
    """Read the command line of `finetune`.

    ``base`` (nested dicts) takes the place of the preset unless one is asked for: a resumed run starts from its
    own options. ``demands`` maps options to the values that ``--init`` needs: they win over the preset, and
    another value from elsewhere is refused. Raises `UserError` or `argparse.ArgumentError`.
    """
    argv = list(argv)
    chosen = asked(argv, "preset")
    preset = chosen or ("nl50-resnet18" if asked(argv, "data.path") else "demo")
    start = to_plain(FinetuneConfig())
    for layer in (read_yaml(preset_path(preset, PRESETS)) if chosen or base is None else {}, base or {}):
        for name, values in layer.items():
            start[name] = start[name] | values if isinstance(values, Mapping) else values
    flat = {f"{group}.{name}": value for group in GROUPS for name, value in start[group].items()}
    parser = _parser(prog)
    parser.set_defaults(flat | dict(demands or {}) | {"init": start["init"]})
    parsed = parser.parse_args(config_first(argv))
    config = from_plain({name: dict(vars(parsed[name])) for name in GROUPS})
    config.init = None if parsed.init in (None, "none") else str(parsed.init)
    _check_demands(config, demands or {})
    validate(config)
    return FinetuneRequest(from_plain(to_plain(config)), preset, parsed.out, parsed.resume)


def asked_init(argv: Sequence[str]) -> Path | None:
    """Return the file that ``--init`` names on the command line or in the config file, if any."""
    init = asked(argv, "init")
    return None if init in (None, "none") else Path(init)


def _check_demands(config: FinetuneConfig, demands: Mapping[str, Any]) -> None:
    plain = to_plain(config)
    for option, value in demands.items():
        group, name = option.split(".")
        if plain[group][name] != value:
            raise UserError(
                f"--{option} is {plain[group][name]}, but --init {config.init} was trained with {value}: "
                "leave the option out"
            )
