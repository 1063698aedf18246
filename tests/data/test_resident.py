"""Windows in memory are those of the file, wherever they stay; the uncompressed copy is right or made anew."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from spatspark_fast.common.errors import UserError
from spatspark_fast.data.augment import Augmentation
from spatspark_fast.data.nl50 import NowcastDataset
from spatspark_fast.data.reader import Reader
from spatspark_fast.data.resident import cache, places
from spatspark_fast.data.resident.cache import NoRoomError, unpacked
from spatspark_fast.data.resident.places import OnDevice, OnHost, Place, SentAhead, choose_place
from spatspark_fast.data.resident.store import Encoding, decode, encode, in_memory
from spatspark_fast.data.synthetic import SyntheticRadar
from spatspark_fast.data.windows import WholeWindows
from spatspark_fast.training.feed import open_store
from spatspark_fast.training.options import DataOptions
from spatspark_fast.training.stream import BatchStream

CPU = torch.device("cpu")
SCALE = 47.83
PLACES = [
    OnHost,
    lambda windows, augmentation: OnDevice(windows, augmentation, CPU),
    lambda windows, augmentation: SentAhead(windows, augmentation, CPU),
]
TREATED: dict[str, Any] = {"crop": 24, "flip": True, "quarter_turns": True}


def depths(windows: int, frames: int = 5, size: tuple[int, int] = (40, 48)) -> np.ndarray:
    """Return rain in whole hundredths of a millimetre, divided by the scale in float32 as ``prepare`` does it."""
    hundredths = np.random.default_rng(windows).gamma(0.3, 80, (windows, frames, *size)).round()
    return (hundredths * 0.01).astype(np.float32) / np.float32(SCALE)


def write(path: Path, images: np.ndarray, scale: float = SCALE, valid: np.ndarray | None = None) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("train/images", data=images, compression="gzip", chunks=(1, *images.shape[1:]))
        if valid is not None:
            file.create_dataset("train/valid", data=valid, compression="gzip", chunks=(1, *images.shape[1:]))
        file.attrs["scale_mm_per_5min"] = scale
    return path


def open_file(path: Path, **options: Any) -> WholeWindows:
    return WholeWindows(NowcastDataset(path, input_length=4, output_length=0, seed=3, **options))


def stream_of(windows: WholeWindows, place: Place | None = None, seed: int = 0) -> BatchStream:
    """Return batches of two of all windows, out of a place or read from the file."""
    return BatchStream(place or Reader(windows), range(len(windows)), 2, seed=seed)


def all_batches(stream: BatchStream, epochs: int = 2) -> list[dict[str, Any]]:
    return [batch for _ in range(epochs) for batch in stream]


@pytest.mark.parametrize("options", [{}, TREATED, {"crop": (16, 32), "flip": True}])
@pytest.mark.parametrize("place", PLACES)
def test_every_place_serves_what_the_file_serves(tmp_path: Path, options: dict[str, Any], place: Callable) -> None:
    windows = open_file(write(tmp_path / "a.h5", depths(11)), **options)
    kept = unpacked(windows, tmp_path / "cache")
    assert kept.encoding.unit == pytest.approx(0.01 / SCALE)
    assert kept.codes.dtype == np.uint16
    read, held = (all_batches(stream_of(windows, p, seed=1)) for p in (None, place(kept, windows.augmentation)))
    assert len(read) == len(held) == 10
    for a, b in zip(read, held, strict=True):
        assert torch.equal(a["index"], b["index"])
        assert (a["position"], b["input"].dtype) == (b["position"], torch.float32)
        torch.testing.assert_close(b["input"], a["input"], rtol=2.0**-22, atol=0)
    assert any(not torch.equal(held[0]["input"], batch["input"]) for batch in held[1:])


@pytest.mark.parametrize("options", [{}, TREATED])
@pytest.mark.parametrize("off_the_grid", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_every_place_serves_frames_to_come_with_their_gaps(
    tmp_path: Path, options: dict[str, Any], off_the_grid: bool, place: Callable
) -> None:
    """Pixels without data are NaN in the two last frames, and 0 as in the file in the three before."""
    images, valid = depths(11), np.random.default_rng(1).random((11, 5, 40, 48)) < 0.9
    images[~valid] = 0
    if off_the_grid:
        images[7] *= 1.01
    path = write(tmp_path / "a.h5", images, valid=valid)
    windows = WholeWindows(NowcastDataset(path, input_length=3, include_valid=True, **options))
    kept = unpacked(windows, tmp_path / "cache")
    assert kept.codes.dtype == (np.float32 if off_the_grid else np.uint16)
    again = unpacked(windows, tmp_path / "cache")
    numbers = [0, 2, 3, 7, 9, 10]
    places = Reader(windows), place(kept, windows.augmentation), place(again, windows.augmentation)
    read, held, mapped = (all_batches(BatchStream(p, numbers, 2, seed=1)) for p in places)
    assert sorted(int(i) for batch in read[:3] for i in batch["index"]) == numbers
    for a, b, c in zip(read, held, mapped, strict=True):
        assert torch.equal(a["index"], b["index"])
        assert a["input"][:, 3:].isnan().any()
        assert not a["input"][:, :3].isnan().any()
        torch.testing.assert_close(b["input"], a["input"], rtol=2.0**-22, atol=0, equal_nan=True)
        torch.testing.assert_close(c["input"], b["input"], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("place", PLACES)
def test_values_off_the_grid_are_kept_bit_by_bit(tmp_path: Path, place: Callable) -> None:
    images = depths(9)
    images[7] *= 1.01  # found late: the first, the middle and the last window lie on the grid
    windows = open_file(write(tmp_path / "a.h5", images), **TREATED)
    said: list[str] = []
    kept = unpacked(windows, tmp_path / "cache", say=said.append)
    assert (kept.encoding, kept.codes.dtype) == (Encoding(None), np.float32)
    assert [word for text in said for word in ("uint16", "float32") if word in text] == ["uint16", "float32"]
    for a, b in zip(
        all_batches(stream_of(windows)),
        all_batches(stream_of(windows, place(kept, windows.augmentation))),
        strict=True,
    ):
        assert torch.equal(a["input"], b["input"])


def test_synthetic_radar_is_kept_bit_by_bit() -> None:
    windows = SyntheticRadar(3, 4, 0, 64)
    kept = in_memory(WholeWindows(windows))
    assert kept.codes.dtype == np.uint16
    for place in PLACES:
        (batch,) = place(kept, Augmentation()).batches([[(0, 2), (5, 0)]])
        assert torch.equal(batch, torch.stack([windows[2]["input"], windows[0]["input"]]))


def test_real_knmi_rain_fits_16_bits(radar: Path) -> None:
    """Every value of KNMI's files is a whole number of hundredths; a tenth of a unit off is seen."""
    from spatspark_fast.data.radar.knmi import KNMI

    path = sorted((radar / "knmi_201008").glob("*.h5"))[10]
    rain = KNMI.read(path, None).rain.astype(np.float32) / np.float32(SCALE)
    codes = encode(rain, 0.01 / SCALE)
    assert codes is not None
    assert codes.max() > 50
    np.testing.assert_allclose(decode(codes, Encoding(0.01 / SCALE)), rain, rtol=2.0**-22, atol=0)
    assert encode(rain * np.float32(1.001), 0.01 / SCALE) is None


