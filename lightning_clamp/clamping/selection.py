"""Which grid, which output map: every combination is fitted, and one criterion decides."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import torch

from lightning_clamp.clamping.clamp import Clamp
from lightning_clamp.clamping.passes import CalibrationSet, Logits
from lightning_clamp.clamping.perturbation import Grid, available_sizes, make_grid
from lightning_clamp.clamping.scoring import GridFit, ScoreTest, effective_parameters, fit_grids, score_test
from lightning_clamp.clamping.survey import MIN_SAMPLES, Survey
from lightning_clamp.clamping.temperature import (
    OUTPUT_MAPS,
    OutputMap,
    OutputMapFit,
    TemperatureFit,
    fit_output_map,
    n_map_parameters,
    output_map_sums,
)

GRIDS = (1, 2, 4, 8)
# Derivatives of one item's logits that are held at once for dense outputs: half a gigabyte in float64.
_MOST_ELEMENTS = 2**26


@dataclass(frozen=True)
class Candidate:
    """One combination of input grid and output map that was considered.

    Gains are in nats per row (a sample, or a pixel), positive when better, against temperature scaling alone.

    Attributes:
        grid: Side r of the coefficient grid; 0 leaves the input alone.
        output: ``"temperature"``, ``"bias"`` or ``"vector"``.
        n_parameters: Free parameters, the temperature included.
        effective_parameters: What they are charged for: their number for class outputs; Takeuchi's trace for dense
            outputs, which counts images rather than pixels.
        lm_statistic: Score (Lagrange multiplier) test of the parameters beyond the temperature. With a grid and an
            output map, the grid's statistic plus the map's on the grid's logits.
        p_value: Its tail probability under chi-squared with ``n_parameters - 1`` degrees of freedom.
        predicted_gain: Gain on the calibration set that the quadratic model promised before any step.
        achieved_gain: Gain on the calibration set that was reached.
        expected_change: Akaike's estimate of the change of the held-out NLL; negative is better.
        criterion: The same with twice the penalty; the lowest is chosen.
        passes: Passes over the calibration set spent on the grid, the first (shared by all grids) included.
        seconds: Time spent.
        note: Why it was not fitted or not eligible; empty otherwise. The figures above are then None.
        clamp: Its fitted clamp, None where there is a note.
    """

    grid: int
    output: OutputMap
    n_parameters: int
    effective_parameters: float | None = None
    lm_statistic: float | None = None
    p_value: float | None = None
    predicted_gain: float | None = None
    achieved_gain: float | None = None
    expected_change: float | None = None
    criterion: float | None = None
    passes: int = 0
    seconds: float = 0.0
    note: str = ""
    clamp: Clamp | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """Short name, such as ``"4×4 grid + bias"``."""
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
    outputs: Sequence[OutputMap] = OUTPUT_MAPS,
    max_passes: int = 6,
) -> Fit:
    r"""Fit every combination of grid and output map, and choose by penalised calibration gain.

    The perturbation is a smooth image, spanned by an r×r grid of coefficients per channel, fitted with T by Fisher
    scoring. The output maps are fitted on the logits of each grid's best iterate. The choice minimises
    (change of the calibration NLL) + 2 p / n against temperature scaling, so nothing is worse than temperature scaling
    by that criterion.

    Args:
        data: Network and batches, frozen.
        seen: First look at the same data.
        base: Temperature scaling of the unchanged logits.
        grids: Sides r to consider; ``()`` leaves the input alone.
        outputs: Output maps to consider; ``("temperature",)`` is plain Neural Clamping. The temperature alone always
            takes part.
        max_passes: Most passes spent on one grid, at least 1.
    """
    usable, records = _usable_grids(grids, seen)
    kinds: list[OutputMap] = ["temperature", *(kind for kind in OUTPUT_MAPS[1:] if kind in outputs)]
    alone = _alone(seen, base)
    untouched = GridFit(0, 0, None, seen.logits, base, None, ScoreTest())
    chosen, chosen_logits = None, seen.logits
    history: list[dict[str, float]] = []
    for fit in chain([untouched], fit_grids(data, seen, base, usable, max_passes)):
        history += [{"grid": fit.size, **step} for step in fit.history]
        for kind in kinds:
            record = _candidate(fit, kind, seen, base, alone, binary=data.task == "binary")
            records.append(record)
            if chosen is None or _criterion(record) < _criterion(chosen):
                chosen, chosen_logits = record, fit.logits
    assert chosen is not None
    assert chosen.clamp is not None
    records.sort(key=lambda record: (record.grid, OUTPUT_MAPS.index(record.output)))
    return Fit(chosen.clamp, chosen_logits, _reason(chosen, records, seen), tuple(records), chosen, tuple(history))


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
    if not seen.float_inputs:
        return "nothing can be added to integer inputs"
    if seen.shape is None:
        return "the inputs differ in shape"
    if not available_sizes([size], seen.shape):
        return f"inputs of shape {seen.shape} have no such grid"
    return ""


def _grid_refused(grid: Grid, seen: Survey) -> str:
    if grid.n_coefficients * MIN_SAMPLES > seen.n_samples:
        return f"{seen.n_samples} samples are fewer than {MIN_SAMPLES} per coefficient"
    if seen.dense and seen.logit_dtype in (torch.float16, torch.bfloat16):
        return "the curvature of dense outputs drowns in half precision"
    if seen.dense and (grid.n_coefficients + 1) * seen.row_elements > _MOST_ELEMENTS:
        return "the curvature of outputs this large would not fit in memory"
    return ""


def _alone(seen: Survey, base: TemperatureFit) -> float:
    """Effective parameters of the temperature alone."""
    if not seen.dense:
        return 1.0
    n_classes = len(seen.samples_per_class)
    return effective_parameters(output_map_sums("temperature", seen.logits, n_classes, base.log_temperature))


def _candidate(
    fit: GridFit, kind: OutputMap, seen: Survey, base: TemperatureFit, alone: float, *, binary: bool
) -> Candidate:
    """Fit one output map on the logits of one grid; a note and no clamp if it is not eligible."""
    started = time.perf_counter()
    n_classes = len(seen.samples_per_class)
    record = Candidate(
        fit.size, kind, fit.n_coefficients + n_map_parameters(kind, n_classes), passes=fit.passes, seconds=fit.seconds
    )
    if kind == "temperature":
        clamp = Clamp(fit.perturbation, _scalar(fit.temperature.log_temperature, seen))
        return _judged(replace(record, clamp=clamp), fit, None, seen, base, alone)
    if note := _map_refused(kind, seen, binary):
        return replace(record, note=note)
    mapped = fit_output_map(kind, fit.logits, n_classes, fit.temperature.log_temperature)
    record = replace(record, seconds=fit.seconds + time.perf_counter() - started)
    if not mapped.converged or float(mapped.class_scale.min()) <= 0:
        return replace(record, note="its best map is not finite and positive")
    clamp = _mapped_clamp(fit, kind, mapped, seen, binary)
    return _judged(replace(record, clamp=clamp), fit, mapped, seen, base, alone)


def _map_refused(kind: OutputMap, seen: Survey, binary: bool) -> str:
    if binary and kind == "vector":
        return "one logit has one scale: the same as bias"
    rarest = int(seen.samples_per_class.min())
    if rarest < MIN_SAMPLES:
        return f"a class occurs in {rarest} samples, fewer than {MIN_SAMPLES}"
    if n_map_parameters(kind, len(seen.samples_per_class)) * MIN_SAMPLES > seen.n_samples:
        return f"{seen.n_samples} samples are fewer than {MIN_SAMPLES} per parameter"
    return ""


def _judged(
    record: Candidate, fit: GridFit, mapped: OutputMapFit | None, seen: Survey, base: TemperatureFit, alone: float
) -> Candidate:
    """Fill in the figures of a fitted candidate."""
    test = score_test(mapped.at_start) if mapped is not None else ScoreTest()
    statistic = fit.test.statistic + test.statistic
    extra = _charged(fit, mapped, alone) if seen.dense else float(record.n_parameters - 1)
    gain = base.nll - (mapped.nll if mapped is not None else fit.temperature.nll)
    record = replace(
        record,
        effective_parameters=alone + extra,
        achieved_gain=gain,
        predicted_gain=(fit.test.predicted_gain + test.predicted_gain) / seen.n_rows,
        expected_change=extra / seen.n_rows - gain,
        criterion=2 * extra / seen.n_rows - gain,
    )
    if record.n_parameters == 1:
        return record
    return replace(record, lm_statistic=statistic, p_value=_chi2_tail(statistic, record.n_parameters - 1))


def _charged(fit: GridFit, mapped: OutputMapFit | None, alone: float) -> float:
    """Effective parameters of a dense candidate beyond those of the temperature alone."""
    extra = effective_parameters(fit.sums) - alone if fit.sums is not None else 0.0
    return extra if mapped is None else extra + effective_parameters(mapped.at_end) - alone


def _mapped_clamp(fit: GridFit, kind: OutputMap, mapped: OutputMapFit, seen: Survey, binary: bool) -> Clamp:
    """Split the fitted scales into a temperature and what is left of them."""
    scale, bias = mapped.class_scale, mapped.class_bias
    bias = (bias[1:] - bias[:1] if binary else bias).to(seen.parameter_dtype)
    if kind == "bias":
        return Clamp(fit.perturbation, _scalar(-math.log(scale[-1]), seen), bias)
    log_temperature = fit.temperature.log_temperature
    class_scale = (scale * math.exp(log_temperature)).to(seen.parameter_dtype)
    return Clamp(fit.perturbation, _scalar(log_temperature, seen), bias, class_scale)


def _scalar(value: float, seen: Survey) -> torch.Tensor:
    return torch.tensor(value, dtype=seen.parameter_dtype)


def _chi2_tail(statistic: float, degrees: int) -> float:
    half = torch.tensor([degrees / 2, max(statistic, 0.0) / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def _criterion(record: Candidate) -> float:
    return math.inf if record.criterion is None or math.isnan(record.criterion) else record.criterion


def _reason(chosen: Candidate, records: Sequence[Candidate], seen: Survey) -> str:
    """Why the choice was made, in words."""
    fitted = [record for record in records if record.criterion is not None and record.n_parameters > 1]
    if chosen.n_parameters > 1:
        assert chosen.achieved_gain is not None
        assert chosen.criterion is not None
        words = (
            f"{chosen.name} lowers the calibration NLL by {chosen.achieved_gain:.4f} with {chosen.n_parameters} "
            f"parameters, {-chosen.criterion:.4f} more than twice Akaike's penalty: the most of {len(fitted) + 1} "
            "candidates"
        )
    elif fitted:
        best = min(fitted, key=_criterion)
        assert best.achieved_gain is not None
        assert best.criterion is not None
        words = (
            f"temperature alone: the best of {len(fitted)} richer candidates, {best.name}, lowers the calibration NLL "
            f"by {best.achieved_gain:.4f}, less than the {best.criterion + best.achieved_gain:.4f} (twice Akaike's "
            f"penalty) that {best.n_parameters} parameters must bring with {seen.n_samples} samples"
        )
    else:
        words = "temperature alone: there was no richer candidate"
    return f"{words}{_left_out(records)}"


def _left_out(records: Sequence[Candidate]) -> str:
    """What was not fitted, by the reason for it; a map that is refused for one grid is refused for all."""
    names: dict[str, list[str]] = {}
    for record in records:
        if record.note and (record.output == "temperature" or record.grid == 0):
            name = f"{record.grid}×{record.grid} grid" if record.grid else record.output
            names.setdefault(record.note, []).append(name)
    parts = [f"{' and '.join(those)} because {note}" for note, those in names.items()]
    return f" (left out: {'; '.join(parts)})" if parts else ""
