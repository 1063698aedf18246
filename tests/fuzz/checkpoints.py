"""Damaged and edited checkpoints and encoder files, read by all that read weights."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from spatspark_fast.finetune.__main__ import main as finetune
from spatspark_fast.finetune.initial import read_initial
from spatspark_fast.forecast.__main__ import main as forecast
from spatspark_fast.models.backbones import build_encoder, load_encoder
from spatspark_fast.models.registry import load_forecaster
from spatspark_fast.pretrain.__main__ import main as pretrain
from spatspark_fast.training.checkpoints import read_checkpoint

from ..finetune.runs import arguments as finetune_arguments
from ..forecast.forecasts import moving_rain, write_windows
from ..pretrain.runs import arguments as pretrain_arguments
from ..pretrain.runs import same
from .damage import VALUES, damaged
from .outcomes import Suite, Verdict, judge_call, judge_command, wrong

FORECASTER, PRETRAINED, ENCODER = "fine/checkpoints/last.ckpt", "pre/checkpoints/last.ckpt", "pre/encoder.safetensors"
QUICK: dict[str, Any] = {"trainer__max_steps": 1, "trainer__picture_every": 0}
MARK = "code-ran"


def prepare(folder: Path) -> None:
    """Pretrain and finetune for a step each; write windows to forecast from."""
    assert pretrain(pretrain_arguments(folder / "pre", **QUICK, model__decoder_width=8)) == 0
    init = folder / PRETRAINED
    assert finetune(finetune_arguments(folder / "fine", init=init, trainer__max_steps=1, trainer__epochs=1)) == 0
    write_windows(folder / "rain.h5", moving_rain(1, 6, 64, 64))


def attempt(random: Random, folder: Path, scratch: Path) -> Verdict:
    """Damage or edit one of the files, and read it."""
    source = folder / random.choice((FORECASTER, PRETRAINED, ENCODER))
    path = scratch / source.name
    content = source.read_bytes()
    kind = random.choice(("bytes", "bytes", "edit", "edit", "code"))
    if kind == "bytes":
        path.write_bytes(damaged(random, content))
    elif kind == "code":
        path.write_bytes(_with_code(random, content, source.suffix == ".ckpt"))
    elif source.suffix == ".ckpt":
        _edit_checkpoint(random, source, path)
    else:
        path.write_bytes(_edited_safetensors(random, source))
    if random.random() < 0.12:
        verdict = judge_command(*random.choice(COMMANDS)(path, folder, scratch))
    else:
        reader = _read_encoder if source.suffix == ".safetensors" else random.choice(READERS)
        verdict = judge_call(partial(reader, path, source if kind == "bytes" else None))
    return wrong("code of the file ran") if (scratch / MARK).exists() else verdict


def _read_training(path: Path, source: Path | None) -> Verdict | None:
    found = read_checkpoint(path)
    if source is None:
        return None
    whole = read_checkpoint(source)
    odd = [name for name in whole if not same(found.get(name), whole[name])]
    return wrong(f"read_checkpoint: {odd[0]} is not what was written") if odd else None


def _read_forecaster(path: Path, source: Path | None) -> Verdict | None:
    found = load_forecaster(path)
    frames = torch.rand(1, found.in_length, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        made = found.model.predict(frames)
    if source is None:
        return None if torch.isfinite(made).all() else wrong("a forecast that is not finite")
    whole = load_forecaster(source)
    if not same(found.model.state_dict(), whole.model.state_dict()):
        return wrong("load_forecaster: weights are not what was written")
    return None if found.scale == whole.scale else wrong("load_forecaster: the scale is not what was written")


def _read_initial(path: Path, source: Path | None) -> Verdict | None:
    found = read_initial(path)
    if source is None:
        return None
    whole = read_initial(source)
    return None if same(found.weights, whole.weights) else wrong("read_initial: weights are not what was written")


def _read_encoder(path: Path, source: Path | None) -> Verdict | None:
    encoder = build_encoder("test_resnet", 3)
    read_initial(path)
    load_encoder(encoder, path)
    if source is None:
        return None
    whole = build_encoder("test_resnet", 3)
    load_encoder(whole, source)
    if read_initial(path).demands != read_initial(source).demands:
        return wrong("read_initial: what an encoder file says of itself is not what was written")
    return (
        None
        if same(encoder.state_dict(), whole.state_dict())
        else wrong("load_encoder: weights are not what was written")
    )


READERS = [_read_training, _read_forecaster, _read_initial]


def _resume(path: Path, folder: Path, scratch: Path) -> Any:
    run = scratch / "run" / "checkpoints"
    run.mkdir(parents=True)
    path.rename(run / "last.ckpt")
    return pretrain, pretrain_arguments(run.parent, "--resume", **QUICK | {"trainer__max_steps": 2})


def _init(path: Path, folder: Path, scratch: Path) -> Any:
    return finetune, finetune_arguments(scratch / "out", init=path, trainer__max_steps=1, trainer__epochs=1)


def _forecast(path: Path, folder: Path, scratch: Path) -> Any:
    words = [f"--data.path={folder / 'rain.h5'}", f"--out={scratch / 'out'}", "--pictures=false"]
    return forecast, [f"--checkpoint={path}", *words]


COMMANDS = [_resume, _init, _forecast]


def _edit_checkpoint(random: Random, source: Path, path: Path) -> None:
    """Remove, replace or add entries of the nested dicts and lists of a checkpoint."""
    checkpoint = torch.load(source, weights_only=True)
    for _ in range(random.choice((1, 1, 2, 3))):
        # Names near the top and values far below are drawn alike.
        depth = random.choice((1, 2, 2, 3, 3, 9))
        places = [(box, key) for level, box, key in _entries(checkpoint, 1) if level <= depth]
        box, key = random.choice(places)
        match random.randrange(4):
            case 0:
                del box[key]
            case 1 if isinstance(box, dict):
                box[random.choice(("x", 3, "", "a.b"))] = box.pop(key)
            case 2 if isinstance(box[key], torch.Tensor):
                box[key] = _odd_tensor(random, box[key])
            case _:
                box[key] = random.choice([*VALUES, torch.zeros(2), torch.tensor(float("nan")), [torch.zeros(0)]])
        if not checkpoint:
            break
    torch.save(checkpoint, path)


def _entries(box: Any, level: int) -> Iterator[tuple[int, Any, Any]]:
    for key in list(box) if isinstance(box, dict) else range(len(box)):
        yield level, box, key
        if isinstance(box[key], dict | list):
            yield from _entries(box[key], level + 1)


def _odd_tensor(random: Random, value: torch.Tensor) -> torch.Tensor:
    choices: list[Callable[[], torch.Tensor]] = [
        lambda: value.to(torch.float16),
        lambda: value.to(torch.complex64),
        lambda: value.to(torch.int8),
        lambda: value.flatten()[:0],
        lambda: value[None],
        lambda: value.flatten(),
        lambda: torch.full_like(value, float("nan") if value.is_floating_point() else -1),
        lambda: torch.zeros(()).expand(2**20, 2**10),
        lambda: torch.empty(2**40, device="meta"),
        lambda: value.to_sparse() if value.dim() else value,
        lambda: value.bool(),
    ]
    return random.choice(choices)()


class _Code:
    """Make a file when it is unpickled."""

    def __init__(self, how: int) -> None:
        self.how = how

    def __reduce__(self) -> tuple[Any, ...]:
        ways = [
            (os.mkdir, (MARK,)),
            (eval, (f"__import__('os').mkdir({MARK!r})",)),
            (exec, (f"import os; os.mkdir({MARK!r})",)),
            (getattr(torch, "load"), (MARK,)),  # noqa: B009
            (Path.mkdir, (Path(MARK),)),
        ]
        return ways[self.how % len(ways)]


def _with_code(random: Random, content: bytes, is_checkpoint: bool) -> bytes:
    """Return a file whose pickle runs code in whoever unpickles it."""
    bomb = pickle.dumps({"state_dict": {}, "config": _Code(random.randrange(5))}, protocol=2)
    if not is_checkpoint or random.random() < 0.3:
        return bomb
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(written, "w") as new:
        for item in old.infolist():
            name = item.filename
            new.writestr(item, bomb if name.endswith("data.pkl") else old.read(name))
    return written.getvalue()


def _edited_safetensors(random: Random, source: Path) -> bytes:
    """Return an encoder file with another header, other metadata or other tensors."""
    content = source.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, body = content[8 : 8 + size], content[8 + size :]
    match random.randrange(5):
        case 0:
            return struct.pack("<Q", random.choice((0, 1, size - 1, size + 1, 2**32, 2**63, 2**64 - 1))) + header + body
        case 1:
            old, new = random.choice(
                ((b"F32", b"F64"), (b"F32", b"I8"), (b"F32", b"XXX"), (b"test_resnet", b"\xff"), (b"[", b"[-"))
            )
            header = header.replace(old, new, random.choice((1, -1)))
            return struct.pack("<Q", len(header)) + header + body
        case 2:
            header = random.choice((b"", b"{}", b"[]", b"{" * 9999, b'{"__metadata__": {"architecture": "resnet18"}}'))
            return struct.pack("<Q", len(header)) + header + body
    tensors = load_file(source)
    name = random.choice(list(tensors))
    metadata = {"architecture": random.choice(("test_resnet", "resnet18", "", "no such", "vit_tiny_patch16_224"))}
    if random.random() < 0.5:
        metadata = {"architecture": "test_resnet", random.choice(("layout", "input_scaling")): "odd"}
    if (odd := _odd_tensor(random, tensors[name])).is_sparse or odd.is_meta:
        del tensors[name]
    else:
        tensors[name] = odd[:9].contiguous() if odd.numel() > 10**6 else odd.contiguous()
    odd_file = source.parent / f"edited-{os.getpid()}"
    save_file(tensors, odd_file, metadata if random.random() < 0.7 else None)
    return odd_file.read_bytes()


SUITE = Suite(prepare, attempt)
