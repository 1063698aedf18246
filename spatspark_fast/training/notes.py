"""What a training tells its user, beside the bar."""

import errno
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
from rich.console import Console

from spatspark_fast.common.options import differences
from spatspark_fast.training.module import PlannedTraining
from spatspark_fast.training.options import OptimOptions
from spatspark_fast.training.recorder import Recorder
from spatspark_fast.training.schedules import Plan
from spatspark_fast.training.speed import Speed
from spatspark_fast.training.stream import BatchStream

__all__ = ["TrainingConsole", "describe_speed", "describe_training", "resume_notes", "speaker", "start_notes"]


class TrainingConsole(Console):
    """Print as rich does, and go on in silence where the terminal is gone: what is trained is saved first."""

    def print(self, *objects: Any, **kwargs: Any) -> None:
        """Print."""
        try:
            super().print(*objects, **kwargs)
        except OSError as error:
            if error.errno != errno.EIO:
                raise


def speaker(console: Console, trainer: L.Trainer) -> Callable[[str], None]:
    """Return the function that tells the user something; one process of several speaks."""

    def say(text: str) -> None:
        if trainer.is_global_zero:
            console.print(text, soft_wrap=True, highlight=False)

    return say


def start_notes(what: str, plan: Plan, stream: BatchStream, batch_size: int, optim: OptimOptions) -> list[str]:
    """Say how long a training will be, and where it takes other numbers than those asked for."""
    lines = [
        f"{what}: {plan.total_steps} steps of {stream.batch_size} windows ({plan.epochs} epochs of "
        f"{plan.batches_per_epoch} batches), peak learning rate {plan.peak_lr:.2g}"
    ]
    if stream.batch_size < batch_size:
        lines.append(
            f"Note: there are {len(stream.numbers)} windows, so a batch has {stream.batch_size} instead of "
            f"{batch_size}; the learning rate is scaled to that"
        )
    asked = optim.warmup_epochs * plan.steps_per_epoch
    if plan.warmup_steps < asked:
        lines.append(f"Note: warm-up is a quarter of this training, {plan.warmup_steps:g} steps instead of {asked:g}")
    return lines


def resume_notes(plain: dict[str, Any], state: dict[str, Any] | None) -> list[str]:
    """Say where a training goes on, and which of its options (``plain``) are other ones now; nothing for a new one."""
    if state is None:
        return []
    changed = differences(plain, state["config"])
    note = [f"Note: options changed since then: {', '.join(changed)}"] if changed else []
    old = [f"Note: {text}" for text in state["notes"]]
    if not state.get("data"):
        old.append("Note: the checkpoint is of a version that did not mark its data; see that they are the same")
    return [f"Going on after step {state['global_step']}", *note, *old]


def describe_training(module: PlannedTraining[Any], recorder: Recorder, seconds: float, unit: str = "") -> str:
    """Say how long a training was, and what became of its loss."""
    return (
        f"Trained {module.trainer.global_step} steps ({module.epochs_done:.4g} epochs), {seconds:.0f} s; mean loss "
        f"{recorder.first_loss:.4f}{unit} in the first epoch, {recorder.epoch_loss:.4f} in the last"
    )


def describe_speed(speed: Speed, parts: Mapping[str, str]) -> str:
    """Say images/s of a run and what its steps spend their time on; ``parts`` has words for those to tell of."""
    found = speed.summary()
    words = {"data_wait_share": "waiting for data"} | {f"{part}_share": text for part, text in parts.items()}
    shares = [f"{100 * found[name]:.0f} % {text}" for name, text in words.items() if name in found]
    return f"Speed: {found['images_per_s']:.1f} images/s; of the time {', '.join(shares)}"
