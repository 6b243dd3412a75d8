"""Mixins whose losses learn while they train: from each sample's history, or from validation data."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_clamp._batch import Inputs
from lightning_clamp._checks import OptionError, check_number, check_whole
from lightning_clamp.losses._learning import LearningBySample, LearningFromValidation
from lightning_clamp.losses.adafocal import adafocal_loss, confidence_cells, equal_mass_bins, updated_gamma
from lightning_clamp.losses.cals import Multipliers, cals_loss, distance_sums, updated_multipliers
from lightning_clamp.losses.crl import Confidence, correct_items, crl_loss, normalised_correctness
from lightning_clamp.losses.mixin import options_named, with_prefix
from lightning_clamp.losses.samples import SampleValues


class CRLMixin(LearningBySample):
    """Trains with :func:`~lightning_clamp.losses.crl_loss`, and keeps how often each sample was right.

    Batches are ``(inputs, target, index)``: wrap the training set in :class:`~lightning_clamp.losses.Indexed`. The
    history is in every checkpoint (not in the ``state_dict``) and, under DDP, the same on all ranks after every epoch;
    pairs are formed in the batch of one device.

    Args:
        *args: The module's own.
        crl_lambda: Weight of the ranking, at least 0.
        crl_confidence: ``"softmax"``, ``"entropy"`` or ``"margin"``.
        **kwargs: The module's own.

    Raises:
        ValueError: If an option is out of range, or ``loss_task`` is ``"multilabel"``: items with several predictions
            are not ranked.

    Reference:
        Moon et al., "Confidence-Aware Learning for Deep Neural Networks", ICML 2020.
    """

    def __init__(
        self, *args: Any, crl_lambda: float = 1.0, crl_confidence: Confidence = "softmax", **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.loss_task == "multilabel":
            raise OptionError(
                "CRLMixin ranks items of one prediction each, and loss_task='multilabel' has several per item: train "
                "with another loss, such as MDCAMixin."
            )
        self.train_with(crl_loss, prefix="crl_", lambda_=crl_lambda, confidence=crl_confidence)
        self.crl_counts = SampleValues()
        self._crl_epochs = 0

    def calibrated_loss_of(
        self, inputs: Inputs, target: Tensor, index: Tensor | None, log_terms: dict[str, Tensor]
    ) -> Tensor:
        """The loss alone; fills ``log_terms``, and counts which of these samples are right."""
        logits = self.calibrated_logits(inputs)
        settings: dict[str, Any] = {"task": self.loss_task, "ignore_index": self.loss_ignore_index}
        if not self.training:
            return self.calibrated_loss_function(logits, target, **settings, log_terms=log_terms)
        index = self.checked_index(index, logits.device)
        counts = self.crl_counts.of(index)
        # In the first epoch there are samples that were never seen, and so never right.
        low = self.crl_counts.values.min() if self._crl_epochs else 0
        correctness = normalised_correctness(counts, low, self._crl_epochs)
        loss = self.calibrated_loss_function(logits, target, correctness=correctness, **settings, log_terms=log_terms)
        self.crl_counts.put(index, counts + correct_items(logits, target, **settings))
        return loss

    def on_train_epoch_end(self) -> None:
        """Bring the ranks together, and count the epoch."""
        super().on_train_epoch_end()
        self._crl_epochs += 1

    def kept_by_sample(self) -> SampleValues:
        """How often each sample was right."""
        return self.crl_counts

    def calibrated_loss_state(self) -> dict[str, Tensor]:
        """All that was learned."""
        return {"crl_counts": self.crl_counts.values, "crl_epochs": torch.tensor(self._crl_epochs, device="cpu")}

    def restore_calibrated_loss(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a history."""
        self.crl_counts.restore(state["crl_counts"])
        self._crl_epochs = int(state["crl_epochs"])


