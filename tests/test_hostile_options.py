"""Every option of every command with values that nobody should have to expect: read, or refused in one sentence.

The options come from the parsers themselves. Command lines are read and checked in this process; nothing is trained.
"""

import argparse
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from spatspark_fast.common.cli import run_command
from spatspark_fast.evaluate.__main__ import _parser as evaluate_parser
from spatspark_fast.evaluate.__main__ import evaluate
from spatspark_fast.experiments.__main__ import _parser as experiments_parser
from spatspark_fast.experiments.__main__ import experiments
from spatspark_fast.finetune.cli import COMMAND as FINETUNE
from spatspark_fast.forecast.__main__ import _parser as forecast_parser
from spatspark_fast.forecast.__main__ import forecast
from spatspark_fast.info.__main__ import _parser as info_parser
from spatspark_fast.info.__main__ import check as check_info
from spatspark_fast.prepare.__main__ import _parser as prepare_parser
from spatspark_fast.prepare.__main__ import parse as parse_prepare
from spatspark_fast.prepare.__main__ import plan_of
from spatspark_fast.pretrain.cli import COMMAND as PRETRAIN
from spatspark_fast.training.command import TrainingCommand, parse_training, training_parser

HOSTILE = [
    *("", " ", "x", "\0", "a\0b", "\ud800", "\u0664\u0662", "\uff11", "x" * 300, "x" * 6000),
    *("/".join(["y" * 200] * 40), "0", "-1", "1.5", "1_000", "0x10", "1e3", "007", "+1", "--", "-", "1,2", "1 2"),
    *(str(2**31), str(2**63), str(2**64), "1" + "0" * 30, "-1" + "0" * 30, "9" * 5000, "1e400", "-1e400", "1e308"),
    *("nan", ".nan", "inf", ".inf", "-.inf", "Infinity", "true", "True", "yes", "on", "no", "null", "None", "~"),
    *("[]", "{}", "[1, 2]", "{a: 1}", "[[1]]", "[1", "{a", "a: b: c", "!!python/object/apply:os.system ['true']"),
    *("!!python/name:os.system", "!!int x", "!!float x", "!!binary x", "!!set {a}", "&a [*a, *a]", "*a", "2020-01-01"),
    *("2020-13-45", "${HOME}", "$(true)", "%s%n", "../../../etc/passwd", "/dev/null", "[" * 2000, "{a: " * 500, "'"),
    *('"', "`", "\\", "\n", "a\nb", "\r", "\x1b[31m", "\t", "@", "#", "# c", "|", ">", "?", "!", "10000000", "3000"),
]


def trained(command: TrainingCommand) -> Callable[[list[str]], None]:
    """Return what reads the options of a training."""
    return lambda argv: void(parse_training(command, argv))


def void(_: object) -> None:
    """Take what is read; its values do not matter here."""


def read_info(argv: list[str]) -> None:
    check_info(info_parser().parse_args(argv))


def read_prepare(argv: list[str]) -> None:
    options = parse_prepare(argv)
    if options.merge is None:
        plan_of(options)


NO_FILES = ["--data.path=/no/such.h5", "--out=/no/such/folder"]
# What makes the parser, what reads a command line, and what stands on it besides. Those that are whole commands end at
# files that are not there.
COMMANDS: dict[str, tuple[Callable[[], argparse.ArgumentParser], Callable[[list[str]], object], list[str]]] = {
    "prepare": (prepare_parser, read_prepare, ["--source=knmi", "--data.path=/no/such", "--out=/no/such/file.h5"]),
    "pretrain": (lambda: training_parser(PRETRAIN), trained(PRETRAIN), []),
    "finetune": (lambda: training_parser(FINETUNE), trained(FINETUNE), []),
    "evaluate": (evaluate_parser, evaluate, NO_FILES),
    "forecast": (forecast_parser, forecast, [*NO_FILES, "--checkpoint=/no/such.ckpt"]),
    "experiments": (experiments_parser, experiments, NO_FILES),
    "info": (info_parser, read_info, []),
}


def options_of(name: str) -> list[str]:
    """Return the options of a command as its parser has them, and its groups."""
    found = {word for action in COMMANDS[name][0]()._actions for word in action.option_strings if word[:2] == "--"}
    groups = {word.split(".")[0] for word in found if "." in word}
    return sorted((found | groups) - {"--help", "--print_config", "--version"})


def values_for(number: int, share: int) -> list[str]:
    """Return the values that the option with a number gets: one in ``share``, other ones than its neighbours."""
    return HOSTILE[number % share :: share]


@pytest.mark.parametrize("share", [45, pytest.param(5, marks=pytest.mark.rest)])
@pytest.mark.parametrize("name", COMMANDS)
def test_hostile_values_are_read_or_refused_in_one_sentence(
    name: str, share: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _, read, given = COMMANDS[name]
    wrong, outcomes = [], Counter[int]()
    for number, option in enumerate(options_of(name)):
        others = [word for word in given if not word.startswith(f"{option}=")]
        for value in values_for(number, share):
            case = f"{option}={value[:40]!r}"
            try:
                code = run_command(lambda argv: void(read(argv)), [*others, f"{option}={value}"])
            except Exception as error:
                wrong.append(f"{case}: {error!r}"[:300])
                continue
            said = capsys.readouterr().err
            outcomes[code] += 1
            one = said.startswith("spatspark-fast: error: ") and said.count("\n") == 1 and len(said) < 2000
            if code not in (0, 2) or one != (code == 2):
                wrong.append(f"{case}: {code}, {said[-300:]}")
    assert wrong == []
    assert outcomes[2] > 0, outcomes
    assert outcomes[0] > 0 or given == NO_FILES or name == "forecast", outcomes
    assert list(tmp_path.iterdir()) == []
