"""A damaged NL-50 file ends in one sentence that names file, data set and cause; no changed byte changes a number."""

import subprocess
import sys
import zlib
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from spatspark_fast.common.errors import UserError
from spatspark_fast.data.nl50 import NowcastDataset
from spatspark_fast.evaluate.__main__ import main as evaluate
from spatspark_fast.finetune.__main__ import main as finetune
from spatspark_fast.forecast.__main__ import main as forecast
from spatspark_fast.prepare.__main__ import main as prepare
from spatspark_fast.prepare.cutter import Window
from spatspark_fast.prepare.merging import merge_files
from spatspark_fast.prepare.writer import NL50Writer
from spatspark_fast.pretrain.__main__ import main as pretrain
from tests.finetune.runs import arguments as finetuning
from tests.forecast.forecasts import moving_rain, save_checkpoint
from tests.pretrain.runs import arguments as pretraining
from tests.refusals import refusal

SHAPE = (6, 32, 32)
WINDOWS = 3
IMAGES, VALID, TIMES = "test/images", "test/valid", "test/timestamps"
Damage = Callable[[h5py.File], object]


def write(path: Path) -> Path:
    """Write windows as `prepare` does."""
    with NL50Writer(path, SHAPE, 47.83) as writer:
        for number, rain in enumerate(moving_rain(2 * WINDOWS, *SHAPE)):
            times = [datetime(2020, 6, 1, 12) + timedelta(hours=number, minutes=5 * t) for t in range(SHAPE[0])]
            split = "train" if number < WINDOWS else "test"
            writer.add(Window(split, times, rain / 12, np.ones(SHAPE, bool)))
        about = {"scale_mm_per_5min": 47.83, "interval_minutes": 5.0, "projection": "+proj=stere +lat_0=90"}
        writer.set_attributes(about)
    return path


def read(path: Path, split: str = "test") -> list[Any]:
    """Return all that is in a split."""
    windows = NowcastDataset(path, split, 3, include_valid=True)
    found: list[Any] = [windows.attributes, windows.scale, windows.interval_minutes]
    for index in range(len(windows)):
        item = windows[index]
        found += [item[name].numpy().tobytes() for name in ("input", "target", "valid")] + [windows.times(index)]
    windows.close()
    return found


def replaced(name: str, *arguments: Any, **options: Any) -> Damage:
    """Return what puts another data set in the place of one."""

    def damage(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, *arguments, **options)

    return damage


def linked(name: str, link: object, **others: object) -> Damage:
    def damage(file: h5py.File) -> None:
        del file[name]
        file[name] = link
        for other, target in others.items():
            file[other] = target

    return damage


def pixels(value: float, place: tuple[int, ...] = (1, 4, 5, 5)) -> Damage:
    def damage(file: h5py.File) -> None:
        images = np.asarray(file[IMAGES], np.float64)
        images[place] = value
        replaced(IMAGES, data=images)(file)

    return damage


def attribute(name: str, value: object) -> Damage:
    return lambda file: file.attrs.__setitem__(name, value)


def virtual(file: h5py.File) -> None:
    """Map the images to a file that is not there, of which HDF5 makes zeros."""
    shape = (WINDOWS, *SHAPE)
    layout = h5py.VirtualLayout(shape, np.float32)
    layout[:] = h5py.VirtualSource("absent.h5", "images", shape)
    del file[IMAGES]
    file.create_virtual_dataset(IMAGES, layout)


def filtered(code: int) -> Damage:
    def damage(file: h5py.File) -> None:
        made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        made.set_chunk((1, *SHAPE))
        made.set_filter(code, h5py.h5z.FLAG_OPTIONAL, (2, 2, 4, 16384, 5, 1, 1))
        del file[IMAGES]
        space = h5py.h5s.create_simple((WINDOWS, *SHAPE))
        data = h5py.h5d.create(file["test"].id, b"images", h5py.h5t.IEEE_F32LE, space, dcpl=made)
        for window in range(WINDOWS):
            data.write_direct_chunk((window, 0, 0, 0), b"abcd", 0)

    return damage


def bomb(file: h5py.File) -> None:
    """Put 12 MB in the place of a window that unpack to 12 GB."""
    packer = zlib.compressobj(9)
    content = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    piece = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    images: Any = file[IMAGES]
    images.id.write_direct_chunk((1, 0, 0, 0), content + 12_000 * piece)


def half_written(file: h5py.File) -> None:
    images: Any = file[IMAGES]
    for name in ("images", "valid", "timestamps"):
        data: Any = file[f"test/{name}"]
        data.resize(WINDOWS + 2, axis=0)
    images.id.write_direct_chunk((WINDOWS, 0, 0, 0), zlib.compress(bytes(4 * 6 * 32 * 32)))


def endless(file: h5py.File) -> None:
    """Declare more windows than any disk holds, and write none."""
    for name, kind, row in ((IMAGES, "f4", SHAPE), (VALID, "?", SHAPE), (TIMES, "S24", (6, 1))):
        replaced(name, (2**40, *row), kind, chunks=(1, *row))(file)