class AdaFocalMixin(LearningFromValidation):
    """Trains with :func:`~lightning_clamp.losses.adafocal_loss`, whose exponents follow the validation data.

    After every validation of the fit, bins of equal counts are formed of the (first) validation set's confidences, and
    the exponent of each grows where the network is too sure. All start at ``adafocal_gamma``. Exponents and bins are in
    every checkpoint (not in the ``state_dict``) and, under DDP, the same on all ranks.

    Args:
        *args: The module's own.
        adafocal_gamma: The exponent to start with, above 0.
        adafocal_lambda: Speed at which exponents follow, at least 0.
        adafocal_n_bins: Number of bins.
        **kwargs: The module's own.

    Reference:
        Ghosh, Schaaf and Gormley, "AdaFocal: Calibration-aware Adaptive Focal Loss", NeurIPS 2022.
    """

    def __init__(
        self,
        *args: Any,
        adafocal_gamma: float = 1.0,
        adafocal_lambda: float = 1.0,
        adafocal_n_bins: int = 15,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        with options_named(with_prefix("adafocal_", "gamma", "lambda_", "n_bins")):
            check_number("gamma", adafocal_gamma, above=0)
            check_number("lambda_", adafocal_lambda, least=0)
            check_whole("n_bins", adafocal_n_bins, least=1)
        self.train_with(adafocal_loss, prefix="adafocal_")
        self.adafocal_lambda = adafocal_lambda
        # On the CPU also where modules are made on another device, or on none.
        self.adafocal_gammas = torch.full((adafocal_n_bins,), float(adafocal_gamma), device="cpu")
        self.adafocal_edges = torch.arange(1, adafocal_n_bins, device="cpu") / adafocal_n_bins

    def learned_options(self) -> Mapping[str, Any]:
        """An exponent for each bin."""
        return {"gamma": self.adafocal_gammas, "edges": self.adafocal_edges}

    def measured(self, logits: Tensor, target: Tensor) -> Tensor:
        """Sums by confidence."""
        bins, ignore_index = len(self.adafocal_gammas), self.loss_ignore_index
        return confidence_cells(logits, target, bins, task=self.loss_task, ignore_index=ignore_index)

    def learn(self, sums: Tensor) -> None:
        """New bins, and an exponent for each."""
        excess, edges = equal_mass_bins(sums, len(self.adafocal_gammas))
        gammas = self.adafocal_gammas.to(excess.device)
        self.adafocal_gammas = updated_gamma(gammas, excess.to(gammas.dtype), lambda_=self.adafocal_lambda)
        self.adafocal_edges = edges.to(gammas.dtype)

    def calibrated_loss_state(self) -> dict[str, Tensor]:
        """All that was learned."""
        return {"adafocal_gammas": self.adafocal_gammas, "adafocal_edges": self.adafocal_edges}

    def restore_calibrated_loss(self, state: Mapping[str, Tensor]) -> None:
        """Go on with these exponents and bins."""
        self.adafocal_gammas, self.adafocal_edges = (
            state[name].clone() for name in ("adafocal_gammas", "adafocal_edges")
        )


class CALSMixin(LearningFromValidation):
    """Trains with :func:`~lightning_clamp.losses.cals_loss`, whose multipliers are learned for every class.

    After every validation of the fit, the multipliers are set from the (first) validation set's logits. They are in
    every checkpoint (not in the ``state_dict``) and, under DDP, the same on all ranks.

    Args:
        *args: The module's own.
        cals_margin: Distance to the largest logit that costs nothing, above 0.
        cals_rho_every: Validations between two looks at whether the penalty has to grow.
        **kwargs: The module's own.

    Reference:
        Liu et al., "Class Adaptive Network Calibration", CVPR 2023.
    """

    def __init__(self, *args: Any, cals_margin: float = 10.0, cals_rho_every: int = 10, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        with options_named(with_prefix("cals_", "rho_every")):
            check_whole("rho_every", cals_rho_every, least=1)
        self.train_with(cals_loss, prefix="cals_", margin=cals_margin)
        self.cals_margin = cals_margin
        self.cals_rho_every = cals_rho_every
        self.cals_learned = Multipliers.start()

    def learned_options(self) -> Mapping[str, Any]:
        """The multipliers of the classes."""
        return {"multiplier": self.cals_learned.multiplier, "rho": self.cals_learned.rho}

    def measured(self, logits: Tensor, target: Tensor) -> Tensor:
        """Sums by class."""
        settings: dict[str, Any] = {"task": self.loss_task, "ignore_index": self.loss_ignore_index}
        return distance_sums(logits, target, self.cals_learned, self.cals_margin, **settings)

    def learn(self, sums: Tensor) -> None:
        """New multipliers."""
        self.cals_learned = updated_multipliers(self.cals_learned, sums, rho_every=self.cals_rho_every)

    def calibrated_loss_state(self) -> dict[str, Tensor]:
        """All that was learned."""
        return {f"cals_{name}": value for name, value in self.cals_learned._asdict().items()}

    def restore_calibrated_loss(self, state: Mapping[str, Tensor]) -> None:
        """Go on with these multipliers."""
        self.cals_learned = Multipliers(*(state[f"cals_{name}"].clone() for name in Multipliers._fields))
