"""Which grid, which output map: what may be worth its cost is fitted, and one criterion decides."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from lightning_clamp.clamping.candidate import Candidate
from lightning_clamp.clamping.clamp import Clamp
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
from lightning_clamp.clamping.perturbation import Grid, available_sizes, make_grid
from lightning_clamp.clamping.scoring import GridFit, first_pass, fit_grid, start_without_grid
from lightning_clamp.clamping.summary import MIN_SAMPLES, DatasetSummary
from lightning_clamp.clamping.temperature import NO_TEMPERATURE, TemperatureFit

GRIDS = (1, 2, 4, 8)
OUTPUTS: tuple[OutputMap, ...] = ("temperature", "vector")
# Derivatives of one item's logits that are held at once for dense outputs: half a gigabyte in float64.
_MOST_ELEMENTS = 2**26
# Entries of an output map's curvature; some eight such matrices are held at once, 2 GB in all.
_MOST_CURVATURE = 2**25
# Below these the estimate of the held-out change is itself too uncertain: samples for a map of ten parameters or more,
# and samples for each of a map's effective deviations from the temperature.
_FEWEST = 100
_PER_DEVIATION = 4
# Weaker and weaker shrinkage is tried until the criterion has risen this often in a row.
_PATIENCE = 2


def choose_clamp(
    data: CalibrationSet,
    summary: DatasetSummary,
    base: TemperatureFit,
    *,
    grids: Sequence[int] = GRIDS,
    outputs: Sequence[OutputMap] = OUTPUTS,
    max_passes: int = 6,
) -> MethodOutcome:
    r"""Fit output maps, then grids on top of the best of them, and choose by the expected held-out loss.

    The output maps are scale and bias per class, shrunk towards the temperature; the strength of the shrinkage is one
    of the choices. The perturbation is a smooth image, spanned by an r×r grid of coefficients per channel, fitted
    together with the best output map by Fisher scoring. One pass says what every grid promises; a grid is fitted only
    where that is better than the best candidate so far, the most promising first, and all output maps are then fitted
    again on its logits.

    The choice minimises (change of the calibration NLL) + (effective parameters) / n + (its standard error) against
    temperature scaling: a candidate has to be better by more than what over-fitting and chance explain (Akaike, 1974;
    the one-standard-error rule of Breiman et al., 1984, section 3.4.3).

    Args:
        data: Network and batches, frozen.
        summary: First look at the same data.
        base: Temperature scaling of the unchanged logits; where the hottest temperature is the best, only an output map
            can help.
        grids: Sides r to consider; ``()`` leaves the input alone.
        outputs: Output maps to consider; ``("temperature",)`` is plain Neural Clamping. The temperature alone always
            takes part. With one logit, ``"vector"`` is ``"bias"``: one scale has no deviations.
        max_passes: Most passes spent on one grid, at least 1.
    """
    if not base.interior and base.log_temperature < 0:
        # Every sample is right, and the colder the better, with any output map.
        return MethodOutcome(Clamp(), summary.logits, NO_TEMPERATURE)
    binary = data.task == "binary"
    setting = _setting(summary, base, _kinds(outputs, binary=binary), binary=binary)
    usable, records = _usable_grids(grids, summary)
    history: list[dict[str, float]] = []
    fitted = _candidates(start_without_grid(summary, setting.base), setting)
    records += [record for record, _ in fitted]
    chosen, map_fit = min(fitted, key=lambda pair: _criterion(pair[0]))
    if map_fit is None or _criterion(chosen) > 0:
        return MethodOutcome(Clamp(), summary.logits, NO_TEMPERATURE, tuple(records))
    chosen_logits, without_grid = summary.logits, _criterion(chosen)
    start = start_without_grid(summary, map_fit, chosen.standard_error or 0.0)
    firsts = first_pass(data, summary, start, usable)
    for grid, first in sorted(zip(usable, firsts, strict=True), key=lambda pair: pair[1].predicted_criterion):
        if without_grid + first.predicted_criterion >= _criterion(chosen):
            records.append(_unfitted(first, map_fit.space, setting, "the first pass promises less than it costs"))
            continue
        fit = fit_grid(data, summary, grid, first, max_passes)
        if fit.perturbation is None:
            records.append(_unfitted(fit, map_fit.space, setting, "no step was taken, or none lowered the loss"))
            continue
        history += [{"grid": grid.size, **step} for step in fit.history]
        for record, _ in _candidates(fit, setting):
            records.append(record)
            if _criterion(record) < _criterion(chosen):
                chosen, chosen_logits = record, fit.logits
    assert chosen.clamp is not None
    records.sort(key=lambda record: (record.grid, OUTPUT_MAPS.index(record.output_map)))
    return MethodOutcome(chosen.clamp, chosen_logits, _reason(chosen, records), tuple(records), chosen, tuple(history))


def _kinds(outputs: Iterable[OutputMap], *, binary: bool) -> list[OutputMap]:
    """The output maps to fit beside the temperature, the smaller first."""
    asked = {"bias" if binary and kind == "vector" else kind for kind in outputs}
    return [kind for kind in OUTPUT_MAPS[1:] if kind in asked]


class _Setting(NamedTuple):
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


def _setting(summary: DatasetSummary, base: TemperatureFit, kinds: Sequence[OutputMap], *, binary: bool) -> _Setting:
    square = logit_square(summary.logits) if kinds else 1.0
    space = map_space("temperature", summary.n_classes, square)
    fit = temperature_fit(summary.logits, space, base, dense=summary.dense)
    spaces = tuple(map_space(kind, summary.n_classes, square, fit.effective_parameters) for kind in kinds)
    return _Setting(summary, binary, fit, base.interior, spaces)


def _usable_grids(sizes: Iterable[int], summary: DatasetSummary) -> tuple[list[Grid], list[Candidate]]:
    """The grids that the inputs have and the data can feed, and a record of each that was dropped."""
    usable: list[Grid] = []
    dropped: list[Candidate] = []
    for size in sorted(set(sizes)):
        if note := _inputs_refused(size, summary):
            dropped.append(Candidate(size, "temperature", 0, note=note))
            continue
        assert summary.shape is not None
        grid = make_grid(size, summary.shape)
        if note := _grid_refused(grid, summary):
            dropped.append(Candidate(size, "temperature", grid.n_coefficients + 1, note=note))
        else:
            usable.append(grid)
    return usable, dropped


def _inputs_refused(size: int, summary: DatasetSummary) -> str:
    if summary.n_inputs > 1 and summary.shape is None:
        return "there are several inputs, and perturb_at names no submodule"
    if not summary.float_inputs:
        return "nothing can be added to integer inputs: perturb_at can name the submodule that is fed the embeddings"
    if summary.shape is None:
        return "the inputs differ in shape"
    if not available_sizes([size], summary.shape):
        return f"inputs of shape {summary.shape} have no such grid"
    return ""


def _grid_refused(grid: Grid, summary: DatasetSummary) -> str:
    if grid.n_coefficients * MIN_SAMPLES > summary.n_samples:
        return f"{summary.n_samples} samples are fewer than {MIN_SAMPLES} per coefficient"
    if summary.dense and {summary.dtype, summary.logit_dtype} & {torch.float16, torch.bfloat16}:
        return "the curvature of dense outputs drowns in half precision"
    if summary.dense and (grid.n_coefficients + 1) * summary.row_elements > _MOST_ELEMENTS:
        return "the curvature of outputs this large would not fit in memory"
    return ""


def _candidates(fit: GridFit, setting: _Setting) -> list[tuple[Candidate, MapFit | None]]:
    """Every output map on the logits of one grid, each with the shrinkage that the criterion prefers."""
    return [_of_temperature(fit, setting), *(_best_of_map(fit, space, setting) for space in setting.spaces)]


def _of_temperature(fit: GridFit, setting: _Setting) -> tuple[Candidate, MapFit | None]:
    space = setting.base.space
    map_fit = setting.base if setting.finite else None
    if fit.size:
        map_fit = fit_output_map(fit.logits, space, 0.0, fit.map_fit.free[-1:], dense=setting.summary.dense)
    if map_fit is None:
        return _unfitted(fit, space, setting, "no finite temperature is best"), None
    return _fitted(fit, map_fit, setting), map_fit


def _best_of_map(fit: GridFit, space: MapSpace, setting: _Setting) -> tuple[Candidate, MapFit | None]:
    """The output map of one kind whose shrinkage has the lowest criterion, from the strongest on."""
    if note := _map_refused(space, setting.summary):
        return _unfitted(fit, space, setting, note), None
    started = time.perf_counter()
    best: tuple[Candidate, MapFit] | None = None
    free, risen = space.temperature_only(1 / float(fit.map_fit.free[-1])), 0
    for shrinkage in SHRINKAGES:
        map_fit = fit_output_map(fit.logits, space, shrinkage, free, dense=setting.summary.dense)
        if map_fit is None and best is None:
            continue
        if map_fit is None or _deviations(map_fit, setting) * _PER_DEVIATION > setting.summary.n_samples:
            break
        free = map_fit.free
        record = _fitted(fit, map_fit, setting)
        if best is None or _criterion(record) < _criterion(best[0]):
            best, risen = (record, map_fit), 0
        else:
            risen += 1
        if risen == _PATIENCE:
            break
    if best is None:
        note = "its best map is not positive, or has too many deviations from the temperature for these samples"
        return _unfitted(fit, space, setting, note), None
    record, map_fit = best
    return replace(record, seconds=fit.seconds + time.perf_counter() - started), map_fit


def _map_refused(space: MapSpace, summary: DatasetSummary) -> str:
    if (2 * summary.n_classes) ** 2 > _MOST_CURVATURE:
        return "the curvature of so many classes would not fit in memory"
    needed = min(_FEWEST, MIN_SAMPLES * (space.n_parameters - 1))
    return f"{summary.n_samples} samples are fewer than {needed}" if summary.n_samples < needed else ""


def _deviations(map_fit: MapFit, setting: _Setting) -> float:
    """How many independent deviations from the temperature a map has, whatever the samples' rows repeat."""
    return map_fit.effective_parameters / setting.base.effective_parameters - 1


