"""Importers of radar files: real files agree with pysteps, odd spellings are read, damaged files are named."""

import gzip
import importlib.util
from datetime import datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from spatspark_fast.common.errors import UserError
from spatspark_fast.data.radar import fmi, knmi, mch
from spatspark_fast.data.radar.frames import Crop, FrameError, Source, centre_crop, parse_crop
from spatspark_fast.data.radar.pysteps import pysteps_source
from spatspark_fast.data.radar.sources import get_source
from tests.prepare.archives import START, rain_pixels, write_knmi

needs_pysteps = pytest.mark.skipif(
    importlib.util.find_spec("pysteps") is None or importlib.util.find_spec("pyproj") is None,
    reason="pysteps or pyproj is not installed: no second reader to compare with",
)

# source, folder and glob of its real files, pysteps' importer with its options, time in the names, first time
REAL: list[tuple[Source, str, str, dict[str, Any], str | None, datetime]] = [
    (knmi.KNMI, "knmi_201008/*.h5", "knmi_hdf5", {}, None, datetime(2010, 8, 26)),
    (
        mch.MCH,
        "mch_20160711/*.gif",
        "mch_gif",
        {"product": "AQC", "unit": "mm", "accutime": 5.0},
        "AQC%y%j%H%M",
        datetime(2016, 7, 11, 20, 45),
    ),
    (fmi.FMI, "fmi_pgm_20160928/*.pgm.gz", "fmi_pgm", {"gzipped": True}, None, datetime(2016, 9, 28, 14, 45)),
]
NAMES = ["knmi", "mch", "fmi"]


