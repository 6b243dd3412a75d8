"""Where outputs are those of the bare model it is said, and every time."""

import warnings

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.nn import functional as F

from lightning_clamp import NeuralClamping, calibrate
from lightning_clamp._trainer.hooks import warn_every_time
from tests.scenarios import LitClassifier, Validating, loader, train_loader, trainer

HELD_OUT = loader(500, seed=30, size=250)
UNSEEN = loader(200, seed=54)
OTHERS = "weights are not the ones that NeuralClamping calibrated"


def clamping(**options):
    return NeuralClamping(HELD_OUT, method="temperature", **options)


def fitted(path, model=None, **options):
    callback, model = clamping(**options), model or LitClassifier(lr=0.05)
    trainer(path, callback).fit(model, train_loader())
    return callback, model


def nll(run, model):
    return run.test(model, UNSEEN, verbose=False)[0]["test_nll"]


def other_weights(model):
    return {name: 1.5 * value for name, value in model.state_dict().items()}


class Swap(Callback):
    """Puts weights in when a hook of the test is called, and takes them out when it ends, as EMA callbacks do."""

    def __init__(self, hook, weights):
        self.weights = weights
        setattr(self, hook, self.put_in)

    def put_in(self, trainer, pl_module, *_, **__):
        if not hasattr(self, "own"):
            self.own = {name: value.clone() for name, value in pl_module.state_dict().items()}
            pl_module.load_state_dict(self.weights)

    def on_test_end(self, trainer, pl_module):
        pl_module.load_state_dict(self.own)


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("hook", ["setup", "on_test_start", "on_test_epoch_start", "on_test_batch_start"])
def test_weights_that_a_callback_swaps_in_are_not_clamped_by_those_of_others(tmp_path, hook, behind):
    callback, model = fitted(tmp_path)
    swapped = other_weights(model)
    expected = nll(trainer(tmp_path, Swap(hook, swapped)), model)
    callbacks = [callback, Swap(hook, swapped)] if behind else [Swap(hook, swapped), callback]
    words = "test_step ran with other weights" if hook == "on_test_batch_start" else OTHERS
    with pytest.warns(UserWarning, match=f"{words}.*these are the outputs of the bare model"):
        assert nll(trainer(tmp_path, *callbacks), model) == expected
    # And they are clamped, where it is they that were calibrated.
    owned = {name: value.clone() for name, value in model.state_dict().items()}
    expected = nll(trainer(tmp_path, callback), model)
    model.load_state_dict(swapped)
    if hook != "on_test_batch_start":
        assert nll(trainer(tmp_path, callback, Swap(hook, owned)), model) == expected
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("where", ["on_test_epoch_start", "on_test_batch_start", "test_step"])
def test_weights_that_the_model_swaps_in_are_not_clamped_either(tmp_path, where):
    class Averaged(LitClassifier):
        """Keeps an average of its own, and tests with it."""

        def swap(self, *args):
            self.load_state_dict(self.average)

        def test_step(self, batch, batch_idx):
            if where == "test_step":
                self.swap()
            return super().test_step(batch, batch_idx)

    if where != "test_step":
        setattr(Averaged, where, Averaged.swap)
    callback, model = fitted(tmp_path, Averaged(lr=0.05))
    own = {name: value.clone() for name, value in model.state_dict().items()}
    model.average = other_weights(model)
    expected = nll(trainer(tmp_path), model)
    model.load_state_dict(own)
    with pytest.warns(UserWarning, match=r"test_step ran with other weights .*'refit'"):
        assert nll(trainer(tmp_path, callback), model) == expected


def test_swapped_weights_are_refitted_where_that_is_asked(tmp_path):
    callback, model = fitted(tmp_path, other_weights="refit")
    swapped = other_weights(model)
    bare = nll(trainer(tmp_path, Swap("on_test_start", swapped)), model)
    assert nll(trainer(tmp_path, callback, Swap("on_test_start", swapped)), model) < bare


def said(act):
    with warnings.catch_warnings(record=True) as caught:
        # What Python does unless it is told otherwise: a text once per place.
        warnings.simplefilter("default")
        act()
    return [str(warning.message) for warning in caught if "bare model" in str(warning.message)]


