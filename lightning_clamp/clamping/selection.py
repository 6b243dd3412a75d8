"""Which grid, which output map: what may be worth its cost is fitted, and one criterion decides."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_clamp._rows import Task
from lightning_clamp.clamping.candidate import Candidate, Refusal
from lightning_clamp.clamping.clamp import Clamp
from lightning_clamp.clamping.criterion import estimate
from lightning_clamp.clamping.eligible import FEWEST, eligible_grids, refuse_grids, refuse_map
from lightning_clamp.clamping.gradient import gradient_problem
from lightning_clamp.clamping.labels import LabelMoments, label_moments, label_space, repeats_within
from lightning_clamp.clamping.map_loss import standard_error
from lightning_clamp.clamping.moments import LogitMoments, logit_moments
from lightning_clamp.clamping.options import ClampOptions
from lightning_clamp.clamping.outcome import MethodOutcome
from lightning_clamp.clamping.output_map import OUTPUT_MAPS, MapSpace, OutputMap, map_space, n_parameters
from lightning_clamp.clamping.passes import CalibrationSet
from lightning_clamp.clamping.paths import ShrinkagePath
from lightning_clamp.clamping.ranks import Ranks
from lightning_clamp.clamping.reason import reason
from lightning_clamp.clamping.scoring import GridFit, first_pass, fit_grid, start_without_grid
from lightning_clamp.clamping.shrinkage import (
    MapFit,
    average,
    fit_path,
    shrinkage_path,
    temperature_map,
    with_share,
)
from lightning_clamp.clamping.summary import DatasetSummary
from lightning_clamp.clamping.temperature import NO_TEMPERATURE, TemperatureFit, fit_temperature

# Entries of the curvature of an output map that a grid is fitted together with; some eight such matrices are held at
# once, 2 GB in all.
_MOST_CURVATURE = 2**25


def choose_clamp(
    data: CalibrationSet, summary: DatasetSummary, base: TemperatureFit, options: ClampOptions
) -> MethodOutcome:
    r"""Fit output maps, then grids on top of the best of them, and choose by the expected held-out loss.

    The output maps are a scale and a bias per class, or a matrix, shrunk towards the temperature (:mod:`~.shrinkage`).
    The perturbation is a smooth image, spanned by an r×r grid of coefficients per channel, fitted together with the
    best output map by Fisher scoring. One pass says what every grid promises; a grid is fitted only where that is
    better than the best candidate so far, the most promising first, and all output maps are then fitted again on its
    logits. The choice is that of :mod:`~.criterion`.

    Args:
        data: Network and batches, frozen.
        summary: First look at the same data.
        base: Temperature scaling of the unchanged logits.
        options: What to consider.
    """
    if not base.determined:
        # Every sample is right, and the colder the better, with any output map; or all outputs are the same.
        return MethodOutcome(Clamp(), summary.logits, NO_TEMPERATURE)
    kinds = _kinds(options.output_maps, summary, binary=data.spec.binary)
    comparison = _comparison(summary, base, kinds, options, data.spec.task)
    grids, refused = eligible_grids(options.grids, summary)
    if grids and (refusal := refuse_grids(comparison.moments) or _no_gradient(data)) is not None:
        refused += [Candidate(grid.size, "temperature", grid.n_coefficients + 1, refusal=refusal) for grid in grids]
        grids = []
    fitted = _candidates(start_without_grid(summary, comparison.base), comparison)
    candidates = refused + [candidate for candidate, _ in fitted]
    chosen, logits, history = min((one for one, _ in fitted), key=lambda one: one.rank), summary.logits, []
    best, map_fit = _best_to_go_on_from(fitted)
    start = start_without_grid(summary, map_fit, best.standard_error or 0.0)
    if map_fit.is_negative:
        # Steps of a grid are bounded by the common scale.
        grids = []
    firsts = first_pass(data, summary, start, grids)
    for grid, first in sorted(zip(grids, firsts, strict=True), key=lambda pair: pair[1].predicted.criterion):
        to_beat = chosen.rank - best.rank
        if first.predicted.criterion >= to_beat:
            refusal = Refusal("costs more than it promises", "the first pass promises less than it costs")
            candidates.append(_unfitted(first, map_fit.space.kind, comparison, refusal))
            continue
        fit = fit_grid(data, summary, grid, first, options.max_passes, to_beat)
        if fit.perturbation is None:
            refusal = Refusal("no step helps", "no step was taken, or none lowered the loss")
            candidates.append(_unfitted(fit, map_fit.space.kind, comparison, refusal))
            continue
        history += [{"grid": grid.size, **step} for step in fit.history]
        on_grid = [candidate for candidate, _ in _candidates(fit, comparison)]
        candidates += on_grid
        if (better := min(on_grid, key=lambda one: one.rank)).rank < chosen.rank:
            chosen, logits = better, fit.logits
    assert chosen.clamp is not None
    _warn_of_unseen(comparison.moments, data.ranks)
    candidates.sort(key=lambda one: (one.grid, OUTPUT_MAPS.index(one.output_map)))
    return MethodOutcome(chosen.clamp, logits, reason(chosen, candidates), tuple(candidates), chosen, tuple(history))


def _kinds(asked: Iterable[OutputMap], summary: DatasetSummary, *, binary: bool) -> list[OutputMap]:
    """The output maps to fit beside the temperature, the smaller first."""
    kinds: set[OutputMap] = set(asked)
    if (binary or summary.n_labels == 1) and kinds & {"vector", "matrix"}:
        # One logit has one scale, which is the temperature's.
        kinds = kinds - {"vector", "matrix"} | {"bias"}
    elif summary.n_classes == 2 and "matrix" in kinds:
        # Two scales say already all that a matrix of two classes can; and what one label's logit says of another label
        # is for the network to find.
        kinds = kinds - {"matrix"} | {"vector"}
    return [kind for kind in OUTPUT_MAPS[1:] if kind in kinds]


class _Comparison(NamedTuple):
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


def _comparison(
    summary: DatasetSummary, base: TemperatureFit, kinds: Sequence[OutputMap], options: ClampOptions, task: Task
) -> _Comparison:
    rows, classes, n_rows = summary.logits, summary.n_classes, summary.n_rows
    fit = temperature_map(rows, classes, base, dense=summary.dense)
    repeats = fit.effective_parameters
    within = _repeats_within(summary, fit)
    moments = _moments(summary, fit.temperature, within)
    alone = [fit]
    if options.uniform_share and not summary.n_labels and not moments.masked and n_rows >= FEWEST * repeats:
        shared = with_share(rows, fit, base, n_rows)
        alone += [] if shared is None else [shared]
    kept = rows.are_kept
    spaces: dict[OutputMap, MapSpace | Refusal] = {}
    for kind in kinds:
        refusal = refuse_map(kind, moments, n_rows / repeats, kept=kept)
        spaces[kind] = refusal or _space(kind, moments, fit.temperature, within)
    return _Comparison(summary, task, moments, fit, alone, spaces)


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


def _space(kind: OutputMap, moments: LogitMoments, temperature: float, repeats: float) -> MapSpace:
    if isinstance(moments, LabelMoments):
        return label_space(kind, moments, temperature, repeats)
    return map_space(kind, moments, repeats)


def _best_to_go_on_from(fitted: Sequence[tuple[Candidate, MapFit | None]]) -> tuple[Candidate, MapFit]:
    """The best map whose curvature a grid's fits in memory beside; with thousands of classes the temperature."""
    small = [(one, fit) for one, fit in fitted if fit is not None and len(fit.free) ** 2 <= _MOST_CURVATURE]
    return min(small, key=lambda pair: pair[0].rank)


