"""Steps that change the input of a batch before they call the model: a calibration would not know of it."""

import re

import pytest
import torch
from torch.nn import functional as F

from lightning_clamp import NeuralClamping
from tests.scenarios import Validating, loader, train_loader, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Attribute 'prepare' removed from hparams"),
]
HELD_OUT, UNSEEN = loader(200, seed=30), loader(200, seed=54)
SAID = "calls self(x) with something else than the input of the batch"


class Preparing(Validating):
    """Does something to the images in its steps."""

    def __init__(self, prepare):
        super().__init__(lr=0.0)
        self.prepare = prepare

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(self.prepare(batch[0])), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test_nll", F.cross_entropy(self(x=self.prepare(batch[0])), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self(self.prepare(batch[0]))


CHANGED = {"normalised": lambda x: (x - 0.5) / 2, "a crop": lambda x: x[..., 1:, 1:], "turned": lambda x: x.flip(3)}
SAME = {
    "as it is": lambda x: x,
    "a copy": lambda x: x.clone(),
    "of another dtype and back": lambda x: x.double().float(),
    "flat and back": lambda x: x.flatten(1).unflatten(1, (3, 8, 8)),
}


@pytest.mark.parametrize("case", CHANGED)
def test_what_a_step_does_to_its_input_is_said_before_training_and_in_test_and_predict(tmp_path, case):
    callback, model = NeuralClamping(HELD_OUT, method="temperature"), Preparing(CHANGED[case])
    run = trainer(tmp_path, callback, num_sanity_val_steps=1, max_epochs=2)

    acts = {
        "validation_step": lambda: run.fit(model, train_loader(), UNSEEN),
        "test_step": lambda: run.test(model, UNSEEN, verbose=False),
        "predict_step": lambda: run.predict(model, UNSEEN),
    }
    for step, act in acts.items():
        with pytest.warns(UserWarning, match=re.escape(SAID)) as caught:
            act()
        texts = [str(warning.message) for warning in caught]
        assert [text.partition(" ")[0] for text in texts if SAID in text] == [f"Preparing.{step}"]
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("case", SAME)
def test_steps_that_leave_it_as_it_is_are_not_complained_of(tmp_path, case):
    callback, model = NeuralClamping(HELD_OUT, method="temperature"), Preparing(SAME[case])
    run = trainer(tmp_path, callback)
    run.fit(model, train_loader(), UNSEEN)
    run.test(model, UNSEEN, verbose=False)
    run.predict(model, UNSEEN)


def test_a_module_that_is_taken_in_the_first_batch_has_no_hook_of_it(tmp_path):
    class Taking(Preparing):
        def predict_step(self, batch, batch_idx):
            taken.append(callback.calibrated_module())
            return self(batch[0])

    taken, callback, model = [], NeuralClamping(HELD_OUT, method="temperature"), Taking(lambda x: x)
    run = trainer(tmp_path, callback)
    run.fit(model, train_loader())
    logits = torch.cat(run.predict(model, UNSEEN))
    for module in taken:
        assert not module.network._forward_pre_hooks
        assert torch.equal(module(UNSEEN.dataset.tensors[0]), logits)
    assert not model._forward_pre_hooks


def test_one_call_of_several_with_the_input_will_do(tmp_path):
    class Averaging(Preparing):
        def predict_step(self, batch, batch_idx):
            return (self(batch[0].flip(3)) + self(batch[0])) / 2

    callback, model = NeuralClamping(HELD_OUT, method="temperature"), Averaging(lambda x: x)
    run = trainer(tmp_path, callback)
    run.fit(model, train_loader())
    assert torch.cat(run.predict(model, UNSEEN)).shape == (200, 4)
