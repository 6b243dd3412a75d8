"""Values whose gradient is known, where autograd would work, or keep, much more than it takes."""

from typing import Any

import torch
from torch import Tensor

from lightning_clamp.losses._modes import check_first_derivative


class _KnownGradient(torch.autograd.Function):
    """Takes both as they are: torch 2.11 compiles a longer ``forward`` to wrong gradients."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, value: Tensor, slope: Tensor, loss: str) -> Tensor:
        ctx.save_for_backward(slope)
        ctx.loss = loss
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        check_first_derivative(ctx.loss)
        (slope,) = ctx.saved_tensors
        return slope * (grads[0].unsqueeze(1) if grads[0].ndim else grads[0]), None, None, None


class _KnownGradientAt(torch.autograd.Function):
    """Returns what it is given as well, whose gradient comes back through here and is added to on the way."""

    @staticmethod
    def forward(ctx: Any, points: Tensor, index: Tensor, value: Tensor, slope: Tensor, loss: str) -> Any:
        ctx.save_for_backward(index, slope)
        ctx.loss = loss
        return points.view_as(points), value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivative(ctx.loss)
        index, slope = ctx.saved_tensors
        return grads[0].scatter_add(1, index, slope * grads[1]), None, None, None, None


def known_gradient(logits: Tensor, value: Tensor, slope: Tensor, loss: str) -> Tensor:
    """``value``, with ``slope`` for its gradient; it cannot be differentiated twice.

    Args:
        logits: What it is computed from, ``(N, C, ...)`` or of any shape.
        value: One number for each position, ``(N, ...)``, or for all, ``()``; without a graph.
        slope: Derivatives of each in the logits, their shape; without a graph.
        loss: Name of the loss that a second derivative is refused for.
    """
    known: Tensor = _KnownGradient.apply(logits, value, slope, loss)
    return known


def known_gradient_at(points: Tensor, index: Tensor, value: Tensor, slope: Tensor, loss: str) -> tuple[Tensor, Tensor]:
    """``points``, and ``value`` with ``slope`` for its gradient in one point of each position.

    Args:
        points: What it is computed from, ``(N, C, ...)``.
        index: Which point, ``(N, 1, ...)``, int64.
        value: One number for all, ``()``; without a graph.
        slope: Its derivatives, shape of ``index``; without a graph.
        loss: Name of the loss that a second derivative is refused for.
    """
    passed: tuple[Tensor, Tensor] = _KnownGradientAt.apply(points, index, value, slope, loss)
    return passed
