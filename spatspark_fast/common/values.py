"""What no option of any command can be, whatever it means; and YAML of a size and shape that options can have."""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import yaml

from spatspark_fast.common.errors import UserError

__all__ = ["check_value", "legible", "load_options"]

LONG_WORD, LONG_TEXT = 300, 1500  # characters of a message that are shown whole
LONGEST_PATH, LONGEST_NAME = 4095, 255  # bytes, as file systems have it
LARGEST = 2**63 - 1
MOST_BYTES, MOST_VALUES = 1 << 18, 10_000  # of a YAML file


def check_value(option: str, value: object) -> None:
    """Raise `UserError` if a value is a number or a text that no option can be, or holds one."""
    found = next(_wrong(value), None)
    if found is not None:
        raise UserError(f"--{option} is {legible(str(value))[:LONG_WORD]}: {found}")


def _wrong(value: object) -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield "give a finite number"
    elif isinstance(value, int) and abs(value) > LARGEST:
        yield f"give a number of at most {LARGEST}"
    elif isinstance(value, str | Path):
        yield from _wrong_text(str(value))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _wrong(key)
            yield from _wrong(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _wrong(item)


def _wrong_text(text: str) -> Iterator[str]:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        yield "it is no text in UTF-8"
        return
    if any(unicodedata.category(letter) == "Cc" for letter in text):
        yield "leave out its control characters"
    elif size > LONGEST_PATH:
        yield f"give at most {LONGEST_PATH} bytes"
    elif any(len(part.encode()) > LONGEST_NAME for part in text.split(os.sep)):
        yield f"a name has at most {LONGEST_NAME} bytes"


def legible(text: str) -> str:
    """Return a text in one line, such that a terminal shows it as it is; the middle of long words is left out."""
    shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in " ".join(text.split()))
    words = [word if len(word) <= LONG_WORD else f"{word[:40]}...{word[-20:]}" for word in shown.split(" ")]
    line = " ".join(words)
    return line if len(line) <= LONG_TEXT else f"{line[: LONG_TEXT - 500]} ... {line[-400:]}"


class _Loader(yaml.SafeLoader):
    """Read plain values alone, and every key of a mapping once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """Return a mapping; raise `yaml.YAMLError` for a key that stands twice."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"{key!r} stands there twice")
        return super().construct_mapping(node, deep)


def load_options(text: str, name: str) -> dict[str, Any]:
    """Return the options of a YAML text, plain values by groups; raise `UserError` if it holds anything else.

    ``name`` is the file's. Aliases may repeat a value, but not make the whole larger than options can be.
    """
    if len(text) > MOST_BYTES:
        raise UserError(f"{name} is larger than any file of options ({MOST_BYTES >> 10} KiB)")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None and _size(node, {}) > MOST_VALUES:
            raise UserError(f"{name} holds more than {MOST_VALUES} values, by its aliases")
        content = None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError, OverflowError, TypeError) as error:
        raise error if isinstance(error, UserError) else UserError(f"{name} is not YAML: {error}") from error
    except RecursionError as error:
        raise UserError(f"{name} is not YAML of options: it is nested too deeply") from error
    if not isinstance(content, dict):
        raise UserError(f"{name} holds no options; expected groups such as 'data:' with values below them")
    return content


def _size(node: yaml.Node, known: dict[int, float]) -> float:
    """Return how many values a node holds when its aliases are written out; infinite if it holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        flat = [item for pair in parts for item in pair] if isinstance(node, yaml.MappingNode) else parts
        known[id(node)] = 1 + sum(_size(part, known) for part in flat)
    return known[id(node)]
