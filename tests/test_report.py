import csv
import importlib.util
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_clamp import Clamp, NeuralClamping, calibrate, fit_clamp
from lightning_clamp._checks import counted
from lightning_clamp.clamping.candidate import Candidate, Refusal
from lightning_clamp.clamping.reason import reason
from lightning_clamp.report import plot_perturbation, scalars
from tests.scenarios import LitClassifier, batches, loader, shifted_images, train_loader, trainer

KEYS = {
    *(f"calibration/{when}/{name}" for when in ("before", "after") for name in ("nll", "ece", "accuracy")),
    *(f"calibration/{name}" for name in ("temperature", "perturbation_norm", "grid", "passes", "seconds")),
}


def plain(**options):
    return NeuralClamping(loader(1000, seed=30, size=250), output_maps=("temperature",), **options)


@pytest.fixture(scope="module")
def result():
    network, x, y = shifted_images(2000)
    return fit_clamp(network, batches(x, y), output_maps=("temperature",))


def test_the_numbers_have_their_log_keys(result):
    numbers = scalars(result)
    assert set(numbers) == KEYS
    assert numbers["calibration/after/nll"] == result.after["nll"]
    assert numbers["calibration/grid"] == 1.0


def test_the_table_shows_before_after_and_why(result):
    lines = str(result).splitlines()
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


def test_of_many_channels_the_largest_are_drawn():
    perturbation = torch.zeros(300, 4, 4)
    perturbation[torch.tensor([7, 250])] = 1.0
    panels = [axes for axes in plot_perturbation(Clamp(perturbation)).axes if axes.images]
    assert len(panels) == 8
    assert {"channel 7", "channel 250"} <= {panel.get_title() for panel in panels}


def test_an_untouched_input_has_no_picture():
    with pytest.raises(ValueError, match="there is no perturbation to draw"):
        plot_perturbation(Clamp())


@pytest.mark.slow
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
    words = {"chosen": callback.result.chosen.name, "reason": callback.result.reason}
    for name, text in words.items():
        (event,) = events.Tensors(f"calibration/{name}/text_summary")
        assert event.tensor_proto.string_val[0].decode() == text
    with open(Path(loggers[1].log_dir) / "metrics.csv") as file:
        (row,) = [row for row in csv.DictReader(file) if row["calibration/temperature"]]
    assert float(row["calibration/after/nll"]) == pytest.approx(expected["calibration/after/nll"])


