"""The output side: the temperature, and the maps that are richer than it, fitted on given logits."""

import math
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_clamp._rows import Rows
from lightning_clamp.clamping.passes import RowSource, ScoreSums, log_temperature_score, summed

OutputMap: TypeAlias = Literal["temperature", "bias", "vector"]
OUTPUT_MAPS: tuple[OutputMap, ...] = ("temperature", "bias", "vector")

# Temperatures between 4.5e-5 and 2.2e4; an optimum at the edge means that no finite temperature is best.
LOG_TEMPERATURE_BOUND = 10.0
_MAX_STEPS = 100
_TOLERANCE = 1e-9
_FLAT = 1e-9
_FLAT_RELATIVE = 1e-6


class TemperatureFit(NamedTuple):
    """The best temperature for given logits.

    Attributes:
        log_temperature: Its logarithm.
        nll: Mean negative log-likelihood per row at it, in nats.
        interior: False if the optimum is not inside the bounds: the labels do not determine a temperature.
    """

    log_temperature: float
    nll: float
    interior: bool


def fit_temperature(rows: RowSource, start: float = 0.0) -> TemperatureFit:
    r"""Minimise the mean cross-entropy of ``logits / T`` by safeguarded Newton steps in log T.

    The loss is convex in 1/T, so it has one minimum in log T, and the sign of its slope brackets it; a Newton step that
    leaves the bracket is replaced by a bisection. Every evaluation is one pass over the rows.

    Args:
        rows: Rows of logits, re-iterable.
        start: log T to start from.

    Reference:
        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 4.2.
    """
    low, high = -LOG_TEMPERATURE_BOUND, LOG_TEMPERATURE_BOUND
    here = min(max(start, low), high)
    for _ in range(_MAX_STEPS):
        nll, slope, curvature = _temperature_derivatives(rows, here)
        low, high = (here, high) if slope < 0 else (low, here)
        step = -slope / curvature if curvature > 0 else math.inf
        if abs(step) < _TOLERANCE or high - low < _TOLERANCE:
            break
        here = here + step if low < here + step < high else (low + high) / 2
    # A loss that has gone flat (everything right with certainty) has no minimum either.
    interior = abs(here) < LOG_TEMPERATURE_BOUND - 0.01 and curvature > _FLAT
    return TemperatureFit(here, nll, interior)


def _temperature_derivatives(rows: RowSource, log_temperature: float) -> tuple[float, float, float]:
    """Mean loss per row, and its first and second derivative in log T."""

    def part(batch: Rows) -> tuple[Tensor, ...]:
        scaled = batch.logits * math.exp(-log_temperature)
        log_probs = scaled.log_softmax(1)
        probs = log_probs.exp()
        slope = log_temperature_score(scaled, batch.target).sum()
        mean = (probs * scaled).sum(1, keepdim=True)
        variance = (probs * (scaled - mean) ** 2).sum()
        nll = F.nll_loss(log_probs, batch.target, reduction="sum")
        return nll, slope, variance - slope, torch.tensor(float(len(batch.target)))

    total = summed((part(batch) for batch in rows), [()] * 4, rows.ranks)
    nll, slope, curvature, count = (float(term) for term in total)
    return nll / count, slope / count, curvature / count


class OutputMapFit(NamedTuple):
    """A map ``class_scale * logits + class_bias`` fitted to given logits, the temperature included in the scale.

    Attributes:
        class_scale: ``(C,)``, float64.
        class_bias: ``(C,)``, float64, of mean 0.
        nll: Mean negative log-likelihood per row, in nats.
        converged: False if there is no finite optimum (a class is perfectly separated), or it was not reached.
        at_start: Score sums at the temperature-only point, temperature last.
        at_end: Score sums at the optimum.
    """

    class_scale: Tensor
    class_bias: Tensor
    nll: float
    converged: bool
    at_start: ScoreSums
    at_end: ScoreSums


def n_map_parameters(kind: OutputMap, n_classes: int) -> int:
    """Free parameters of an output map: 1, C or 2C - 1 (a common bias changes nothing)."""
    return {"temperature": 1, "bias": n_classes, "vector": 2 * n_classes - 1}[kind]


def fit_output_map(kind: OutputMap, rows: RowSource, n_classes: int, log_temperature: float) -> OutputMapFit:
    r"""Minimise the mean cross-entropy of ``a * logits + b`` by Newton steps, starting from the temperature alone.

    ``"bias"`` ties the scales together (one temperature and a bias per class), ``"vector"`` leaves them free. The loss
    is convex in ``(a, b)``; steps are halved until it falls.

    Args:
        kind: ``"bias"`` or ``"vector"``.
        rows: Rows of logits, re-iterable.
        n_classes: C.
        log_temperature: The best temperature for these logits.

    Reference:
        Guo et al., ICML 2017, section 4.2 (vector scaling).
    """
    ties = _ties(kind, n_classes)
    point = _temperature_point(n_classes, log_temperature)
    nll, at_start = _map_derivatives(rows, point, ties)
    sums, converged = at_start, False
    for _ in range(_MAX_STEPS):
        free, gain = newton_step(sums)
        if gain < _TOLERANCE:
            converged = True
            break
        step = ties @ free
        trial_nll, trial = _map_derivatives(rows, point + step, ties, covariance=False)
        while not trial_nll <= nll and float(step.abs().max()) > 1e-12:
            step = step / 2
            trial_nll, trial = _map_derivatives(rows, point + step, ties, covariance=False)
        point, nll, sums = point + step, trial_nll, trial
    scale, bias = point.chunk(2)
    _, at_end = _map_derivatives(rows, point, ties)
    finite = converged and _is_determined(at_start, at_end)
    return OutputMapFit(scale, bias - bias.mean(), nll, finite, at_start, at_end)


