"""The settings of a fit: what a network's batches and outputs mean.

Public calls take them as flat keywords; everything below takes the one object.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from lightning_clamp._batch import BatchKeys, Inputs, as_pair, check_batch_keys, input_of, map_tensors
from lightning_clamp._checks import OptionError, check_choice
from lightning_clamp._rows import TASKS, Rows, Task, as_rows, check_labels_axis
from lightning_clamp._views import View, check_views, image_of, mean_over_views


# The same names once more, for type checkers, editors and command lines; the tests hold it against the dataclass. Every
# key says NotRequired: jsonargparse does not know total=False in all versions.
class SpecKeywords(TypedDict):
    """Keywords that :class:`Spec` is made of.

    Attributes:
        task: "multiclass" (softmax), "binary" (one logit, sigmoid) or "multilabel" (one logit per label, sigmoids).
        ignore_index: Target value of positions to leave out.
        batch_keys: Which entries of a batch are input and target, where it is no pair.
        perturb_at: Submodule at whose input the perturbation is added; by default the network's own input.
        views: Views of the images whose outputs are averaged with those of the images as they are, such as ["hflip"].
    """

    task: NotRequired[Task]
    ignore_index: NotRequired[int | None]
    batch_keys: NotRequired[BatchKeys | None]
    perturb_at: NotRequired[str | None]
    views: NotRequired[Sequence[View]]


@dataclass(frozen=True)
class Spec:
    """How batches are read, how the network is called, what its outputs mean, and where a perturbation enters.

    Attributes:
        task: ``"multiclass"`` (softmax over axis 1), ``"binary"`` (one logit per position, sigmoid) or
            ``"multilabel"`` (one logit per label on axis 1, a sigmoid each; several may be right at once).
        ignore_index: Target value of positions to leave out; of single labels under ``"multilabel"``.
        batch_keys: Which entries of a batch are input and target, where it is no pair: keys of a mapping, names of
            attributes, or positions, such as ``("image", "label")`` or ``(0, 2)``. The input may be several names, of
            entries that are passed to the network as keyword arguments; or several positions, such as ``((0, 1), 2)``,
            of entries that are its arguments in this order.
        perturb_at: Name of the submodule at whose input δ is added, such as the one that is fed a language model's
            embeddings; it must be called once in a forward. Sequences ``(N, length, features)`` that enter there get
            one value per feature. None for the network's own input, which must then be one tensor of floats.
        views: Views of the images, which are then one float tensor ``(N, C, H, W)``: ``"hflip"``, the mirror image, or
            ``"vflip"``, upside down. What is calibrated are the means of the network's logits over the images as they
            are and these views; outputs per pixel are turned back first. δ is added to a view, and not turned with it.
            Each view is a forward more.

    Raises:
        ValueError: If a setting has no such value.
    """

    task: Task = "multiclass"
    ignore_index: int | None = None
    batch_keys: BatchKeys | None = None
    perturb_at: str | None = None
    views: Sequence[View] = ()

    def __post_init__(self) -> None:
        check_choice("task", self.task, TASKS)
        if self.ignore_index is not None and (
            isinstance(self.ignore_index, bool) or not isinstance(self.ignore_index, int)
        ):
            raise OptionError(f"`ignore_index` must be a label, a whole number, or None, got {self.ignore_index!r}.")
        check_batch_keys(self.batch_keys)
        if self.perturb_at is not None and not isinstance(self.perturb_at, str):
            raise ValueError(f"`perturb_at` must be the name of a submodule, got {self.perturb_at!r}.")
        check_views(self.views)

    @property
    def binary(self) -> bool:
        """Whether the network has one logit per position."""
        return self.task == "binary"

    @property
    def sigmoid(self) -> bool:
        """Whether each logit is one of yes against no, and no class's among others."""
        return self.task != "multiclass"

    @property
    def of_metrics(self) -> dict[str, Any]:
        """The keywords that metrics take: task and ignore_index; of several labels all entries make one value."""
        average = {"average": "micro"} if self.task == "multilabel" else {}
        return {"task": self.task, "ignore_index": self.ignore_index, **average}

    def of_means(self, num_labels: int) -> dict[str, Any]:
        """The same, but that of several labels each makes a value, and the mean over them is given."""
        means = {"num_labels": num_labels, "average": "macro"} if self.task == "multilabel" else {}
        return {**self.of_metrics, **means}

    def pair(self, batch: Any) -> tuple[Inputs, Tensor]:
        """Input and target of a batch; see :func:`~._batch.as_pair`."""
        return as_pair(batch, self.batch_keys)

    def inputs(self, batch: Any) -> Any:
        """The input of a batch that need not have a target: of a pair or a longer tuple the first, unless named."""
        if isinstance(batch, tuple | list) and (self.batch_keys is None or len(batch) == 1):
            return input_of(batch, (0, 1))
        if self.batch_keys is not None and not isinstance(batch, Tensor):
            return input_of(batch, self.batch_keys)
        return batch

    def named_inputs(self, named: Mapping[str, Any]) -> Any:
        """Of a batch that is passed by its names the inputs; all of it, where ``batch_keys`` names none."""
        by_position = self.batch_keys is None or not isinstance(self.batch_keys[1], str)
        return named if by_position else self.inputs(named)

    @property
    def n_views(self) -> int:
        """How often the network is called for a batch."""
        return 1 + len(self.views)

    def mean_over_views(self, logits: Tensor, inputs: Inputs, again: Callable[[Any], Tensor]) -> Tensor:
        """Logits of a batch, averaged with those that ``again`` makes of its views; as they are without ``views``.

        Raises:
            ValueError: If there are views, and the inputs are not one tensor of images, or outputs per pixel not of
                its size.
        """
        if not self.views:
            return logits

        def of_view(view: Tensor) -> Tensor:
            return again(map_tensors(inputs, lambda _: view))

        return mean_over_views(logits, image_of(inputs), of_view, self.views, one_logit=self.binary)

    def rows(self, logits: Tensor, target: Tensor) -> Rows:
        """Lay a batch out as rows; see :func:`~._rows.as_rows`."""
        return as_rows(logits, target, task=self.task, ignore_index=self.ignore_index)

    def probs(self, logits: Tensor) -> Tensor:
        """Probabilities: a softmax over axis 1, or for a one-logit head and for labels the sigmoid.

        Raises:
            ValueError: If there is one class only, whose softmax is always 1; or no axis of the labels.
        """
        self.check_logits(logits)
        return logits.sigmoid() if self.sigmoid else logits.softmax(1)

    def width(self, logits: Tensor) -> int:
        """Classes or labels that outputs have, 1 for one logit; errors as in :meth:`check_logits`."""
        self.check_logits(logits)
        return 1 if self.binary else logits.shape[1]

    def check_logits(self, logits: Tensor) -> None:
        """Refuse outputs that have no axis of classes or labels, or one class only, where the task needs them."""
        if self.task == "multilabel":
            check_labels_axis(logits)
        if not self.sigmoid and (logits.ndim < 2 or logits.shape[1] == 1):
            no_batch = ", and a single input needs the axis of the batch, x[None]" if logits.ndim == 1 else ""
            raise ValueError(
                f"The network returns logits of shape {tuple(logits.shape)}: for a one-logit (sigmoid) head say "
                f'task="binary"; task="multiclass" needs one logit per class on axis 1{no_batch}.'
            )
