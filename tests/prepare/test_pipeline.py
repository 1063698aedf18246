"""From an archive of radar files to one HDF5 file: complete, correct, bounded in memory, or not at all."""

import gc
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest

from spatspark_fast.data.layout import read_attributes
from spatspark_fast.data.parallel import ordered_map
from spatspark_fast.data.radar.frames import Crop
from spatspark_fast.data.radar.sources import get_source
from spatspark_fast.prepare import writer
from spatspark_fast.prepare.__main__ import parse, plan_of, summary
from spatspark_fast.prepare.cutter import WindowRules
from spatspark_fast.prepare.output import OutputFile
from spatspark_fast.prepare.pipeline import Plan, Report, prepare_archive
from tests.prepare.archives import START, rain_pixels, stamp, write_archive, write_knmi

SMALL = {"crop": "0:48,0:40", "data.input_length": 3, "data.output_length": 2}


def prepare(source: str, folder: Path, out: Path, **options: Any) -> Report:
    """Prepare by the options of the command; True stands for an option without a value."""
    given = {"source": source, "data.path": folder, "out": out, **options}
    words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]
    return prepare_archive(plan_of(parse(words)))


def data_set(file: h5py.File, name: str) -> Any:
    """Return a data set of a file, whose type h5py leaves open."""
    return file[name]


def content(path: Path) -> dict[str, np.ndarray]:
    """Read all data sets of a file."""
    names = [f"{split}/{name}" for split in ("train", "test") for name in ("images", "valid", "timestamps")]
    with h5py.File(path) as file:
        return {name: data_set(file, name)[()] for name in names}


