"""What all tests share: the place of the radar files, signals, and a hypothesis profile without time limits."""

import os
import signal
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one worker per core; set before anything imports torch

import pytest
from hypothesis import HealthCheck, settings

# A shell starts what runs in the background with signals ignored, which commands rightly leave so; tests send them.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (getattr(signal, "SIGHUP", None), signal.SIG_DFL)):
    if number is not None and signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)

settings.register_profile(
    "project",
    deadline=None,
    max_examples=40,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("project")


@pytest.fixture(scope="session")
def radar() -> Path:
    """Return the folder of real radar files named by SPATSPARK_RADAR; skip the test, saying so, without it."""
    folder = os.environ.get("SPATSPARK_RADAR")
    if not folder or not Path(folder).is_dir():
        pytest.skip("no real radar files: set SPATSPARK_RADAR to a folder with knmi_201008/ and the others")
    return Path(folder)


@pytest.fixture(autouse=True)
def blank_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the pictures of trainings blank, whose drawing takes longer than a small training.

    Those of fixtures with a wider scope, and of tests marked ``drawn``, are drawn.
    """
    trains = request.path.parent.name in ("pretrain", "finetune", "training", "experiments")
    if trains and request.node.get_closest_marker("drawn") is None:
        from matplotlib.figure import Figure

        for name in ("pretrain.pictures.reconstruction_figure", "finetune.run.panel_figure"):
            monkeypatch.setattr(f"spatspark_fast.{name}", lambda *_: Figure((1, 1)))
