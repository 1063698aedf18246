"""Open HDF5 files, find what lies in them without leaving the file, and say in words why something cannot be read."""

from __future__ import annotations

import errno
import importlib
import itertools
import math
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from spatspark_fast.common.errors import UserError

__all__ = [
    "BROKEN",
    "LIBVER",
    "check_memory",
    "check_stored",
    "member",
    "memory",
    "open_hdf5",
    "read_row",
    "why",
    "write_attributes",
]

# What h5py raises for damaged files, besides its OSError.
BROKEN = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, OverflowError, MemoryError)
# What our files are written in: HDF5 1.10 and later read it, and all that describes data has checksums.
LIBVER = ("v110", "v110")
DEFLATE = h5py.h5z.FILTER_DEFLATE
EXPANSION = 1032  # bytes that one byte of deflate can become
FILTERS = {307: "bzip2", 32001: "blosc", 32004: "lz4", 32008: "bitshuffle", 32015: "zstd", 32026: "blosc2", 4: "szip"}
LINKS = 16  # soft links that may follow each other


def open_hdf5(path: Path) -> h5py.File:
    """Open a file to read; raise UserError that names the cause and the remedy."""
    if not path.is_file():
        raise UserError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    try:
        return h5py.File(path, "r")
    except BROKEN as error:
        raise UserError(f"{path} {why(error)}") from error


def why(error: BaseException) -> str:
    """Say what an error of HDF5 means, behind the name of the file, and what to do."""
    text = " ".join(str(error).split())
    code = getattr(error, "errno", None)
    if code == errno.EACCES:
        return "cannot be read: no permission"
    if "unable to lock" in text or code in (errno.EAGAIN, errno.EWOULDBLOCK):
        return (
            "is locked, as another program writes it: wait for that, or set HDF5_USE_FILE_LOCKING=FALSE in the "
            "environment where the file system knows no locks"
        )
    if isinstance(error, MemoryError):
        return f"takes more memory than there is ({text})"
    if missing := re.search(r"required filter '(.*?)'|filter.*?(not registered|not available)", text):
        return _unpackable(missing[1] or "of HDF5")
    if "truncated" in text:
        return f"is truncated ({text}); prepare or download it again"
    if "signature not found" in text:
        return f"is not a readable HDF5 file ({text}); prepare or download it again"
    return f"cannot be read ({text[:300]}); the file is damaged, prepare or download it again"


def _unpackable(name: str) -> str:
    return f"is packed with the filter {name}, which is not there: pip install hdf5plugin"


def write_attributes(file: h5py.File, attributes: Mapping[str, object]) -> None:
    """Write attributes; texts in a form that has checksums, which h5py gives back as bytes."""
    for name, value in attributes.items():
        if isinstance(value, str):
            text = value.encode()
            file.attrs.create(name, text, dtype=h5py.string_dtype("utf-8", max(len(text), 1)))
        else:
            file.attrs[name] = value


def member(file: h5py.File, path: Path, name: str, links: int = LINKS) -> h5py.Group | h5py.Dataset | None:
    """Return the group or data set under a name such as ``train/images``; None if there is nothing.

    Raises UserError for links into other files, which nobody may have meant and whose changes nobody would notice,
    for links in a circle, and for what cannot be opened.
    """
    found: Any = file
    parts = [part for part in name.split("/") if part not in ("", ".")]
    try:
        for number, part in enumerate(parts, 1):
            link = found.get(part, getlink=True) if isinstance(found, h5py.Group) else None
            if link is None:
                return None
            if isinstance(link, h5py.ExternalLink):
                raise UserError(f"{path}: {name} is a link into another file; put all into one file")
            if isinstance(link, h5py.SoftLink):
                if not links:
                    raise UserError(f"{path}: {name} is a link to itself; write its values there")
                start = "" if link.path.startswith("/") else str(found.name)
                return member(file, path, "/".join((start, link.path, *parts[number:])), links - 1)
            found = found[part]
    except UserError:
        raise
    except BROKEN as error:
        raise UserError(f"{path}: {name} {why(error)}") from error
    return found if isinstance(found, h5py.Group | h5py.Dataset) else None


