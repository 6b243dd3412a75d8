"""Dense binary prediction with perturbed labels: the self-calibrating binary cross-entropy and its learning rules."""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_clamp._checks import OptionError, check_at_least, check_between, check_choice
from lightning_clamp.losses._positions import Reduction, as_positions

Kind: TypeAlias = Literal["HI", "SI", "M", "DM"]
Rule: TypeAlias = Literal["MC", "MEI"]
# Amount β of each kind, in the paper's convention; the official code writes b = β / 2.
PERTURBATIONS: dict[Kind, float] = {"HI": 2.0, "SI": 1.5, "M": 1.0, "DM": 1.0}
RULES: tuple[Rule, ...] = ("MC", "MEI")
# Noise of DM: a standard normal, truncated to this distance from 0.
_NOISE = 0.25
_NOISE_CDF = (0.5 * (1 + math.erf(-_NOISE / math.sqrt(2))), 0.5 * (1 + math.erf(_NOISE / math.sqrt(2))))
# The official code clamps probabilities to [1e-7, 1 - 1e-7]: the logits beyond are these.
_LOGIT_CAP = math.log(1e7 - 1)
# α stays this far below the amount at which the expected label would be 1/2.
_BELOW_CAP = 0.01
_WHY_HARD = (
    "sc_bce_loss perturbs labels that are 0 or 1, and was given one between: pass labels, or train with another loss, "
    'such as label_smoothing_loss(..., task="binary").'
)


def sc_bce_loss(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float | Tensor = 0.1,
    kind: Kind = "HI",
    beta: float | None = None,
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
    generator: torch.Generator | None = None,
    log_terms: dict[str, Tensor] | None = None,
) -> Tensor:
    r"""Self-calibrating binary cross-entropy: with probability :math:`\alpha_i`, an image's labels are perturbed.

    .. math:: (1 - Z_i)\,\mathrm{BCE}(z_i, y_i) + Z_i\,\mathrm{BCE}(z_i, p(y_i)), \quad
        Z_i \sim \mathrm{Bernoulli}(\alpha_i), \quad p(y) = (1 - \beta)\,y + \beta / 2

    ========================= ====== =======================================
    ``kind``                  β      perturbed labels
    ========================= ====== =======================================
    HI, hard inversion        2      1 and 0 for 0 and 1
    SI, soft inversion        1.5    .75 and .25
    M, moderation             1      .5
    DM, dynamic moderation    1      .5, plus noise of at most .25 per pixel
    ========================= ====== =======================================

    The expected label is :math:`(1 - \alpha\beta)\,y + \alpha\beta / 2`. **β is the paper's**: the official code's is
    half of it, and its default, 2 there and 4 here, gives labels outside [0, 1], which are refused.

    Args:
        logits: One logit per position, ``(N, 1, H, W)`` or ``(N, H, W)``; any positions, also none, are taken.
        target: 0 or 1 of any dtype, of the same shape or without the axis of length 1.
        alpha: Probability that an image's labels are perturbed, in [0, 1]: one number, or one per image, ``(N,)``.
        kind: ``"HI"``, ``"SI"``, ``"M"`` or ``"DM"``.
        beta: Amount of the perturbation in (0, 2] instead of the kind's; below 1 the labels are softened.
        ignore_index: Target value of positions to leave out.
        reduction: ``"mean"`` over the positions that count (0 if there are none), ``"sum"``, or ``"none"``.
        generator: Where the draws come from; torch's own by default.
        log_terms: A dict that is given the means ``cross_entropy`` (of the given labels) and ``perturbed`` (the share
            of perturbed ones).

    Returns:
        A scalar, or the shape of the target.

    Raises:
        TypeError: If either is no tensor.
        ValueError: If shapes do not fit, an option is out of range, or a label is neither 0 nor 1.

    Reference:
        Liu, Aviles-Rivero, Ji, Tao and Liu, "Model Calibration in Dense Classification with Adaptive Label
        Perturbation", ICCV 2023 (arXiv 2307.13539), figure 2.
    """
    beta = beta_of_kind(kind, beta)
    positions = as_positions(
        logits, target, task="binary", ignore_index=ignore_index, reduction=reduction, why_hard=_WHY_HARD
    )
    chance = torch.as_tensor(alpha, dtype=positions.logits.dtype, device=positions.logits.device)
    if chance.ndim and chance.shape != positions.target.shape[:1]:
        raise OptionError(
            f"`alpha` must be one number or have shape ({len(positions.target)},), got {tuple(chance.shape)}."
        )
    if chance.device.type == "cpu" and not torch.compiler.is_compiling():
        for end in chance.aminmax():
            check_between("alpha", float(end), 0, 1)
    # z of the pair (-z/2, z/2).
    logit = positions.logits[:, 1] - positions.logits[:, 0]
    label = positions.target.to(logit.dtype)
    draw = torch.rand(len(label), generator=generator, dtype=logit.dtype, device=logit.device)
    is_perturbed = (draw < chance).reshape(-1, *[1] * (label.ndim - 1)).expand(label.shape)
    other = (1 - beta) * label + beta / 2
    if kind == "DM":
        other = other + _truncated_normal(other, generator)
    loss = F.binary_cross_entropy_with_logits(logit, torch.where(is_perturbed, other, label), reduction="none")
    return positions.reduced(loss, reduction, log_terms, perturbed=is_perturbed.to(logit.dtype))


