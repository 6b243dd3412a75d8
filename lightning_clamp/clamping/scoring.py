r"""Fisher scoring: perturbation and output map together, without a learning rate.

A pass forward and backward to the input gives the score test (can moving the input help at all?), what a grid promises,
and the next step; and what the last one has brought, which a pass forward alone says too.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_clamp.clamping.criterion import Estimate, estimate
from lightning_clamp.clamping.map_loss import row_losses, standard_error
from lightning_clamp.clamping.newton import LossDerivatives, ScoreTest, effective_parameters
from lightning_clamp.clamping.pace import Pace, to_come
from lightning_clamp.clamping.passes import CalibrationSet, Logits
from lightning_clamp.clamping.perturbation import Grid
from lightning_clamp.clamping.score_pass import Derivatives, score_pass
from lightning_clamp.clamping.shrinkage import MapFit, refit
from lightning_clamp.clamping.summary import DatasetSummary

# A step that promises less than this share of what the coefficients are charged is lost in the fit's own error; and a
# gradient, three times as dear, has to bring more.
_WORTHWHILE, _WORTH_A_GRADIENT = 0.05, 0.25


class GridFit(NamedTuple):
    """An iterate of one grid: a perturbation, and the output map fitted to the logits there.

    Attributes:
        size: Side r of the grid; 0 for the untouched input.
        n_coefficients: Number of coefficients.
        perturbation: The shape of one input, or None for none.
        logits: The network's logits there.
        map_fit: The best output map for them, of the kind and shrinkage that was found before the input was touched.
        point: Coefficients, and free parameters of the map, float64.
        sums: Score sums there, or where the last step began; None for the untouched input.
        start_losses: Loss of every row where the grid started, batch by batch.
        standard_error: Of the change of the mean loss against temperature scaling, in nats per row: that of the output
            map the grid started from, and that of the steps since.
        test: Score test of the coefficients at zero, None for the untouched input.
        predicted_gain: Gain per row that the quadratic model promised at zero.
        predicted: What that is expected to be worth on new data, against the start.
        passes: Passes spent, the first (shared) one included.
        seconds: Time spent.
        history: NLL per row and temperature after every step.
    """

    size: int
    n_coefficients: int
    perturbation: Tensor | None
    logits: Logits
    map_fit: MapFit
    point: Tensor
    sums: Derivatives | None = None
    start_losses: Sequence[Tensor] = ()
    standard_error: float = 0.0
    test: ScoreTest | None = None
    predicted_gain: float = 0.0
    predicted: Estimate = Estimate(0.0, 0.0)
    passes: int = 0
    seconds: float = 0.0
    history: tuple[dict[str, float], ...] = ()

    @property
    def ridge(self) -> Tensor:
        """What shrinks each of them; the coefficients are free."""
        return torch.cat([torch.zeros(self.n_coefficients, dtype=torch.float64), self.map_fit.ridge])

    def objective(self, n_rows: int) -> float:
        """Mean loss per row with the ridge."""
        return self.map_fit.nll + 0.5 * float(self.map_fit.ridge @ self.map_fit.free**2) / n_rows

    def step(self, pace: Pace) -> tuple[Tensor, float]:
        """The next step, and the fall of the summed loss with the ridge that it promises."""
        assert self.sums is not None
        sums = self.sums.shrunk(self.point, self.ridge).damped(self.n_coefficients, pace.damping)
        return bounded_step(sums, float(self.point[-1]), pace.length)

    def expected(self, start: "GridFit", to_come: float, summary: DatasetSummary) -> float:
        """The criterion against the start, if the summed loss falls by so much more."""
        gain = start.objective(summary.n_rows) - self.objective(summary.n_rows) + to_come / summary.n_rows
        price, error = self.effective_coefficients(dense=summary.dense), self.standard_error - start.standard_error
        return estimate(gain, price, summary.n_rows, error).criterion

    def effective_coefficients(self, *, dense: bool) -> float:
        """What the coefficients cost, in units of one parameter: their number, or for dense outputs their trace."""
        if not dense or not isinstance(self.sums, LossDerivatives):
            return float(self.n_coefficients)
        p = self.n_coefficients
        own = LossDerivatives(self.sums.gradient[p:], self.sums.curvature[p:, p:], self.sums.covariance[p:, p:])
        return effective_parameters(self.sums, self.ridge) - effective_parameters(own, self.ridge[p:])


def start_without_grid(summary: DatasetSummary, map_fit: MapFit, standard_error: float = 0.0) -> GridFit:
    """No perturbation, and an output map on the logits that are known already."""
    return GridFit(0, 0, None, summary.logits, map_fit, map_fit.free, standard_error=standard_error)


def first_pass(data: CalibrationSet, summary: DatasetSummary, start: GridFit, grids: Sequence[Grid]) -> list[GridFit]:
    """What every grid promises beyond ``start``, from one pass that all of them share."""
    if not grids:
        return []
    started = time.perf_counter()
    space = start.map_fit.space
    losses = row_losses(start.logits, space, start.map_fit.free)
    sums_of_all = score_pass(
        data, None, space, start.map_fit.free, grids, dense=summary.dense, what="all grids, pass 1"
    )
    shared = (time.perf_counter() - started) / len(grids)
    fits = []
    for grid, sums in zip(grids, sums_of_all, strict=True):
        p = grid.n_coefficients
        fit = start._replace(
            size=grid.size,
            n_coefficients=p,
            point=torch.cat([torch.zeros(p, dtype=torch.float64), start.map_fit.free]),
            sums=sums,
            start_losses=losses,
            passes=1,
            seconds=shared,
            history=(_record(1, start.map_fit),),
        )
        shrunk = sums.shrunk(fit.point, fit.ridge)
        step, promise = bounded_step(shrunk, float(fit.point[-1]))
        gain, error = promise / summary.n_rows, _error(step, sums) / summary.n_rows
        fits.append(
            fit._replace(
                test=shrunk.score_test(p),
                predicted_gain=gain,
                predicted=estimate(gain, fit.effective_coefficients(dense=summary.dense), summary.n_rows, error),
            )
        )
    return fits


def fit_grid(
    data: CalibrationSet, summary: DatasetSummary, grid: Grid, start: GridFit, max_passes: int, to_beat: float
) -> GridFit:
    """Step ``-curvature⁻¹ gradient`` in coefficients and map while it pays and may win; shorten a step that fails.

    What a step brought says whether the grid may still win. The model of the loss cannot say that: it promises too
    little where a perturbation has far to go, and too much for many coefficients. So a step is tried by a forward pass
    alone, unless it is near certain that another will follow: then by a pass that brings the next gradient along.

    Args:
        data: Network and batches.
        summary: First look at them.
        grid: Which.
        start: What the first pass said of it.
        max_passes: How many there may be, the first included.
        to_beat: The criterion, against the start, of the best candidate so far.
    """
    started, n_rows = time.perf_counter(), summary.n_rows
    best, passes, history = start, 1, list(start.history)
    pace = Pace(is_sure=start.predicted.criterion + start.predicted_gain / 2 < to_beat)
    (step, promise), follows = start.step(pace), math.inf
    charged = start.effective_coefficients(dense=summary.dense)
    # The first step was promised to be worth more than it costs.
    while passes < max_passes and (passes == 1 or promise > _WORTHWHILE * charged):
        passes += 1
        looks = pace.is_sure and follows > _WORTH_A_GRADIENT * charged and passes < max_passes
        trial = _tried(data, summary, grid, best, step, f"grid {grid.size}, pass {passes}", looks=looks)
        fall = -math.inf
        if trial is not None:
            history.append(_record(passes, trial.map_fit))
            fall = n_rows * (best.objective(n_rows) - trial.objective(n_rows))
        pace = pace.after(fall / promise)
        if trial is not None and fall > 0:
            best, hope = trial._replace(standard_error=_error_of(trial, start)), to_come(promise, fall)
        else:
            step, promise = best.step(pace)
            hope = promise + to_come(promise, promise)
        if best.expected(start, hope, summary) >= to_beat:
            break
        if fall > 0:
            if not looks:
                if hope <= _WORTH_A_GRADIENT * charged or passes + 2 > max_passes:
                    break
                passes += 1
                best = _with_sums(data, summary, grid, best, f"grid {grid.size}, pass {passes}")
            step, promise = best.step(pace)
            # Newton's steps shrink faster and faster.
            follows = promise**2 / fall
    return best._replace(passes=passes, seconds=start.seconds + time.perf_counter() - started, history=tuple(history))


def _tried(
    data: CalibrationSet,
    summary: DatasetSummary,
    grid: Grid,
    previous: GridFit,
    step: Tensor,
    what: str,
    *,
    looks: bool,
) -> GridFit | None:
    """One pass behind a step, and the best map of that kind and shrinkage for its logits, if there is one.

    The pass is forward alone, unless it ``looks`` for the next step: the sums are then taken with the map that the step
    foresees, and carried over to the best one.
    """
    p, like = grid.n_coefficients, previous.map_fit
    perturbation = grid.image(previous.point[:p] + step[:p]).to(summary.parameter_dtype)
    foreseen = replace(like, free=like.free + step[p:])
    trial = previous._replace(perturbation=perturbation, logits=Logits(data, perturbation), map_fit=foreseen)
    if looks:
        trial = _with_sums(data, summary, grid, trial, what, keep=trial.logits)
    else:
        with data.ranks.raise_together():
            for batch, target in data.forward(perturbation, what):
                trial.logits.keep(batch, target)
    map_fit = refit(trial.logits, like, foreseen.free, summary.n_rows, dense=summary.dense)
    if map_fit is None:
        return None
    if looks and trial.sums is not None:
        at_best = trial.sums.at_best_map(map_fit.free - foreseen.free, -map_fit.ridge * map_fit.free)
        trial = trial._replace(sums=at_best)
    return trial._replace(map_fit=map_fit, point=torch.cat([previous.point[:p] + step[:p], map_fit.free]))


def _with_sums(
    data: CalibrationSet, summary: DatasetSummary, grid: Grid, fit: GridFit, what: str, keep: Logits | None = None
) -> GridFit:
    """One pass forward and backward where a fit is."""
    (sums,) = score_pass(
        data,
        fit.perturbation,
        fit.map_fit.space,
        fit.map_fit.free,
        [grid],
        dense=summary.dense,
        what=what,
        known=fit.sums,
        keep=keep,
    )
    return fit._replace(sums=sums)


def _error_of(fit: GridFit, start: GridFit) -> float:
    """Standard error against temperature scaling: that of the start, and that of the change since."""
    losses = row_losses(fit.logits, fit.map_fit.space, fit.map_fit.free)
    return start.standard_error + standard_error(fit.logits, losses, list(start.start_losses))


def bounded_step(sums: Derivatives, common_scale: float, length: float = 1.0) -> tuple[Tensor, float]:
    """So many of Newton's steps and what they promise, less where the temperature would change by more than a factor e.

    Outputs that say next to nothing of the labels have next to no curvature in 1/T, the last parameter, and steps
    without bound.
    """
    step, predicted_decrease = sums.newton_step()
    step, predicted_decrease = length * step, length * predicted_decrease
    most = common_scale * ((math.e - 1) if float(step[-1]) > 0 else (1 - 1 / math.e))
    share = min(1.0, most / max(abs(float(step[-1])), torch.finfo(torch.float64).tiny))
    return share * step, share * (2 - share) * predicted_decrease


def _error(step: Tensor, sums: Derivatives) -> float:
    """Root of the summed squares of what a step changes in the samples' losses, to first order."""
    return math.sqrt(max(sums.variance(step), 0.0))


def _record(number: int, fit: MapFit) -> dict[str, float]:
    return {"pass": number, "nll": fit.nll, "log_temperature": -math.log(float(fit.free[-1]))}
