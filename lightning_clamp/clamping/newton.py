"""What the sums of a pass say: the quadratic model of the loss, its step, its price and its score test."""

from typing import NamedTuple

import torch
from torch import Tensor

# A Cholesky pivot below this share of the largest may be rounding alone.
_KNOWN = 1e-5


class LossDerivatives(NamedTuple):
    """Sums over samples of the derivatives of the loss in p parameters.

    Attributes:
        gradient: Sum of the scores, ``(p,)``.
        curvature: Second derivative of the summed loss, expected or exact, ``(p, p)``.
        covariance: Sum of the outer products of the per-sample scores, ``(p, p)``, or what estimates it. For class
            outputs it is the curvature too; for dense outputs the pixels of an image are correlated and they differ
            (Takeuchi, 1976).
    """

    gradient: Tensor
    curvature: Tensor
    covariance: Tensor

    def shrunk(self, point: Tensor, ridge: Tensor) -> "LossDerivatives":
        """The sums of the loss and a ridge, ``0.5 * (ridge * point**2).sum()``."""
        return self._replace(gradient=self.gradient + ridge * point, curvature=self.curvature + ridge.diag())

    def damped(self, n_first: int, damping: float) -> "LossDerivatives":
        """With so many times the first parameters' mean curvature added to that of each of them."""
        own = self.curvature.diagonal()[:n_first]
        added = torch.zeros_like(self.gradient).index_fill(0, torch.arange(n_first), damping * float(own.mean()))
        return self._replace(curvature=self.curvature + added.diag())

    def at_best_map(self, shift: Tensor, gradient: Tensor) -> "LossDerivatives":
        """To first order, where the map's parameters, the last q, have moved by ``shift`` to have this gradient."""
        p = len(self.gradient) - len(shift)
        return self._replace(gradient=torch.cat([self.gradient[:p] + self.curvature[:p, p:] @ shift, gradient]))

    def newton_step(self) -> tuple[Tensor, float]:
        """The step ``-curvature⁻¹ gradient``, and the fall of the summed loss that it promises (half the decrement)."""
        step = -solve(self.curvature, self.gradient)
        return step, -0.5 * float(self.gradient @ step)

    def score_test(self, n_tested: int) -> "ScoreTest":
        """:func:`score_test` of the first parameters."""
        return score_test(self, n_tested)

    def variance(self, step: Tensor) -> float:
        """Sum of the squares of what a step changes in the samples' losses, to first order."""
        return float(step @ self.covariance @ step)


class ScoreTest(NamedTuple):
    """Score test of some parameters, with the others profiled out.

    Attributes:
        statistic: Rao's statistic, chi-squared if the parameters are truly zero.
        n_tested: Its degrees of freedom.
    """

    statistic: float
    n_tested: int

    @property
    def p_value(self) -> float:
        """Tail probability of the statistic."""
        half = torch.tensor([self.n_tested / 2, max(self.statistic, 0.0) / 2], dtype=torch.float64)
        return float(torch.special.gammaincc(half[0], half[1]))


def score_test(sums: LossDerivatives, n_tested: int) -> ScoreTest:
    r"""Rao's score test of the first ``n_tested`` parameters; the others are profiled out.

    With efficient scores :math:`\tilde s = s - H_{sn} H_{nn}^{-1} s_n` the statistic is
    :math:`\tilde g^\top \tilde J^{-1} \tilde g`, which reduces to the usual :math:`n \bar g^\top A^{-1} \bar g` where
    the curvature is the empirical Fisher.
    """
    gradient, curvature, covariance = sums
    share = solve(curvature[n_tested:, n_tested:], curvature[n_tested:, :n_tested]).T
    efficient = torch.cat([torch.eye(n_tested, dtype=torch.float64), -share], 1)
    score = efficient @ gradient
    return ScoreTest(float(score @ solve(efficient @ covariance @ efficient.T, score)), n_tested)


def effective_parameters(sums: LossDerivatives, ridge: Tensor) -> float:
    """Takeuchi's trace ``tr((curvature + ridge)⁻¹ covariance)``: what parameters cost, in units of one.

    Where covariance and curvature are the same, it is the number of parameters, less what the ridge takes off.
    """
    return float(solve(sums.curvature + ridge.diag(), sums.covariance).trace())


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """``matrix⁻¹ right`` for a positive semi-definite matrix; directions it does not know are left at zero."""
    columns = right.reshape(len(matrix), -1)
    root, failed = torch.linalg.cholesky_ex(matrix)
    pivots = root.diagonal()
    if int(failed) == 0 and float(pivots.min()) > _KNOWN * float(pivots.max()):
        solution = torch.cholesky_solve(columns, root)
    else:
        solution = torch.linalg.lstsq(matrix, columns, driver="gelsd").solution
    return solution.reshape(right.shape)