def huge(file: h5py.File) -> None:
    """Declare windows that no memory holds."""
    for name, kind in ((IMAGES, "f4"), (VALID, "?")):
        replaced(name, (WINDOWS, 6, 2**20, 2**20), kind, chunks=(1, 1, 64, 64))(file)


FRAMES = (WINDOWS, *SHAPE)
KINDS: dict[str, tuple[Damage, str]] = {
    "no split": (lambda file: file.__delitem__("test"), "has no split 'test'; it holds train"),
    "a split that is a data set": (replaced("test", data=[1.0]), "has no data set test/images"),
    "no images": (lambda file: file.__delitem__(IMAGES), "has no data set test/images"),
    "images that are a group": (linked(IMAGES, h5py.SoftLink("/train")), "test/images is a group, no data set"),
    "images that are a type": (linked(IMAGES, np.dtype("f4")), "has no data set test/images"),
    "images without a shape": (replaced(IMAGES, data=h5py.Empty("f4")), "test/images is empty"),
    "images of rank 5": (replaced(IMAGES, data=np.zeros((1, 1, 6, 4, 4))), "float64 of shape (1, 1, 6, 4, 4)"),
    "images that are one number": (replaced(IMAGES, data=1.0), "float64 of shape ()"),
    "images of integers": (replaced(IMAGES, data=np.zeros(FRAMES, int)), "is int64 of shape"),
    "images of text": (replaced(IMAGES, FRAMES, h5py.string_dtype()), "is object of shape"),
    "images of references": (replaced(IMAGES, FRAMES, h5py.ref_dtype), "is object of shape"),
    "images of compounds": (replaced(IMAGES, FRAMES, [("a", "f4"), ("b", "f4")]), "not floating point"),
    "no windows": (replaced(IMAGES, (0, *SHAPE), "f4"), "split 'test' is empty"),
    "no frames": (replaced(IMAGES, (3, 0, 32, 32), "f4"), "has windows of (0, 32, 32) frames"),
    "no pixels": (replaced(IMAGES, (3, 6, 0, 32), "f4"), "has windows of (6, 0, 32) frames"),
    "valid that is a group": (linked(VALID, h5py.SoftLink("/train")), "test/valid is a group"),
    "valid of another shape": (replaced(VALID, data=np.ones((2, *SHAPE), bool)), "bool of shape (2, 6, 32, 32)"),
    "valid of numbers": (replaced(VALID, data=np.ones(FRAMES)), "test/valid is float64"),
    "times that are a group": (linked(TIMES, h5py.SoftLink("/train")), "test/timestamps is a group"),
    "fewer times": (replaced(TIMES, data=np.zeros((2, 6, 1), "S24")), "not one time for each of 3 x 6 frames"),
    "times of few frames": (replaced(TIMES, data=np.zeros((3, 5, 1), "S24")), "not one time for each of 3 x 6"),
    "endless times": (replaced(TIMES, (3, 6, 1), "S100000", chunks=True), "holds texts of 100000 bytes"),
    "scale of text": (attribute("scale_mm_per_5min", "much"), "scale_mm_per_5min is 'much', not a positive number"),
    "scale of numbers": (attribute("scale_mm_per_5min", [1.0, 2.0]), "scale_mm_per_5min is [1.0, 2.0]"),
    "no scale but NaN": (attribute("scale_mm_per_5min", np.nan), "scale_mm_per_5min is nan"),
    "scale of 0": (attribute("scale_mm_per_5min", 0.0), "scale_mm_per_5min is 0"),
    "endless scale": (attribute("scale_mm_per_5min", 1e300), "scale_mm_per_5min is 1e+300"),
    "interval of text": (attribute("interval_minutes", "five"), "interval_minutes is 'five'"),
    "interval of 0": (attribute("interval_minutes", 0), "interval_minutes is 0"),
    "interval of NaN": (attribute("interval_minutes", np.nan), "interval_minutes is nan"),
    "link to nowhere": (linked(IMAGES, h5py.SoftLink("/nowhere")), "has no data set test/images"),
    "link to itself": (linked(IMAGES, h5py.SoftLink("/test/images")), "test/images is a link to itself"),
    "links in a circle": (linked("test", h5py.SoftLink("/x"), x=h5py.SoftLink("/test")), "is a link to itself"),
    "another file": (linked(IMAGES, h5py.ExternalLink("absent.h5", "/a")), "is a link into another file"),
    "a device": (linked("test", h5py.ExternalLink("/dev/zero", "/")), "test is a link into another file"),
    "virtual": (virtual, "test/images takes its values from other files"),
    "raw file": (replaced(IMAGES, FRAMES, "f4", external="raw.bin"), "test/images takes its values from other files"),
    "unknown filter": (filtered(32008), "is packed with the filter bitshuffle, which is not there: pip install"),
    "a trillion windows": (endless, "test/images has 0 of its 1099511627776 chunks"),
    "chunks never written": (half_written, "test/images has 4 of its 5 chunks"),
    "nothing written": (replaced(IMAGES, FRAMES, "f4"), "test/images has 0 of its 73728 bytes"),
    "huge windows": (huge, "GiB at once, too much for this machine"),
    "bomb": (bomb, "unpacks to more than it may hold"),
    "NaN": (pixels(np.nan), "window 1 holds values that are not finite"),
    "infinite as float32": (pixels(1e300), "window 1 holds values that are not finite"),
    "negative": (pixels(-0.01), "window 1 holds negative values"),
    "undivided": (pixels(30.0), "window 1 holds up to 1434.9 mm of rain in 5 minutes"),
    "a window that is no deflate": (
        lambda file: file[IMAGES].id.write_direct_chunk((1, 0, 0, 0), b"no gzip stream"),  # type: ignore[union-attr]
        "test window 1: images cannot be read",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_damage_is_said_in_one_sentence(kind: str, tmp_path: Path) -> None:
    damage, words = KINDS[kind]
    path = write(tmp_path / "rain.h5")
    with h5py.File(path, "a") as file:
        damage(file)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 600


def test_what_is_merely_unusual_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "rain.h5")
    expected = read(path)
    with h5py.File(path, "a") as file:
        file.move("test", "kept")
        file["test"] = h5py.SoftLink("/kept")
        images = np.asarray(file[IMAGES], np.float64)
        replaced(IMAGES, data=images, chunks=(2, 3, 20, 7), shuffle=True, compression="gzip", fletcher32=True)(file)
        replaced(VALID, data=np.ones(FRAMES, np.uint8), compression="lzf")(file)
        stamps = [[[text] for text in row[:, 0]] for row in np.asarray(file[TIMES]).astype(str)]
        replaced(TIMES, data=stamps, dtype=h5py.string_dtype())(file)
        file.attrs["history"] = h5py.Empty("f4")
        del file.attrs["interval_minutes"]
    found = read(path)
    assert found[1:] == expected[1:]


def test_a_file_in_use_is_no_damage(tmp_path: Path) -> None:
    path = write(tmp_path / "rain.h5")
    code = f"import h5py\nwith h5py.File({str(path)!r}, 'a', locking=True): print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        writer.stdout.readline()
        with pytest.raises(UserError, match=r"rain\.h5 is locked, as another .* HDF5_USE_FILE_LOCKING=FALSE"):
            read(path)
        writer.stdin.write(b"\n")
    assert read(path)


@pytest.mark.parametrize("merged", [False, True])
def test_no_changed_byte_changes_a_number(tmp_path: Path, merged: bool) -> None:
    path = write(tmp_path / "rain.h5")
    if merged:
        merge_files([path], tmp_path / "merged.h5")
        path = tmp_path / "merged.h5"
    expected, content = read(path), path.read_bytes()
    rng = np.random.default_rng(0)
    spoilt, refused = tmp_path / "spoilt.h5", 0
    for place in rng.integers(0, len(content), 150):
        changed = bytearray(content)
        changed[place] ^= 1 << rng.integers(8)
        spoilt.write_bytes(changed)
        try:
            assert read(spoilt) == expected, place
        except UserError:
            refused += 1
    assert refused > 50


def commands(tmp_path: Path, file: Path) -> dict[str, tuple[Callable[[list[str]], int], list[str]]]:
    out, data = tmp_path / "out", ["--data.path", str(file)]
    model = ["--checkpoint", str(save_checkpoint(tmp_path / "model.ckpt", "persistence", lengths=(3, 3)))]
    split = {"data__path": file, "data__split": "test"}
    other = write(tmp_path / "other.h5")
    return {
        "pretrain": (pretrain, pretraining(out, **split)),
        "finetune": (finetune, finetuning(out, **split)),
        "evaluate": (evaluate, [*data, *model, "--out", str(out)]),
        "forecast": (forecast, [*data, *model, "--out", str(out), "--start", "every"]),
        "prepare": (
            prepare,
            ["--merge", str(other), "--test_file", str(file), "--out", f"{out}.h5"],
        ),
    }


@pytest.mark.parametrize("command", ["pretrain", "finetune", "evaluate", "forecast", "prepare"])
def test_every_command_refuses_with_code_2(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "rain.h5")
    main, argv = commands(tmp_path, path)[command]
    content = path.read_bytes()
    for kind in ("images of references", "links in a circle", "virtual", "a trillion windows", "scale of text"):
        damage, words = KINDS[kind]
        path.write_bytes(content)
        with h5py.File(path, "a") as file:
            damage(file)
        assert words in refusal(capsys, main, argv)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.h5").exists()


def test_images_that_a_model_cannot_take_are_an_ordinary_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "rain.h5")
    with h5py.File(path, "a") as file:
        replaced("train/images", data=np.zeros((8, 6, 33, 33), np.float32))(file)
        del file["train/valid"], file["train/timestamps"]
    options = {"data__path": path, "data__validation_fraction": 0.2, "data__resident": "off"}
    for more in (["--model.kind=smaat"], [], ["--model.kind=smaat", "--data.crop=20"]):
        said = refusal(capsys, finetune, finetuning(tmp_path / "out", *more, **options))
        assert "cannot be cut into patches of" in said
    assert "cannot be cut into patches" in refusal(capsys, pretrain, pretraining(tmp_path / "out", data__path=path))