@pytest.fixture(scope="module")
def real(radar: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """Prepare KNMI's real files with default options, once."""
    out = tmp_path_factory.mktemp("real") / "knmi.h5"
    return out, prepare("knmi", radar / "knmi_201008", out)


@pytest.fixture(scope="module")
def frames(radar: Path) -> dict[str, np.ndarray]:
    """Read the same files directly: what an image should hold, by its timestamp."""
    found = {}
    for path in (radar / "knmi_201008").glob("*.h5"):
        with h5py.File(path) as file:
            pixels = data_set(file, "image1/image_data")[282:570, 225:513]
            when = datetime.strptime(path.stem[-12:], "%Y%m%d%H%M")
            found[stamp(when)] = np.where(pixels == 65535, 0.0, pixels * 0.01 / 47.83).astype(np.float32)
    return found


def test_real_values_equal_a_direct_reading(real: tuple[Path, Report], frames: dict[str, np.ndarray]) -> None:
    out, _ = real
    for split in ("train", "test"):
        with h5py.File(out) as file:
            images, stamps = data_set(file, f"{split}/images"), data_set(file, f"{split}/timestamps")
            assert images.dtype == np.float32
            assert images.chunks == (1, 24, 288, 288)
            assert images.compression == "gzip"
            for window in range(len(images)):
                names = [name.decode() for name in stamps[window, :, 0]]
                expected = np.stack([frames[name] for name in names])
                assert np.abs(images[window] - expected).max() < 1e-7


def test_real_windows_are_exactly_those_that_the_rule_keeps(
    real: tuple[Path, Report], frames: dict[str, np.ndarray]
) -> None:
    out, report = real
    names = [stamp(datetime(2010, 8, 26) + i * timedelta(minutes=5)) for i in range(92)]
    wet = [float((frames[name] > 0).mean()) for name in names]
    split = names.index(stamp(report.test_from)) if report.test_from else 92
    kept = {
        part: [i for i in range(first, last - 23) if np.mean(wet[i + 12 : i + 24]) >= 0.5]
        for part, first, last in (("train", 0, split), ("test", split, 92))
    }
    for part, expected in kept.items():
        with h5py.File(out) as file:
            stamps = data_set(file, f"{part}/timestamps")[()]
        assert stamps.shape == (len(expected), 24, 1)
        assert [names.index(first.decode()) for first in stamps[:, 0, 0]] == expected
        assert report.cut.kept[part] == len(expected) > 0


def test_real_attributes(real: tuple[Path, Report]) -> None:
    with h5py.File(real[0]) as file:
        attributes: dict[str, Any] = read_attributes(file, real[0])
    assert attributes["scale_mm_per_5min"] == 47.83
    assert attributes["units"] == "mm per 5 min, divided by scale_mm_per_5min"
    assert attributes["source"] == "knmi"
    assert attributes["crop"] == "282:570,225:513"
    assert "+proj=stere" in attributes["projection"]
    assert (attributes["x_left"], attributes["y_top"]) == (225.0, -3650.0 - 282.0)
    assert "KNMI" in attributes["licence"]
    assert attributes["software"].startswith("spatspark-fast ")


@pytest.mark.parametrize(("source", "folder"), [("mch", "mch_20160711"), ("fmi", "fmi_pgm_20160928")])
def test_other_real_sources(radar: Path, tmp_path: Path, source: str, folder: str) -> None:
    out = tmp_path / "out.h5"
    report = prepare(source, radar / folder, out, stride=8, wet_fraction=0.05)
    images = content(out)["train/images"]
    assert report.frames == 40
    assert report.cut.missing_frames == 0
    assert images.shape[1:] == (24, 288, 288)
    assert report.cut.kept["train"] == len(images) == 3
    assert images.max() * 47.83 <= report.cut.largest_depth * 1.00001
    assert 0.05 < (images > 0).mean() < 0.95


def test_gaps_duplicates_and_unreadable_files(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "in", [*range(10), *range(12, 20)])
    write_knmi(archive / "zz_again.h5", START, rain_pixels(99))
    write_knmi(archive / "hourly.h5", START, rain_pixels(99), minutes=60)
    write_knmi(archive / "other_grid.h5", START + timedelta(minutes=50), rain_pixels(99, (50, 40)))
    (archive / "broken.h5").write_bytes((archive / "zz_again.h5").read_bytes()[:3000])
    (archive / "notes.txt").write_text("hello")
    report = prepare("knmi", archive, tmp_path / "out.h5", test_fraction=0.0, **SMALL)
    assert report.files == 22
    assert report.other_files == 1
    assert report.frames == 18
    assert (report.cut.gaps, report.cut.missing_frames) == (1, 2)
    assert report.cut.kept == {"train": 6 + 4, "test": 0}
    reasons = {Path(item.path).name: item.reason for item in report.skipped}
    assert set(reasons) == {"zz_again.h5", "hourly.h5", "broken.h5", "other_grid.h5"}
    text = summary(report)
    for word in ("broken.h5: damaged HDF5", "zz_again.h5: same time", "60 minutes", "(50, 40)", "1 gaps"):
        assert word in text, text


def test_test_from_splits_by_time(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "in", list(range(30)))
    when = (START + timedelta(minutes=100)).isoformat()
    prepare("knmi", archive, tmp_path / "out.h5", test_from=when, **SMALL)
    data = content(tmp_path / "out.h5")
    train, test = (set(data[f"{split}/timestamps"].ravel()) for split in ("train", "test"))
    assert len(train) == 20
    assert len(test) == 10
    assert not train & test


def test_no_data_is_zero_and_marked(tmp_path: Path) -> None:
    archive = tmp_path / "in"
    archive.mkdir()
    pixels = rain_pixels(0)
    pixels[:10] = 65535
    for step in range(5):
        write_knmi(archive / f"{step}.h5", START + timedelta(minutes=5 * step), pixels)
    prepare("knmi", archive, tmp_path / "out.h5", test_fraction=0.0, **SMALL)
    data = content(tmp_path / "out.h5")
    assert not data["train/valid"][:, :, :10].any()
    assert data["train/valid"][:, :, 10:].all()
    assert not data["train/images"][:, :, :10].any()


def test_parallel_reading_gives_the_same_file(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "in", list(range(60)))
    for workers in (0, 2):
        prepare("knmi", archive, tmp_path / f"{workers}.h5", **{"data.num_workers": workers}, **SMALL)
    serial, parallel = content(tmp_path / "0.h5"), content(tmp_path / "2.h5")
    assert len(serial["train/images"]) > 20
    for name, array in serial.items():
        np.testing.assert_array_equal(array, parallel[name])


class SlowPool:
    """Compress a window only when the writer waits for it, so that as many are on their way as it ever lets be."""

    def __init__(self, threads: int) -> None: ...

    def submit(self, task: Callable[..., Any], *arguments: Any) -> Any:
        return SimpleNamespace(result=lambda: task(*arguments))

    def shutdown(self, **_: bool) -> None: ...


def test_memory_does_not_grow_with_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "ThreadPoolExecutor", SlowPool)  # how far threads are behind is a matter of luck
    peaks = {}
    for files in (100, 300):  # of 46 kB a frame in memory: 200 more of them would be 9 MB
        archive = write_archive(tmp_path / f"in{files}", list(range(files)), (96, 96), wet=0.0)
        plan = Plan(
            get_source("knmi"),
            archive,
            tmp_path / f"{files}.h5",
            WindowRules(stride=12, wet_fraction=0.0),
            crop=Crop(0, 96, 0, 96),
            workers=0,
        )
        gc.collect()
        tracemalloc.start()
        report = prepare_archive(plan)
        peaks[files] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert report.frames == files
        assert sum(report.cut.kept.values()) >= files // 12 - 4
    assert peaks[300] - peaks[100] < 200 * 500, peaks  # names and times: some 270 bytes a file


