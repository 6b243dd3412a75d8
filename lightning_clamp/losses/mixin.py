"""What every loss mixin is: a training step in front of somebody's LightningModule."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_clamp._batch import BatchKeys, Inputs, as_pair
from lightning_clamp._checks import OptionError, check_package, renamed
from lightning_clamp._rows import Task
from lightning_clamp.losses._outputs import Logits, complaint_of_probabilities
from lightning_clamp.losses.samples import index_of
from lightning_clamp.spec import Spec

_Function = TypeVar("_Function", bound=Callable[..., Any])
# torch.compile makes no graph of Lightning's log: what logs is left to Python, and what that calls is compiled.
_in_python: Callable[[_Function], _Function] = torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call]
# What all mixins call the options that all losses share.
_SHARED = {name: f"loss_{name}" for name in ("task", "ignore_index", "batch_keys")}


@contextmanager
def options_named(names: Mapping[str, str]) -> Iterator[None]:
    """Have refusals name a function's options as a mixin does: ``margin_clip`` for ``clip``."""
    try:
        yield
    except OptionError as error:
        raise error.renamed(names) from None


def with_prefix(prefix: str, *options: str) -> dict[str, str]:
    """What a mixin calls the options of its function, and those that all share."""
    # A function's ``lambda_`` has its underscore because ``lambda`` is a word of Python.
    return _SHARED | {option: prefix + option.rstrip("_") for option in options}


