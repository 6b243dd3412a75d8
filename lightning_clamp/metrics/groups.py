"""For whom? A metric by group of the samples, with the sizes of the groups."""

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.wrappers.abstract import WrapperMetric
from typing_extensions import Self

from lightning_clamp._checks import check_whole
from lightning_clamp.metrics._base import value_dtype
from lightning_clamp.metrics.group_picture import plot_groups

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Below this many samples a group's value is mostly chance.
MIN_SAMPLES = 100


class GroupValues(NamedTuple):
    """A metric by group.

    Attributes:
        values: Shape ``(n_groups,)``, float64, or what :class:`ByGroup` was told; nan for groups with too few samples
            to say.
        sizes: Samples (images, also of dense outputs) of each group, ``(n_groups,)``, int64.
    """

    values: Tensor
    sizes: Tensor


def by_group(
    function: Callable[[Tensor, Tensor], Tensor],
    preds: Tensor,
    target: Tensor,
    groups: Tensor,
    *,
    n_groups: int,
    min_samples: int = MIN_SAMPLES,
) -> GroupValues:
    """A metric of each group's samples.

    Args:
        function: From ``(preds, target)`` to a number, such as :func:`~.calibration_error.expected_calibration_error`;
            with options, a ``functools.partial`` of it.
        preds: Predictions, as the function takes them.
        target: True class indices, as the function takes them.
        groups: The group of each sample, ``(N,)``, int64, in ``[0, n_groups)``.
        n_groups: Number of groups, at least 1.
        min_samples: Groups with fewer samples are too small to say: nan.

    Raises:
        ValueError: If a group is out of range, the number of groups is not that of the samples, or the function does
            not give one number.
        TypeError: If groups are no whole numbers.
    """
    _check_options(n_groups, min_samples)
    groups = _checked_groups(groups, preds, n_groups)
    sizes = torch.bincount(groups, minlength=n_groups)
    values = torch.full((n_groups,), torch.nan, dtype=torch.float64, device=preds.device)
    for group in (sizes >= max(min_samples, 1)).nonzero()[:, 0].tolist():
        chosen = groups == group
        values[group] = _number(function(preds[chosen], target[chosen]))
    return GroupValues(values, sizes)


