"""Gauss-Newton sharpness: how curved the loss is in the weights, which the margins bound."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_clamp._batch import Inputs, call_network, logits_of
from lightning_clamp._checks import check_at_least
from lightning_clamp._rows import Task
from lightning_clamp.losses._modes import differentiable_twice, in_mode
from lightning_clamp.losses._positions import Positions, as_positions


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it sets the compiler's stance
def gauss_newton_sharpness(
    network: nn.Module,
    batches: Iterable[tuple[Inputs, Tensor]],
    *,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    max_iterations: int = 100,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> float:
    r"""Largest eigenvalue of the Gauss-Newton matrix :math:`E[J^\top (\mathrm{diag}(p) - pp^\top) J]`, J = dz/dθ.

    By power iteration, with two passes over the data each; the network is in evaluation mode meanwhile. Frozen
    parameters do not count. The estimate never exceeds the eigenvalue (Rayleigh quotient).

    Args:
        network: Maps inputs to logits, or to an output that has them as ``.logits``; differentiable twice.
        batches: Pairs ``(inputs, target)`` on the network's device, read once per iteration; the inputs may be a dict
            of the arguments of its forward, and of the target only the ignored positions matter.
        task: ``"multiclass"``, ``"binary"`` or ``"multilabel"``.
        ignore_index: Target value of positions to leave out.
        max_iterations: At least 1.
        tolerance: Relative change of the estimate at which to stop.
        seed: Of the random direction the iteration starts from.

    Returns:
        The eigenvalue of the mean over the positions that count, at least 0.

    Raises:
        ValueError: If there are no batches, no trainable parameters, or an option is out of range.

    Reference:
        Morosini et al., "Too Sharp, Too Sure", 2026 (arXiv 2604.20614), theorem 4.1.
    """
    check_at_least("max_iterations", max_iterations, 1)
    check_at_least("tolerance", tolerance, 0)
    weights = [value for value in network.parameters() if value.requires_grad]
    if not weights:
        raise ValueError("The network has no trainable parameters, and so no sharpness.")
    generator = torch.Generator().manual_seed(seed)
    direction, _ = _unit([torch.randn(value.shape, generator=generator).to(value) for value in weights])
    sharpness = 0.0
    with in_mode(network, "eval"), torch.enable_grad(), differentiable_twice():
        for _ in range(max_iterations):
            image = _product(network, weights, direction, batches, task, ignore_index)
            estimate = sum(float((one * other).sum()) for one, other in zip(image, direction, strict=True))
            direction, length = _unit(image)
            converged = abs(estimate - sharpness) <= tolerance * estimate
            sharpness = max(estimate, 0.0)
            if converged or length == 0:
                break
    return sharpness


def _product(
    network: nn.Module,
    weights: list[nn.Parameter],
    direction: list[Tensor],
    batches: Iterable[tuple[Inputs, Tensor]],
    task: Task,
    ignore_index: int | None,
) -> list[Tensor]:
    """The Gauss-Newton matrix times ``direction``."""
    total = [torch.zeros_like(value) for value in weights]
    count = 0
    for inputs, target in batches:
        logits = logits_of(call_network(network, inputs))
        positions = as_positions(logits, target, task=task, ignore_index=ignore_index, reduction="mean", why_hard="")
        for part, value in zip(total, _summed_product(positions, weights, direction), strict=True):
            part += value
        count += int(positions.counted().sum())
    if not count:
        raise ValueError(
            "There is nothing to measure the sharpness on: no batch holds a position that counts, or the batches can "
            "be read only once; pass a list or a DataLoader."
        )
    return [value / count for value in total]


def _summed_product(positions: Positions, weights: list[nn.Parameter], direction: list[Tensor]) -> tuple[Tensor, ...]:
    """The same for the sum over the positions of one batch that count."""
    logits = positions.logits
    # J v without forward-mode differentiation: v times the derivative of J^T u, which is linear in u.
    unit = torch.zeros_like(logits, requires_grad=True)
    pulled = torch.autograd.grad(logits, weights, unit, create_graph=True, materialize_grads=True)
    (slope,) = torch.autograd.grad(pulled, unit, direction, retain_graph=True)
    probs = F.softmax(logits.detach(), 1)
    curved = probs * (slope - (probs * slope).sum(1, keepdim=True)) * positions.counted().unsqueeze(1)
    return torch.autograd.grad(logits, weights, curved, materialize_grads=True)


def _unit(vector: list[Tensor]) -> tuple[list[Tensor], float]:
    """``vector`` with length 1 (unless it is 0), and its length."""
    length = sum(float(part.double().square().sum()) for part in vector) ** 0.5
    return [part / (length or 1.0) for part in vector], length