class LossMixin(LightningModule):
    """Trains a LightningModule with another loss: ``class Calibrated(SomeMixin, MyModule): ...``.

    The mixin's ``training_step`` takes the place of the module's. It reads batches as the calibration does: pairs
    ``(inputs, target)``, which an index may follow, or what ``loss_batch_keys`` names. It calls ``self(inputs)`` for
    the logits, with several inputs as forward's arguments, and takes them as a tensor, as ``.logits`` or as
    ``{"out": ...}``. It logs ``train/loss`` and the terms of the loss (``train/cross_entropy``, ...). Where a step does
    more, write it below the mixin and call :meth:`calibrated_loss`::

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
        loss_task: ``"multiclass"``, ``"binary"`` for one logit per position, or ``"multilabel"`` for one per label.
        loss_ignore_index: Target value of positions to leave out.
        loss_batch_keys: Which entries of a batch are input and target, where it is no pair: keys of a mapping, names of
            attributes, or positions, as ``batch_keys`` elsewhere.
        **kwargs: The module's own.

    Raises:
        TypeError: When a class is written with the mixin behind the module, or with two losses.
        ValueError: If an option is out of range.
    """

    # The names are long because they share the instance with those of somebody's module.
    calibrated_loss_function: Callable[..., Tensor]
    _calibrated_loss_names: Mapping[str, str] = _SHARED
    # Of losses for one logit per position, where ``loss_task`` says nothing.
    _calibrated_loss_is_binary = False
    _calibrated_loss_was_called = False
    _calibrated_outputs_were_seen = False

    def __init__(
        self,
        *args: Any,
        loss_task: Task = "multiclass",
        loss_ignore_index: int | None = None,
        loss_batch_keys: BatchKeys | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        with options_named(_SHARED):
            Spec(loss_task, loss_ignore_index, loss_batch_keys)
        self.loss_task = loss_task
        self.loss_ignore_index = loss_ignore_index
        self.loss_batch_keys = loss_batch_keys

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
        mixins = [base for base in order if _is_mixin(base)]
        losses = [one for one in mixins if not any(issubclass(other, one) and other is not one for other in mixins)]
        if len(losses) > 1:
            named = " and ".join(base.__name__ for base in losses)
            raise TypeError(f"{cls.__name__} has two losses, {named}: keep one of them.")

    def train_with(self, function: Callable[..., Tensor], *nothing: Any, prefix: str = "", **options: Any) -> None:
        """Set the loss.

        Args:
            function: Called with what :meth:`calibrated_loss_of` gives it.
            *nothing: Arguments for a batch of no samples: the options are checked on it, now and not in training.
            prefix: What the mixin's names of the options begin with, for the sentences that refuse one.
            **options: The function's own.
        """
        self.calibrated_loss_function = partial(function, **options)
        self._calibrated_loss_names = with_prefix(prefix, *options)
        # On the CPU also where modules are made on another device, or on none.
        rows, labels = torch.zeros(0, 2, device="cpu"), torch.zeros(0, dtype=torch.long, device="cpu")
        with options_named(self._calibrated_loss_names):
            self.calibrated_loss_function(*(nothing or (rows, labels)))

    @_in_python
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        if not self.automatic_optimization:
            raise MisconfigurationException(
                f"{type(self).__name__} optimizes manually, which this training_step does not: write your own, with "
                "`loss = self.calibrated_loss(inputs, target)` and `self.manual_backward(loss)`."
            )
        loss = self.calibrated_loss(*self.calibrated_loss_batch(batch))
        self._log_calibrated({"loss": loss.detach()}, prog_bar=True)
        return loss

    def calibrated_loss_batch(self, batch: Any) -> tuple[Inputs, Tensor, Tensor | None]:
        """Inputs, target and, if it has one, index of a batch: the arguments of :meth:`calibrated_loss`.

        Raises:
            TypeError: If the batch has no such entries, or they are no tensors.
        """
        keys = self.loss_batch_keys
        if keys is None and isinstance(batch, tuple | list) and len(batch) == 3:
            keys = (0, 1)
        try:
            inputs, target = as_pair(batch, keys)
        except TypeError as error:
            raise TypeError(renamed(str(error), _SHARED)) from None
        return inputs, target, index_of(batch, keys)

    @_in_python
    def calibrated_loss(self, inputs: Inputs, target: Tensor, index: Tensor | None = None) -> Tensor:
        """The mixin's loss of a batch; in training, its terms are logged as ``train/...``.

        Args:
            inputs: What ``self`` takes: a tensor, or several by the names of forward's arguments or in their order.
            target: Labels, as the loss takes them.
            index: Of each item in the training set, ``(N,)``, for losses that keep something for each item.
        """
        self._calibrated_loss_was_called = True
        log_terms: dict[str, Tensor] = {}
        with options_named(self._calibrated_loss_names):
            loss = self.calibrated_loss_of(inputs, target, index, log_terms)
        if self.training:
            self._log_calibrated(log_terms)
        return loss

    def calibrated_loss_of(
        self, inputs: Inputs, target: Tensor, index: Tensor | None, log_terms: dict[str, Tensor]
    ) -> Tensor:
        """The loss alone; fills ``log_terms``."""
        return self.calibrated_loss_function(
            self.calibrated_logits(inputs),
            target,
            task=self.loss_task,
            ignore_index=self.loss_ignore_index,
            log_terms=log_terms,
            **self.learned_options(),
        )

    def learned_options(self) -> Mapping[str, Any]:
        """Options of the function that change as the training goes on; none, but for losses that learn."""
        return {}

    def calibrated_logits(self, inputs: Inputs) -> Tensor:
        """The module's logits of a batch, whatever else it returns.

        Raises:
            TypeError: If it returns none.
        """
        logits: Tensor = Logits(self, self.see_outputs)(inputs)
        return logits

    def see_outputs(self, logits: Tensor) -> None:
        """Say so if the first batch of a training has probabilities; later ones are not read, which would stall."""
        if self._calibrated_outputs_were_seen or not self.training:
            return
        self._calibrated_outputs_were_seen = True
        binary = self.loss_task != "multiclass" or self._calibrated_loss_is_binary
        if complaint := complaint_of_probabilities(logits, binary):
            rank_zero_warn(f"{type(self).__name__} takes what the network returns as logits, and {complaint}.")

    def on_fit_start(self) -> None:
        """Look at the outputs of the first batch again."""
        super().on_fit_start()
        self._calibrated_outputs_were_seen = False

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


def _is_mixin(cls: type) -> bool:
    """Whether a class has a loss, and no module yet."""
    modules = [base for base in cls.__mro__ if issubclass(base, LightningModule) and base is not LightningModule]
    return bool(modules) and all(issubclass(base, LossMixin) for base in modules)
