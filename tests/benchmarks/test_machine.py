"""Two machines never share a folder, and rows say where they come from."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import identify
from benchmarks.gpu.fake import fake_gpu
from benchmarks.measure.machine import RESULTS, ROOT, command, cpu, folder_name, kept_in, provenance
from benchmarks.measure.scales import scale_of

AMD = {"vendor_id": "AuthenticAMD", "model name": "AMD EPYC", "cpu family": "26", "model": "2", "flags": "avx2 avx512f"}
OLDER = AMD | {"cpu family": "25", "model": "17"}
INTEL = {
    "vendor_id": "GenuineIntel",
    "model name": "Intel(R) Xeon(R) Processor @ 2.00GHz",
    "cpu family": "6",
    "model": "143",
    "flags": "avx2 avx512f amx_bf16",
}


def test_processors_with_one_name_are_told_apart() -> None:
    names = [cpu(info) for info in (AMD, OLDER, INTEL)]
    assert names == [
        "AMD EPYC (family 26, model 2) AVX-512",
        "AMD EPYC (family 25, model 17) AVX-512",
        "Intel Xeon (family 6, model 143) AVX-512 AMX",
    ]
    assert folder_name(f"{names[0]}, 2 cores") == "amd-epyc-f26m2-avx512-2cores"
    assert folder_name(f"{names[2]}, 8 cores") == "intel-xeon-f6m143-avx512-amx-8cores"
    assert folder_name("NVIDIA H200") == "nvidia-h200"
    assert cpu({"vendor_id": "AuthenticAMD", "model name": "AMD Ryzen 5", "flags": "avx2"}) == "AMD Ryzen 5 AVX2"
    assert cpu({})


def test_a_row_names_machine_versions_commit_and_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "orig_argv", ["python", "-m", "pytest", f"{ROOT}/benchmarks", "--results", "/home/me/rows"]
    )
    assert command() == "pytest benchmarks --results rows"
    monkeypatch.setattr(sys, "orig_argv", ["python", "/home/me/venv/bin/pytest", "benchmarks/test_conv.py"])
    assert command() == "pytest benchmarks/test_conv.py"
    found = provenance()
    assert set(found) == {"device", "cpu", "threads", "versions", "commit", "command", "date"}
    assert all(found.values())
    assert "torch " in found["versions"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_processor_is_no_card_whose_results_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(RESULTS.rglob("*"))
    monkeypatch.setattr(identify, "scale_of", lambda _: scale_of("tiny", torch.device("cpu")))
    assert identify.main([]) == 0
    assert sorted(RESULTS.rglob("*")) == before
    capsys.readouterr()
    assert identify.main(["--out", str(tmp_path)]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert json.loads((tmp_path / "card.json").read_text()) == shown
    assert kept_in(None) is None
    with fake_gpu("h100", compiles=False):
        assert kept_in(None) == RESULTS / folder_name()
        assert kept_in(tmp_path) == tmp_path
