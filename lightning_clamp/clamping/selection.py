"""Which grid, which output map: what may be worth its cost is fitted, and one criterion decides."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from lightning_clamp.clamping.clamp import Clamp
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
from lightning_clamp.clamping.passes import CalibrationSet, Logits
from lightning_clamp.clamping.perturbation import Grid, available_sizes, make_grid
from lightning_clamp.clamping.scoring import GridFit, first_pass, fit_grid, untouched
from lightning_clamp.clamping.survey import MIN_SAMPLES, Survey
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


@dataclass(frozen=True)
class Candidate:
    """One combination of input grid and output map that was considered.

    Gains and changes are in nats per row (a sample, or a pixel), against temperature scaling alone.

    Attributes:
        grid: Side r of the coefficient grid; 0 leaves the input alone.
        output: ``"temperature"``, ``"bias"`` or ``"vector"``.
        n_parameters: Free parameters, the temperature included.
        shrinkage: Strength of the ridge that shrinks the output map towards the temperature; None without such a map.
        effective_parameters: What the parameters are charged for. Class outputs: their number, less what the ridge
            takes off; dense outputs: Takeuchi's trace, which counts images rather than pixels.
        lm_statistic: Score (Lagrange multiplier) test of the grid's coefficients, the best output map without a grid
            profiled out. None without a grid.
        p_value: Its tail probability under chi-squared with as many degrees of freedom as coefficients.
        predicted_gain: Gain on the calibration set that the quadratic model promised before any step of the grid, with
            that output map and including its own gain. None without a grid.
        achieved_gain: Gain on the calibration set that was reached.
        expected_change: Akaike's (dense outputs: Takeuchi's) estimate of the change of the held-out NLL; negative is
            better.
        standard_error: Of that estimate, over draws of the calibration set; those of the steps from temperature scaling
            to an output map, from there to a grid, and to another output map there, added up.
        criterion: Expected change plus its standard error; the lowest is chosen.
        passes: Passes over the calibration set spent on the grid, the first (shared by all grids) included.
        seconds: Time spent.
        note: Why it was not fitted or not eligible; empty otherwise. The figures above are then None, except what the
            first pass said of a grid.
        clamp: Its fitted clamp, None where there is a note.
    """

    grid: int
    output: OutputMap
    n_parameters: int
    shrinkage: float | None = None
    effective_parameters: float | None = None
    lm_statistic: float | None = None
    p_value: float | None = None
    predicted_gain: float | None = None
    achieved_gain: float | None = None
    expected_change: float | None = None
    standard_error: float | None = None
    criterion: float | None = None
    passes: int = 0
    seconds: float = 0.0
    note: str = ""
    clamp: Clamp | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """Short name, such as ``"4×4 grid + vector"``."""
        return f"{self.grid}×{self.grid} grid + {self.output}" if self.grid else self.output


@dataclass(frozen=True)
class Fit:
    """What a solver returns: a clamp, the logits it was fitted on, and how it got there."""

    clamp: Clamp
    logits: Logits
    reason: str
    candidates: tuple[Candidate, ...] = ()
    chosen: Candidate | None = None
    history: tuple[dict[str, float], ...] = ()


def fit_by_scoring(
    data: CalibrationSet,
    seen: Survey,
    base: TemperatureFit,
    *,
    grids: Sequence[int] = GRIDS,
    outputs: Sequence[OutputMap] = OUTPUTS,
    max_passes: int = 6,
) -> Fit:
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
        seen: First look at the same data.
        base: Temperature scaling of the unchanged logits; where the hottest temperature is the best, only an output map
            can help.
        grids: Sides r to consider; ``()`` leaves the input alone.
        outputs: Output maps to consider; ``("temperature",)`` is plain Neural Clamping. The temperature alone always
            takes part. With one logit, ``"vector"`` is ``"bias"``: one scale has no deviations.
        max_passes: Most passes spent on one grid, at least 1.
    """
    if not base.interior and base.log_temperature < 0:
        # Every sample is right, and the colder the better, with any output map.
        return Fit(Clamp(), seen.logits, NO_TEMPERATURE)
    binary = data.task == "binary"
    setting = _setting(seen, base, _kinds(outputs, binary=binary), binary=binary)
    usable, records = _usable_grids(grids, seen)
    history: list[dict[str, float]] = []
    fitted = _candidates(untouched(seen, setting.base), setting)
    records += [record for record, _ in fitted]
    chosen, mapped = min(fitted, key=lambda pair: _criterion(pair[0]))
    if mapped is None or _criterion(chosen) > 0:
        return Fit(Clamp(), seen.logits, NO_TEMPERATURE, tuple(records))
    chosen_logits, without_grid = seen.logits, _criterion(chosen)
    start = untouched(seen, mapped, chosen.standard_error or 0.0)
    firsts = first_pass(data, seen, start, usable)
    for grid, first in sorted(zip(usable, firsts, strict=True), key=lambda pair: pair[1].predicted_criterion):
        if without_grid + first.predicted_criterion >= _criterion(chosen):
            records.append(_outline(first, mapped.space, setting, "the first pass promises less than it costs"))
            continue
        fit = fit_grid(data, seen, grid, first, max_passes)
        if fit.perturbation is None:
            records.append(_outline(fit, mapped.space, setting, "no step was taken, or none lowered the loss"))
            continue
        history += [{"grid": grid.size, **step} for step in fit.history]
        for record, _ in _candidates(fit, setting):
            records.append(record)
            if _criterion(record) < _criterion(chosen):
                chosen, chosen_logits = record, fit.logits
    assert chosen.clamp is not None
    records.sort(key=lambda record: (record.grid, OUTPUT_MAPS.index(record.output)))
    return Fit(chosen.clamp, chosen_logits, _reason(chosen, records), tuple(records), chosen, tuple(history))


