"""Losses that promise calibrated training: functions, and mixins that train a LightningModule with them.

Functions take ``(logits, target, *, ...)``: class outputs ``(N, C)``, dense ones ``(N, C, ...)``, or one-logit heads
with ``task="binary"``. They leave out ``ignore_index`` and return the mean over the positions that count.
"""

from lightning_clamp.losses.aslp import ASLPMixin, Indexed
from lightning_clamp.losses.batch_statistics import dca_loss, mdca_loss, mmce_loss
from lightning_clamp.losses.focal import brier_loss, dual_focal_loss, flsd_loss, focal_loss
from lightning_clamp.losses.label_perturbation import LabelPerturbationRule, sc_bce_loss
from lightning_clamp.losses.margin_aware import margin_aware_loss
from lightning_clamp.losses.mixin import LossMixin
from lightning_clamp.losses.mixins import (
    ACLSMixin,
    BrierMixin,
    DCAMixin,
    DualFocalMixin,
    EntropyPenaltyMixin,
    FLSDMixin,
    FocalMixin,
    LabelSmoothingMixin,
    MarginAwareMixin,
    MbLSMixin,
    MDCAMixin,
    MMCEMixin,
    SCBCEMixin,
)
from lightning_clamp.losses.regularizers import acls_loss, entropy_penalty_loss, label_smoothing_loss, mbls_loss
from lightning_clamp.sharpness.gauss_newton import gauss_newton_sharpness
from lightning_clamp.sharpness.monitor import SharpnessMonitor

__all__ = [
    "ACLSMixin",
    "ASLPMixin",
    "BrierMixin",
    "DCAMixin",
    "DualFocalMixin",
    "EntropyPenaltyMixin",
    "FLSDMixin",
    "FocalMixin",
    "Indexed",
    "LabelPerturbationRule",
    "LabelSmoothingMixin",
    "LossMixin",
    "MDCAMixin",
    "MMCEMixin",
    "MarginAwareMixin",
    "MbLSMixin",
    "SCBCEMixin",
    "SharpnessMonitor",
    "acls_loss",
    "brier_loss",
    "dca_loss",
    "dual_focal_loss",
    "entropy_penalty_loss",
    "flsd_loss",
    "focal_loss",
    "gauss_newton_sharpness",
    "label_smoothing_loss",
    "margin_aware_loss",
    "mbls_loss",
    "mdca_loss",
    "mmce_loss",
    "sc_bce_loss",
]
