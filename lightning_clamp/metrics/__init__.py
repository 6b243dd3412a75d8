"""Calibration metrics: torchmetrics objects with additive state of constant size, and the functions beside them.

``update(preds, target)`` takes logits unless the metric was told ``probs=True``. Errors are fractions in [0, 1], the
negative log-likelihood is in nats.
"""

from lightning_clamp.metrics.calibration_error import (
    ExpectedCalibrationError,
    ReliabilityCurve,
    ReliabilityDiagram,
    expected_calibration_error,
    reliability_curve,
)
from lightning_clamp.metrics.picture import plot_reliability
from lightning_clamp.metrics.proper_scores import (
    Accuracy,
    NegativeLogLikelihood,
    accuracy,
    negative_log_likelihood,
)

__all__ = [
    "Accuracy",
    "ExpectedCalibrationError",
    "NegativeLogLikelihood",
    "ReliabilityCurve",
    "ReliabilityDiagram",
    "accuracy",
    "expected_calibration_error",
    "negative_log_likelihood",
    "plot_reliability",
    "reliability_curve",
]
