"""Reads C++ without a compiler: the bodies of functions and classes, and the files that a file includes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .source import CPP, ROOT, files, short

_NOISE = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'', re.DOTALL)
_DIRECTIVE = re.compile(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", re.MULTILINE)
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.MULTILINE)
_TEMPLATE = re.compile(r"^\s*template\s*<[^{};]*?>\s*(?=[\w\[:])")
_IN_INITIALISER_LIST = re.compile(r"\)\s*(?:noexcept\s*)?:(?!:)(?:.*[^:])?\b\w+\s*$", re.DOTALL)
_TYPE = re.compile(r"\b(?:class|struct|union|enum)\b[^();]*?(\w+)\s*(?:final\s*)?(?::(?!:)[^()]*)?$")


@dataclass(frozen=True)
class Body:
    """One braced body: a ``function`` or a ``class``, how many lines it has, and whether it lies in a class."""

    kind: str
    name: str
    lines: int
    member: bool
    text: str


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])


def code_of(text: str) -> str:
    """Return C++ text with comments, strings and preprocessor lines blanked; every line keeps its place."""
    return _DIRECTIVE.sub(_blank, _NOISE.sub(_blank, text))


def includes(path: Path) -> list[str]:
    """Return the names in quotes that a file includes."""
    return _INCLUDE.findall(path.read_text())


def _kind_and_name(header: str) -> tuple[str, str]:
    """Say what a brace opens, from the text between the end of the last statement and the brace."""
    if re.search(r"\bnamespace\b", header) or header.split() == ["extern"]:
        return "namespace", ""
    bare = _TEMPLATE.sub("", header).strip()
    if (found := _TYPE.search(bare)) and "(" not in re.sub(r"(alignas|__attribute__)\s*\(.*?\)+", "", bare):
        return "class", found[1]
    if _IN_INITIALISER_LIST.search(bare):
        return "initialiser", ""
    if "(" in bare and not bare.endswith("="):
        names = re.findall(r"(operator\s*[^\s\w]+|[\w~]+(?:::[\w~]+)*)\s*\(", bare)
        return "function", names[0] if names else "a lambda"
    return "other", ""


def bodies(text: str) -> Iterator[Body]:
    """Yield the bodies at namespace and class level; what stands inside of a function counts to the function."""
    code, start = code_of(text), 0
    outer: list[tuple[str, str, int]] = []
    inner, depth = ("", "", 0), 0  # the function or initialiser that is being passed over
    for place, letter in enumerate(code):
        if depth:
            depth += (letter == "{") - (letter == "}")
            if depth == 0:
                yield from _closed(*inner, code, place, any(kind == "class" for kind, _, _ in outer))
                start = start if inner[0] == "initialiser" else place + 1
        elif letter == "{":
            header = code[start:place]
            kind, name = _kind_and_name(header)
            opened = (kind, name, start + len(header) - len(header.lstrip()))
            if kind in ("namespace", "class"):
                outer.append(opened)
                start = place + 1
            else:
                inner, depth = opened, 1
        elif letter in "};":
            if letter == "}" and outer:
                yield from _closed(*outer.pop(), code, place, False)
            start = place + 1


def _closed(kind: str, name: str, first: int, code: str, last: int, member: bool) -> Iterator[Body]:
    if kind in ("function", "class"):
        text = code[first : last + 1]
        yield Body(kind, name, text.count("\n") + 1, member, text)


INTERFACE = "csrc/engine.h"  # what the library offers: the ground of all, while `engine.cpp` is the roof


def component(name: str) -> str:
    """Return the name that a header and its source file share: the path without its suffix."""
    return name if name == INTERFACE else name.rpartition(".")[0]


def include_graph() -> dict[str, set[str]]:
    """Return for every C++ file of ``csrc`` those that it includes, as paths below the project's root."""
    graph: dict[str, set[str]] = {}
    for path in files(*CPP):
        if short(path).startswith("csrc/"):
            places = [(path.parent / found, ROOT / "csrc" / found) for found in includes(path)]
            graph[short(path)] = {short(place.resolve()) for pair in places for place in pair if place.is_file()}
    return graph


def _headers_of(name: str, graph: dict[str, set[str]]) -> set[str]:
    seen, todo = {name}, [name]
    while todo:
        new = graph[todo.pop()] - seen
        seen |= new
        todo.extend(new)
    return {header for header in seen if header.endswith(".h")}


def component_graph() -> dict[str, set[str]]:
    """Return for every component of ``csrc`` those it includes and those whose functions it calls.

    A call counts if one component alone has a body of that name, and an included header declares it.
    """
    included = include_graph()
    code = {name: code_of((ROOT / name).read_text()) for name in included}
    functions = {name: [b for b in bodies(text) if b.kind == "function"] for name, text in code.items()}
    homes: dict[str, set[str]] = defaultdict(set)
    for name, found in functions.items():
        for body in found:
            if not body.member:
                homes[body.name].add(component(name))
    graph: dict[str, set[str]] = {component(name): set() for name in included}
    for name, found in functions.items():
        others = graph[component(name)]
        others |= {component(other) for other in included[name]}
        declared = "\n".join(code[header] for header in _headers_of(name, included))
        for called in {word for body in found for word in re.findall(r"(?<![\w.>])(\w+)\s*\(", body.text)}:
            if len(homes.get(called, ())) == 1 and re.search(rf"\b{called}\s*\(", declared):
                others |= homes[called]
    return {name: others - {name} for name, others in graph.items()}