class ByGroup(WrapperMetric):
    """Streaming :func:`by_group`: ``update(preds, target, groups)``; its state is that of the metric for each group.

    Args:
        metric: Gives one number, and keeps a state whose size does not grow with the data: any of this package but the
            diagram and the bootstrap, or a metric of torchmetrics without lists (``thresholds=`` for their curves).
        n_groups: Number of groups, at least 1.
        min_samples: Groups with fewer samples are too small to say: nan.
        **kwargs: Options of :class:`torchmetrics.Metric`.

    Values have the dtype of the metric's own: float32, or float64 after ``set_dtype(torch.float64)`` of either.

    Raises:
        TypeError: If ``metric`` is no metric.
        ValueError: If its state is a list, or an option is out of range.

    Example:
        >>> from lightning_clamp.metrics import Accuracy
        >>> metric = ByGroup(Accuracy(), n_groups=2, min_samples=1)
        >>> metric.update(torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1]), torch.tensor([0, 1]))
        >>> metric.compute().values.tolist()
        [1.0, 0.0]
    """

    is_differentiable = False
    full_state_update = False

    def __init__(self, metric: Metric, n_groups: int, *, min_samples: int = MIN_SAMPLES, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(metric, Metric):
            raise TypeError(f"`metric` must be a metric, such as BrierScore(), got {type(metric).__name__}.")
        if lists := [name for name, state in metric.metric_state.items() if isinstance(state, list)]:
            raise ValueError(
                f"{type(metric).__name__} keeps every sample, in {', '.join(lists)}: use a metric whose state has a "
                "fixed size (of torchmetrics, those that take thresholds=100)."
            )
        _check_options(n_groups, min_samples)
        self.n_groups = n_groups
        self.min_samples = min_samples
        self.metrics = nn.ModuleList(metric.clone() for _ in range(n_groups))
        self.sizes = _Sizes(n_groups)
        self.value_dtype = value_dtype(metric)

    def set_dtype(self, dst_type: str | torch.dtype) -> Self:
        """Give values in another dtype, float32 or float64."""
        metrics: Any = self.metrics
        for metric in metrics:
            metric.set_dtype(dst_type)
        super().set_dtype(dst_type)
        self.value_dtype = value_dtype(self)
        return self

    def update(self, preds: Tensor, target: Tensor, groups: Tensor) -> None:
        """Add a batch; ``groups`` holds the group of each of its samples, ``(N,)``, int64."""
        groups = _checked_groups(groups, preds, self.n_groups)
        sizes = torch.bincount(groups, minlength=self.n_groups)
        for group in sizes.nonzero()[:, 0].tolist():
            chosen = groups == group
            self.metrics[group].update(preds[chosen], target[chosen])
        self.sizes.update(sizes)

    def compute(self) -> GroupValues:
        """The value of each group, nan for those with too few samples."""
        sizes = self.sizes.compute()
        values = torch.full((self.n_groups,), torch.nan, dtype=self.value_dtype, device=sizes.device)
        for group in (sizes >= max(self.min_samples, 1)).nonzero()[:, 0].tolist():
            with warnings.catch_warnings():
                # All of its samples may be on other ranks.
                warnings.filterwarnings("ignore", message="The ``compute`` method of metric .* before the ``update``")
                values[group] = _number(self.metrics[group].compute())
        return GroupValues(values, sizes)

    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        for metric in (*self.metrics, self.sizes):
            metric.reset()

    def forward(self, preds: Tensor, target: Tensor, groups: Tensor) -> GroupValues:
        """Add a batch, and return the values of this batch alone."""
        alone = self.clone()
        alone.reset()
        alone.update(preds, target, groups)
        self.update(preds, target, groups)
        values: GroupValues = alone.compute()
        return values

    def plot(
        self, val: GroupValues | None = None, ax: "Axes | None" = None, *, names: Sequence[str] | None = None
    ) -> "tuple[Figure, Axes]":
        """Draw the groups.

        Args:
            val: Computed values; by default the current ones.
            ax: Where to draw; a new figure by default.
            names: Of the groups; by default their numbers.
        """
        computed = self.compute() if val is None else val
        label = type(self.metrics[0]).__name__
        return plot_groups(computed.values, computed.sizes, names=names, ax=ax, label=label)


class _Sizes(Metric):
    """Samples of each group, which take part in no collection's compute groups."""

    full_state_update = False

    def __init__(self, n_groups: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(n_groups, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, counts: Tensor) -> None:
        self.counts: Tensor = self.counts + counts.to(self.counts.device)

    def compute(self) -> Tensor:
        return self.counts


def _check_options(n_groups: int, min_samples: int) -> None:
    check_whole("n_groups", n_groups, least=1)
    check_whole("min_samples", min_samples, least=0)


def _checked_groups(groups: Tensor, preds: Tensor, n_groups: int) -> Tensor:
    if not isinstance(groups, Tensor) or groups.is_floating_point() or groups.dtype == torch.bool:
        kind = str(groups.dtype) if isinstance(groups, Tensor) else type(groups).__name__
        raise TypeError(f"`groups` must hold the number of each sample's group, int64, got {kind}.")
    if groups.shape != preds.shape[:1]:
        raise ValueError(
            f"`groups` must have one number per sample, {tuple(preds.shape[:1])}, got the shape {tuple(groups.shape)}."
        )
    if len(groups):
        low, high = (int(end) for end in groups.aminmax())
        if low < 0 or high >= n_groups:
            wrong = low if low < 0 else high
            raise ValueError(f"Groups must lie in [0, {n_groups - 1}], got {wrong}: is `n_groups` too small?")
    return groups.to(preds.device)


def _number(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise ValueError(
            f"A metric by group must give one number, got {type(value).__name__}; average it over classes."
        )
    return value