def check_stored(data: h5py.Dataset, where: str) -> None:
    """Raise UserError unless all values of a data set were written, lie in its file, and can be unpacked."""
    if data.is_virtual or data.external:
        raise UserError(f"{where} takes its values from other files; put them into one file")
    layout = data.id.get_create_plist()
    filters = [layout.get_filter(number)[0] for number in range(layout.get_nfilters())]
    for code in filters:
        if not _available(code):
            raise UserError(f"{where} {_unpackable(FILTERS.get(code, str(code)))}")
    if filters.count(DEFLATE) > 1:
        raise UserError(f"{where} is compressed twice; write it anew")
    if data.chunks is None:
        expected, what = math.prod(data.shape) * data.dtype.itemsize, "bytes"
        written = min(data.id.get_storage_size(), expected)  # texts of any length take more in the file
    else:
        written, what = data.id.get_num_chunks(), "chunks"
        expected = math.prod(-(-side // chunk) for side, chunk in zip(data.shape, data.chunks, strict=True))
    if written != expected:
        raise UserError(f"{where} has {written} of its {expected} {what}: it is damaged, or was not written to its end")


def _available(code: int) -> bool:
    if not h5py.h5z.filter_avail(code):
        try:
            importlib.import_module("hdf5plugin")  # registers its filters
        except ImportError:
            return False
    return bool(h5py.h5z.filter_avail(code))


def check_memory(data: h5py.Dataset, where: str) -> None:
    """Raise UserError if a row of a data set, or what is unpacked for it, takes more than half of all memory."""
    row = math.prod(data.shape[1:]) * (data.dtype.itemsize + 4)  # and once as float32
    chunk = math.prod(data.chunks or ()) * data.dtype.itemsize
    if max(row, chunk) > memory() // 2:
        size = max(row, chunk) / 2**30
        raise UserError(f"{where} takes {size:.1f} GiB at once, too much for this machine; write it in smaller chunks")


def memory() -> int:
    """Return the bytes of memory of this machine."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 1 << 34  # the system does not say


def read_row(data: h5py.Dataset, index: int, where: str, length: int | None = None) -> np.ndarray:
    """Return ``data[index]``, or its first ``length`` entries; raise UserError that names ``where`` and the cause."""
    try:
        check_chunks(data, index, where)
        return np.asarray(data[index] if length is None else data[index, :length])
    except UserError:
        raise
    except BROKEN as error:
        raise UserError(f"{where} {why(error)}") from error


def check_chunks(data: h5py.Dataset, index: int, where: str) -> None:
    """Raise UserError unless the chunks of a row are there, went through all filters, and hold what they may hold.

    HDF5 reads zeros for chunks that it does not find, and unpacks deflated bytes to their end, however many those are.
    """
    if data.chunks is None:
        return
    size = math.prod(data.chunks) * data.dtype.itemsize
    packed = data.compression == "gzip"
    starts = [range(0, side, chunk) for side, chunk in zip(data.shape[1:], data.chunks[1:], strict=True)]
    for place in itertools.product([index // data.chunks[0] * data.chunks[0]], *starts):
        found = data.id.get_chunk_info_by_coord(place)
        if found.byte_offset is None or (found.filter_mask and found.size != size):
            raise UserError(f"{where} is not there as a whole; the file is damaged, prepare or download it again")
        if packed and found.size * EXPANSION > memory() // 4:
            most = size + 64  # checksums of other filters may lie behind
            content = data.id.read_direct_chunk(place)[1]
            if len(zlib.decompressobj().decompress(content, most + 1)) > most:
                raise UserError(f"{where} unpacks to more than it may hold; prepare or download the file again")
