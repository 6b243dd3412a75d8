"""How improbable scores of mean zero are: two-sided p-values, and their correction where there are many."""

import torch
from torch import Tensor

# Beyond this skewness a sum says next to nothing of its tails: about one event is expected.
_MOST_SKEWED = 1.0


def p_of_independent(score: Tensor, variance: Tensor, third: Tensor) -> Tensor:
    r"""Two-sided p-values of sums of many independent terms, from the sums of their second and third moments.

    A sum of rare events is skewed, and the normal distribution would call a hundredth what is a fiftieth. The cube root
    of Wilson and Hilferty takes the skewness off: near to exact for counts of which at least one is expected.

    Args:
        score: The sums, of mean zero.
        variance: Their variances.
        third: Their third central moments.

    Returns:
        The shape of the score; nan where the variance is 0, or the skewness above 1: too few terms to say.
    """
    deviation = score / variance.sqrt()
    skewness = third / variance**1.5
    sixth = (skewness / 6).where(skewness.abs() > 1e-6, torch.ones_like(skewness))
    root = torch.clamp(3 * sixth * deviation + 1, min=0) ** (1 / 3)
    normal = torch.where(skewness.abs() > 1e-6, (root - 1) / sixth + sixth, deviation)
    return _two_sided(normal).where(skewness.abs() <= _MOST_SKEWED, torch.nan)


def p_of_items(score: Tensor, squares: Tensor, n_items: Tensor) -> Tensor:
    """Two-sided p-values of sums over items by Student's t test, from the sums of the items' squares.

    Student's distribution is turned into the normal one by Wallace's formula, right to the third digit from 5 items on.

    Returns:
        The shape of the score; nan for fewer than 5 items, or where all were 0.
    """
    share = (score.square() / (squares * n_items)).clamp(max=1)
    n = n_items.double()
    normal = (-(n - 1) * torch.log1p(-share)).sqrt() * (8 * n - 7) / (8 * n - 5)
    return _two_sided(normal).where(n >= 5, torch.nan)


def _two_sided(normal: Tensor) -> Tensor:
    p: Tensor = torch.special.erfc(normal.abs() / 2**0.5)
    return p


def holm(p: Tensor) -> Tensor:
    """p-values ``(m,)`` after Holm's correction for being several; those that are nan are not counted.

    Reference:
        Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of Statistics 1979.
    """
    known = (~p.isnan()).nonzero()[:, 0]
    ordered, order = p[known].sort()
    left = torch.arange(len(known), 0, -1, dtype=p.dtype, device=p.device)
    corrected = torch.cummax(ordered * left, 0).values.clamp(max=1) if len(known) else ordered
    return p.index_copy(0, known[order], corrected)
