"""The callback in a Trainer's life: what it does, what it refuses, and what it never touches."""

import copy
import errno
import os
import random
import signal
import warnings

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_clamp import CalibrationModule, NeuralClamping, calibrate, fit_clamp
from tests.scenarios import (
    SHIFT,
    LitClassifier,
    SmallNet,
    Validating,
    assert_same,
    images,
    loader,
    sampled,
    trace,
    train_loader,
    trainer,
)


@pytest.fixture(scope="module")
def calibration_set():
    return loader(2000, seed=30, size=500)


@pytest.fixture
def fitted(tmp_path, calibration_set):
    """A finished fit with a clamp that moves the input."""
    callback = NeuralClamping(calibration_set, output_maps=("temperature",))
    run, model = trainer(tmp_path, callback, ModelCheckpoint(tmp_path)), LitClassifier()
    run.fit(model, train_loader())
    return run, model, callback


def test_fit_ends_with_a_calibrated_model(fitted):
    _, model, callback = fitted
    result = callback.result
    assert result.after["nll"] < result.before["nll"]
    assert result.after["ece"] < result.before["ece"]
    assert result.chosen.grid == 1
    assert float(result.clamp.temperature) == pytest.approx(2, rel=0.2)
    x = images(10)
    expected = result.clamp.scale(model(result.clamp.perturb(x)))
    torch.testing.assert_close(callback.calibrated_module()(x), expected)


def test_the_calibrated_module_is_independent_and_frozen(fitted):
    _, model, callback = fitted
    module, x = callback.calibrated_module(), images(10)
    before = module(x)
    with torch.no_grad():
        model.net.linear.weight.add_(1.0)
    assert torch.equal(module(x), before)
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not module.train().network.training
    assert all(parameter.requires_grad for parameter in model.parameters())


class Snapshot(Callback):
    """Takes everything down before and after the callback under test, which stands between two of these."""

    def __init__(self):
        self.taken = None

    def on_train_end(self, trainer, pl_module):
        self.taken = trace(pl_module), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
        self.stage = trainer.state.stage


class FailingAt(LitClassifier):
    """Fails at the n-th forward after training."""

    def __init__(self, at=3, error=RuntimeError):
        super().__init__()
        self.at, self.error, self.calls, self.armed = at, error, 0, False

    def forward(self, x):
        self.calls += self.armed
        if self.calls == self.at:
            np.random.rand()  # noqa: NPY002
            raise self.error("out of memory, half-way")
        return super().forward(x)


class Arm(Callback):
    def on_train_end(self, trainer, pl_module):
        pl_module.armed = True


@pytest.mark.parametrize("fails_at", [None, 1, 3, 9])
def test_nothing_of_the_users_is_touched(tmp_path, calibration_set, fails_at):
    first, last = Snapshot(), Snapshot()
    model = FailingAt(fails_at or -1)
    model.net.conv.bias.requires_grad_(False)
    callbacks = [Arm(), first, NeuralClamping(calibration_set), last]
    run = trainer(tmp_path, *callbacks)
    message = "the model stays uncalibrated. RuntimeError: .*out of memory, half-way"
    with pytest.warns(UserWarning, match=message) if fails_at else warnings.catch_warnings():
        run.fit(model, train_loader())
    assert_same(first.taken[0], last.taken[0])
    assert (first.taken[1] == last.taken[1]).all()
    assert first.taken[2] == last.taken[2]
    assert first.stage == last.stage
    assert run.state.finished
    assert (callbacks[2].result is None) == bool(fails_at)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_training_is_the_same_with_and_without_the_callback(tmp_path, calibration_set):
    weights = []
    for callbacks in ([], [NeuralClamping(calibration_set)]):
        torch.manual_seed(1)
        model = LitClassifier()
        shuffled = DataLoader(train_loader().dataset, batch_size=50, shuffle=True)
        trainer(tmp_path, *callbacks, max_epochs=2).fit(model, shuffled)
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_failure_can_be_raised(tmp_path, calibration_set):
    run = trainer(tmp_path, Arm(), NeuralClamping(calibration_set, on_error="raise"))
    with pytest.raises(RuntimeError, match="half-way"):
        run.fit(FailingAt(2), train_loader())


