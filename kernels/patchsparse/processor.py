"""What Linux and PyTorch say of the processor."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

__all__ = ["ISA", "lacks", "processor_fields"]

ISA = "PATCHSPARSE_ISA"  # the environment variable that names an instruction set for the C++ engine


@cache
def processor_fields() -> dict[str, str]:
    """Return the fields of the first core in ``/proc/cpuinfo``, such as ``flags``; nothing where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    lines = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in lines}


@cache
def lacks(dtype: torch.dtype) -> bool:
    """Return whether PyTorch has no unit of this processor for ``dtype``, a half precision, and falls back."""
    names = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    known = torch.ops.mkldnn
    return dtype in names and not (hasattr(known, names[dtype]) and getattr(known, names[dtype])())