def _is_determined(at_start: ScoreSums, at_end: ScoreSums) -> bool:
    """Whether every direction still has curvature at the end.

    Where a class is separated, the loss falls for ever along a direction and flattens: Newton's steps there are all of
    one length, and where they stop is up to the tolerance.
    """
    root, failed = torch.linalg.cholesky_ex(at_start.curvature)
    if int(failed):
        return True
    half = torch.linalg.solve_triangular(root, at_end.curvature, upper=False)
    relative = torch.linalg.solve_triangular(root, half.T, upper=False)
    return float(torch.linalg.eigvalsh((relative + relative.T) / 2).min()) > _FLAT_RELATIVE


def output_map_sums(kind: OutputMap, rows: RowSource, n_classes: int, log_temperature: float) -> ScoreSums:
    """Score sums of an output map at the temperature-only point."""
    return _map_derivatives(rows, _temperature_point(n_classes, log_temperature), _ties(kind, n_classes))[1]


def _temperature_point(n_classes: int, log_temperature: float) -> Tensor:
    scale = torch.full((n_classes,), math.exp(-log_temperature), dtype=torch.float64)
    return torch.cat([scale, torch.zeros_like(scale)])


def newton_step(sums: ScoreSums) -> tuple[Tensor, float]:
    """The step ``-curvature⁻¹ gradient``, and the fall of the summed loss that it promises (half the decrement)."""
    step = -solve(sums.curvature, sums.gradient)
    return step, -0.5 * float(sums.gradient @ step)


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """``matrix⁻¹ right``, both on the CPU; directions the matrix does not know are left at zero."""
    columns = right.reshape(len(matrix), -1)
    solution: Tensor = torch.linalg.lstsq(matrix, columns, driver="gelsd").solution
    return solution.reshape(right.shape)


def _ties(kind: OutputMap, n_classes: int) -> Tensor:
    """Columns of free parameters in ``(a, b)``, temperature direction last; the first class has no bias of its own."""
    eye = torch.eye(n_classes, dtype=torch.float64)
    none = torch.zeros_like(eye)
    biases = torch.cat([none, eye])[:, 1:]
    common = torch.cat([torch.ones(n_classes, 1), torch.zeros(n_classes, 1)]).double()
    if kind == "temperature":
        return common
    if kind == "bias":
        return torch.cat([biases, common], 1)
    return torch.cat([torch.cat([eye, none])[:, 1:], biases, common], 1)


def _map_derivatives(
    rows: RowSource, point: Tensor, ties: Tensor, *, covariance: bool = True
) -> tuple[float, ScoreSums]:
    """Mean loss per row, and the score sums in the free parameters; the covariance is zero where not asked for."""
    scale, bias = point.chunk(2)

    def part(batch: Rows) -> tuple[Tensor, ...]:
        logits = batch.logits
        log_probs = (scale.to(logits) * logits + bias.to(logits)).log_softmax(1)
        probs = log_probs.exp()
        error = probs.scatter_add(1, batch.target[:, None], -torch.ones_like(probs[:, :1]))
        scores = batch.per_item(torch.cat([error * logits, error], 1))
        spread = torch.cat([probs * logits, probs], 1)
        nll = F.nll_loss(log_probs, batch.target, reduction="sum")
        curvature = _block_diagonal(probs, logits) - spread.T @ spread
        outer = scores.T @ scores if covariance else torch.zeros_like(curvature)
        return nll, torch.tensor(float(len(batch.target))), scores.sum(0), curvature, outer

    n = len(point)
    shapes = [(), (), (n,), (n, n), (n, n)]
    nll, count, gradient, curvature, outer = summed((part(batch) for batch in rows), shapes, rows.ranks)
    sums = ScoreSums(ties.T @ gradient, ties.T @ curvature @ ties, ties.T @ outer @ ties)
    return float(nll) / float(count), sums


def _block_diagonal(probs: Tensor, logits: Tensor) -> Tensor:
    """Sum over rows of ``diag(p)`` in the coordinates ``(a, b)``, ``(2C, 2C)``."""
    cross = (probs * logits).sum(0)
    return torch.cat(
        [
            torch.cat([((probs * logits**2).sum(0)).diag(), cross.diag()], 1),
            torch.cat([cross.diag(), probs.sum(0).diag()], 1),
        ]
    )
