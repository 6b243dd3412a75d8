"""Calibration, margins and sharpness side by side while a network trains."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_clamp._batch import BatchKeys, Inputs, call_network, logits_of
from lightning_clamp._checks import check_at_least, check_package
from lightning_clamp._rows import Task
from lightning_clamp._trainer.data import as_validation, validation_batch
from lightning_clamp._trainer.preflight import kept_loaders
from lightning_clamp.clamping.frozen import kept_random_state
from lightning_clamp.losses._modes import in_mode
from lightning_clamp.metrics import ExpectedCalibrationError, ExponentialMarginTail
from lightning_clamp.sharpness.gauss_newton import gauss_newton_sharpness
from lightning_clamp.spec import Spec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TITLES = {"ece": "ECE", "margin_tail": "margin tail", "sharpness": "sharpness"}


class SharpnessMonitor(Callback):
    """Measures, as training goes on, what the margin-aware objective couples: ECE, margin tail and sharpness.

    The margin tail, the mean of exp(-margin), bounds both others from above, up to factors; whether they move together
    is for :meth:`plot` to show. The numbers are logged as ``monitor/ece``, ``monitor/margin_tail`` and
    ``monitor/sharpness``. The model's modes, gradients and torch's random state are left as they are. Two monitors, of
    training and validation data, need two names. Under DDP every rank measures the whole loader; after a spawned fit
    the history is in the processes that trained, and in the checkpoints.

    Args:
        dataloader: Batches to measure on, as the module's validation step would get them. They are kept on the device
            and gone through some dozen times: a few hundred samples, not shuffled, are enough.
        name: What the logged names begin with.
        every_n_epochs: How often, at least 1.
        task: ``"multiclass"``, ``"binary"`` or ``"multilabel"``.
        ignore_index: Target value of positions to leave out.
        batch_keys: Input and target of a batch: their keys, names or positions, where a batch is no pair. The input may
            be a list of names of the arguments of ``forward``.
        max_iterations: Power iterations, at most, for the sharpness.
        tolerance: Relative change of the sharpness at which they stop.

    Attributes:
        history: One dict per measurement: ``epoch`` (finished ones), ``ece``, ``margin_tail``, ``sharpness``.

    Raises:
        ValueError: If ``every_n_epochs`` or ``max_iterations`` is below 1, or ``batch_keys`` is no pair of keys.

    Reference:
        Morosini et al., "Too Sharp, Too Sure", 2026 (arXiv 2604.20614), theorem 4.1.
    """

    def __init__(
        self,
        dataloader: Iterable[Any],
        *,
        name: str = "monitor",
        every_n_epochs: int = 1,
        task: Task = "multiclass",
        ignore_index: int | None = None,
        batch_keys: BatchKeys | None = None,
        max_iterations: int = 30,
        tolerance: float = 0.01,
    ) -> None:
        check_at_least("every_n_epochs", every_n_epochs, 1)
        check_at_least("max_iterations", max_iterations, 1)
        self.dataloader = dataloader
        self.name = name
        self.every_n_epochs = every_n_epochs
        self.spec = Spec(task, ignore_index, batch_keys)
        self.max_iterations = max_iterations
        self.tolerance = tolerance
        self.history: list[dict[str, float]] = []
        self._batches: list[tuple[Inputs, Tensor]] = []

    @property
    def state_key(self) -> str:
        """Another one for every name, or Lightning takes two monitors for one."""
        return f"{type(self).__qualname__}[{self.name}]"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the batches.

        Raises:
            MisconfigurationException: If there are none, or they are not what ``batch_keys`` says.
        """
        check_package(trainer)
        # A loader draws a seed when it is read, which training must not notice.
        with kept_random_state(), kept_loaders([self.dataloader]), as_validation(trainer):
            batches = [validation_batch(trainer, pl_module, batch) for batch in self.dataloader]
        if not batches:
            raise MisconfigurationException("SharpnessMonitor needs a loader that yields one batch at least.")
        try:
            self._batches = [self.spec.pair(batch) for batch in batches]
        except TypeError as error:
            raise MisconfigurationException(f"SharpnessMonitor cannot use its loader. {error}") from error

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure."""
        finished = trainer.current_epoch + 1
        if finished % self.every_n_epochs:
            return
        measured = self.measure(pl_module)
        self.history.append({"epoch": finished, **measured})
        pl_module.log_dict({f"{self.name}/{key}": value for key, value in measured.items()})

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the batches."""
        self._batches = []

    def state_dict(self) -> dict[str, Any]:
        """The history, for a run that is resumed."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the history."""
        self.history = list(state_dict["history"])

    def measure(self, network: LightningModule) -> dict[str, float]:
        """The three numbers now."""
        kinds = (ExpectedCalibrationError, ExponentialMarginTail)
        # In float64, since a tail of float32 is inf from a margin of -88 on.
        ece, tail = (kind(**self.spec.of_metrics).set_dtype(torch.float64) for kind in kinds)
        with in_mode(network, "eval"), torch.no_grad():
            for inputs, target in self._batches:
                logits = logits_of(call_network(network, inputs))
                for metric in (ece.to(logits.device), tail.to(logits.device)):
                    metric.update(logits, target)
        sharpness = gauss_newton_sharpness(
            network, self._batches, **self.spec.of_metrics, max_iterations=self.max_iterations, tolerance=self.tolerance
        )
        return {"ece": float(ece.compute()), "margin_tail": float(tail.compute()), "sharpness": sharpness}

    def plot(self) -> "Figure":
        """Draw the three over the epochs, below each other.

        Raises:
            ValueError: If nothing has been measured yet.
        """
        from matplotlib import pyplot as plt
        from matplotlib.ticker import LogFormatter

        if not self.history:
            raise ValueError("Nothing has been measured: fit with this callback first.")
        figure, panels = plt.subplots(len(_TITLES), 1, figsize=(5.0, 5.2), sharex=True, layout="constrained")
        for panel, (name, title) in zip(panels, _TITLES.items(), strict=True):
            panel.plot([one["epoch"] for one in self.history], [one[name] for one in self.history], marker="o", ms=3)
            panel.set(ylabel=title, yscale="linear" if name == "ece" else "log")
            panel.grid(alpha=0.3)
            if name != "ece":
                panel.yaxis.set_major_formatter(LogFormatter())
                panel.yaxis.set_minor_formatter(LogFormatter())
        panels[0].set_ylim(bottom=0)
        panels[-1].set_xlabel("epoch")
        return figure
