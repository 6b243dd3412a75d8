import os
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_clamp import CalibrationModule, CalibrationResult, Clamp, NeuralClamping, fit_clamp
from lightning_clamp._digest import fingerprint
from lightning_clamp.checkpoint import (
    calibrated_checkpoint,
    read_result,
    result_from_state,
    state_of_result,
)
from lightning_clamp.spec import Spec
from tests.scenarios import LitClassifier, SmallNet, batches, images, loader, shifted_images, train_loader, trainer


def calibrated(clamp=None, network=None) -> CalibrationResult:
    clamp = clamp or Clamp(torch.randn(3, 8, 8), 0.5, torch.randn(4), torch.rand(4))
    network, x, y = network or SmallNet(), *shifted_images(200)[1:]
    result = replace(fit_clamp(SmallNet(2.0), batches(x, y), grids=(1,)), clamp=clamp)
    return replace(result, fingerprint=fingerprint(network), spec=Spec(batch_keys=(["a", "b"], 2)))


@pytest.fixture
def saved(tmp_path):
    callback = NeuralClamping(loader(1000, seed=30), output_maps=("temperature",))
    run, model = trainer(tmp_path, callback, ModelCheckpoint(tmp_path)), LitClassifier(temperature=3.0)
    run.fit(model, train_loader())
    return callback, model


def test_the_saved_file_restores_the_calibrated_model(saved, tmp_path):
    callback, _ = saved
    path = callback.checkpoint_path
    assert os.path.dirname(path) == str(tmp_path)
    assert path.endswith("epoch=0-step=2-calibrated.ckpt")
    module = CalibrationModule.from_checkpoint(path, LitClassifier)
    x = images(20)
    assert torch.equal(module(x), callback.calibrated_module()(x))
    assert module.network.hparams["temperature"] == 3.0
    torch.testing.assert_close(module.predict_proba(x).sum(1), torch.ones(20))


def test_the_saved_file_is_a_checkpoint_of_the_network_and_loads_safely(saved):
    callback, model = saved
    content = torch.load(callback.checkpoint_path, weights_only=True)
    state = content["callbacks"][callback.state_key]
    assert set(state) == {"format", "digest", *(field.name for field in fields(CalibrationResult))}
    assert set(state["spec"]) == {"task", "ignore_index", "batch_keys", "perturb_at"}
    again = LitClassifier.load_from_checkpoint(callback.checkpoint_path, weights_only=True)
    assert fingerprint(again) == fingerprint(model) == state["fingerprint"]


def test_no_half_written_file_is_left(saved, tmp_path):
    assert sorted(path.name for path in tmp_path.glob("*.ckpt*")) == [
        "epoch=0-step=2-calibrated.ckpt",
        "epoch=0-step=2.ckpt",
    ]


def test_nothing_is_saved_where_the_user_saves_nothing_or_says_so(tmp_path):
    for callback, others in (
        (NeuralClamping(loader(200, 1)), []),
        (NeuralClamping(loader(200, 1), save_to=False), [ModelCheckpoint(tmp_path)]),
    ):
        trainer(tmp_path, callback, *others).fit(LitClassifier(), train_loader())
        assert callback.checkpoint_path is None
    elsewhere = NeuralClamping(loader(200, 1), save_to=tmp_path / "there")
    trainer(tmp_path, elsewhere).fit(LitClassifier(), train_loader())
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["epoch=0-step=2-calibrated.ckpt"]


def test_state_is_plain_and_round_trips(tmp_path):
    first = calibrated()
    torch.save(state_of_result(first), tmp_path / "state.pt")
    again = result_from_state(torch.load(tmp_path / "state.pt", weights_only=True))
    for name in (
        "spec",
        "fingerprint",
        "before",
        "after",
        "change",
        "candidates",
        "chosen",
        "reason",
        "history",
        "n_samples",
        "method",
    ):
        assert getattr(again, name) == getattr(first, name), name
    for curve, expected in zip(again.reliability, first.reliability, strict=True):
        torch.testing.assert_close(curve, expected, rtol=0, atol=0, equal_nan=True)
    assert again.chosen.clamp is again.clamp
    x = torch.randn(5, 4)
    assert torch.equal(again.clamp.scale(x), first.clamp.scale(x))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged, or no checkpoint"),
        (b"not a checkpoint at all", "is damaged, or no checkpoint"),
        ({"state_dict": {}}, "holds no clamp: pass the file whose name ends in -calibrated.ckpt"),
        ([1, 2], "holds no clamp"),
        ({"callbacks": {"NeuralClamping": {"format": 99}}}, "has format 99, and this version reads format 4"),
        ({"callbacks": {}, "evil": SimpleNamespace()}, "is damaged, or no checkpoint that can be loaded safely"),
    ],
)
def test_a_foreign_or_damaged_file_costs_one_sentence(tmp_path, content, message):
    path = tmp_path / "file.ckpt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=message) as caught:
        read_result(path)
    assert "\n" not in str(caught.value)