def _kinds(outputs: Iterable[OutputMap], *, binary: bool) -> list[OutputMap]:
    """The output maps to fit beside the temperature, the smaller first."""
    asked = {"bias" if binary and kind == "vector" else kind for kind in outputs}
    return [kind for kind in OUTPUT_MAPS[1:] if kind in asked]


class _Setting(NamedTuple):
    """What all candidates are compared with and made from.

    Attributes:
        seen: First look at the data.
        binary: Whether the network has one logit.
        base: Temperature scaling of the unchanged logits.
        finite: Whether that is a finite temperature, or the hottest that is considered.
        spaces: Parameters of the output maps to fit beside the temperature.
    """

    seen: Survey
    binary: bool
    base: MapFit
    finite: bool
    spaces: tuple[MapSpace, ...]


def _setting(seen: Survey, base: TemperatureFit, kinds: Sequence[OutputMap], *, binary: bool) -> _Setting:
    square = logit_square(seen.logits) if kinds else 1.0
    space = map_space("temperature", seen.n_classes, square)
    fit = temperature_fit(seen.logits, space, base, dense=seen.dense)
    spaces = tuple(map_space(kind, seen.n_classes, square, fit.effective_parameters) for kind in kinds)
    return _Setting(seen, binary, fit, base.interior, spaces)


def _usable_grids(sizes: Iterable[int], seen: Survey) -> tuple[list[Grid], list[Candidate]]:
    """The grids that the inputs have and the data can feed, and a record of each that was dropped."""
    usable: list[Grid] = []
    dropped: list[Candidate] = []
    for size in sorted(set(sizes)):
        if note := _inputs_refused(size, seen):
            dropped.append(Candidate(size, "temperature", 0, note=note))
            continue
        assert seen.shape is not None
        grid = make_grid(size, seen.shape)
        if note := _grid_refused(grid, seen):
            dropped.append(Candidate(size, "temperature", grid.n_coefficients + 1, note=note))
        else:
            usable.append(grid)
    return usable, dropped


def _inputs_refused(size: int, seen: Survey) -> str:
    if seen.n_inputs > 1 and seen.shape is None:
        return "there are several inputs, and perturb_at names no submodule"
    if not seen.float_inputs:
        return "nothing can be added to integer inputs: perturb_at can name the submodule that is fed the embeddings"
    if seen.shape is None:
        return "the inputs differ in shape"
    if not available_sizes([size], seen.shape):
        return f"inputs of shape {seen.shape} have no such grid"
    return ""


def _grid_refused(grid: Grid, seen: Survey) -> str:
    if grid.n_coefficients * MIN_SAMPLES > seen.n_samples:
        return f"{seen.n_samples} samples are fewer than {MIN_SAMPLES} per coefficient"
    if seen.dense and {seen.dtype, seen.logit_dtype} & {torch.float16, torch.bfloat16}:
        return "the curvature of dense outputs drowns in half precision"
    if seen.dense and (grid.n_coefficients + 1) * seen.row_elements > _MOST_ELEMENTS:
        return "the curvature of outputs this large would not fit in memory"
    return ""


