"""The negative log-likelihood that the best temperature leaves, and that temperature, from sums of a constant size."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities import rank_zero_warn

from lightning_clamp._rows import Task
from lightning_clamp.metrics._base import RowMetric
from lightning_clamp.metrics._labels import LabelAverage, over_labels
from lightning_clamp.metrics._reading import PredictedRows, Reader

# The ladder: temperatures from 1/16 to 16, six to a doubling. With a thousand classes the loss may bend within a tenth
# of log T, and fewer would miss its minimum by more than 0.00001.
_DOUBLINGS = 4
_PER_DOUBLING = 6
_N_RUNGS = 2 * _DOUBLINGS * _PER_DOUBLING + 1
# Rungs that a polynomial goes through, and points on it from one rung to the next.
_WINDOW = 12
_FINE = 256
# A class this far below the largest, in units of its temperature, weighs nothing; exp is slow where it underflows.
_NEGLIGIBLE = -40.0
# Numbers at work at once: what stays in a processor's cache; an accelerator wants few, large kernels.
_AT_ONCE, _AT_ONCE_DEVICE = 2**18, 2**26


def refined_negative_log_likelihood(
    preds: Tensor,
    target: Tensor,
    *,
    probs: bool = False,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    average: LabelAverage = "macro",
) -> Tensor:
    r"""The mean negative log-likelihood (NLL) that is left after the best temperature.

    :math:`\min_T \frac1N \sum_i -\log \mathrm{softmax}(z_i / T)_{y_i}`: what a network is worth once it is calibrated,
    however sure it was. The plain NLL also punishes over-confidence, which a temperature takes away afterwards: weights
    that will be calibrated may be better chosen by this.

    The loss is computed at 49 temperatures from 1/16 to 16, and its minimum is that of a polynomial between them:
    within 0.00001 nats of the exact one. If the best temperature lies beyond these, the value at the last one is given,
    with a warning.

    Args:
        preds: Logits, or probabilities if ``probs``: ``(N, C)``, dense ``(N, C, ...)``, or one value per position for
            ``task="binary"``; float.
        target: True class indices, ``(N,)`` or dense ``(N, ...)``, int64, in ``[0, C)``.
        probs: Whether preds are probabilities; it is never guessed.
        task: ``"multiclass"``, ``"binary"`` or ``"multilabel"``; see :class:`~._base.RowMetric`.
        ignore_index: Target value of positions to leave out.
        average: For ``task="multilabel"``; see :class:`~._base.RowMetric`.

    Returns:
        Scalar float64, in nats; nan without rows.

    Raises:
        ValueError: If preds hold nan or, with ``probs``, no probabilities, labels are out of range, or shapes do not
            fit together.
        TypeError: If preds are not float, or the target holds no class indices.

    Reference:
        Berta, Holzmüller, Jordan and Bach, "Rethinking Early Stopping: Refine, Then Calibrate", 2025
        (arXiv 2501.19195).
    """
    reader = Reader("refined_negative_log_likelihood", probs=probs, task=task, ignore_index=ignore_index)
    return over_labels(partial(_of_batch, 0), preds, target, reader, average)


def best_temperature(
    preds: Tensor,
    target: Tensor,
    *,
    probs: bool = False,
    task: Task = "multiclass",
    ignore_index: int | None = None,
    average: LabelAverage = "macro",
) -> Tensor:
    """The temperature at which the mean negative log-likelihood is least.

    Above 1 the network is too sure, below 1 not sure enough. Arguments, errors and range as
    :func:`refined_negative_log_likelihood`, which is the loss at this temperature.

    Returns:
        Scalar float64 in ``[1/16, 16]``, to 0.1 %; nan without rows.
    """
    reader = Reader("best_temperature", probs=probs, task=task, ignore_index=ignore_index)
    return over_labels(partial(_of_batch, 1), preds, target, reader, average)


class _LadderMetric(RowMetric):
    """What the loss at a ladder of temperatures says; state: its sums there, and two more, ``(51,)``.

    In a ``MetricCollection`` the two metrics share one state and one update.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sums("ladder", 2 + _N_RUNGS)

    def add(self, rows: PredictedRows) -> None:
        """Add the loss of rows at every temperature."""
        values = _ladder_values(rows)
        self.sums.add_(values.sum(0) if self.num_labels is None else rows.by_label(values, self.num_labels))


