"""The project's own files, and what is to be read from a Python file or a shell script."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("kernels", "spatspark_fast", "csrc", "benchmarks", "tests", "scripts", "docs")
CPP = (".cpp", ".cc", ".h", ".hpp", ".inl", ".inc", ".cu", ".cuh")
CODE = (".py", ".sh", *CPP)
NOT_OURS = {"__pycache__", "results", "build"}


def short(path: Path) -> str:
    """Return the path below the project's root."""
    return path.relative_to(ROOT).as_posix()


@cache
def files(*suffixes: str) -> tuple[Path, ...]:
    """Return the project's files with one of these suffixes: those at the top and those in its folders."""
    below = [path for top in FOLDERS for path in (ROOT / top).rglob("*")]
    found = [*ROOT.glob("*"), *(ROOT / ".ci").glob("*"), *below]
    return tuple(sorted(p for p in found if p.is_file() and p.suffix in suffixes and not NOT_OURS & set(p.parts)))


def folders() -> list[Path]:
    """Return the folders that hold code, each once."""
    return sorted({path.parent for path in files(*CODE)} - {ROOT})


@cache
def tree(path: Path) -> ast.Module:
    """Return the syntax tree of a Python file."""
    return ast.parse(path.read_text())


def python_bodies(path: Path) -> Iterator[tuple[str, str, int]]:
    """Yield ``("function" or "class", name, lines)`` of a Python file."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            yield kind, node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def shell_bodies(path: Path) -> Iterator[tuple[str, str, int]]:
    """Yield ``("function", name, lines)`` of a shell script whose functions end with a brace in the first column."""
    name, start = None, 0
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if name is None and (head := re.match(r"(?:function\s+)?([\w-]+)\s*\(\)\s*\{", line)):
            name, start = head[1], number
        if name is not None and (line.startswith("}") or re.search(r"\}\s*$", line)):
            yield "function", name, number - start + 1
            name = None
