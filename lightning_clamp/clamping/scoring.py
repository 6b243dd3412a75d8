r"""Fisher scoring: perturbation and temperature together, without a learning rate.

A pass is one forward and one backward to the input. Its sums give the score test (can moving the input help at all?)
and the next step.
"""

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_clamp.clamping.passes import CalibrationSet, Logits, ScoreSums, score_pass
from lightning_clamp.clamping.perturbation import Grid
from lightning_clamp.clamping.survey import Survey
from lightning_clamp.clamping.temperature import TemperatureFit, fit_temperature, newton_step, solve

# A step that promises less than this share of a nat per parameter is lost in the fit's own error, half a nat each.
_WORTHWHILE = 0.01


class ScoreTest(NamedTuple):
    """Score test of some parameters, with the temperature profiled out.

    Attributes:
        statistic: Rao's statistic, chi-squared if the parameters are truly zero.
        predicted_gain: Fall of the summed loss that the quadratic model promises, in nats.
    """

    statistic: float = 0.0
    predicted_gain: float = 0.0


class GridFit(NamedTuple):
    """The best iterate of one grid.

    Attributes:
        size: Side r of the grid; 0 for the untouched input.
        n_coefficients: Number of coefficients.
        perturbation: The shape of one input, or None for none.
        logits: The network's logits there.
        temperature: The best temperature for those logits.
        sums: Score sums there, None for the untouched input.
        test: Score test of the coefficients at zero.
        passes: Passes spent, the first (shared) one included.
        seconds: Time spent.
        history: NLL per row and temperature after every pass.
    """

    size: int
    n_coefficients: int
    perturbation: Tensor | None
    logits: Logits
    temperature: TemperatureFit
    sums: ScoreSums | None
    test: ScoreTest
    passes: int = 0
    seconds: float = 0.0
    history: tuple[dict[str, float], ...] = ()


def fit_grids(
    data: CalibrationSet, seen: Survey, base: TemperatureFit, grids: Sequence[Grid], max_passes: int
) -> Iterator[GridFit]:
    """Fit every grid by damped Fisher scoring, one after the other; the first pass is shared by all.

    Args:
        data: Network and batches, frozen.
        seen: First look at the same data.
        base: Temperature scaling of the unchanged logits.
        grids: Grids to fit.
        max_passes: Most passes spent on one grid, the shared one included.
    """
    if not grids:
        return
    started = time.perf_counter()
    first, logits = score_pass(
        data, None, base.log_temperature, grids, dense_scale=seen.dense_scale, what="all grids, pass 1"
    )
    shared = (time.perf_counter() - started) / len(grids)
    for grid, sums in zip(grids, first, strict=True):
        start = GridFit(
            grid.size, grid.n_coefficients, None, logits, base, sums, score_test(sums), 1, shared, (_step(1, base),)
        )
        yield _fit_grid(data, seen, grid, start, max_passes)


def _fit_grid(data: CalibrationSet, seen: Survey, grid: Grid, best: GridFit, max_passes: int) -> GridFit:
    """Step ``-curvature⁻¹ gradient`` in (coefficients, log T) while it pays; halve the step when the NLL rises."""
    started = time.perf_counter()
    assert best.sums is not None
    point = torch.zeros(grid.n_coefficients + 1, dtype=torch.float64)
    point[-1] = best.temperature.log_temperature
    step, promise = _bounded_step(best.sums)
    passes, history = 1, list(best.history)
    while passes < max_passes and promise > _WORTHWHILE * len(point):
        there = point + step
        passes += 1
        trial = _evaluate(data, seen, grid, there, f"grid {grid.size}, pass {passes}", best)
        history.append(_step(passes, trial.temperature))
        if trial.temperature.nll < best.temperature.nll:
            best, point = trial, there
            assert best.sums is not None
            step, promise = _bounded_step(best.sums)
        else:
            # Half the step keeps three quarters of what the quadratic model promised.
            step, promise = step / 2, 0.75 * promise
    seconds = best.seconds + time.perf_counter() - started
    return best._replace(passes=passes, seconds=seconds, history=tuple(history))


def _bounded_step(sums: ScoreSums) -> tuple[Tensor, float]:
    """Newton's step and what it promises, shortened where T would change by more than a factor of e.

    Outputs that say next to nothing of the labels have next to no curvature in log T, and steps without bound.
    """
    step, promise = newton_step(sums)
    share = 1 / max(1.0, abs(float(step[-1])))
    return share * step, share * (2 - share) * promise


def _evaluate(data: CalibrationSet, seen: Survey, grid: Grid, point: Tensor, what: str, previous: GridFit) -> GridFit:
    """One pass at a point: its sums, and the best temperature for its logits."""
    perturbation = grid.image(point[:-1]).to(seen.parameter_dtype)
    log_temperature = float(point[-1])
    (sums,), logits = score_pass(data, perturbation, log_temperature, [grid], dense_scale=seen.dense_scale, what=what)
    temperature = fit_temperature(logits, start=log_temperature)
    return previous._replace(perturbation=perturbation, logits=logits, temperature=temperature, sums=sums)


def _step(number: int, fit: TemperatureFit) -> dict[str, float]:
    return {"pass": number, "nll": fit.nll, "log_temperature": fit.log_temperature}


def score_test(sums: ScoreSums) -> ScoreTest:
    r"""Rao's score test of all parameters but the last, which is the temperature and is profiled out.

    With efficient scores :math:`\tilde s = s - H_{sT} H_{TT}^{-1} s_T` the statistic is
    :math:`\tilde g^\top \tilde J^{-1} \tilde g`, which reduces to the usual :math:`n \bar g^\top A^{-1} \bar g` where
    the curvature is the empirical Fisher.
    """
    gradient, curvature, covariance = sums
    p = len(gradient) - 1
    share = curvature[:p, p:] / curvature[p, p].clamp_min(torch.finfo(torch.float64).tiny)
    efficient = torch.cat([torch.eye(p, dtype=torch.float64), -share], 1)
    score = efficient @ gradient
    return ScoreTest(
        _quadratic_form(efficient @ covariance @ efficient.T, score),
        0.5 * _quadratic_form(efficient @ curvature @ efficient.T, score),
    )


def effective_parameters(sums: ScoreSums) -> float:
    """Takeuchi's trace ``tr(curvature⁻¹ covariance)``: what parameters cost when the samples' rows are correlated."""
    return float(solve(sums.curvature, sums.covariance).trace())


def _quadratic_form(matrix: Tensor, vector: Tensor) -> float:
    return float(vector @ solve(matrix, vector))
