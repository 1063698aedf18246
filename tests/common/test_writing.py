"""What cannot be written is said in one sentence, and what stood there before is whole: full disks, limits, folders."""

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import onnx
import pytest
import torch
import xarray as xr
from onnx import numpy_helper
from PIL import Image
from safetensors.torch import save_file

from spatspark_fast.common.errors import UserError, WriteError
from spatspark_fast.common.files import atomic_path, check_file, check_folder

from .scarce import size_limit, small_disk

MEBIBYTES = 2
MUCH = np.random.default_rng(0).random((700, 1000))  # 5 MiB, which no compression makes less than half as large


def h5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["a"] = MUCH


WRITERS: dict[str, Callable[[Path], Any]] = {
    "torch": lambda path: torch.save({"a": torch.from_numpy(MUCH)}, path),
    "safetensors": lambda path: save_file({"a": torch.from_numpy(MUCH)}, str(path)),
    "netcdf": lambda path: xr.Dataset({"a": (("y", "x"), MUCH)}).to_netcdf(path, engine="netcdf4"),
    "hdf5": h5,
    "picture": lambda path: Image.fromarray((MUCH * 2**31).astype("i4")).save(path, format="TIFF"),
    "text": lambda path: path.write_text("rain " * 1_000_000),
    "onnx": lambda path: onnx.save(onnx.ModelProto(graph={"initializer": [numpy_helper.from_array(MUCH)]}), path),
}


@pytest.fixture(scope="module")
def disk() -> Iterator[Path]:
    """Return a disk of 2 MiB of our own."""
    with small_disk(MEBIBYTES << 20) as folder:
        yield folder


@pytest.fixture
def limit() -> Iterator[None]:
    """Let no file of this process grow over 2 MiB."""
    with size_limit(MEBIBYTES << 20):
        yield


def refused(writer: Callable[[Path], Any], target: Path, words: str) -> None:
    """Write what does not fit over an old file."""
    target.write_text("old")
    with pytest.raises(WriteError) as caught, atomic_path(target) as temporary:
        writer(temporary)
    assert str(target) in str(caught.value)
    assert words in str(caught.value)
    assert target.read_text() == "old"
    assert os.listdir(target.parent) == [target.name]
    target.unlink()


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_said_by_every_writer(name: str, disk: Path) -> None:
    refused(WRITERS[name], disk / "file", "No space left on device; make room")


@pytest.mark.usefixtures("limit")
@pytest.mark.parametrize("name", WRITERS)
def test_a_limit_on_the_size_of_files_is_said_by_every_writer(name: str, tmp_path: Path) -> None:
    refused(WRITERS[name], tmp_path / "file", "File too large; raise the limit")


def test_folders_that_cannot_be_written_are_named(tmp_path: Path, disk: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    try:
        for target, code in (
            (tmp_path / "file" / "a", errno.ENOTDIR),
            (tmp_path / "none" / "a", errno.ENOENT),
            (tmp_path / ("a" * 300), errno.ENAMETOOLONG),
            (disk / "a", errno.EROFS),
        ):
            with pytest.raises(WriteError, match=os.strerror(code)), atomic_path(target) as temporary:
                temporary.write_text("new")
    finally:
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    long = tmp_path / ("a" * 255)
    with atomic_path(long) as temporary:
        temporary.write_text("new")
    assert long.read_text() == "new"


def test_names_that_no_system_can_write_are_refused() -> None:
    for name, words in (("a" * 300, "give a shorter path"), ("\ud800", "it is no text"), ("a\0b", "a null byte")):
        with pytest.raises(UserError, match=f"--out .* cannot be used: .*{words}"):
            check_folder(Path(name), overwrite=True)
        with pytest.raises(UserError, match=f"--export .* cannot be used: .*{words}"):
            check_file("export", Path(name), overwrite=True)


def test_a_defect_in_the_block_stays_what_it_is(tmp_path: Path) -> None:
    for error in (KeyError("a"), RuntimeError("odd"), FileNotFoundError(errno.ENOENT, "gone", "/elsewhere/font.ttf")):
        with pytest.raises(type(error)) as caught, atomic_path(tmp_path / "file"):
            raise error
        assert caught.value is error
    assert os.listdir(tmp_path) == []