@needs_pysteps
@pytest.mark.parametrize(("source", "files", "importer", "options", "pattern", "first"), REAL, ids=NAMES)
def test_real_files_agree_with_pysteps(
    radar: Path, source: Source, files: str, importer: str, options: dict, pattern: str | None, first: datetime
) -> None:
    other = pysteps_source(importer, options, pattern)
    paths = sorted(radar.glob(files))
    for path in (paths[0], paths[len(paths) // 2], paths[-1]):
        ours, theirs = source.read(path, None), other.read(path, None)
        np.testing.assert_array_equal(ours.rain, theirs.rain)
        np.testing.assert_array_equal(ours.valid, theirs.valid)
        assert ours.time == theirs.time == source.read_time(path)
        assert ours.rain.max() > 0.3
        a, b = source.georeference(path), other.georeference(path)
        np.testing.assert_allclose(
            [a.pixel_size_x, a.pixel_size_y, a.x_left, a.y_top],
            [b.pixel_size_x, b.pixel_size_y, b.x_left, b.y_top],
            atol=0.01,
        )
        assert a.unit == b.unit
    assert source.read_time(paths[0]) == first


@pytest.mark.parametrize(("source", "files"), [row[:2] for row in REAL], ids=NAMES)
def test_a_crop_is_a_part_of_the_image(radar: Path, source: Source, files: str) -> None:
    path = sorted(radar.glob(files))[0]
    whole = source.read(path, None)
    crop = source.crop or centre_crop(whole.image_shape)
    part = source.read(path, crop)
    assert part.rain.shape == (288, 288)
    assert part.image_shape == whole.image_shape == whole.rain.shape
    rows, columns = slice(crop.top, crop.bottom), slice(crop.left, crop.right)
    np.testing.assert_array_equal(part.rain, whole.rain[rows, columns])
    np.testing.assert_array_equal(part.valid, whole.valid[rows, columns])


def test_mch_time_comes_from_the_file_and_not_from_its_name(radar: Path, tmp_path: Path) -> None:
    real = sorted((radar / "mch_20150515").glob("*.gif"))[0]
    renamed = tmp_path / "AQC991351545F.gif"
    renamed.write_bytes(real.read_bytes())
    assert mch.read_time(renamed) == datetime(2015, 5, 15, 15, 45)


@pytest.mark.parametrize(
    ("formula", "gain", "offset"),
    [
        ("GEO=0.01*PV+0.0", 0.01, 0.0),
        ("GEO=0.010000*PV+0.000000", 0.01, 0.0),
        ("GEO = 0.010000 * PV + 0.000000", 0.01, 0.0),
        ("GEO=0.500000*PV+-32.000000", 0.5, -32.0),
        ("GEO=0.5*PV-31.5", 0.5, -31.5),
        ("geo=1e-2*pv", 0.01, 0.0),
        ("GEO=PV\0", 1.0, 0.0),
    ],
)
@pytest.mark.parametrize("style", ["bytes", "str", "array"])
def test_knmi_formula_in_every_spelling(tmp_path: Path, formula: str, gain: float, offset: float, style: str) -> None:
    assert knmi.parse_calibration(formula) == (gain, offset)
    pixels = rain_pixels(1)
    if "\0" in formula and style != "bytes":
        formula = formula.strip("\0")
    frame = knmi.read_frame(write_knmi(tmp_path / "a.h5", START, pixels, formula=formula, style=style))
    np.testing.assert_allclose(frame.rain, np.maximum(gain * pixels + offset, 0.0), rtol=1e-6)
    assert frame.time == START
    assert knmi.read_georeference(tmp_path / "a.h5").projection == "+proj=stere +lat_0=90 +x_0=0 +y_0=0"


@pytest.mark.parametrize("formula", ["GEO=0.01*PV*PV", "R=0.01*PV+0", "", "GEO=a*PV+b"])
def test_unknown_knmi_formula_is_quoted(tmp_path: Path, formula: str) -> None:
    path = write_knmi(tmp_path / "a.h5", START, rain_pixels(1), formula=formula)
    with pytest.raises(FrameError, match="calibration formula"):
        knmi.read_frame(path)


@pytest.mark.parametrize(
    ("missing", "outside", "lost"),
    [(65534, 65535, {65534, 65535}), (65535, 65535, {65535}), (None, None, {65535}), (0, 65535, {0, 65535})],
)
def test_knmi_no_data_codes(tmp_path: Path, missing: int | None, outside: int | None, lost: set[int]) -> None:
    pixels = np.array([[0, 5, 65533], [65534, 65535, 7]], dtype=np.uint16)
    frame = knmi.read_frame(write_knmi(tmp_path / "a.h5", START, pixels, missing=missing, outside=outside))
    np.testing.assert_array_equal(frame.valid, ~np.isin(pixels, list(lost)))
    np.testing.assert_allclose(frame.rain, np.where(frame.valid, 0.01 * pixels, 0.0), rtol=1e-6)


def test_knmi_reflectivity_becomes_rain(tmp_path: Path) -> None:
    pixels = np.array([[0, 109, 141], [173, 255, 0]], dtype=np.uint8)
    path = write_knmi(tmp_path / "a.h5", START, pixels, "GEO=0.5*PV-31.5", 255, 255, "REFLECTIVITY_[DBZ]", minutes=None)
    frame = knmi.read_frame(path)
    np.testing.assert_allclose(frame.rain * 12, [[0, 1, 10], [100, 0, 0]], rtol=2e-3)
    np.testing.assert_array_equal(frame.valid, pixels != 255)


def _remove(path: Path, name: str) -> None:
    with h5py.File(path, "a") as file:
        del file[name]


def _damage(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("options", "spoil", "word"),
    [
        ({}, _damage, "damaged HDF5"),
        ({}, lambda path: path.write_bytes(b""), "not an HDF5"),
        ({}, lambda path: path.write_text("hello"), "not an HDF5"),
        ({}, lambda path: _remove(path, "image1"), "no group 'image1'"),
        ({}, lambda path: _remove(path, "image1/image_data"), "no data set 'image1/image_data'"),
        ({}, lambda path: _remove(path, "overview"), "no group 'overview'"),
        ({"minutes": 60.0}, None, "accumulated over 60 minutes"),
        ({"minutes": -5.0}, None, "accumulated over -5 minutes"),
        ({"quantity": "ECHO_TOP_[KM]"}, None, "ECHO_TOP"),
        ({"pixels": np.zeros((2, 3, 4), np.uint16)}, None, r"\(2, 3, 4\)"),
        ({"pixels": np.zeros((2, 3), np.float32)}, None, "float32"),
    ],
)
def test_damaged_or_other_knmi_files_are_named(tmp_path: Path, options: dict, spoil, word: str) -> None:
    options = {"pixels": rain_pixels(1)} | options
    path = write_knmi(tmp_path / "a.h5", START, options.pop("pixels"), **options)
    if spoil:
        spoil(path)
    with pytest.raises(FrameError, match=word):
        knmi.read_frame(path)


def test_damaged_mch_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "AQC151351545F.gif"
    path.write_text("no image")
    with pytest.raises(FrameError, match="not a readable GIF"):
        mch.read_frame(path)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(path, comment=b"PRDT=RZC151351545")
    with pytest.raises(FrameError, match="product RZC"):
        mch.read_frame(path)
    nameless = tmp_path / "picture.gif"
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(nameless)
    with pytest.raises(FrameError, match="neither the GIF comment"):
        mch.read_time(nameless)


def test_mch_index_scale(tmp_path: Path) -> None:
    index = np.arange(256, dtype=np.uint8).reshape(16, 16)  # all values, or the writer renumbers them
    path = tmp_path / "CPC151351545F.gif"
    Image.fromarray(index).save(path)
    frame = mch.read_frame(path)
    rain = frame.rain.reshape(-1)
    assert rain[100] == pytest.approx((10 ** ((100 - 71.5) / 20) / 316) ** (1 / 1.5), rel=1e-5)
    assert rain[151] * 12 == pytest.approx(115.6, abs=0.1)
    assert not rain[:2].any()
    assert not rain[251:].any()
    assert (np.diff(rain[2:251]) > 0).all()
    np.testing.assert_array_equal(frame.valid, index != 255)


def _pgm(header: str = "", size: str = "3 2", pixels: bytes = bytes(6)) -> bytes:
    comments = header or "# obstime 201609281445\n# param CorrectedReflectivity\n"
    return b"P5\n" + comments.encode() + f"{size}\n255\n".encode() + pixels


@pytest.mark.parametrize("packed", [True, False])
def test_fmi_levels(tmp_path: Path, packed: bool) -> None:
    path = tmp_path / "a.pgm.gz"
    content = _pgm(pixels=bytes([0, 64, 144, 255, 1, 184]))
    path.write_bytes(gzip.compress(content) if packed else content)
    frame = fmi.read_frame(path)
    expected = [[0.0, (1 / 223) ** (1 / 1.53), (10**4 / 223) ** (1 / 1.53)], [0, 0, (10**6 / 223) ** (1 / 1.53)]]
    np.testing.assert_allclose(frame.rain * 12, expected, rtol=1e-5, atol=2e-3)
    np.testing.assert_array_equal(frame.valid, [[1, 1, 1], [0, 1, 1]])
    assert fmi.read_georeference(path).projection == ""


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"P2\n1 1\n255\n0\n", "P5"),
        (b"", "P5"),
        (gzip.compress(_pgm(), mtime=0)[:-12], "not a readable PGM"),
        (_pgm(pixels=bytes(5)), "5 bytes of pixels"),
        (_pgm("# obstime 201609281445\n# param Velocity\n"), "Velocity"),
        (_pgm("# param CorrectedReflectivity\n"), "obstime"),
        (_pgm(size="3 2 1"), "columns, rows and 255"),
        (b"P5\n" + b"# x\n" * 10000, "no size"),
        (b"P5\nabc\n", "unexpected line"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_fmi_files_are_named(tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "a.pgm"
    path.write_bytes(content)
    with pytest.raises(FrameError, match=word):
        fmi.read_frame(path)


def test_a_crop_outside_the_image_is_an_error(tmp_path: Path) -> None:
    path = write_knmi(tmp_path / "a.h5", START, rain_pixels(1))
    with pytest.raises(FrameError, match="48 rows and 40 columns"):
        knmi.read_frame(path, Crop(0, 49, 0, 40))


def test_crops() -> None:
    assert parse_crop(" 282:570, 225:513") == Crop(282, 570, 225, 513) == knmi.KNMI.crop
    assert centre_crop((640, 710)).shape == (288, 288)
    assert centre_crop((100, 710)) == Crop(0, 100, 211, 499)
    for text in ("1:2", "2:1,0:3", "-1:3,0:3", "a:b,c:d", "0:0,0:5"):
        with pytest.raises(UserError, match="--crop"):
            parse_crop(text)


def test_pysteps_is_asked_for_only_when_needed_and_named_when_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pysteps", None)
    monkeypatch.setitem(sys.modules, "pysteps.io.interface", None)
    assert get_source("knmi").name == "knmi"
    with pytest.raises(UserError, match=r'pip install "spatspark-fast\[radar\]"'):
        get_source("odim_hdf5")


@needs_pysteps
def test_unknown_source_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'nowhere' is unknown; known are knmi, mch, fmi.*odim_hdf5"):
        get_source("nowhere")


@needs_pysteps
def test_what_pysteps_cannot_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x_201601010000.h5"
    path.write_text("nothing")
    source = get_source("odim_hdf5")
    with pytest.raises(FrameError, match="pysteps' odim_hdf5 cannot read it"):
        source.read(path, None)
    assert capsys.readouterr().out == ""


def test_options_of_importers_are_refused_elsewhere() -> None:
    with pytest.raises(UserError, match="--importer_options"):
        get_source("knmi", {"qty": "DBZH"})
