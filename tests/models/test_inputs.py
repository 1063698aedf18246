"""What the encoder sees: order one, the same in pretraining and in finetuning, and dry stays dry."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from patchsparse import PatchGrid
from spatspark_fast.common.errors import UserError
from spatspark_fast.models.inputs import scale_input
from spatspark_fast.models.spark import build_spark
from spatspark_fast.models.spatspark import SpatSpark, build_spatspark

from ..matrix import rest_but


def rain(*shape: int) -> torch.Tensor:
    """Return data values of the size that radar has, 0 to 12 mm/h."""
    return torch.rand(*shape, dtype=torch.float64).square() * 0.02


def test_log_scaling_is_the_logarithm_of_one_plus_the_rate() -> None:
    depth = torch.tensor([0.0, 1 / 12, 1.0, -0.1])  # mm in 5 min: 0, 1 and 12 mm/h, and what no radar gives
    expected = torch.tensor([0.0, math.log(2), math.log(13), 0.0])
    torch.testing.assert_close(scale_input(depth / 47.83, "log"), expected)
    assert scale_input(depth, "none") is depth


def test_both_paths_of_pretraining_and_the_forecaster_see_the_same() -> None:
    torch.manual_seed(0)
    spark = build_spark("resnet18", in_chans=3, decoder_width=32, input_scaling="log").double().eval()
    plain = build_spark("resnet18", in_chans=3, decoder_width=32).double().eval()
    plain.load_state_dict(spark.state_dict())
    frames = rain(1, 3, 64, 96)
    grid = PatchGrid.from_active(torch.ones(1, 2, 3, dtype=torch.bool))
    with torch.no_grad():
        ours = spark.forward_dense(frames)
        torch.testing.assert_close(spark(frames, grid).prediction, ours)
        torch.testing.assert_close(plain.forward_dense(scale_input(frames, "log")), ours)
        assert not torch.allclose(plain.forward_dense(frames), ours, rtol=0.1)
        options: dict[str, Any] = {"decoder_width": 32, "translation": "identity", "input_scaling": "log"}
        model = build_spatspark("resnet18", 3, 3, **options).double().eval()
        model.load_pretrained(spark.state_dict())
        torch.testing.assert_close(model(frames), ours)


@pytest.mark.parametrize("decoder", rest_but(["light"], ["unet", "light"]))
def test_changes_begin_at_persistence_and_learn(decoder: str) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"decoder": decoder, "decoder_width": 32, "output_norm": "persistence", "unit": 1 / 47.83}
    model = build_spatspark("resnet18", 3, 4, **options)
    frames = F.interpolate(rain(2, 3, 4, 4).float(), size=(64, 64), mode="bilinear")
    assert torch.equal(model(frames), frames[:, -1:].expand(-1, 4, -1, -1))
    before = losses(model, frames, steps=20)
    assert before[-1] < 0.7 * before[0]


def losses(model: SpatSpark, frames: torch.Tensor, steps: int) -> list[float]:
    """Train towards shifted frames; return the losses."""
    target = frames[:, -1:].roll(8, dims=-1) * 50
    optimiser, found = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for _ in range(steps):
        loss = (model(frames) * 50 - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(float(loss.detach()))
    return found


def test_pretrained_weights_leave_the_head_of_changes_at_zero() -> None:
    torch.manual_seed(0)
    spark = build_spark("resnet18", in_chans=3, decoder_width=32, input_scaling="log")
    model = build_spatspark("resnet18", 3, 3, decoder_width=32, output_norm="persistence")
    assert model.load_pretrained(spark.state_dict()) == ["decoder.head.weight", "decoder.head.bias"]
    ours, theirs = model.get_submodule("encoder.conv1"), spark.get_submodule("encoder.conv1")
    assert isinstance(ours, nn.Conv2d)
    assert isinstance(theirs, nn.Conv2d)
    torch.testing.assert_close(ours.weight, theirs.weight)
    frames = rain(1, 3, 64, 64).float()
    assert torch.equal(model(frames), frames[:, -1:].expand(-1, 3, -1, -1))


def test_unknown_scalings_are_refused() -> None:
    scaling: Any = "sqrt"
    for build in (build_spark, build_spatspark):
        with pytest.raises(UserError, match="input_scaling must be one of log, none"):
            build("resnet18", 3, decoder_width=32, input_scaling=scaling)
