"""Command lines and YAML files with values that nobody should have to expect, for all commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, get_args, get_type_hints

import h5py
import yaml

from spatspark_fast.__main__ import main as spatspark
from spatspark_fast.common.options import groups_of
from spatspark_fast.finetune.__main__ import main as finetune
from spatspark_fast.finetune.config import FinetuneConfig
from spatspark_fast.pretrain.__main__ import main as pretrain
from spatspark_fast.pretrain.config import PretrainConfig

from ..finetune.runs import SMALL as FINETUNE
from ..forecast.forecasts import moving_rain, save_checkpoint, write_windows
from ..options import OPTIONS
from ..prepare.archives import write_archive
from ..pretrain.runs import SMALL as PRETRAIN
from .damage import NUMBERS, STRINGS, VALUES, damaged
from .outcomes import Suite, Verdict, judge_command

QUICK = {
    "data.synthetic_windows": 4,
    "data.num_workers": 0,
    "trainer.picture_every": 0,
    "trainer.epochs": 1,
    "trainer.max_steps": 1,
}
# What a command line begins with; NAME in braces is a path.
LINES: dict[str, dict[str, Any]] = {
    "pretrain": {**PRETRAIN, **QUICK, "model.decoder_width": 8, "out": "{out}", "data.cache": "{cache}"},
    "finetune": {
        **{name: value for name, value in (FINETUNE | QUICK).items() if name != "trainer.picture_every"},
        **{"model.decoder_width": 8, "out": "{out}", "data.cache": "{cache}"},
    },
    "evaluate": {
        **{"data.path": "{rain}", "out": "{out}", "panels": 0, "spectrum": "false", "fss_scales": 1},
        **{"thresholds": 1.0, "checkpoint": "{persistence}"},
    },
    "forecast": {"data.path": "{rain}", "checkpoint": "{persistence}", "out": "{out}", "pictures": "false"},
    "prepare": {"merge": "{rain}", "out": "{out}.h5"},
    "prepare from radar": {
        **{
            "source": "knmi",
            "data.path": "{radar}",
            "crop": "0:48,0:40",
            "data.input_length": 3,
            "data.output_length": 3,
        },
        **{"data.num_workers": 0, "wet_fraction": 0.1, "out": "{out}.h5"},
    },
    "forecast from radar": {
        **{"data.path": "{radar}", "source": "knmi", "crop": "all", "checkpoint": "{persistence}", "out": "{out}"},
        **{"pictures": "false"},
    },
    "info": {},
    "experiments": {"data.path": "{no}", "out": "{out}"},
}
SHARES = {
    **{"pretrain": 8, "finetune": 8, "evaluate": 2, "forecast": 4, "prepare": 3, "info": 4, "experiments": 4},
    **{"prepare from radar": 5, "forecast from radar": 3},
}
# Taken at their word these numbers are a long wait, a full disk or a thousand processes, which anyone may ask for.
ASKED = {
    "data.synthetic_windows": [0, -1, 1, 2, 3, 2**63, 10**30, "x", 1.5, ""],
    "trainer.devices": [0, -1, "none", "", 1.5, "1,2", "9" * 30],
    "data.num_workers": [-1, 0, 1.5, "x", 2**63, 10**30],
    "trainer.compile": ["fast", "", 1, "null", "yes"],
    "seeds": [0, -1, "x", ""],
    "panels": [0, -1, "x", ""],
    "export": ["", ".", "no/such/model.onnx", "a\0b", "x" * 5000],
    "print_config": ["", "comments", "x"],
    "baselines": ["persistence", "x", "", "persistence persistence"],
    "spectrum": ["true", "x", ""],
    "pictures": ["false", "x", ""],
}
PATHS = ("data.path", "out", "checkpoint", "init", "config", "data.cache", "merge", "test_file", "resume", "export")


def prepare(folder: Path) -> None:
    """Write a file of windows and a forecaster."""
    write_windows(folder / "rain.h5", moving_rain(2, 6, 64, 64))
    with h5py.File(folder / "rain.h5", "a") as file:
        file.copy("test", "train")
    write_archive(folder / "radar", list(range(12)))
    save_checkpoint(folder / "persistence.ckpt", "persistence", lengths=(3, 3))


def attempt(random: Random, folder: Path, scratch: Path) -> Verdict:
    """Draw a command with a small, right command line, change a few options, and run it."""
    names = {"rain": folder / "rain.h5", "persistence": folder / "persistence.ckpt", "radar": folder / "radar"}
    names |= {"out": scratch / "out", "cache": scratch / "cache", "no": scratch / "no.h5"}
    _odd_files(scratch)
    line = random.choices(list(SHARES), list(SHARES.values()))[0]
    command = line.split()[0]
    options = {name: _filled(value, names) for name, value in LINES[line].items()}
    if command in ("pretrain", "finetune") and random.random() < 0.35:
        main: Callable[[list[str]], int] = pretrain if command == "pretrain" else finetune
        return judge_command(main, _by_yaml(random, options, command, scratch))
    drawn = [name for name, (_, commands) in OPTIONS.items() if command in commands.split() and name != "help"]
    odd: list[str] = []
    for name in random.sample(drawn, random.choice((1, 1, 1, 2, 3))):
        options.pop(name, None)
        odd += _words(random, name, _value(random, name))
    words = [f"--{name}={value}" for name, value in options.items()]
    random.shuffle(odd)
    # A number of steps that is drawn is huge as often as not: epochs end the run, or steps do.
    if "trainer.epochs" not in options and "trainer.max_steps" not in options and command in ("pretrain", "finetune"):
        odd.append("--trainer.max_steps=1")
    return judge_command(spatspark, [command, *words, *odd])


def _filled(value: Any, names: dict[str, Path]) -> Any:
    return value.format(**names) if isinstance(value, str) else value


def _odd_files(scratch: Path) -> None:
    """Make entries of a folder that a path can name, and that are no files of ours."""
    (scratch / "folder").mkdir()
    (scratch / "text").write_text("no radar here\n")
    (scratch / "nothing").write_bytes(b"")
    (scratch / "loop").symlink_to("loop")
    (scratch / "link").symlink_to("no/such/file")
    for name in ("yaml.yaml", "x.h5", "x.ckpt", "x.safetensors"):
        (scratch / name).write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99))


ODD_PATHS = [
    *("folder", "text", "nothing", "loop", "link", "yaml.yaml", "x.h5", "x.ckpt", "x.safetensors", "no/such", "text/x"),
    *("", ".", "a\0b", "é💧", "\ud800", "x" * 300, "x/" * 3000, " ", "-", "loop/x", "null", "[]"),
]


def _values_of_types() -> dict[str, list[Any]]:
    """Return values of the right type for each option of a training: choices, numbers, true and false."""
    found: dict[str, list[Any]] = {}
    for config in (PretrainConfig, FinetuneConfig):
        for group, options in groups_of(config).items():
            for name, hint in get_type_hints(options).items():
                choices: list[Any] = [choice for choice in get_args(hint) if isinstance(choice, str)]
                found[f"{group}.{name}"] = choices or TYPED.get(next(iter(get_args(hint)), hint), [])
    return {name: values for name, values in found.items() if values}


INTS = [-1, 0, 1, 2, 3, 4, 7, 8, 16, 32, 33, 64, 96, 2**31, 2**63, 10**30]
FLOATS = [-0.1, 0.0, 1e-9, 0.01, 0.1, 0.3, 0.5, 0.9, 0.99, 1.0, 2.0, 47.83, 1e9, 1e300, float("inf"), float("nan")]
TYPED: dict[Any, list[Any]] = {int: INTS, float: FLOATS, bool: ["true", "false"]}
OF_TYPES = {
    **_values_of_types(),
    **dict.fromkeys(("stride", "steps", "tile", "max_windows", "fss_scales"), INTS),
    **dict.fromkeys(
        ("interval_minutes", "wet_fraction", "wet_threshold", "min_valid", "scale", "test_fraction"), FLOATS
    ),
    **dict.fromkeys(("thresholds", "mask.ratios"), FLOATS),
    **{"start": ["every", "newest", "2020-06-01T12:25"], "region": ["observed", "common"]},
    **{"wet_rule": ["target-mean", "target-last", "frame-after"], "crop": ["0:40,0:32", "0:0,0:1", "9:8,0:9"]},
}


def _value(random: Random, name: str) -> Any:
    if name in ASKED:
        return random.choice(ASKED[name])
    if name in OF_TYPES and random.random() < 0.7:
        return random.choice(OF_TYPES[name])
    if name in PATHS:
        return random.choice(ODD_PATHS)
    return random.choice(random.choice((NUMBERS, NUMBERS, STRINGS)))


def _words(random: Random, name: str, value: Any) -> list[str]:
    """Spell an option on a command line, at times as nobody should."""
    spelled = name.replace("_", "-") if random.random() < 0.3 else name
    match random.randrange(12):
        case 0:
            return [f"--{spelled}", str(value)]
        case 1:
            return [f"--{spelled}"]
        case 2:
            return [f"--{spelled}={value}", f"--{spelled}={value}"]
        case 3:
            return [f"--{spelled}.x={value}"]
        case 4:
            return [f"--{spelled}+={value}", str(value)]
        case _:
            return [f"--{spelled}={value}"]


def _by_yaml(random: Random, options: dict[str, Any], command: str, scratch: Path) -> list[str]:
    """Write the options as a YAML file, change it, and return the words that use it."""
    out = options.pop("out")
    tree: dict[Any, Any] = {}
    for name, value in options.items():
        group, _, leaf = name.partition(".")
        tree.setdefault(group, {})[leaf] = {"true": True, "false": False}.get(value, value)
    drawn = [name for name, (_, names) in OPTIONS.items() if command in names.split() and "." in name]
    for _ in range(random.choice((1, 1, 2, 3))):
        name = random.choice(drawn)
        group, _, leaf = name.partition(".")
        match random.randrange(6):
            case 0:
                tree[group] = random.choice(VALUES)
            case 1:
                tree[random.choice(("x", 1, None, "", "trainer.seed"))] = random.choice(VALUES)
            case _ if isinstance(tree.get(group, {}), dict):
                value = _value(random, name) if name in ASKED or random.random() < 0.3 else random.choice(VALUES)
                tree.setdefault(group, {})[leaf] = value
    words = [f"--config={scratch / 'options.yaml'}", f"--out={out}", "--trainer.max_steps=1"]
    text = yaml.safe_dump(_plain(tree), allow_unicode=True).encode(errors="surrogatepass")
    if random.random() < 0.3:  # what is lost is small on the command line, too
        text = damaged(random, text)
        words += [f"--{name}={value}" for name, value in options.items()]
    (scratch / "options.yaml").write_bytes(text)
    return words


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return list(value) if isinstance(value, tuple) else value


SUITE = Suite(prepare, attempt)
