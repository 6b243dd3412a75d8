"""Adaptive label perturbation: how often each training image's labels are perturbed is learned, and kept."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import Dataset

from lightning_clamp.losses.label_perturbation import Kind, LabelPerturbationRule, Rule, beta_of_kind, sc_bce_loss
from lightning_clamp.losses.mixin import LossMixin, options_named
from lightning_clamp.losses.mixins import NO_PIXELS

_STATE = "adaptive_label_perturbation"


class Indexed(Dataset[tuple[Any, ...]]):
    """A map-style dataset whose items end with their index: ``(inputs, target)`` become ``(inputs, target, index)``."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        """As many as there are."""
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """The item and its index."""
        item = self.dataset[index]
        if not isinstance(item, tuple | list):
            raise TypeError(f"Indexed needs items (inputs, target), got {type(item).__name__}.")
        return (*item, index)


class ImageAlphas:
    """α of every image by its index, 0 until it is set; there are as many as the largest index seen asks for.

    Attributes:
        values: Shape ``(n,)``, float32.
        touched: Which were set since the last :meth:`merge`, bool, ``(n,)``.
    """

    def __init__(self) -> None:
        self.restore(torch.zeros(0))

    def restore(self, values: Tensor) -> None:
        """Start from saved α."""
        self.values = values.clone()
        self.touched = torch.zeros(len(values), dtype=torch.bool)
        self.pending = False

    def of(self, index: Tensor) -> Tensor:
        """α of the images at ``index``, ``(N,)``."""
        if index.is_floating_point() or index.ndim != 1 or not len(index):
            raise ValueError(f"Indices must be integers of shape (N,), got {index.dtype} of {tuple(index.shape)}.")
        low, high = (int(end) for end in index.aminmax())
        if low < 0:
            raise ValueError(f"Indices must be integers from 0 on, got {low}.")
        self._grow(high + 1, index.device)
        return self.values[index]

    def put(self, index: Tensor, values: Tensor) -> None:
        """Set the α of images that :meth:`of` was asked for."""
        self.values[index] = values.to(self.values.dtype)
        self.touched[index] = True
        self.pending = True

    def merge(self, reduce: Callable[[Tensor, str], Tensor]) -> None:
        """Give all ranks the α that any of them has set; the mean, where several have.

        Args:
            reduce: Reduces a tensor over the ranks, by ``"sum"`` or ``"max"``.
        """
        device = self.values.device
        self._grow(int(reduce(torch.tensor(len(self.values), device=device), "max")), device)
        count = reduce(self.touched.to(self.values.dtype), "sum")
        total = reduce(torch.where(self.touched, self.values, 0), "sum")
        self.values = torch.where(count > 0, total / count.clamp_min(1), self.values)
        self.touched = torch.zeros_like(self.touched)
        self.pending = False

    def _grow(self, size: int, device: torch.device) -> None:
        more = max(0, size - len(self.values))
        if not more and self.values.device == device:
            return
        self.values = torch.cat([self.values.to(device), torch.zeros(more, device=device)])
        self.touched = torch.cat([self.touched.to(device), torch.zeros(more, dtype=torch.bool, device=device)])


class ASLPMixin(LossMixin):
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
        with options_named("aslp_"):
            beta = beta_of_kind(aslp_kind, aslp_beta)
            self.aslp_learning = LabelPerturbationRule(beta, aslp_eta, aslp_lambda, aslp_rule)
        self.train_with(sc_bce_loss, *NO_PIXELS, prefix="aslp_", kind=aslp_kind, beta=beta)
        self.aslp_warmup_epochs = aslp_warmup_epochs
        self.aslp_accuracy = aslp_accuracy
        self.aslp_alphas = ImageAlphas()
        self._aslp_measured: float | None = None
        self._aslp_best = 0.0

    def calibrated_loss_of(
        self, inputs: Tensor, target: Tensor, index: Tensor | None, log_terms: dict[str, Tensor]
    ) -> Tensor:
        """The loss alone; fills ``log_terms``, and moves the α of these images."""
        if index is None:
            raise TypeError(
                f"{type(self).__name__} keeps an α for each image and needs batches (inputs, target, index): wrap the "
                "training set in lightning_clamp.losses.Indexed."
            )
        logits, ignore_index = self(inputs), self.loss_ignore_index
        index = index.to(logits.device)
        alpha = self.aslp_alphas.of(index)
        loss = self.calibrated_loss_function(
            logits, target, alpha=alpha, ignore_index=ignore_index, log_terms=log_terms
        )
        log_terms["alpha"] = alpha.mean()
        if self.training and self.current_epoch >= self.aslp_warmup_epochs and self._aslp_measured is not None:
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
        accuracy = float(self._over_ranks(metrics[self.aslp_accuracy].to(self.device), "mean"))
        if not 0 <= accuracy <= 1:
            raise MisconfigurationException(f"{self.aslp_accuracy!r} must be an accuracy in [0, 1], got {accuracy:g}.")
        if not self.trainer.sanity_checking:
            self._aslp_measured, self._aslp_best = accuracy, max(accuracy, self._aslp_best)

    def on_train_epoch_end(self) -> None:
        """Bring the ranks together."""
        super().on_train_epoch_end()
        self.aslp_alphas.merge(self._over_ranks)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save every α, and the accuracies."""
        super().on_save_checkpoint(checkpoint)
        # In mid-epoch; after an epoch there is nothing to do, and one rank may save alone.
        if self.aslp_alphas.pending:
            self.aslp_alphas.merge(self._over_ranks)
        checkpoint[_STATE] = {
            "alpha": self.aslp_alphas.values.cpu(),
            "accuracy": self._aslp_measured,
            "best_accuracy": self._aslp_best,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on where the checkpoint was; one of another loss says nothing of α."""
        super().on_load_checkpoint(checkpoint)
        if state := checkpoint.get(_STATE):
            self.aslp_alphas.restore(state["alpha"])
            self._aslp_measured, self._aslp_best = state["accuracy"], state["best_accuracy"]

    def _over_ranks(self, values: Tensor, how: str) -> Tensor:
        """``values`` reduced over the ranks; the strategy may do so in place."""
        reduced: Tensor = self.trainer.strategy.reduce(values.clone(), reduce_op=how)
        return reduced
