"""The rules of the house: each returns what breaks it, one line for each fault, sorted.

``python -m tests.structure.rules`` prints all."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from fnmatch import fnmatch

from . import cpp
from .imports import circles, everything_imported, graph, module_name
from .layers import COMMANDS, CPP_LAYERS, KERNEL_LAYERS, LAYERS, NO_COMMANDS
from .source import CODE, CPP, files, folders, python_bodies, shell_bodies, short

FILE_LINES, FUNCTION_LINES, COLUMNS = 350, 60, 120
CLASS_LINES = {"C++": 60, "Python": 200}  # half of a Python class is docstrings
Layers = tuple[tuple[str, ...], ...]
_TARGET = re.compile(r"\]\([^)\s]*\)|<?https?://\S+|<(?:img|a)\b[^>]*>")


def _lies_in(name: str, room: str) -> bool:
    if room.startswith("="):
        return name == room[1:]
    return fnmatch(name, room) if "*" in room else name == room or name.startswith((room + ".", room + "/"))


def _place(name: str, layers: Layers) -> tuple[int, str] | None:
    """Return the number of the layer and the room of a name; a room with ``=`` goes before the others."""
    found = [(i, room) for i, rooms in enumerate(layers) for room in rooms if _lies_in(name, room)]
    return min(found, key=lambda place: not place[1].startswith("="), default=None)


def _against(edges: Iterable[tuple[str, str]], layers: Layers, verb: str) -> list[str]:
    """Return the edges that lead up, or from one room of a layer into another."""
    faults = set()
    for name, other in edges:
        own, theirs = _place(name, layers), _place(other, layers)
        if own is None:
            faults.add(f"{re.split('[/.]', name)[0]} has files without a place in the order")
        elif theirs is not None and own != theirs and theirs[0] >= own[0]:
            faults.add(f"{name} {verb} {other}")
    return sorted(faults)


def _edges(edges: dict[str, set[str]]) -> list[tuple[str, str]]:
    return [(name, other) for name, others in edges.items() for other in others or {name}]


def imports_against_the_order() -> list[str]:
    """Imports lead down the layers and never from one room of a layer into another."""
    return _against(_edges(graph()), LAYERS, "imports")


def imports_against_the_order_of_the_kernels() -> list[str]:
    """The same within `patchsparse`."""
    own = {name: others for name, others in graph().items() if name.split(".")[0] == "patchsparse"}
    return _against(_edges(own), KERNEL_LAYERS, "imports")


def includes_against_the_order() -> list[str]:
    """The same for the folders of `csrc`."""
    return _against(_edges(cpp.include_graph()), CPP_LAYERS, "includes")


def circles_of_imports() -> list[str]:
    """No module imports itself through others; a late import counts."""
    return [" <-> ".join(group) for group in circles(graph())]


def circles_of_includes() -> list[str]:
    """No C++ file includes itself through others, and no two need each other's functions."""
    return [" <-> ".join(group) for group in circles(cpp.include_graph()) + circles(cpp.component_graph())]


def registration_outside_of_ops() -> list[str]:
    """Only `patchsparse/ops` touches `torch.library`."""
    return sorted(
        f"{name} imports {imported}"
        for name, others in everything_imported().items()
        for imported in others
        if imported.startswith("torch.library") and not name.startswith(("patchsparse.ops.", "tests."))
    )


def long_files() -> list[str]:
    """No file of code is longer than 350 lines."""
    return [f"{short(p)} is too long" for p in files(*CODE) if len(p.read_text().splitlines()) > FILE_LINES]


def long_bodies() -> list[str]:
    """No function and no C++ class is longer than 60 lines, no Python class longer than 200."""
    faults = []
    for path in files(*CODE):
        if path.suffix in CPP:
            found = [(body.kind, body.name, body.lines) for body in cpp.bodies(path.read_text())]
        else:
            found = list((python_bodies if path.suffix == ".py" else shell_bodies)(path))
        caps = {"function": FUNCTION_LINES, "class": CLASS_LINES["C++" if path.suffix in CPP else "Python"]}
        faults += [f"{short(path)}: {kind} {name} is too long" for kind, name, lines in found if lines > caps[kind]]
    return sorted(faults)


def wide_lines() -> list[str]:
    """No line of C++, Markdown or shell is wider than 120; rows of tables and targets of links do not count."""
    faults: dict[str, int] = defaultdict(int)
    for path in files(".md", ".sh", *CPP):
        for line in path.read_text().splitlines():
            if path.suffix == ".md" and (line.lstrip().startswith("|") or len(_TARGET.sub("", line)) <= COLUMNS):
                continue
            faults[short(path)] += len(line) > COLUMNS
    return [f"{name} has lines wider than 120" for name, count in sorted(faults.items()) if count]


def _plurals(word: str) -> set[str]:
    return {word + "s", word + "es", *([word[:-1] + "ies"] if word.endswith("y") else [])}


def singular_and_plural() -> list[str]:
    """No folder holds two files, or a file and a folder, whose names are singular and plural of one word."""
    faults = set()
    for folder in folders():
        names = {path.stem for path in folder.iterdir() if path.suffix in ("", *CODE)}
        faults |= {f"{short(folder)}: {one} and {two}" for one in names for two in _plurals(one) & names}
    return sorted(faults)


def shared_folders_that_name_a_command() -> list[str]:
    """No line of `common` and `training` names one of the commands that use them."""
    words = "|".join(COMMANDS)
    pattern = re.compile(rf"spatspark(?:_fast)?[ .](?:{words})\b|\.\.(?:{words})\b|\b(?:pretrain|finetune)\b")
    shared = [path for path in files(".py") if module_name(short(path)).startswith(NO_COMMANDS)]
    return sorted({f"{short(path)} names {word}" for path in shared for word in pattern.findall(path.read_text())})


def folders_of_tests_without_init() -> list[str]:
    """Every folder of tests has an `__init__.py`, so that files of one name do not collide."""
    tests = {path.parent for path in files(".py") if short(path).startswith("tests/")}
    return sorted(short(folder) for folder in tests if not (folder / "__init__.py").exists())


RULES: dict[str, Callable[[], list[str]]] = {
    rule.__name__: rule
    for rule in (
        imports_against_the_order,
        imports_against_the_order_of_the_kernels,
        includes_against_the_order,
        circles_of_imports,
        circles_of_includes,
        registration_outside_of_ops,
        long_files,
        long_bodies,
        wide_lines,
        singular_and_plural,
        shared_folders_that_name_a_command,
        folders_of_tests_without_init,
    )
}


def main() -> None:
    """Print every rule and what breaks it."""
    for name, rule in RULES.items():
        faults = rule()
        print(f"{name}: {len(faults)}", *faults, sep="\n    ")  # noqa: T201


if __name__ == "__main__":
    main()
