"""Copies share nothing with what they are copies of, whatever the original keeps, and however it was compiled."""

import functools
import threading

import pytest
import torch
from lightning.pytorch.utilities.compile import from_compiled
from torch import nn

from lightning_clamp.clamping.copies import independent_copy
from tests.scenarios import LitClassifier, images


def compiled(function):
    return torch.compile(function, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_as_lightning_does(model):
    return from_compiled(compiled(model))


def with_a_compiled_submodule(model):
    model.net = compiled(model.net)
    return model


def with_a_submodule_compiled_in_place(model):
    model.net.compile(backend="eager")
    return model


def with_a_compiled_method(model):
    model.forward = compiled(model.net.forward)
    return model


def with_a_lambda(model):
    model.forward = lambda x: model.net(x)
    return model


def with_a_default(model):
    def forward(x, net=model.net, *, scale=model.net.linear.bias):
        return net(x) + scale

    model.forward = forward
    return model


def with_decorated_functions(model):
    """One that refers to itself, inside of another."""
    net = model.net

    def inner(x, again=True):
        return inner(x, again=False) if again else net(x)

    @functools.wraps(inner)
    def outer(x):
        return 2 * inner(x)

    model.forward = outer
    return model


def with_a_hook(model):
    other = nn.Linear(4, 4)
    model.other = other
    model.net.register_forward_hook(lambda module, args, output: other(output))
    return model


def slow(way):
    return pytest.param(way, marks=pytest.mark.slow)


WAYS = [
    lambda model: model,
    slow(compiled_in_place),
    slow(compiled_as_lightning_does),
    slow(with_a_compiled_submodule),
    slow(with_a_submodule_compiled_in_place),
    slow(with_a_compiled_method),
    with_a_lambda,
    with_a_default,
    with_decorated_functions,
    with_a_hook,
]


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_runs_its_own_weights(way):
    torch.compiler.reset()
    model, x = way(LitClassifier()), images(5)
    twin = independent_copy(model)
    assert list(twin.state_dict()) == list(model.state_dict())
    expected = model(x).detach()
    twin.requires_grad_(False)
    outputs = twin(x)
    torch.testing.assert_close(outputs, expected)
    assert not outputs.requires_grad
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert torch.equal(twin(x), outputs)
    assert not torch.equal(model(x), outputs)
    # And the other way round.
    changed = model(x)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model(x), changed)
    assert torch.equal(independent_copy(twin)(x), twin(x))


def test_functions_that_run_nothing_of_the_network_stay_themselves():
    model = LitClassifier()
    model.activation, model.add = nn.functional.relu, (lambda n: lambda x: x + n)(3)
    twin = independent_copy(model)
    assert twin.activation is nn.functional.relu
    assert twin.add is model.add


class Keeping(nn.Module):
    """Keeps activations, with the graph that training gave them."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.kept = {"all": []}

    def forward(self, x):
        self.features = self.layer(x)
        self.kept["all"].append(self.features)
        return self.features


def test_kept_activations_are_copied_without_their_graph():
    network = Keeping()
    network(torch.ones(2, 3))
    twin = independent_copy(network)
    assert torch.equal(twin.features, network.features)
    assert not twin.features.requires_grad
    assert twin.kept["all"][0] is twin.features
    assert network.features.grad_fn is not None


# The old way hangs the product, with its graph, on the module.
@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_a_weight_that_is_computed_anew_in_every_forward_is_copied():
    network = nn.utils.weight_norm(nn.Linear(3, 2))
    expected = network(torch.ones(2, 3)).detach()
    twin = independent_copy(network)
    with torch.no_grad():
        network.weight_v.add_(1)
    torch.testing.assert_close(twin(torch.ones(2, 3)), expected)


class Client:
    def __init__(self):
        self.connection = threading.Lock()


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        ("lock", threading.Lock(), "its attribute 'net.lock' of type lock .cannot pickle"),
        ("client", Client(), "its attribute 'net.client' of type Client .cannot pickle"),
        ("options", {"a": [threading.Lock()]}, "its attribute 'net.options' of type dict"),
        ("rows", iter(x for x in range(3)), "its attribute 'net.rows' of type generator"),
    ],
)
def test_what_cannot_be_copied_is_named(where, value, words):
    model = LitClassifier()
    model.children_of_it = [model.net]  # leads to the culprit, and is none
    setattr(model.net, where, value)
    with pytest.raises(TypeError, match=f"LitClassifier cannot be copied because of {words}.*: set it to None before"):
        independent_copy(model)
