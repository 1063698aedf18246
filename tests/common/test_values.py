"""What no option can be is refused whatever it means; YAML that is a trap is refused in no time."""

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from spatspark_fast.common.errors import UserError
from spatspark_fast.common.values import check_value, legible, load_options
from spatspark_fast.finetune.__main__ import main as finetune
from spatspark_fast.pretrain.__main__ import main as pretrain

from ..refusals import refusal

LAUGHS = "a: &a [1, 1]\n" + "\n".join(f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]" for a, b in pairwise("abcdefghijklmno"))
YAML: dict[str, tuple[str, str]] = {
    "laughs": (LAUGHS, "more than 10000 values"),
    "itself": ("data: &a {b: *a}", "more than 10000 values"),
    "many": ("data: [" + "1," * 11_000 + "1]", "more than 10000 values"),
    "large": ("# " + "x" * (1 << 18), "larger than any file of options"),
    "deep": ("data: " + "[" * 1500, "nested too deeply"),
    "duplicate": ("data: {batch_size: 2, batch_size: 3}", "'batch_size' stands there twice"),
    "duplicate group": ("data: {batch_size: 2}\ndata: {crop: 32}", "'data' stands there twice"),
    "python": ("data: !!python/object/apply:os.system ['true']", "not YAML"),
    "python name": ("data: {path: !!python/name:os.system }", "not YAML"),
    "tag": ("data: !!int x", "not YAML"),
    "digits": ("data: {batch_size: " + "9" * 5000 + "}", "not YAML"),
    "unclosed": ("data: [1, 2", "not YAML"),
    "nul": ("data: {path: 'a\0b'}", "not YAML"),
    "escaped nul": ('data: {path: "a\\0b"}', "control characters"),
    "documents": ("data: {}\n---\ndata: {}", "not YAML"),
    "list": ("- data", "holds no options"),
    "nothing": ("", "holds no options"),
    "number": ("data: 3", "--data is 3: it is a group"),
    "null": ("data: null", "--data is None: it is a group"),
    "list for a group": ("data: [batch_size]", "it is a group"),
    "nan": ("optim: {base_lr: .nan}", "give a finite number"),
    "infinite": ("optim: {clip: .inf}", "give a finite number"),
    "list for a number": ("data: {batch_size: [2]}", "batch_size"),
    "unknown group": ("colour: {red: 1}", "colour"),
    "number for a name": ("3: {red: 1}", "3"),
    "date": ("data: {batch_size: 2020-01-01}", "batch_size"),
    "set": ("data: {path: !!set {a}}", "path"),
}


@pytest.mark.parametrize("case", YAML)
@pytest.mark.parametrize("command", [pretrain, finetune], ids=["pretrain", "finetune"])
def test_traps_in_yaml_are_refused_at_once(
    case: str, command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, words = YAML[case]
    path = tmp_path / "options.yaml"
    path.write_text(text)
    started = time.process_time()
    assert words in refusal(capsys, command, [f"--config={path}", f"--out={tmp_path / 'run'}"])
    assert time.process_time() - started < 20
    assert [item.name for item in tmp_path.iterdir()] == ["options.yaml"]


def test_anchors_of_honest_size_are_read() -> None:
    text = "data: &usual {batch_size: 2, crop: 32}\nmodel: {<<: *usual, patch: 32}"
    assert load_options(text, "x")["model"] == {"batch_size": 2, "crop": 32, "patch": 32}


@pytest.mark.parametrize(
    "value", [float("nan"), float("-inf"), 2**63, -(10**30), "a\0", "\x1b[31m", "\ud800", "x" * 256]
)
@pytest.mark.parametrize("nested", [lambda value: value, lambda value: [1, value], lambda value: {"a": (value,)}])
def test_values_that_no_option_can_be(value: Any, nested: Any) -> None:
    with pytest.raises(UserError, match=r"^--group\.name is "):
        check_value("group.name", nested(value))


@pytest.mark.parametrize(
    "value", [None, True, 0, -1, 2**63 - 1, 1e308, "", "a b", "é/\u0664", "x" * 255, [], {"a": [1]}]
)
def test_values_that_an_option_may_be(value: Any) -> None:
    check_value("group.name", value)


def test_messages_are_one_line_that_a_terminal_shows_as_it_is() -> None:
    assert legible("a\n b\x1b[31m\ud800 \u00e9") == "a b\\x1b[31m\\ud800 \u00e9"
    assert legible("x" * 5000) == "x" * 40 + "..." + "x" * 20
    assert len(legible("word " * 5000)) < 1600