def test_a_truncated_file_costs_one_sentence(saved, tmp_path):
    callback, _ = saved
    whole = Path(callback.checkpoint_path).read_bytes()
    (tmp_path / "half.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        CalibrationModule.from_checkpoint(tmp_path / "half.ckpt", LitClassifier)


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_result(tmp_path / "nowhere.ckpt")


class Needy(LightningModule):
    """Takes a network, which no safe checkpoint can hold."""

    def __init__(self, net: nn.Module, width: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = net

    def forward(self, x):
        return self.net(x)


@pytest.mark.filterwarnings("ignore:Attribute 'net' is an instance of `nn.Module`")
def test_hyperparameters_that_cannot_be_loaded_safely_are_named_and_given_again(tmp_path):
    model = Needy(SmallNet(), width=7)
    with pytest.warns(UserWarning, match="The hyperparameters net are objects that a safe load refuses"):
        torch.save(calibrated_checkpoint(model, calibrated(network=model), 1, 2), tmp_path / "needy.ckpt")
    with pytest.raises(TypeError, match=r"Needy could not be built from .* pass its arguments to from_checkpoint"):
        CalibrationModule.from_checkpoint(tmp_path / "needy.ckpt", Needy)
    module = CalibrationModule.from_checkpoint(tmp_path / "needy.ckpt", Needy, net=SmallNet())
    assert module.network.hparams["width"] == 7


class OneArgument(LightningModule):
    """Keeps all hyperparameters in one argument."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.save_hyperparameters(config)
        self.net = SmallNet(config["temperature"])

    def forward(self, x):
        return self.net(x)


def test_hyperparameters_in_one_argument_come_back_as_one(tmp_path):
    """Fails when Lightning moves the private name that the checkpoint needs for this."""
    model = OneArgument({"temperature": 3.0})
    torch.save(calibrated_checkpoint(model, calibrated(network=model), 1, 2), tmp_path / "one.ckpt")
    module = CalibrationModule.from_checkpoint(tmp_path / "one.ckpt", OneArgument)
    assert module.network.net.temperature == 3.0


def test_the_modules_own_checkpoint_hooks_are_called(tmp_path):
    class Hooked(LitClassifier):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["extra"] = 5

        def on_load_checkpoint(self, checkpoint):
            self.extra = checkpoint["extra"]

    model = Hooked()
    torch.save(calibrated_checkpoint(model, calibrated(network=model), 1, 2), tmp_path / "hooked.ckpt")
    assert CalibrationModule.from_checkpoint(tmp_path / "hooked.ckpt", Hooked).network.extra == 5


def test_the_saved_file_serves_as_ckpt_path_and_a_later_lightning_checkpoint_as_calibrated(saved, tmp_path):
    callback, _ = saved
    data, fresh = loader(100, 3), NeuralClamping()
    expected = callback.calibrated_module()(data.dataset.tensors[0])
    run = trainer(tmp_path, fresh)
    predicted = run.predict(LitClassifier(temperature=3.0), data, ckpt_path=callback.checkpoint_path, weights_only=True)
    torch.testing.assert_close(torch.cat(predicted), expected)
    run.save_checkpoint(tmp_path / "later.ckpt")
    again = CalibrationModule.from_checkpoint(tmp_path / "later.ckpt", LitClassifier)
    torch.testing.assert_close(again(data.dataset.tensors[0]), expected)


def test_the_clamp_is_read_to_the_cpu_wherever_it_was_saved(tmp_path, monkeypatch):
    """A file written on a GPU opens on a machine without one."""
    seen = {}
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: seen.update(k) or load(*a, **k))
    torch.save({"callbacks": {"NeuralClamping": state_of_result(calibrated())}}, tmp_path / "x.ckpt")
    read_result(tmp_path / "x.ckpt")
    assert seen["map_location"] == "cpu"
    assert seen["weights_only"] is True
