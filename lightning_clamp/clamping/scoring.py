r"""Fisher scoring: perturbation and output map together, without a learning rate.

A pass is one forward and one backward to the input. Its sums give the score test (can moving the input help at all?),
what a grid promises, and the next step.
"""

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_clamp.clamping.criterion import Estimate, estimate
from lightning_clamp.clamping.newton import LossDerivatives, ScoreTest, effective_parameters
from lightning_clamp.clamping.passes import CalibrationSet, Logits
from lightning_clamp.clamping.perturbation import Grid
from lightning_clamp.clamping.score_pass import Derivatives, score_pass
from lightning_clamp.clamping.shrinkage import MapFit, refit
from lightning_clamp.clamping.summary import DatasetSummary

# A step that promises less than this share of a nat per parameter is lost in the fit's own error, half a nat each.
_WORTHWHILE = 0.05


class GridFit(NamedTuple):
    """An iterate of one grid: a perturbation, and the output map fitted to the logits there.

    Attributes:
        size: Side r of the grid; 0 for the untouched input.
        n_coefficients: Number of coefficients.
        perturbation: The shape of one input, or None for none.
        logits: The network's logits there.
        map_fit: The best output map for them, of the kind and shrinkage that was found before the input was touched.
        point: Where the sums were taken: coefficients, and free parameters of the map, float64.
        sums: Score sums there; None for the untouched input.
        standard_error: Of the change of the mean loss against temperature scaling, in nats per row: that of the output
            map the grid started from, and that of the steps since.
        test: Score test of the coefficients at zero, None for the untouched input.
        predicted_gain: Gain per row that the quadratic model promised at zero.
        predicted: What that is expected to be worth on new data, against the start.
        passes: Passes spent, the first (shared) one included.
        seconds: Time spent.
        history: NLL per row and temperature after every pass.
    """

    size: int
    n_coefficients: int
    perturbation: Tensor | None
    logits: Logits
    map_fit: MapFit
    point: Tensor
    sums: Derivatives | None = None
    standard_error: float = 0.0
    test: ScoreTest | None = None
    predicted_gain: float = 0.0
    predicted: Estimate = Estimate(0.0, 0.0)
    passes: int = 0
    seconds: float = 0.0
    history: tuple[dict[str, float], ...] = ()

    @property
    def optimum(self) -> Tensor:
        """Coefficients, and the free parameters of the best map."""
        return torch.cat([self.point[: self.n_coefficients], self.map_fit.free])

    @property
    def ridge(self) -> Tensor:
        """What shrinks each of them; the coefficients are free."""
        return torch.cat([torch.zeros(self.n_coefficients, dtype=torch.float64), self.map_fit.ridge])

    def objective(self, n_rows: int) -> float:
        """Mean loss per row with the ridge."""
        return self.map_fit.nll + 0.5 * float(self.map_fit.ridge @ self.map_fit.free**2) / n_rows

    def step(self) -> tuple[Tensor, float]:
        """The next step, and the fall of the summed loss with the ridge that it promises."""
        assert self.sums is not None
        return bounded_step(self.sums.shrunk(self.point, self.ridge), float(self.point[-1]))

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
    sums_of_all, logits = score_pass(
        data, None, space, start.map_fit.free, grids, dense_scale=summary.dense_scale, what="all grids, pass 1"
    )
    shared = (time.perf_counter() - started) / len(grids)
    fits = []
    for grid, sums in zip(grids, sums_of_all, strict=True):
        p = grid.n_coefficients
        fit = start._replace(
            size=grid.size,
            n_coefficients=p,
            logits=logits,
            point=torch.cat([torch.zeros(p, dtype=torch.float64), start.map_fit.free]),
            sums=sums,
            passes=1,
            seconds=shared,
            history=(_record(1, start.map_fit),),
        )
        step, predicted_decrease = fit.step()
        gain, error = predicted_decrease / summary.n_rows, _error(step, sums) / summary.n_rows
        fits.append(
            fit._replace(
                test=sums.shrunk(fit.point, fit.ridge).score_test(p),
                predicted_gain=gain,
                predicted=estimate(gain, fit.effective_coefficients(dense=summary.dense), summary.n_rows, error),
            )
        )
    return fits


