"""How predictions are read: one contract for every metric and for the function beside it."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics.utilities import rank_zero_warn

from lightning_clamp._checks import check_choice, check_range
from lightning_clamp._rows import (
    TASKS,
    Rows,
    Task,
    check_hard,
    class_axis_is_unclear,
    item_blocks,
    row_blocks,
    unclear_axis,
)
from lightning_clamp.metrics._binning import counted

# Rounding of half-precision probabilities may move the sum of a row by this much.
_SUM_TOLERANCE = 0.01
# Below this many rows, values that add up to 1 may be chance.
_TELLING_ROWS = 10


class Reader:
    """Turns predictions of any layout into checked rows, for one metric or for one call of a function.

    Args:
        name: Of the metric or the function, for warnings.
        task: ``"multiclass"``, ``"binary"`` for one logit (or one probability) per position, or ``"multilabel"`` for
            one per label.
        ignore_index: Target value of positions to leave out.
        probs: Whether predictions are probabilities. By default they are logits; it is never guessed.
        validate_args: Whether to look for nan, labels out of range and rows that are no probabilities.
        num_labels: Labels that an item must have; None for any number.

    Raises:
        ValueError: If ``task`` is unknown.
    """

    def __init__(
        self,
        name: str,
        *,
        task: Task = "multiclass",
        ignore_index: int | None = None,
        probs: bool = False,
        validate_args: bool = True,
        num_labels: int | None = None,
    ) -> None:
        check_choice("task", task, TASKS)
        self.name = name
        self.task: Task = task
        self.ignore_index = ignore_index
        self.probs = probs
        self.validate_args = validate_args
        self.num_labels = num_labels
        # Of a reader of one label at a time: which had any entry, instead of a warning.
        self.scored: list[bool] | None = None
        self._told_kind = False
        self._doubtful_rows = 0
        # What to say of the class axis: "" once a batch has told which it is, None before any batch.
        self._unclear_axis: str | None = None

    def blocks(self, preds: Tensor, target: Tensor, device: torch.device | None = None) -> Iterator["PredictedRows"]:
        """The rows of a batch in blocks, at least one, on ``device`` or where they are.

        Raises:
            ValueError: If preds hold no probabilities though they should, labels are out of range, or shapes do not fit
                together.
            TypeError: If preds are not float, or the target holds no class indices.
        """
        self._check_labels(preds)
        for logits, labels, label in row_blocks(preds, target, task=self.task, ignore_index=self.ignore_index):
            yield self.rows(logits, labels, device, label)
        self._look_at_axes(preds, target)

    def item_blocks(self, preds: Tensor, target: Tensor) -> Iterator[Rows]:
        """The rows of a batch in blocks of whole items, unchecked; errors as in :meth:`blocks`."""
        self._check_labels(preds)
        yield from item_blocks(preds, target, task=self.task, ignore_index=self.ignore_index)
        self._look_at_axes(preds, target)

    def rows(
        self, preds: Tensor, target: Tensor, device: torch.device | None = None, label: Tensor | None = None
    ) -> "PredictedRows":
        """Rows, of preds ``(m, C)``, target and label ``(m,)`` as :mod:`lightning_clamp._rows` lays them out."""
        device = preds.device if device is None else device
        preds = preds.detach() if preds.requires_grad else preds
        preds, target = preds.to(device, torch.promote_types(preds.dtype, torch.float32)), target.to(device)
        if self.probs and self.task != "multiclass":
            preds = torch.stack([1 - preds[:, 1], preds[:, 1]], 1)
        # Not looked at before something was computed of it: a label out of range must not end a process on CUDA.
        inside = target.clamp(0, preds.shape[1] - 1) if self.validate_args else target
        return PredictedRows(preds, inside.long(), target, self, None if label is None else label.to(device))

    def of_one_label(self) -> "Reader":
        """The same for one label, ``(N,)`` or dense ``(N, ...)``; it notes in ``scored`` what had no entries."""
        reader = Reader(self.name, task="binary", ignore_index=self.ignore_index, probs=self.probs)
        reader.scored = []
        return reader

    def zero_target(self, preds: Tensor) -> Tensor:
        """A target of zeros that fits preds, for what needs none.

        Raises:
            ValueError: If positions are to be left out, which only a target could name.
        """
        if self.ignore_index is not None:
            raise ValueError(f"ignore_index={self.ignore_index} leaves positions out by their target: pass a target.")
        if not isinstance(preds, Tensor):
            return torch.zeros(0, dtype=torch.int64)  # preds are refused when they are read
        shape = preds.shape if self.task != "multiclass" else preds.shape[:1] + preds.shape[2:]
        return torch.zeros(shape, dtype=torch.int64, device=preds.device)

    def warn_unless(self, scored: bool) -> None:
        """Warn that the result is nan, unless any position was scored; or that it may be of the wrong axis."""
        if self._unclear_axis:
            rank_zero_warn(f"{self.name} took axis 1 for the classes. {self._unclear_axis}", UserWarning)
            self._unclear_axis = ""
        if self.scored is not None:
            self.scored.append(scored)
        elif not scored:
            rank_zero_warn(
                f"{self.name} is nan: no position was scored, since batches were empty or all targets were "
                f"ignore_index={self.ignore_index}.",
                UserWarning,
            )

    def _check_labels(self, preds: Tensor) -> None:
        if self.num_labels is not None and isinstance(preds, Tensor) and preds.shape[1:2] != (self.num_labels,):
            raise ValueError(
                f"`num_labels` is {self.num_labels}, but preds have the shape {tuple(preds.shape)}: the labels are on "
                "axis 1."
            )

    def _look_at_axes(self, preds: Tensor, target: Tensor) -> None:
        if self._unclear_axis != "":
            unclear = class_axis_is_unclear(preds, target, self.task)
            self._unclear_axis = unclear_axis(preds, target) if unclear else ""

    def refuse(self, preds: Tensor, target: Tensor) -> None:
        """Say what is wrong with rows.

        Raises:
            ValueError: If anything is.
        """
        check_hard(target)
        check_range(
            target, preds.shape[1], " Labels start at 0. Positions that have no label are left out with ignore_index."
        )
        if self.probs and not self.can_be_probs(*_extremes(preds).tolist()):
            raise ValueError(
                "With probs=True `preds` must be probabilities, non-negative and adding up to 1 over the classes; for "
                "logits leave probs=True out."
            )
        unusable = int((~preds.amax(1).isfinite()).sum())
        raise ValueError(f"`preds` holds nan or inf in {unusable} of {len(preds)} rows.")

    @property
    def wonders(self) -> bool:
        """Whether logits may still turn out to be probabilities that nobody said to be any."""
        return not (self.probs or self._told_kind)

    def can_be_probs(self, least: float, lowest: float, highest: float) -> bool:
        """Whether values from ``least`` on, whose rows add up to ``lowest`` to ``highest``, can be probabilities."""
        if self.task == "multiclass" or self.probs:
            return least >= 0 and lowest >= 1 - _SUM_TOLERANCE and highest <= 1 + _SUM_TOLERANCE
        # The rows are (0, z) as yet.
        return least >= 0 and highest <= 1

    def learn(self, rows: int, *, seem_probs: bool) -> None:
        """Warn, once, of logits that look like probabilities; some that do not settle it."""
        if not seem_probs:
            self._told_kind = True
            return
        self._doubtful_rows += rows
        if self._doubtful_rows >= _TELLING_ROWS:
            self._told_kind = True
            rank_zero_warn(
                f"{self.name} was given values that look like probabilities, and took them as logits: say "
                "probs=True if they are probabilities, or give it logits.",
                UserWarning,
            )


class PredictedRows(NamedTuple):
    """Rows of predictions with their labels, and what is computed of each.

    Attributes:
        preds: Logits or probabilities, ``(m, C)``, float32 or float64.
        target: Class indices, ``(m,)``, int64; in range, unless nobody is to look.
        given: The same as they came, int64 or float.
        reader: Says which of the two preds are.
        label: Which label of its item each row is, ``(m,)``, int64; None unless ``task="multilabel"``.
    """

    preds: Tensor
    target: Tensor
    given: Tensor
    reader: Reader
    label: Tensor | None = None

    def by_label(self, values: Tensor, num_labels: int) -> Tensor:
        """Sums of ``values``, one per row and shape ``(m, ...)``, over each label's rows: ``(num_labels, ...)``."""
        assert self.label is not None
        return values.new_zeros(num_labels, *values.shape[1:]).index_add_(0, self.label, values)

    def log_probs(self) -> Tensor:
        """Log-probabilities, ``(m, C)``."""
        return self.preds.log() if self.reader.probs else self.preds.log_softmax(1)

    def class_probs(self) -> Tensor:
        """Probabilities, ``(m, C)``."""
        return self.preds if self.reader.probs else self.preds.softmax(1)

    def top_label(self) -> tuple[Tensor, Tensor, Tensor | bool]:
        """Confidence of the top label, ``(m,)``, and two things that are equal where it is right.

        Of tied classes the first is the top one.
        """
        if self.reader.probs:
            return *self.preds.max(1), self.target
        return (_top_label if self.preds.device.type == "cpu" else _top_label_at_once)(self.preds, self.target)

    def counted(self, derived: Tensor) -> Tensor:
        """1 and what was derived of each row, ``(2, m)`` float64; with checks 0 for 1 where a label is out of range."""
        if not self.reader.validate_args:
            return counted(derived)
        rows = derived.new_empty(2, len(derived), dtype=torch.float64)
        self.mark(rows[0])
        rows[1].copy_(derived)
        return rows

    def mark(self, ones: Tensor) -> None:
        """Write 1 where the label is in range, and else 0, ``(m,)``."""
        torch.eq(self.target, self.given, out=ones)

    def check(self, derived: Tensor) -> None:
        """Refuse the rows if they cannot be used; an accelerator is waited for once, for all that there is to know.

        Args:
            derived: A number that was derived from each row, ``(m,)``: nan or inf in the row has made it nan. Asked of
                one number per row, in place of a look at every logit.

        Raises:
            ValueError: If there is nan or inf, a label out of range, or no probability where there should be.
        """
        if self.reader.validate_args:
            self.total(self.counted(derived))

    def total(self, counted: Tensor) -> Tensor:
        """Sums of what :meth:`counted` gave, ``(2,)``; errors as :meth:`check`."""
        sums = counted.sum(1)
        if self.reader.validate_args and len(self.preds):
            self._look_at(sums)
        return sums

    def _look_at(self, sums: Tensor) -> None:
        asked = self.reader.probs or self.reader.wonders
        # One tensor, and so one wait.
        count, total, *extremes = (torch.cat([sums, _extremes(self.preds)]) if asked else sums).tolist()
        can_be_probs = asked and self.reader.can_be_probs(*extremes)
        if count != len(self.preds) or math.isnan(total) or (self.reader.probs and not can_be_probs):
            self.reader.refuse(self.preds, self.given)
        if self.reader.wonders:
            self.reader.learn(len(self.preds), seem_probs=can_be_probs)


def _extremes(rows: Tensor) -> Tensor:
    """The least value of rows ``(m, C)``, and the lowest and the highest sum of a row; ``(3,)`` float64."""
    return torch.stack([rows.amin(), *rows.sum(1).aminmax()]).double()


def _top_label(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, bool]:
    top = logits.amax(1, keepdim=True)
    # 1 / sum exp(z - max) rather than the largest softmax: no rounding can lift it above 1.
    confidence = (logits - top).exp_().sum(1).reciprocal_()
    correct = (logits.gather(1, target[:, None]) == top)[:, 0]
    # Where maxima are tied, and so the confidence at most a half, the first is the prediction. Its index for all rows
    # would cost as much as everything else here (and twice that by argmax).
    tied = (correct & (confidence <= 0.5)).nonzero()[:, 0]
    if len(tied):
        correct[tied] = logits[tied].max(1).indices == target[tied]
    return confidence, correct, True


def _top_label_at_once(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same in few launches, and without waiting for the number of ties: what counts on an accelerator."""
    top = logits.argmax(1, keepdim=True)
    return logits.softmax(1).gather(1, top).flatten(), top.flatten(), target
