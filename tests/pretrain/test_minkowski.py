"""Pretraining with MinkowskiEngine: the losses of another engine, and one sentence where it cannot run."""

import sys
from pathlib import Path

import pytest

from patchsparse.backends import OVERRIDE
from patchsparse.backends.minkowski import loading as minkowski_loading

from .runs import pretrain, rows

problem = minkowski_loading.library().problem


@pytest.mark.skipif(problem is not None, reason=str(problem))
def test_the_losses_are_those_of_gather(tmp_path: Path) -> None:
    for backend in ("gather", "minkowski"):
        assert pretrain(tmp_path / backend, model__backend=backend) == 0
    ours, theirs = ([float(row["loss"]) for row in rows(tmp_path / name)] for name in ("minkowski", "gather"))
    assert len(ours) == 12
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch):
    """Make Python find no MinkowskiEngine."""
    monkeypatch.setitem(sys.modules, "MinkowskiEngine", None)
    minkowski_loading.library.cache_clear()
    yield
    minkowski_loading.library.cache_clear()


def test_without_it_pretraining_says_how_to_get_it(
    absent: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pretrain(tmp_path / "run", model__backend="minkowski") == 2
    told = capsys.readouterr().err
    assert "--model.backend is minkowski: MinkowskiEngine is not installed" in told
    assert "python scripts/install_minkowski.py" in told
    monkeypatch.setenv(OVERRIDE, "minkowski")
    assert pretrain(tmp_path / "run") == 2
    assert "MinkowskiEngine is not installed" in capsys.readouterr().err


def test_it_has_no_half_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain(tmp_path / "run", model__backend="minkowski", trainer__precision="bf16") == 2
    assert "MinkowskiEngine computes in float32 and float64, not torch.bfloat16" in capsys.readouterr().err
