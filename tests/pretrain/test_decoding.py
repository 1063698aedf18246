"""A training with sparse decoding: what its steps reconstruct, what it says of it, and how it ends and goes on."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from patchsparse import PatchGrid
from spatspark_fast.finetune.initial import read_initial
from spatspark_fast.models.choices import DecoderNorm
from spatspark_fast.models.region import Region
from spatspark_fast.models.spark import SparK
from spatspark_fast.models.spatspark import build_spatspark
from spatspark_fast.pretrain.config import PretrainConfig
from spatspark_fast.pretrain.decoding import decode_ratio_at, describe_decoding
from spatspark_fast.training.notes import resume_notes
from spatspark_fast.training.options import notes_on_old, under_new_names
from spatspark_fast.training.schedules import Plan, make_plan

from .runs import checkpoint, pretrain, same_training

SPARSE: dict[str, Any] = {
    "model__decoder": "unet",
    "model__decoder_width": 32,
    "model__decode_ratio": 0.4,
    "data__synthetic_size": 96,
    "trainer__exact_finish": 0.25,
}


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return what each training step reconstructs, as it is asked of the model."""
    seen: list[Any] = []
    forward = SparK.forward

    def watched(self: SparK, frames: torch.Tensor, grid: PatchGrid, part: Any = None) -> Any:
        if self.training:
            seen.append(part)
        return forward(self, frames, grid, part)

    monkeypatch.setattr(SparK, "forward", watched)
    return seen


def test_the_last_steps_reconstruct_whole_images(
    decoded: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(tmp_path / "run", **SPARSE) == 0
    assert len(decoded) == 12
    assert all(isinstance(part, Region) and part.shape == (2, 2) for part in decoded[:9])
    assert decoded[9:] == [None] * 3
    assert len({tuple(part.first.flatten().tolist()) for part in decoded[:9]}) > 1
    said = " ".join(capsys.readouterr().out.split())
    assert "A step reconstructs a region of 2 x 2 of 3 x 3 patches (44% of the image, with what is read" in said
    assert "of the decoder's multiply-adds); the last 3 steps reconstruct all" in said


def test_without_a_finish_or_with_exact_decoding_nothing_changes_at_the_end(
    decoded: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(tmp_path / "a", **SPARSE | {"trainer__exact_finish": 0, "trainer__epochs": 1}) == 0
    assert len(decoded) == 4
    assert all(isinstance(part, Region) for part in decoded)
    decoded.clear()
    assert pretrain(tmp_path / "b", **SPARSE | {"model__decode_ratio": 1, "trainer__epochs": 1}) == 0
    assert decoded == [None] * 4
    assert "A step reconstructs" not in capsys.readouterr().out.split("\n", 1)[1].split("Pretraining")[-1]


def test_the_light_decoder_draws_all_masked_patches_at_the_end(
    decoded: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(tmp_path / "run", **SPARSE | {"model__decoder": "light", "model__decode_ratio": 0.2}) == 0
    assert [part.counts().tolist() for part in decoded] == [[2, 2]] * 9 + [[5, 5]] * 3
    assert "A step reconstructs 2 of 9 patches (22% of the image" in " ".join(capsys.readouterr().out.split())


def test_a_resumed_run_reconstructs_the_same_regions(tmp_path: Path) -> None:
    assert pretrain(tmp_path / "whole", **SPARSE, trainer__keep_every=1) == 0
    kept = tmp_path / "whole" / "checkpoints" / "epoch-0001.ckpt"
    assert kept.exists()
    assert pretrain(tmp_path / "rest", f"--resume={kept}", **SPARSE) == 0
    assert same_training(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "rest"))


def test_finetuning_takes_the_norms_of_the_pretrained_decoder(tmp_path: Path) -> None:
    assert pretrain(tmp_path / "run", **SPARSE, model__decoder_norm="group", trainer__epochs=1) == 0
    initial = read_initial(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert initial.demands["model.decoder_norm"] == "group"
    options: dict[str, Any] = {"encoder": "test_resnet", "in_length": 3, "out_length": 3, "decoder_width": 32}
    model = build_spatspark(**options, decoder_norm="group")
    initial.fill(model)
    kept = initial.weights["decoder.blocks.0.norm1.weight"]
    assert torch.equal(model.state_dict()["decoder.blocks.0.norm1.weight"], kept)
    counts: dict[DecoderNorm, int] = {"batch": 10, "group": 0, "layer": 0}
    for norm, count in counts.items():
        decoder = build_spatspark(**options, decoder_norm=norm).decoder
        assert sum(isinstance(module, torch.nn.BatchNorm2d) for module in decoder.modules()) == count


def plan_of(steps: int) -> Plan:
    return make_plan(
        batches_per_epoch=10, epochs=100, max_steps=steps, accumulate=1, warmup_epochs=0, windows_per_batch=2,
        base_lr=0.1, final_lr=0.1, weight_decay=0.1, weight_decay_end=0.1,
    )  # fmt: skip


@pytest.mark.parametrize(("finish", "exact"), [(0.0, 0), (0.1, 10), (0.104, 10), (1.0, 100)])
def test_the_finish_is_a_share_of_the_optimiser_steps(finish: float, exact: int) -> None:
    config = PretrainConfig()
    config.model.decode_ratio, config.trainer.exact_finish = 0.3, finish
    ratios = [decode_ratio_at(config, plan_of(100), step) for step in range(100)]
    assert ratios == [0.3] * (100 - exact) + [1.0] * exact


def test_exact_decoding_has_nothing_to_say() -> None:
    model: Any = None  # not looked at
    assert describe_decoding(PretrainConfig(), model, (288, 288), plan_of(10)) == []


def test_runs_that_reconstructed_single_patches_go_on_with_regions_and_say_so() -> None:
    old = {"model": {"decoder": "unet", "decode_ratio": 0.25, "dense_decoder_blocks": 2}, "trainer": {}}
    before = copy.deepcopy(old)
    assert under_new_names(old)["model"] == {"decoder": "unet", "decode_ratio": 0.25}
    assert old == before
    (note,) = notes_on_old(old)
    assert "a region instead of single patches" in note
    state = {"config": under_new_names(old), "global_step": 7, "notes": [note], "data": {"windows": 4}}
    assert resume_notes(under_new_names(old), state) == ["Going on after step 7", f"Note: {note}"]
    for unchanged in ({"decode_ratio": 1.0}, {"decoder": "light", "decode_ratio": 0.25}):
        assert notes_on_old({"model": {"dense_decoder_blocks": 1, **unchanged}}) == []
