"""One layout for every loss: logits with the classes on axis 1, the target, and which positions count."""

from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_clamp._checks import OptionError, check_choice, check_range
from lightning_clamp._rows import TASKS, Task, checked_target
from lightning_clamp.losses._targets import (
    are_probabilities,
    check_between_labels,
    check_probabilities,
    check_weight,
)

Reduction: TypeAlias = Literal["mean", "sum", "none"]
_REDUCTIONS: tuple[Reduction, ...] = ("mean", "sum", "none")
_LABELS_ONLY = (
    "This loss needs one label for each position, and a target of probabilities names none: pass labels, or train with "
    "a loss that takes probabilities, such as acls_loss or focal_loss."
)
_NOTHING_TO_IGNORE = (
    "A target of probabilities has no label that `ignore_index` could name: leave `ignore_index` out, or take "
    'reduction="none" and leave positions out of the mean yourself.'
)
_WAY_OUT = " Pass ignore_index= for positions to leave out; labels start at 0."


class Positions(NamedTuple):
    """Logits and target of the positions of a batch.

    Attributes:
        logits: Shape ``(N, C)`` or ``(N, C, ...)``, float32 or float64; 0 where ignored. One logit z counts as the pair
            (-z/2, z/2): the same softmax as (0, z), and no class is preferred by losses that look at the logits
            themselves.
        target: Labels, shape ``(N,)`` or ``(N, ...)``, int64, in ``[0, C)``, 0 where ignored; or the probability of
            each, shape and dtype of the logits.
        keep: Which positions count, bool, ``(N,)`` or ``(N, ...)``; None for all.
        shape: Shape of what there is one of for each position, as the target was given.
        weight: Of each class, ``(C,)``; None for 1.
    """

    logits: Tensor
    target: Tensor
    keep: Tensor | None
    shape: torch.Size
    weight: Tensor | None = None

    @property
    def n_all(self) -> int:
        """How many positions there are, also those that do not count."""
        return self.logits.numel() // self.logits.shape[1]

    @property
    def soft(self) -> bool:
        """Whether the target has the probability of each label."""
        return self.target.is_floating_point()

    @property
    def equal_labels(self) -> bool:
        """Whether the target has labels that all count the same."""
        return self.keep is None and self.weight is None and not self.soft

    def log_probs(self) -> Tensor:
        """Log-probabilities, shape of the logits; finite where a soft target may multiply them by 0."""
        log_probs = F.log_softmax(self.logits, 1)
        return log_probs.clamp_min(torch.finfo(log_probs.dtype).min) if self.soft else log_probs

    def nll(self, log_probs: Tensor | None = None) -> Tensor:
        """-log p of the label, ``(N, ...)``; of every class if the target is soft, ``(N, C, ...)``."""
        log_probs = self.log_probs() if log_probs is None else log_probs
        return -log_probs if self.soft else F.nll_loss(log_probs, self.target, reduction="none")

    def expected(self, values: Tensor) -> Tensor:
        """What the labels of :meth:`nll` cost on average, given what each costs; weighted, ``(N, ...)``."""
        if self.soft:
            target = self.target if self.weight is None else self.target * self._per_class(self.weight)
            return (target * values).sum(1)
        return values if self.weight is None else values * self.weight[self.target]

    def cross_entropy(self, log_probs: Tensor | None = None) -> Tensor:
        """Cross-entropy of every position, ``(N, ...)``."""
        return self.expected(self.nll(log_probs))

    def total_cross_entropy(self) -> Tensor:
        """Cross-entropy summed over the positions that count."""
        return self.kept(self.cross_entropy()).sum()

    def accuracy(self, log_probs: Tensor, top: Tensor) -> Tensor:
        """Whether the label is the prediction (where several logits are largest: one of them), ``(N, ...)``, bool.

        If the target is soft, the probability that it is.

        Args:
            log_probs: What :meth:`log_probs` gives.
            top: The largest of each position.
        """
        log_probs, top = log_probs.detach(), top.detach()
        if self.soft:
            return (self.target * (log_probs == top.unsqueeze(1))).sum(1)
        return log_probs.gather(1, self.target.unsqueeze(1)).squeeze(1) == top

    def excess(self, probs: Tensor) -> Tensor:
        """Probability of each class, summed over the positions that count, less how often it is the label, ``(C,)``."""
        pixels = [*range(2, probs.ndim)]
        probs = probs if self.keep is None else probs * self.keep.unsqueeze(1)
        if self.soft:
            target = self.target if self.keep is None else self.target * self.keep.unsqueeze(1)
            return probs.sum([0, *pixels]) - target.sum([0, *pixels])
        ones = self.kept(probs.new_full((), -1.0).expand(self.target.shape))
        return probs.sum([0, *pixels]).index_add(0, self.target.flatten(), ones.flatten())

    def kept(self, values: Tensor) -> Tensor:
        """``values``, one for each position, with 0 where a position is ignored."""
        return values if self.keep is None else torch.where(self.keep, values, 0)

    def counted(self) -> Tensor:
        """Which positions count, bool, ``(N, ...)``, also where all do."""
        return torch.ones_like(self.logits[:, 0], dtype=torch.bool) if self.keep is None else self.keep

    def n_positions(self) -> Tensor:
        """How many positions of each item count, at least 1, ``(N,)``."""
        return self.counted().reshape(len(self.logits), self.logits[:1, 0].numel() or 1).sum(1).clamp_min(1)

    def n_kept(self) -> Tensor | int:
        """How many positions count, at least 1, so that a batch without any has the loss 0."""
        return max(1, self.n_all) if self.keep is None else self.keep.sum().clamp_min(1)

    def mean(self, values: Tensor) -> Tensor:
        """Mean of ``values``, one for each position, over the positions that count."""
        if self.keep is None and values.numel():
            return values.mean()
        return self.kept(values).sum() / self.n_kept()

    def weighted_mean(self, values: Tensor) -> Tensor:
        """Mean of values that are weighted: as torch has it, by the weights of the labels, and plain if soft."""
        if self.weight is None or self.soft:
            return self.mean(values)
        total = self.kept(self.weight[self.target]).sum()
        return self.kept(values).sum() / total.clamp_min(torch.finfo(total.dtype).tiny)

    def unweighted(self) -> "Positions":
        """The same without the weights, which penalties have not."""
        return self._replace(weight=None)

    def reduced(
        self,
        values: Tensor,
        reduction: Reduction,
        log_terms: dict[str, Tensor] | None = None,
        log_probs: Tensor | None = None,
        **named: Tensor,
    ) -> Tensor:
        """Reduce the loss of every position, with its weight, and :meth:`note` the terms."""
        self.note(log_terms, log_probs, **named)
        if reduction == "mean":
            return self.weighted_mean(values)
        return self.kept(values).sum() if reduction == "sum" else self.kept(values).reshape(self.shape)

    def reduced_cross_entropy(self, log_probs: Tensor, reduction: Reduction) -> Tensor:
        """Reduce the cross-entropy."""
        if reduction == "mean" and self.equal_labels and self.n_all:
            return mean_nll(log_probs, self.target)
        return self.reduced(self.cross_entropy(log_probs), reduction)

    def reduced_with(
        self, penalty: Tensor, reduction: Reduction, log_terms: dict[str, Tensor] | None, **named: Tensor
    ) -> Tensor:
        """Reduce the cross-entropy, which is weighted, and a penalty, which is not; :meth:`note` the terms."""
        log_probs = self.log_probs()
        self.note(log_terms, log_probs, **named)
        return self.reduced_cross_entropy(log_probs, reduction) + self.unweighted().reduced(penalty, reduction)

    def reduced_gap(self, gap: Tensor, reduction: Reduction) -> Tensor:
        """Reduce one number of the whole batch as if it were the loss of each position; 0 if there are none."""
        return gap if reduction == "mean" else self.unweighted().reduced(gap.expand(self.logits[:, 0].shape), reduction)

    def note(self, log_terms: dict[str, Tensor] | None, log_probs: Tensor | None = None, **named: Tensor) -> None:
        """Put the mean cross-entropy and those of the named terms into ``log_terms``, if there is one to fill.

        Args:
            log_terms: What a loss was given.
            log_probs: What :meth:`log_probs` gives, where it is known.
            **named: One number for each position, or for the whole batch.
        """
        if log_terms is not None:
            with torch.no_grad():
                log_terms["cross_entropy"] = self.weighted_mean(self.cross_entropy(log_probs))
                log_terms.update({name: self.mean(term.detach()) for name, term in named.items()})

    def _per_class(self, values: Tensor) -> Tensor:
        return values.reshape(-1, *[1] * (self.logits.ndim - 2))


