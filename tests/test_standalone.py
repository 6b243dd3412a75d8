"""A model that was trained earlier, calibrated by any Trainer's own entry point."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_clamp import CalibrationModule, Clamp, NeuralClamping, calibrate, fit_clamp
from lightning_clamp.losses import ACLSMixin
from lightning_clamp.sharpness import SharpnessMonitor
from tests.scenarios import LitClassifier, assert_same, loader, trace, train_loader, trainer

OPTIONS = {"output_maps": ("temperature",), "grids": (1,)}
HELD_OUT = loader(600, seed=30)


def of_the_twin(base):
    """A class as somebody writes it who imports Lightning's twin package."""
    twin = type(base.__name__, (base,), {"__module__": "pytorch_lightning.core"})
    return type("Mine", (twin,), {})


@pytest.mark.parametrize("which", ["trainer", "model", "datamodule"])
def test_the_twin_package_of_lightning_is_named(tmp_path, which):
    given = {"trainer": trainer(tmp_path), "model": LitClassifier(), "datamodule": Data()}
    given[which].__class__ = of_the_twin(type(given[which]))
    with pytest.raises(TypeError, match=r"Mine comes from pytorch_lightning.*: write `import lightning.py"):
        calibrate(**given, **OPTIONS)


def test_the_callbacks_and_the_mixins_name_it_too(tmp_path):
    for callback, setup in ((NeuralClamping(), "setup"), (SharpnessMonitor(HELD_OUT), "on_fit_start")):
        run = trainer(tmp_path)
        run.__class__ = of_the_twin(type(run))
        with pytest.raises(TypeError, match="Mine comes from pytorch_lightning"):
            getattr(callback, setup)(run, LitClassifier(), *["fit"][: setup == "setup"])
    with pytest.raises(TypeError, match="Calibrated comes from pytorch_lightning"):
        type("Calibrated", (ACLSMixin, of_the_twin(LitClassifier)), {})


class Data(LightningDataModule):
    """Keeps a list of what it was asked."""

    def __init__(self, with_hook=True):
        super().__init__()
        self.asked = []
        if with_hook:
            self.calibration_dataloader = lambda: HELD_OUT

    def prepare_data(self):
        self.asked.append("prepare_data")

    def setup(self, stage):
        self.asked.append(f"setup {stage} of {self.trainer.world_size}")

    def val_dataloader(self):
        return loader(300, seed=31)

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] + 5, batch[1]]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] - 5, batch[1]]


def test_it_is_the_clamp_of_fit_clamp_and_the_model_is_left_alone(tmp_path):
    model = LitClassifier()
    before = trace(model)
    module = calibrate(trainer(tmp_path), model, HELD_OUT, **OPTIONS)
    assert_same(before, trace(model))
    assert module.network is not model
    expected = fit_clamp(model, HELD_OUT, **OPTIONS)
    assert module.result.after == expected.after
    for name, value in expected.clamp.state_dict().items():
        assert torch.equal(module.clamp.state_dict()[name], value)
    (metrics,) = trainer(tmp_path).test(module, loader(300, seed=50), verbose=False)
    assert metrics["calibrated/nll"] < 0.7


def test_a_datamodules_hooks_run(tmp_path):
    data = Data()
    module = calibrate(trainer(tmp_path), LitClassifier(), data, **OPTIONS)
    assert data.asked == ["prepare_data", "setup fit of 1"]
    assert module.result.n_samples == 600
    alone = calibrate(trainer(tmp_path), LitClassifier(), HELD_OUT, **OPTIONS)
    assert float(module.clamp.log_temperature) == pytest.approx(float(alone.clamp.log_temperature), abs=1e-4)


def test_for_want_of_a_calibration_set_the_validation_set_serves(tmp_path):
    with pytest.warns(UserWarning, match=r"Data has no calibration_dataloader\(\), so its validation set serves"):
        module = calibrate(trainer(tmp_path), LitClassifier(), Data(with_hook=False), **OPTIONS)
    assert module.result.n_samples == 300


