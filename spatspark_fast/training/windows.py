"""Open the windows that a training reads."""

from collections.abc import Sequence

import torch
from torch import Tensor

from spatspark_fast.common.errors import UserError
from spatspark_fast.data.nl50 import NowcastDataset
from spatspark_fast.data.synthetic import SyntheticRadar
from spatspark_fast.data.windows import WholeWindows
from spatspark_fast.training.options import DataOptions

__all__ = ["open_windows", "stack_of", "wettest"]

SYNTHETIC_SEED = 0  # the built-in data set is always the same; the seed of a run does not change its data
SYNTHETIC_OUTPUT = 12  # frames to come of synthetic radar, where a training does not say how many
SAMPLE_OF = 16  # windows among which the wettest is drawn


def open_windows(options: DataOptions, output_length: int | None, seed: int = 0, augment: bool = True) -> WholeWindows:
    """Open the data set, or the synthetic radar where no file is named.

    ``output_length`` counts the frames to come: 0 for none, None for all that a window has. ``seed`` is that of the
    augmentation, which ``augment`` False leaves out. Raises UserError for a file that does not fit the options.
    """
    frames = options.input_length, output_length
    if options.path is None:
        if options.crop is not None or options.flip or options.quarter_turns:
            raise UserError("--data.crop, --data.flip and --data.quarter_turns need a file: give --data.path")
        frames = options.input_length, SYNTHETIC_OUTPUT if output_length is None else output_length
        size = options.synthetic_size
        return WholeWindows(SyntheticRadar(options.synthetic_windows, *frames, image_size=size, seed=SYNTHETIC_SEED))
    changes = {"crop": options.crop, "flip": options.flip, "quarter_turns": options.quarter_turns} if augment else {}
    valid = output_length != 0
    return WholeWindows(NowcastDataset(options.path, options.split, *frames, seed=seed, include_valid=valid, **changes))


def stack_of(windows: WholeWindows, numbers: Sequence[int]) -> Tensor:
    """Return some windows as they are in epoch 0, ``(B, T, H, W)``."""
    windows.set_epoch(0)
    return torch.stack([windows[number]["input"] for number in numbers])


def wettest(windows: WholeWindows, numbers: Sequence[int]) -> Tensor:
    """Return the wettest of the first of these windows, ``(1, T, H, W)``; reading it checks the file."""
    stack = stack_of(windows, numbers[:SAMPLE_OF])
    means = [float(window.nan_to_num(nan=0.0).mean()) for window in stack]
    return stack[means.index(max(means))].unsqueeze(0)
