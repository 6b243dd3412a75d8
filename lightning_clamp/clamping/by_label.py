"""What a calibration did for each of several labels, the worst first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lightning_clamp._checks import counted
from lightning_clamp.metrics.bootstrap import BlockSums
from lightning_clamp.metrics.groups import MIN_SAMPLES
from lightning_clamp.metrics.reliability import ReliabilityCurve

# More labels than this are not logged one by one.
_MOST_LOGGED = 100


def by_log_key(values: Mapping[str, Tensor], entries: Tensor) -> dict[str, float]:
    """NLL and ECE of each label of which at least 100 entries are known, as ``ece_3``; nothing of over 100 labels.

    Args:
        values: ``nll`` and ``ece``, ``(K,)`` each.
        entries: Known entries of each label, ``(K,)``.
    """
    if len(entries) > _MOST_LOGGED:
        return {}
    known = (entries >= MIN_SAMPLES).nonzero()[:, 0].tolist()
    return {f"{name}_{label}": float(values[name][label]) for name in ("nll", "ece") for label in known}


@dataclass(frozen=True, repr=False)
class LabelMetrics:
    """Metrics of each of K labels on the calibration set; printed, a table of the worst.

    Attributes:
        before: ``nll`` (nats per entry), ``ece`` and ``accuracy`` (fractions), ``(K,)`` float64 each, uncalibrated; nan
            for a label of which nothing was known.
        after: The same with the clamp.
        entries: Known entries of each label, ``(K,)``, int64.
        reliability: Reliability curves, before and after, of the first label of ``worst``; None if there is none.
    """

    before: Mapping[str, Tensor]
    after: Mapping[str, Tensor]
    entries: Tensor
    reliability: tuple[ReliabilityCurve, ReliabilityCurve] | None

    @classmethod
    def from_sums(cls, before: BlockSums, after: BlockSums) -> "LabelMetrics":
        """The metrics of sums of the same entries."""
        entries = before.entries_by_label.long().cpu()
        first, second = ({name: values.cpu() for name, values in sums.by_label.items()} for sums in (before, after))
        found = cls(first, second, entries, None)
        if not found.worst:
            return found
        label = found.worst[0]
        return replace(found, reliability=(before.of_label(label).curve, after.of_label(label).curve))

    @property
    def worst(self) -> list[int]:
        """The labels with at least 100 known entries, the largest ECE after the calibration first."""
        order = self.after["ece"].nan_to_num(-1).argsort(descending=True, stable=True)
        worst: list[int] = order[self.entries[order] >= MIN_SAMPLES].tolist()
        return worst

    def table(self, names: Sequence[str] | None = None, *, most: int = 10) -> str:
        """A line for each label, the worst first.

        Args:
            names: Of the labels; by default their numbers.
            most: Lines, at most; the others are counted.

        Raises:
            ValueError: If there are not as many names as labels.
        """
        names = [str(label) for label in range(len(self.entries))] if names is None else names
        if len(names) != len(self.entries):
            raise ValueError(f"`names` must have one name per label, {len(self.entries)}, got {len(names)}.")
        worst = self.worst
        lines = [f"{'label, worst first':<24}{'entries':>9}    {'NLL before, after':<21}{'ECE before, after'}"]
        lines += [self._line(label, names[label]) for label in worst[:most]]
        if len(worst) > most:
            lines.append(f"and {len(worst) - most} more")
        if few := len(names) - len(worst):
            lines.append(f"too few known entries to say (below {MIN_SAMPLES}): {few} of {counted(len(names), 'label')}")
        return "\n".join(lines)

    def _line(self, label: int, name: str) -> str:
        nll, ece = ([float(side[key][label]) for side in (self.before, self.after)] for key in ("nll", "ece"))
        return (
            f"{name[:23]:<24}{int(self.entries[label]):>9,}    {nll[0]:<9.4f}{nll[1]:<12.4f}{ece[0]:<9.2%}{ece[1]:.2%}"
        )

    def __repr__(self) -> str:
        """The table."""
        return self.table()

    def to_state(self) -> dict[str, Any]:
        """Tensors on the CPU, which ``torch.load(weights_only=True)`` reads."""
        curves = self.reliability and [tuple(part.cpu() for part in curve) for curve in self.reliability]
        return {
            "before": dict(self.before),
            "after": dict(self.after),
            "entries": self.entries,
            "reliability": curves,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "LabelMetrics":
        """The inverse of :meth:`to_state`."""
        curves = state["reliability"]
        if curves is not None:
            before, after = (ReliabilityCurve(*curve) for curve in curves)
            curves = (before, after)
        return cls(state["before"], state["after"], state["entries"], curves)