def _no_gradient(data: CalibrationSet) -> Refusal | None:
    problem = gradient_problem(data)
    return None if problem is None else Refusal("no gradient", problem)


def _warn_of_unseen(moments: LogitMoments, ranks: Ranks) -> None:
    if moments.are_missing:
        ranks.warn(
            moments.warning_of_unseen,
            stacklevel=4,
        )


def _candidates(fit: GridFit, comparison: _Comparison) -> list[tuple[Candidate, MapFit | None]]:
    """Every output map on the logits of one grid, and what a grid would start from.

    That has no uniform share: what looks like wrong labels may be what a perturbation puts right.
    """
    starts = _temperatures_on(fit, comparison)
    maps = [_best_of_map(fit, kind, starts or [comparison.base], comparison) for kind in comparison.spaces]
    return [_of_temperature(fit, starts, comparison), *maps]


def _temperatures_on(fit: GridFit, comparison: _Comparison) -> list[MapFit]:
    """The temperature alone on these logits, and with a uniform share if that pays; none if undetermined."""
    if not fit.size:
        return comparison.alone
    summary, rows, dense = comparison.summary, fit.logits, comparison.summary.dense
    found = fit_temperature(rows, -math.log(float(fit.map_fit.free[-1])))
    if not found.determined:
        return []
    plain = temperature_map(rows, summary.n_classes, found, dense=dense)
    shared = with_share(rows, plain, found, summary.n_rows) if len(comparison.alone) > 1 else None
    return [plain] if shared is None else [plain, shared]


def _of_temperature(fit: GridFit, starts: Sequence[MapFit], comparison: _Comparison) -> tuple[Candidate, MapFit | None]:
    if not starts:
        refusal = Refusal("no temperature", "no temperature is best")
        return _unfitted(fit, "temperature", comparison, refusal), None
    return _fitted(fit, starts[-1], comparison), starts[0]


