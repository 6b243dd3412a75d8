import copy
import logging
import math
import pickle
import threading
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_clamp
from lightning_clamp import CalibrationModule, Clamp, Groups, NeuralClamping, calibrate, fit_clamp, shifted_priors
from lightning_clamp.metrics import by_group, calibration_test, negative_log_likelihood
from lightning_clamp.spec import Spec
from tests.scenarios import SHIFT, LitClassifier, SmallNet, images, loader, train_loader, trainer


def test_forward_is_scale_of_network_of_perturb():
    network, clamp, x = SmallNet(), Clamp(torch.randn(3, 8, 8), 0.4, torch.randn(4)), images(7)
    module = CalibrationModule(network, clamp)
    assert torch.equal(module(x), clamp.scale(network(clamp.perturb(x))))
    assert torch.equal(module.predict_proba(x), module(x).softmax(1))


def test_a_one_logit_head_predicts_sigmoids():
    module = CalibrationModule(torch.nn.Linear(2, 1), Clamp(log_temperature=0.5), task="binary")
    x = torch.randn(4, 2)
    assert torch.equal(module.predict_proba(x), module(x).sigmoid())


def test_test_logs_metrics_and_predict_returns_logits(tmp_path):
    module, data = CalibrationModule(LitClassifier(), Clamp(log_temperature=0.7)), loader(250, 1)
    (metrics,) = trainer(tmp_path).test(module, data, verbose=False)
    x, y = data.dataset.tensors
    assert metrics["calibrated/nll"] == pytest.approx(float(F.cross_entropy(module(x), y)), rel=1e-5)
    assert metrics["calibrated/accuracy"] == pytest.approx(float((module(x).argmax(1) == y).double().mean()))
    assert 0 <= metrics["calibrated/ece"] <= 1
    torch.testing.assert_close(torch.cat(trainer(tmp_path).predict(module, data)), module(x))
    bare = DataLoader(x, batch_size=100)
    torch.testing.assert_close(torch.cat(trainer(tmp_path).predict(module, bare)), module(x))


def drifted(n: int, temperature: float):
    """A calibrated network after a clamp of T, and held-out data."""
    return CalibrationModule(LitClassifier(temperature=1.0), Clamp(log_temperature=math.log(temperature))), loader(
        n, 1, shift=False
    )


@pytest.mark.parametrize(("temperature", "words"), [(1.0, "Nothing speaks"), (2.0, "the clamp is off: T would be ")])
def test_a_test_says_whether_the_clamp_still_holds(temperature, words, tmp_path, caplog):
    module, data = drifted(2000, temperature)
    x, y = data.dataset.tensors
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        (numbers,) = trainer(tmp_path).test(module, data, verbose=False)
    evidence = calibration_test(module(x), y)
    for name, value in evidence.scalars().items():
        assert numbers[f"calibrated/{name}"] == pytest.approx(value, rel=1e-4, abs=1e-7)
    assert numbers["calibrated/best_temperature"] == pytest.approx(float(evidence.temperature) * temperature, rel=1e-5)
    documented = (Path(lightning_clamp.__file__).parents[1] / "docs" / "loggers.md").read_text()
    assert not [key for key in numbers if f"`{key}`" not in documented]
    (sentence,) = [line for line in caplog.messages if "2,000 samples" in line]
    assert words in sentence
    again = trainer(tmp_path).test(module, data, verbose=False)
    assert again == [numbers], "nothing is left of the first test"


def test_a_one_logit_head_is_tested_too(tmp_path):
    network, x, y = one_column()
    module = CalibrationModule(network, Clamp(), task="binary")
    data = DataLoader(TensorDataset(x, y), batch_size=90)
    (numbers,) = trainer(tmp_path).test(module, data, verbose=False)
    assert numbers["calibrated/p"] < 0.01
    assert numbers["calibrated/best_temperature"] == pytest.approx(2, abs=0.6)


def test_nothing_in_it_is_trained():
    module = CalibrationModule(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout()), Clamp())
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not any(part.training for part in module.train().modules())


def test_a_test_batch_that_is_no_pair_is_refused_in_one_sentence(tmp_path):
    module = CalibrationModule(SmallNet(), Clamp())
    data = DataLoader(images(20), batch_size=10)
    with pytest.raises(TypeError, match=r"Every batch must be a pair \(inputs, target\), got Tensor"):
        trainer(tmp_path).test(module, data, verbose=False)