@pytest.mark.parametrize(
    ("values", "fits"),
    [([0.0, 0.01, 327.67], True), ([327.68], False), ([0.005], False), ([0.0100001], False), ([1e-9], False)],
)
def test_what_fits_16_bits(values: list[float], fits: bool) -> None:
    codes = encode(np.array(values, np.float32), 0.01)
    assert (codes is not None) == fits
    if codes is not None:
        np.testing.assert_allclose(decode(codes, Encoding(0.01)), np.array(values, np.float32), rtol=2.0**-22)


def test_a_resumed_stream_takes_up_its_place(tmp_path: Path) -> None:
    windows = open_file(write(tmp_path / "a.h5", depths(11)), **TREATED)
    place = OnHost(unpacked(windows, tmp_path / "cache"), windows.augmentation)
    whole = all_batches(stream_of(windows, place, seed=1), epochs=3)
    later = stream_of(windows, place, seed=1)
    later.load_state_dict({"position": 7})
    for a, b in zip(whole[7:], all_batches(later), strict=True):
        assert a["position"] == b["position"]
        assert torch.equal(a["input"], b["input"])
        assert torch.equal(a["index"], b["index"])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a file of windows whose uncompressed copy lies in ``cache``."""
    path = write(tmp_path / "a.h5", depths(6))
    unpacked(open_file(path), tmp_path / "cache")
    return path


def copy_of(source: Path) -> Path:
    (path,) = (source.parent / "cache").glob("*.windows")
    return path


def expected(source: Path) -> np.ndarray:
    windows = open_file(source)
    return np.stack([windows.untreated(i) for i in range(len(windows))])


def test_the_copy_is_made_once(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_again(self: NowcastDataset, index: int) -> np.ndarray:
        raise AssertionError("the file was read again")

    truth = expected(source)
    monkeypatch.setattr(NowcastDataset, "whole", read_again)
    kept = unpacked(open_file(source), source.parent / "cache")
    np.testing.assert_allclose(decode(kept.codes, kept.encoding), truth, rtol=2.0**-22)
    assert isinstance(kept.codes, np.memmap)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5000])


def one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[cache.HEADER + 70001] ^= 4
    path.write_bytes(content)


def other_header(path: Path) -> None:
    path.write_bytes(b"{}".ljust(cache.HEADER) + path.read_bytes()[cache.HEADER :])


def no_json(path: Path) -> None:
    path.write_bytes(os.urandom(6000))


def nothing(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("spoil", [cut, one_bit, other_header, no_json, nothing])
def test_a_damaged_copy_is_made_anew(source: Path, spoil: Callable[[Path], None]) -> None:
    good = copy_of(source).read_bytes()
    spoil(copy_of(source))
    kept = unpacked(open_file(source), source.parent / "cache")
    np.testing.assert_allclose(decode(kept.codes, kept.encoding), expected(source), rtol=2.0**-22)
    assert copy_of(source).read_bytes() == good


def test_a_changed_source_is_read_anew(source: Path) -> None:
    before = source.stat()
    write(source, depths(6)[::-1].copy())
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    kept = unpacked(open_file(source), source.parent / "cache")
    np.testing.assert_allclose(decode(kept.codes, kept.encoding), expected(source), rtol=2.0**-22)


def test_a_killed_writer_leaves_no_copy_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = open_file(write(tmp_path / "a.h5", depths(20)))
    read = NowcastDataset.whole

    def killed(self: NowcastDataset, index: int) -> np.ndarray:
        if index == 12:
            raise KeyboardInterrupt
        return read(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(NowcastDataset, "whole", killed)
        with pytest.raises(KeyboardInterrupt):
            unpacked(windows, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.windows"))
    kept = unpacked(windows, tmp_path / "cache")
    stale = tmp_path / "cache" / f".{copy_of(tmp_path / 'a.h5').name}.killed.tmp"
    stale.write_bytes(b"half")
    cut(copy_of(tmp_path / "a.h5"))
    unpacked(windows, tmp_path / "cache")
    assert not stale.exists()
    assert len(kept) == 20


def test_processes_decompress_together(tmp_path: Path) -> None:
    windows = open_file(write(tmp_path / "a.h5", depths(20)))
    kept = unpacked(windows, tmp_path / "cache", workers=2)
    np.testing.assert_allclose(decode(kept.codes, kept.encoding), expected(tmp_path / "a.h5"), rtol=2.0**-22)


def test_a_bad_window_is_named_and_no_copy_stays(tmp_path: Path) -> None:
    images = depths(9)
    images[5, 1, 2, 3] = np.nan
    windows = open_file(write(tmp_path / "a.h5", images))
    with pytest.raises(UserError, match=r"a\.h5, train window 5 holds .*not finite"):
        unpacked(windows, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.windows"))


def full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1 << 20})())
    return folder / "cache"


def a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (folder / "cache").write_text("in the way")
    return folder / "cache"


@pytest.mark.parametrize("make", [full_disk, a_file])
def test_without_room_the_file_is_read_window_by_window_unless_asked_otherwise(
    make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = open_file(write(tmp_path / "a.h5", depths(6)))
    said: list[str] = []
    config = DataOptions(path=str(tmp_path / "a.h5"), input_length=4, cache=str(make(tmp_path, monkeypatch)))
    assert open_store(config, windows, said.append) is None
    assert "window by window" in said[-1]
    config.resident = "host"
    with pytest.raises(NoRoomError, match=r"--data\.cache"):
        open_store(config, windows, said.append)
    config.resident = "off"
    assert open_store(config, windows, said.append) is None


def test_the_place_follows_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(places, "free_memory", lambda device: 3000)
    assert [choose_place("auto", size, gpu) for size in (1000, 1001)] == ["device", "host"]
    assert [choose_place(asked, 10**9, gpu) for asked in ("device", "host")] == ["device", "host"]
    assert [choose_place(asked, 1, CPU) for asked in ("auto", "device", "host")] == ["host"] * 3


def test_free_memory_is_measured() -> None:
    assert 1 << 20 < places.free_memory(CPU) <= 1 << 50


def test_an_error_ahead_reaches_the_reader() -> None:
    def work(job: int) -> int:
        if job == 3:
            raise UserError("three")
        return job

    results = places.ahead(range(10), work)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="three"):
        next(results)


def test_a_stream_that_is_left_early_stops_reading_ahead() -> None:
    done: list[int] = []
    results = places.ahead(range(1000), lambda job: done.append(job) or job)
    next(results)
    results.close()
    assert len(done) <= 1 + places.AHEAD + 1
