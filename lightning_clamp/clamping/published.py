"""Neural Clamping as published: an image-sized perturbation and T, by stochastic gradient descent on the focal loss."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_clamp._batch import Inputs, map_tensors
from lightning_clamp._checks import counted
from lightning_clamp._rows import Rows
from lightning_clamp.clamping.clamp import Clamp
from lightning_clamp.clamping.gradient import gradient_problem
from lightning_clamp.clamping.options import PublishedOptions
from lightning_clamp.clamping.outcome import MethodOutcome
from lightning_clamp.clamping.passes import CalibrationSet, Logits, summed
from lightning_clamp.clamping.summary import DatasetSummary
from lightning_clamp.clamping.temperature import TemperatureFit

# The official code clamps probabilities into this range before logarithm and power.
_CLIP = 1e-7


def fit_published(
    data: CalibrationSet, summary: DatasetSummary, base: TemperatureFit, options: PublishedOptions
) -> MethodOutcome:
    r"""Minimise ``loss_weight * focal + norm_weight * ‖δ‖₂`` over δ and an unconstrained T, one step per batch.

    The norm is not squared, there is no schedule and no early stopping; the last iterate is returned. The official
    loader also augments the calibration images by default: pass ``augmentation`` for that.

    Args:
        data: Network and batches, frozen.
        summary: First look at the same data.
        base: Unused: the published method does not start from temperature scaling.
        options: See :class:`~.options.PublishedOptions`.

    Reference:
        Tang, Chen and Ho, "Neural Clamping", TMLR 2024; https://github.com/yungchentang/NCToolkit.
    """
    check_inputs(summary, options)
    check_differentiable(data)
    torch.manual_seed(options.seed)
    perturbation, temperature = _start(data, summary, options)
    parameters = [perturbation, temperature]
    stepper, history = _optimizer(parameters, options), []
    for epoch in range(1, options.epochs + 1):
        losses = []
        for inputs, target in data.read(f"epoch {epoch}"):
            loss = _loss(data, inputs, target, perturbation, temperature, options)
            # Not backward(): a network that could not be frozen must not find gradients on its weights.
            perturbation.grad, temperature.grad = torch.autograd.grad(loss, parameters)
            stepper.step()
            losses.append(float(loss.detach()))
        mean = math.fsum(losses) / len(losses)
        history.append({"epoch": epoch, "loss": mean, "temperature": float(temperature.detach())})
    return _finished(data, summary, perturbation.detach(), float(temperature.detach()), options.epochs, history)


def check_differentiable(data: CalibrationSet) -> None:
    """Refuse a network that cannot be differentiated in its input."""
    if (problem := gradient_problem(data)) is not None:
        raise RuntimeError(
            f'method="published" descends along the gradient to the input, and {problem}: mend that, or use '
            'method="temperature".'
        )


def check_inputs(summary: DatasetSummary, options: PublishedOptions) -> None:
    """Refuse inputs that no one perturbation fits."""
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
    initial = options.initial
    if isinstance(initial, Tensor) and initial.shape != summary.shape:
        raise ValueError(f"`initial` must have the shape of one input, {summary.shape}, got {tuple(initial.shape)}.")


def _optimizer(parameters: list[Tensor], options: PublishedOptions) -> torch.optim.Optimizer:
    if options.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=options.lr)
    return torch.optim.SGD(parameters, lr=options.lr, momentum=options.momentum, nesterov=options.nesterov)


def _start(data: CalibrationSet, summary: DatasetSummary, options: PublishedOptions) -> tuple[Tensor, Tensor]:
    """Perturbation and temperature to start from, with gradients."""
    assert summary.shape is not None
    dtype, initial = summary.parameter_dtype, options.initial
    if isinstance(initial, Tensor):
        perturbation = initial.detach().to(dtype).clone()
    else:
        perturbation = options.initial_scale * torch.randn(summary.shape, dtype=dtype)
    if isinstance(initial, str) and initial == "data-driven":
        perturbation = data_driven_perturbation(data, perturbation, options.initial_temperature)
    temperature = torch.tensor(options.initial_temperature, dtype=dtype, device=data.device)
    return perturbation.to(data.device).requires_grad_(), temperature.requires_grad_()


def data_driven_perturbation(data: CalibrationSet, perturbation: Tensor, temperature: float) -> Tensor:
    """The published data-driven start: the mean input gradient of the sum of all logits over T, at ``perturbation``."""

    def batch_sums() -> Iterator[tuple[Tensor, ...]]:
        for inputs, _ in data.read("data-driven start"):
            logits, point = data.tracked(inputs, perturbation)
            (gradient,) = torch.autograd.grad((logits / temperature).sum(), point)
            yield gradient.flatten(0, -1 - perturbation.ndim).sum(0), torch.tensor(float(len(gradient)))

    total, count = summed(batch_sums(), [perturbation.shape, ()])
    return (total / float(count)).to(perturbation.dtype)


def _loss(
    data: CalibrationSet,
    inputs: Inputs,
    target: Tensor,
    perturbation: Tensor,
    temperature: Tensor,
    options: PublishedOptions,
) -> Tensor:
    """The objective of one batch."""
    images = inputs if options.augmentation is None else options.augmentation(map_tensors(inputs, torch.clone))
    logits = data.perturbed_logits(images, F.dropout(perturbation, options.dropout))
    focal: Tensor = _focal(data.rows(logits / temperature, target), options.gamma)
    norm: Tensor = torch.linalg.vector_norm(perturbation)
    return options.loss_weight * focal + options.norm_weight * norm


def _focal(rows: Rows, gamma: float | None) -> Tensor:
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
        reason = f"after {counted(epochs, 'epoch')} T = {temperature:.4g}, which is no temperature"
        return MethodOutcome(Clamp(), summary.logits, reason, history=tuple(history))
    log_temperature = torch.tensor(temperature, dtype=torch.float64).log().to(perturbation.dtype)
    clamp = Clamp(perturbation.cpu(), log_temperature)
    reason = f"the published method: the last iterate of {counted(epochs, 'epoch')}, T = {temperature:.4g}"
    return MethodOutcome(clamp, Logits(data, clamp.perturbation, recompute=True), reason, history=tuple(history))
