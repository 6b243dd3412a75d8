"""Labels shifted, none at hand: the clamp for other class frequencies, estimated from unlabelled samples."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_clamp._rows import is_dense
from lightning_clamp._trainer.data import transferred
from lightning_clamp.clamping.copies import independent_copy
from lightning_clamp.clamping.label_shift import ClassFrequencies, class_frequencies, condition_number, present
from lightning_clamp.metrics import CalibrationEvidence, CalibrationTest
from lightning_clamp.metrics.evidence import p_in_words
from lightning_clamp.module import CalibrationModule

# Of the mean outer product: beyond, a thousand unlabelled samples say less than one label.
_MOST_CONDITION = 1000.0
_LEAST_P = 0.01


@dataclass(frozen=True, repr=False)
class ShiftedPriors:
    """What :func:`shifted_priors` found; printed, it is a table of the class frequencies.

    Attributes:
        module: A calibrated module of its own, with the clamp's bias moved by log(new / old frequency).
        before: Class frequencies where it was calibrated, ``(C,)`` float64.
        after: Those estimated from the unlabelled samples, with their intervals and the p-value of "no shift".
        n_samples: Number of unlabelled samples.
        condition: :func:`~.clamping.label_shift.condition_number` of them, among the classes that are present.
    """

    module: CalibrationModule
    before: Tensor
    after: ClassFrequencies
    n_samples: int
    condition: float

    def __repr__(self) -> str:
        """A line per class, and how sure it is that there is a shift at all."""
        lines = [f"{'class':<8}{'before':>9}{'after':>9}    95 % interval"]
        for k, (old, new, low, high) in enumerate(zip(self.before, *self.after[:3], strict=True)):
            lines.append(f"{k:<8}{float(old):>9.2%}{float(new):>9.2%}    [{float(low):.2%}, {float(high):.2%}]")
        p = float(self.after.p_no_shift)
        sure = "the frequencies have changed" if p < _LEAST_P else "they may as well be the old ones"
        lines.append(f"{self.n_samples:,} unlabelled samples: {sure} ({p_in_words(p)})")
        return "\n".join(lines)


def shifted_priors(
    module: CalibrationModule,
    unlabelled: Iterable[Any],
    *,
    labelled: Iterable[Any] | None = None,
    priors: Sequence[float] | Tensor | None = None,
) -> ShiftedPriors:
    r"""Adapt a calibrated model to class frequencies that have changed, from samples without labels.

    It takes for granted that images of a class look as before, and only the classes' frequencies differ (label shift).
    The bias of the clamp is moved by :math:`\log(q_k / \pi_k)`, new over old frequency. Where nothing has shifted this
    costs a little: look at ``after.p_no_shift`` first.

    Args:
        module: The calibrated module. It is left as it is.
        unlabelled: Batches of the new data, as for ``trainer.predict``; labels are not read. Their probabilities are
            kept in memory, 8 bytes per sample and class.
        labelled: Held-out batches with labels of the old distribution, which served no fit. They give the old
            frequencies (the mean probabilities), and a test of whether the module is calibrated on them.
        priors: Or the old frequencies, ``(C,)``, which add up to 1; of classes 0 and 1 for ``task="binary"``.

    Returns:
        The new module and the frequencies. A class that no unlabelled sample seems to be of is taken for half a sample.

    Raises:
        ValueError: If samples have several labels; the clamp has a uniform share; neither or both of ``labelled`` and
            ``priors`` are given; there are no samples; outputs are dense; the module is not calibrated on ``labelled``
            (p < 0.01); its outputs do not tell the classes apart; or priors are no frequencies.
        TypeError: If a batch has no such entries, or the module is no CalibrationModule.

    Reference:
        Saerens, Latinne and Decaestecker, Neural Computation 2002; Alexandari, Kundaje and Shrikumar, "Maximum
        Likelihood with Bias-Corrected Calibration is Hard-To-Beat at Label Shift Adaptation", ICML 2020.
    """
    if not isinstance(module, CalibrationModule):
        raise TypeError(f"`shifted_priors` takes a CalibrationModule, got {type(module).__name__}.")
    if module.spec.task == "multilabel":
        raise ValueError(
            '`shifted_priors` adapts to other frequencies of classes that exclude each other, and task="multilabel" '
            "has several labels per sample: label a few hundred new samples and calibrate on them."
        )
    if module.clamp.uniform_share is not None:
        raise ValueError(
            "The clamp mixes the probabilities with a uniform share, to which other class frequencies cannot be added: "
            "calibrate with uniform_share=False."
        )
    if (labelled is None) == (priors is None):
        raise ValueError(
            "Give `labelled`, held-out batches of the old distribution, or `priors`, its class frequencies."
        )
    probs = torch.cat(list(_probabilities(module, unlabelled)) or [torch.zeros(0, 2)])
    if not len(probs):
        raise ValueError("There are no unlabelled samples: pass a loader with at least one batch.")
    old = _priors_of(module, labelled) if labelled is not None else torch.as_tensor(priors, dtype=torch.float64)
    _check_priors(old, probs.shape[1])
    after = class_frequencies(probs, old)
    condition = condition_number(probs[:, present(after.values, len(probs))])
    if condition > _MOST_CONDITION:
        raise ValueError(
            f"The outputs do not tell all classes apart (condition number {condition:.3g}, at most "
            f"{_MOST_CONDITION:g}): their frequencies cannot be estimated without labels. Label a few hundred samples "
            "and calibrate on them."
        )
    shifted = independent_copy(module)
    ratio = (after.values.clamp(min=0.5 / len(probs)) / old).log()
    _move_bias(shifted, ratio)
    return ShiftedPriors(shifted, old, after, len(probs), condition)


def _probabilities(module: CalibrationModule, batches: Iterable[Any]) -> Iterator[Tensor]:
    """Calibrated probabilities of each batch, ``(N, C)`` float64 on the CPU; two columns for one logit."""
    for batch in batches:
        with torch.no_grad():
            yield _as_columns(module, module(module.spec.inputs(transferred(module, batch))))


def _as_columns(module: CalibrationModule, logits: Tensor) -> Tensor:
    if is_dense(logits, module.spec.task):
        raise ValueError(
            f"`shifted_priors` takes one output per sample, got logits of shape {tuple(logits.shape)}: the pixels of "
            "an image are no independent samples of the classes."
        )
    logits = logits.double().cpu()
    if module.spec.binary:
        logits = torch.stack([torch.zeros_like(logits), logits], -1).reshape(-1, 2)
    return logits.softmax(1)


def _priors_of(module: CalibrationModule, labelled: Iterable[Any]) -> Tensor:
    """Mean probabilities on labelled batches.

    Raises:
        ValueError: If they are not calibrated there.
    """
    test: CalibrationTest | None = None
    total, count = torch.zeros(0), 0
    for batch in labelled:
        inputs, target = module.spec.pair(transferred(module, batch))
        with torch.no_grad():
            logits = module(inputs).cpu()
        probs = _as_columns(module, logits)
        if test is None:
            test, total = CalibrationTest(probs.shape[1], **module.spec.of_metrics), torch.zeros_like(probs[0])
        test.update(logits, target.cpu())
        total, count = total + probs.sum(0), count + len(probs)
    if test is None:
        raise ValueError("There are no labelled samples: pass a loader with at least one batch.")
    evidence: CalibrationEvidence = test.compute()
    if evidence.p < _LEAST_P:
        found = evidence.describe(temperature=float(module.clamp.temperature), subject="the clamp is", level=_LEAST_P)
        raise ValueError(f"The frequencies of the classes need calibrated probabilities. {found}")
    return total / count


def _check_priors(priors: Tensor, n_classes: int) -> None:
    if priors.shape != (n_classes,) or not bool((priors > 0).all()) or abs(float(priors.sum()) - 1) > 1e-3:
        given = [round(frequency, 4) for frequency in priors.flatten().tolist()]
        raise ValueError(f"`priors` must be {n_classes} positive frequencies that add up to 1, got {given}.")


def _move_bias(module: CalibrationModule, log_ratio: Tensor) -> None:
    """Add to the bias, in place; only differences between classes count."""
    step = log_ratio[1:] - log_ratio[0] if module.spec.binary else log_ratio - log_ratio.mean()
    clamp = module.clamp
    bias = clamp.class_bias
    like = clamp.log_temperature
    clamp.class_bias = step.to(like) if bias is None else bias + step.to(bias)
    # It is no longer what the result says.
    module.result = None
