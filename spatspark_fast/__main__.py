"""Run one of the seven commands: ``spatspark NAME ARGUMENTS`` is ``python -m spatspark_fast.NAME ARGUMENTS``."""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from spatspark_fast import __version__

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "prepare": "turn raw radar files into one file of training windows, or merge such files",
    "pretrain": "pretrain an encoder by masked image modelling on sparse convolutions",
    "finetune": "train a forecaster on whole images, from pretrained or random weights",
    "evaluate": "score models and baselines side by side",
    "forecast": "forecast rain from the newest radar frames, or export a model to ONNX",
    "experiments": "repeat the paper's ablations on a file of windows",
    "info": "report versions, devices and engines, and what a model costs",
}
"""The commands in the order of their use, with a line about each."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first word names, or list all commands; return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(_overview())
        return 0
    if words[0] == "--version":
        sys.stdout.write(f"spatspark-fast {__version__}\n")
        return 0
    if words[0] not in COMMANDS:
        sys.stderr.write(f"spatspark-fast: error: unknown command {words[0]!r}; choose one of {', '.join(COMMANDS)}\n")
        return 2
    return importlib.import_module(f"spatspark_fast.{words[0]}.__main__").main(words[1:])


def _overview() -> str:
    program = "python -m spatspark_fast" if Path(sys.argv[0]).name == "__main__.py" else "spatspark"
    lines = [f"  {name:13}{words}" for name, words in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {program} COMMAND ...",
            "",
            "Pretrain, finetune and run convolutional radar-nowcasting models.",
            "",
            "commands:",
            *lines,
            "",
            f"`{program} COMMAND --help` lists the options of a command.",
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
