"""What every capture of a CUDA graph needs: nothing that disturbs it, and the reason if it breaks."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["reason_of", "undisturbed"]


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Let no garbage be collected in a capture, and leave device, stream and generator usable if one breaks."""
    collects = gc.isenabled()
    gc.collect()  # what dies during a capture would be freed in it
    gc.disable()
    try:
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            yield
    except BaseException:
        index = torch.cuda.current_device() if device.index is None else device.index
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())  # it believes that it is still being captured
        raise
    finally:
        if collects:
            gc.enable()


def reason_of(error: BaseException) -> str:
    """Return the first line of the first error of a chain: the end of a broken capture raises another one."""
    while error.__context__ is not None:
        error = error.__context__
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
