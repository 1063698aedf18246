"""The command that prints all counts: its tables as data, the other checkout, a count that fails."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from benchmarks.gpu import counts

TABLE = """some words
| what | before | after |
|---|---|---|
| launches | 8 | 4 |
| host | 534 us | 100 us |

| way | graphs |
|---|---:|
| captured step | 1 |
"""


def test_tables_are_read_line_by_line() -> None:
    assert counts.rows_of(TABLE) == [
        {"what": "launches", "before": "8", "after": "4"},
        {"what": "host", "before": "534 us", "after": "100 us"},
        {"way": "captured step", "graphs": "1"},
    ]


def test_every_count_runs_in_a_process_of_its_own_and_one_that_fails_is_told(monkeypatch, tmp_path: Path, capsys):
    commands = []

    def run(command, **options):
        commands.append(command[1:])
        name = command[2].rpartition(".")[2]
        return subprocess.CompletedProcess(command, name == "step", f"{name}\n{TABLE}")

    monkeypatch.setattr(subprocess, "run", run)
    assert counts.main(["--against", str(tmp_path), "--json", str(tmp_path / "all.json")]) == 1
    assert commands == [
        ["-m", "benchmarks.gpu.host", "--against", str(tmp_path)],
        ["-m", "benchmarks.gpu.step", "--against", str(tmp_path)],
        ["-m", "benchmarks.gpu.passes"],
    ]
    assert capsys.readouterr().out.count("| captured step | 1 |") == 3
    assert [*json.loads((tmp_path / "all.json").read_text())] == ["host", "step", "passes"]
    assert counts.main(["--only", "passes"]) == 0


def test_every_count_is_a_module_that_is_there() -> None:
    folder = Path(counts.__file__).parent
    for name, takes_another in counts.COUNTED.items():
        assert ('"--against"' in (folder / f"{name}.py").read_text()) == takes_another
