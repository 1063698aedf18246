"""Read numbers off a device when they are ready, instead of waiting for it."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["Reading"]


class Reading:
    """Hold named numbers, some of them scalars on a device whose copies are on their way."""

    def __init__(self, values: dict[str, float | Tensor]) -> None:
        self._values = values
        self._names = [name for name, value in values.items() if isinstance(value, Tensor)]
        tensors = [value.detach().double() for value in values.values() if isinstance(value, Tensor)]
        self._copy = torch.stack(tensors) if tensors else torch.empty(0)
        self._event: Any = None
        if self._copy.device.type == "cuda":
            host = torch.empty(self._copy.shape, dtype=self._copy.dtype, pin_memory=True)
            host.copy_(self._copy, non_blocking=True)
            self._copy, self._event = host, torch.cuda.Event()
            self._event.record()

    def ready(self) -> bool:
        """Tell whether `get` would return at once."""
        return self._event is None or self._event.query()

    def get(self) -> dict[str, float]:
        """Return all numbers in the order of ``values``; wait for them if need be."""
        if self._event is not None:
            self._event.synchronize()
        found = dict(zip(self._names, self._copy.tolist(), strict=True))
        return {name: float(found.get(name, value)) for name, value in self._values.items()}
