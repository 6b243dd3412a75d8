"""A first look at the calibration set: one forward pass that counts, checks, and keeps the logits."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_clamp._batch import Inputs, tensors_of
from lightning_clamp._checks import counted
from lightning_clamp._rows import MASKED, Rows, class_axis_is_unclear, is_dense, unclear_axis
from lightning_clamp.clamping.outlier import heaviest_in, heaviest_of, warn_of_one_sample
from lightning_clamp.clamping.passes import CalibrationSet, Logits, summed
from lightning_clamp.clamping.ranks import Ranks
from lightning_clamp.clamping.repeats import marks_of, warn_of_repeats

MIN_SAMPLES = 10


class DatasetSummary(NamedTuple):
    """What one forward pass over the calibration set tells.

    Attributes:
        logits: The network's logits of inputs that nothing was added to, the mean over views.
        bare_logits: The same without views.
        shape: Shape of a perturbation; None if inputs differ in shape, or there are several and none is named.
        dense: Whether a sample holds several positions (pixels) or labels, which are correlated.
        n_samples: Items; the unit in which coefficients are counted against data.
        n_rows: Scored positions and labels; equal to ``n_samples`` for class outputs without ``ignore_index``.
        n_classes: C; 2 for one logit, and for each of several labels.
        n_labels: Labels that each item has; 0 where it has a class.
        row_elements: Most logits that one item has.
        n_inputs: Tensors that a batch's input consists of.
        dtype: Its floating dtype, or that of the logits for integers.
        float_inputs: Whether it is of floats, so that something can be added.
    """

    logits: Logits
    bare_logits: Logits
    shape: tuple[int, ...] | None
    dense: bool
    n_samples: int
    n_rows: int
    n_classes: int
    n_labels: int
    row_elements: int
    n_inputs: int
    dtype: torch.dtype
    float_inputs: bool

    @property
    def parameter_dtype(self) -> torch.dtype:
        """Dtype of what is fitted: that of the inputs, at least float32."""
        return torch.promote_types(self.dtype, torch.float32)


class _Kind(NamedTuple):
    """What a batch shows that cannot be added up; see :class:`DatasetSummary`."""

    shape: tuple[int, ...] | None
    n_inputs: int
    n_classes: int
    n_labels: int
    dense: bool
    row_elements: int
    dtype: torch.dtype
    float_inputs: bool
    unclear_axis: str | None


def summarize(data: CalibrationSet, *, trial: bool = False) -> DatasetSummary:
    """Pass over ``data`` once without gradients.

    Args:
        data: Network and batches.
        trial: Whether the network is not trained yet and these are not all of its batches: what may be right in the
            end, such as the number of samples, is not checked.

    Raises:
        ValueError: If the set is empty or smaller than 10 samples, a logit is not finite, a label is out of range, the
            outputs are probabilities, or no batch tells which of their axes has the classes.
    """
    logits_seen = Logits(data, None)
    bare_seen = Logits(data, None, bare=True) if data.spec.views else logits_seen
    kinds: set[_Kind] = set()
    marks: list[bytes] = []
    heaviest: list[Tensor] = []

    def batch_sums() -> Iterator[tuple[Tensor, ...]]:
        seen = 0
        for inputs, target in data.read("first look"):
            with torch.no_grad():
                logits, bare, value = data.observed(inputs)
            rows = data.rows(logits, target)
            outside = _checked(logits, rows, seen, data.ranks, trial=trial)
            logits_seen.keep(logits, target)
            if data.spec.views:
                bare_seen.keep(bare, target)
            losses = F.cross_entropy(rows.logits.float(), rows.target, reduction="none").double()
            heaviest.append(heaviest_of(losses, rows, seen))
            if data.ranks.size > 1:
                marks.extend(marks_of(inputs))
            seen += len(logits)
            kinds.add(_kind(inputs, value, logits, target, rows, data))
            counts = torch.tensor([len(logits), len(rows.target)], dtype=torch.float64)
            # What is no probability anyhow need not be counted.
            outputs = torch.ones(3, device=logits.device) if outside else _not_probabilities(logits)
            yield losses.sum(), counts, outputs

    loss, counts, outputs = summed(batch_sums(), [(), (2,), (3,)], data.ranks)
    all_kinds, all_marks, all_heaviest = zip(*data.ranks.gather((kinds, marks, heaviest_in(heaviest))), strict=True)
    kinds = set().union(*all_kinds)
    kind = _of_all(kinds)
    n_samples, n_rows = (int(count) for count in counts)
    if not trial:
        warn_of_repeats(all_marks, data.ranks)
        check_size(n_samples, n_rows)
        warn_of_one_sample(all_heaviest, float(loss), data.ranks)
    _refuse_probabilities(data, *(int(count) for count in outputs), trial=trial)
    return DatasetSummary(
        logits=logits_seen,
        bare_logits=bare_seen,
        shape=kind.shape if len({kind.shape for kind in kinds}) == 1 else None,
        dense=kind.dense,
        n_samples=n_samples,
        n_rows=n_rows,
        n_classes=kind.n_classes,
        n_labels=kind.n_labels,
        row_elements=kind.row_elements,
        n_inputs=kind.n_inputs,
        dtype=kind.dtype,
        float_inputs=kind.float_inputs,
    )


def _kind(
    inputs: Inputs, value: Tensor | None, logits: Tensor, target: Tensor, rows: Rows, data: CalibrationSet
) -> _Kind:
    """What a batch shows; ``value`` is what a perturbation would be added to."""
    of_floats = value is not None and value.is_floating_point()
    if data.site.name is not None and not (of_floats and value is not None and len(value) == len(logits)):
        raise ValueError(
            f"`perturb_at` names {data.site.name!r}, and what enters there is "
            f"{'nothing' if value is None else f'{value.dtype} of shape {tuple(value.shape)}'}: it must be floats of "
            f"shape ({len(logits)}, ...), one item of the batch after the other, such as embeddings."
        )
    return _Kind(
        shape=None if value is None else data.site.shape_of(value),
        n_inputs=len(tensors_of(inputs)),
        n_classes=rows.logits.shape[1],
        n_labels=0 if rows.label is None else logits.shape[1],
        dense=is_dense(logits, data.spec.task),
        row_elements=logits[:1].numel(),
        dtype=value.dtype if value is not None and of_floats else logits.dtype,
        float_inputs=of_floats,
        unclear_axis=unclear_axis(logits, target) if class_axis_is_unclear(logits, target, data.spec.task) else None,
    )


def _of_all(kinds: set[_Kind]) -> _Kind:
    """The one kind that all decisions go by, the same on every rank: that of the largest outputs."""
    if not kinds:
        raise ValueError("The calibration set is empty: pass a loader that yields at least one batch.")
    classes = sorted({(kind.n_labels or kind.n_classes) for kind in kinds})
    if len(classes) > 1:
        things = "labels" if max(kind.n_labels for kind in kinds) else "classes"
        raise ValueError(
            f"The network returned logits of {classes[0]} {things} for one batch and {classes[1]} for another."
        )
    if all(kind.unclear_axis for kind in kinds):
        raise ValueError(next(kind.unclear_axis for kind in kinds))
    return max(kinds, key=lambda kind: (kind.row_elements, repr(kind)))


def _checked(logits: Tensor, rows: Rows, offset: int, ranks: Ranks, *, trial: bool) -> bool:
    """Refuse what cannot be used; whether any output of the network lies outside [0, 1].

    An accelerator is waited for once, unless there is something to say.
    """
    if not len(rows.target):
        return False
    last = rows.logits.shape[1] - 1
    of_label = rows.logits.gather(1, rows.target.clamp(0, last)[:, None])
    numbers = [*rows.target.aminmax(), of_label.amin(), *logits.aminmax()]
    first_label, last_label, lowest, low, high = torch.stack([number.double() for number in numbers]).tolist()
    # Neither minimum nor maximum is NaN where nothing is.
    if not (0 <= first_label <= last_label <= last and lowest > MASKED and math.isfinite(low) and math.isfinite(high)):
        _check_labels(rows)
        if not trial:
            _check_values(rows, offset, ranks)
    return not (low >= 0 and high <= 1)


def _check_values(rows: Rows, offset: int, ranks: Ranks) -> None:
    where = "the calibration set" if ranks.size == 1 else f"the part of the calibration set that rank {ranks.rank} has"
    # A class may be masked by -inf.
    usable = (torch.isfinite(rows.logits) | (rows.logits == -torch.inf)).all(1)
    if not bool(usable.all()):
        first = int(rows.item[~usable][0]) + offset
        raise ValueError(
            f"The network returned NaN or infinite logits for sample {first} of {where}: "
            "find that sample, or the weights that overflow, before calibrating."
        )
    of_label = rows.logits.gather(1, rows.target[:, None])[:, 0]
    if bool((of_label <= MASKED).any()):
        first = int((of_label <= MASKED).nonzero()[0])
        raise ValueError(
            f"Sample {int(rows.item[first]) + offset} of {where} has the label {int(rows.target[first])}, and the "
            f"network returned {float(of_label[first]):.4g} for it, which counts as masked ({MASKED:.0f} and below): "
            "leave the sample out or unmask its class, or divide the outputs by a constant if nothing is masked."
        )


def _check_labels(rows: Rows) -> None:
    n_classes = rows.logits.shape[1]
    wrong = rows.target[(rows.target < 0) | (rows.target >= n_classes)]
    if n_classes == 2 and len(wrong) and bool((rows.target.abs() == 1).all()):
        # To leave out -1 would be to leave out every no.
        raise ValueError(
            "The calibration set has the labels -1 and 1: let them be 0 and 1, (target + 1) // 2, or if -1 stands for "
            "what is not known, pass ignore_index=-1."
        )
    if len(wrong) and rows.label is not None:
        raise ValueError(
            f"The calibration set has the target {int(wrong[0])}, and each of several labels is 0 or 1: if it stands "
            f"for what is not known, pass ignore_index={int(wrong[0])}."
        )
    if len(wrong):
        raise ValueError(
            f"The calibration set has the label {int(wrong[0])}, but the network has {n_classes} classes, 0 to "
            f"{n_classes - 1}: {_way_out(int(wrong[0]), rows.target, n_classes)}"
        )


def _way_out(label: int, target: Tensor, n_classes: int) -> str:
    """What to do about a label out of range; leaving the last of five classes out would calibrate on wrong ones."""
    if label == n_classes and bool((target == 0).any()):
        return (
            "the network needs one logit per class; where it has one per threshold (an ordinal head such as CORAL's), "
            'let the target be its levels, 0 or 1 in the shape of the logits, and say task="binary".'
        )
    return f"start the labels at 0, or name a padding label with ignore_index={label}."


def check_size(n_samples: int, n_rows: int) -> None:
    """Refuse a set that no temperature can be fitted to."""
    if n_rows == 0:
        raise ValueError("Every label of the calibration set is `ignore_index`: nothing is left to calibrate on.")
    if n_samples < MIN_SAMPLES:
        raise ValueError(
            f"The calibration set has {counted(n_samples, 'sample')}; a temperature needs at least {MIN_SAMPLES}, "
            "and hundreds to be worth having."
        )


def _not_probabilities(logits: Tensor) -> Tensor:
    """How many outputs lie outside [0, 1] and how many within, and how many rows of classes do not sum to 1, (3,)."""
    # NaN is outside, too.
    outside, within = (~((logits >= 0) & (logits <= 1))).sum(), ((logits > 0) & (logits < 1)).sum()
    tolerance = 1e-3 if logits.dtype in (torch.float32, torch.float64) else 2e-2
    sums = logits.float().sum(1) if logits.ndim > 1 else logits.float()
    return torch.stack([outside, within, (~((sums - 1).abs() <= tolerance)).sum()])


def _refuse_probabilities(data: CalibrationSet, outside: int, within: int, unnormalised: int, *, trial: bool) -> None:
    if outside:
        return
    if not unnormalised and not data.spec.sigmoid:
        raise ValueError(
            "The network returns probabilities (every row lies in [0, 1] and sums to 1): return the logits, that is "
            "leave the final softmax out, or return their logarithm."
        )
    # Before training they may be as small by chance, and zeros are no sigmoid's.
    if within and not trial:
        data.ranks.warn(
            "Every output of the network lies in [0, 1]: if these are probabilities, return the logits instead "
            "(leave the final sigmoid out).",
            stacklevel=2,
        )
