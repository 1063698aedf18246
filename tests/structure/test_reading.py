"""The readers behind the rules find what the rules are about; a rule that sees nothing would always hold."""

import ast

import pytest

from . import cpp, imports, rules, source

CPP_TEXT = """
#include "own.h"
#include <vector>
#define TWICE(x) \\
    { x; x; }
namespace ps {
extern "C" { int exported(void) { return 1; } }
template <class T> struct Rows : Base<T> {
    explicit Rows(int n) : rows{n}, first(n), last{1} {
        if (n) { fill("}"); }  // a brace } in a comment
    }
    bool operator==(const Rows& other) const noexcept { return true; }
};
static const int table[] = {1, 2};
auto late(int x) -> int {
    auto inner = [&](int y) {
        return y;
    };
    return inner(x);
}
}
"""


def test_bodies_of_functions_and_classes_in_cpp():
    found = {(body.kind, body.name): (body.lines, body.member) for body in cpp.bodies(CPP_TEXT)}
    assert found == {
        ("function", "exported"): (1, False),
        ("function", "Rows"): (3, True),
        ("function", "operator=="): (1, True),
        ("class", "Rows"): (6, False),
        ("function", "late"): (6, False),
    }


def test_functions_of_a_shell_script(tmp_path):
    script = tmp_path / "script.sh"
    script.write_text("one() { echo; }\ntwo() {\n  echo\n}\n")
    assert list(source.shell_bodies(script)) == [("function", "one", 1), ("function", "two", 3)]


def test_bodies_in_python(tmp_path):
    module = tmp_path / "module.py"
    module.write_text("class A:\n    def f(self):\n        return 1\n")
    assert list(source.python_bodies(module)) == [("class", "A", 3), ("function", "f", 2)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import spatspark_fast.common.errors", {"spatspark_fast.common.errors"}),
        ("from . import functional, unknown", {"patchsparse.functional", "patchsparse"}),
        ("def late():\n    from .grid import PatchGrid", {"patchsparse.grid"}),
        ("if TYPE_CHECKING:\n    from .grid import PatchGrid", {"patchsparse.grid"}),
        ("import_module('patchsparse.grid')", {"patchsparse.grid"}),
        ("importlib.import_module('.grid', __package__)", {"patchsparse.grid"}),
        (
            "import_module(f'patchsparse.adoption.{name}_timm')",
            {"patchsparse.adoption.fused_timm", "patchsparse.adoption.modules_timm"},
        ),
        ("from spatspark_fast import nowcast", {"spatspark_fast.__getattr__"}),
        ("from spatspark_fast import __version__", {"spatspark_fast"}),
        ("torch.ops.patchsparse.no_such(x)", set()),
    ],
)
def test_imports_of_a_module(text, found):
    module = "patchsparse.packing"
    seen = {name for node in ast.walk(ast.parse(text)) for name in imports.imports_of(node, module)}
    assert seen == found


def test_an_operator_leads_to_the_module_that_registers_it():
    assert imports.operators()["conv2d"] == "patchsparse.ops.conv"


def test_circles():
    edges = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a", "e"}, "e": set()}
    assert imports.circles(edges) == [["b", "c"]]


def test_layers():
    layers = (("=ground", "low"), ("left", "right"), ("top_*",))
    edges = [("low.a", "ground"), ("left.a", "low.b"), ("left.a", "right.b"), ("low", "left"), ("top_1", "left")]
    assert rules._against(edges, layers, "imports") == [
        "left.a imports right.b",
        "low imports left",
        "low.a imports ground",
    ]
    assert rules._against([("else.where", "low")], layers, "imports") == ["else has files without a place in the order"]


def test_every_language_is_read():
    suffixes = {path.suffix for path in source.files(*source.CODE)}
    assert suffixes >= {".py", ".cpp", ".h", ".inl", ".sh"}
    tops = {source.short(path).split("/")[0] for path in source.files(".py")}
    assert tops >= {"kernels", "spatspark_fast", "benchmarks", "tests", "scripts", "docs", "setup.py"}
