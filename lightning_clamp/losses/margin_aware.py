"""CalMO, the margin-aware objective: cross-entropy, robustness to small moves of the input, and a smooth margin."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from lightning_clamp._checks import check_at_least
from lightning_clamp._rows import Task
from lightning_clamp.losses._modes import Mode, differentiable_twice, in_mode
from lightning_clamp.losses._positions import Positions, Reduction, as_positions
from lightning_clamp.losses.attack import Attack, Norm
from lightning_clamp.metrics.margin import class_margin

_WHY_HARD = (
    "margin_aware_loss measures the margin of one label, and a target of probabilities names none: pass labels, or "
    "train with acls_loss or mbls_loss, whose margins are those of the prediction."
)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it sets the compiler's stance
def margin_aware_loss(
    network: Callable[[Tensor], Tensor],
    inputs: Tensor,
    target: Tensor,
    *,
    lambda_r: float = 0.5,
    lambda_s: float = 0.01,
    epsilon: float = 8 / 255,
    step_size: float = 2 / 255,
    steps: int = 3,
    norm: Norm = "linf",
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
    clip: tuple[float, float] | None = (0.0, 1.0),
    attack_mode: Mode = "eval",
    task: Task = "multiclass",
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    log_terms: dict[str, Tensor] | None = None,
) -> Tensor:
    r"""The margin-aware objective CalMO.

    .. math:: \mathrm{CE} + \lambda_r\,\mathrm{KL}(p(x) \,\|\, p(x_{\mathrm{adv}})) + \lambda_s\,\|\nabla_x m(x, y)\|^2

    with the margin :math:`m = z_y - \max_{j \ne y} z_j`, and :math:`x_{\mathrm{adv}}` found from x by projected
    gradient ascent on the cross-entropy. ``lambda_r=0`` is the paper's "Flat." (no attack is made), ``lambda_s=0`` its
    "Rob.".

    The paper fixes the two weights, the radius, three steps of 2/255 and a start at x. **Our choices**, where it is
    silent: steps along the sign of the gradient (``norm="linf"``; three of 2/255 stay inside 8/255); moved images are
    clipped to ``clip``; the network is in evaluation mode while it is attacked, so that batch statistics and dropout
    do not move, and in its own mode for both terms of the loss; gradients flow through p(x) in the divergence, as in
    TRADES, and none through :math:`x_{\mathrm{adv}}`; the margin of an item of dense outputs is the mean over its
    positions. The gradient of m is that of the network's input, in the units it is given in.

    The gradient penalty is differentiated twice, for which a compiled network is run uncompiled, and attention by its
    formula instead of a fused kernel (neither with ``lambda_s=0``).

    Args:
        network: Maps inputs to logits: ``(N, C)``, ``(N, C, ...)``, or one logit per position, or per label, as
            ``task`` says.
        inputs: A batch as the network takes it, float, ``(N, ...)``, channels on axis 1.
        target: Class indices, ``(N,)`` or ``(N, ...)``.
        lambda_r: Weight of the divergence, at least 0.
        lambda_s: Weight of the squared gradient of the margin, at least 0.
        epsilon: Radius of the ball, in units of the images *before* normalisation.
        step_size: Length of a step, in the same units.
        steps: Number of steps.
        norm: ``"linf"`` or ``"l2"``.
        mean: What your normalisation subtracts, one number or one per channel; 0 if there is none.
        std: What it divides by; 1 if there is none.
        clip: Range of the images before normalisation; None for inputs without one.
        attack_mode: ``"eval"`` or ``"train"``.
        task: ``"multiclass"``, ``"binary"`` for a one-logit (sigmoid) head, or ``"multilabel"`` for one per label.
        ignore_index: Target value of positions to leave out.
        reduction: Over the positions, as for the other losses; an item's smoothness counts at each of its positions.
        log_terms: A dict that is given the means ``cross_entropy``, ``divergence``, ``smoothness`` (before the
            weights), ``margin``, ``margin_tail`` (:math:`e^{-m}`), and ``robust_margin``, ``robust_margin_tail`` at
            :math:`x_{\mathrm{adv}}`: upper and lower bounds of the paper's robust margin and its tail Q.

    Returns:
        A scalar, or the shape of the target.

    Raises:
        RuntimeError: In inference mode, where there are no gradients.
        TypeError: If the inputs are no float tensor.
        ValueError: If inputs lie outside ``clip``, an option is out of range, or logits and target do not fit.

    Reference:
        Morosini, Gjika, Poggio and Beneventano, "Too Sharp, Too Sure", 2026 (arXiv 2604.20614), eq. 2.
    """
    check_at_least("lambda_r", lambda_r, 0)
    check_at_least("lambda_s", lambda_s, 0)
    attack = Attack(epsilon, step_size, steps, norm, mean, std, clip, attack_mode)
    attack.check()
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        kind = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
        raise TypeError(f"Inputs must be float to be moved, got {kind}: pass a tensor of images scaled to [0, 1].")
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "margin_aware_loss needs gradients of the input, and inference mode has none: "
            "use no_grad, in Lightning Trainer(inference_mode=False)."
        )

    differentiable = torch.is_grad_enabled()

    def positions_of(x: Tensor) -> Positions:
        with differentiable_twice() if lambda_s else nullcontext():
            logits = network(x)
        return as_positions(
            logits, target, task=task, ignore_index=ignore_index, reduction=reduction, why_hard=_WHY_HARD
        )

    moved = None
    if lambda_r:
        with in_mode(network, attack_mode):
            moved = attack(lambda x: positions_of(x).total_cross_entropy(), inputs)
    clean = inputs.detach().requires_grad_(bool(lambda_s))
    with torch.set_grad_enabled(differentiable or bool(lambda_s)):
        positions = positions_of(clean)
        margin = class_margin(positions.logits, positions.target)
        log_probs = positions.log_probs()
        loss, terms = positions.cross_entropy(log_probs), {}
        if lambda_s:
            terms["smoothness"] = _squared_gradient(positions, margin, clean, differentiable)
            loss = loss + lambda_s * terms["smoothness"]
    tails = {"margin": margin, "margin_tail": margin.detach().neg().exp()}
    if moved is not None:
        robust = positions_of(moved)
        terms["divergence"] = _divergence(log_probs, robust.log_probs())
        loss = loss + lambda_r * terms["divergence"]
        robust_margin = class_margin(robust.logits, robust.target).detach()
        tails |= {"robust_margin": robust_margin, "robust_margin_tail": robust_margin.neg().exp()}
    return positions.reduced(loss, reduction, log_terms, log_probs, **terms, **tails)


def _squared_gradient(positions: Positions, margin: Tensor, inputs: Tensor, differentiable: bool) -> Tensor:
    """Squared norm of the input gradient of each item's margin, at each of its positions."""
    (gradient,) = torch.autograd.grad(positions.kept(margin).sum(), inputs, create_graph=differentiable)
    # The mean over the positions is taken here: their share of a large image would underflow in half precision.
    squared = gradient.to(margin.dtype).square().flatten(1).sum(1) / positions.n_positions().square()
    return squared.reshape(-1, *[1] * (margin.ndim - 1)).expand(margin.shape)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of every position, of the log-probabilities."""
    return (log_p.exp() * (log_p - log_q)).sum(1)