def _unfitted(fit: GridFit, space: MapSpace, setting: _Setting, note: str = "") -> Candidate:
    """A candidate's name and cost, and what the first pass said of its grid."""
    record = Candidate(
        fit.size,
        space.kind,
        fit.n_coefficients + space.n_parameters,
        passes=fit.passes,
        seconds=fit.seconds,
        note=note,
    )
    if fit.test is None:
        return record
    gain_before = setting.base.nll - fit.history[0]["nll"]
    return replace(
        record,
        lm_statistic=fit.test.statistic,
        p_value=fit.test.p_value,
        predicted_gain=gain_before + fit.predicted_gain,
    )


def _fitted(fit: GridFit, map_fit: MapFit, setting: _Setting) -> Candidate:
    """A candidate with all its figures."""
    summary, base, kind = setting.summary, setting.base, map_fit.space.kind
    effective = fit.effective_coefficients(dense=summary.dense) + map_fit.effective_parameters
    extra = effective - base.effective_parameters
    gain = base.nll - map_fit.nll
    error = fit.standard_error
    if map_fit is not fit.map_fit:
        error += standard_error(fit.logits, map_fit.point, fit.map_fit.point)
    return replace(
        _unfitted(fit, map_fit.space, setting),
        shrinkage=None if kind == "temperature" else map_fit.shrinkage,
        effective_parameters=effective,
        achieved_gain=gain,
        expected_change=extra / summary.n_rows - gain,
        standard_error=error,
        criterion=extra / summary.n_rows - gain + error,
        clamp=_clamp(fit, map_fit, setting),
    )