def one_column(n: int = 400):
    """A network of one logit, twice too sure, and labels."""
    network = nn.Sequential(nn.Linear(3, 1))
    x = torch.randn(n, 3)
    y = torch.rand(n, 1) < (network(x) / 2).detach().sigmoid()
    return network, x, y.long()


def test_a_result_brings_its_settings_along():
    network, x, y = one_column()
    result = fit_clamp(network, [(x, y)], task="binary", ignore_index=7)
    module = CalibrationModule.from_result(network, result)
    assert module.spec == result.spec == Spec("binary", 7)
    torch.testing.assert_close(module.predict_proba(x), module(x).sigmoid())
    assert module.result is result
    assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("shape", [(-1, 1), (-1,)])
def test_one_logit_is_not_taken_for_a_softmax(shape):
    """Over one column it would be 1 everywhere."""
    network, x, y = one_column()
    clamp = fit_clamp(network, [(x, y)], task="binary").clamp
    module = CalibrationModule(nn.Sequential(network, nn.Flatten(0) if len(shape) == 1 else nn.Identity()), clamp)
    for call in (module, module.predict_proba):
        with pytest.raises(ValueError, match=r'for a one-logit .* say task="binary"'):
            call(x)


def test_one_input_without_the_axis_of_the_batch_is_told_how_to_get_it():
    module, x = CalibrationModule(nn.Linear(3, 2), Clamp()), torch.randn(3)
    with pytest.raises(ValueError, match=r"a single input needs the axis of the batch, x\[None\]"):
        module(x)
    assert module(x[None]).shape == (1, 2)


def test_a_calibrated_file_is_loaded_with_the_network_s_class():
    with pytest.raises(TypeError, match=r"CalibrationModule.from_checkpoint\(path, YourModule\)"):
        CalibrationModule.load_from_checkpoint("x.ckpt")


class Labelled(nn.Module):
    """As HuggingFace's networks: arguments by name, a loss where there are labels."""

    def __init__(self):
        super().__init__()
        self.net = SmallNet()

    def forward(self, pixel_values, mask=None, labels=None):
        logits = self.net(pixel_values if mask is None else pixel_values * mask)
        return {"loss": None if labels is None else F.cross_entropy(logits, labels), "logits": logits}


def test_a_batch_by_its_names_is_what_the_network_s_forward_takes():
    network, x, y = Labelled(), images(6), torch.zeros(6).long()
    mask = torch.ones(6, 1, 1, 1)
    scaling, moving = Clamp(log_temperature=0.5), Clamp(torch.ones(3, 8, 8), 0.5)
    module = CalibrationModule(network, scaling)
    expected = module(x)
    for batch in (
        {"pixel_values": x},
        {"pixel_values": x, "labels": y},
        {"labels": y, "mask": mask, "pixel_values": x},
    ):
        assert torch.equal(module(**batch), expected)
        assert torch.equal(module(batch), expected)
    moved = CalibrationModule(network, moving, batch_keys=("pixel_values", "labels"))
    assert torch.equal(moved(pixel_values=x, labels=y), moving.scale(network.net(moving.perturb(x))))
    assert torch.equal(moved(pixel_values=x), moved(x))
    assert torch.equal(CalibrationModule(network, moving)(pixel_values=x), moved(x))
    keys = (["pixel_values", "mask"], "labels")
    several = CalibrationModule(network, scaling, batch_keys=keys)
    assert torch.equal(several(pixel_values=x, mask=mask, labels=y), expected)
    assert torch.equal(several(pixel_values=x, mask=mask), expected)


class Unlucky(nn.Module):
    def forward(self, inputs, labels=None):
        return inputs


def test_an_argument_of_the_network_may_be_called_as_the_module_s_own():
    x = torch.randn(3, 4)
    assert torch.equal(CalibrationModule(Unlucky(), Clamp())(inputs=x, labels=x), x)


def test_a_perturbation_is_not_left_out_where_inputs_cannot_be_told_apart():
    module, x = CalibrationModule(Labelled(), Clamp(torch.ones(3, 8, 8))), images(2)
    for call in (lambda: module(pixel_values=x, labels=x), lambda: module({"pixel_values": x, "labels": x})):
        with pytest.raises(ValueError, match=r"fitted to one input, and which of 'pixel_values', 'labels' is it\?"):
            call()
    for call in (lambda: module(x, x), lambda: module((x, x))):
        with pytest.raises(ValueError, match=r"fitted to one input, and which of 0, 1 is it\?"):
            call()


