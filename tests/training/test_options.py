"""What both trainings have in common: options with one name, type, default and help, hyphens, and old files."""

import argparse
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from spatspark_fast.common.cli import run_command, underscored
from spatspark_fast.common.errors import UserError
from spatspark_fast.common.options import from_plain, groups_of, to_plain
from spatspark_fast.finetune.cli import COMMAND as FINETUNE
from spatspark_fast.finetune.config import FinetuneConfig
from spatspark_fast.pretrain.cli import COMMAND as PRETRAIN
from spatspark_fast.pretrain.config import PretrainConfig
from spatspark_fast.training.command import Request, TrainingCommand, parse_training, training_parser
from spatspark_fast.training.options import DataOptions, ModelOptions, OptimOptions, TrainerOptions, under_new_names
from spatspark_fast.training.resume import begin, parse_resumed

SHARED = {"data": DataOptions, "model": ModelOptions, "optim": OptimOptions, "trainer": TrainerOptions}
NAMES = [f"{group}.{field.name}" for group, options in SHARED.items() for field in fields(options)]

# Pretraining has large batches and a long schedule by LAMB, as published; finetuning starts from its weights by AdamW.
DEFAULTS: dict[str, tuple[Any, Any]] = {
    "data.batch_size": (128, 16),
    "optim.name": ("lamb", "adamw"),
    "optim.base_lr": (2e-4, 8e-3),
    "optim.betas": ([0.9, 0.95], [0.9, 0.999]),
    "optim.clip": (5.0, 1.0),
    "optim.weight_decay": (0.04, 0.01),
    "optim.weight_decay_end": (0.2, 0.01),
    "optim.warmup_epochs": (40.0, 2.0),
    "optim.final_lr": (0.001, 0.01),
    "trainer.epochs": (1600, 100),
}

# All options of the time when the options of pretraining were the only ones with data.resident.
OLD_PRETRAIN = """
data: {path: nl50.h5, split: train, input_length: 6, crop: 64, flip: true, quarter_turns: true, batch_size: 4,
  resident: host, cache: null, num_workers: 2, synthetic_windows: 32, synthetic_size: 128}
mask: {strategy: rain, ratio: 0.5, schedule: cosine, ratio_end: 0.7, strength: 2.0}
model: {encoder: resnet34, patch: 32, decoder: light, decoder_width: 512, decode_ratio: 0.5,
  dense_decoder_blocks: 2, levels: 4, loss_on: all, input_scaling: none, backend: gather}
optim: {name: adamw, base_lr: 0.25, betas: [0.9, 0.98], clip: 1.0, weight_decay: 0.05, weight_decay_end: 0.1,
  warmup_epochs: 1.0, final_lr: 0.01, ema: 0.99}
trainer: {epochs: 7, max_steps: 9, seed: 3, precision: bf16, compile: 'off', accumulate: 2, accelerator: cpu,
  devices: '1', threads: 2, log_every: 5, picture_every: 3, keep_every: 2, tensorboard: false, savings: false}
"""
OLD_FINETUNE = """
init: runs/a/checkpoints/last.ckpt
data: {path: nl50.h5, split: train, input_length: 6, output_length: 5, validation_fraction: 0.2, crop: 64,
  flip: true, quarter_turns: true, batch_size: 4, num_workers: 2, synthetic_windows: 32, synthetic_size: 128}
model: {kind: spatspark, encoder: resnet34, patch: 32, levels: 4, decoder: light, decoder_width: 512,
  translation: attention, input_scaling: none, output_norm: input_patch, freeze: encoder, base_width: 32}
loss: {ssim_weight: 0.001, weighting: rain, spectral_weight: 0.1}
optim: {name: lamb, base_lr: 0.25, betas: [0.9, 0.98], clip: 2.0, weight_decay: 0.05, weight_decay_end: 0.1,
  warmup_epochs: 1.0, final_lr: 0.02, ema: 0.99}
trainer: {epochs: 7, max_steps: 9, validate_every: 2, score: csi, patience: 4, seed: 3, precision: bf16,
  compile: 'off', accumulate: 2, accelerator: gpu, devices: '1', threads: 2, log_every: 5, keep_every: 2,
  tensorboard: false}
"""

Command = TrainingCommand[Any]
BOTH = pytest.mark.parametrize("command", [PRETRAIN, FINETUNE], ids=lambda command: command.name)


def actions_of(command: Command) -> dict[str, argparse.Action]:
    """Return what ``--help`` shows, by the name of the option."""
    return {action.dest: action for action in training_parser(command)._actions}