class Manual(LitClassifier):
    """Logs every batch and steps on every other, so that batches run ahead of the optimizer's steps."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        self.manual_backward(loss)
        if batch_idx % 2:
            self.optimizers().step()


class TwoOptimizers(Manual):
    """Two optimizers, both of which step on every batch: their steps run ahead of the batches."""

    def training_step(self, batch, batch_idx):
        loss = LitClassifier.training_step(self, batch, batch_idx)
        self.log("train_loss", loss)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return [LitClassifier.configure_optimizers(self) for _ in range(2)]


@pytest.mark.parametrize("model", [Manual, TwoOptimizers])
def test_steps_are_those_of_the_metrics_of_training_and_never_go_backwards(tmp_path, model):
    """Fails when Lightning moves the private count of steps that its own metrics are logged by."""
    logger, callback = CSVLogger(tmp_path), plain()
    run = trainer(tmp_path, callback, logger=logger, log_every_n_steps=1, max_epochs=2)
    run.fit(model(), train_loader())
    run.fit_loop.max_epochs = 3
    run.fit(run.lightning_module, train_loader())
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        steps = [(int(row["step"]), bool(row["calibration/temperature"])) for row in csv.DictReader(file)]
    assert [step for step, ours in steps if ours] == [4, 6]
    assert [step for step, _ in steps] == sorted(step for step, _ in steps)


@pytest.mark.slow
def test_mlflow_gets_numbers_and_figures(tmp_path, monkeypatch):
    # The skinny client has no other local store than files, which it wants to be asked for.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger, callback = MLFlowLogger("clamp", save_dir=str(tmp_path / "runs")), plain()
    trainer(tmp_path, callback, logger=logger, log_every_n_steps=1).fit(LitClassifier(), train_loader())
    client, run_id = logger.experiment, logger.run_id
    metrics = client.get_run(run_id).data.metrics
    assert set(metrics) >= KEYS
    assert metrics["calibration/after/nll"] == pytest.approx(callback.result.after["nll"])
    assert [point.step for point in client.get_metric_history(run_id, "calibration/temperature")] == [2]
    tags = client.get_run(run_id).data.tags
    assert tags["calibration/chosen"] == callback.result.chosen.name
    assert tags["calibration/reason"] == callback.result.reason
    written = {path.name for path in (tmp_path / "runs").rglob("artifacts/calibration/*.png")}
    assert written == {"reliability.png", "perturbation.png"}


def test_without_matplotlib_only_the_figures_are_missing(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr("lightning_clamp.report.find_spec", lambda name: None if name == "matplotlib" else found(name))
    logger, callback = TensorBoardLogger(tmp_path), plain()
    with pytest.warns(UserWarning, match="matplotlib is not installed, so no calibration figures"):
        trainer(tmp_path, callback, logger=logger, log_every_n_steps=1).fit(LitClassifier(), train_loader())
    events = EventAccumulator(logger.log_dir).Reload()
    assert set(events.Tags()["scalars"]) >= KEYS
    assert events.Tags()["images"] == []


def records(content, block=32768, header=7):
    """Records of a LevelDB log, which is what W&B writes behind seven bytes of its own."""
    whole, at = b"", header
    while at + header <= len(content):
        if block - at % block < header:
            at += block - at % block
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        if at + header + size > len(content):
            return  # it is still being written
        whole += content[at + header : at + header + size]
        at += header + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""


def written_offline(path):
    """What an offline run of W&B has written to its file, by key; the last value of each."""
    from wandb.proto.wandb_internal_pb2 import Record

    logged, parsed, ends = {}, [], time.monotonic() + 60
    # Another process writes the file, and may be a moment behind `finish`; its last record is that of the exit.
    while time.monotonic() < ends and not any(record.HasField("exit") for record in parsed):
        parsed = [Record.FromString(data) for data in records(path.read_bytes())]
    for record in parsed:
        for item in record.history.item:
            # Pictures are several items: the key, and what is told of it.
            key, *part = item.nested_key or [item.key]
            logged["/".join([key, *part])] = json.loads(item.value_json)
    return logged


@pytest.mark.slow
def test_weights_and_biases_gets_numbers_and_figures(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger, callback = WandbLogger(save_dir=tmp_path, offline=True), plain()
    trainer(tmp_path, callback, logger=logger, log_every_n_steps=1).fit(LitClassifier(), train_loader())
    summary = dict(logger.experiment.summary)
    logger.experiment.finish()
    assert summary["calibration/temperature"] == pytest.approx(float(callback.result.clamp.temperature))
    assert set(summary) >= KEYS | {"calibration/reliability", "calibration/perturbation"}
    assert summary["calibration/chosen"] == callback.result.chosen.name
    assert summary["calibration/reason"] == callback.result.reason
    assert len(list(tmp_path.rglob("media/images/calibration/*.png"))) == 2
    (file,) = tmp_path.rglob("run-*.wandb")
    logged = written_offline(file)
    assert set(logged) >= KEYS
    assert logged["calibration/after/nll"] == pytest.approx(callback.result.after["nll"])
    for picture in ("reliability", "perturbation"):
        assert logged[f"calibration/{picture}/format"] == "png"
        assert logged[f"calibration/{picture}/count"] == 1


def test_the_table_is_shown_to_the_user(tmp_path, caplog):
    with caplog.at_level("INFO"):
        trainer(tmp_path, plain(), ModelCheckpoint(tmp_path)).fit(LitClassifier(), train_loader())
    assert "calibration set     before     after" in caplog.text
    assert "-calibrated.ckpt (CalibrationModule.from_checkpoint reads it; LitClassifier.load_from_" in caplog.text


@pytest.mark.parametrize(
    "bar",
    [TQDMProgressBar(), TQDMProgressBar(refresh_rate=2), RichProgressBar(console_kwargs={"force_terminal": True})],
)
def test_progress_is_drawn_in_the_trainers_own_bar(tmp_path, bar, capsys):
    run = trainer(tmp_path, plain(), bar, enable_progress_bar=True)
    run.fit(LitClassifier(), train_loader())
    assert "Calibrating (" in "".join(capsys.readouterr())


class Unsized(list):
    """Batches whose number nobody knows."""

    __len__ = None


@pytest.mark.parametrize("bar", [TQDMProgressBar(), RichProgressBar(console_kwargs={"force_terminal": True})])
def test_progress_is_drawn_of_a_set_without_a_length(tmp_path, bar, capsys):
    run = trainer(tmp_path, bar, enable_progress_bar=True)
    calibrate(run, LitClassifier(), Unsized(loader(200, 3)), method="temperature")
    callback = NeuralClamping(Unsized(loader(200, 3)), method="temperature")
    trainer(tmp_path, callback, bar, enable_progress_bar=True).fit(LitClassifier(), train_loader())
    assert callback.result is not None
    assert "Calibrating (" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("callbacks", "enabled"),
    [([], False), ([TQDMProgressBar(refresh_rate=0)], True), ([RichProgressBar(refresh_rate=0)], True)],
)
def test_where_the_user_turned_the_bar_off_none_is_drawn(tmp_path, callbacks, enabled, capsys):
    run = trainer(tmp_path, plain(), *callbacks, enable_progress_bar=enabled)
    run.fit(LitClassifier(), train_loader())
    assert "Calibrating" not in "".join(capsys.readouterr())


def test_what_was_left_out_is_called_by_its_whole_name():
    """Beside a chosen grid, "1×1 grid" would be a riddle where only an output map on it was left out."""
    few = Refusal("too few samples for the map", "40 samples are fewer than 90")
    chosen = Candidate(1, "temperature", 4, 1.0, 4.0, achieved_gain=0.1, expected_change=-0.1, standard_error=0.01)
    chosen = replace(chosen, criterion=-0.09)
    left = [Candidate(0, "vector", 9, refusal=few), Candidate(1, "vector", 12, refusal=few)]
    words = reason(chosen, [*left, chosen])
    assert "(left out: vector and 1×1 grid + vector because 40 samples are fewer than 90)" in words


def test_one_of_a_thing_is_not_several():
    assert [counted(n, "pass", "passes") for n in (0, 1, 2)] == ["0 passes", "1 pass", "2 passes"]
    assert [counted(n, "candidate") for n in (1, 2)] == ["1 candidate", "2 candidates"]
