"""Every step hides a patch shows another and trains on it; what cannot be is refused before a file is written."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spatspark_fast.common.errors import UserError
from spatspark_fast.models.choices import check_ratio_of_grid
from spatspark_fast.models.masks import MaskSampler, masks_of_step, num_visible
from spatspark_fast.models.region import Region
from spatspark_fast.models.spark import build_spark
from spatspark_fast.pretrain.__main__ import main

from ..refusals import refusal
from .runs import arguments, pretrain, rows

# Windows of 64 x 64 pixels have 2 x 2 patches.
REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"mask__ratio": 0.1},
        "--mask.ratio is 0.1: of 2 x 2 patches it hides none; the nearest ratio that can be is 0.25",
    ),
    ({"mask__ratio": 0.9}, "it leaves none visible; the nearest ratio that can be is 0.75, 3 of 4 hidden"),
    ({"mask__schedule": "linear", "mask__ratio_end": 0.05}, "--mask.ratio_end is 0.05: of 2 x 2 patches it hides none"),
    ({"mask__schedule": "cosine", "mask__ratio": 0.05, "mask__ratio_end": 0.5}, "--mask.ratio is 0.05"),
    ({"mask__schedule": "interval", "mask__ratio_end": 0.95}, "--mask.ratio_end is 0.95"),
    ({"mask__schedule": "linear", "mask__ratio_end": 0}, "nothing hidden"),
    ({"data__synthetic_size": 32}, "single patch"),
    ({"data__batch_size": 1, "mask__ratio": 0.75}, "1 visible patch in a batch"),
    ({"data__batch_size": 1, "mask__schedule": "linear", "mask__ratio_end": 0.75}, "1 visible patch in a batch"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED)
def test_steps_that_could_not_learn_are_refused(
    changes: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert words in refusal(capsys, main, arguments(out, **changes))
    assert not out.exists()


@given(st.integers(1, 12), st.integers(1, 12), st.floats(0, 1, exclude_max=True))
def test_the_nearest_ratio_that_is_named_can_be(rows: int, columns: int, ratio: float) -> None:
    patches = rows * columns
    try:
        check_ratio_of_grid("mask.ratio", ratio, (rows, columns), 32)
    except UserError as error:
        if patches == 1:
            return
        found = re.search(r"can be is ([\d.]+),", str(error))
        assert found is not None
        assert not 0 < round(patches * (1 - ratio)) < patches
        check_ratio_of_grid("mask.ratio", float(found[1]), (rows, columns), 32)
    else:
        assert 0 < num_visible(patches, ratio) < patches


@pytest.mark.parametrize("decoder", ["unet", "light"])
@pytest.mark.parametrize("strategy", ["random", "rain"])
def test_what_is_reconstructed_holds_a_hidden_patch(decoder: Any, strategy: Any) -> None:
    """One patch of nine is hidden, and one reconstructed."""
    frames = torch.rand(200, 2, 96, 96)
    model = build_spark("test_resnet", in_chans=2, decoder=decoder, decoder_width=32)
    grid, decoded = masks_of_step(model, MaskSampler(1 / 9, strategy=strategy), frames, share=0.01)
    assert decoded is not None
    hidden = ~grid.active
    if isinstance(decoded, Region):
        assert decoded.shape == (1, 1)
        assert decoded.patches(hidden).all()
    else:
        assert torch.equal(decoded.active, hidden)


def test_a_training_at_the_edge_has_a_loss_in_every_step(tmp_path: Path) -> None:
    changes = {"mask__ratio": 0.25, "mask__schedule": "interval", "mask__ratio_end": 0.75}
    assert (
        pretrain(
            tmp_path / "run",
            **changes,
            model__decoder="unet",
            model__decoder_width=32,
            model__decode_ratio=0.1,
            trainer__epochs=2,
        )
        == 0
    )
    assert all(float(row["loss"]) > 0 for row in rows(tmp_path / "run"))
