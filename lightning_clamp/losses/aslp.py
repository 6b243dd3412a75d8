"""Adaptive label perturbation: how often each training image's labels are perturbed is learned, and kept."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_clamp._batch import Inputs
from lightning_clamp._checks import check_whole
from lightning_clamp.losses._learning import LearningBySample
from lightning_clamp.losses.label_perturbation import Kind, LabelPerturbationRule, Rule, beta_of_kind, sc_bce_loss
from lightning_clamp.losses.mixin import options_named, with_prefix
from lightning_clamp.losses.mixins import NO_PIXELS
from lightning_clamp.losses.samples import SampleValues


class ASLPMixin(LearningBySample):
    r"""Trains with :func:`~lightning_clamp.losses.sc_bce_loss`, and learns each image's α (ASLP).

    For dense binary prediction with one logit per pixel. Every α starts at 0, which is the binary cross-entropy. After
    ``aslp_warmup_epochs`` epochs each training step moves the α of its images by
    :class:`~lightning_clamp.losses.LabelPerturbationRule`, in view of the accuracy that the module's own
    ``validation_step`` logs. Batches are ``(inputs, target, index)``: wrap the training set in
    :class:`~lightning_clamp.losses.Indexed`. α is in every checkpoint (not in the ``state_dict``) and, under DDP, the
    same on all ranks after every epoch.

    Args:
        *args: The module's own.
        aslp_kind: ``"HI"``, ``"SI"``, ``"M"`` or ``"DM"``.
        aslp_beta: Amount in (0, 2] instead of the kind's, in the paper's convention.
        aslp_rule: ``"MC"``, model calibration, or ``"MEI"``, maximum entropy inference.
        aslp_eta: Step size.
        aslp_lambda: Weight of the constraint.
        aslp_warmup_epochs: Epochs before the first update; 5 of 30 in the official code.
        aslp_accuracy: Name under which the module logs the accuracy on validation data, a fraction.
        **kwargs: The module's own.

    Reference:
        Liu et al., "Model Calibration in Dense Classification with Adaptive Label Perturbation", ICCV 2023.
    """

    _calibrated_loss_is_binary = True

    def __init__(
        self,
        *args: Any,
        aslp_kind: Kind = "HI",
        aslp_beta: float | None = None,
        aslp_rule: Rule = "MC",
        aslp_eta: float = 0.002,
        aslp_lambda: float = 2000.0,
        aslp_warmup_epochs: int = 5,
        aslp_accuracy: str = "val_accuracy",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        # The rule's β is the loss's; α comes with each batch.
        with options_named(with_prefix("aslp_", "kind", "beta", "eta", "lambda_", "rule", "warmup_epochs")):
            check_whole("warmup_epochs", aslp_warmup_epochs, least=0)
            beta = beta_of_kind(aslp_kind, aslp_beta)
            self.aslp_learning = LabelPerturbationRule(beta, aslp_eta, aslp_lambda, aslp_rule)
        self.train_with(sc_bce_loss, *NO_PIXELS, prefix="aslp_", kind=aslp_kind, beta=beta)
        self.aslp_warmup_epochs = aslp_warmup_epochs
        self.aslp_accuracy = aslp_accuracy
        self.aslp_alphas = SampleValues()
        # nan before there is one.
        self._aslp_measured = math.nan
        self._aslp_best = 0.0

    def calibrated_loss_of(
        self, inputs: Inputs, target: Tensor, index: Tensor | None, log_terms: dict[str, Tensor]
    ) -> Tensor:
        """The loss alone; fills ``log_terms``, and moves the α of these images."""
        logits, ignore_index = self.calibrated_logits(inputs), self.loss_ignore_index
        index = self.checked_index(index, logits.device)
        alpha = self.aslp_alphas.of(index)
        loss = self.calibrated_loss_function(
            logits, target, alpha=alpha, ignore_index=ignore_index, log_terms=log_terms
        )
        log_terms["alpha"] = alpha.mean()
        if self.training and self.current_epoch >= self.aslp_warmup_epochs and not math.isnan(self._aslp_measured):
            moved = self.aslp_learning.updated(
                alpha,
                logits,
                target,
                accuracy=self._aslp_measured,
                best_accuracy=self._aslp_best,
                ignore_index=ignore_index,
            )
            self.aslp_alphas.put(index, moved)
        return loss

    def on_fit_start(self) -> None:
        """Refuse a run that never validates."""
        super().on_fit_start()
        if not self.trainer.enable_validation:
            raise MisconfigurationException(
                f"{type(self).__name__} learns α from the accuracy on validation data: give the Trainer a validation "
                f"loader, and log {self.aslp_accuracy!r} in validation_step."
            )

    def on_validation_epoch_end(self) -> None:
        """Take the accuracy that was logged, in a fit."""
        # Before on_validation_end, where ModelCheckpoint may save.
        super().on_validation_epoch_end()
        if self.trainer.state.fn != TrainerFn.FITTING:
            return
        metrics = self.trainer.callback_metrics
        if self.aslp_accuracy not in metrics:
            if self.trainer.sanity_checking and len(self.trainer.num_sanity_val_batches) > 1:
                return  # Lightning does not gather the metrics of several loaders then.
            raise MisconfigurationException(
                f"{type(self).__name__} learns α from {self.aslp_accuracy!r}, which validation_step did not log; there "
                f"is {sorted(metrics) or 'nothing'}. Name the accuracy in aslp_accuracy=..."
            )
        # Modules may log without sync_dist, and every rank must go the same way.
        accuracy = float(self.over_ranks(metrics[self.aslp_accuracy].to(self.device), "mean"))
        if not 0 <= accuracy <= 1:
            raise MisconfigurationException(f"{self.aslp_accuracy!r} must be an accuracy in [0, 1], got {accuracy:g}.")
        if not self.trainer.sanity_checking:
            self._aslp_measured, self._aslp_best = accuracy, max(accuracy, self._aslp_best)

    def kept_by_sample(self) -> SampleValues:
        """α of every image."""
        return self.aslp_alphas

    def calibrated_loss_state(self) -> dict[str, Tensor]:
        """Every α, and the accuracies."""
        accuracies = torch.tensor([self._aslp_measured, self._aslp_best], dtype=torch.float64, device="cpu")
        return {"aslp_alphas": self.aslp_alphas.values, "aslp_accuracies": accuracies}

    def restore_calibrated_loss(self, state: Mapping[str, Tensor]) -> None:
        """Go on with these."""
        self.aslp_alphas.restore(state["aslp_alphas"])
        self._aslp_measured, self._aslp_best = state["aslp_accuracies"].tolist()
