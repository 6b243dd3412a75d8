"""Penalties of logits beyond a margin, as means over the classes, of each position or of all of them.

Known gradients are part of the definition where a term stands still (the stop-gradient of ACLS), and half the passes
over memory that autograd would make: they are added to that of the cross-entropy, on its way back or in one step with
it. Comparisons are written into float tensors, which is three times faster than a mask of bools and its use.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_clamp.losses._modes import check_first_derivative
from lightning_clamp.losses._positions import mean_nll


class Penalty(NamedTuple):
    """A penalty with its derivatives.

    Attributes:
        measured: The value, of each position or of all, and the slope, shape of the logits.
        scale: Derivatives are the slope times this, and its share of a mean.
        once: Name of the loss, if it has no second derivative.
    """

    measured: Callable[..., tuple[Tensor, Tensor]]
    scale: float
    once: str | None


def _margins(logits: Tensor, of_all: bool, margin: float) -> tuple[Tensor, Tensor]:
    top, predicted = logits.max(1, keepdim=True)
    beyond = torch.sub(logits, top - margin).clamp_max_(0)
    value = beyond.mean() if of_all else beyond.mean(1)
    slope = beyond.sign_()
    return value, slope.scatter_(1, predicted, -slope.sum(1, keepdim=True))


def _adaptive_margins(
    logits: Tensor, of_all: bool, positive: float, negative: float, margin: float, from_lowest: bool
) -> tuple[Tensor, Tensor]:
    heights = logits - logits.amin(1, keepdim=True) if from_lowest else logits
    top = heights.amax(1, keepdim=True)
    # The largest stay as they are where that is above 0: all others, and those below, are seen from the largest.
    seen = torch.ne(heights, top.clamp_min(0), out=torch.empty_like(logits))
    torch.addcmul(heights, seen, top, value=-1, out=seen)
    # What is squared: negative for the second term, which is 0 at the largest logits, and positive for the first.
    beyond = F.softshrink(seen, margin)
    slope = F.leaky_relu(beyond, negative / positive) if positive else beyond.clamp_max(0)
    squares = beyond.mul_(slope)
    return squares.mean() if of_all else squares.mean(1), slope


# The penalty of MbLS, negative; of several largest logits the first is pulled down, as in the code. It is flat wherever
# it has a gradient, so that this may be differentiated again.
MARGINS = Penalty(_margins, -1.0, None)
# The penalty of ACLS, as the mean over the classes of weighted squares, in units of the first weight but 0.
ADAPTIVE_MARGINS = Penalty(_adaptive_margins, 2.0, "acls_loss")


class _Passed(torch.autograd.Function):
    """The logits and the penalty: the gradient of the logits comes back through here, and is added to on the way."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, of_all: bool, penalty: Penalty, *options: float) -> tuple[Tensor, Tensor]:
        value, slope = penalty.measured(logits, of_all, *options)
        ctx.save_for_backward(slope)
        ctx.scale, ctx.once = penalty.scale, penalty.once
        return logits.view_as(logits), value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.once:
            check_first_derivative(ctx.once)
        (slope,) = ctx.saved_tensors
        of_each = grads[1].ndim > 0
        share = ctx.scale / (slope.shape[1] if of_each else slope.numel())
        gradient = torch.addcmul(grads[0], slope, grads[1].unsqueeze(1) if of_each else grads[1], value=share)
        return gradient, *[None] * (len(ctx.needs_input_grad) - 1)


class _Mean(torch.autograd.Function):
    """The mean cross-entropy of labels and the mean penalty in one step."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, weight: float, penalty: Penalty, options: tuple[float, ...]
    ) -> Tensor:
        value, slope = penalty.measured(logits, True, *options)
        log_probs = F.log_softmax(logits, 1)
        ctx.save_for_backward(logits, target, log_probs, slope)
        ctx.once, ctx.share = penalty.once, weight * penalty.scale / logits.shape[1]
        return torch.add(mean_nll(log_probs, target), value, alpha=weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.once:
            check_first_derivative(ctx.once)
        logits, target, log_probs, slope = ctx.saved_tensors
        if torch.is_grad_enabled():
            nll = F.cross_entropy(logits, target)
            (gradient,) = torch.autograd.grad(nll, logits, grads[0], create_graph=True)
            return torch.addcmul(gradient, slope, grads[0], value=ctx.share / target.numel()), *[None] * 4
        rest = log_probs.exp().scatter_(1, target.unsqueeze(1), -1, reduce="add").add_(slope, alpha=ctx.share)
        return rest.mul_(grads[0] / target.numel()), *[None] * 4


def passed(logits: Tensor, of_all: bool, penalty: Penalty, options: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """The logits, to take the cross-entropy of, and the penalty of each position, ``(N, ...)``, or of all."""
    logits, value = _Passed.apply(logits, of_all, penalty, *options)
    return logits, value


def penalised_mean(
    logits: Tensor, target: Tensor, weight: float, penalty: Penalty, options: tuple[float, ...]
) -> Tensor:
    """Mean cross-entropy plus ``weight`` times the mean penalty.

    The same as by :func:`passed`, in a third of autograd's nodes, for which small batches on a GPU take their time; for
    code that is not compiled: a compiler does so itself.
    """
    loss: Tensor = _Mean.apply(logits, target, weight, penalty, options)
    return loss
