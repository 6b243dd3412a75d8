"""While a model trains: how well it is calibrated, and what a calibration would leave, after every validation."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchmetrics import Metric, MetricCollection

from lightning_clamp._batch import BatchKeys, Inputs, logits_of
from lightning_clamp._checks import check_whole
from lightning_clamp._rows import Task
from lightning_clamp._trainer.devices import ranks_of
from lightning_clamp.metrics import (
    BestTemperature,
    ExpectedCalibrationError,
    NegativeLogLikelihood,
    RefinedNegativeLogLikelihood,
    ReliabilityCurve,
    ReliabilityDiagram,
)
from lightning_clamp.report import log_figures, training_step
from lightning_clamp.spec import Spec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DIAGRAM = "reliability"
_MEANS = {
    "nll": NegativeLogLikelihood,
    "ece": ExpectedCalibrationError,
    "refined_nll": RefinedNegativeLogLikelihood,
}


class CalibrationMonitor(Callback):
    """Logs, after every validation of a training, how well the model is calibrated and what calibration would leave.

    ``val/nll`` and ``val/ece`` are those of the model as it is. ``val/refined_nll`` is the NLL that the best
    temperature leaves, and ``val/temperature`` that temperature (1/16 or 16 where it lies beyond): weights that will be
    calibrated are chosen by ``ModelCheckpoint(monitor="val/refined_nll")``, and calibrated by
    ``NeuralClamping(weights="best")``.

    Nothing is computed twice: the logits are what ``self(x)`` returns in the module's own ``validation_step``. If they
    cannot be read, one warning says why, and the training goes on. With several validation loaders the names end in
    ``/dataloader_idx_0`` and so on, as Lightning's do. Under DDP the values are those of all ranks together, with the
    samples that Lightning's sampler repeats. The sanity check is not counted.

    Args:
        name: What the logged names begin with; two monitors need two names.
        metrics: Further metrics by name, of logits and target, with one number as their value; the callback makes
            copies. A name that is used already replaces what is logged under it.
        diagram_every: A reliability diagram goes to the loggers after the first validation and then after every so
            many; 0 for none.
        task: ``"multiclass"``; ``"binary"`` for one logit; or ``"multilabel"`` for one per label: NLL and ECE are then
            means over the labels, the temperature is one for all.
        ignore_index: Target value of positions to leave out.
        batch_keys: Input and target of a batch: their keys, names or positions, where a batch is no pair.

    Raises:
        ValueError: If ``diagram_every`` is no whole number of at least 0, or a setting has no such value.
        TypeError: If ``metrics`` holds anything but metrics.
    """

    def __init__(
        self,
        name: str = "val",
        *,
        metrics: Mapping[str, Metric] | None = None,
        diagram_every: int = 10,
        task: Task = "multiclass",
        ignore_index: int | None = None,
        batch_keys: BatchKeys | None = None,
    ) -> None:
        check_whole("diagram_every", diagram_every, least=0)
        _check_metrics(metrics)
        self.name = name
        self.diagram_every = diagram_every
        self.spec = Spec(task, ignore_index, batch_keys)
        self.metrics = dict(metrics or {})
        self._validations = 0
        self._told = False
        self._validation: _Validation | None = None

    @property
    def state_key(self) -> str:
        """Another one for every name, or Lightning takes two monitors for one."""
        return f"{type(self).__qualname__}[{self.name}]"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a second one of the same name: what both log, a Trainer would average."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(other, CalibrationMonitor) and other.name == self.name for other in callbacks) > 1:
            raise MisconfigurationException(
                f"Two CalibrationMonitors log as '{self.name}/…': give one another name, CalibrationMonitor('other')."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if there will be nothing to log."""
        self._validations, self._told = 0, False
        if not trainer.enable_validation:
            rank_zero_warn(
                "CalibrationMonitor logs nothing: this Trainer does not validate. Give the module a validation_step, "
                "and fit a validation loader."
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the module."""
        if not trainer.sanity_checking:
            self._validation = _Validation(pl_module.register_forward_hook(self._listen, with_kwargs=True))

    def _listen(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._validation is not None:
            self._validation.calls.append((args[0] if args else kwargs, output))

    def on_validation_batch_start(self, *_: Any, **__: Any) -> None:
        """Forget the calls of an earlier batch."""
        if self._validation is not None:
            self._validation.calls.clear()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Read the batch."""
        heard = self._validation
        if heard is None or heard.error is not None:
            return
        calls = heard.calls
        if trainer.strategy.model is not pl_module:
            # A wrapper (DDP) calls the module for the whole step, and that call is the last to end.
            calls = calls[:-1]
        try:
            inputs, target = self.spec.pair(batch)
            logits = logits_of(_output(calls, inputs, pl_module))
            self._metrics_of(heard, dataloader_idx, logits).update(logits, target)
        except Exception as error:  # noqa: BLE001 - whatever a batch can hold, it must not end a training; it is told
            heard.error = str(error)
        heard.calls.clear()

    def _metrics_of(self, heard: "_Validation", loader: int, logits: Tensor) -> MetricCollection:
        if loader not in heard.collections:
            means = self.spec.of_means(self.spec.width(logits))
            metrics: dict[str, Metric | MetricCollection] = {
                **{name: metric(**means) for name, metric in _MEANS.items()},
                # One for all labels, as a clamp has.
                "temperature": BestTemperature(**self.spec.of_metrics),
                **self.metrics,
            }
            if self.diagram_every and self._validations % self.diagram_every == 0:
                metrics[_DIAGRAM] = ReliabilityDiagram(**self.spec.of_metrics)
            heard.collections[loader] = MetricCollection(metrics).clone().to(logits.device)
        return heard.collections[loader]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log, on all ranks or, if one of them could not read a batch, on none."""
        heard = self._validation
        if heard is None:
            return
        errors = [error for error in ranks_of(trainer).gather(heard.error) if error is not None]
        if not errors:
            self._log(heard, trainer, pl_module)
        elif not self._told:
            self._told = True
            rank_zero_warn(f"CalibrationMonitor could not read this validation, and logs nothing of it: {errors[0]}")
        self._validations += 1

    def _log(self, heard: "_Validation", trainer: Trainer, module: LightningModule) -> None:
        several = len(trainer.num_val_batches) > 1
        for loader, collection in sorted(heard.collections.items()):
            suffix = f"/dataloader_idx_{loader}" if several else ""
            with warnings.catch_warnings():
                # As early in a training, and where all are right. The temperature that is logged says it.
                warnings.filterwarnings("ignore", ".*the last that is looked at")
                values = collection.compute()
            curve = values.pop(_DIAGRAM, None)
            numbers = {f"{self.name}/{name}{suffix}": value.float() for name, value in values.items()}
            module.log_dict(numbers, sync_dist=trainer.world_size > 1, add_dataloader_idx=False)
            if curve is not None and trainer.is_global_zero:
                draw = partial(_drawn, f"{self.name}/{_DIAGRAM}{suffix}", curve)
                log_figures(trainer.loggers, draw, training_step(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the module alone."""
        self._stop_listening()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module alone."""
        self._stop_listening()

    def _stop_listening(self) -> None:
        if self._validation is not None:
            self._validation.handle.remove()
            self._validation = None


@dataclass
class _Validation:
    """What is known of a validation that is under way.

    Attributes:
        handle: Of the hook that listens to the module.
        calls: First input and output of each call of the module in the present batch.
        collections: The metrics of each loader.
        error: Why a batch could not be read.
    """

    handle: RemovableHandle
    calls: list[tuple[Any, Any]] = field(default_factory=list)
    collections: dict[int, MetricCollection] = field(default_factory=dict)
    error: str | None = None


def _check_metrics(metrics: object) -> None:
    given = metrics.values() if isinstance(metrics, Mapping) else [metrics]
    if metrics is not None and not all(isinstance(metrics, Mapping) and isinstance(one, Metric) for one in given):
        raise TypeError(
            f"`metrics` must be a dict of metrics by name, such as {{'accuracy': Accuracy()}}, got {metrics!r}."
        )


def _output(calls: list[tuple[Any, Any]], inputs: Inputs, module: LightningModule) -> Any:
    """What ``self(inputs)`` returned in the step.

    Raises:
        RuntimeError: If there was no such call, or several.
    """
    step = f"{type(module).__name__}.validation_step"
    if not calls:
        raise RuntimeError(f"{step} did not call self(x), whose output is read; call self(x) there.")
    if len(calls) > 1:
        calls = [call for call in calls if call[0] is inputs]
    if len(calls) != 1:
        raise RuntimeError(f"{step} called self several times; call it once with the input of the batch, as self(x).")
    return calls[0][1]


def _drawn(key: str, curve: ReliabilityCurve) -> "dict[str, Figure]":
    return {key: ReliabilityDiagram().plot(curve)[0]}
