"""Losses as modules: those of the functions, in any code that takes a criterion."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

from lightning_clamp import losses
from tests.scenarios import drawn

MODULES = {name: getattr(losses, name) for name in losses.__all__ if name.endswith("Loss")}
every_module = pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
# What has no place in an object that may be saved.
PER_CALL = {"log_terms", "generator"}


def batch_of(module):
    logits, target = drawn(8, 5)
    if module is losses.SCBCELoss:
        return logits[:, 0], target % 2
    if module is losses.MarginAwareLoss:
        return nn.Linear(5, 5).double(), logits.sigmoid(), target
    return logits, target


# What they learn is an argument that changes as training goes on, which no options of a module could be: with options
# that stay they are other losses, focal and MbLS with another name, and the cross-entropy.
LEARNING = {"adafocal_loss", "cals_loss", "crl_loss"}


def test_every_loss_that_does_not_learn_has_a_module():
    functions = {module.function.__name__ for module in MODULES.values()}
    assert functions == {name for name in losses.__all__ if name.endswith("_loss")} - LEARNING


@every_module
def test_the_options_are_those_of_the_function(module):
    function = inspect.signature(module.function).parameters
    options = {name: one for name, one in inspect.signature(module).parameters.items() if name not in PER_CALL}
    keywords = {name: one for name, one in function.items() if one.kind is one.KEYWORD_ONLY and name not in PER_CALL}
    assert {name: one.default for name, one in options.items()} == {n: one.default for n, one in keywords.items()}
    assert all(one.kind is one.KEYWORD_ONLY for one in options.values())
    assert {n: one.annotation for n, one in options.items() if n != "alpha"} == {
        n: one.annotation for n, one in keywords.items() if n != "alpha"
    }


@every_module
def test_the_value_is_that_of_the_function(module):
    batch = batch_of(module)
    values = []
    for one in (module(reduction="sum"), lambda *batch: module.function(*batch, reduction="sum")):
        torch.manual_seed(0)
        values.append(one(*batch))
    torch.testing.assert_close(*values)


@every_module
def test_a_module_is_printed_saved_and_copied(module):
    criterion = module(reduction="sum")
    assert repr(criterion) == f"{module.__name__}(reduction='sum')"
    assert repr(module()) == f"{module.__name__}()"
    assert not criterion.state_dict()
    batch = batch_of(module)
    for other in (pickle.loads(pickle.dumps(criterion)), copy.deepcopy(criterion)):
        torch.manual_seed(0)
        value = criterion(*batch)
        torch.manual_seed(0)
        torch.testing.assert_close(other(*batch), value)


def test_weights_go_with_the_module_and_not_into_its_state():
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    criterion = losses.ACLSLoss(margin=6.0, weight=weight)
    assert repr(criterion) == "ACLSLoss(weight=5 numbers, margin=6.0)"
    assert not criterion.state_dict()
    assert criterion.to("meta").weight.is_meta
    logits, target = drawn(8, 5)
    for one in (losses.MMCELoss(weight=weight).double(), losses.FocalLoss(weight=weight)):
        torch.testing.assert_close(one(logits, target), one.function(logits, target, weight=weight))
    assert losses.FocalLoss(weight=torch.ones(2), task="binary")(logits[:, 0], target % 2).isfinite()


@pytest.mark.parametrize(
    ("module", "options", "error", "sentence"),
    [
        (losses.ACLSLoss, {"margin": -1}, ValueError, "`margin` must be at least 0, got -1"),
        (losses.BrierLoss, {"reduction": "average"}, ValueError, "`reduction` must be one of"),
        (losses.FocalLoss, {"weight": torch.ones(1)}, ValueError, "one number per class"),
        (losses.SCBCELoss, {"beta": 4.0}, ValueError, "`beta` must lie in"),
        (losses.MarginAwareLoss, {"std": (1.0, 0.0, 1.0)}, ValueError, "`std` must be positive"),
        (losses.FocalLoss, {"gama": 2}, TypeError, "gama"),
    ],
)
def test_options_are_checked_as_the_module_is_made(module, options, error, sentence):
    with pytest.raises(error, match=sentence):
        module(**options)
    with pytest.raises(TypeError):
        losses.FocalLoss(3.0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
# They differ by their function, which test_losses.py compiles; no margin is, whose gradient is differentiated again.
@pytest.mark.parametrize("module", [losses.ACLSLoss, losses.CPCLoss, losses.MMCELoss, losses.SCBCELoss])
def test_a_compiled_module_is_the_same(module):
    torch.compiler.reset()
    criterion, batch = module(), batch_of(module)
    torch.manual_seed(0)
    value = criterion(*batch)
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=module is not losses.SCBCELoss)
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(*batch), value)


def test_a_plain_loop_trains_with_one():
    torch.manual_seed(0)
    network, criterion = nn.Linear(5, 5).double(), losses.ACLSLoss(margin=1.0)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    logits, target = drawn(50, 5)
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        value = criterion(network(logits), target)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0]
