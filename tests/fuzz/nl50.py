"""Damaged NL-50 files: bytes changed, and structures that no command writes, read by all that read such files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, cast

import h5py
import numpy as np

from spatspark_fast.data.nl50 import NowcastDataset
from spatspark_fast.evaluate.__main__ import main as evaluate
from spatspark_fast.finetune.__main__ import main as finetune
from spatspark_fast.forecast.__main__ import main as forecast
from spatspark_fast.prepare.__main__ import main as prepare_command
from spatspark_fast.prepare.cutter import Window
from spatspark_fast.prepare.writer import NL50Writer
from spatspark_fast.pretrain.__main__ import main as pretrain

from ..finetune.runs import arguments as finetune_arguments
from ..forecast.forecasts import moving_rain, save_checkpoint
from ..pretrain.runs import arguments as pretrain_arguments
from .damage import VALUES, damaged
from .outcomes import Suite, Verdict, judge_call, judge_command, wrong

FRAMES, SIDE, SCALE = 6, 64, 47.83
SPLITS = {"train": 3, "test": 2}
START = datetime(2020, 6, 1, 12, 0, tzinfo=timezone.utc).replace(tzinfo=None)
MANY = 20  # windows that are read of a file which says that it has more
MOST = 1000.0  # data value, 47.83 m of rain in 5 minutes: no file of rain holds more


def prepare(folder: Path) -> None:
    """Write a file as `prepare` does, what is in it, and a small forecaster."""
    rates = moving_rain(sum(SPLITS.values()), FRAMES, SIDE, SIDE)
    rates[rates < 8] = 0  # mostly dry, so that little of the file is rain and much is structure
    with NL50Writer(folder / "whole.h5", (FRAMES, SIDE, SIDE), SCALE) as writer:
        for number, window in enumerate(rates):
            times = [START + timedelta(hours=number, minutes=5 * frame) for frame in range(FRAMES)]
            split = "train" if number < SPLITS["train"] else "test"
            writer.add(Window(split, times, window / 12, np.ones(window.shape, bool)))
        writer.set_attributes({"scale_mm_per_5min": SCALE, "interval_minutes": 5.0, "input_length": 3})
    np.savez(folder / "whole.npz", allow_pickle=False, **content(folder / "whole.h5"))
    save_checkpoint(folder / "persistence.ckpt", "persistence", lengths=(3, 3))


def attempt(random: Random, folder: Path, scratch: Path) -> Verdict:
    """Damage the file and read it."""
    path = scratch / "rain.h5"
    whole = folder / "whole.h5"
    if edited := random.random() < 0.5:
        path.write_bytes(whole.read_bytes())
        _edited_apart(random, path)
    else:
        path.write_bytes(damaged(random, whole.read_bytes()))
    if random.random() < 0.85:
        return judge_call(partial(_read, path, None if edited else folder / "whole.npz"))
    return judge_command(*random.choice(COMMANDS)(path, folder, scratch))


def _edited_apart(random: Random, path: Path) -> None:
    """Edit a file in a process of its own: HDF5 is not whole again after each edit that it refuses."""
    child = os.fork()
    if child == 0:
        try:
            for _ in range(random.choice((1, 1, 1, 2, 3))):
                edit(random, path)
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def content(path: Path) -> dict[str, np.ndarray]:
    """Return all that a training or an evaluation takes from a file."""
    found: dict[str, np.ndarray] = {}
    for split in SPLITS:
        windows = NowcastDataset(path, split, input_length=3, include_valid=True)
        shown = range(len(windows))[:MANY]
        items = [windows[index] for index in shown]
        for name in ("input", "target", "valid"):
            found[f"{split} {name}"] = np.stack([item[name].numpy() for item in items])
        stamps = [[str(time) for time in windows.times(index)] for index in shown]
        found[f"{split} times"] = np.array(stamps)
        found[f"{split} scale"] = np.array(windows.scale)
        windows.close()
    return found


def _read(path: Path, truth: Path | None) -> Verdict | None:
    found = content(path)
    for name, values in found.items():
        if name.endswith(("input", "target")) and not (np.isfinite(values) & (values >= 0) & (values <= MOST)).all():
            return wrong(f"{name}: values that are no rain")
    if truth is None:
        return None
    whole = np.load(truth)
    for name, values in found.items():
        if values.shape != whole[name].shape or not np.array_equal(values, whole[name]):
            return wrong(f"{name} is not what was written")
    return None


def _pretrain(path: Path, folder: Path, scratch: Path) -> Any:
    return pretrain, pretrain_arguments(scratch / "out", data__path=path, data__num_workers=0, trainer__max_steps=1)


def _finetune(path: Path, folder: Path, scratch: Path) -> Any:
    return finetune, finetune_arguments(scratch / "out", data__path=path, data__num_workers=0, trainer__max_steps=1)


def _evaluate(path: Path, folder: Path, scratch: Path) -> Any:
    return evaluate, [f"--data.path={path}", f"--out={scratch / 'out'}", "--panels=0", "--spectrum=false"]


def _forecast(path: Path, folder: Path, scratch: Path) -> Any:
    words = [f"--checkpoint={folder / 'persistence.ckpt'}", f"--out={scratch / 'out'}", "--pictures=false"]
    return forecast, [f"--data.path={path}", *words]


def _merge(path: Path, folder: Path, scratch: Path) -> Any:
    return prepare_command, ["--merge", str(folder / "whole.h5"), str(path), f"--out={scratch / 'out.h5'}"]


def _merge_into(path: Path, folder: Path, scratch: Path) -> Any:
    return prepare_command, ["--merge", str(path), f"--out={scratch / 'out.h5'}"]


COMMANDS = [_pretrain, _finetune, _evaluate, _forecast, _forecast, _merge, _merge_into]


def edit(random: Random, path: Path) -> None:
    """Change the structure or the values of a file through HDF5; an edit that HDF5 refuses leaves it as it is."""
    with h5py.File(path, "a") as file:
        names: list[str] = ["/"]
        file.visit(names.append)
        with contextlib.suppress(*REFUSALS):
            random.choice(EDITS)(random, file, random.choice(names))


REFUSALS = (MemoryError, ValueError, TypeError, KeyError, OSError, RuntimeError, AttributeError, OverflowError)


def _remove(random: Random, file: h5py.File, name: str) -> None:
    del file[name]


def _set_attribute(random: Random, file: h5py.File, name: str) -> None:
    known = ("scale_mm_per_5min", "interval_minutes", "input_length", "output_length", "units")
    value: Any = random.choice([*VALUES, np.array([1.0, 2.0]), np.float32(1), h5py.Empty("f4"), np.array(["a"], "S1")])
    (file if random.random() < 0.8 else file[name]).attrs[random.choice(known)] = value


def _replace(random: Random, file: h5py.File, name: str) -> None:
    """Put another kind of object in the place of one."""
    name = random.choice([name, "train/images", "test/images", "train/valid", "test/timestamps"])
    shape = random.choice(SHAPES)
    kind = random.choice(("f4", "f8", "f2", "i4", "u1", "?", "c8", "S5", "S0", ">f4", "f4,i4", "O", "M8[s]", "V3"))
    del file[name]
    match random.randrange(6):
        case 0:
            file.create_group(name)
        case 1:
            file.create_dataset(name, shape, h5py.string_dtype() if kind == "O" else kind)
        case 2:  # nothing of it is stored: the file says it is long
            file.create_dataset(name, shape, kind, chunks=True, maxshape=(None,) * len(shape), compression="gzip")
        case 3:
            file[name] = h5py.Empty("f4")
        case 4:
            file[name] = np.random.default_rng(random.randrange(99)).random(shape).astype("f4")
        case _:
            file[name] = np.dtype("f4")


def _link(random: Random, file: h5py.File, name: str) -> None:
    name = random.choice([name, "train", "train/images", "test/images", "test/valid"])
    targets = [
        *(h5py.SoftLink(target) for target in ("/no", "/train", "/", f"/{name}", "/train/images", ".")),
        *(h5py.ExternalLink(other, "/train") for other in ("no.h5", "rain.h5", ".", "/dev/null", "")),
        *(file[other] for other in ("/", "train")),
    ]
    del file[name]
    file[name] = random.choice(targets)


def _elsewhere(random: Random, file: h5py.File, name: str) -> None:
    """Make a data set whose values lie in another file, or are packed by a filter that is not there."""
    name = random.choice(("train/images", "test/images", "train/valid"))
    shape, properties = cast(h5py.Dataset, file[name]).shape, h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    del file[name]
    match random.randrange(3):
        case 0:
            layout = h5py.VirtualLayout(shape, "f4")
            layout[:] = h5py.VirtualSource(random.choice(("no.h5", "rain.h5")), "train/images", shape)
            file.create_virtual_dataset(name, layout, fillvalue=random.choice((0, -1, np.nan)))
        case 1:
            file.create_dataset(name, shape, "f4", external=[("no.raw", 0, h5py.h5f.UNLIMITED)])
        case _:
            properties.set_chunk((1, *shape[1:]))
            properties.set_filter(random.choice((307, 32001, 32004, 40000)), h5py.h5z.FLAG_OPTIONAL, ())
            space = h5py.h5s.create_simple(shape)
            h5py.h5d.create(file.id, name.encode(), h5py.h5t.IEEE_F32LE, space, properties)
            cast(h5py.Dataset, file[name]).id.write_direct_chunk(
                (0,) * len(shape), random.randbytes(99), random.choice((0, 1))
            )


def _values(random: Random, file: h5py.File, name: str) -> None:
    """Put a value that is no rain somewhere."""
    data: Any = file[random.choice(("train/images", "test/images"))]
    place = tuple(random.randrange(side) for side in data.shape)
    data[place] = random.choice((np.nan, np.inf, -np.inf, -1e-30, -1.0, 3e38, 1e30, 1e9, 1e-45, -0.0))


def _stamps(random: Random, file: h5py.File, name: str) -> None:
    data: Any = file[random.choice(("train/timestamps", "test/timestamps"))]
    place = tuple(random.randrange(side) for side in data.shape)
    data[place] = random.choice(
        (b"", b"\xff\xfe", b"99-XXX-2020", b"0" * 24, b"01-JAN-0000 00:00:00", b"31-FEB-2020", b"\0a")
    )


def _resize(random: Random, file: h5py.File, name: str) -> None:
    data: Any = file[
        random.choice([f"{split}/{kind}" for split in SPLITS for kind in ("images", "valid", "timestamps")])
    ]
    if len(data) < 10**6:  # HDF5 goes through all rows that it drops
        data.resize(random.choice((0, 1, 2, 5, 10**4, 2**40)), axis=0)


def _chunk(random: Random, file: h5py.File, name: str) -> None:
    """Write the bytes of a chunk that say something else, or nothing."""
    data = cast(h5py.Dataset, file[random.choice(("train/images", "test/valid", "train/timestamps"))])
    place = (0,) * data.ndim
    _, stored = data.id.read_direct_chunk(place)
    data.id.write_direct_chunk(place, random.choice((b"", damaged(random, stored), random.randbytes(64))))


def _depth(random: Random, file: h5py.File, name: str) -> None:
    """Make the images a number format that is wider or narrower than the usual one."""
    name = random.choice(("train/images", "test/images"))
    values = np.asarray(cast(h5py.Dataset, file[name])[()])
    del file[name]
    file[name] = values.astype(random.choice(("f2", "f8", ">f4", "f16", "i2", "u1"))) * random.choice((1, 1000, -1))


SHAPES: list[tuple[int, ...]] = [
    *((), (0,), (3,), (3, 6, 64), (0, 6, 64, 64), (3, 0, 64, 64), (3, 6, 0, 64), (3, 6, 33, 33), (3, 6, 64, 64, 1)),
    *((3, 1, 64, 64), (3, 6, 64, 65), (1, 6, 64, 64), (3, 6, 1, 1), (2**31, 6, 64, 64), (3, 6, 2**20, 2**20)),
    *((2**40, 1, 1, 1), (3, 2**33, 1, 1), (3, 6, 64), (3, 6, 32, 32), (1,) * 20, (2, 6, 1, 64), (3, 7, 64, 64)),
]
EDITS: list[Callable[[Random, h5py.File, str], None]] = [
    *(_remove, _set_attribute, _set_attribute, _replace, _replace, _link, _elsewhere, _values, _stamps, _resize),
    *(_chunk, _depth),
]
SUITE = Suite(prepare, attempt)
