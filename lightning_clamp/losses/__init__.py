"""Losses that promise calibrated training: functions, modules, and mixins that train a LightningModule with them.

Functions take ``(logits, target, *, ...)``: class outputs ``(N, C)``, dense ones ``(N, C, ...)``, one-logit heads with
``task="binary"``, or several labels per item with ``task="multilabel"``. They leave out ``ignore_index`` and return the
mean over the positions that count. A module is made with the same options, ``ACLSLoss(margin=6.0)``, and called with
logits and target.

Functions and modules need no Lightning; the mixins load on first use.
"""

from typing import TYPE_CHECKING, Any

from lightning_clamp._lazy import load
from lightning_clamp.losses.adafocal import adafocal_loss
from lightning_clamp.losses.batch_statistics import dca_loss, mdca_loss, mmce_loss
from lightning_clamp.losses.cals import cals_loss
from lightning_clamp.losses.cpc import cpc_loss
from lightning_clamp.losses.crl import crl_loss
from lightning_clamp.losses.focal import brier_loss, dual_focal_loss, flsd_loss, focal_loss
from lightning_clamp.losses.label_perturbation import LabelPerturbationRule, sc_bce_loss
from lightning_clamp.losses.margin_aware import margin_aware_loss
from lightning_clamp.losses.modules import (
    ACLSLoss,
    BrierLoss,
    CPCLoss,
    DCALoss,
    DualFocalLoss,
    EntropyPenaltyLoss,
    FLSDLoss,
    FocalLoss,
    LabelSmoothingLoss,
    MarginAwareLoss,
    MbLSLoss,
    MDCALoss,
    MMCELoss,
    SCBCELoss,
)
from lightning_clamp.losses.regularizers import acls_loss, entropy_penalty_loss, label_smoothing_loss, mbls_loss
from lightning_clamp.losses.samples import Indexed

if TYPE_CHECKING:
    from lightning_clamp.losses.aslp import ASLPMixin
    from lightning_clamp.losses.learned import AdaFocalMixin, CALSMixin, CRLMixin
    from lightning_clamp.losses.mixin import LossMixin
    from lightning_clamp.losses.mixins import (
        ACLSMixin,
        BrierMixin,
        CPCMixin,
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

__all__ = [
    "ACLSLoss",
    "ACLSMixin",
    "ASLPMixin",
    "AdaFocalMixin",
    "BrierLoss",
    "BrierMixin",
    "CALSMixin",
    "CPCLoss",
    "CPCMixin",
    "CRLMixin",
    "DCALoss",
    "DCAMixin",
    "DualFocalLoss",
    "DualFocalMixin",
    "EntropyPenaltyLoss",
    "EntropyPenaltyMixin",
    "FLSDLoss",
    "FLSDMixin",
    "FocalLoss",
    "FocalMixin",
    "Indexed",
    "LabelPerturbationRule",
    "LabelSmoothingLoss",
    "LabelSmoothingMixin",
    "LossMixin",
    "MDCALoss",
    "MDCAMixin",
    "MMCELoss",
    "MMCEMixin",
    "MarginAwareLoss",
    "MarginAwareMixin",
    "MbLSLoss",
    "MbLSMixin",
    "SCBCELoss",
    "SCBCEMixin",
    "acls_loss",
    "adafocal_loss",
    "brier_loss",
    "cals_loss",
    "cpc_loss",
    "crl_loss",
    "dca_loss",
    "dual_focal_loss",
    "entropy_penalty_loss",
    "flsd_loss",
    "focal_loss",
    "label_smoothing_loss",
    "margin_aware_loss",
    "mbls_loss",
    "mdca_loss",
    "mmce_loss",
    "sc_bce_loss",
]

_HOME = dict.fromkeys((name for name in __all__ if name.endswith("Mixin")), "mixins")
_HOME |= {"ASLPMixin": "aslp", "LossMixin": "mixin"}
_HOME |= dict.fromkeys(("AdaFocalMixin", "CALSMixin", "CRLMixin"), "learned")


def __getattr__(name: str) -> Any:
    """Import a public name from its module (PEP 562)."""
    return load(__name__, name, _HOME)


def __dir__() -> list[str]:
    """List the public names before they are loaded."""
    return [*__all__]
