"""The command info says what is installed, what runs, and what a model costs."""

import re

import pytest
import torch

from patchsparse import available_backends
from patchsparse.backends.cpp import library
from spatspark_fast.info.__main__ import main


def test_versions_devices_and_engines_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    report = capsys.readouterr().out
    assert re.search(rf"torch +{re.escape(torch.__version__.split('+')[0])}", report)
    assert torch.backends.cpu.get_cpu_capability() in report
    assert all(name in report for name in available_backends())
    assert "taken" in report
    if "cpp" in available_backends():
        assert re.search(rf"cpp: runs on \w+; {library.ISA} chooses one of portable", report)
    assert "multiply-adds" not in report


def test_multiply_adds_of_the_paper_s_encoder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model.encoder=resnet18"]) == 0
    report = capsys.readouterr().out
    costs = {line.split()[0]: [float(n) for n in re.findall(r"\d+\.\d+", line)] for line in report.splitlines() if line}
    dense, visible, pairs = costs["encoder"]
    assert dense == pytest.approx(3.6, abs=0.05)
    assert visible == pytest.approx(dense * 32 / 81, abs=0.01)
    assert pairs < visible
    assert costs["decoder"] == pytest.approx([16.75, 16.75], abs=0.05)


def test_fewer_levels_of_smaller_patches(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model.encoder=resnet18", "--model.levels=3", "--model.patch=16", "--data.crop=64"]
    assert main([*argv, "--model.decoder_width=64", "--data.batch_size=4"]) == 0
    report = capsys.readouterr().out
    assert "encoder.layer3" in report
    assert "encoder.layer4" not in report
    assert "4 windows" in report


def test_blocks_and_memory_of_sparse_decoding(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model.encoder=resnet18", "--model.decoder-width=768", "--model.decode-ratio=0.25", "--mask.ratio=0.5"]
    assert main([*argv, "--data.crop=288", "--data.batch-size=16"]) == 0
    report = capsys.readouterr().out
    numbers = {
        line.split()[0]: [float(n) for n in re.findall(r"\d+\.\d+", line)] for line in report.splitlines() if line
    }
    dense, active = numbers["encoder.layer3"]
    assert active == pytest.approx(dense * 40 / 81, rel=0.01)
    dense, active = numbers["decoder.blocks.2"]  # a region of 4 x 5 of 9 x 9 patches, and what is read around it
    given, between = 22 * 26, 40 * 48
    assert active / dense == pytest.approx((52 * given + 4.5 * between) / (52 * 36**2 + 4.5 * 72**2), rel=0.01)
    batches = [int(n) for n in re.findall(r"(\d+) on (?:16|24|80) GB", report)]
    assert len(batches) == 3
    assert batches == sorted(batches)
    assert batches[0] > 16
    assert "16 windows" in report


@pytest.mark.skipif("cpp" not in available_backends(), reason="the C++ engine is not built")
def test_an_instruction_set_that_cannot_run_is_not_named_as_if_it_ran(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(library.ISA, "sse9")
    assert main([]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"{library.ISA}=sse9 cannot run here; choose one of portable" in shown.err


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--model.encoder=resnet19"], "unknown encoder"),
        (["--mask.ratio=1"], "--mask.ratio"),
        (["--model.encoder=resnet18", "--data.crop=100"], "100 x 100"),
        (["--data.crop=0"], "at least 1"),
        (["--model.decode_ratio=0"], "--model.decode_ratio"),
        (["--model.decoder=dense"], "unet"),
        (["--colour=red"], "colour"),
    ],
)
def test_wrong_options_end_in_one_sentence(argv: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert word in shown.err
