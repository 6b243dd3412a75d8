import csv
import importlib.util
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_clamp import Clamp, NeuralClamping, fit_clamp
from lightning_clamp.report import plot_perturbation, scalars, table
from tests.scenarios import LitClassifier, batches, loader, shifted_images
from tests.test_callback import train_loader, trainer

KEYS = {
    *(f"calibration/{when}/{name}" for when in ("before", "after") for name in ("nll", "ece", "accuracy")),
    *(f"calibration/{name}" for name in ("temperature", "perturbation_norm", "grid", "passes", "seconds")),
}


def plain(**options):
    return NeuralClamping(loader(1000, seed=30, size=250), outputs=("temperature",), **options)


@pytest.fixture(scope="module")
def result():
    network, x, y = shifted_images(2000)
    return fit_clamp(network, batches(x, y), outputs=("temperature",))


def test_the_numbers_have_their_log_keys(result):
    numbers = scalars(result)
    assert set(numbers) == KEYS
    assert numbers["calibration/after/nll"] == result.after["nll"]
    assert numbers["calibration/grid"] == 1.0


def test_the_table_shows_before_after_and_why(result):
    lines = table(result).splitlines()
    assert lines[0].split() == ["calibration", "set", "before", "after", "change", "[95", "%", "interval]"]
    change, low, high = (f"{number:+.4f}" for number in result.change["nll"])
    numbers = [f"{result.before['nll']:.4f}", f"{result.after['nll']:.4f}", change]
    assert lines[1].split() == ["nll", *numbers, f"[{low},", f"{high}]"]
    assert "T = 2.0" in lines[4] or "T = 1.9" in lines[4]
    assert lines[5] == f"chosen: {result.reason}"


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 6), (5,), (2, 9)])
def test_a_perturbation_of_any_shape_can_be_drawn(shape):
    figure = plot_perturbation(Clamp(torch.randn(shape)))
    images = sum(len(axes.images) for axes in figure.axes)
    assert images == (shape[0] if len(shape) == 3 else 0)


def test_an_untouched_input_has_no_picture():
    with pytest.raises(ValueError, match="there is no perturbation to draw"):
        plot_perturbation(Clamp())


def test_every_logger_and_the_callback_metrics_get_the_numbers(tmp_path):
    callback = plain()
    loggers = [TensorBoardLogger(tmp_path / "tb"), CSVLogger(tmp_path / "csv")]
    run = trainer(tmp_path, callback, logger=loggers, log_every_n_steps=1)
    run.fit(LitClassifier(), train_loader())
    expected = scalars(callback.result)
    for name, value in expected.items():
        assert float(run.callback_metrics[name]) == pytest.approx(value)
    events = EventAccumulator(loggers[0].log_dir).Reload()
    assert set(events.Tags()["scalars"]) >= KEYS
    for name in KEYS:
        (event,) = events.Scalars(name)
        assert event.value == pytest.approx(expected[name])
        assert event.step == run.global_step == 2
    assert set(events.Tags()["images"]) == {"calibration/reliability", "calibration/perturbation"}
    with open(Path(loggers[1].log_dir) / "metrics.csv") as file:
        (row,) = [row for row in csv.DictReader(file) if row["calibration/temperature"]]
    assert float(row["calibration/after/nll"]) == pytest.approx(expected["calibration/after/nll"])


def test_without_matplotlib_only_the_figures_are_missing(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr("lightning_clamp.report.find_spec", lambda name: None if name == "matplotlib" else found(name))
    logger, callback = TensorBoardLogger(tmp_path), plain()
    with pytest.warns(UserWarning, match="matplotlib is not installed, so no calibration figures"):
        trainer(tmp_path, callback, logger=logger, log_every_n_steps=1).fit(LitClassifier(), train_loader())
    events = EventAccumulator(logger.log_dir).Reload()
    assert set(events.Tags()["scalars"]) >= KEYS
    assert events.Tags()["images"] == []


def test_weights_and_biases_gets_numbers_and_figures(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger, callback = WandbLogger(save_dir=tmp_path, offline=True), plain()
    trainer(tmp_path, callback, logger=logger, log_every_n_steps=1).fit(LitClassifier(), train_loader())
    summary = dict(logger.experiment.summary)
    logger.experiment.finish()
    assert summary["calibration/temperature"] == pytest.approx(float(callback.result.clamp.temperature))
    assert set(summary) >= KEYS | {"calibration/reliability", "calibration/perturbation"}
    assert len(list(tmp_path.rglob("media/images/calibration/*.png"))) == 2


def test_the_table_is_shown_to_the_user(tmp_path, caplog):
    with caplog.at_level("INFO"):
        trainer(tmp_path, plain(), ModelCheckpoint(tmp_path)).fit(LitClassifier(), train_loader())
    assert "calibration set     before     after" in caplog.text
    assert "saved: " in caplog.text


@pytest.mark.parametrize(
    "bar",
    [TQDMProgressBar(), TQDMProgressBar(refresh_rate=2), RichProgressBar(console_kwargs={"force_terminal": True})],
)
def test_progress_is_drawn_in_the_trainers_own_bar(tmp_path, bar, capsys):
    run = trainer(tmp_path, plain(), bar, enable_progress_bar=True)
    run.fit(LitClassifier(), train_loader())
    assert "Calibrating (" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("callbacks", "enabled"),
    [([], False), ([TQDMProgressBar(refresh_rate=0)], True), ([RichProgressBar(refresh_rate=0)], True)],
)
def test_where_the_user_turned_the_bar_off_none_is_drawn(tmp_path, callbacks, enabled, capsys):
    run = trainer(tmp_path, plain(), *callbacks, enable_progress_bar=enabled)
    run.fit(LitClassifier(), train_loader())
    assert "Calibrating" not in "".join(capsys.readouterr())