def _best_of_map(
    fit: GridFit, kind: OutputMap, starts: Sequence[MapFit], comparison: _Comparison
) -> tuple[Candidate, MapFit | None]:
    """The output maps of one kind, averaged over strengths of shrinkage; and the best single one to go on from.

    Where the temperature wants a uniform share, maps with and without one are fitted: what looked like wrong labels to
    the temperature may be what a map puts right.
    """
    space = comparison.spaces[kind]
    if isinstance(space, Refusal):
        return _unfitted(fit, kind, comparison, space), None
    started = time.perf_counter()
    path = shrinkage_path(fit.logits, space, starts[0], dense=comparison.summary.dense)
    found = [pair for start in starts if path and (pair := _from_start(fit, space, path, start, comparison))]
    if not found:
        refusal = Refusal("no usable map", "no map of that kind has a positive temperature")
        return _unfitted(fit, kind, comparison, refusal), None
    candidate = min((one for one, _ in found), key=lambda one: one.rank)
    return replace(candidate, seconds=fit.seconds + time.perf_counter() - started), found[0][1]


def _from_start(
    fit: GridFit, space: MapSpace, path: ShrinkagePath, start: MapFit, comparison: _Comparison
) -> tuple[Candidate, MapFit] | None:
    """The maps of one kind from a temperature, with its uniform share; None if there are none."""
    n_rows, rows = comparison.summary.n_rows, fit.logits
    space = space.starting_at(start.temperature, start.space.share)
    fits = list(fit_path(rows, space, path, comparison.base, start, n_rows))
    if not fits:
        return None
    candidate = _fitted(fit, average(fits, start, rows, n_rows), comparison)
    return candidate, min(fits, key=lambda pair: pair[1])[0]


def _unfitted(fit: GridFit, kind: OutputMap, comparison: _Comparison, refusal: Refusal | None = None) -> Candidate:
    """A candidate's name and cost, and what the first pass said of its grid."""
    candidate = Candidate(
        fit.size,
        kind,
        fit.n_coefficients + n_parameters(kind, comparison.summary.n_classes, comparison.summary.n_labels),
        passes=fit.passes,
        seconds=fit.seconds,
        refusal=refusal,
    )
    if fit.test is None:
        return candidate
    gain_before = comparison.base.nll - fit.history[0]["nll"]
    return replace(
        candidate,
        lm_statistic=fit.test.statistic,
        p_value=fit.test.p_value,
        predicted_gain=gain_before + fit.predicted_gain,
    )


def _fitted(fit: GridFit, map_fit: MapFit, comparison: _Comparison) -> Candidate:
    """A candidate with all its figures."""
    summary, base, kind = comparison.summary, comparison.base, map_fit.space.kind
    effective = fit.effective_coefficients(dense=summary.dense) + map_fit.effective_parameters
    error = fit.standard_error
    if map_fit is not fit.map_fit:
        error += standard_error(fit.logits, map_fit.space, map_fit.free, (fit.map_fit.space, fit.map_fit.free))
    gain = base.nll - map_fit.nll
    expected = estimate(gain, effective - base.effective_parameters, summary.n_rows, error)
    unfitted = _unfitted(fit, kind, comparison)
    return replace(
        unfitted,
        n_parameters=unfitted.n_parameters + map_fit.space.n_free - 1,
        shrinkage=None if kind == "temperature" else map_fit.shrinkage,
        effective_parameters=effective,
        achieved_gain=gain,
        expected_change=expected.change,
        standard_error=expected.standard_error,
        criterion=expected.criterion,
        clamp=_clamp(fit, map_fit, comparison),
    )


def _clamp(fit: GridFit, map_fit: MapFit, comparison: _Comparison) -> Clamp:
    """The clamp of a grid and an output map: the common scale is the temperature, the rest is relative to it.

    A common scale that is not positive is no temperature: the mean size of the classes' own scales takes its place.
    """
    dtype, common = comparison.summary.parameter_dtype, map_fit.free[-1]
    own, bias = map_fit.space.deviations(map_fit.free)
    parts: dict[str, Tensor] = {}
    if own is not None:
        whole = own + common * (torch.ones_like(own) if own.ndim == 1 else torch.eye(len(own), dtype=own.dtype))
        if map_fit.is_negative:
            common = (whole if own.ndim == 1 else whole.diagonal()).abs().mean()
        parts["class_scale" if own.ndim == 1 else "class_matrix"] = (whole / common).to(dtype)
    if bias is not None:
        offset = map_fit.space.offset(map_fit.free)
        parts["class_bias"] = _bias(offset, comparison.task).to(dtype)
    if share := map_fit.space.share:
        parts["uniform_share"] = torch.full((1,) if comparison.task == "binary" else (), share, dtype=dtype)
    return Clamp(fit.perturbation, -common.log().to(dtype), **parts)


def _bias(offset: Tensor, task: Task) -> Tensor:
    """Of classes only differences count."""
    if task == "multilabel":
        return offset
    return offset[1:] - offset[:1] if task == "binary" else offset - offset.mean()