def default_of(config: type, name: str) -> Any:
    group, option = name.split(".")
    field = next(field for field in fields(groups_of(config)[group]) if field.name == option)
    return field.default if field.default_factory is MISSING else field.default_factory()


@pytest.mark.parametrize("name", NAMES)
def test_shared_options_have_one_type_one_default_and_one_help(name: str) -> None:
    ours, theirs = (actions_of(command)[name] for command in (PRETRAIN, FINETUNE))
    assert ours.help == theirs.help
    assert ours.help
    assert ours._typehint == theirs._typehint  # type: ignore[attr-defined]
    defaults = default_of(PretrainConfig, name), default_of(FinetuneConfig, name)
    assert defaults == DEFAULTS.get(name, (defaults[0], defaults[0]))


def test_options_of_one_name_are_shared() -> None:
    names = [
        {n for n in actions_of(command) if "." in n and not n.endswith("help")} for command in (PRETRAIN, FINETUNE)
    ]
    assert names[0] & names[1] == set(NAMES)
    start = ("config", "print_config", "preset", "out", "resume")
    assert all(name in actions_of(command) for name in start for command in (PRETRAIN, FINETUNE))


@BOTH
def test_every_option_says_what_it_is(command: Command) -> None:
    silent = [name for name, action in actions_of(command).items() if not action.help]
    assert silent == []


@BOTH
def test_hyphens_are_read_as_underscores_in_names_alone(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    found: list[Request[Any]] = []
    argv = ["--data.batch-size", "5", "--trainer.log-every=-1", "--model.decoder-width=24", "--out=a-b"]
    assert run_command(lambda words: found.append(parse_training(command, words)), argv) == 2
    assert "--trainer.log_every is -1" in capsys.readouterr().err
    argv[2] = "--trainer.log-every=6"
    assert run_command(lambda words: found.append(parse_training(command, words)), argv) == 0
    config = found[0].config
    assert (config.data.batch_size, config.trainer.log_every, config.model.decoder_width) == (5, 6, 24)
    assert found[0].out == "a-b"
    with pytest.raises(SystemExit):
        parse_training(command, underscored(["--print-config"]))
    assert set(yaml.safe_load(capsys.readouterr().out)) >= set(groups_of(command.config))
    assert underscored(["--", "-1", "a-b", "--a-b=c-d=e-f", "--fss-scales"]) == [
        *("--", "-1", "a-b", "--a_b=c-d=e-f", "--fss_scales")
    ]


@pytest.mark.parametrize(("command", "text"), [(PRETRAIN, OLD_PRETRAIN), (FINETUNE, OLD_FINETUNE)])
def test_options_of_old_runs_load(command: Command, text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    old = yaml.safe_load(text)
    config = parse_training(command, [f"--config={path}"]).config
    assert config.trainer.device == {PRETRAIN.name: "cpu", FINETUNE.name: "cuda"}[command.name]
    old = under_new_names(old)
    assert config == from_plain(command.config, old)
    resumed = parse_training(command, [], base=yaml.safe_load(text)).config
    assert config == resumed
    plain = to_plain(config)
    for group, values in old.items():
        assert plain[group] == (plain[group] | values if isinstance(values, dict) else values)
    new = {f"{group}.{name}" for group in groups_of(command.config) for name in plain[group] if name not in old[group]}
    theirs = {"trainer.exact_finish"} if command is PRETRAIN else {"data.resident", "data.cache"}
    assert new == {"trainer.graph", "model.decoder_norm"} | theirs


def test_unknown_options_of_a_file_are_named() -> None:
    with pytest.raises(UserError, match=r"unknown option data\.colour; known are batch_size, cache"):
        from_plain(PretrainConfig, {"data": {"colour": "red"}})
    assert from_plain(FinetuneConfig, {"init": "none"}).init is None


@pytest.mark.parametrize(("command", "other", "words"), [(PRETRAIN, FINETUNE, "mask"), (FINETUNE, PRETRAIN, "loss")])
def test_a_checkpoint_of_the_other_command_is_refused(
    command: Command, other: Command, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "last.ckpt"
    old = to_plain(other.config())
    old["trainer"]["accelerator"] = old["trainer"].pop("device")
    torch.save({"config": old, "position": 0, "state_dict": {}, "global_step": 0}, path)
    with pytest.raises(UserError, match=f"no checkpoint of {command.name}, as it has no options {words}"):
        parse_resumed(command, [], path)
    assert parse_resumed(other, [], path).config == other.config()


@BOTH
def test_printing_the_options_asks_for_no_free_folder(command: Command, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty"), begin(command, [f"--out={tmp_path}"]):
        pass
    with begin(command, [f"--out={tmp_path}", "--print_config"]) as (_, checkpoint):
        assert checkpoint is None
