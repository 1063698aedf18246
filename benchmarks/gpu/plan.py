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
    return _pytest("-s", *paths, "--scale", "{scale}", "--results", "{rows}", *more)


INSTALL = ("{python}", "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--upgrade", "--target", "{site}")
CHECK = "do all kernels agree with float64, and do replayed graphs?"
TESTS = Line(
    "tests",
    _pytest("-o", "addopts=", "tests/benchmarks/test_peers.py", "tests/kernels/test_graphed.py", "-k",
            "installed or on_a_gpu"),
    90,
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
TIMES = Line("kernel-times", _module("kernel_times", "--out", "{rows}"), 60, "where does the time of the card go?")
PRETRAIN = Line(
    "pretrain",
    _module("training", "--out", "{rows}", "--python", "{python line}"),
    80,
    "does pretraining run, resume after a kill, and learn as dense-and-mask does?",
)
SHARES = ("--masked", "0.6", "0.3", "0.75")

SHORT: Mapping[int, tuple[Line, ...]] = {
    1: (
        CARD,
        Line("check", _kernels("--check-only"), 75, CHECK),
        Line("3x3-tuned", _layers("3x3", "--masked", "0.6", tune=True), 60, "3x3 over dense cuDNN: what gives tuning?"),
        Line(
            "encoder",
            _suite("test_encoder.py", "--encoders", "resnet18", "--no-compile"),
            60,
            "is a whole ResNet-18 twice as fast as dense, eager and captured?",
        ),
        PRETRAIN,
        Line(
            "other-layers",
            _layers("stem stride2 densify", "--masked", "0.6"),
            40,
            "are stem, stride 2 and densifying faster than dense?",
        ),
        replace(TUNE, command=(*TUNE.command, "--copy-only"), seconds=50),
        TIMES,
        Line("ncu", (*NCU, *_module("small")), 45, "what bounds six kernels?", "ncu"),
        Line(
            "sanitizer",
            (*SANITIZER, *_module("small", "--tiny")),
            20,
            "does any kernel touch memory that is not its own?",
            "compute-sanitizer",
        ),
    ),
    2: (
        Line("check", _kernels("--check-only", "--modes", "bfloat16", "float32", "exact float32"), 45, CHECK),
        TESTS,
        Line("3x3", _layers("3x3", *SHARES), 75, "how fast are 3x3 layers, and how does the masked share matter?"),
        Line(
            "encoders",
            _suite("test_encoder.py", "--encoders", "resnet18,resnet50", "--no-compile"),
            90,
            "how fast are whole encoders, eager and captured?",
        ),
        Line(
            "more-layers",
            _layers("stride2 stem densify depthwise", "--masked", "0.6"),
            60,
            "how fast are the other layers?",
        ),
        Line("peers", _layers("peers", "--masked", "0.6"), 90, "how fast are other libraries at p8 C64 and p1 C512?"),
    ),
    3: (
        Line(
            "step-graph",
            _suite("test_step.py::test_graphs", "--encoders", "resnet18"),
            180,
            "what does a captured step give over the published one, and how much memory does it take?",
        ),
        Line(
            "images",
            _suite("test_step.py::test_images"),
            100,
            "how many images/s does a ResNet-50 at 224x224 train on?",
        ),
        Line(
            "step",
            _suite("test_step.py::test_step", "--encoders", "resnet18"),
            120,
            "how fast is a step kernel by kernel, and which of its parts takes how long?",
        ),
        Line(
            "compiled",
            _suite("test_step.py::test_compiled", "--encoders", "resnet18"),
            120,
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