def fit_grid(data: CalibrationSet, summary: DatasetSummary, grid: Grid, start: GridFit, max_passes: int) -> GridFit:
    """Step ``-curvature⁻¹ gradient`` in coefficients and map while it pays; halve the step when the loss rises."""
    started = time.perf_counter()
    assert start.sums is not None
    best = start
    step, predicted_decrease = start.step()
    passes, history = 1, list(start.history)
    # The first step was promised to be worth more than it costs.
    least = _WORTHWHILE * (start.n_coefficients + start.map_fit.effective_parameters)
    while passes < max_passes and (passes == 1 or predicted_decrease > least):
        passes += 1
        # The first step is the long one: the curvature of dense outputs is formed again behind it, and kept from there.
        known = None if summary.dense and passes == 2 else best.sums
        trial = _evaluate(data, summary, grid, best.point + step, f"grid {grid.size}, pass {passes}", best, known)
        if trial is not None:
            history.append(_record(passes, trial.map_fit))
        if trial is not None and trial.objective(summary.n_rows) < best.objective(summary.n_rows):
            best = trial
            step, predicted_decrease = best.step()
        else:
            # Half the step keeps three quarters of what the quadratic model promised.
            step, predicted_decrease = step / 2, 0.75 * predicted_decrease
    assert best.sums is not None
    moved = best.optimum - start.optimum
    # A sample's change is its score's, between that at the start and that at the end, times the way.
    error = math.hypot(_error(moved, start.sums), _error(moved, best.sums)) / math.sqrt(2)
    return best._replace(
        standard_error=start.standard_error + error / summary.n_rows,
        passes=passes,
        seconds=start.seconds + time.perf_counter() - started,
        history=tuple(history),
    )


def _evaluate(
    data: CalibrationSet,
    summary: DatasetSummary,
    grid: Grid,
    point: Tensor,
    what: str,
    previous: GridFit,
    known: Derivatives | None,
) -> GridFit | None:
    """One pass at a point: its sums, and the best map of that kind and shrinkage for its logits, if there is one."""
    coefficients, free = point[: grid.n_coefficients], point[grid.n_coefficients :]
    space = previous.map_fit.space
    perturbation = grid.image(coefficients).to(summary.parameter_dtype)
    (sums,), logits = score_pass(
        data,
        perturbation,
        space,
        free,
        [grid],
        dense_scale=summary.dense_scale,
        what=what,
        known=known,
    )
    map_fit = refit(logits, previous.map_fit, free, summary.n_rows, dense=summary.dense)
    if map_fit is None:
        return None
    return previous._replace(perturbation=perturbation, logits=logits, map_fit=map_fit, point=point, sums=sums)


def bounded_step(sums: Derivatives, common_scale: float) -> tuple[Tensor, float]:
    """Newton's step and what it promises, shortened where the temperature would change by more than a factor of e.

    Outputs that say next to nothing of the labels have next to no curvature in 1/T, the last parameter, and steps
    without bound.
    """
    step, predicted_decrease = sums.newton_step()
    most = common_scale * ((math.e - 1) if float(step[-1]) > 0 else (1 - 1 / math.e))
    share = min(1.0, most / max(abs(float(step[-1])), torch.finfo(torch.float64).tiny))
    return share * step, share * (2 - share) * predicted_decrease


def _error(step: Tensor, sums: Derivatives) -> float:
    """Root of the summed squares of what a step changes in the samples' losses, to first order."""
    return math.sqrt(max(sums.variance(step), 0.0))


def _record(number: int, fit: MapFit) -> dict[str, float]:
    return {"pass": number, "nll": fit.nll, "log_temperature": -math.log(float(fit.free[-1]))}
