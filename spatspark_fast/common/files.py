"""Read and write files so that nothing is lost: folders, atomic writes, plain checkpoints, package versions."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from spatspark_fast.common.errors import UserError, WriteError, remedy

__all__ = [
    "LOCK",
    "atomic_path",
    "check_file",
    "check_folder",
    "load_plain",
    "package_versions",
    "usable",
    "used",
    "writing",
]

PACKAGES = (
    *("spatspark-fast", "torch", "timm", "lightning", "jsonargparse", "torchmetrics", "numpy", "h5py"),
    *("triton", "MinkowskiEngine"),
)
OLD_TORCH = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # a pickled number, torch's magic one


def package_versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that matter; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn whatever goes wrong while ``target`` is written into one sentence; the block should do nothing else.

    Libraries say a full disk in many ways. What the system says of it counts: the error itself if it is an
    `OSError`, else the code that the message cites.

    Raises:
        WriteError: the block could not write. Any other exception passes.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None and not _beside(Path(os.fsdecode(error.filename)), target):
            raise  # of something that the block read
        raise WriteError(f"cannot write {target}: {_reason(error)}") from error
    except Exception as error:
        if isinstance(error, UserError) or not (cited := _CITED.search(str(error))):
            raise
        raise WriteError(f"cannot write {target}: {remedy(int(cited[1]))}") from error


def _beside(path: Path, target: Path) -> bool:
    return target.is_relative_to(path) or path.parent in (target, target.parent)


_CITED = re.compile(r"(?:os error|errno =|Errno) (\d+)")  # of safetensors, HDF5, Python


def _reason(error: OSError) -> str:
    return " ".join(str(error).split()) if error.errno is None else remedy(error.errno)


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Give a temporary file beside ``target`` to write to; rename it to ``target`` when the block ends well.

    Whoever reads sees the old file or the whole new one, whatever happens to this process or to others that write it
    too. The temporary file lies in the same folder, since a rename between file systems is a copy.

    Raises:
        WriteError: the file cannot be written; the block may raise any exception of a library that writes.
    """
    with writing(target):
        # A name may have 255 bytes, with what is added to it.
        handle, name = tempfile.mkstemp(prefix=f".{target.name[:50]}.", suffix=".tmp", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with writing(target):
            try:
                yield temporary
            except (UserError, OSError):
                raise
            except Exception:
                _write_more(temporary)  # raises if that is what was wrong
                raise
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _write_more(path: Path) -> None:
    """Write to the end of a file, to hear what the system says where a library kept it to itself."""
    with path.open("ab") as file:
        file.write(bytes(1 << 20))
        file.flush()
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_file(option: str, path: Path, overwrite: bool) -> None:
    """Check, before any work, that a file can be written to ``path``; ``option`` is where the user named it.

    Raises:
        UserError: it is a folder, lies in a folder that does not exist, or exists and ``overwrite`` is not asked for.
    """
    with usable(option, path):
        if path.is_dir():
            raise UserError(f"--{option} {path} is a folder; name a file in it")
        if path.exists() and not overwrite:
            raise UserError(f"--{option} {path} exists already; give another name or --overwrite")
        if not path.absolute().parent.is_dir():
            raise UserError(f"--{option} {path}: the folder {path.parent} does not exist")


def check_folder(out: Path, overwrite: bool) -> None:
    """Check, before any work, that results can be written to ``out``; nothing is made yet.

    Raises:
        UserError: it is a file, cannot be written, or holds something and ``overwrite`` is not asked for.
    """
    with usable("out", out):
        existing = next(path for path in (out, *out.absolute().parents) if path.exists())
        if not existing.is_dir():
            file = existing.samefile(out) if out.exists() else False
            raise UserError(f"--out {out} is a file; name a folder" if file else f"--out {out}: {existing} is a file")
        if not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
            raise UserError(f"--out {out} cannot be written: no permission in {existing}")
        if not overwrite and used(out):
            raise UserError(f"--out {out} is not empty: choose another folder, or --overwrite")


@contextlib.contextmanager
def usable(option: str, path: Path) -> Iterator[None]:
    """Turn what the system says against the name of a file or folder into a sentence."""
    try:
        if b"\0" in os.fsencode(path):  # pathlib takes what is no text for missing
            raise ValueError("it holds a null byte")
        yield
    except (OSError, UnicodeError) as error:
        reason = _reason(error) if isinstance(error, OSError) else "it is no text that the system can write"
        raise UserError(f"--{option} {str(path)[:80]!r} cannot be used: {reason}") from error
    except ValueError as error:
        if isinstance(error, UserError) or "null" not in str(error):
            raise
        raise UserError(f"--{option} {str(path)[:80]!r} cannot be used: {error}") from error


LOCK = ".lock"  # the file in a folder that its owner holds


def used(folder: Path) -> bool:
    """Tell whether a folder holds anything but a lock and what a killed process left half written."""
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return any(name != LOCK and not (name.startswith(".") and name.endswith(".tmp")) for name in names)


def load_plain(path: Path, makers: str) -> Any:
    """Load a file of tensors and plain values onto the CPU; ``makers`` names the commands that write such files.

    Raises UserError if it is missing, not to be read, damaged, or holds anything else. Damage of a single byte is
    found, too.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    import torch

    try:
        _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about kinds of tensors that no checkpoint of ours has
            return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is damaged or no checkpoint of {makers}: {error}") from error
    except Exception as error:  # torch raises half a dozen kinds for a file that is cut off or not its own
        raise UserError(f"{path} is damaged or no checkpoint of {makers} ({type(error).__name__})") from error


def _check_archive(path: Path) -> None:
    """Raise `zipfile.BadZipFile` unless all members fit their CRC-32, at which torch does not look."""
    with path.open("rb") as file:
        if file.read(len(OLD_TORCH)) == OLD_TORCH:
            raise zipfile.BadZipFile("it is in the format of PyTorch before 1.6, which has no checksums; save it anew")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        # Storage of a member whose attributes say that it is a folder is never filled by torch.
        if len({(m.create_system, m.flag_bits, m.volume, m.internal_attr, m.external_attr) for m in members}) > 1:
            raise zipfile.BadZipFile("its directory is damaged; copy it again, or take another")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise zipfile.BadZipFile("its members are compressed, and those of torch never are")
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise zipfile.BadZipFile("its members are larger than the file")
        if wrong := archive.testzip():
            raise zipfile.BadZipFile(f"the checksum of {wrong} in it is wrong; copy it again, or take another")
