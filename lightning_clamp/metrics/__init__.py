"""Calibration metrics: torchmetrics objects with additive state of constant size, and the functions beside them.

A metric and the function beside it read ``(preds, target)`` alike: logits unless told ``probs=True``, in the layouts of
class, dense and (``task="binary"``) one-logit outputs, without the positions of ``ignore_index``. Errors are fractions
in [0, 1], the negative log-likelihood and the entropy are in nats.
"""

from lightning_clamp.metrics.abstention import (
    AccuracyAtCoverage,
    AreaUnderRiskCoverage,
    CoverageAtAccuracy,
    accuracy_at_coverage,
    area_under_risk_coverage,
    coverage_at_accuracy,
)
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
from lightning_clamp.metrics.diagram import ReliabilityDiagram, RiskCoverageDiagram
from lightning_clamp.metrics.evidence import CalibrationEvidence
from lightning_clamp.metrics.group_picture import plot_groups
from lightning_clamp.metrics.groups import ByGroup, GroupValues, by_group
from lightning_clamp.metrics.margin import ExponentialMarginTail, class_margin, exponential_margin_tail
from lightning_clamp.metrics.picture import plot_reliability
from lightning_clamp.metrics.refined import (
    BestTemperature,
    RefinedNegativeLogLikelihood,
    best_temperature,
    refined_negative_log_likelihood,
)
from lightning_clamp.metrics.reliability import ReliabilityCurve, reliability_curve
from lightning_clamp.metrics.risk_coverage import RiskCoverageCurve, risk_coverage_curve
from lightning_clamp.metrics.risk_picture import plot_risk_coverage
from lightning_clamp.metrics.score_test import CalibrationTest, calibration_test
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
    "AccuracyAtCoverage",
    "AdaptiveCalibrationError",
    "AreaUnderRiskCoverage",
    "BestTemperature",
    "BlockSums",
    "BootstrapSums",
    "BrierScore",
    "ByGroup",
    "CalibrationEvidence",
    "CalibrationTest",
    "ClasswiseCalibrationError",
    "CoverageAtAccuracy",
    "ExpectedCalibrationError",
    "ExponentialMarginTail",
    "GroupValues",
    "Interval",
    "MaximumCalibrationError",
    "NegativeLogLikelihood",
    "OverconfidenceError",
    "PredictiveEntropy",
    "RefinedNegativeLogLikelihood",
    "ReliabilityCurve",
    "ReliabilityDiagram",
    "RiskCoverageCurve",
    "RiskCoverageDiagram",
    "RootMeanSquareCalibrationError",
    "SmoothCalibrationError",
    "accuracy",
    "accuracy_at_coverage",
    "adaptive_calibration_error",
    "area_under_risk_coverage",
    "best_temperature",
    "brier_score",
    "by_group",
    "calibration_test",
    "class_margin",
    "classwise_calibration_error",
    "coverage_at_accuracy",
    "expected_calibration_error",
    "exponential_margin_tail",
    "maximum_calibration_error",
    "negative_log_likelihood",
    "overconfidence_error",
    "paired_bootstrap",
    "plot_groups",
    "plot_reliability",
    "plot_risk_coverage",
    "predictive_entropy",
    "refined_negative_log_likelihood",
    "reliability_curve",
    "risk_coverage_curve",
    "root_mean_square_calibration_error",
    "smooth_calibration_error",
]
