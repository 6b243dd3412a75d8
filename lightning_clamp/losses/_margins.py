"""Penalties of logits beyond a margin, as means over the classes, of each position or of all of them.

Each returns the logits too. Their gradient comes back through the penalty, which knows its own and adds it on the way:
half the passes over memory that autograd would make. Known gradients are part of the definition where a term stands
still (the stop-gradient of ACLS). Comparisons are written into float tensors, which is three times faster than a mask
of bools and its use.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_clamp.losses._modes import check_first_derivative


class Penalty(torch.autograd.Function):
    """Saves its derivatives in the logits as ``slope``, but for the factor ``scale`` and the share of a mean."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.once:
            check_first_derivative(ctx.once)
        (slope,) = ctx.saved_tensors
        of_each = grads[1].ndim > 0
        share = ctx.scale / (slope.shape[1] if of_each else slope.numel())
        gradient = torch.addcmul(grads[0], slope, grads[1].unsqueeze(1) if of_each else grads[1], value=share)
        return gradient, *[None] * (len(ctx.needs_input_grad) - 1)


class Margins(Penalty):
    """The penalty of MbLS, negative; of several largest logits the first is pulled down, as in the code."""

    # Flat wherever it has a gradient, so that this may be differentiated again.
    @staticmethod
    def forward(ctx: Any, logits: Tensor, of_all: bool, margin: float) -> tuple[Tensor, Tensor]:
        top, predicted = logits.max(1, keepdim=True)
        beyond = F.softshrink(logits - top, margin)
        value = beyond.mean() if of_all else beyond.mean(1)
        slope = beyond.sign_()
        ctx.save_for_backward(slope.scatter_(1, predicted, -slope.sum(1, keepdim=True)))
        ctx.scale, ctx.once = -1, None
        return logits.view_as(logits), value


class AdaptiveMargins(Penalty):
    """The penalty of ACLS, as the mean over the classes of weighted squares, in units of the first weight but 0."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, of_all: bool, positive: float, negative: float, margin: float, from_lowest: bool
    ) -> tuple[Tensor, Tensor]:
        heights = logits - logits.amin(1, keepdim=True) if from_lowest else logits
        top = heights.amax(1, keepdim=True)
        # The largest stay as they are where that is above 0: all others, and those below, are seen from the largest.
        seen = torch.ne(heights, top.clamp_min(0), out=torch.empty_like(logits))
        torch.addcmul(heights, seen, top, value=-1, out=seen)
        # What is squared: negative for the second term, which is 0 at the largest logits, and positive for the first.
        beyond = F.softshrink(seen, margin)
        slope = F.leaky_relu(beyond, negative / positive) if positive else beyond.clamp_max(0)
        ctx.save_for_backward(slope)
        ctx.scale, ctx.once = 2, "acls_loss"
        squares = beyond.mul_(slope)
        return logits.view_as(logits), squares.mean() if of_all else squares.mean(1)
