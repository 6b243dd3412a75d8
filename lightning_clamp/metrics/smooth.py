"""The smooth calibration error: kernel smoothing in place of bins."""

import math
from typing import Any

import torch
from torch import Tensor

from lightning_clamp._rows import Task
from lightning_clamp.metrics._binning import value_sums
from lightning_clamp.metrics._confidence import Confidence, ConfidenceMetric, confidences
from lightning_clamp.metrics._labels import LabelAverage, over_labels
from lightning_clamp.metrics._reading import Reader

# Intervals of the mesh on [0, 1]: sixteen to the finest bandwidth.
_MESH = 2**14
# Bandwidths are whole multiples of this, found in ten halvings, as in the authors' implementation.
_RESOLUTION = 2**-10


def smooth_calibration_error(
    preds: Tensor,
    target: Tensor,
    *,
    bandwidth: float | None = None,
    confidence: Confidence = "top",
    probs: bool = False,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    average: LabelAverage = "macro",
) -> Tensor:
    r"""Smooth calibration error (smECE): residuals smoothed over the confidence, instead of binned.

    :math:`\int_0^1 |\frac1N \sum_i K_\sigma(t, c_i)(y_i - c_i)|\,dt` with correctness y, confidence c and a Gaussian
    kernel K that is reflected at 0 and 1. The bandwidth is not a parameter: it is where σ and the error are equal,
    found to 1/1024 (rounded up, at least 2/1024), as the authors' ``relplot`` does.

    Args:
        preds: Logits, or probabilities if ``probs``: ``(N, C)``, dense ``(N, C, ...)``, or one value per position for
            ``task="binary"``; float.
        target: True class indices, ``(N,)`` or dense ``(N, ...)``, int64, in ``[0, C)``.
        bandwidth: A fixed σ in [1/1024, 1] instead.
        confidence: See :func:`~.reliability.reliability_curve`.
        probs: Whether preds are probabilities; it is never guessed.
        task: ``"multiclass"``, ``"binary"`` or ``"multilabel"``; see :class:`~._base.RowMetric`.
        ignore_index: Target value of positions to leave out.
        average: For ``task="multilabel"``; see :class:`~._base.RowMetric`.

    Returns:
        Scalar float64 in ``[0, 1]``; nan without rows.

    Raises:
        ValueError: If ``bandwidth`` is not in [1/1024, 1], preds hold nan or, with ``probs``, no probabilities, labels
            are out of range, or shapes do not fit together.
        TypeError: If preds are not float, or the target holds no class indices.

    Reference:
        Błasiok and Nakkiran, "Smooth ECE: Principled Reliability Diagrams via Kernel Smoothing", ICLR 2024.
    """
    bandwidth = _checked(bandwidth)
    reader = Reader("smooth_calibration_error", probs=probs, task=task, ignore_index=ignore_index)

    def error(preds: Tensor, target: Tensor, reader: Reader) -> Tensor:
        return _smooth_error(value_sums(*confidences(preds, target, confidence, reader)), bandwidth)

    return over_labels(error, preds, target, reader, average)


class SmoothCalibrationError(ConfidenceMetric):
    """Streaming :func:`smooth_calibration_error`, from a histogram finer than any bandwidth.

    ``n_bins`` only lays out the state: metrics that agree in it share one in a ``MetricCollection``.
    """

    def __init__(self, n_bins: int = 15, *, bandwidth: float | None = None, **kwargs: Any) -> None:
        super().__init__(n_bins, **kwargs)
        self.bandwidth = _checked(bandwidth)

    def value(self, sums: Tensor) -> Tensor:
        """The error."""
        return _smooth_error(sums, self.bandwidth)


def _checked(bandwidth: float | None) -> float | None:
    if bandwidth is not None and not _RESOLUTION <= bandwidth <= 1:
        raise ValueError(f"`bandwidth` must lie in [1/1024, 1], got {bandwidth}.")
    return bandwidth


def _smooth_error(sums: Tensor, bandwidth: float | None) -> Tensor:
    """Smooth calibration error of groups ``(3, K)`` of samples, each at its mean confidence."""
    sums = sums[:, sums[0] > 0]
    if not sums.shape[1]:
        return sums.new_tensor(torch.nan)
    spectrum = _spectrum(sums)
    if bandwidth is None:
        low, high = 0.0, 1.0
        while high - low > _RESOLUTION:
            middle = (low + high) / 2
            if middle > _RESOLUTION and _error_at(spectrum, middle) <= middle:
                high = middle
            else:
                low = middle
        bandwidth = high
    return _error_at(spectrum, bandwidth)


def _spectrum(sums: Tensor) -> Tensor:
    """Cosine transform of the residuals, each shared by the two mesh points beside its confidence.

    Reflection at 0 and 1 is the even, periodic continuation of the mesh, in which smoothing is a product.
    """
    count, confidence, correct = sums.unbind()
    position = (confidence / count).clamp(0, 1) * _MESH
    left = position.long().clamp_(0, _MESH - 1)
    residual = (correct - confidence) / count.sum()
    on_mesh = residual.new_zeros(_MESH + 1)
    on_mesh = on_mesh.index_add(0, left, residual * (left + 1 - position))
    on_mesh = on_mesh.index_add(0, left + 1, residual * (position - left))
    # The end points are their own mirror images, and count twice.
    on_mesh[[0, -1]] *= 2
    spectrum: Tensor = torch.fft.rfft(torch.cat([on_mesh, on_mesh[1:-1].flip(0)])).real
    return spectrum


def _error_at(spectrum: Tensor, bandwidth: float) -> Tensor:
    """The integral of the absolute smoothed residuals, by the trapezoidal rule."""
    frequency = torch.arange(len(spectrum), dtype=torch.float64, device=spectrum.device)
    damped = spectrum * torch.exp(-0.5 * (math.pi * bandwidth * frequency).square())
    smoothed: Tensor = torch.fft.irfft(damped, n=2 * _MESH)[: _MESH + 1].abs()
    return smoothed.sum() - smoothed[[0, -1]].sum() / 2
