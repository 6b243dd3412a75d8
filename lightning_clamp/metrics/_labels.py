"""Several labels per item, each yes or no: the value of each, their mean, or that of all entries as one."""

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_clamp._checks import check_choice, check_whole
from lightning_clamp._rows import Task, checked_target
from lightning_clamp.metrics._reading import Reader

LabelAverage: TypeAlias = Literal["macro", "micro", "none"]
AVERAGES: tuple[LabelAverage, ...] = ("macro", "micro", "none")


def over_labels(
    function: Callable[[Tensor, Tensor, Reader], Tensor],
    preds: Tensor,
    target: Tensor,
    reader: Reader,
    average: LabelAverage = "macro",
) -> Tensor:
    """A function of a batch; of several labels per item, that of each as for one logit, averaged.

    Raises:
        ValueError: If ``average`` is unknown; and what the function raises.
        TypeError: What the function raises.
    """
    check_choice("average", average, AVERAGES)
    if reader.task != "multilabel" or average == "micro":
        return function(preds, target, reader)
    target = checked_target(preds, target, "multilabel")
    one = reader.of_one_label()
    values = [function(preds[:, k], target[:, k], one) for k in range(preds.shape[1])]
    scored = one.scored or []
    reader.warn_unless(any(scored))
    return averaged(values, torch.tensor(scored, device=values[0].device), average)


def averaged(values: Sequence[Tensor], scored: Tensor, average: LabelAverage) -> Tensor:
    """The values of all labels, ``(K,)``, or their mean over those that ``scored`` says to have entries."""
    of_labels = torch.stack(list(values))
    return of_labels if average == "none" else of_labels[scored].mean()


def checked_average(average: LabelAverage | None, averages: tuple[LabelAverage, ...], task: Task) -> LabelAverage:
    """How a metric averages over labels: by default the first of those that it can.

    Raises:
        ValueError: If it cannot, or there are no several labels.
    """
    if average is None:
        return averages[0]
    check_choice("average", average, averages)
    if task != "multilabel":
        raise ValueError(
            f'`average` is for the labels of task="multilabel", got average={average!r} and task={task!r}.'
        )
    return average


def checked_labels(num_labels: int | None, average: LabelAverage, task: Task, name: str) -> int | None:
    """How many labels get sums of their own, None if none does.

    Raises:
        ValueError: If the number is needed and not known, or known and of no use.
    """
    if task != "multilabel":
        if num_labels is not None:
            raise ValueError(f'`num_labels` is for task="multilabel", got num_labels={num_labels} and task={task!r}.')
        return None
    if average == "micro":
        return None
    if num_labels is None:
        raise ValueError(
            f'{name} keeps sums for every label of task="multilabel": pass num_labels, or average="micro" for one '
            "value of all entries."
        )
    check_whole("num_labels", num_labels, least=1)
    return num_labels
