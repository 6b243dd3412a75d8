"""Calibration metrics: torchmetrics objects with additive state of constant size, and the functions beside them.

``update(preds, target)`` takes logits unless the metric was told ``probs=True``. Errors are fractions in [0, 1], the
negative log-likelihood and the entropy are in nats.
"""

from lightning_clamp.metrics.bootstrap import BlockSums, BootstrapSums, Interval, paired_bootstrap
from lightning_clamp.metrics.calibration_error import (
    AdaptiveCalibrationError,
    ExpectedCalibrationError,
    MaximumCalibrationError,
    OverconfidenceError,
    RootMeanSquareCalibrationError,
    adaptive_calibration_error,
    expected_calibration_error,
    maximum_calibration_error,
    overconfidence_error,
    root_mean_square_calibration_error,
)
from lightning_clamp.metrics.classwise import ClasswiseCalibrationError, classwise_calibration_error
from lightning_clamp.metrics.margin import ExponentialMarginTail, exponential_margin_tail, margin
from lightning_clamp.metrics.picture import plot_reliability
from lightning_clamp.metrics.reliability import ReliabilityCurve, ReliabilityDiagram, reliability_curve
from lightning_clamp.metrics.scoring_rules import (
    Accuracy,
    BrierScore,
    NegativeLogLikelihood,
    PredictiveEntropy,
    accuracy,
    brier_score,
    negative_log_likelihood,
    predictive_entropy,
)
from lightning_clamp.metrics.smooth import SmoothCalibrationError, smooth_calibration_error

__all__ = [
    "Accuracy",
    "AdaptiveCalibrationError",
    "BlockSums",
    "BootstrapSums",
    "BrierScore",
    "ClasswiseCalibrationError",
    "ExpectedCalibrationError",
    "ExponentialMarginTail",
    "Interval",
    "MaximumCalibrationError",
    "NegativeLogLikelihood",
    "OverconfidenceError",
    "PredictiveEntropy",
    "ReliabilityCurve",
    "ReliabilityDiagram",
    "RootMeanSquareCalibrationError",
    "SmoothCalibrationError",
    "accuracy",
    "adaptive_calibration_error",
    "brier_score",
    "classwise_calibration_error",
    "expected_calibration_error",
    "exponential_margin_tail",
    "margin",
    "maximum_calibration_error",
    "negative_log_likelihood",
    "overconfidence_error",
    "paired_bootstrap",
    "plot_reliability",
    "predictive_entropy",
    "reliability_curve",
    "root_mean_square_calibration_error",
    "smooth_calibration_error",
]
