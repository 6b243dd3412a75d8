"""Calibration progress in the Trainer's own progress bar."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar


@contextmanager
def shown_progress(trainer: Trainer, total: int | None) -> Iterator[Callable[[str, int], None] | None]:
    """Yield what to call after every batch, or None where the user has no bar, or one we cannot draw in.

    Args:
        trainer: Its progress bar decides the look; none is shown where it is disabled.
        total: Batches in one pass, None if unknown.
    """
    bar = trainer.progress_bar_callback
    if isinstance(bar, TQDMProgressBar) and bar.is_enabled:
        with _tqdm(bar, total) as update:
            yield update
    elif isinstance(bar, RichProgressBar) and bar.is_enabled and bar.progress is not None:
        with _rich(bar, total) as update:
            yield update
    else:
        yield None


@contextmanager
def _tqdm(bar: TQDMProgressBar, total: int | None) -> Iterator[Callable[[str, int], None]]:
    line = bar.init_validation_tqdm()

    def update(what: str, done: int) -> None:
        if done == 1:
            # A new pass: its own clock, or the rate would be that of all passes before.
            line.reset(total)
        line.set_description(f"Calibrating ({what})", refresh=False)
        if done % bar.refresh_rate == 0 or done == total:
            line.n = done
            line.refresh()

    try:
        yield update
    finally:
        line.close()


@contextmanager
def _rich(bar: RichProgressBar, total: int | None) -> Iterator[Callable[[str, int], None]]:
    progress = bar.progress
    assert progress is not None
    # Lightning's columns take infinity for a length that is not known, and refuse rich's own None.
    length = math.inf if total is None else total
    task = progress.add_task("Calibrating", total=length)

    def update(what: str, done: int) -> None:
        if done == 1:
            progress.reset(task, total=length)
        progress.update(task, description=f"Calibrating ({what})", completed=done)
        bar.refresh()

    try:
        yield update
    finally:
        progress.remove_task(task)
        bar.refresh()