def _candidates(fit: GridFit, setting: _Setting) -> list[tuple[Candidate, MapFit | None]]:
    """Every output map on the logits of one grid, each with the shrinkage that the criterion prefers."""
    return [_of_temperature(fit, setting), *(_of_map(fit, space, setting) for space in setting.spaces)]


def _of_temperature(fit: GridFit, setting: _Setting) -> tuple[Candidate, MapFit | None]:
    space = setting.base.space
    mapped = setting.base if setting.finite else None
    if fit.size:
        mapped = fit_output_map(fit.logits, space, 0.0, fit.mapped.free[-1:], dense=setting.seen.dense)
    if mapped is None:
        return _outline(fit, space, setting, "no finite temperature is best"), None
    return _record(fit, mapped, setting), mapped


def _of_map(fit: GridFit, space: MapSpace, setting: _Setting) -> tuple[Candidate, MapFit | None]:
    """The output map of one kind whose shrinkage has the lowest criterion, from the strongest on."""
    if note := _map_refused(space, setting.seen):
        return _outline(fit, space, setting, note), None
    started = time.perf_counter()
    best: tuple[Candidate, MapFit] | None = None
    free, risen = space.temperature_only(1 / float(fit.mapped.free[-1])), 0
    for shrinkage in SHRINKAGES:
        mapped = fit_output_map(fit.logits, space, shrinkage, free, dense=setting.seen.dense)
        if mapped is None and best is None:
            continue
        if mapped is None or _deviations(mapped, setting) * _PER_DEVIATION > setting.seen.n_samples:
            break
        free = mapped.free
        record = _record(fit, mapped, setting)
        if best is None or _criterion(record) < _criterion(best[0]):
            best, risen = (record, mapped), 0
        else:
            risen += 1
        if risen == _PATIENCE:
            break
    if best is None:
        note = "its best map is not positive, or has too many deviations from the temperature for these samples"
        return _outline(fit, space, setting, note), None
    record, mapped = best
    return replace(record, seconds=fit.seconds + time.perf_counter() - started), mapped


def _map_refused(space: MapSpace, seen: Survey) -> str:
    if (2 * seen.n_classes) ** 2 > _MOST_CURVATURE:
        return "the curvature of so many classes would not fit in memory"
    needed = min(_FEWEST, MIN_SAMPLES * (space.n_parameters - 1))
    return f"{seen.n_samples} samples are fewer than {needed}" if seen.n_samples < needed else ""


def _deviations(mapped: MapFit, setting: _Setting) -> float:
    """How many independent deviations from the temperature a map has, whatever the samples' rows repeat."""
    return mapped.effective_parameters / setting.base.effective_parameters - 1


def _outline(fit: GridFit, space: MapSpace, setting: _Setting, note: str = "") -> Candidate:
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


def _record(fit: GridFit, mapped: MapFit, setting: _Setting) -> Candidate:
    """A candidate with all its figures."""
    seen, base, kind = setting.seen, setting.base, mapped.space.kind
    effective = fit.price(dense=seen.dense) + mapped.effective_parameters
    extra = effective - base.effective_parameters
    gain = base.nll - mapped.nll
    error = fit.standard_error
    if mapped is not fit.mapped:
        error += standard_error(fit.logits, mapped.point, fit.mapped.point)
    return replace(
        _outline(fit, mapped.space, setting),
        shrinkage=None if kind == "temperature" else mapped.shrinkage,
        effective_parameters=effective,
        achieved_gain=gain,
        expected_change=extra / seen.n_rows - gain,
        standard_error=error,
        criterion=extra / seen.n_rows - gain + error,
        clamp=_clamp(fit, mapped, setting),
    )


def _clamp(fit: GridFit, mapped: MapFit, setting: _Setting) -> Clamp:
    """The clamp of a grid and an output map: the common scale is the temperature, the rest is relative to it."""
    dtype, common = setting.seen.parameter_dtype, mapped.free[-1]
    scale, bias = mapped.point.chunk(2)
    return Clamp(
        fit.perturbation,
        -common.log().to(dtype),
        None if mapped.space.kind == "temperature" else (bias[1:] - bias[:1] if setting.binary else bias).to(dtype),
        (scale / common).to(dtype) if mapped.space.kind == "vector" else None,
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
            name = f"{record.grid}×{record.grid} grid" if record.grid else record.output
            names.setdefault(record.note, []).append(name)
    parts = [f"{' and '.join(those)} because {note}" for note, those in names.items()]
    return f" (left out: {'; '.join(parts)})" if parts else ""
