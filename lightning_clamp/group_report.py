"""For whom does the clamp help? Metrics by group before and after, in a test of the calibrated module."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_clamp._batch import entry_of
from lightning_clamp._checks import check_whole
from lightning_clamp.metrics import (
    ByGroup,
    ExpectedCalibrationError,
    GroupValues,
    NegativeLogLikelihood,
    plot_groups,
)
from lightning_clamp.report import log_figures, training_step
from lightning_clamp.spec import Spec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Side: TypeAlias = Literal["before", "after"]

_METRICS = {"nll": NegativeLogLikelihood, "ece": ExpectedCalibrationError}
_IN_WORDS = {"nll": "NLL (nats)", "ece": "ECE"}
# Groups that the printed table names.
_MOST_SHOWN = 5


@dataclass(frozen=True)
class Groups:
    """Which entry of a batch holds the group of each sample: a hospital, a camera, a language.

    Attributes:
        key: Of the entry, as in ``batch_keys``: key of a mapping, name of an attribute, or position. It holds whole
            numbers from 0 on, one per sample.
        names: Of the groups, in the order of their numbers; or how many there are.

    Raises:
        ValueError: If there is no group, or a name occurs twice.
    """

    key: str | int
    names: Sequence[str] | int

    def __post_init__(self) -> None:
        check_whole("names", self.count, least=1)
        if len(set(self.named)) < self.count:
            raise ValueError(f"`names` must differ from each other, got {list(self.named)}.")

    @property
    def count(self) -> int:
        """How many there are."""
        return self.names if isinstance(self.names, int) else len(self.names)

    @property
    def named(self) -> Sequence[str]:
        """Their names."""
        return [str(group) for group in range(self.names)] if isinstance(self.names, int) else self.names

    def of(self, batch: Any) -> Tensor:
        """The groups of a batch.

        Raises:
            TypeError: If it has no such entry, or that is no tensor.
        """
        groups = entry_of(batch, self.key, "groups")
        if not isinstance(groups, Tensor):
            raise TypeError(f"The groups of a batch must be a tensor of whole numbers, got {type(groups).__name__}.")
        return groups


class GroupReport(nn.Module):
    """NLL and ECE of each group, of the bare network and of the calibrated one.

    The state is that of the two metrics for each group and both sides: 740 KB a group.

    Args:
        groups: Which groups.
        spec: What the outputs mean.

    Raises:
        TypeError: If the groups are of another kind.
    """

    def __init__(self, groups: Groups, spec: Spec) -> None:
        super().__init__()
        if not isinstance(groups, Groups):
            raise TypeError(
                "The groups of a module must be Groups(key, names), such as Groups(2, ['Basel', 'Bern']), got "
                f"{groups!r}."
            )
        self.groups = groups
        by_group = {
            f"{side}_{name}": ByGroup(metric(**spec.of_metrics), groups.count)
            for side in ("before", "after")
            for name, metric in _METRICS.items()
        }
        self.metrics = nn.ModuleDict(by_group)

    def update(self, side: Side, logits: Tensor, target: Tensor, batch: Any) -> None:
        """Add a batch."""
        groups = self.groups.of(batch).to(logits.device)
        for name in _METRICS:
            metric: Any = self.metrics[f"{side}_{name}"]
            metric.update(logits, target, groups)

    def compute(self) -> "GroupFindings":
        """The values of all batches and ranks."""
        metrics: dict[str, Any] = dict(self.metrics.items())
        return GroupFindings(self.groups, {name: metric.compute() for name, metric in metrics.items()})


@dataclass(frozen=True)
class GroupFindings:
    """What :class:`GroupReport` has found; printed, it is a table of the worst groups.

    Attributes:
        groups: Which groups.
        values: By ``before_nll``, ``after_nll``, ``before_ece`` and ``after_ece``.
    """

    groups: Groups
    values: dict[str, GroupValues]

    def scalars(self) -> dict[str, float]:
        """The numbers that are logged, by their log key; without groups that are too small."""
        return {
            f"{'calibrated' if side == 'after' else 'bare'}/groups/{group}/{name}": float(value)
            for side in ("before", "after")
            for name in _METRICS
            for group, value in zip(self.groups.named, self.values[f"{side}_{name}"].values, strict=True)
            if not value.isnan()
        }

    def __str__(self) -> str:
        """The groups with the largest ECE after, and how many were too small."""
        ece, sizes = self.values["after_ece"]
        known = int((~ece.isnan()).sum())
        order = ece.nan_to_num(-1).argsort(descending=True, stable=True)[: min(known, _MOST_SHOWN)].tolist()
        lines = [f"{f'worst by {self.groups.key}':<24}{'samples':>9}    {'NLL before, after':<21}{'ECE before, after'}"]
        for group in order:
            nll_before, nll = self._pair("nll", group)
            ece_before, ece_after = self._pair("ece", group)
            lines.append(
                f"{self.groups.named[group][:23]:<24}{int(sizes[group]):>9,}"
                f"    {nll_before:<9.4f}{nll:<12.4f}{ece_before:<9.2%}{ece_after:.2%}"
            )
        if known < len(ece):
            lines.append(f"too few samples to say: {len(ece) - known} of {len(ece)} groups")
        return "\n".join(lines)

    def _pair(self, name: str, group: int) -> tuple[float, float]:
        before, after = (float(self.values[f"{side}_{name}"].values[group]) for side in ("before", "after"))
        return before, after

    def figures(self) -> "dict[str, Figure]":
        """A picture of each metric, by log key."""
        return {f"calibrated/groups/{name}": self._figure(name) for name in _METRICS}

    def _figure(self, name: str) -> "Figure":
        after, before = self.values[f"after_{name}"], self.values[f"before_{name}"]
        options: dict[str, Any] = {"names": self.groups.named, "label": _IN_WORDS[name]}
        return plot_groups(after.values, after.sizes, before=before.values, title=f"by {self.groups.key}", **options)[0]

    def log_figures(self, trainer: Trainer) -> None:
        """Send the pictures to the Trainer's loggers."""
        if trainer.is_global_zero:
            log_figures(trainer.loggers, self.figures, training_step(trainer))
