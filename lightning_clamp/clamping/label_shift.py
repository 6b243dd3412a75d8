"""How frequent the classes have become, from calibrated probabilities without labels."""

from typing import NamedTuple

import torch
from torch import Tensor

# A change of the log-likelihood per sample that is none, and iterations until then.
_TOLERANCE = 1e-8
_MOST_STEPS = 5_000
# Half-width of a 95 % interval, in standard errors; and the loss of log-likelihood at its end.
_WIDTH = 1.959964
_LOSS = _WIDTH**2 / 2


class ClassFrequencies(NamedTuple):
    """Estimated frequencies of the classes, ``(C,)`` float64 each.

    Attributes:
        values: The estimates; they add up to 1.
        low: Lower ends of their 95 % intervals, at least 0.
        high: Upper ends, at most 1.
        p_no_shift: p-value of "the frequencies are the old ones" (likelihood ratio), a scalar.
    """

    values: Tensor
    low: Tensor
    high: Tensor
    p_no_shift: Tensor


def class_frequencies(probs: Tensor, priors: Tensor) -> ClassFrequencies:
    r"""Frequencies of the classes under which unlabelled samples are most likely.

    If only the frequencies have changed, from :math:`\pi` to q, a sample's likelihood is proportional to
    :math:`\sum_k q_k p_k / \pi_k`. The EM algorithm raises it until it stands still; there is one maximum. Intervals
    come from the curvature there (the observed information): what the number of unlabelled samples leaves open, and not
    the error of the priors or of the probabilities.

    Args:
        probs: Calibrated probabilities, ``(N, C)``, float.
        priors: Frequencies where they were calibrated, ``(C,)``, positive.

    Reference:
        Saerens, Latinne and Decaestecker, "Adjusting the Outputs of a Classifier to New a Priori Probabilities: A
        Simple Procedure", Neural Computation 2002.
    """
    priors = priors.double()
    ratios = probs.double() / priors
    values, likelihood = priors, ratios @ priors
    for _ in range(_MOST_STEPS):
        values = values * (ratios / likelihood[:, None]).mean(0)
        before, likelihood = likelihood, ratios @ values
        if float((likelihood / before).log().mean()) < _TOLERANCE:
            break
    gain = (likelihood / (ratios @ priors)).log().sum()
    low, high = _intervals(values, ratios / likelihood[:, None])
    degrees = torch.tensor((len(priors) - 1) / 2, dtype=torch.float64, device=gain.device)
    p = torch.special.gammaincc(degrees, gain.clamp(min=0))
    return ClassFrequencies(values, low, high, p)


def present(values: Tensor, n_samples: int) -> Tensor:
    """Which classes have a frequency of at least half a sample."""
    return values >= 0.5 / n_samples


def _intervals(values: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Ends of 95 % intervals; of a class that is absent from 0 to where the log-likelihood is that of such an end."""
    here = present(values, len(scores))
    error = torch.zeros_like(values)
    error[here] = _standard_errors(scores[:, here])
    slope = len(scores) * (1 - scores.mean(0)).clamp(min=torch.finfo(scores.dtype).tiny)
    high = torch.where(here, values + _WIDTH * error, values + _LOSS / slope)
    return (values - _WIDTH * error).where(here, torch.zeros_like(values)).clamp(min=0), high.clamp(max=1)


def _standard_errors(scores: Tensor) -> Tensor:
    """From the scores ``(N, C)`` of frequencies that add up to 1: the information's inverse within that plane."""
    n_classes = scores.shape[1]
    ones = torch.ones(n_classes, 1, dtype=scores.dtype, device=scores.device)
    # An orthonormal basis of the plane: all but the first of one that begins with the ones.
    everything = torch.eye(n_classes, dtype=scores.dtype, device=scores.device)
    plane = torch.linalg.qr(torch.cat([ones, everything], 1))[0][:, 1:]
    information = plane.T @ (scores.T @ scores) @ plane
    covariance: Tensor = plane @ torch.linalg.pinv(information, hermitian=True) @ plane.T
    return covariance.diagonal().clamp(min=0).sqrt()


def condition_number(probs: Tensor) -> float:
    """How far the outputs are from telling all classes apart: 1 where they are certain, infinite where they cannot.

    It is the largest over the smallest eigenvalue of the mean outer product of the probabilities, scaled by their
    means: about how many unlabelled samples are worth a labelled one, for the classes that are hardest to tell apart.
    """
    probs = probs.double()
    # A class that is never considered has eigenvalue 0.
    scaled = probs / probs.mean(0).clamp(min=torch.finfo(probs.dtype).tiny).sqrt()
    smallest = float(torch.linalg.eigvalsh(scaled.T @ scaled / len(probs))[0])
    return float("inf") if smallest <= 0 else 1 / smallest
