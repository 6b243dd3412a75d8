"""What every metric here shares: the reading of a batch, and one additive float64 state."""

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import Self

from lightning_clamp._rows import Task, is_one_block
from lightning_clamp.metrics._labels import AVERAGES, LabelAverage, averaged, checked_average, checked_labels
from lightning_clamp.metrics._reading import PredictedRows, Reader

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class RowMetric(Metric):
    """A metric over rows of predictions: ``update(preds, target)`` and one tensor of sums, of a fixed size.

    ``preds`` are logits, or probabilities where the metric was told so: ``(N, C)``, dense ``(N, C, ...)``, or one value
    per position for ``task="binary"``; any float dtype, computed in float32 at least and summed in float64. ``target``
    holds class indices. A subclass registers its state by :meth:`add_sums` and defines :meth:`add` and :meth:`value`.

    A value that is a tensor is float32, as those of torchmetrics, or float64 after ``set_dtype(torch.float64)``.
    Casting the module around the metric changes no value. Curves, evidence and sums, from which more is computed, are
    float64.

    For ``task="multilabel"`` preds are one logit (or probability) per label, ``(N, K)`` or dense ``(N, K, ...)``, and
    the target is 0 or 1 in the same shape, int, bool or float. Each label is read as ``task="binary"`` reads one logit.

    Args:
        task: ``"multiclass"``; ``"binary"`` for one logit (or one probability) per position; or ``"multilabel"`` for
            one per label.
        ignore_index: Target value of positions, or of single labels of an item, to leave out.
        probs: Whether preds are probabilities. By default they are logits; it is never guessed.
        validate_args: Whether to look for nan, labels out of range and rows that are no probabilities. It costs little
            on a CPU; an accelerator is waited for once per batch, and without it not at all (``ignore_index`` costs
            one wait either way).
        num_labels: Number of labels, K, for ``task="multilabel"``; not needed if ``average`` is ``"micro"``.
        average: For ``task="multilabel"``: ``"macro"``, the mean over the labels of which an entry was scored;
            ``"none"``, the value of each label; or ``"micro"``, the value of all entries taken as one label.
        **kwargs: Options of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: In ``update``: preds with nan, labels out of range, shapes that do not fit together.
        TypeError: In ``update``: preds that are not float, or targets that hold no class indices.
    """

    is_differentiable = False
    full_state_update = False
    plot_lower_bound: float | None = 0.0
    # How it can average over labels, the default first.
    averages: ClassVar[tuple[LabelAverage, ...]] = AVERAGES
    # TorchScript compiles all other properties of a metric that a scripted module holds.
    __jit_unused_properties__: ClassVar[list[str]] = [*Metric.__jit_unused_properties__, "sums"]

    def __init__(
        self,
        *,
        task: Task = "multiclass",
        ignore_index: int | None = None,
        probs: bool = False,
        validate_args: bool = True,
        num_labels: int | None = None,
        average: LabelAverage | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        name = type(self).__name__
        self.label_average = checked_average(average, self.averages, task)
        self.num_labels = checked_labels(num_labels, self.label_average, task, name)
        self.reader = Reader(
            name,
            task=task,
            ignore_index=ignore_index,
            probs=probs,
            validate_args=validate_args,
            num_labels=self.num_labels,
        )
        self._state_name = ""
        self.value_dtype = value_dtype(self)

    def add_sums(self, name: str, *shape: int) -> None:
        """Register the state: float64 sums over samples, with a leading axis of the labels if there are several.

        The state is named after what it sums and every option that shapes it. A ``MetricCollection`` merges metrics
        whose states have equal names and equal values *at the first batch*; a telling name keeps those apart that are
        equal there by chance, such as the sums of two losses on a batch without any.
        """
        kind = "probs" if self.reader.probs else "logits"
        self._state_name = f"{name}_{self.reader.task}_{kind}_ignoring_{self.reader.ignore_index}"
        if self.num_labels is not None:
            self._state_name += f"_of_{self.num_labels}_labels"
            shape = (self.num_labels, *shape)
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

    @torch.jit.unused
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add a batch and give its own value; one that is refused leaves everything as it was."""
        kept = dict(self.__dict__)
        try:
            return super().forward(*args, **kwargs)
        except BaseException:
            # torchmetrics sets the state aside for the batch, and takes it up again only if nothing was raised.
            self.__dict__.update(kept)
            raise

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch; one that is refused leaves the state as it was."""
        kept = self.sums
        if isinstance(preds, Tensor) and not is_one_block(preds):
            # A bad row in a later block must not leave the earlier ones counted.
            setattr(self, self._state_name, kept.clone())
        try:
            self.add_batch(preds, target)
        except BaseException:
            setattr(self, self._state_name, kept)
            raise

    def add_batch(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch to :attr:`sums`, in place; a block that is refused adds nothing."""
        for rows in self.reader.blocks(preds, target, self.sums.device):
            self.add(rows)

    def add(self, rows: PredictedRows) -> None:
        """Add rows to :attr:`sums`, in place."""
        raise NotImplementedError

    def value(self, sums: Tensor) -> Any:
        """The value of sums of the shape that was registered; float64."""
        raise NotImplementedError

    def compute(self) -> Any:
        """The value over all rows seen, nan before the first; a tensor in ``value_dtype``."""
        sums = self.sums
        self.warn_unless(sums)
        if self.num_labels is None:
            value = self.value(sums)
        else:
            value = self.over_labels([self.value(of_label) for of_label in sums], sums.flatten(1).any(1))
        return value.to(self.value_dtype) if isinstance(value, Tensor) else value

    def over_labels(self, values: list[Any], scored: Tensor) -> Any:
        """What is made of the values of the labels; ``scored``, ``(K,)``, says which had entries."""
        return averaged(values, scored, self.label_average)

    def warn_unless(self, scored: Tensor) -> None:
        """Warn if nothing was counted, though there were updates (without any, torchmetrics itself warns)."""
        if self.update_called:
            self.reader.warn_unless(bool(scored.any()))

    def plot(self, val: Any = None, ax: "Axes | None" = None) -> "tuple[Figure, Axes]":
        """Draw the value, or how it went.

        Args:
            val: What ``compute`` or ``forward`` gave, or a list of such values, one per step; by default the current.
            ax: Where to draw; a new figure by default.

        Returns:
            The figure and the axes.
        """
        val = self.compute() if val is None else val
        shown = [self.numbers(one) for one in val] if isinstance(val, list) else self.numbers(val)
        # Private, and what torchmetrics asks the `plot` of every metric to call.
        drawn = cast("Axes", self._plot(shown, ax)[1])
        return drawn.figure.figure, drawn

    def numbers(self, value: Any) -> Any:
        """What :meth:`plot` draws of a value: a tensor, or tensors by name."""
        return value

    def set_dtype(self, dst_type: str | torch.dtype) -> Self:
        """Give values in another dtype, float32 or float64; the sums stay float64."""
        super().set_dtype(dst_type)
        # Kept apart: torchmetrics' `dtype` is float32 again once a metric is moved, and half in a module that is cast.
        self.value_dtype = value_dtype(self)
        # It was computed in the dtype before.
        self._computed = None
        return self

    # Private in torch, and where torchmetrics moves states; `exclude_state` is its way to leave them to the metric, and
    # nothing public comes before. `fn` would also cast them, as when a Trainer with precision="bf16-true" casts the
    # module around. The tests hold it against such a module, and against a device that refuses float64.
    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        sums, values = self.sums, (self._computed, self._forward_cache)
        self._computed = self._forward_cache = None
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
            values = apply_to_collection(values, Tensor, Tensor.to, self.device)
        # What torchmetrics keeps of the last calls, private as well: moved with the sums, and not cast either.
        self._computed, self._forward_cache = values
        return self


def value_dtype(metric: Metric) -> torch.dtype:
    """The dtype of the values of a metric that was just made or given a dtype: that one, float32 at least."""
    return torch.promote_types(metric.dtype, torch.float32)
