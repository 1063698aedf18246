"""Make every engine forget one patch of a convolution's output."""

from __future__ import annotations

import pytest
from torch import Tensor

from patchsparse.backends import cpp, gather


def break_engines(patch: pytest.MonkeyPatch) -> None:
    """Let the first patch of each forward convolution be 0; a channel of a wrong size, batch norm would mend."""
    for engine in (cpp, gather):

        def wrong(*args, right=engine.conv2d, **kwargs) -> Tensor:
            y = right(*args, **kwargs)
            y[0] = 0
            return y

        patch.setattr(engine, "conv2d", wrong)