@pytest.mark.parametrize("arguments", [((), {}), ((images(1),), {"x": images(1)})])
def test_a_call_with_nothing_or_both_is_refused(arguments):
    module = CalibrationModule(SmallNet(), Clamp())
    with pytest.raises(TypeError, match=r"is called with a batch of inputs, module\(x\), or module\(\*\*batch\)"):
        module(*arguments[0], **arguments[1])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["in place", "by torch"])
def test_copies_of_a_compiled_model_share_nothing_with_it(tmp_path, how):
    """Trained on, the original gives other outputs, and the copies those that the file gives."""
    torch.compiler.reset()
    model, held_out, x = LitClassifier(), loader(500, 1), images(20)
    callback = NeuralClamping(held_out, method="temperature", save_to=tmp_path)
    run = trainer(tmp_path, callback)
    if how == "in place":
        model.compile(backend="eager")
    run.fit(torch.compile(model, backend="eager") if how == "by torch" else model, train_loader())
    copies = [callback.calibrated_module(), calibrate(trainer(tmp_path), model, held_out, method="temperature")]
    expected = CalibrationModule.from_checkpoint(callback.checkpoint_path, LitClassifier)(x)
    with torch.no_grad():
        model.net.linear.weight.mul_(2)
    for module in copies:
        torch.testing.assert_close(module(x), expected)
        assert not module(x).requires_grad


def test_a_model_that_cannot_be_copied_is_refused_by_the_name_of_its_attribute(tmp_path):
    model, held_out = LitClassifier(), loader(100, 1)
    model.lock = threading.Lock()
    callback = NeuralClamping(held_out, method="temperature")
    trainer(tmp_path, callback).fit(model, train_loader())
    for copied in (callback.calibrated_module, lambda: calibrate(trainer(tmp_path), model, held_out)):
        with pytest.raises(TypeError, match="LitClassifier cannot be copied because of its attribute 'lock' of type"):
            copied()
    model.lock = None
    callback.calibrated_module()


def test_an_unknown_setting_names_the_nearest():
    with pytest.raises(TypeError, match="CalibrationModule has no argument `batch_key`: did you mean `batch_keys`"):
        CalibrationModule(SmallNet(), Clamp(), batch_key=(0, 1))


def test_a_result_prints_as_its_table():
    network, x, y = one_column()
    printed = repr(fit_clamp(network, [(x, y)], task="binary"))
    assert printed.startswith("calibration set     before     after    change")
    assert "chosen: " in printed
    assert len(printed) < 1000


