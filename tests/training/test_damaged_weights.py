"""A changed byte in a file of weights is found, or changes nothing; what is no weight is named."""

import shutil
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from spatspark_fast.common.errors import UserError
from spatspark_fast.common.files import load_plain
from spatspark_fast.finetune.initial import read_initial
from spatspark_fast.models.backbones import build_dense_encoder, load_encoder, save_encoder
from spatspark_fast.models.registry import load_forecaster
from spatspark_fast.models.weights import read_weights, write_weights
from spatspark_fast.training.checkpoints import read_checkpoint

from ..pretrain.runs import same

OLD = Path(__file__).parents[1] / "data_files" / "runs_before_the_move"


def flipped(path: Path, places: Iterable[int], bits: int = 1) -> dict[str, int]:
    """Read a file with one bit changed at each place, for so many bits drawn there; count outcomes."""
    read: Callable[[Path], Any] = read_weights if path.suffix == ".safetensors" else lambda p: load_plain(p, "a test")
    whole, content = read(path), path.read_bytes()
    rng = np.random.default_rng(len(content))
    counts = {"refused": 0, "harmless": 0}
    spoilt = path.with_stem("spoilt")
    for place, bit in ((place, bit) for place in places for bit in rng.permutation(8)[:bits]):
        changed = bytearray(content)
        changed[place] ^= 1 << bit
        spoilt.write_bytes(changed)
        try:
            found = read(spoilt)
        except UserError:
            counts["refused"] += 1
        else:
            assert same(found, whole), place
            counts["harmless"] += 1
    return counts


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "encoder.safetensors"
    save_encoder(build_dense_encoder("test_resnet", 3), path, input_scaling="log")
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return shutil.copyfile(OLD / "finetuned" / "checkpoints" / "last.ckpt", tmp_path / "last.ckpt")


def somewhere(path: Path, count: int) -> Iterable[int]:
    size = path.stat().st_size
    return np.random.default_rng(size).integers(0, size, count).tolist()


def test_no_changed_byte_of_an_encoder_is_taken(encoder: Path, tmp_path: Path) -> None:
    assert flipped(encoder, somewhere(encoder, 50)) == {"refused": 50, "harmless": 0}
    small = tmp_path / "small.safetensors"
    about = {"architecture": "test_resnet", "layout": "classifier", "input_scaling": "log", "format": "pt"}
    state = {"stem.weight": torch.randn(2, 3), "stem.bias": torch.zeros(2, dtype=torch.bfloat16)}
    write_weights(small, state, about)
    size = small.stat().st_size
    assert flipped(small, range(size)) == {"refused": size, "harmless": 0}
    save_file(state, small, metadata=about)  # as before there was a hash
    assert same(read_weights(small), (about, state))


def test_no_changed_byte_of_a_checkpoint_changes_a_number(checkpoint: Path, tmp_path: Path) -> None:
    # Harmless are dates, hints and the padding in front of members, at which nobody looks.
    counts = flipped(checkpoint, somewhere(checkpoint, 40))
    assert counts["refused"] > counts["harmless"]
    small = tmp_path / "small.ckpt"
    torch.save({"state_dict": {"weight": torch.randn(3)}, "position": 7, "config": {"model": {"levels": 2}}}, small)
    counts = flipped(small, somewhere(small, 300))
    assert counts["refused"] > counts["harmless"] > 0
    # All bits of what the directory says of the weight: one of them makes it a folder, which torch never fills.
    content = small.read_bytes()
    start = content.rindex(b"PK\x01\x02", 0, content.rindex(b"data/0"))
    counts = flipped(small, range(start, content.index(b"PK\x01\x02", start + 1)), bits=8)
    assert counts["refused"] > counts["harmless"]


def test_files_without_checksums_and_bombs_are_no_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    old, packed, bomb = (tmp_path / name for name in ("old.ckpt", "packed.ckpt", "bomb.ckpt"))
    torch.save(torch.load(checkpoint, weights_only=True), old, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(checkpoint) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    content = bytearray(checkpoint.read_bytes())
    size = content.rindex(b"PK\x01\x02") + 24  # of the last member, as the directory has it
    content[size : size + 4] = b"\xf0\xff\xff\xff"
    bomb.write_bytes(content)
    for path, words in ((old, "before 1.6"), (packed, "are compressed"), (bomb, "are larger than the file")):
        for read in (read_checkpoint, read_initial, load_forecaster):
            with pytest.raises(UserError, match=f"{path.name} is damaged or no checkpoint of .*{words}"):
                read(path)


def test_an_encoder_file_that_was_edited_is_named(encoder: Path, tmp_path: Path) -> None:
    about, state = read_weights(encoder)
    model = build_dense_encoder("test_resnet", 3)
    name = next(iter(state))
    path = tmp_path / "edited.safetensors"
    for change, words in (
        (state[name] * torch.nan, f"the weight {name} holds values that are not finite"),
        (state[name].to(torch.complex64), f"its weight '{name}' is no ordinary tensor"),
        (state[name][:1], f"does not fit encoder 'test_resnet': {name} is"),
    ):
        write_weights(path, state | {name: change}, about)
        with pytest.raises(UserError, match=words):
            load_encoder(model, path)
    save_file(state, path, metadata=about | {"sha257": "0" * 64})
    with pytest.raises(UserError, match="its content is not what was written"):
        read_initial(path)
