"""Neural Clamping as published: an image-sized perturbation and T, by stochastic gradient descent on the focal loss."""

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_clamp._rows import Rows
from lightning_clamp.clamping.clamp import Clamp
from lightning_clamp.clamping.outcome import MethodOutcome
from lightning_clamp.clamping.passes import CalibrationSet, Logits, summed
from lightning_clamp.clamping.summary import DatasetSummary
from lightning_clamp.clamping.temperature import TemperatureFit

# The official code clamps probabilities into this range before logarithm and power.
_CLIP = 1e-7


def fit_published(
    data: CalibrationSet,
    summary: DatasetSummary,
    base: TemperatureFit,
    *,
    epochs: int = 100,
    lr: float = 0.01,
    momentum: float = 0.9,
    nesterov: bool = False,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    gamma: float | None = 1.0,
    loss_weight: float = 1.0,
    norm_weight: float = 0.01,
    dropout: float = 0.0,
    initial: Literal["random", "data-driven"] | Tensor = "random",
    initial_scale: float = 0.001,
    initial_temperature: float = 1.0,
    augmentation: Callable[[Any], Any] | None = None,
    seed: int = 0,
) -> MethodOutcome:
    r"""Minimise ``loss_weight * focal + norm_weight * ‖δ‖₂`` over δ and an unconstrained T, one step per batch.

    The defaults are those of the official demo (ResNet-110 on CIFAR-100). The norm is not squared, there is no
    schedule and no early stopping; the last iterate is returned. The official loader also augments the calibration
    images by default: pass ``augmentation`` for that.

    Args:
        data: Network and batches, frozen.
        summary: First look at the same data.
        base: Unused: the published method does not start from temperature scaling.
        epochs: Passes over the calibration set.
        lr: Learning rate.
        momentum: Momentum of SGD; unused by AdamW.
        nesterov: Nesterov momentum for SGD.
        optimizer: ``"sgd"`` or ``"adamw"`` (weight decay 0.01 on both, torch's default).
        gamma: Focal exponent; None for the cross-entropy.
        loss_weight: λ₀.
        norm_weight: λ₁.
        dropout: Probability of dropping an entry of δ in a training step.
        initial: ``"random"``, normal times ``initial_scale``; ``"data-driven"``, see
            :func:`data_driven_perturbation`; or a tensor of the shape of one input.
        initial_scale: Standard deviation of the random start.
        initial_temperature: T to start from.
        augmentation: Applied to every batch of inputs (a dict of tensors where they are named) before the perturbation.
        seed: Of the initial perturbation, dropout, and any randomness of the loader and the augmentation.

    Reference:
        Tang, Chen and Ho, "Neural Clamping", TMLR 2024; https://github.com/yungchentang/NCToolkit.
    """
    if summary.shape is None:
        raise ValueError(
            "The inputs differ in shape, or are several tensors, so no one perturbation fits them: name a submodule "
            'with perturb_at, or use method="temperature".'
        )
    if not summary.float_inputs:
        raise TypeError(
            "The inputs are integers, and a perturbation needs floats to be added to: name the submodule that is fed "
            'the embeddings with perturb_at, or use method="temperature".'
        )
    if isinstance(initial, Tensor) and initial.shape != summary.shape:
        raise ValueError(f"`initial` must have the shape of one input, {summary.shape}, got {tuple(initial.shape)}.")
    torch.manual_seed(seed)
    perturbation, temperature = _start(data, summary, initial, initial_scale, initial_temperature)
    parameters = [perturbation, temperature]
    stepper: torch.optim.Optimizer
    if optimizer == "adamw":
        stepper = torch.optim.AdamW(parameters, lr=lr)
    else:
        stepper = torch.optim.SGD(parameters, lr=lr, momentum=momentum, nesterov=nesterov)
    history = []
    for epoch in range(epochs):
        losses = []
        for inputs, target in data.read(f"epoch {epoch + 1}"):
            images = inputs if augmentation is None else augmentation(inputs)
            logits = data.perturbed_logits(images, F.dropout(perturbation, dropout))
            rows = data.rows(logits / temperature, target)
            loss = loss_weight * _loss(rows, gamma) + norm_weight * torch.linalg.vector_norm(perturbation)
            # Not backward(): a network that could not be frozen must not find gradients on its weights.
            perturbation.grad, temperature.grad = torch.autograd.grad(loss, parameters)
            stepper.step()
            losses.append(float(loss.detach()))
        history.append(
            {"epoch": epoch + 1, "loss": math.fsum(losses) / len(losses), "temperature": float(temperature.detach())}
        )
    return _finished(data, summary, perturbation.detach(), float(temperature.detach()), epochs, history)


def _start(
    data: CalibrationSet,
    summary: DatasetSummary,
    initial: Literal["random", "data-driven"] | Tensor,
    initial_scale: float,
    initial_temperature: float,
) -> tuple[Tensor, Tensor]:
    assert summary.shape is not None
    dtype = summary.parameter_dtype
    if isinstance(initial, Tensor):
        perturbation = initial.detach().to(dtype).clone()
    else:
        perturbation = initial_scale * torch.randn(summary.shape, dtype=dtype)
    if isinstance(initial, str) and initial == "data-driven":
        perturbation = data_driven_perturbation(data, perturbation, initial_temperature)
    temperature = torch.tensor(initial_temperature, dtype=dtype, device=data.device)
    return perturbation.to(data.device).requires_grad_(), temperature.requires_grad_()


def data_driven_perturbation(data: CalibrationSet, perturbation: Tensor, temperature: float) -> Tensor:
    """The published data-driven start: the mean input gradient of the sum of all logits over T, at ``perturbation``."""

    def parts() -> Iterator[tuple[Tensor, ...]]:
        for inputs, _ in data.read("data-driven start"):
            logits, point = data.tracked(inputs, perturbation)
            (gradient,) = torch.autograd.grad((logits / temperature).sum(), point)
            yield gradient.flatten(0, -1 - perturbation.ndim).sum(0), torch.tensor(float(len(gradient)))

    total, count = summed(parts(), [perturbation.shape, ()])
    return (total / float(count)).to(perturbation.dtype)


def _loss(rows: Rows, gamma: float | None) -> Tensor:
    """Mean focal loss with clamped probabilities, or the cross-entropy."""
    if gamma is None:
        return F.cross_entropy(rows.logits, rows.target)
    likelihood = rows.logits.softmax(1).gather(1, rows.target[:, None])[:, 0].clamp(_CLIP, 1 - _CLIP)
    return -((1 - likelihood) ** gamma * likelihood.log()).mean()


def _finished(
    data: CalibrationSet,
    summary: DatasetSummary,
    perturbation: Tensor,
    temperature: float,
    epochs: int,
    history: list[dict[str, float]],
) -> MethodOutcome:
    if not temperature > 0 or not bool(torch.isfinite(perturbation).all()):
        reason = f"after {epochs} epochs T = {temperature:.4g}, which is no temperature"
        return MethodOutcome(Clamp(), summary.logits, reason, history=tuple(history))
    log_temperature = torch.tensor(temperature, dtype=torch.float64).log().to(perturbation.dtype)
    clamp = Clamp(perturbation.cpu(), log_temperature)
    reason = f"the published method: the last iterate of {epochs} epochs, T = {temperature:.4g}"
    return MethodOutcome(clamp, Logits(data, clamp.perturbation, recompute=True), reason, history=tuple(history))
