"""One mixin per loss; the options are those of its function, named after it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_clamp._batch import Inputs
from lightning_clamp.losses._modes import Mode
from lightning_clamp.losses._outputs import Logits
from lightning_clamp.losses.attack import Norm
from lightning_clamp.losses.batch_statistics import dca_loss, mdca_loss, mmce_loss
from lightning_clamp.losses.cpc import cpc_loss
from lightning_clamp.losses.focal import brier_loss, dual_focal_loss, flsd_loss, focal_loss
from lightning_clamp.losses.label_perturbation import Kind, sc_bce_loss
from lightning_clamp.losses.margin_aware import margin_aware_loss
from lightning_clamp.losses.mixin import LossMixin
from lightning_clamp.losses.regularizers import (
    Reference,
    acls_loss,
    entropy_penalty_loss,
    label_smoothing_loss,
    mbls_loss,
)

# A batch of no pixels, for a loss of one logit.
NO_PIXELS = (torch.zeros(0, device="cpu"), torch.zeros(0, device="cpu"))


class ACLSMixin(LossMixin):
    """Trains with :func:`~lightning_clamp.losses.acls_loss`, whose options begin with ``acls_`` here."""

    def __init__(
        self,
        *args: Any,
        acls_alpha: float = 0.1,
        acls_pos_lambda: float = 1.0,
        acls_neg_lambda: float = 0.1,
        acls_margin: float = 10.0,
        acls_reference: Reference = "code",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.train_with(
            acls_loss,
            prefix="acls_",
            alpha=acls_alpha,
            pos_lambda=acls_pos_lambda,
            neg_lambda=acls_neg_lambda,
            margin=acls_margin,
            reference=acls_reference,
        )


class MbLSMixin(LossMixin):
    """Trains with :func:`~lightning_clamp.losses.mbls_loss`, whose options begin with ``mbls_`` here."""

    def __init__(self, *args: Any, mbls_alpha: float = 0.1, mbls_margin: float = 10.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.train_with(mbls_loss, prefix="mbls_", alpha=mbls_alpha, margin=mbls_margin)


class LabelSmoothingMixin(LossMixin):
    """Trains with :func:`~lightning_clamp.losses.label_smoothing_loss`."""

    def __init__(self, *args: Any, smoothing_alpha: float = 0.05, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.train_with(label_smoothing_loss, prefix="smoothing_", alpha=smoothing_alpha)


class EntropyPenaltyMixin(LossMixin):
    """Trains with :func:`~lightning_clamp.losses.entropy_penalty_loss`."""

    def __init__(
        self, *args: Any, entropy_alpha: float = 0.1, entropy_reference: Reference = "code", **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.train_with(entropy_penalty_loss, prefix="entropy_", alpha=entropy_alpha, reference=entropy_reference)


class FocalMixin(LossMixin):
    """Trains with :func:`~lightning_clamp.losses.focal_loss`."""

    def __init__(self, *args: Any, focal_gamma: float = 3.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.train_with(focal_loss, prefix="focal_", gamma=focal_gamma)


class FLSDMixin(LossMixin):
    """Trains with :func:`~lightning_clamp.losses.flsd_loss`."""

    def __init__(self, *args: Any, flsd_gamma: float = 3.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.train_with(flsd_loss, prefix="flsd_", gamma=flsd_gamma)


class DualFocalMixin(LossMixin):
    """Trains with :func:`~lightning_clamp.losses.dual_focal_loss`."""

    def __init__(self, *args: Any, dual_focal_gamma: float = 5.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.train_with(dual_focal_loss, prefix="dual_focal_", gamma=dual_focal_gamma)


class BrierMixin(LossMixin):
    """Trains with :func:`~lightning_clamp.losses.brier_loss`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.train_with(brier_loss)


