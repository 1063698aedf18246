"""Who imports whom: every import counts, also inside of functions, under ``TYPE_CHECKING``, and by name.

The names of a package that its ``__getattr__`` imports on first use are a node of their own, ``package.__getattr__``:
importing the package does not import them, and whoever asks for such a name depends on that node.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterable, Mapping
from functools import cache

from .source import ROOT, files, short, tree

PACKAGES = ("patchsparse", "spatspark_fast", "benchmarks", "scripts", "tests")
LAZY = "__getattr__"
Graph = dict[str, set[str]]


def module_name(path: str) -> str:
    """Return the dotted name of a file, given below the project's root; a package bears the name of its folder."""
    return path.removesuffix(".py").removesuffix("/__init__").removeprefix("kernels/").replace("/", ".")


@cache
def modules() -> dict[str, str]:
    """Return the path of every Python module of the project by its dotted name."""
    named = {module_name(short(path)): short(path) for path in files(".py")}
    return {name: path for name, path in named.items() if name.split(".")[0] in PACKAGES}


@cache
def names_of(module: str) -> frozenset[str]:
    """Return the names that a module defines or imports at its top, without what its ``__getattr__`` gives."""
    found = set()
    for node in tree(ROOT / modules()[module]).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return frozenset(found)


def _absolute(node: ast.ImportFrom, module: str) -> str:
    """Return the absolute name of what stands between ``from`` and ``import``."""
    package = module.split(".") if modules()[module].endswith("__init__.py") else module.split(".")[:-1]
    base = package[: len(package) + 1 - node.level] if node.level else []
    return ".".join([*base, *([node.module] if node.module else [])])


def _by_name(call: ast.Call, module: str) -> set[str]:
    """Return the modules that ``import_module`` may mean; a value put into the name stands for any one part of it."""
    function = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if function not in ("import_module", "__import__", "run_module") or not call.args:
        return set()
    parts = call.args[0].values if isinstance(call.args[0], ast.JoinedStr) else [call.args[0]]
    if not any(isinstance(part, ast.Constant) for part in parts):
        return set()
    pattern = ""
    for part in parts:
        if isinstance(part, ast.Constant):
            pattern += re.escape(str(part.value))
        else:
            pattern += re.escape(module) if "__name__" in ast.unparse(part) else r"[^.]+"
    if pattern.startswith(r"\."):
        pattern = re.escape(module.rpartition(".")[0]) + pattern
    return {name for name in modules() if re.fullmatch(pattern, name)}


@cache
def operators() -> dict[str, str]:
    """Return the module that registers each operator ``torch.ops.patchsparse.NAME``."""
    found = {}
    for module, path in modules().items():
        if module.startswith("patchsparse."):
            found |= dict.fromkeys(re.findall(r'"patchsparse::(\w+)"', (ROOT / path).read_text()), module)
    return found


def imports_of(node: ast.AST, module: str) -> set[str]:
    """Return what one statement or expression imports: modules of the project, and the roots of all others."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        base, found = _absolute(node, module), set()
        for name in (alias.name for alias in node.names):
            if f"{base}.{name}" in modules():
                found.add(f"{base}.{name}")
            elif base in modules() and LAZY in names_of(base) and name not in names_of(base):
                found.add(f"{base}.{LAZY}")
            else:
                found.add(base)
        return found
    if isinstance(node, ast.Call):
        return _by_name(node, module)
    if isinstance(node, ast.Attribute) and node.attr in operators():
        return {operators()[node.attr]} if ast.unparse(node.value) == "torch.ops.patchsparse" else set()
    return set()


def _is_lazy(node: ast.stmt) -> bool:
    """Tell a module's ``__getattr__`` and what stands beside it for type checkers."""
    if isinstance(node, ast.FunctionDef):
        return node.name == LAZY
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


@cache
def everything_imported() -> Graph:
    """Return for every module of the project all that it imports."""
    graph: Graph = {}
    for module, path in modules().items():
        lazy = LAZY in names_of(module)
        for statement in tree(ROOT / path).body:
            own = f"{module}.{LAZY}" if lazy and _is_lazy(statement) else module
            found = {name for node in ast.walk(statement) for name in imports_of(node, module)}
            graph.setdefault(own, set()).update(found - {own})
        graph.setdefault(module, set())
    return graph


@cache
def graph() -> Graph:
    """Return for every module of the project those of the project that it imports."""
    whole = everything_imported()
    return {name: imported & set(whole) for name, imported in whole.items()}


def circles(edges: Mapping[str, Iterable[str]], names: Collection[str] | None = None) -> list[list[str]]:
    """Return the groups of nodes, sorted, each of which reaches every other of its group."""
    allowed = set(edges) if names is None else set(names)

    def reached(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            for following in edges.get(todo.pop(), ()):
                if following in allowed and following not in seen:
                    seen.add(following)
                    todo.append(following)
        return seen

    reach = {name: reached(name) for name in allowed}
    groups = {tuple(sorted(b for b in reach[a] if a in reach[b])) for a in allowed if a in reach[a]}
    return sorted(list(group) for group in groups)