def test_it_is_saved_and_logged_where_asked(tmp_path):
    logger = CSVLogger(tmp_path / "csv")
    path = tmp_path / "there" / "mine-calibrated.ckpt"
    module = calibrate(
        trainer(tmp_path, logger=logger), LitClassifier(temperature=3.0), HELD_OUT, save_to=path, **OPTIONS
    )
    x = loader(20, seed=3).dataset.tensors[0]
    assert torch.equal(CalibrationModule.from_checkpoint(path, LitClassifier)(x), module(x))
    assert "calibration/temperature" in (tmp_path / "csv/lightning_logs/version_0/metrics.csv").read_text()


def test_a_trainer_that_has_been_used_and_has_the_callback_will_do(tmp_path):
    callback = NeuralClamping(HELD_OUT, method="temperature")
    run, model = trainer(tmp_path, callback), LitClassifier()
    run.fit(model, train_loader())
    fitted = callback.calibrated_module()
    calibrate(run, model, loader(300, seed=31), **OPTIONS)
    x = loader(20, seed=3).dataset.tensors[0]
    assert torch.equal(callback.calibrated_module()(x), fitted(x))


class Failing(LitClassifier):
    def forward(self, x):
        raise OSError("no disk")


@pytest.mark.parametrize(
    ("model", "data", "options", "error", "message"),
    [
        (torch.nn.Linear(2, 2), HELD_OUT, {}, TypeError, r"got Linear: fit_clamp\(network, dataloader\) takes any"),
        (
            CalibrationModule(LitClassifier(), Clamp()),
            HELD_OUT,
            {},
            TypeError,
            "got CalibrationModule, .* its `network`",
        ),
        (torch.compile(LitClassifier(), backend="eager"), HELD_OUT, {}, TypeError, "pass the one before torch.compile"),
        (HELD_OUT, None, {}, TypeError, r"got DataLoader: call calibrate\(trainer, model, dataloaders\)"),
        (LitClassifier(), HELD_OUT, {"epochs": 3}, TypeError, '`epochs` is an option of method="published"'),
        (LitClassifier(), [], {}, MisconfigurationException, "The calibration set is empty"),
        (LitClassifier(), iter([]), {}, MisconfigurationException, "must be a DataLoader or a list of batches"),
        (Failing(), HELD_OUT, {}, OSError, "no disk"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(tmp_path, model, data, options, error, message):
    with pytest.raises(error, match=message):
        calibrate(trainer(tmp_path), model, data, **options)


def test_a_trainer_that_does_not_validate_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="which this Trainer skips: remove limit_val_batches=0"):
        calibrate(trainer(tmp_path, limit_val_batches=0), LitClassifier(), HELD_OUT)


class WithItsData(LitClassifier):
    """Makes its data in setup, as the Trainer calls it before a fit."""

    def prepare_data(self):
        self.prepared = True

    def setup(self, stage):
        assert self.prepared
        assert self.trainer.world_size == 1
        self.parts = {"fit": HELD_OUT}[stage]

    def calibration_dataloader(self):
        return self.parts


def test_a_model_may_come_with_its_data(tmp_path):
    expected = calibrate(trainer(tmp_path), LitClassifier(), HELD_OUT, **OPTIONS)
    module = calibrate(trainer(tmp_path), WithItsData(), **OPTIONS)
    assert torch.equal(module.clamp.log_temperature, expected.clamp.log_temperature)


def test_the_calibration_set_is_the_datamodules_then_the_models(tmp_path):
    """As for the callback: any calibration set comes before any validation set."""
    model = WithItsData()
    model.prepared, model.calibration_dataloader = True, lambda: loader(500, seed=33)
    assert calibrate(trainer(tmp_path), model, Data(), **OPTIONS).result.n_samples == 600
    assert calibrate(trainer(tmp_path), model, Data(with_hook=False), **OPTIONS).result.n_samples == 500


def test_data_without_a_calibration_set_are_refused_in_a_sentence(tmp_path):
    with pytest.raises(MisconfigurationException, match="no calibration set: give LightningDataModule a `calibration_"):
        calibrate(trainer(tmp_path), LitClassifier(), LightningDataModule())
    with pytest.raises(MisconfigurationException, match="no calibration set: give LitClassifier a `calibration_"):
        calibrate(trainer(tmp_path), LitClassifier())
    with pytest.raises(MisconfigurationException, match="no submodule 'nett' to perturb at: did you mean 'net'"):
        calibrate(trainer(tmp_path), LitClassifier(), HELD_OUT, perturb_at="nett")


def test_a_datamodule_may_be_named_and_is_not_for_beside_loaders(tmp_path):
    named = calibrate(trainer(tmp_path), LitClassifier(), datamodule=Data(), **OPTIONS)
    assert named.result.n_samples == 600
    with pytest.raises(
        MisconfigurationException, match="Pass `dataloaders` or a `datamodule` to calibrate on, not both"
    ):
        calibrate(trainer(tmp_path), LitClassifier(), HELD_OUT, Data())


@pytest.mark.parametrize(
    ("save_to", "where"),
    [("folder", "folder/epoch=0-step=0-calibrated.ckpt"), ("mine.ckpt", "mine.ckpt"), (False, None), (True, None)],
)
def test_where_it_is_saved(tmp_path, save_to, where):
    place = save_to if isinstance(save_to, bool) else tmp_path / save_to
    calibrate(trainer(tmp_path), LitClassifier(), HELD_OUT, save_to=place, **OPTIONS)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.ckpt")] == ([] if where is None else [where])


def test_the_name_has_the_epoch_that_trained_last(tmp_path):
    run, model = trainer(tmp_path, ModelCheckpoint(tmp_path / "here"), max_epochs=2), LitClassifier()
    run.fit(model, train_loader())
    calibrate(run, model, HELD_OUT, save_to=True, **OPTIONS)
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == [
        "epoch=1-step=4-calibrated.ckpt",
        "epoch=1-step=4.ckpt",
    ]


@pytest.mark.parametrize("name", ["~/runs", "~/runs/mine.ckpt"])
def test_a_place_in_the_home_folder(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    calibrate(trainer(tmp_path), LitClassifier(), HELD_OUT, save_to=name, **OPTIONS)
    (saved,) = tmp_path.rglob("*.ckpt")
    assert saved.parent == tmp_path / "runs"


def test_a_place_that_is_none_is_refused_before_any_work(tmp_path):
    with pytest.raises(
        ValueError, match=r"`save_to` must be a folder, a file that ends in .ckpt, True or False, got 5"
    ):
        calibrate(trainer(tmp_path), LitClassifier(), HELD_OUT, save_to=5)


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_a_file_of_another_kind_is_not_taken_for_a_folder(tmp_path, name):
    with pytest.raises(ValueError, match=rf"a file that ends in .ckpt, .* got '.*{name}'"):
        calibrate(trainer(tmp_path), LitClassifier(), HELD_OUT, save_to=str(tmp_path / name))
    with pytest.raises(ValueError, match=rf"a file that ends in .ckpt, .* got .*{name}"):
        NeuralClamping(save_to=tmp_path / name)


def test_a_class_is_not_calibrated(tmp_path):
    with pytest.raises(TypeError, match=r"got the class LitClassifier: pass one, LitClassifier\(\.\.\.\)"):
        calibrate(trainer(tmp_path), LitClassifier, HELD_OUT)
    with pytest.raises(TypeError, match=r"got the class LitClassifier: pass one"):
        CalibrationModule(LitClassifier, Clamp())


class LogsInForward(LitClassifier):
    def forward(self, x):
        self.log("mean", x.mean())
        return super().forward(x)


def test_a_forward_that_logs_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"`self.log\(\)`.* or `if self.training`"):
        calibrate(trainer(tmp_path), LogsInForward(), HELD_OUT)