def test_it_is_said_every_time(tmp_path):
    callback, model = fitted(tmp_path)
    with torch.no_grad():
        model.net.linear.bias.add_(1)
    run = trainer(tmp_path, callback)
    for call in (lambda: nll(run, model), lambda: run.predict(model, UNSEEN)):
        assert [len(said(call)) for _ in range(3)] == [1, 1, 1]
    for _ in range(2):
        assert len(said(lambda: trainer(tmp_path, clamping()).predict(model, UNSEEN))) == 1


class Configuring(LitClassifier):
    """Brings its callback along: one for all runs, or a new one for each."""

    def __init__(self, one_for_all):
        super().__init__(lr=0.0)
        self.made = [clamping()] if one_for_all else None

    def configure_callbacks(self):
        return clamping() if self.made is None else self.made


@pytest.mark.parametrize("one_for_all", [True, False])
def test_a_callback_that_the_model_makes_anew_in_every_run_is_told(tmp_path, one_for_all):
    model, run = Configuring(one_for_all), trainer(tmp_path)
    run.fit(model, train_loader())
    calibrated = run.callbacks[-1].calibrated_module()
    texts = said(lambda: run.predict(model, UNSEEN))
    if one_for_all:
        assert not texts
        assert torch.equal(torch.cat(run.predict(model, UNSEEN)), calibrated(UNSEEN.dataset.tensors[0]))
    else:
        assert [
            "Configuring.configure_callbacks makes a new NeuralClamping for every run" in text for text in texts
        ] == [True]


def test_who_wants_no_warnings_gets_none(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warn_every_time("unheard")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_validation_of_its_own_is_bare_and_says_so(tmp_path):
    callback, model = fitted(tmp_path, Validating(lr=0.05), save_to=tmp_path)
    run = trainer(tmp_path, callback)
    words = "trainer.validate does not use the clamp: these are the outputs of the bare model"
    for _ in range(2):
        (text,) = said(lambda: run.validate(model, UNSEEN, verbose=False))
        assert text.startswith(words)
    # By a Trainer that has the clamp of a file, too.
    fresh = trainer(tmp_path, clamping())
    (text,) = said(
        lambda: fresh.validate(model, UNSEEN, verbose=False, ckpt_path=callback.checkpoint_path, weights_only=True)
    )
    assert text.startswith(words)
    # Not in the validations of a fit, of what has no clamp, of a calibrated module, or those that calibrate() runs.
    assert not said(lambda: trainer(tmp_path, callback).fit(model, train_loader(), UNSEEN))
    assert not said(lambda: trainer(tmp_path, clamping()).validate(model, UNSEEN, verbose=False))
    assert not said(lambda: calibrate(run, model, HELD_OUT, method="temperature"))


class Output(dict):
    """As HuggingFace's: entries are attributes."""

    __getattr__ = dict.__getitem__


class WithLoss(LitClassifier):
    """Computes the loss inside, as HuggingFace's networks do when they are given labels."""

    def forward(self, x: Tensor, y: Tensor | None = None):
        logits = self.net(x)
        return Output(logits=logits) if y is None else Output(loss=F.cross_entropy(logits, y), logits=logits)

    def training_step(self, batch, batch_idx):
        return self(*batch).loss

    def test_step(self, batch, batch_idx):
        output = self(*batch)
        self.log("test_loss", output.loss)
        self.log("test_nll", F.cross_entropy(output.logits, batch[1]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0]).logits


def test_a_loss_that_the_network_computed_is_said_to_be_bare(tmp_path):
    callback, model = fitted(tmp_path, WithLoss(lr=0.05))
    (bare,) = trainer(tmp_path).test(model, UNSEEN, verbose=False)
    run = trainer(tmp_path, callback)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"WithLoss returns a loss beside its logits.* compute it from the log"):
            (clamped,) = run.test(model, UNSEEN, verbose=False)
    assert clamped["test_loss"] == bare["test_loss"] == bare["test_nll"]
    assert clamped["test_nll"] < bare["test_nll"]
    assert not said(lambda: run.predict(model, UNSEEN))