def beta_of_kind(kind: Kind, beta: float | None) -> float:
    """β of a kind of perturbation, or the one given instead.

    Raises:
        ValueError: If the kind is unknown or β is not in (0, 2].
    """
    check_choice("kind", kind, tuple(PERTURBATIONS))
    if beta is None:
        return PERTURBATIONS[kind]
    if not 0 < beta <= 2:
        raise OptionError(f"`beta` must lie in (0, 2], so that labels stay in [0, 1], got {beta}.")
    return beta


def _truncated_normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """A standard normal within ``_NOISE`` of 0, shape of ``like``, by the inverse of its distribution function."""
    low, high = _NOISE_CDF
    uniform = torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)
    normal: Tensor = torch.special.ndtri(low + (high - low) * uniform)
    return normal


@dataclass(frozen=True)
class LabelPerturbationRule:
    r"""How the perturbation of each image is learned.

    .. math:: \alpha_i \leftarrow \alpha_i + \eta\,\Big(\frac{4}{\beta^2}\,\big(\mathrm{BCE}(z_i, p(y_i)) -
        \mathrm{BCE}(z_i, y_i)\big) + \lambda\,\mathrm{Reg}_i\Big)

    An image is perturbed more the surer and righter the network is on it. With the accuracy A on validation data,
    ``rule="MC"`` (model calibration) has :math:`\mathrm{Reg}_i = \min((1 - \beta\alpha_i / 2) - A, 0)`, which keeps the
    expected confidence of the label at or above A; ``"MEI"`` (maximum entropy inference) has
    :math:`\mathrm{Reg} = \min(A - A_{\mathrm{best}}, 0)`, which keeps A from dropping. The official code has MC only;
    that the accuracy it is compared with is the best so far is our reading. Afterwards α is kept in [0, 1/β), as in the
    code (a value at or above 1/β becomes 1/β - .01), and at most 1.

    Attributes:
        beta: The paper's β.
        eta: Step size; .002 in the official code.
        lambda_: Weight λ of the constraint; 2000 in the official code.
        rule: ``"MC"`` or ``"MEI"``.

    Raises:
        ValueError: If β is not in (0, 2], another number is negative, or the rule is unknown.

    Reference:
        Liu et al., ICCV 2023, figure 2 (eq. 5 and 6), and the official ``main_ASLP.py``.
    """

    beta: float
    eta: float = 0.002
    lambda_: float = 2000.0
    rule: Rule = "MC"

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        beta_of_kind("HI", self.beta)
        check_at_least("eta", self.eta, 0)
        check_at_least("lambda_", self.lambda_, 0)
        check_choice("rule", self.rule, RULES)

    def updated(
        self,
        alpha: Tensor,
        logits: Tensor,
        target: Tensor,
        *,
        accuracy: float,
        best_accuracy: float,
        ignore_index: int | None = None,
    ) -> Tensor:
        """The α of images after one step; where the logits are not finite, as it was.

        Args:
            alpha: Before the step, ``(N,)``.
            logits: One logit per position of the same images, as for :func:`sc_bce_loss`.
            target: Their labels, unperturbed.
            accuracy: On validation data, a fraction.
            best_accuracy: The best so far, this one included.
            ignore_index: Target value of positions to leave out.
        """
        regularizer = (
            ((1 - self.beta * alpha / 2) - accuracy).clamp_max(0)
            if self.rule == "MC"
            else min(accuracy - best_accuracy, 0.0)
        )
        seen = signed_logit(logits, target, ignore_index=ignore_index)
        moved = alpha + self.eta * (2 / self.beta * seen + self.lambda_ * regularizer)
        cap = 1 / self.beta
        moved = torch.where(moved >= cap, cap - _BELOW_CAP, moved).clamp(0, 1)
        return torch.where(moved.isfinite(), moved, alpha)


def signed_logit(logits: Tensor, target: Tensor, *, ignore_index: int | None = None) -> Tensor:
    r"""How sure and right the network is on each image: the mean of :math:`(2y - 1)\,z` over its positions, ``(N,)``.

    It is :math:`\frac{2}{\beta}(\mathrm{BCE}(z, p(y)) - \mathrm{BCE}(z, y))` for every β, since the cross-entropy is
    linear in the label. Logits count up to the official code's clamp of probabilities, 1e-7.

    Args:
        logits: As for :func:`sc_bce_loss`.
        target: As for :func:`sc_bce_loss`.
        ignore_index: As for :func:`sc_bce_loss`.
    """
    positions = as_positions(
        logits.detach(), target, task="binary", ignore_index=ignore_index, reduction="none", why_hard=_WHY_HARD
    )
    logit = (positions.logits[:, 1] - positions.logits[:, 0]).clamp(-_LOGIT_CAP, _LOGIT_CAP)
    signed = positions.kept((2 * positions.target - 1) * logit)
    return signed.reshape(len(logit), -1).sum(1) / positions.n_positions()
