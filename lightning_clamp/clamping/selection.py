"""Which grid, which output map: what may be worth its cost is fitted, and one criterion decides."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from lightning_clamp.clamping.candidate import Candidate, Refusal
from lightning_clamp.clamping.clamp import Clamp
from lightning_clamp.clamping.criterion import estimate
from lightning_clamp.clamping.eligible import eligible_grids, refuse_map
from lightning_clamp.clamping.options import ClampOptions
from lightning_clamp.clamping.outcome import MethodOutcome
from lightning_clamp.clamping.output_map import (
    OUTPUT_MAPS,
    SHRINKAGES,
    MapFit,
    MapSpace,
    OutputMap,
    fit_output_map,
    logit_square,
    map_space,
    standard_error,
    temperature_fit,
)
from lightning_clamp.clamping.passes import CalibrationSet
from lightning_clamp.clamping.reason import reason
from lightning_clamp.clamping.scoring import GridFit, first_pass, fit_grid, start_without_grid
from lightning_clamp.clamping.summary import DatasetSummary
from lightning_clamp.clamping.temperature import NO_TEMPERATURE, TemperatureFit

# Samples for each of a map's effective deviations from the temperature: with fewer, the estimate of the held-out change
# is itself too uncertain.
_PER_DEVIATION = 4
# Weaker and weaker shrinkage is tried until the criterion has risen this often in a row.
_PATIENCE = 2


def choose_clamp(
    data: CalibrationSet, summary: DatasetSummary, base: TemperatureFit, options: ClampOptions
) -> MethodOutcome:
    r"""Fit output maps, then grids on top of the best of them, and choose by the expected held-out loss.

    The output maps are scale and bias per class, shrunk towards the temperature; the strength of the shrinkage is one
    of the choices. The perturbation is a smooth image, spanned by an r×r grid of coefficients per channel, fitted
    together with the best output map by Fisher scoring. One pass says what every grid promises; a grid is fitted only
    where that is better than the best candidate so far, the most promising first, and all output maps are then fitted
    again on its logits. The choice is that of :mod:`~.criterion`.

    Args:
        data: Network and batches, frozen.
        summary: First look at the same data.
        base: Temperature scaling of the unchanged logits; where the hottest temperature is the best, only an output map
            can help.
        options: What to consider.
    """
    if not base.interior and base.log_temperature < 0:
        # Every sample is right, and the colder the better, with any output map.
        return MethodOutcome(Clamp(), summary.logits, NO_TEMPERATURE)
    comparison = _comparison(summary, base, _kinds(options.output_maps, binary=data.spec.binary), data.spec.binary)
    grids, refused = eligible_grids(options.grids, summary)
    fitted = _candidates(start_without_grid(summary, comparison.base), comparison)
    candidates = refused + [candidate for candidate, _ in fitted]
    best, map_fit = min(fitted, key=lambda pair: pair[0].rank)
    if map_fit is None or best.rank > 0:
        return MethodOutcome(Clamp(), summary.logits, NO_TEMPERATURE, tuple(candidates))
    start = start_without_grid(summary, map_fit, best.standard_error or 0.0)
    chosen, logits, history = best, summary.logits, []
    firsts = first_pass(data, summary, start, grids)
    for grid, first in sorted(zip(grids, firsts, strict=True), key=lambda pair: pair[1].predicted.criterion):
        if best.rank + first.predicted.criterion >= chosen.rank:
            refusal = Refusal("costs more than it promises", "the first pass promises less than it costs")
            candidates.append(_unfitted(first, map_fit.space, comparison, refusal))
            continue
        fit = fit_grid(data, summary, grid, first, options.max_passes)
        if fit.perturbation is None:
            refusal = Refusal("no step helps", "no step was taken, or none lowered the loss")
            candidates.append(_unfitted(fit, map_fit.space, comparison, refusal))
            continue
        history += [{"grid": grid.size, **step} for step in fit.history]
        on_grid = [candidate for candidate, _ in _candidates(fit, comparison)]
        candidates += on_grid
        if (better := min(on_grid, key=lambda one: one.rank)).rank < chosen.rank:
            chosen, logits = better, fit.logits
    assert chosen.clamp is not None
    candidates.sort(key=lambda one: (one.grid, OUTPUT_MAPS.index(one.output_map)))
    return MethodOutcome(chosen.clamp, logits, reason(chosen, candidates), tuple(candidates), chosen, tuple(history))


def _kinds(outputs: Iterable[OutputMap], *, binary: bool) -> list[OutputMap]:
    """The output maps to fit beside the temperature, the smaller first."""
    asked = {"bias" if binary and kind == "vector" else kind for kind in outputs}
    return [kind for kind in OUTPUT_MAPS[1:] if kind in asked]


class _Comparison(NamedTuple):
    """What all candidates are compared with and made from.

    Attributes:
        summary: First look at the data.
        binary: Whether the network has one logit.
        base: Temperature scaling of the unchanged logits.
        finite: Whether that is a finite temperature, or the hottest that is considered.
        spaces: Parameters of the output maps to fit beside the temperature.
    """

    summary: DatasetSummary
    binary: bool
    base: MapFit
    finite: bool
    spaces: tuple[MapSpace, ...]


def _comparison(summary: DatasetSummary, base: TemperatureFit, kinds: Sequence[OutputMap], binary: bool) -> _Comparison:
    square = logit_square(summary.logits) if kinds else 1.0
    space = map_space("temperature", summary.n_classes, square)
    fit = temperature_fit(summary.logits, space, base, dense=summary.dense)
    spaces = tuple(map_space(kind, summary.n_classes, square, fit.effective_parameters) for kind in kinds)
    return _Comparison(summary, binary, fit, base.interior, spaces)


def _candidates(fit: GridFit, comparison: _Comparison) -> list[tuple[Candidate, MapFit | None]]:
    """Every output map on the logits of one grid, each with the shrinkage that the criterion prefers."""
    return [_of_temperature(fit, comparison), *(_best_of_map(fit, space, comparison) for space in comparison.spaces)]


def _of_temperature(fit: GridFit, comparison: _Comparison) -> tuple[Candidate, MapFit | None]:
    space = comparison.base.space
    map_fit = comparison.base if comparison.finite else None
    if fit.size:
        map_fit = fit_output_map(fit.logits, space, 0.0, fit.map_fit.free[-1:], dense=comparison.summary.dense)
    if map_fit is None:
        refusal = Refusal("no temperature", "no finite temperature is best")
        return _unfitted(fit, space, comparison, refusal), None
    return _fitted(fit, map_fit, comparison), map_fit


def _best_of_map(fit: GridFit, space: MapSpace, comparison: _Comparison) -> tuple[Candidate, MapFit | None]:
    """The output map of one kind whose shrinkage has the lowest criterion, from the strongest on."""
    if refusal := refuse_map(space, comparison.summary):
        return _unfitted(fit, space, comparison, refusal), None
    started = time.perf_counter()
    best: tuple[Candidate, MapFit] | None = None
    free, risen = space.temperature_only(1 / float(fit.map_fit.free[-1])), 0
    for shrinkage in SHRINKAGES:
        map_fit = fit_output_map(fit.logits, space, shrinkage, free, dense=comparison.summary.dense)
        if map_fit is None and best is None:
            continue
        if map_fit is None or _deviations(map_fit, comparison) * _PER_DEVIATION > comparison.summary.n_samples:
            break
        free = map_fit.free
        candidate = _fitted(fit, map_fit, comparison)
        if best is None or candidate.rank < best[0].rank:
            best, risen = (candidate, map_fit), 0
        else:
            risen += 1
        if risen == _PATIENCE:
            break
    if best is None:
        words = "its best map is not positive, or has too many deviations from the temperature for these samples"
        return _unfitted(fit, space, comparison, Refusal("no usable map", words)), None
    candidate, map_fit = best
    return replace(candidate, seconds=fit.seconds + time.perf_counter() - started), map_fit


def _deviations(map_fit: MapFit, comparison: _Comparison) -> float:
    """How many independent deviations from the temperature a map has, whatever the samples' rows repeat."""
    return map_fit.effective_parameters / comparison.base.effective_parameters - 1