def test_a_failure_of_the_report_keeps_the_clamp(tmp_path, calibration_set, monkeypatch):
    def full(*_, **__):
        raise OSError("disk full")

    callback = NeuralClamping(calibration_set)
    run = trainer(tmp_path, callback, ModelCheckpoint(tmp_path))
    monkeypatch.setattr("lightning_clamp._trainer.run.calibrated_checkpoint", full)
    with pytest.warns(
        UserWarning, match="the model is calibrated, but not all of it is saved and logged. OSError: disk full"
    ):
        run.fit(LitClassifier(), train_loader())
    assert isinstance(callback.calibrated_module(), CalibrationModule)
    assert callback.checkpoint_path is None


def softmaxed(self, x):
    return self.net(x).softmax(1)


def pairs(transform):
    x, y = images(100), sampled(SmallNet()(images(100)).detach().double())
    return DataLoader(transform(x, y), batch_size=50)


class Dicts(torch.utils.data.Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"image": self.x[i], "label": self.y[i]}


def poisoned(x, y):
    x[3] = float("nan")
    return TensorDataset(x, y)


FAILURES = {
    "probabilities": (softmaxed, TensorDataset, "returns probabilities"),
    "NaN": (None, poisoned, "NaN or infinite logits for sample 3"),
    "labels from 1": (None, lambda x, y: TensorDataset(x, y + 1), "start the labels at 0"),
    "float labels": (None, lambda x, y: TensorDataset(x, y.float()), r"use target.long\(\)"),
    "tiny": (None, lambda x, y: TensorDataset(x[:5], y[:5]), "has 5 samples; a temperature needs at least 10"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_bad_calibration_data_cost_a_sentence_and_not_the_training(tmp_path, case, monkeypatch):
    forward, transform, message = FAILURES[case]
    model = LitClassifier()
    data = pairs(transform)
    callback = NeuralClamping(data)
    if forward is not None:
        monkeypatch.setattr(LitClassifier, "forward", forward)
        monkeypatch.setattr(
            LitClassifier, "training_step", lambda self, batch, i: F.cross_entropy(self.net(batch[0]), batch[1])
        )
    run = trainer(tmp_path, callback)
    with pytest.warns(UserWarning, match=message) as caught:
        run.fit(model, train_loader())
    failure = next(str(w.message) for w in caught if "NeuralClamping failed" in str(w.message))
    assert "\n" not in failure
    assert run.state.finished
    assert callback.result is None
    with pytest.raises(RuntimeError, match="Nothing has been calibrated yet"):
        callback.calibrated_module()


# Where the calibration set comes from


class WithHook(LitClassifier):
    def calibration_dataloader(self):
        return loader(300, seed=41)


class DataModule(LightningDataModule):
    def train_dataloader(self):
        return train_loader()

    def calibration_dataloader(self):
        return loader(400, seed=42)


def sizes(tmp_path, callback, model, **fit):
    trainer(tmp_path, callback).fit(model, **fit)
    return callback.result.n_samples


def test_the_argument_comes_first_then_the_datamodule_then_the_module(tmp_path):
    given = NeuralClamping(loader(500, seed=43), method="temperature")
    assert sizes(tmp_path, given, WithHook(), datamodule=DataModule()) == 500
    hooked = NeuralClamping(method="temperature")
    assert sizes(tmp_path, hooked, WithHook(), datamodule=DataModule()) == 400
    assert sizes(tmp_path, hooked, WithHook(), train_dataloaders=train_loader()) == 300


def test_the_validation_set_is_taken_with_a_warning_and_as_far_as_the_trainer_reads_it(tmp_path):
    validation = loader(300, seed=44, size=100)
    callback = NeuralClamping(method="temperature")
    with pytest.warns(UserWarning, match="which also served to choose the model"):
        trainer(tmp_path, callback).fit(Validating(), train_loader(), validation)
    assert callback.result.n_samples == 300
    with pytest.warns(UserWarning, match="which also served to choose the model"):
        trainer(tmp_path, callback, limit_val_batches=2).fit(Validating(), train_loader(), validation)
    assert callback.result.n_samples == 200


def test_without_a_calibration_set_training_does_not_start(tmp_path):
    model = LitClassifier()
    before = trace(model)
    with pytest.raises(MisconfigurationException, match="There is no calibration set: pass"):
        trainer(tmp_path, NeuralClamping()).fit(model, train_loader())
    assert torch.equal(before["values"]["net.conv.weight"], model.net.conv.weight)


UNUSABLE = {
    "dicts": (pairs(Dicts), r"cannot use the calibration set. .* pair \(inputs, target\), got dict of image, label"),
    "inputs alone": (DataLoader(images(50), batch_size=10), r"pair \(inputs, target\), got Tensor"),
    "empty": (pairs(lambda x, y: TensorDataset(x[:0], y[:0])), "The calibration set is empty"),
    "generator": ((batch for batch in [1]), "must be a DataLoader or a list of batches, got generator"),
    "datamodule": (LightningDataModule(), "must be a DataLoader or a list of batches, got LightningDataModule"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_calibration_set_that_cannot_be_read_is_refused_before_training(tmp_path, case):
    data, message = UNUSABLE[case]
    run, model = trainer(tmp_path, NeuralClamping(data)), LitClassifier()
    with pytest.raises(MisconfigurationException, match=message):
        run.fit(model, train_loader())
    assert run.global_step == 0


@pytest.mark.filterwarnings("ignore:NeuralClamping will calibrate on the validation set")
def test_of_several_validation_loaders_none_is_guessed(tmp_path):
    class Several(Validating):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            pass

    with pytest.raises(MisconfigurationException, match="There are 2 validation loaders, and which"):
        trainer(tmp_path, NeuralClamping()).fit(Several(), train_loader(), [loader(50, 1), loader(50, 2)])


def test_the_training_set_as_calibration_set_raises_a_warning(tmp_path):
    data = train_loader()
    with pytest.warns(UserWarning, match="is the training set itself"):
        trainer(tmp_path, NeuralClamping(data)).fit(LitClassifier(), data)
    everything = data.dataset
    train, calibration = Subset(everything, range(120)), Subset(everything, range(100, 200))
    with pytest.warns(UserWarning, match="shares 20 samples with the training set"):
        trainer(tmp_path, NeuralClamping(DataLoader(calibration, 50))).fit(LitClassifier(), DataLoader(train, 50))


def test_transfer_hooks_run_as_for_validation(tmp_path, calibration_set):
    stages = []

    class Augmenting(LitClassifier):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] + 100, batch[1]]

        def on_after_batch_transfer(self, batch, dataloader_idx):
            stages.append(self.trainer.training)
            noise = torch.randn_like(batch[0]) if self.trainer.training else 0
            return [batch[0] - 100 + noise, batch[1]]

    callback = NeuralClamping(calibration_set, method="temperature")
    run = trainer(tmp_path, callback)
    run.fit(Augmenting(), train_loader())
    assert not any(stages[-4:])
    assert callback.result.passes == 1
    assert callback.result.after["nll"] < callback.result.before["nll"] < 2


# Test and predict


def nll_of(run, model, data, **options):
    return run.test(model, data, verbose=False, **options)[0]["test_nll"]


def test_test_and_predict_use_the_clamp_and_take_it_off_after(fitted):
    run, model, callback = fitted
    data = loader(500, seed=50)
    bare = nll_of(trainer(run.default_root_dir), model, data)
    module = callback.calibrated_module()
    x, y = data.dataset.tensors
    expected = float(F.cross_entropy(module(x), y))
    assert nll_of(run, model, data) == pytest.approx(expected, rel=1e-5)
    assert expected < bare - 0.05
    torch.testing.assert_close(torch.cat(run.predict(model, data)), module(x))
    assert not model._forward_hooks
    assert nll_of(trainer(run.default_root_dir), model, data) == pytest.approx(bare)


def test_the_calibrated_module_is_not_clamped_twice(fitted):
    run, _, callback = fitted
    data = loader(300, seed=51)
    module = callback.calibrated_module()
    torch.testing.assert_close(torch.cat(run.predict(module, data)), module(data.dataset.tensors[0]))
    (metrics,) = run.test(module, data, verbose=False)
    assert {"calibrated/nll", "calibrated/ece", "calibrated/accuracy"} < set(metrics)
    x, y = data.dataset.tensors
    assert metrics["calibrated/nll"] == pytest.approx(float(F.cross_entropy(module(x), y)), rel=1e-5)


@pytest.mark.parametrize("step", ["test", "predict"])
def test_a_step_that_goes_around_forward_is_an_error(tmp_path, calibration_set, step):
    class Around(LitClassifier):
        def test_step(self, batch, batch_idx):
            self.net(batch[0])

        def predict_step(self, batch, batch_idx):
            return self.net(batch[0])

    run, model = trainer(tmp_path, NeuralClamping(calibration_set)), Around()
    run.fit(model, train_loader())
    with pytest.raises(MisconfigurationException, match=rf"Around.{step}_step did not call self\(x\)"):
        getattr(run, step)(model, loader(100, 1))
    assert not model._forward_hooks


def test_a_calibrated_module_is_not_clamped_again_by_the_next(fitted):
    run, _, callback = fitted
    module, data = callback.calibrated_module(), loader(100, seed=51)
    run.predict(module, data)
    x = data.dataset.tensors[0]
    assert torch.equal(callback.calibrated_module()(x), module(x))


def test_changed_weights_are_not_paired_with_the_old_clamp(fitted, tmp_path, calibration_set):
    _, model, callback = fitted
    x = images(10)
    expected = callback.calibrated_module()(x)
    with torch.no_grad():
        model.net.linear.bias.add_(0.1)
    # The calibrated weights are in the file that was saved.
    assert torch.equal(callback.calibrated_module()(x), expected)
    unsaved = NeuralClamping(calibration_set, method="temperature")
    trainer(tmp_path, unsaved).fit(model, train_loader())
    with torch.no_grad():
        model.net.linear.bias.add_(0.1)
    with pytest.raises(RuntimeError, match=r"weights are no longer the calibrated ones .* those were not saved"):
        unsaved.calibrated_module()


@pytest.mark.filterwarnings("ignore:NeuralClamping will calibrate on the validation set")
def test_a_validation_set_that_is_loaded_late_is_found(tmp_path):
    callback = NeuralClamping(method="temperature")
    run = trainer(tmp_path, callback, max_epochs=2, check_val_every_n_epoch=2, num_sanity_val_steps=0)
    run.fit(Validating(), train_loader(), {"only": loader(300, seed=44)})
    assert callback.result.n_samples == 300


def test_other_weights_are_not_clamped(fitted):
    run, model, _ = fitted
    data = loader(200, seed=52)
    with torch.no_grad():
        model.net.linear.bias.add_(0.1)
    bare = nll_of(trainer(run.default_root_dir), model, data)
    with pytest.warns(UserWarning, match="weights are not the ones that NeuralClamping calibrated"):
        assert nll_of(run, model, data) == pytest.approx(bare)


def test_before_any_fit_the_bare_model_is_tested_with_a_warning(tmp_path):
    run = trainer(tmp_path, NeuralClamping())
    with pytest.warns(UserWarning, match="has calibrated nothing yet"):
        nll_of(run, LitClassifier(), loader(100, 1))


def test_a_keyword_call_is_clamped_as_well(tmp_path, calibration_set):
    class ByKeyword(LitClassifier):
        def predict_step(self, batch, batch_idx):
            return self(x=batch[0])

    callback = NeuralClamping(calibration_set)
    run, model = trainer(tmp_path, callback), ByKeyword()
    run.fit(model, train_loader())
    data = loader(100, 1)
    expected = callback.calibrated_module()(data.dataset.tensors[0])
    torch.testing.assert_close(torch.cat(run.predict(model, data)), expected)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_saved_after_fit_carries_the_clamp_to_another_process(fitted, tmp_path):
    run, model, callback = fitted
    run.save_checkpoint(tmp_path / "after.ckpt")
    data = loader(200, seed=53)
    expected = callback.calibrated_module()(data.dataset.tensors[0])
    fresh = NeuralClamping()
    other = trainer(tmp_path, fresh)
    predicted = other.predict(LitClassifier(), data, ckpt_path=tmp_path / "after.ckpt", weights_only=True)
    torch.testing.assert_close(torch.cat(predicted), expected)
    torch.testing.assert_close(fresh.calibrated_module()(data.dataset.tensors[0]), expected)
    with torch.no_grad():
        model.net.linear.weight.zero_()


# The rest of a Trainer's life


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_longer_fit_is_calibrated_anew(fitted):
    run, model, callback = fitted
    before = callback.result
    run.fit_loop.max_epochs = 3
    run.fit(model, train_loader())
    assert callback.result is not before
    assert callback.checkpoint_path.endswith("epoch=2-step=6-calibrated.ckpt")


def test_an_interrupted_calibration_leaves_the_model_as_it_was(tmp_path, calibration_set, caplog):
    model, first = FailingAt(4, KeyboardInterrupt), Snapshot()
    run = trainer(tmp_path, Arm(), first, NeuralClamping(calibration_set))
    with caplog.at_level("INFO"), pytest.raises(SystemExit):
        run.fit(model, train_loader())
    assert "The fit stopped with KeyboardInterrupt: the model was not calibrated." in caplog.text
    after = trace(model)
    assert_same({**first.taken[0], "rng": after["rng"], "random": after["random"]}, after)


@pytest.mark.slow
@pytest.mark.parametrize("averaging", ["ema", "swa"])
def test_it_moves_behind_callbacks_that_still_change_the_weights(tmp_path, calibration_set, averaging, caplog):
    other = EMAWeightAveraging(decay=0.5) if averaging == "ema" else StochasticWeightAveraging(1e-3, swa_epoch_start=1)
    callback = NeuralClamping(calibration_set)
    run = trainer(tmp_path, callback, other, max_epochs=3)
    model = LitClassifier(lr=0.1)
    with caplog.at_level("INFO"):
        run.fit(model, train_loader())
    assert "NeuralClamping moved behind" in caplog.text
    data = loader(200, seed=54)
    expected = callback.calibrated_module()(data.dataset.tensors[0])
    torch.testing.assert_close(torch.cat(run.predict(model, data)), expected)


def test_fast_dev_run_tries_it_on_a_few_batches_and_saves_nothing(tmp_path, calibration_set):
    callback = NeuralClamping(calibration_set)
    run = trainer(tmp_path, callback, ModelCheckpoint(tmp_path), fast_dev_run=True)
    run.fit(LitClassifier(), train_loader())
    assert callback.result.n_samples == 2000
    assert callback.checkpoint_path is None
    assert not list(tmp_path.glob("*calibrated*"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "lbfgs"}, ValueError, "`method` must be one of"),
        ({"task": "regression"}, ValueError, "`task` must be one of"),
        ({"on_error": "ignore"}, ValueError, "`on_error` must be one of"),
        ({"weights": "first"}, ValueError, "`weights` must be one of .* got 'first'"),
        ({"other_weights": "warn"}, ValueError, "`other_weights` must be one of .* got 'warn'"),
        ({"epochs": 5}, TypeError, '`epochs` is an option of method="published"'),
        ({"output_maps": ("gamma",)}, ValueError, "`output_maps` must be a sequence of names among"),
        ({"method": "published", "epochs": 0}, ValueError, "`epochs` must be a whole number of at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_refused_when_the_callback_is_made(arguments, error, message):
    with pytest.raises(error, match=message):
        NeuralClamping(**arguments)


def test_shift_is_what_the_clamp_found(fitted):
    _, _, callback = fitted
    torch.testing.assert_close(callback.result.clamp.perturbation, SHIFT.expand(3, 8, 8), rtol=0, atol=0.35)


def test_the_calibrated_module_can_be_had_while_the_model_is_tested(tmp_path):
    """The copy is of the bare model, and the test goes on with the clamp."""

    class Asking(Callback):
        def on_test_batch_end(self, trainer, pl_module, outputs, batch, *_):
            self.module, self.batch = callback.calibrated_module(), batch[0]
            self.clamped = pl_module(batch[0])

    callback, asking = NeuralClamping(loader(1000, seed=30), output_maps=("temperature",)), Asking()
    run, model = trainer(tmp_path, callback, asking), LitClassifier(lr=0.0)
    run.fit(model, train_loader())
    run.test(model, loader(200, seed=40), verbose=False)
    torch.testing.assert_close(asking.module(asking.batch), asking.clamped)
    torch.testing.assert_close(callback.calibrated_module()(asking.batch), asking.clamped)


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [("dataloader", "dataloaders"), ("calibration_dataloader", "dataloaders"), ("output_map", "output_maps")],
)
def test_an_unknown_argument_names_the_nearest(wrong, nearest):
    with pytest.raises(TypeError, match=f"NeuralClamping has no argument `{wrong}`: did you mean `{nearest}`"):
        NeuralClamping(**{wrong: None})


class Keeping(Validating):
    """Keeps activations, as people do to look at them."""

    def __init__(self):
        super().__init__()
        self.kept = {}
        self.net.conv.register_forward_hook(lambda module, args, output: self.kept.update(conv=output))

    def forward(self, x):
        self.outputs = super().forward(x)
        return self.outputs


class Remember(Callback):
    def on_train_end(self, trainer, pl_module):
        self.seen = pl_module.outputs, pl_module.kept["conv"]


@pytest.mark.slow
@pytest.mark.parametrize("validates", [True, False])
def test_kept_activations_are_those_of_training(tmp_path, calibration_set, validates):
    before, model, callback = Remember(), Keeping(), NeuralClamping(calibration_set)
    data = [train_loader(), loader(100, seed=44)] if validates else [train_loader()]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You defined a `validation_step` but have no `val_dataloader`")
        trainer(tmp_path, before, callback).fit(model, *data)
    assert model.outputs is before.seen[0]
    assert model.kept["conv"] is before.seen[1]
    # Torch copies them if they have no graph; that of training is the user's.
    if validates:
        copy.deepcopy(model)
    x = images(10)
    torch.testing.assert_close(
        callback.calibrated_module()(x), callback.result.clamp.scale(model(callback.result.clamp.perturb(x)))
    )


def test_what_could_not_be_saved_is_refused_before_training(tmp_path, calibration_set, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.ckpt").mkdir()
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("read-only") and may(path, mode))
    (tmp_path / "read-only").mkdir()
    for place, problem in {
        "file/x.ckpt": "file' is no folder",
        "file/deeper": "file' is no folder",
        "folder.ckpt": "that is a folder",
        "read-only/new/x.ckpt": "read-only' may not be written in",
    }.items():
        run = trainer(tmp_path, NeuralClamping(calibration_set, save_to=tmp_path / place))
        with pytest.raises(MisconfigurationException, match=f"cannot be saved as .*{problem}: give `save_to` another"):
            run.fit(LitClassifier(), train_loader())
        assert run.global_step == 0
        with pytest.raises(MisconfigurationException, match=f"cannot be saved as .*{problem}"):
            calibrate(trainer(tmp_path), LitClassifier(), calibration_set, save_to=tmp_path / place)
    assert not list(tmp_path.rglob("*calibrated*"))


@pytest.mark.parametrize("size", [-1, 1e9, "1 GB", True])
def test_a_cache_without_a_size_is_refused(tmp_path, size):
    words = "`cache_bytes` must be a whole number of at least 0, got"
    with pytest.raises(ValueError, match=words):
        NeuralClamping(cache_bytes=size)
    with pytest.raises(ValueError, match=words):
        calibrate(trainer(tmp_path), LitClassifier(), loader(100, 1), cache_bytes=size)
    with pytest.raises(ValueError, match=words):
        fit_clamp(SmallNet(), loader(100, 1), cache_bytes=size)


def test_a_full_disk_is_said_and_costs_no_clamp(tmp_path, calibration_set, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lightning_clamp._trainer.run.save", full)
    callback = NeuralClamping(calibration_set, save_to=tmp_path / "x.ckpt", method="temperature")
    words = "not all of it is saved and logged. OSError: .*x.ckpt' was not saved: No space left on device"
    with pytest.warns(UserWarning, match=words):
        trainer(tmp_path, callback).fit(LitClassifier(), train_loader())
    assert callback.result is not None
    with pytest.warns(UserWarning, match=words):
        module = calibrate(
            trainer(tmp_path), LitClassifier(), calibration_set, save_to=tmp_path / "x.ckpt", method="temperature"
        )
    assert module.result.after == pytest.approx(callback.result.after, abs=0.1)


@pytest.mark.parametrize(
    ("name", "near"),
    [("linear", r"did you mean 'net.linear'\?"), ("net.cnov", r"did you mean 'net.conv'\?"), ("zzz", "it has net")],
)
def test_a_submodule_that_is_not_there_names_those_near(tmp_path, calibration_set, name, near):
    run = trainer(tmp_path, NeuralClamping(calibration_set, perturb_at=name))
    with pytest.raises(MisconfigurationException, match=f"no submodule '{name}' to perturb at: {near}"):
        run.fit(LitClassifier(), train_loader())
    assert run.global_step == 0


def test_a_dry_run_says_what_its_table_is(tmp_path, calibration_set, caplog):
    callback = NeuralClamping(calibration_set, method="temperature")
    with caplog.at_level("INFO"):
        trainer(tmp_path, callback, fast_dev_run=True).fit(LitClassifier(), train_loader())
    assert "This was a trial run (fast_dev_run)" in caplog.text
    assert "1 pass, " in str(callback.result)


class Told(LitClassifier):
    """Is sent a signal when it is calibrated, of which Lightning only takes a note until training goes on."""

    def forward(self, x):
        if not self.training:
            signal.raise_signal(signal.SIGTERM)
        return super().forward(x)


def test_sigterm_ends_a_calibration(tmp_path, calibration_set):
    model = Told()
    before = trace(model)
    with pytest.raises(SIGTERMException):
        calibrate(trainer(tmp_path), model, calibration_set)
    after = trace(model)
    assert_same({**before, "rng": after["rng"], "random": after["random"]}, after)
