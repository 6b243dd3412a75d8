"""One layout for every loss: logits with the classes on axis 1, labels, and which positions count."""

from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_clamp._checks import check_choice, check_range
from lightning_clamp._rows import TASKS, Task, check_hard, checked_target

Reduction: TypeAlias = Literal["mean", "sum", "none"]
_REDUCTIONS: tuple[Reduction, ...] = ("mean", "sum", "none")


class Positions(NamedTuple):
    """Logits and labels of the positions of a batch.

    Attributes:
        logits: Shape ``(N, C)`` or ``(N, C, ...)``, float32 or float64; 0 where ignored. One logit z counts as the pair
            (-z/2, z/2): the same softmax as (0, z), and no class is preferred by losses that look at the logits
            themselves.
        target: Shape ``(N,)`` or ``(N, ...)``, int64, in ``[0, C)``; 0 where ignored.
        keep: Which positions count, bool, shape of the target; None for all.
        shape: Shape of the target as it was given.
    """

    logits: Tensor
    target: Tensor
    keep: Tensor | None
    shape: torch.Size

    def cross_entropy(self, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy of every position, shape of the target."""
        return F.cross_entropy(self.logits, self.target, reduction="none", label_smoothing=label_smoothing)

    def total_cross_entropy(self) -> Tensor:
        """Cross-entropy summed over the positions that count."""
        return self.kept(self.cross_entropy()).sum()

    def of_target(self, values: Tensor) -> Tensor:
        """What ``values``, shape of the logits, holds for the target class; shape of the target."""
        return values.gather(1, self.target.unsqueeze(1)).squeeze(1)

    def correct(self) -> Tensor:
        """Whether the target has the largest logit (in a tie: one of them), bool, shape of the target."""
        return self.of_target(self.logits) == self.logits.amax(1)

    def kept(self, values: Tensor) -> Tensor:
        """``values``, shape of the target, with 0 where a position is ignored."""
        return values if self.keep is None else torch.where(self.keep, values, 0)

    def counted(self) -> Tensor:
        """Which positions count, bool, shape of the target, also where all do."""
        return torch.ones_like(self.target, dtype=torch.bool) if self.keep is None else self.keep

    def n_positions(self) -> Tensor:
        """How many positions of each item count, at least 1, ``(N,)``."""
        return self.counted().reshape(len(self.target), self.target[:1].numel() or 1).sum(1).clamp_min(1)

    def n_kept(self) -> Tensor | int:
        """How many positions count, at least 1, so that a batch without any has the loss 0."""
        return max(1, self.target.numel()) if self.keep is None else self.keep.sum().clamp_min(1)

    def mean(self, values: Tensor) -> Tensor:
        """Mean of ``values``, shape of the target, over the positions that count."""
        if self.keep is None and values.numel():
            return values.mean()
        return self.kept(values).sum() / self.n_kept()

    def reduced(
        self, values: Tensor, reduction: Reduction, log_terms: dict[str, Tensor] | None = None, **named: Tensor
    ) -> Tensor:
        """Reduce the loss of every position, and put the means of its named terms into ``log_terms``, detached."""
        if log_terms is not None:
            log_terms.update({name: self.mean(term.detach()) for name, term in named.items()})
        if reduction == "mean":
            return self.mean(values)
        return self.kept(values).sum() if reduction == "sum" else self.kept(values).reshape(self.shape)


def as_positions(
    logits: Tensor, target: Tensor, *, task: Task, ignore_index: int | None, reduction: Reduction
) -> Positions:
    """Check and lay out a batch.

    Args:
        logits: ``(N, C)`` or dense ``(N, C, ...)``; for ``task="binary"`` one logit per position, ``(N,)``, ``(N, 1)``,
            ``(N, 1, ...)`` or ``(N, ...)``; for ``task="multilabel"`` one per label, ``(N, K)`` or ``(N, K, ...)``.
            Half precision is computed in float32.
        target: Class indices, ``(N,)`` or ``(N, ...)``; for the other tasks 0 or 1 of any dtype.
        task: ``"multiclass"``, ``"binary"`` or ``"multilabel"``.
        ignore_index: Target value of positions to leave out.
        reduction: Checked only.

    Raises:
        TypeError: If either is no tensor, or the target's dtype cannot hold class indices.
        ValueError: If shapes do not fit, an option is unknown, or a label is out of range. Labels on an accelerator are
            not read, which would stall it: there torch's own assertion fails.
    """
    check_choice("reduction", reduction, _REDUCTIONS)
    check_choice("task", task, TASKS)
    labels = checked_target(logits, target, task)
    shape, target = target.shape, labels
    # Labels on an accelerator are not read, which would stall it, nor while a graph is made.
    readable = target.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and task != "multiclass":
        check_hard(target)
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    if task != "multiclass":
        logits, target = _pairs(logits, target)
    target = target.long()
    keep = None if ignore_index is None else target != ignore_index
    if keep is not None:
        target = torch.where(keep, target, 0)
        # Whatever is there, nan too: neither values nor gradients may see it.
        logits = torch.where(keep.unsqueeze(1), logits, 0)
    if readable:
        check_range(
            target.flatten(), logits.shape[1], " Pass ignore_index= for positions to leave out; labels start at 0."
        )
    return Positions(logits, target, keep, shape)


def _pairs(logit: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """One logit per position as the pair of :class:`Positions`, ``(N, 2, ...)``, and its target, ``(N, ...)``."""
    # Either may have an axis of length 1 for the class that the other has not.
    shape = min(logit.shape, target.shape, key=len)[1:]
    positive = logit.reshape(len(logit), 1, *shape) / 2
    return torch.cat([-positive, positive], 1), target.reshape(len(target), *shape)
