"""The Python examples of the documentation run as printed; links, paths and the map name what is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("**/*.md") if not {".venv", "build"} & {*p.parts})


@pytest.mark.parametrize("page", ["README.md", "kernels/README.md"])
def test_python_examples_run(page):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    assert blocks, f"{page} shows no Python"
    exec(compile("\n".join(blocks), page, "exec"), {})


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{page} links to {target}"


@pytest.mark.parametrize("page", PAGES)
def test_paths_named_on_pages_exist(page):
    """A path in backticks begins with a folder of the repository and exists; NAME stands for one to be made."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    named = re.findall(r"`((?:[\w.-]+/)+[\w.-]*)", text)
    tops = {p.name for p in ROOT.iterdir()}
    named = [name for name in named if name.split("/")[0] in tops and "NAME" not in name]
    missing = [name for name in named if not exists(page, name)]
    assert not missing, f"{page} names {missing}"


def exists(page, name):
    """Return whether a path exists, seen from the repository's root or from the page's folder."""
    return (ROOT / name).exists() or (ROOT / page).parent.joinpath(name).exists()


@pytest.mark.parametrize("folder", ["spatspark_fast", "kernels/patchsparse", "csrc", "benchmarks"])
def test_the_map_lists_what_is_there(folder):
    page = (ROOT / "ARCHITECTURE.md").read_text()
    section = page.split(f"\n## {folder}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\|([^|]*)\|", section, flags=re.MULTILINE)
    listed = {name.rstrip("/") for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert listed == {path.name for path in (ROOT / folder).iterdir() if is_source(path)}


def is_source(path):
    """Return whether an entry belongs to the repository: not a cache, a build or a folder of nothing else."""
    if path.suffix == ".so" or path.name == "__pycache__" or path.name.startswith("."):
        return False
    return path.is_file() or any(is_source(inside) for inside in path.iterdir())
