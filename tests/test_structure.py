"""What the project promises about its own shape: direction of imports, sizes of files and functions."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    p
    for top in ("kernels", "spatspark_fast", "csrc", "benchmarks", "tests")
    for p in (ROOT / top).glob("**/*")
    if p.suffix in (".py", ".cpp", ".h", ".hpp", ".cc", ".inc")
)
PYTHON = [p for p in FILES if p.suffix == ".py"]
# A layer imports from itself and from those before it.
LAYERS = ("patchsparse", "spatspark_fast.data", "spatspark_fast.models", "spatspark_fast.training")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removeprefix("kernels.")


def imports_of(path: Path) -> set[str]:
    """Return the absolute names of all imported modules."""
    package = name_of(path).split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            found.add(".".join([*base, *([node.module] if node.module else [])]))
    return found


def layer_of(name: str) -> int | None:
    return next((i for i, layer in enumerate(LAYERS) if name == layer or name.startswith(layer + ".")), None)


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_imports_point_towards_the_kernels(path):
    own, name = layer_of(name_of(path)), name_of(path)
    for imported in imports_of(path):
        if name.startswith("patchsparse"):
            assert not imported.startswith("spatspark_fast"), f"{name} imports {imported}"
        if own is not None and (other := layer_of(imported)) is not None:
            assert other <= own, f"{name} imports {imported}"
        if "torch.library" in imported and not name.startswith("tests."):
            assert name.startswith("patchsparse.ops"), f"{name} imports {imported}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 350
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                assert lines <= 60, f"{node.name} has {lines} lines"
