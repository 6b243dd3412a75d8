"""What every loss mixin is: a training step in front of somebody's LightningModule."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_clamp._checks import OptionError, check_choice, check_package
from lightning_clamp._rows import TASKS, Task

_Function = TypeVar("_Function", bound=Callable[..., Any])
# torch.compile makes no graph of Lightning's log: what logs is left to Python, and what that calls is compiled.
_in_python: Callable[[_Function], _Function] = torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call]


@contextmanager
def options_named(prefix: str) -> Iterator[None]:
    """Have refusals name a function's options as a mixin does: ``margin_clip`` for ``clip``."""

    def name_of(option: str) -> str:
        # A function's ``lambda_`` has its underscore because ``lambda`` is a word of Python.
        return f"loss_{option}" if option in ("task", "ignore_index") else prefix + option.rstrip("_")

    try:
        yield
    except OptionError as error:
        raise error.renamed(name_of) from None


class LossMixin(LightningModule):
    """Trains a LightningModule with another loss: ``class Calibrated(SomeMixin, MyModule): ...``.

    The mixin's ``training_step`` takes the place of the module's. It is for batches ``(inputs, target)``, which an
    index may follow, calls ``self(inputs)`` for the logits, and logs ``train/loss`` and the terms of the loss
    (``train/cross_entropy``, ...). Where a step does more, write it below the mixin and call :meth:`calibrated_loss`::

        class Calibrated(ACLSMixin, MyModule):
            def training_step(self, batch, batch_idx):
                loss = self.calibrated_loss(*batch)
                ...

    The mixin adds nothing to the ``state_dict``. Its options are keyword arguments of the class beside the module's
    own, ``Calibrated(width=64, acls_margin=6.0)``, also for LightningCLI, and hyperparameters where the module calls
    ``save_hyperparameters()``.

    A mixin of your own calls :meth:`train_with` in its ``__init__``, or overrides :meth:`calibrated_loss_of`.

    Args:
        *args: The module's own.
        loss_task: ``"multiclass"``, or ``"binary"`` for one logit per position.
        loss_ignore_index: Target value of positions to leave out.
        **kwargs: The module's own.

    Raises:
        TypeError: When a class is written with the mixin behind the module, or with two losses.
        ValueError: If an option is out of range.
    """

    # The names are long because they share the instance with those of somebody's module.
    calibrated_loss_function: Callable[..., Tensor]
    _calibrated_loss_prefix = ""
    _calibrated_loss_was_called = False

    def __init__(
        self, *args: Any, loss_task: Task = "multiclass", loss_ignore_index: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        check_choice("loss_task", loss_task, TASKS)
        self.loss_task = loss_task
        self.loss_ignore_index = loss_ignore_index

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a class in which the mixin would be passed over, or two of them compete."""
        super().__init_subclass__(**kwargs)
        check_package(cls)
        order = cls.__mro__[: cls.__mro__.index(LossMixin)]
        others = [base for base in order if not issubclass(base, LossMixin)]
        if before := [base.__name__ for base in others if "training_step" in vars(base)]:
            mixin = next(base.__name__ for base in order if issubclass(base, LossMixin) and base is not cls)
            raise TypeError(
                f"{cls.__name__} would train with the step of {before[0]}, not with the loss of {mixin}: put the mixin "
                f"first, class {cls.__name__}({mixin}, {before[0]})."
            )
        losses = [base.__name__ for base in order if LossMixin in base.__bases__]
        if len(losses) > 1:
            raise TypeError(f"{cls.__name__} has two losses, {' and '.join(losses)}: keep one of them.")

    def train_with(self, function: Callable[..., Tensor], *nothing: Any, prefix: str = "", **options: Any) -> None:
        """Set the loss.

        Args:
            function: Called with what :meth:`calibrated_loss_of` gives it.
            *nothing: Arguments for a batch of no samples: the options are checked on it, now and not in training.
            prefix: What the mixin's names of the options begin with, for the sentences that refuse one.
            **options: The function's own.
        """
        self.calibrated_loss_function = partial(function, **options)
        self._calibrated_loss_prefix = prefix
        # On the CPU also where modules are made on another device, or on none.
        rows, labels = torch.zeros(0, 2, device="cpu"), torch.zeros(0, dtype=torch.long, device="cpu")
        with options_named(prefix):
            self.calibrated_loss_function(*(nothing or (rows, labels)))

    @_in_python
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch ``(inputs, target)``."""
        if not self.automatic_optimization:
            raise MisconfigurationException(
                f"{type(self).__name__} optimizes manually, which this training_step does not: write your own, with "
                "`loss = self.calibrated_loss(inputs, target)` and `self.manual_backward(loss)`."
            )
        if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
            size = f" of {len(batch)} items" if isinstance(batch, tuple | list | dict) else ""
            raise TypeError(
                f"{type(self).__name__} needs batches (inputs, target), got {type(batch).__name__}{size}: write a "
                "training_step that takes them apart and calls `self.calibrated_loss(inputs, target)`."
            )
        loss = self.calibrated_loss(*batch)
        self._log_calibrated({"loss": loss.detach()}, prog_bar=True)
        return loss

    @_in_python
    def calibrated_loss(self, inputs: Tensor, target: Tensor, index: Tensor | None = None) -> Tensor:
        """The mixin's loss of a batch; in training, its terms are logged as ``train/...``.

        Args:
            inputs: What ``self`` takes.
            target: Labels, as the loss takes them.
            index: Of each item in the training set, ``(N,)``, for losses that keep something for each item.
        """
        self._calibrated_loss_was_called = True
        log_terms: dict[str, Tensor] = {}
        with options_named(self._calibrated_loss_prefix):
            loss = self.calibrated_loss_of(inputs, target, index, log_terms)
        if self.training:
            self._log_calibrated(log_terms)
        return loss

    def calibrated_loss_of(
        self, inputs: Tensor, target: Tensor, index: Tensor | None, log_terms: dict[str, Tensor]
    ) -> Tensor:
        """The loss alone; fills ``log_terms``."""
        return self.calibrated_loss_function(
            self(inputs), target, task=self.loss_task, ignore_index=self.loss_ignore_index, log_terms=log_terms
        )

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Say so if the step that ran knows nothing of this loss."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        if not self._calibrated_loss_was_called:
            self._calibrated_loss_was_called = True
            rank_zero_warn(
                f"The training_step of {type(self).__name__} did not call `self.calibrated_loss(inputs, target)`: it "
                "does not train with the mixin's loss. Remove it, or call that."
            )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _log_calibrated(self, values: dict[str, Tensor], prog_bar: bool = False) -> None:
        self.log_dict({f"train/{name}": value for name, value in values.items()}, prog_bar=prog_bar)