def mean_nll(log_probs: Tensor, target: Tensor) -> Tensor:
    """Mean of -log p of the labels, of which there is one at least."""
    # torch's own mean is one step; over dense outputs it takes a GPU twice as long as the two.
    if log_probs.ndim > 2:
        return F.nll_loss(log_probs, target, reduction="none").mean()
    return F.nll_loss(log_probs, target)


def as_positions(
    logits: Tensor,
    target: Tensor,
    *,
    task: Task,
    ignore_index: int | None,
    reduction: Reduction,
    weight: Tensor | None = None,
    why_hard: str = _LABELS_ONLY,
) -> Positions:
    """Check and lay out a batch.

    Args:
        logits: ``(N, C)`` or dense ``(N, C, ...)``; for ``task="binary"`` one logit per position, ``(N,)``, ``(N, 1)``,
            ``(N, 1, ...)`` or ``(N, ...)``; for ``task="multilabel"`` one per label, ``(N, K)`` or ``(N, K, ...)``.
            Half precision is computed in float32.
        target: Class indices, ``(N,)`` or ``(N, ...)``, or probabilities of the classes, float, shape of the logits.
            For the other tasks 0 or 1 of any dtype, or the probability of 1.
        task: ``"multiclass"``, ``"binary"`` or ``"multilabel"``.
        ignore_index: Target value of positions to leave out.
        reduction: Checked only.
        weight: Of each class, ``(C,)``.
        why_hard: Why the loss takes no probabilities, and what to do; empty if it takes them.

    Raises:
        TypeError: If either is no tensor, or the target's dtype cannot hold class indices.
        ValueError: If shapes do not fit, an option is unknown, a label is out of range, or probabilities are none.
            Targets on an accelerator are not read, which would stall it: there torch's own assertion fails for labels.
    """
    check_choice("reduction", reduction, _REDUCTIONS)
    check_choice("task", task, TASKS)
    probabilities = are_probabilities(logits, target, task)
    if probabilities and (why_hard or ignore_index is not None):
        raise OptionError(why_hard or _NOTHING_TO_IGNORE)
    labels = target if probabilities else checked_target(logits, target, task)
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    shape = logits.shape[:1] + logits.shape[2:] if probabilities else target.shape
    if task != "multiclass":
        logits, labels = _pairs(logits, labels)
    labels = labels if labels.is_floating_point() else labels.long()
    keep = None if ignore_index is None else labels != ignore_index
    if keep is not None:
        labels = torch.where(keep, labels, 0)
        # Whatever is there, nan too: neither values nor gradients may see it.
        logits = torch.where(keep.unsqueeze(1), logits, 0)
    # Targets on an accelerator are not read, which would stall it, nor while a graph is made.
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(labels, logits, task, why_hard)
    if weight is not None:
        check_weight(weight, logits.shape[1])
        weight = weight.to(logits.dtype)
    if labels.is_floating_point():
        labels = labels.long() if why_hard else labels.to(logits.dtype)
    if labels.is_floating_point() and task != "multiclass":
        labels = torch.stack([1 - labels, labels], 1)
    return Positions(logits, labels, keep, shape, weight)


def _check_values(labels: Tensor, logits: Tensor, task: Task, why_hard: str) -> None:
    """Refuse labels out of range, and probabilities that are none."""
    if not labels.is_floating_point():
        check_range(labels.flatten(), logits.shape[1], _WAY_OUT)
    elif task == "multiclass":
        check_probabilities(labels)
    else:
        check_between_labels(labels)
        if why_hard and bool((labels != labels.round()).any()):
            raise ValueError(why_hard)


def _pairs(logit: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """One logit per position as the pair of :class:`Positions`, ``(N, 2, ...)``, and its target, ``(N, ...)``."""
    # Either may have an axis of length 1 for the class that the other has not.
    shape = min(logit.shape, target.shape, key=len)[1:]
    positive = logit.reshape(len(logit), 1, *shape) / 2
    return torch.cat([-positive, positive], 1), target.reshape(len(target), *shape)