class RefinedNegativeLogLikelihood(_LadderMetric):
    """Streaming :func:`refined_negative_log_likelihood`; state: 51 sums."""

    higher_is_better = False

    def value(self, sums: Tensor) -> Tensor:
        """The least loss."""
        return _minimum(sums, self.reader.name)[0]


class BestTemperature(_LadderMetric):
    """Streaming :func:`best_temperature`, from the state of :class:`RefinedNegativeLogLikelihood`."""

    higher_is_better = None

    def value(self, sums: Tensor) -> Tensor:
        """The best temperature."""
        return _minimum(sums, self.reader.name)[1]


def _of_batch(which: int, preds: Tensor, target: Tensor, reader: Reader) -> Tensor:
    """The least loss (0) of a batch, or where it is (1)."""
    sums = torch.stack([_ladder_values(rows).sum(0) for rows in reader.blocks(preds, target)]).sum(0)
    reader.warn_unless(bool(sums[0]))
    return _minimum(sums, reader.name)[which]


def _inverse_temperatures(rungs: Tensor) -> Tensor:
    """1/T at rungs of the ladder, which need not be whole numbers; it rises with the rung."""
    return torch.exp2(rungs / _PER_DOUBLING - _DOUBLINGS)


def _ladder_values(rows: PredictedRows) -> Tensor:
    r"""1, the distance of the target's logit from the largest, and the loss at every rung without it; ``(m, 51)``.

    With :math:`m = \max_k z_k` the loss of a row at :math:`\beta = 1/T` is
    :math:`\log \sum_k e^{\beta (z_k - m)} + \beta (m - z_y)`; the second part is known at every β from one sum.
    """
    logits = rows.preds.log() if rows.reader.probs else rows.preds
    below = logits - logits.amax(1, keepdim=True)
    beta = _inverse_temperatures(torch.arange(_N_RUNGS, dtype=below.dtype, device=below.device))[:, None]
    at_once = _AT_ONCE if below.device.type == "cpu" else _AT_ONCE_DEVICE
    parts = torch.split(below, max(1, at_once // (_N_RUNGS * below.shape[1])))
    log_sums = torch.cat([(part[:, None] * beta).clamp_(_NEGLIGIBLE).exp_().sum(2).log_() for part in parts])
    rows.check(log_sums[:, 0])
    distance = -below.gather(1, rows.target[:, None])
    return torch.cat([torch.ones_like(distance), distance, log_sums], 1).double()


def _minimum(sums: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The least mean loss, and its temperature; on a polynomial through the rungs around the lowest."""
    (count, distance), log_sums = sums[:2], sums[2:]
    rungs = torch.arange(_N_RUNGS, dtype=torch.float64, device=sums.device)
    lowest = int((log_sums + _inverse_temperatures(rungs) * distance).argmin())
    first = min(max(lowest - _WINDOW // 2, 0), _N_RUNGS - _WINDOW)
    window = slice(first, first + _WINDOW)
    # The loss is convex in 1/T, so that its minimum lies beside the lowest rung.
    fine = torch.arange(-_FINE, _FINE + 1, dtype=torch.float64, device=sums.device) / _FINE + lowest
    fine = fine[(fine >= 0) & (fine <= _N_RUNGS - 1)]
    loss = _polynomial(rungs[window], log_sums[window], fine) + _inverse_temperatures(fine) * distance
    at = int(loss.argmin())
    temperature = 1 / _inverse_temperatures(fine[at])
    # The polynomial may dip below 0 where nothing is left.
    nll = (loss[at] / count).clamp(min=0)
    if float(fine[at]) in (0.0, _N_RUNGS - 1.0) and bool(nll.isfinite()):
        _warn_of_the_end(name, float(temperature))
    return nll, torch.where(nll.isnan(), nll, temperature)


def _polynomial(at: Tensor, values: Tensor, points: Tensor) -> Tensor:
    """The polynomial through ``values`` at ``at``, at other points: Lagrange's formula."""
    others = ~torch.eye(len(at), dtype=torch.bool, device=at.device)
    towards = torch.where(others, points[:, None, None] - at, 1.0).prod(2)
    between = torch.where(others, at[:, None] - at, 1.0).prod(1)
    return (towards / between) @ values


def _warn_of_the_end(name: str, temperature: float) -> None:
    why = "every sample is right" if temperature < 1 else "the outputs say nothing of the labels"
    rank_zero_warn(
        f"{name}: the loss still falls at the temperature {temperature:g}, the last that is looked at, and the value "
        f"there is given; so it is where {why}.",
        UserWarning,
    )
