"""Penalties of logits beyond a margin, as means over the classes, of each position or of all of them.

They know their gradients, which take half the passes over memory that autograd would make, and are part of the
definition where a term stands still (the stop-gradient of ACLS). Comparisons are written into float tensors, which is
three times faster than a mask of bools and its use.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_clamp.losses._modes import check_first_derivative


class Margins(torch.autograd.Function):
    """The penalty of MbLS; of several largest logits the first is pulled down, as in the code."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, of_all: bool, margin: float) -> Tensor:
        top, predicted = logits.max(1, keepdim=True)
        excess = torch.sub(top - margin, logits).clamp_min_(0)
        ctx.save_for_backward(excess, predicted)
        return excess.mean() if of_all else excess.mean(1)

    # Flat wherever it has a gradient, so that this may be differentiated again.
    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        excess, predicted = ctx.saved_tensors
        slope = excess.sign().mul_(_shares(grads[0], excess, -1))
        return slope.scatter_add_(1, predicted, -slope.sum(1, keepdim=True)), None, None


class AdaptiveMargins(torch.autograd.Function):
    """The penalty of ACLS, as the mean over the classes of squares; the weights are the roots of theirs."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, of_all: bool, positive: float, negative: float, margin: float, from_lowest: bool
    ) -> Tensor:
        top = logits.amax(1, keepdim=True)
        floor = top - margin
        over = (floor - logits.amin(1, keepdim=True) if from_lowest else floor).clamp_min(0)
        # What is squared: negative for the second term, which is 0 at the largest logits, and positive for the first.
        roots = torch.add(floor * -negative, logits, alpha=negative).clamp_max_(0)
        roots.addcmul_(torch.eq(logits, top, out=torch.empty_like(logits)), over, value=positive)
        ctx.save_for_backward(roots)
        ctx.weights = positive, negative
        squares = roots.square()
        return squares.mean() if of_all else squares.mean(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        check_first_derivative("acls_loss")
        (roots,), (positive, negative) = ctx.saved_tensors, ctx.weights
        halves = F.leaky_relu(roots, negative / positive) if positive else roots
        slope = halves * _shares(grads[0], roots, 2 * (positive or negative))
        return slope, None, None, None, None, None


def _shares(grad: Tensor, logits: Tensor, factor: float) -> Tensor:
    """``factor`` times what the gradient of a mean over the classes, or over all logits, is for each logit."""
    return grad.unsqueeze(1) * (factor / logits.shape[1]) if grad.ndim else grad * (factor / logits.numel())