def test_parallel_reading_looks_ahead_a_little_and_no_further() -> None:
    drawn = 0

    def items() -> Iterator[int]:
        nonlocal drawn
        for item in range(1000):
            drawn += 1
            yield item

    results = ordered_map(sorted, items(), workers=1, batch=8)
    for expected in range(80):
        assert next(results) == expected
        assert drawn <= expected + 8 * 5
    results.close()  # pyright: ignore[reportAttributeAccessIssue]


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to see the processes")
def test_a_killed_run_leaves_no_file_and_no_process(tmp_path: Path) -> None:
    archive, out = write_archive(tmp_path / "in", list(range(90))), tmp_path / "out.h5"
    part = tmp_path / "out.h5.part"
    command = [sys.executable, "-m", "spatspark_fast.prepare", "--source=knmi", f"--data.path={archive}"]
    command += [
        f"--out={out}",
        "--crop=0:48,0:40",
        "--data.num_workers=1",
        "--data.output_length=60",
        "--wet_fraction=0",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not part.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    children = _children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert part.exists()
    assert not out.exists()
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [child for child in children if Path(f"/proc/{child}").exists()]
    prepare("knmi", archive, out, stride=50, **SMALL)
    assert out.exists()
    assert not part.exists()


def test_a_failing_run_keeps_the_old_file(tmp_path: Path) -> None:
    archive, out = write_archive(tmp_path / "in", list(range(12)), wet=0.1), tmp_path / "out.h5"
    out.write_text("precious")
    with pytest.raises(ValueError, match="exists already"):
        prepare("knmi", archive, out, **SMALL)
    with pytest.raises(ValueError, match="lower --wet_fraction"):
        prepare("knmi", archive, out, overwrite=True, **SMALL)
    assert out.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out.h5"]
    prepare("knmi", archive, out, overwrite=True, wet_fraction=0.05, **SMALL)
    assert len(content(out)["train/images"]) > 0


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
from spatspark_fast.prepare.__main__ import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    archive, out = write_archive(tmp_path / "in", list(range(16))), tmp_path / "out.h5"
    argv = ["--source=knmi", f"--data.path={archive}", f"--out={out}", "--crop=0:48,0:40", "--data.output_length=2"]
    argv += ["--data.input_length=3", "--test_fraction=0"]
    prepare("knmi", archive, out, test_fraction=0.0, **SMALL)
    size = out.stat().st_size
    out.unlink()
    # At the start, in the middle, and with the last block, which is written on closing.
    for limit in (1000, size // 2, size - 1):
        done = subprocess.run(
            [sys.executable, "-c", LIMITED, str(limit), *argv], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2, done.stderr
        assert "out.h5.part: File too large; raise the limit" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_two_runs_do_not_write_the_same_file(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    archive = write_archive(tmp_path / "in", list(range(12)))
    other = OutputFile(tmp_path / "out.h5.part")
    other.write(b"half of another run")
    with pytest.raises(ValueError, match="another run is writing"):
        prepare("knmi", archive, tmp_path / "out.h5", **SMALL)
    assert (tmp_path / "out.h5.part").read_bytes() == b"half of another run"
    other.close()
    prepare("knmi", archive, tmp_path / "out.h5", **SMALL)
    assert (tmp_path / "out.h5").exists()