class MDCAMixin(LossMixin):
    """Trains with :func:`~lightning_clamp.losses.mdca_loss`."""

    def __init__(self, *args: Any, mdca_beta: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.train_with(mdca_loss, prefix="mdca_", beta=mdca_beta)


class DCAMixin(LossMixin):
    """Trains with :func:`~lightning_clamp.losses.dca_loss`."""

    def __init__(self, *args: Any, dca_beta: float = 10.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.train_with(dca_loss, prefix="dca_", beta=dca_beta)


class MMCEMixin(LossMixin):
    """Trains with :func:`~lightning_clamp.losses.mmce_loss`."""

    def __init__(self, *args: Any, mmce_lambda: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.train_with(mmce_loss, prefix="mmce_", lambda_=mmce_lambda)


class CPCMixin(LossMixin):
    """Trains with :func:`~lightning_clamp.losses.cpc_loss`."""

    def __init__(self, *args: Any, cpc_lambda_bdc: float = 0.1, cpc_lambda_bec: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.train_with(cpc_loss, prefix="cpc_", lambda_bdc=cpc_lambda_bdc, lambda_bec=cpc_lambda_bec)


class SCBCEMixin(LossMixin):
    """Trains with :func:`~lightning_clamp.losses.sc_bce_loss`, whose options begin with ``sc_bce_`` here.

    For one logit per position; ``loss_task`` says nothing.
    """

    _calibrated_loss_is_binary = True

    def __init__(
        self,
        *args: Any,
        sc_bce_alpha: float = 0.1,
        sc_bce_kind: Kind = "HI",
        sc_bce_beta: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.train_with(
            sc_bce_loss, *NO_PIXELS, prefix="sc_bce_", alpha=sc_bce_alpha, kind=sc_bce_kind, beta=sc_bce_beta
        )

    def calibrated_loss_of(
        self, inputs: Inputs, target: Tensor, index: Tensor | None, log_terms: dict[str, Tensor]
    ) -> Tensor:
        """The loss alone; fills ``log_terms``."""
        return self.calibrated_loss_function(
            self.calibrated_logits(inputs), target, ignore_index=self.loss_ignore_index, log_terms=log_terms
        )


class MarginAwareMixin(LossMixin):
    """Trains with :func:`~lightning_clamp.losses.margin_aware_loss`, whose options begin with ``margin_`` here.

    Tell it your normalisation, ``margin_mean`` and ``margin_std``, so that the radius is one of images.
    """

    def __init__(
        self,
        *args: Any,
        margin_lambda_r: float = 0.5,
        margin_lambda_s: float = 0.01,
        margin_epsilon: float = 8 / 255,
        margin_step_size: float = 2 / 255,
        margin_steps: int = 3,
        margin_norm: Norm = "linf",
        margin_mean: float | Sequence[float] = 0.0,
        margin_std: float | Sequence[float] = 1.0,
        margin_clip: tuple[float, float] | None = (0.0, 1.0),
        margin_attack_mode: Mode = "eval",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        channels = max(1 if isinstance(value, int | float) else len(value) for value in (margin_mean, margin_std))
        self.train_with(
            margin_aware_loss,
            lambda x: x.sum(1, keepdim=True).expand(-1, 2),
            torch.zeros(0, channels, device="cpu"),
            torch.zeros(0, dtype=torch.long, device="cpu"),
            prefix="margin_",
            lambda_r=margin_lambda_r,
            lambda_s=margin_lambda_s,
            epsilon=margin_epsilon,
            step_size=margin_step_size,
            steps=margin_steps,
            norm=margin_norm,
            mean=margin_mean,
            std=margin_std,
            clip=margin_clip,
            attack_mode=margin_attack_mode,
        )

    def calibrated_loss_of(
        self, inputs: Inputs, target: Tensor, index: Tensor | None, log_terms: dict[str, Tensor]
    ) -> Tensor:
        """The loss alone; fills ``log_terms``."""
        return self.calibrated_loss_function(
            Logits(self, self.see_outputs),
            inputs,
            target,
            task=self.loss_task,
            ignore_index=self.loss_ignore_index,
            log_terms=log_terms,
        )
