"""What a GPU is asked, line by line: the command, its limit in seconds, and what it answers; tables alone.

Lines stand in the order of their worth, since the last ones are lost where time runs out. A line that ends early leaves
its seconds to those that follow. ``stages.py`` runs them, ``runner.py`` keeps the limits.

In a command ``{python}`` stands for the interpreter (``{python line}`` in one word), ``{rows}`` for the folder of the
rows, ``{out}`` for that of everything, ``{minutes}`` for what is left, ``{scale}`` for ``--scale``, ``{encoders}`` for
``--encoders``, ``{site}`` for the folder of other libraries, ``{wheels}`` for the wheels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

__all__ = ["EVERYTHING", "PARTS", "SHORT", "TUNE", "Line"]


@dataclass(frozen=True)
class Line:
    """One process of a plan.

    Attributes:
        name: short; also that of its log.
        command: its arguments, with placeholders.
        seconds: it is stopped after so many, and those that earlier lines left.
        answers: the question that it answers.
        needs: a program that must be there, or ``"wheels"``.
        asked: whether it runs only where ``--stages`` names it.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    answers: str
    needs: str = ""
    asked: bool = False


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return ("{python}", "-m", f"benchmarks.gpu.{name}", *arguments)


def _kernels(*arguments: str) -> tuple[str, ...]:
    return _module("kernels", *arguments, "--out", "{rows}")


def _layers(group: str, *more: str, tune: bool = False) -> tuple[str, ...]:
    quiet = () if tune else ("--no-tune",)
    return _kernels("--no-check", "--minutes", "{minutes}", *quiet, "--only", *group.split(), *more)


def _pytest(*arguments: str) -> tuple[str, ...]:
    return ("{python}", "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)


def _suite(files: str, *more: str) -> tuple[str, ...]:
    paths = (f"benchmarks/{name}" for name in files.split())
    return _pytest(*paths, "--scale", "{scale}", "--results", "{rows}", *more)


INSTALL = ("{python}", "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--upgrade", "--target", "{site}")
CHECK = "do all kernels agree with float64, and do replayed graphs?"
TESTS = Line(
    "tests",
    _pytest("-o", "addopts=", "tests/benchmarks/test_peers.py", "tests/kernels/test_graphed.py", "-k",
            "installed or on_a_gpu"),
    40,
    "do the tests that need a card pass: `graphed`, and the libraries that are installed?",
)  # fmt: skip
WHEELS = Line("wheels", (*INSTALL, "{wheels}"), 10, "can the libraries be installed?", "wheels")
CARD = Line("card", _module("identify", "--out", "{rows}"), 25, "is the card as fast as it should be?")
NCU = ("ncu", "--clock-control", "none", "--profile-from-start", "off", "--section", "SpeedOfLight", "--section",
       "Occupancy", "--section", "MemoryWorkloadAnalysis", "--section", "WarpStateStats")  # fmt: skip
SANITIZER = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9")
TUNE = Line(
    "tune",
    _module("tune", "--out", "{rows}", "--minutes", "{minutes}"),
    540,
    "which configurations are fastest for ResNets and ConvNeXts?",
)
TIMES = Line("kernel-times", _module("kernel_times", "--out", "{rows}"), 40, "where does the time of the card go?")
PRETRAIN = Line(
    "pretrain",
    _module("training", "--out", "{rows}", "--python", "{python line}"),
    80,
    "does pretraining run, resume after a kill, and learn as dense-and-mask does?",
)
SHARES = ("--masked", "0.6", "0.3", "0.75")
GRAPHS = "what does a captured step give over the published one, and how much memory does it take?"

SHORT: Mapping[int, tuple[Line, ...]] = {
    1: (
        CARD,
        Line("check", _kernels("--check-only"), 75, CHECK),
        Line("3x3-tuned", _layers("3x3", "--masked", "0.6", tune=True), 45, "3x3 over dense cuDNN: what gives tuning?"),
        Line(
            "encoder",
            _suite("test_encoder.py", "--encoders", "resnet18", "--no-compile"),
            45,
            "is a whole ResNet-18 twice as fast as dense, eager and captured?",
        ),
        Line("step-graph", _suite("test_step.py::test_graphs", "--encoders", "resnet18"), 60, GRAPHS),
        TIMES,
        PRETRAIN,
        Line(
            "other-layers",
            _layers("stem stride2 densify", "--masked", "0.6"),
            30,
            "are stem, stride 2 and densifying faster than dense?",
        ),
        replace(TUNE, command=(*TUNE.command, "--copy-only"), seconds=50),
        Line("ncu", (*NCU, *_module("small")), 30, "what bounds six kernels?", "ncu"),
        Line(
            "sanitizer",
            (*SANITIZER, *_module("small", "--tiny")),
            15,
            "does any kernel touch memory that is not its own?",
            "compute-sanitizer",
        ),
    ),
    2: (
        Line("check", _kernels("--check-only", "--modes", "bfloat16", "float32", "exact float32"), 45, CHECK),
        TESTS,
        PRETRAIN,
        Line(
            "layers",
            _layers("3x3", *SHARES, "--once", "stride2", "stem", "densify", "depthwise", "peers"),
            85,
            "how fast are layers over dense cuDNN and over other libraries, and how does the masked share matter?",
        ),
        # One process, which takes long to start; each of its benchmarks keeps its rows.
        Line(
            "suites",
            _suite(
                "test_encoder.py test_step.py::test_graphs[resnet18] test_step.py::test_images "
                "test_step.py::test_step[resnet18]",
                *("--encoders", "resnet18,resnet50", "--no-compile"),
            ),
            175,
            "how fast are whole encoders and steps, eager and captured, and what memory do they take?",
        ),
        replace(TIMES, command=(*TIMES.command, "--only", "step resnet18")),
        Line(
            "compiled",
            _suite("test_step.py::test_compiled", "--encoders", "resnet18"),
            60,
            "how fast is a dense step when it is compiled?",
        ),
    ),
}
PARTS = {part: sum(line.seconds for line in lines) for part, lines in SHORT.items()}  # seconds of work

LONG = 3600.0  # of a line that may take all that is left
EVERYTHING: tuple[Line, ...] = (
    Line("engine", ("{python}", "setup.py", "-q", "build_ext", "--inplace"), LONG, "the C++ engine", asked=True),
    WHEELS,
    Line("minkowski", ("{python}", "scripts/install_minkowski.py"), LONG, "MinkowskiEngine", asked=True),
    CARD,
    Line("check", _kernels("--check-only"), LONG, CHECK),
    replace(TESTS, seconds=LONG),
    Line("layers", _layers("3x3", tune=True), LONG, "3x3 layers over dense cuDNN, default and tuned"),
    Line("step", _suite("test_step.py", "{encoders}"), LONG, "whole training steps"),
    Line("encoder", _suite("test_encoder.py test_mask_sweep.py", "{encoders}"), LONG, "whole encoders"),
    Line("peers", _layers("peers"), LONG, "other libraries"),
    Line("memory", _suite("test_memory.py test_data.py", "{encoders}"), LONG, "peak memory, input pipeline"),
    Line("small", _suite("test_pool.py test_norm.py"), LONG, "pooling and norms"),
    Line("more-layers", _layers("stride2 depthwise stem densify", tune=True), LONG, "other layers"),
    replace(PRETRAIN, seconds=LONG),
)
