r"""What an output map costs under a ridge, where its curvature H is never formed: a few products with it say.

H is known nearly, as B, whose eigenvectors are known. The price is

.. math:: \operatorname{tr} f(B) + u^T f(H) u - u^T f(B) u, \qquad f(e) = e / (e + \lambda)

with random signs u, which is right on average (Hutchinson, 1990), and nearly exact where B tells most.
:math:`u^T f(H) u` comes from Lanczos steps, the same for all λ. Where B is H in some basis, less what is off its
diagonal (or off blocks there), :math:`\operatorname{tr} f(B)` is never below :math:`\operatorname{tr} f(H)`, as f is
concave.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Probe(NamedTuple):
    """A vector of random signs, u, in the ridge's metric.

    Attributes:
        values: B's eigenvalues.
        squares: Squares of u's components along B's eigenvectors, in the shape of the eigenvalues.
        nodes: Eigenvalues of the curvature as Lanczos steps from u see them, the common scale profiled out,
        weights: and their weights, which sum to u'u.
    """

    values: Tensor
    squares: Tensor
    nodes: Tensor
    weights: Tensor

    def price(self, shrinkage: float) -> float:
        """Effective parameters at this strength.

        Too few steps tell nothing of weak ones: what is seen of stronger ones, as a share of tr f(B), holds for them.
        """
        share = min(self._share(shrinkage * 10 ** (k / 2)) for k in range(8))
        return min(share, 1.0) * _price(self.values, shrinkage)

    def _share(self, shrinkage: float) -> float:
        bound = _price(self.values, shrinkage)
        correction = _price(self.nodes, shrinkage, self.weights) - _price(self.values, shrinkage, self.squares)
        return (bound + correction) / bound


def _price(values: Tensor, shrinkage: float, weights: Tensor | float = 1.0) -> float:
    return float((weights * values / (values + shrinkage)).sum())


def random_signs(count: int) -> Tensor:
    """Always the same ones, float64."""
    return torch.randint(0, 2, (count,), generator=torch.Generator().manual_seed(0)).double() * 2 - 1


def profiled_product(
    curvature: Callable[[Tensor], Tensor],
    spread: Callable[[Tensor], Tensor],
    gathered: Callable[[Tensor], Tensor],
    *,
    like: Tensor,
) -> Callable[[Tensor], Tensor]:
    """Products with the curvature in the ridge's metric, the common scale profiled out.

    Args:
        curvature: Product with the curvature in all free parameters, ``(q,)``, the common scale last.
        spread: From a vector in the ridge's metric to free parameters, without a common scale.
        gathered: Its transpose.
        like: Free parameters.
    """
    common = torch.zeros_like(like)
    common[-1] = 1.0
    border = curvature(common)
    edge = gathered(border)

    def product(vector: Tensor) -> Tensor:
        return gathered(curvature(spread(vector))) - edge * (edge @ vector / border[-1])

    return product


def quadrature(product: Callable[[Tensor], Tensor], vector: Tensor, n_steps: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights with which ``vector' f(matrix) vector`` is a sum, by Lanczos steps: a product each.

    Reference:
        Golub and Meurant, "Matrices, Moments and Quadrature with Applications", 2010, chapters 6 and 7.
    """
    length = vector.norm()
    basis = (vector / length)[:, None]
    small = vector.new_zeros(n_steps, n_steps)
    for step in range(n_steps):
        turned = product(basis[:, -1])
        small[: step + 1, step] = basis.T @ turned
        for _ in range(2):  # once leaves rounding
            turned = turned - basis @ (basis.T @ turned)
        if step + 1 == n_steps or float(turned.norm()) < 1e-9 * float(small.abs().max()):
            small = small[: step + 1, : step + 1]
            break
        basis = torch.cat([basis, (turned / turned.norm())[:, None]], 1)
    nodes, vectors = torch.linalg.eigh(small, UPLO="U")
    return nodes.clamp_min(0.0), (length * vectors[0]) ** 2
