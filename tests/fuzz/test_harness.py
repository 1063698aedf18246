"""The harness sees each bad outcome, counts every input once, and repeats one by its number."""

import os
import re
import signal
import time
from collections import Counter
from itertools import count
from pathlib import Path
from random import Random

import torch

from patchsparse import PatchGrid
from spatspark_fast.common.cli import run_command
from spatspark_fast.common.errors import UserError
from spatspark_fast.common.files import load_plain
from tests.fuzz.outcomes import Suite, Verdict, judge_call, judge_command, wrong
from tests.fuzz.running import Limits, prepared, tried

KEPT: list[bytes] = []


def _refuse() -> None:
    raise UserError("no such thing; give another")


def _stumble() -> None:
    load_plain(None, "finetune")  # pyright: ignore[reportArgumentType]


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _grow() -> None:
    KEPT.append(b"x" * (64 << 20))


BAD_ENDS = {
    0: lambda: None,
    1: _refuse,
    2: _stumble,
    3: lambda: wrong("3 is not 4"),
    4: _kill,
    5: lambda: time.sleep(60),
    6: _grow,
}
EXPECTED = {0: "right", 1: "refused", 2: "traceback", 3: "wrong", 4: "crash", 5: "hang", 6: "memory"}


def _refuse_from_here() -> None:
    PatchGrid.from_active(torch.ones(2))


def _kind(random: Random) -> int:
    return random.randrange(len(BAD_ENDS))


def _attempt(random: Random, folder: Path, scratch: Path) -> Verdict:
    assert (folder / "made").exists()
    assert list(scratch.iterdir()) == []
    (scratch / "left").touch()
    kind = _kind(random)
    (folder / "seen").open("a").write(f"{kind}\n")
    return judge_call(_refuse_from_here if kind == 1 else BAD_ENDS[kind])


def test_every_outcome_is_seen_and_every_input_counted_once(tmp_path: Path) -> None:
    suite, folder = Suite(lambda folder: (folder / "made").touch(), _attempt), tmp_path / "toy"
    prepared(suite, folder)
    limits = Limits(seconds=3.0, peak=32 << 20, batch=5)
    kinds: dict[int, int] = {}
    for kind in (*BAD_ENDS, 4, 0):
        kinds[next(seed for seed in count() if seed not in kinds and _kind(Random(f"toy {seed}")) == kind)] = kind
    found = dict(tried("toy", suite, folder, iter(kinds), 2, limits))
    assert {seed: verdict.outcome for seed, verdict in found.items()} == {s: EXPECTED[k] for s, k in kinds.items()}
    assert Counter(map(int, (folder / "seen").read_text().split())) == Counter(kinds.values())
    assert next(v.what for s, v in found.items() if kinds[s] == 4) == "SIGSEGV"


def test_a_command_is_judged_by_its_code_and_its_words() -> None:
    def main(argv: list[str]) -> int:
        return run_command({"refuse": lambda argv: _refuse(), "stumble": lambda argv: _stumble()}[argv[0]], argv)

    assert judge_command(main, ["refuse"]).outcome == "refused"
    verdict = judge_command(main, ["stumble"])
    assert verdict.outcome == "traceback"
    assert re.search(r"AttributeError at spatspark_fast/common/files\.py:\d+", verdict.what)
    assert judge_command(lambda argv: 2, []).outcome == "traceback", "it said nothing"
    assert judge_command(lambda argv: 0, [], lambda: wrong("written")).outcome == "wrong"
