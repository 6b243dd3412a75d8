"""Before and after: names and numbers, pictures, and every logger the Trainer has."""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from textwrap import indent
from typing import TYPE_CHECKING, TypeVar

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

from lightning_clamp.clamping.by_label import LabelMetrics, by_log_key
from lightning_clamp.clamping.clamp import Clamp
from lightning_clamp.clamping.result import CalibrationResult
from lightning_clamp.metrics import plot_reliability

if TYPE_CHECKING:
    from matplotlib.figure import Figure


T = TypeVar("T")

# A perturbation inside a network may have hundreds.
_MOST_CHANNELS = 8


def scalars(result: CalibrationResult) -> dict[str, float]:
    """The numbers that are logged, by their log key."""
    chosen = result.chosen
    numbers = {
        **{f"before/{name}": value for name, value in result.before.items()},
        **{f"after/{name}": value for name, value in result.after.items()},
        "temperature": float(result.clamp.temperature),
        "perturbation_norm": result.clamp.perturbation_norm,
        "grid": float(chosen.grid if chosen is not None else 0),
        "passes": float(result.passes),
        "seconds": result.seconds,
        **({} if result.by_label is None else _of_labels(result.by_label)),
    }
    return _by_log_key(numbers)


def _of_labels(labels: LabelMetrics) -> dict[str, float]:
    return {
        f"{when}/{name}": number
        for when, values in (("before", labels.before), ("after", labels.after))
        for name, number in by_log_key(values, labels.entries).items()
    }


def log_result(trainer: Trainer, result: CalibrationResult) -> None:
    """Write the numbers to ``trainer.callback_metrics`` and every logger, and pictures where a logger takes them."""
    numbers = scalars(result)
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in numbers.items()})
    if not trainer.is_global_zero:
        return
    step = training_step(trainer)
    for logger in trainer.loggers:
        logger.log_metrics(numbers, step=step)
    log_words(trainer.loggers, result, step)
    log_figures(trainer.loggers, lambda: _by_log_key(figures(result)), step)


def training_step(trainer: Trainer) -> int:
    """The step that metrics logged in training have."""
    # Private, and what Lightning's own callbacks log by. trainer.global_step counts every optimizer, and with manual
    # optimization only their steps, so it may lie behind.
    return trainer.fit_loop.epoch_loop._batches_that_stepped  # noqa: SLF001


def log_words(loggers: Sequence[Logger], result: CalibrationResult, step: int) -> None:
    """Log what was chosen and why to TensorBoard (text), Weights & Biases (summary) and MLflow (tags).

    Of several labels also the table of the worst.
    """
    words = {"chosen": result.chosen_name, "reason": result.reason}
    if result.by_label is not None:
        # Indented, which TensorBoard shows as it stands.
        words["labels"] = indent(result.by_label.table(), "    ")
    for key, text in _by_log_key(words).items():
        for logger in loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.summary[key] = text
            elif isinstance(logger, MLFlowLogger):
                logger.experiment.set_tag(logger.run_id, key, text)
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text(key, text, step)


def log_figures(loggers: Sequence[Logger], draw: "Callable[[], Mapping[str, Figure]]", step: int) -> None:
    """Log pictures, which are drawn only if there is a logger that takes them, and closed.

    Args:
        loggers: Those of a Trainer; TensorBoard, Weights & Biases and MLflow take pictures.
        draw: Makes them, by log key.
        step: To log them at.
    """
    takers = [logger for logger in loggers if isinstance(logger, TensorBoardLogger | WandbLogger | MLFlowLogger)]
    if not takers:
        return
    if find_spec("matplotlib") is None:
        rank_zero_warn("matplotlib is not installed, so no calibration figures are logged: pip install matplotlib.")
        return
    from matplotlib import pyplot as plt

    for key, figure in draw().items():
        for logger in takers:
            if isinstance(logger, WandbLogger):
                _log_to_wandb(logger, key, figure, step)
            elif isinstance(logger, MLFlowLogger):
                logger.experiment.log_figure(logger.run_id, figure, f"{key}.png")
            else:
                logger.experiment.add_figure(key, figure, step, close=False)
        plt.close(figure)


def figures(result: CalibrationResult) -> dict[str, "Figure"]:
    """The pictures of a calibration, by name: the reliability diagram, and the perturbation if there is one.

    Of several labels the diagram is that of all entries, and the worst label has another.
    """
    before, after = result.reliability
    drawn = {"reliability": plot_reliability({"before": before, "after": after})[0]}
    if result.by_label is not None and result.by_label.reliability is not None:
        before, after = result.by_label.reliability
        title = f"label {result.by_label.worst[0]}"
        drawn["reliability_worst_label"] = plot_reliability({"before": before, "after": after}, title=title)[0]
    if result.clamp.perturbation is not None:
        drawn["perturbation"] = plot_perturbation(result.clamp)
    return drawn


def _by_log_key(named: Mapping[str, T]) -> dict[str, T]:
    return {f"calibration/{name}": value for name, value in named.items()}


def _log_to_wandb(logger: WandbLogger, key: str, figure: "Figure", step: int) -> None:
    from wandb import Image

    logger.log_image(key, [Image(figure)], step)


def plot_perturbation(clamp: Clamp) -> "Figure":
    """Draw the perturbation: an image per channel, of the 8 with the largest norm, or one bar per feature.

    Raises:
        ValueError: If the clamp has none.
    """
    from matplotlib import pyplot as plt

    if clamp.perturbation is None:
        raise ValueError("This clamp leaves its inputs alone: there is no perturbation to draw.")
    delta = clamp.perturbation.detach().float().cpu().numpy()
    limit = float(abs(delta).max()) or 1.0
    if delta.ndim != 3:
        figure, axes = plt.subplots(figsize=(4.2, 2.4), layout="constrained")
        axes.bar(range(delta.size), delta.flatten())
        axes.set(xlabel="feature", ylabel="perturbation")
        return figure
    largest = sorted((delta**2).sum((1, 2)).argsort(kind="stable")[::-1][:_MOST_CHANNELS])
    n = len(largest)
    figure, panels = plt.subplots(1, n, figsize=(1.9 * n + 0.9, 2.3), squeeze=False, layout="constrained")
    for panel, channel in zip(panels[0], largest, strict=True):
        drawn = panel.imshow(delta[channel], cmap="RdBu_r", vmin=-limit, vmax=limit)
        panel.set(title=f"channel {channel}", xticks=[], yticks=[])
    figure.colorbar(drawn, ax=panels[0], shrink=0.8, label="added to the input")
    return figure