def _unfitted(fit: GridFit, space: MapSpace, comparison: _Comparison, refusal: Refusal | None = None) -> Candidate:
    """A candidate's name and cost, and what the first pass said of its grid."""
    candidate = Candidate(
        fit.size,
        space.kind,
        fit.n_coefficients + space.n_parameters,
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
        error += standard_error(fit.logits, map_fit.point, fit.map_fit.point)
    gain = base.nll - map_fit.nll
    expected = estimate(gain, effective - base.effective_parameters, summary.n_rows, error)
    return replace(
        _unfitted(fit, map_fit.space, comparison),
        shrinkage=None if kind == "temperature" else map_fit.shrinkage,
        effective_parameters=effective,
        achieved_gain=gain,
        expected_change=expected.change,
        standard_error=expected.standard_error,
        criterion=expected.criterion,
        clamp=_clamp(fit, map_fit, comparison),
    )


def _clamp(fit: GridFit, map_fit: MapFit, comparison: _Comparison) -> Clamp:
    """The clamp of a grid and an output map: the common scale is the temperature, the rest is relative to it."""
    dtype, common = comparison.summary.parameter_dtype, map_fit.free[-1]
    scale, bias = map_fit.point.chunk(2)
    return Clamp(
        fit.perturbation,
        -common.log().to(dtype),
        None if map_fit.space.kind == "temperature" else (bias[1:] - bias[:1] if comparison.binary else bias).to(dtype),
        (scale / common).to(dtype) if map_fit.space.kind == "vector" else None,
    )
