"""Say on what machine, by which versions and by which command something was measured."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

from patchsparse.processor import processor_fields

from .device import driver, has_gpu

__all__ = [
    "RESULTS",
    "command",
    "commit",
    "cpu",
    "device_name",
    "folder_name",
    "kept_in",
    "provenance",
    "versions",
]

RESULTS = Path(__file__).parents[1] / "results"
ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "triton", "timm", "numpy")
COMMIT = "SPATSPARK_COMMIT"  # environment variable: the commit of a copy
VENDORS = {"AuthenticAMD": "AMD", "GenuineIntel": "Intel"}


def cpu(info: Mapping[str, str] | None = None) -> str:
    """Return vendor, model and matrix instructions of the processor: what tells two machines apart.

    Virtual machines often hide the model's name, so that family and model number stand beside it.
    """
    info = processor_fields() if info is None else info
    vendor = VENDORS.get(info.get("vendor_id", ""), info.get("vendor_id", ""))
    name = re.sub(r"\(R\)|\(TM\)|\bCPU\b|\bProcessor\b|@.*", "", info.get("model name", "")).strip()
    if vendor not in name:
        name = f"{vendor} {name}".strip()
    if not name:
        name = platform.processor() or platform.machine()
    if "cpu family" in info:
        name += f" (family {info['cpu family']}, model {info.get('model', '?')})"
    flags = set(info.get("flags", "").split())
    units = [name for flag, name in (("avx512f", "AVX-512"), ("amx_bf16", "AMX")) if flag in flags]
    if not units and "avx2" in flags:
        units = ["AVX2"]
    return " ".join([re.sub(r"\s+", " ", name), *units])


@cache
def device_name() -> str:
    """Return the GPU's name, or the processor's with its instructions and cores."""
    if has_gpu():
        return torch.cuda.get_device_name()
    return f"{cpu()}, {os.cpu_count()} cores"


def kept_in(asked: Path | None) -> Path | None:
    """Return the folder that keeps what a GPU showed: ``asked``, else that of the card; None on a CPU, of no card."""
    return RESULTS / folder_name() if asked is None and has_gpu() else asked


def folder_name(device: str | None = None) -> str:
    """Return the name of the folder in ``results/`` that holds the figures of a device (default: this one)."""
    device = (device_name() if device is None else device).lower().replace("avx-512", "avx512")
    device = re.sub(r"family (\d+), model (\d+)", r"f\1m\2", device)
    device = re.sub(r"(\d+) cores", r"\1cores", device)
    return re.sub(r"[^a-z0-9]+", "-", device).strip("-")


@cache
def commit() -> str:
    """Return the commit that is checked out, with a ``+`` if the tree differs from it.

    ``SPATSPARK_COMMIT`` says it where it is set: a copy of the tree has no history with it, or an older one.
    """
    if asked := os.environ.get(COMMIT):
        return asked

    def git(*arguments: str) -> str:
        try:
            run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        except OSError:
            return ""
        return run.stdout.strip()

    found = git("rev-parse", "--short", "HEAD") if (ROOT / ".git").exists() else ""
    if not found:
        return "unknown"
    return found + ("+" if git("status", "--porcelain", "--untracked-files=no", "kernels", "csrc") else "")


@cache
def versions() -> str:
    """Return Python's version and those of the packages that times depend on."""
    found = [f"python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    if has_gpu():
        found += [f"cuda {torch.version.cuda}", f"driver {driver() or 'unknown'}"]
    return "; ".join(found)


def command() -> str:
    """Return the command line of this process, without folders of this machine."""
    program, *arguments = sys.orig_argv[1:] if len(sys.orig_argv) > 1 else sys.argv
    if program not in ("-m", "-c"):
        program = Path(program).name
    line = " ".join([program, *arguments]).removeprefix("-m ").replace(f"{ROOT}/", "")
    return re.sub(r"(?<![\w.])/\S*/", "", line)


def provenance() -> dict[str, str]:
    """Return the columns that say where the figures of a row come from."""
    return {
        "device": device_name(),
        "cpu": cpu(),
        "threads": str(torch.get_num_threads()),
        "versions": versions(),
        "commit": commit(),
        "command": command(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
    }
