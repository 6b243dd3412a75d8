import os
import random
from dataclasses import fields, replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_clamp import CalibrationModule, CalibrationResult, Clamp, NeuralClamping, fit_clamp
from lightning_clamp._digest import fingerprint
from lightning_clamp._files import write_atomically
from lightning_clamp.checkpoint import (
    calibrated_checkpoint,
    calibrated_path,
    read_result,
    result_from_state,
    result_in,
    sealed,
    state_of_result,
)
from lightning_clamp.cli.files import load_weights
from lightning_clamp.restore import load_calibrated
from lightning_clamp.spec import Spec
from tests.scenarios import (
    LitClassifier,
    Segmenter,
    SmallNet,
    batches,
    images,
    loader,
    shifted_images,
    train_loader,
    trainer,
)

NAMED = Spec(batch_keys=(["a", "b"], 2))


def calibrated(clamp=None, network=None, spec=NAMED) -> CalibrationResult:
    clamp = clamp or Clamp(torch.randn(3, 8, 8), 0.5, torch.randn(4), torch.rand(4))
    network, x, y = network or SmallNet(), *shifted_images(200)[1:]
    result = replace(fit_clamp(SmallNet(2.0), batches(x, y), grids=(1,)), clamp=clamp)
    return replace(result, fingerprint=fingerprint(network), spec=spec)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A calibrated file."""
    path, model = tmp_path_factory.mktemp("small") / "small.ckpt", LitClassifier(temperature=3.0)
    torch.save(sealed(calibrated_checkpoint(model, calibrated(network=model, spec=Spec()), 0, 2)), path)
    return path


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
    assert set(state["spec"]) == {"task", "ignore_index", "batch_keys", "perturb_at", "views"}
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


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("last", "last-calibrated.ckpt"),
        ("last-calibrated", "last-calibrated.ckpt"),
        ("last-calibrated-calibrated", "last-calibrated.ckpt"),
        ("last-calibrated-v1", "last-v1-calibrated.ckpt"),
        ("un-calibrated-net", "un-calibrated-net-calibrated.ckpt"),
    ],
)
def test_what_is_calibrated_once_more_has_the_mark_once(stem, name):
    assert calibrated_path(True, "there", stem) == os.path.join("there", name)


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


def test_a_beta_map_round_trips_in_its_file(tmp_path):
    x = 3 * torch.randn(1000, 1, generator=torch.Generator().manual_seed(0))
    y = (x > 1).float()
    y[::9] = 1 - y[::9]
    first = fit_clamp(nn.Identity(), batches(x, y), task="binary", grids=(), output_maps=("beta",))
    torch.save(state_of_result(first), tmp_path / "state.pt")
    again = result_from_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.chosen.output_map == "beta"
    assert again.clamp.skew.shape == (1,)
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


WRONG = {
    "YAML": b"model:\n  class_path: my.Model\n",
    "CSV": b"epoch,step,loss\n0,1,2.5\n",
    "text": "Nothing to load: naïve, Ω\n".encode(),
    "a number": b"5\n",
    "pickle opcodes": b"IKGLVScIcopyreg\n",
    "half": lambda whole: whole[: len(whole) // 2],
    "the first bytes": lambda whole: whole[:100],
    "zeros": lambda whole: bytes(len(whole)),
}


@pytest.mark.parametrize("content", WRONG.values(), ids=WRONG)
def test_a_wrong_file_costs_one_sentence(small, tmp_path, content):
    path = tmp_path / "wrong.ckpt"
    path.write_bytes(content if isinstance(content, bytes) else content(small.read_bytes()))
    for read in (read_result, lambda file: CalibrationModule.from_checkpoint(file, LitClassifier)):
        with pytest.raises(ValueError, match=r"'.*wrong.ckpt' is damaged, or no checkpoint") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_a_folder_costs_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder: pass the file whose name ends in .ckpt"):
        read_result(tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_of_500_flipped_bits_none_changes_an_output(small, tmp_path):
    def outputs(path):
        network, result = load_calibrated(path, LitClassifier, None, {})
        return result.clamp.scale(network(result.clamp.perturb(x)))

    whole, path, x, draw = small.read_bytes(), tmp_path / "flipped.ckpt", images(8), random.Random(0)
    expected, refused = outputs(small), 0
    every = 8 * len(whole) // 500
    for start in range(0, 500 * every, every):
        bit, flipped = start + draw.randrange(every), bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert torch.equal(outputs(path), expected), bit
        except ValueError:
            refused += 1
    assert 300 < refused < 400, "what is left is padding and the headers of the parts"


def edited(content, part):
    """A calibrated file after somebody changed something in it."""
    state, weights = content["callbacks"]["NeuralClamping"], content["state_dict"]
    change = {
        "weights": lambda: weights["net.linear.bias"].add_(1),
        "one bit": lambda: weights["net.linear.bias"].view(torch.int32)[0].bitwise_xor_(1),
        "a weight less": lambda: weights.pop("net.linear.bias"),
        "temperature": lambda: state["clamp"]["log_temperature"].add_(1),
        "no temperature": lambda: state["clamp"].pop("log_temperature"),
        "nan bias": lambda: state["clamp"]["class_bias"].fill_(torch.nan),
        "nan perturbation": lambda: state["clamp"]["perturbation"].fill_(torch.nan),
        "task": lambda: state["spec"].update(task="binary"),
        "fingerprint": lambda: state.update(fingerprint="0" * 32),
        "numbers": lambda: state["after"].update(nll=0.1),
        "hyperparameters": lambda: content["hyper_parameters"].update(temperature=9.0),
        "no digest": lambda: state.pop("digest"),
    }
    change[part]()
    return content


PARTS = (
    *("weights", "one bit", "a weight less", "temperature", "no temperature", "nan bias", "nan perturbation", "task"),
    *("fingerprint", "numbers", "hyperparameters", "no digest"),
)
RUNS = {
    "report": lambda path, folder: read_result(path),
    "from_checkpoint": lambda path, folder: CalibrationModule.from_checkpoint(path, LitClassifier),
    "test": lambda path, folder: trainer(folder, NeuralClamping()).test(
        LitClassifier(), loader(10, 3), ckpt_path=path, weights_only=True, verbose=False
    ),
    "calibrate": lambda path, folder: load_weights(LitClassifier(), str(path)),
}


# Of a weight less Lightning says so itself when it loads a file for a test.
@pytest.mark.parametrize(("run", "part"), [both for both in product(RUNS, PARTS) if both != ("test", "a weight less")])
def test_a_file_that_was_edited_is_refused_by_every_reader(small, tmp_path, run, part):
    path = tmp_path / "edited.ckpt"
    torch.save(edited(torch.load(small, weights_only=True), part), path)
    with pytest.raises((ValueError, MisconfigurationException), match=r"edited.ckpt' is not as it was saved"):
        RUNS[run](path, tmp_path)


@pytest.mark.parametrize("part", [part for part in PARTS if part not in ("fingerprint", "hyperparameters")])
def test_a_checkpoint_of_lightning_with_an_edited_clamp_or_other_weights_is_refused(small, tmp_path, part):
    content = torch.load(small, weights_only=True)
    del content["lightning_clamp_digests"]
    torch.save(edited(content, part), tmp_path / "last.ckpt")
    message = "not as it was saved|is not the network that was calibrated|cannot be loaded into LitClassifier"
    with pytest.raises(ValueError, match=message):
        CalibrationModule.from_checkpoint(tmp_path / "last.ckpt", LitClassifier)


def test_a_clamp_of_earlier_weights_is_refused(saved, tmp_path):
    """Lightning saves the clamp of the fit before in the checkpoints of the next."""
    callback, model = saved
    run = trainer(tmp_path, callback, max_epochs=2)
    run.strategy.connect(model)
    with torch.no_grad():
        model.net.linear.bias += 0.1
    run.save_checkpoint(tmp_path / "stale.ckpt")
    with pytest.raises(ValueError, match="is not the network that was calibrated: the file was edited, or saved after"):
        CalibrationModule.from_checkpoint(tmp_path / "stale.ckpt", LitClassifier)


def test_a_file_that_is_replaced_while_it_is_read_gives_one_calibration(small, tmp_path, monkeypatch):
    """Clamp and network are read one after the other."""
    path, other = tmp_path / "it.ckpt", LitClassifier(temperature=2.0)
    path.write_bytes(small.read_bytes())
    expected = read_result(small)

    def replaced(*args):
        write_atomically(sealed(calibrated_checkpoint(other, calibrated(network=other), 0, 2)), path)
        return result_in(*args)

    monkeypatch.setattr("lightning_clamp.restore.result_in", replaced)
    module = CalibrationModule.from_checkpoint(path, LitClassifier)
    assert module.network.hparams["temperature"] == 3.0
    assert torch.equal(module.clamp.class_bias, expected.clamp.class_bias)


def test_weights_of_another_class_cost_one_sentence(small):
    with pytest.raises(ValueError, match=r"small.ckpt' cannot be loaded into Segmenter: Error\(s\) in loading"):
        CalibrationModule.from_checkpoint(small, Segmenter)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (LitClassifier(), "an instance of LitClassifier"),
        (nn.Linear, "the class Linear"),
        (CalibrationModule, "the class CalibrationModule"),
        ("LitClassifier", "an instance of str"),
        (None, "an instance of NoneType"),
    ],
)
def test_what_is_not_the_class_of_a_trained_network_costs_one_sentence(small, given, found):
    with pytest.raises(TypeError, match=f"takes the class of the LightningModule .* and got {found}; for a network"):
        CalibrationModule.from_checkpoint(small, given)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_a_network_that_was_trained_in_another_precision_is_restored(tmp_path, precision):
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    model = LitClassifier().to(dtype)
    torch.save(sealed(calibrated_checkpoint(model, calibrated(network=model), 1, 2)), tmp_path / "it.ckpt")
    network = CalibrationModule.from_checkpoint(tmp_path / "it.ckpt", LitClassifier).network
    assert torch.equal(network.net.linear.weight, model.net.linear.weight.float())


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
