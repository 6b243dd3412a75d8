"""What every metric here shares: how a batch is read and checked, and one additive float64 state."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import rank_zero_warn

from lightning_clamp._checks import are_probs, check_range
from lightning_clamp._rows import TASKS, Task, is_one_block, row_blocks

# Below this many rows, values that add up to 1 may be chance.
_TELLING_ROWS = 10


def top_label(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence and correctness of the top label, ``(M,)`` each, from logits ``(M, C)``; of tied logits the first."""
    top = logits.amax(1, keepdim=True)
    # 1 / sum exp(z - max) rather than the largest softmax: no rounding can lift it above 1.
    confidence = (logits - top).exp_().sum(1).reciprocal_()
    correct = (logits.gather(1, target[:, None]) == top)[:, 0]
    # Where maxima are tied, and so the confidence at most a half, the first is the prediction. Its index for all rows
    # would cost as much as everything else here (and twice that by argmax).
    tied = (correct & (confidence <= 0.5)).nonzero()[:, 0]
    if len(tied):
        correct[tied] = logits[tied].max(1).indices == target[tied]
    return confidence, correct


def top_probability(probs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The same as :func:`top_label`, from probabilities ``(M, C)``."""
    confidence, predicted = probs.max(1)
    return confidence, predicted == target


class RowMetric(Metric):
    """A metric over rows of class scores: ``update(preds, target)`` and one tensor of sums, of a fixed size.

    ``preds`` are logits, or probabilities where the metric was told so: ``(N, C)``, dense ``(N, C, ...)``, or one value
    per position for ``task="binary"``; any float dtype, computed in float32 at least and summed in float64. ``target``
    holds class indices. A subclass registers its state by :meth:`add_sums` and defines :meth:`add`, or ``update``.

    Args:
        task: ``"multiclass"``, or ``"binary"`` for one logit (or one probability) per position.
        ignore_index: Target value of positions to leave out.
        probs: Whether preds are probabilities. By default they are logits; it is never guessed.
        validate_args: Whether to look for nan, labels out of range and rows that are no probabilities. It costs little
            on a CPU, and a synchronisation per batch on an accelerator.
        **kwargs: Options of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: In ``update``: preds with nan, labels out of range, shapes that do not fit together.
        TypeError: In ``update``: preds that are not float, or targets that hold no class indices.
    """

    is_differentiable = False
    full_state_update = False

    def __init__(
        self,
        *,
        task: Task = "multiclass",
        ignore_index: int | None = None,
        probs: bool = False,
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if task not in TASKS:
            raise ValueError(f"`task` must be one of {TASKS}, got {task!r}.")
        self.task: Task = task
        self.ignore_index = ignore_index
        self.probs = probs
        self.validate_args = validate_args
        self._state_name = ""
        self._told_kind = False
        self._doubtful_rows = 0

    def add_sums(self, name: str, *shape: int) -> None:
        """Register the state: float64 sums over samples.

        The state is named after what it sums and every option that shapes it. A ``MetricCollection`` merges metrics
        whose states have equal names and equal values *at the first batch*; a telling name keeps those apart that are
        equal there by chance, such as the sums of two losses on a batch without any.
        """
        self._state_name = f"{name}_{self.task}_{'probs' if self.probs else 'logits'}_ignoring_{self.ignore_index}"
        self.add_state(self._state_name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    @property
    def sums(self) -> Tensor:
        """The state, to be added to in place."""
        sums: Tensor = getattr(self, self._state_name)
        if sums.is_inference() and not torch.is_inference_mode_enabled():
            # Reset under inference mode, as Lightning does after validation; such a tensor cannot be changed outside.
            sums = sums.clone()
            setattr(self, self._state_name, sums)
        return sums

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch."""
        kept = self.sums
        if isinstance(preds, Tensor) and not is_one_block(preds):
            # A bad row in a later block must not leave the earlier ones counted.
            setattr(self, self._state_name, kept.clone())
        try:
            for rows, labels in row_blocks(preds, target, task=self.task, ignore_index=self.ignore_index):
                self.add(*self.read(rows, labels))
        except BaseException:
            setattr(self, self._state_name, kept)
            raise

    def read(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Rows ``(m, C)`` in float32 at least and labels ``(m,)``, on the device of the state, checked."""
        device = self.sums.device
        rows, labels = rows.detach().to(device, torch.promote_types(rows.dtype, torch.float32)), labels.to(device)
        if self.probs and self.task == "binary":
            rows = torch.stack([1 - rows[:, 1], rows[:, 1]], 1)
        if self.validate_args:
            self._validate(rows, labels)
        return rows, labels

    def add(self, rows: Tensor, labels: Tensor) -> None:
        """Add rows ``(m, C)`` of logits (or probabilities) and labels ``(m,)`` to :attr:`sums`, in place."""
        raise NotImplementedError

    def checked(self, derived: Tensor, rows: Tensor) -> Tensor:
        """What was derived from ``rows``, or an error if nan or inf in them has made it nan.

        Asked of few numbers per row, in place of a look at every logit.
        """
        if self.validate_args and math.isnan(float(derived.sum())):
            unusable = int((~rows.amax(1).isfinite()).sum())
            raise ValueError(f"`preds` holds nan or inf in {unusable} of {len(rows)} rows.")
        return derived

    def top_label(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Confidence and correctness of the top label, ``(m,)`` each."""
        return (top_probability if self.probs else top_label)(rows, labels)

    def log_probs(self, rows: Tensor) -> Tensor:
        """Log-probabilities of rows."""
        return rows.log() if self.probs else rows.log_softmax(1)

    def class_probs(self, rows: Tensor) -> Tensor:
        """Probabilities of rows."""
        return rows if self.probs else rows.softmax(1)

    def scored(self, count: Tensor) -> None:
        """Warn if nothing was counted, though there were updates (without any, torchmetrics itself warns)."""
        if self.update_called and not count.any():
            rank_zero_warn(
                f"{type(self).__name__} is nan: no position was scored, since batches were empty or all targets were "
                f"ignore_index={self.ignore_index}.",
                UserWarning,
            )

    def _validate(self, rows: Tensor, labels: Tensor) -> None:
        check_range(
            labels, rows.shape[1], " Labels start at 0. Positions that have no label are left out with ignore_index."
        )
        if not self.probs:
            if len(rows) and not self._told_kind:
                self._warn_of_probabilities(rows)
        elif not are_probs(rows):
            raise ValueError(
                "With probs=True `preds` must be probabilities, non-negative and adding up to 1 over the classes; for "
                "logits leave probs=True out."
            )

    def _warn_of_probabilities(self, rows: Tensor) -> None:
        values_between = self.task == "binary" and bool(((rows >= 0) & (rows <= 1)).all())
        if not (values_between or are_probs(rows)):
            self._told_kind = True
            return
        self._doubtful_rows += len(rows)
        if self._doubtful_rows >= _TELLING_ROWS:
            self._told_kind = True
            rank_zero_warn(
                f"{type(self).__name__} was given values that look like probabilities, and took them as logits: say "
                "probs=True if they are probabilities.",
                UserWarning,
            )

    # Private in torch, and where torchmetrics moves states; `exclude_state` is its way to leave them to the metric, and
    # nothing public comes before. `fn` would also cast them, as when a Trainer with precision="bf16-true" casts the
    # module around. The tests hold it against such a module, and against a device that refuses float64.
    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        sums = self.sums
        super()._apply(fn, [*exclude_state, self._state_name])
        try:
            fn(torch.zeros(0, dtype=torch.float64, device=sums.device))
        except TypeError:
            warnings.warn(
                f"This device has no float64: {type(self).__name__} keeps its sums on the CPU and moves batches there.",
                stacklevel=2,
            )
        else:
            setattr(self, self._state_name, sums.to(self.device))
        return self
