"""The rehearsal of the short plan: lines on a fake card, what they compiled and what failed, and the second run."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from benchmarks.gpu import rehearse as rehearsals
from benchmarks.gpu.plan import SHORT, Line
from benchmarks.gpu.rehearse import Rehearsed, bare, rehearse, report
from benchmarks.gpu.runner import Ended

ROOT = Path(__file__).parents[2]
GOOD, BAD = (Line(name, ("{python}", f"{name}.py"), 5, "?") for name in ("good", "bad"))


def rehearsed(line: Line, how: str, keys: str, missed: str = "") -> Rehearsed:
    """Return a line with kernels of one letter."""
    return Rehearsed(Ended(line, how), frozenset(keys), frozenset(missed), float(len(missed)), 9, "last words")


def test_a_report_lists_failures_and_what_the_second_run_compiled(tmp_path: Path) -> None:
    first = [rehearsed(GOOD, "done", "ab", "ab"), rehearsed(BAD, "exit code 1", "bc", "c")]
    text, good = report([first], tmp_path)
    assert not good
    assert "| good | done | 2 | 2 | 2 s | 9 | - |" in text
    assert "FAILED bad: exit code 1\nlast words" in text
    assert "\n3 kernels; the cache has 0 MB" in text
    assert f"TRITON_CACHE_DIR={tmp_path} and Triton is the wheel" in text
    text, good = report([first[:1], [rehearsed(GOOD, "done", "ab")]], tmp_path)
    assert good
    assert "| good | done | 2 | 2 | 2 s | 9 | 0 |" in text
    assert "second run: 0 kernels compiled, all found" in text
    text, good = report([first[:1], [rehearsed(GOOD, "done", "ab", "b")]], tmp_path)
    assert not good
    assert "second run: 1 kernels compiled  WRONG" in text


def test_profilers_and_sanitizers_are_left_out_of_their_lines() -> None:
    lines = [line for part in SHORT.values() for line in part]
    assert {line.command[0] for line in map(bare, lines)} == {"{python}"}
    assert all(bare(line).needs == "" and bare(line).name == line.name for line in lines)
    assert any(line.needs for line in lines)


def test_the_plan_runs_twice_and_the_cache_is_packed(monkeypatch, tmp_path: Path, capsys) -> None:
    calls = []

    def run(lines, card, cache, out, dry):
        calls.append(([line.name for line in lines], card, cache, dry))
        return [rehearsed(line, "done", "a", "" if len(calls) > 1 else "a") for line in lines]

    monkeypatch.setattr(rehearsals, "rehearse", run)
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "kernel").write_text("binary")
    packed = tmp_path / "cache.tar.gz"
    names = [line.name for line in SHORT[1][:2]]
    arguments = ["--part", "1", "--lines", "2", "--cache", str(cache), "--card", "a100"]
    assert rehearsals.main([*arguments, "--pack", str(packed)]) == 0
    assert calls == [(names, "a100", cache, False)] * 2
    with tarfile.open(packed) as file:
        assert "cache/kernel" in file.getnames()
    assert "all found" in capsys.readouterr().out
    assert rehearsals.main([*arguments, "--dry"]) == 0
    assert calls[2:] == [(names, "a100", cache, True)]


@pytest.mark.rest
def test_a_line_compiles_its_kernels_and_a_second_run_finds_them(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text("import torch\nfrom tests.benchmarks.test_fake_gpu import double\ndouble(torch.ones(9).cuda())\n")
    bad.write_text("raise SystemExit('broken')\n")
    lines = [Line(path.stem, ("{python}", str(path)), 5, "?") for path in (good, bad)]
    cache = tmp_path / "cache"
    first = rehearse(lines, "h100", cache, tmp_path / "0")
    second = rehearse(lines[:1], "h100", cache, tmp_path / "1")
    assert [(len(r.keys), len(r.missed), r.launches) for r in (*first, *second)] == [(1, 1, 1), (0, 0, 0), (1, 0, 1)]
    assert [r.ended.how for r in first] == ["done", "exit code 1"]
    assert "broken" in first[1].tail
