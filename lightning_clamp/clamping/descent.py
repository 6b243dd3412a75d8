"""Limited-memory BFGS from a good inverse Hessian: few gradients, and no matrix of its own."""

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

Inverse: TypeAlias = Callable[[Tensor], Tensor]

_MOST_EVALUATIONS = 100
_MEMORY = 10
# A step is good enough where the objective falls by this share of what its slope promises.
_ARMIJO = 1e-4


def minimise(
    objective: Callable[[Tensor], tuple[float, Tensor]],
    start: Tensor,
    inverse: Inverse,
    renewed: Callable[[Tensor], Inverse],
    *,
    tolerance: float,
    patience: int,
) -> tuple[Tensor, float]:
    """Minimise a smooth convex function.

    Args:
        objective: Value and gradient at a point.
        start: Where to start, ``(q,)``.
        inverse: A vector times the inverse Hessian, or nearly.
        renewed: Gives another such inverse at a point.
        tolerance: Fall of the value that another step would have to promise.
        patience: Evaluations after which the inverse is renewed.

    Returns:
        The point and its value.

    Reference:
        Nocedal and Wright, "Numerical Optimization", 2006, algorithm 7.4.
    """
    point, (value, gradient) = start, objective(start)
    pairs: list[tuple[Tensor, Tensor]] = []
    since = evaluations = 1
    while evaluations < _MOST_EVALUATIONS:
        if since > patience:
            inverse, pairs, since = renewed(point), [], 0
        step = -_product(gradient, pairs, inverse)
        slope = float(gradient @ step)
        if -0.5 * slope < tolerance:
            break
        length = 1.0
        trial = objective(point + step)
        evaluations, since = evaluations + 1, since + 1
        while not trial[0] <= value + _ARMIJO * length * slope and evaluations < _MOST_EVALUATIONS:
            length /= 4
            trial = objective(point + length * step)
            evaluations, since = evaluations + 1, since + 1
        if not trial[0] < value:
            break
        moved, turned = length * step, trial[1] - gradient
        if float(moved @ turned) > 0:
            pairs = [*pairs, (moved, turned)][-_MEMORY:]
        point, (value, gradient) = point + moved, trial
    return point, value


def _product(gradient: Tensor, pairs: list[tuple[Tensor, Tensor]], inverse: Inverse) -> Tensor:
    """The inverse Hessian that the pairs (step, change of gradient) have learned, times the gradient."""
    rest, shares = gradient, []
    for moved, turned in reversed(pairs):
        shares.append(float(moved @ rest) / float(moved @ turned))
        rest = rest - shares[-1] * turned
    product = inverse(rest)
    for (moved, turned), share in zip(pairs, reversed(shares), strict=True):
        product = product + (share - float(turned @ product) / float(moved @ turned)) * moved
    return product
