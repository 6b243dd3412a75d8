"""What all candidates are compared with, and made from."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lightning_clamp._rows import Task
from lightning_clamp.clamping.beta import beta_space
from lightning_clamp.clamping.candidate import Candidate, Refusal
from lightning_clamp.clamping.eligible import FEWEST, refuse_map
from lightning_clamp.clamping.labels import LabelMoments, label_moments, label_space, repeats_within
from lightning_clamp.clamping.moments import LogitMoments, logit_moments
from lightning_clamp.clamping.options import ClampOptions
from lightning_clamp.clamping.output_map import OUTPUT_MAPS, MapSpace, OutputMap, map_space
from lightning_clamp.clamping.passes import RowSource
from lightning_clamp.clamping.shrinkage import HEAD_START, MapFit, temperature_map, with_share
from lightning_clamp.clamping.summary import DatasetSummary
from lightning_clamp.clamping.temperature import TemperatureFit

# Nats of the summed loss within which a simpler map is as good: half a nat is what over-fitting brings a parameter.
_AS_GOOD = 0.5


class Comparison(NamedTuple):
    """What all candidates are compared with and made from.

    Attributes:
        summary: First look at the data.
        task: What the outputs mean.
        moments: Of the unchanged logits.
        base: Temperature scaling of the unchanged logits.
        alone: The same, and that with a uniform share where it is worth its cost.
        spaces: Parameters of the output maps to fit beside the temperature, by kind; or why one is not fitted.
    """

    summary: DatasetSummary
    task: Task
    moments: LogitMoments
    base: MapFit
    alone: list[MapFit]
    spaces: dict[OutputMap, MapSpace | Refusal]

    @property
    def charge(self) -> float:
        """What a perturbation costs beyond its coefficients, in effective parameters.

        The best of several grids and steps looks good by chance: those chosen promised some nats more than they kept.
        """
        return HEAD_START * self.base.effective_parameters

    def best_of(self, candidates: Sequence[Candidate]) -> Candidate:
        """The lowest criterion on one grid; of maps nearly as good the simplest, which comes first."""
        nat = self.base.effective_parameters / self.summary.n_rows
        most = min(one.rank for one in candidates) + _AS_GOOD * nat
        return next(one for one in candidates if one.rank <= most)


def compare(summary: DatasetSummary, base: TemperatureFit, options: ClampOptions, task: Task) -> Comparison:
    """What is known before any output map is fitted.

    Args:
        summary: First look at the data.
        base: Temperature scaling of the unchanged logits.
        options: What to consider.
        task: What the outputs mean.
    """
    rows, classes, n_rows = summary.logits, summary.n_classes, summary.n_rows
    fit = temperature_map(rows, classes, base, dense=summary.dense)
    repeats = fit.effective_parameters
    within = _repeats_within(summary, fit)
    moments = _moments(summary, fit.temperature, within)
    alone = [fit]
    if options.uniform_share and not summary.n_labels and not moments.masked and n_rows >= FEWEST * repeats:
        shared = with_share(rows, fit, base, n_rows)
        alone += [] if shared is None else [shared]
    spaces: dict[OutputMap, MapSpace | Refusal] = {}
    for kind in _kinds(options.output_maps, summary, binary=task == "binary"):
        refusal = refuse_map(kind, moments, n_rows / repeats, kept=rows.are_kept, dense=summary.dense)
        spaces[kind] = refusal or _space(kind, rows, moments, alone[-1].temperature, within)
    return Comparison(summary, task, moments, fit, alone, spaces)


def _kinds(asked: Iterable[OutputMap], summary: DatasetSummary, *, binary: bool) -> list[OutputMap]:
    """The output maps to fit beside the temperature, the smaller first."""
    kinds: set[OutputMap] = set(asked)
    if summary.n_classes == 2 and "matrix" in kinds:
        # Two scales say already all that a matrix of two classes can; and what one label's logit says of another label
        # is for the network to find.
        kinds = kinds - {"matrix"} | ({"vector"} if summary.n_labels else {"vector", "beta"})
    if (binary or summary.n_labels == 1) and "vector" in kinds:
        # One logit has one scale, which is the temperature's.
        kinds = kinds - {"vector"} | {"bias"}
    return [kind for kind in OUTPUT_MAPS[1:] if kind in kinds]


def _repeats_within(summary: DatasetSummary, fit: MapFit) -> float:
    """How many rows say what one independent row would: of all of an item's, or of those of one label."""
    if not summary.n_labels:
        return fit.effective_parameters
    if summary.row_elements == summary.n_labels:
        return 1.0
    return repeats_within(summary.logits, summary.n_labels, fit.temperature)


def _moments(summary: DatasetSummary, temperature: float, repeats: float) -> LogitMoments:
    if summary.n_labels:
        return label_moments(summary.logits, summary.n_labels, temperature, repeats)
    return logit_moments(summary.logits, summary.n_classes, temperature, repeats)


def _space(kind: OutputMap, rows: RowSource, moments: LogitMoments, temperature: float, repeats: float) -> MapSpace:
    if isinstance(moments, LabelMoments):
        return label_space(kind, moments, temperature, repeats)
    if kind == "beta":
        return beta_space(rows, moments, temperature, repeats)
    return map_space(kind, moments, repeats)
