"""The seven commands from outside: one program lists them, runs them, and says so in their usage lines."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import spatspark_fast
from spatspark_fast import __version__
from spatspark_fast.__main__ import COMMANDS, main
from tests.options import OPTIONS
from tests.refusals import refusal

PACKAGE = Path(spatspark_fast.__file__).parent
ROOT = Path(__file__).parents[1]


def test_every_folder_that_can_be_run_is_a_command() -> None:
    assert set(COMMANDS) == {path.parent.name for path in PACKAGE.glob("*/__main__.py")}


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_all_commands_are_listed_with_a_line_each(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, about in COMMANDS.items():
        assert [line.split(maxsplit=1) for line in lines if line.startswith(f"  {name} ")] == [[name, about]]


def test_neither_the_list_nor_help_waits_for_heavy_imports() -> None:
    code = (
        "import contextlib, sys; from spatspark_fast.__main__ import COMMANDS, main\n"
        "assert main([]) == 0\n"
        "heavy = {'torch', 'numpy', 'jsonargparse', 'matplotlib'} & set(sys.modules); assert not heavy, heavy\n"
        "for name in COMMANDS:\n"
        "    with contextlib.suppress(SystemExit): main([name, '--help'])\n"
        "    heavy = {'torch', 'matplotlib'} & set(sys.modules); assert not heavy, (name, heavy)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120, stdout=subprocess.DEVNULL)


def test_an_unknown_command_is_refused_with_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, main, ["pretain"])
    assert "'pretain'" in said
    assert ", ".join(COMMANDS) in said


def test_a_command_gets_its_words_and_its_exit_code_comes_back(capsys: pytest.CaptureFixture[str]) -> None:
    assert "data.path" in refusal(capsys, main, ["evaluate", "--out", "nowhere"])
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"spatspark-fast {__version__}\n"


@pytest.mark.parametrize(
    ("started", "shown"),
    [
        ("/usr/bin/spatspark", "spatspark {}"),
        (str(PACKAGE / "__main__.py"), "python -m spatspark_fast {}"),
        (str(PACKAGE / "info" / "__main__.py"), "python -m spatspark_fast.{}"),
    ],
)
@pytest.mark.parametrize("name", COMMANDS)
def test_usage_shows_what_was_typed(
    name: str, started: str, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [started])
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert re.match(rf"usage: {re.escape(shown.format(name))}\s", capsys.readouterr().out)


def test_what_the_package_offers_is_there() -> None:
    assert all(getattr(spatspark_fast, name) is not None for name in spatspark_fast.__all__)
    with pytest.raises(AttributeError, match="forcast"):
        _ = spatspark_fast.forcast  # pyright: ignore[reportAttributeAccessIssue]


def shown_options(name: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Return the names of the options that ``--help`` shows, without those that read a file for a whole group."""
    with pytest.raises(SystemExit):
        main([name, "--help"])
    names = re.findall(r"^  (?:-h, )?--([^\s,=]+)", capsys.readouterr().out, flags=re.MULTILINE)
    groups = {option.split(".")[0] for option in names if "." in option}
    return set(names) - groups


@pytest.mark.parametrize("name", COMMANDS)
def test_options_are_those_of_the_table(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown_options(name, capsys) == {option for option, (_, names) in OPTIONS.items() if name in names.split()}


def test_no_meaning_has_two_names() -> None:
    meanings = [meaning for meaning, _ in OPTIONS.values()]
    assert sorted(meanings) == sorted(set(meanings))
    assert not [option for option in OPTIONS if "-" in option]


@pytest.mark.parametrize("name", COMMANDS)
def test_hyphens_are_taken_for_underscores(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for option in sorted(shown_options(name, capsys) - {"print_config"}):
        words = [f"--{option}=nonsense", "--no-such-option=1"]
        said = refusal(capsys, main, [name, *words])
        if "_" in option:
            words[0] = words[0].replace("_", "-")
            assert refusal(capsys, main, [name, *words]) == said


@pytest.mark.parametrize("page", sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("**/*.md")))
def test_pages_call_commands_by_options_that_exist(page: str) -> None:
    pattern = rf"(?:spatspark |spatspark_fast\.)({'|'.join(COMMANDS)})\b((?:[^`\n\\]|\\\n)*)"
    for name, words in re.findall(pattern, (ROOT / page).read_text()):
        used = re.findall(r"(?<!\S)--([a-z][\w.-]*)", words.split("#")[0])
        unknown = [option for option in used if name not in OPTIONS.get(option, ("", ""))[1].split()]
        assert not unknown, f"{page}: {name} has no {unknown}"
