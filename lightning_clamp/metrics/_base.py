"""What every metric here shares: how a batch is read, and additive float64 state."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_clamp._rows import TASKS, Task, as_rows


class RowMetric(Metric):
    """A metric over rows of class probabilities: ``update(preds, target)`` and sums of a fixed size.

    Args:
        task: ``"multiclass"``, preds ``(N, C)`` or dense ``(N, C, ...)``; ``"binary"``, one value per position.
        ignore_index: Target value of positions to leave out.
        probs: Whether preds are probabilities. By default they are logits; it is never guessed.
        **kwargs: Options of :class:`torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False

    def __init__(
        self,
        *,
        task: Task = "multiclass",
        ignore_index: int | None = None,
        probs: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if task not in TASKS:
            raise ValueError(f"`task` must be one of {TASKS}, got {task!r}.")
        self.task: Task = task
        self.ignore_index = ignore_index
        self.probs = probs

    def add_sum(self, name: str, *shape: int) -> None:
        """Register a float64 sum over samples."""
        self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def log_probs(self, preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities ``(M, C)``, at least float32, and targets ``(M,)`` of the scored positions."""
        rows = as_rows(preds, target, task=self.task, ignore_index=self.ignore_index)
        scores = rows.logits.to(torch.promote_types(rows.logits.dtype, torch.float32))
        if not self.probs:
            return scores.log_softmax(1), rows.target
        if self.task == "binary":
            positive = scores[:, 1]
            scores = torch.stack([1 - positive, positive], 1)
        return scores.log(), rows.target