def grouped(n: int, n_groups: int = 3) -> DataLoader:
    """Images, labels, and groups of which the last has few samples."""
    x, y = loader(n, 1).dataset.tensors
    groups = (torch.arange(n) * n_groups // (n - 40)).clamp(max=n_groups)
    return DataLoader(TensorDataset(x, y, groups), batch_size=100)


class InPlace(nn.Module):
    """A network that changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.net = SmallNet()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.sub_(0.5))


def test_a_network_that_changes_its_input_in_place_is_told_by_group_what_it_would_say_alone(tmp_path):
    network, data = InPlace(), grouped(640)
    x, y, groups = data.dataset.tensors
    values, _ = by_group(negative_log_likelihood, network.net(x - 0.5), y, groups, n_groups=4)
    module = CalibrationModule(network, Clamp(log_temperature=0.4), batch_keys=(0, 1))
    module.groups = Groups(2, 4)
    (numbers,) = trainer(tmp_path).test(module, data, verbose=False)
    assert numbers["bare/groups/0/nll"] == pytest.approx(float(values[0]), rel=1e-5)


@pytest.mark.parametrize("where", [None, "net"])
def test_a_test_by_group_has_both_sides_and_the_sizes(where, tmp_path, caplog):
    """Also where a hook inside the network adds the perturbation."""
    network, clamp, data = LitClassifier(), Clamp(SHIFT.expand(3, 8, 8), math.log(2.0)), grouped(640)
    x, y, groups = data.dataset.tensors
    expected = {
        "bare": by_group(negative_log_likelihood, network(x), y, groups, n_groups=4),
        "calibrated": by_group(negative_log_likelihood, clamp.scale(network(clamp.perturb(x))), y, groups, n_groups=4),
    }
    module = CalibrationModule(network, clamp, batch_keys=(0, 1), perturb_at=where)
    module.groups = Groups(2, ["Basel", "Bern", "Chur", "Zug"])
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        (numbers,) = trainer(tmp_path, logger=TensorBoardLogger(tmp_path)).test(module, data, verbose=False)
    for side, (values, _) in expected.items():
        for name, value in zip(["Basel", "Bern", "Chur"], values, strict=False):
            assert numbers[f"{side}/groups/{name}/nll"] == pytest.approx(float(value), rel=1e-5)
            assert f"{side}/groups/{name}/ece" in numbers
    assert not [name for name in numbers if "Zug" in name], "40 samples are too few to say"
    (table,) = [line for line in caplog.messages if "worst by 2" in line]
    assert "too few samples to say: 1 of 4 groups" in table
    assert "200" in table
    assert clamp.perturbation is not None
    assert "calibrated/groups/ece" in {image.tag for image in images_of(tmp_path)}


def images_of(folder):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    events = [event for path in folder.rglob("events.out*") for event in EventFileLoader(str(path)).Load()]
    return [value for event in events for value in event.summary.value]


def test_several_sets_are_tested_one_by_one(tmp_path):
    module = CalibrationModule(LitClassifier(), Clamp())
    with pytest.raises(
        MisconfigurationException, match=r"there are 2 loaders: call trainer.test\(module, loader\) for"
    ):
        trainer(tmp_path).test(module, [loader(100, 1), loader(100, 2)], verbose=False)
    (numbers,) = trainer(tmp_path).test(module, [loader(100, 1)], verbose=False)
    assert "calibrated/nll" in numbers


def test_groups_that_will_not_do_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`names` must be a whole number of at least 1, got 0"):
        Groups("site", [])
    with pytest.raises(ValueError, match=r"`names` must differ from each other, got \['a', 'a'\]"):
        Groups("site", ["a", "a"])
    module = CalibrationModule(LitClassifier(), Clamp(), batch_keys=(0, 1))
    for groups, message in (
        (Groups("site", 4), "A batch has no entry 'site', which `groups` names: got list of 3 items"),
        (Groups(2, 2), r"Groups must lie in \[0, 1\], got 2"),
        (["a", "b"], r"must be Groups\(key, names\), such as Groups\(2, .*, got \['a', 'b'\]"),
    ):
        module.groups = groups
        with pytest.raises((TypeError, ValueError), match=message):
            trainer(tmp_path).test(module, grouped(640), verbose=False)


class OnDevice(LitClassifier):
    """Converts and shifts its images on the way to the device, as is done for speed."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch[0].float() / 8, batch[1]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0] + SHIFT, batch[1]

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


def raw_images(n: int, seed: int) -> DataLoader:
    """Data of :class:`OnDevice`."""
    pixels, target = loader(n, seed).dataset.tensors
    return DataLoader(TensorDataset((pixels * 8).double(), target), batch_size=100)


def test_the_hooks_that_change_batches_run_for_the_calibrated_module_too(tmp_path):
    clamping = NeuralClamping(raw_images(300, 1), grids=())
    run, data = trainer(tmp_path, clamping, ModelCheckpoint(tmp_path)), raw_images(200, 3)
    model = OnDevice()
    run.fit(model, raw_images(100, 5))
    expected = torch.cat(run.predict(model, data))
    (own,) = run.test(model, data, verbose=False)
    module = clamping.calibrated_module()
    loaded = CalibrationModule.from_checkpoint(clamping.checkpoint_path, OnDevice)
    for one in (module, loaded, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(torch.cat(trainer(tmp_path).predict(one, data)), expected)
        (measured,) = trainer(tmp_path).test(one, data, verbose=False)
        assert measured["calibrated/nll"] == pytest.approx(own["test_nll"], abs=1e-6)
    torch.testing.assert_close(shifted_priors(module, data, labelled=data).before, expected.double().softmax(1).mean(0))


class Preparing(LightningDataModule):
    def test_dataloader(self):
        return raw_images(200, 3)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0].float() * 0, batch[1]


def test_a_datamodules_hook_runs_and_no_warning_says_that_there_are_two(tmp_path):
    module = CalibrationModule(LitClassifier(), Clamp())
    # A warning is an error.
    (measured,) = trainer(tmp_path).test(module, datamodule=Preparing(), verbose=False)
    _, target = raw_images(200, 3).dataset.tensors
    blank = module.network(torch.zeros(200, 3, 8, 8))
    assert measured["calibrated/nll"] == pytest.approx(float(F.cross_entropy(blank, target)), abs=1e-5)