def _clamp(fit: GridFit, map_fit: MapFit, setting: _Setting) -> Clamp:
    """The clamp of a grid and an output map: the common scale is the temperature, the rest is relative to it."""
    dtype, common = setting.summary.parameter_dtype, map_fit.free[-1]
    scale, bias = map_fit.point.chunk(2)
    return Clamp(
        fit.perturbation,
        -common.log().to(dtype),
        None if map_fit.space.kind == "temperature" else (bias[1:] - bias[:1] if setting.binary else bias).to(dtype),
        (scale / common).to(dtype) if map_fit.space.kind == "vector" else None,
    )


def _criterion(record: Candidate) -> float:
    return math.inf if record.criterion is None or math.isnan(record.criterion) else record.criterion


def _reason(chosen: Candidate, records: Sequence[Candidate]) -> str:
    """Why the choice was made, in words."""
    fitted = [record for record in records if record.criterion is not None and record.n_parameters > 1]
    if chosen.n_parameters > 1:
        words = (
            f"{chosen.name} lowers the calibration NLL by {chosen.achieved_gain:.4f} against temperature scaling with "
            f"{chosen.effective_parameters:.1f} effective parameters; held out it is expected to change by "
            f"{chosen.expected_change:+.4f} ± {chosen.standard_error:.4f}: the best of {len(fitted) + 1} candidates"
        )
    elif fitted:
        best = min(fitted, key=_criterion)
        words = (
            f"temperature alone: the best of {len(fitted)} richer candidates, {best.name}, is expected to change the "
            f"held-out NLL by {best.expected_change:+.4f} ± {best.standard_error:.4f}, no improvement to rely on"
        )
    else:
        words = "temperature alone: there was no richer candidate"
    return f"{words}{_left_out(records)}"


def _left_out(records: Sequence[Candidate]) -> str:
    """What was not fitted, by the reason for it; nothing of grids that inputs without height and width cannot have."""
    names: dict[str, list[str]] = {}
    for record in records:
        if record.note and not record.note.endswith("have no such grid"):
            name = f"{record.grid}×{record.grid} grid" if record.grid else record.output_map
            names.setdefault(record.note, []).append(name)
    parts = [f"{' and '.join(those)} because {note}" for note, those in names.items()]
    return f" (left out: {'; '.join(parts)})" if parts else ""
