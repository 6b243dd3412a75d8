import copy
import weakref
from collections import defaultdict, deque

import pytest
import torch
from torch import nn

from lightning_clamp.clamping.frozen import frozen
from tests.scenarios import assert_same, trace


def build() -> nn.Module:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    network[0].weight.requires_grad_(False)
    network[1].eval()
    network(torch.randn(5, 3)).sum().backward()
    return network


@pytest.mark.parametrize("fails", [False, True])
def test_no_trace_is_left_also_after_a_failure(fails):
    network = build()
    before = trace(network)
    with pytest.raises(RuntimeError, match="half-way") if fails else torch.enable_grad(), frozen(network):
        assert not any(m.training for m in network.modules())
        assert not any(p.requires_grad for p in network.parameters())
        network[1].running_mean.add_(1.0)
        torch.rand(7)
        if fails:
            raise RuntimeError("half-way")
    assert_same(before, trace(network))


def test_a_buffer_that_the_network_replaces_is_put_back():
    network = build()
    mean = network[1].running_mean
    value = mean.clone()
    with frozen(network):
        network[1].running_mean = network[1].running_mean + 1
    assert network[1].running_mean is mean
    assert torch.equal(mean, value)


@pytest.mark.parametrize("surrounding", [torch.no_grad, torch.inference_mode])
def test_gradients_flow_inside_whatever_the_caller_is_under(surrounding):
    network = build()
    with surrounding(), frozen(network):
        inputs = torch.zeros(2, 3, requires_grad=True)
        (gradient,) = torch.autograd.grad(network(inputs).sum(), inputs)
    assert gradient.abs().sum() > 0


def test_a_plain_callable_keeps_the_random_state():
    state = torch.get_rng_state()
    with frozen(lambda x: x):
        torch.rand(3)
    assert torch.equal(state, torch.get_rng_state())


class Keeping(nn.Module):
    """Keeps activations in every way."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.calls = 0
        self.features = None
        self.several = [None]
        self.by_name = defaultdict(deque, {"first": deque([1])})
        self.inside = ({"of": []},)

    def forward(self, x):
        hidden = self.layer(x)
        self.calls += 1
        self.features = self.new = self.several[0] = hidden
        self.by_name["first"].append(hidden)
        self.by_name["second"].append(hidden)
        self.inside[0]["of"].append(hidden)
        self.layer.last = hidden
        return hidden


@pytest.mark.parametrize("trained", [False, True])
def test_what_a_network_keeps_of_a_forward_is_what_it_kept_before(trained):
    network = Keeping()
    if trained:
        network(torch.zeros(1, 3))
    layer_before, before = dict(vars(network.layer)), dict(vars(network))
    inside = list(network.inside[0]["of"])
    x = torch.ones(2, 3, requires_grad=True)
    with frozen(network):
        output = weakref.ref(network(x))
        assert output() is not None
    assert output() is None, "the graph is still there"
    for part, attributes in ((network, before), (network.layer, layer_before)):
        assert list(vars(part)) == list(attributes)
        assert all(vars(part)[name] is value for name, value in attributes.items())
    assert network.calls == trained
    assert list(network.by_name["first"])[1:] == inside == network.inside[0]["of"]
    assert list(network.by_name) == ["first", "second"][: 1 + trained]
    if not trained:
        copy.deepcopy(network)


class Doing(nn.Module):
    """Does something to its buffers in every forward."""

    def __init__(self, what, **buffers):
        super().__init__()
        self.what = what
        for name, value in buffers.items():
            self.register_buffer(name, value)
        self.register_buffer("last", torch.zeros(2), persistent=False)

    def forward(self, x):
        self.what(self)
        self.last += 1
        return x


def expanded_nan():
    return torch.full((1,), torch.nan).expand(3)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("surrounding", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize(
    ("buffer", "what"),
    [
        (lambda: torch.eye(3).to_sparse(), lambda m: m.buffer.mul_(2)),
        (lambda: torch.eye(3).to_sparse(), lambda m: m.buffer.add_(torch.ones(3, 3).to_sparse())),
        (lambda: torch.eye(3).to_sparse_csr(), lambda m: m.buffer.values().mul_(2)),
        (lambda: torch.eye(3).to_sparse_csr(), lambda m: setattr(m, "buffer", torch.ones(3, 3).to_sparse_csr())),
        (lambda: torch.arange(3.0), lambda m: m.buffer.resize_(7).fill_(1)),
        (lambda: torch.arange(3.0), lambda m: m.buffer.resize_(1).fill_(1)),
        (lambda: torch.arange(3.0), lambda m: m.buffer.set_(torch.ones(4))),
        (lambda: torch.arange(3.0), lambda m: setattr(m.buffer, "data", torch.ones(2, 2))),
        (lambda: torch.arange(9.0)[2:8:2], lambda m: m.buffer.add_(1)),
        (lambda: torch.arange(9.0).reshape(3, 3).T, lambda m: m.buffer.t_()),
        (lambda: torch.arange(3.0), lambda m: delattr(m, "buffer")),
        (lambda: torch.arange(3.0), lambda m: setattr(m, "buffer", None)),
        (lambda: torch.arange(3.0), lambda m: m.register_buffer("another", torch.ones(1))),
        (lambda: torch.arange(3.0), lambda m: m.register_buffer("buffer", torch.ones(1), persistent=False)),
        (expanded_nan, lambda m: None),
        (expanded_nan, lambda m: m.buffer[0].fill_(1)),
        (lambda: torch.tensor([torch.nan, 1.0]), lambda m: m.buffer.fill_(1)),
        (lambda: torch.arange(3), lambda m: m.buffer.add_(1)),
        (lambda: torch.ones(2, dtype=torch.bool), lambda m: m.buffer.logical_not_()),
        (lambda: torch.tensor(1.0), lambda m: m.buffer.add_(1)),
        (lambda: torch.empty(0), lambda m: m.buffer.resize_(2).fill_(1)),
    ],
)
def test_every_kind_of_buffer_is_put_back(buffer, what, surrounding):
    network = Doing(what, buffer=buffer())
    kept, names = network.buffer, list(network.state_dict())
    with surrounding(), frozen(network):
        network(torch.ones(1))
    assert network.buffer is kept
    torch.testing.assert_close(kept.to_dense(), buffer().to_dense(), rtol=0, atol=0, equal_nan=True)
    assert kept.layout == buffer().layout
    assert kept.layout != torch.strided or kept.stride() == buffer().stride()
    assert list(network.state_dict()) == names == ["buffer"]
    assert list(dict(network.named_buffers())) == ["buffer", "last"]
    assert torch.equal(network.last, torch.zeros(2))


class Unwilling(torch.Tensor):
    """A tensor that cannot be put back."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.copy_:
            raise RuntimeError("never")
        return super().__torch_function__(func, types, args, kwargs)


def test_a_buffer_that_cannot_be_put_back_costs_no_other():
    network = Doing(lambda m: m.early.add_(1), early=torch.zeros(2), unwilling=torch.zeros(2).as_subclass(Unwilling))
    network.net = build()
    before = trace(network.net)

    def run():
        with frozen(network):
            network(torch.ones(1))
            network.net[1].running_mean.add_(1.0)

    with pytest.raises(RuntimeError, match="never"):
        run()
    assert torch.equal(network.early, network.last)
    assert_same(before, trace(network.net))
    assert network.training


# Torch's own word for scripting.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_network_of_torchscript_is_put_back():
    network = torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    before = trace(network)
    with frozen(network):
        network[1].running_mean.add_(1.0)
    assert_same(before, trace(network))


def test_a_lazy_network_is_refused_by_torch_and_left_alone():
    network = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2))
    with pytest.raises(ValueError, match="uninitialized parameter"), frozen(network):
        pass
    assert network.training
    assert network[0].weight.requires_grad


@pytest.fixture
def differing_precisions():
    cudnn = torch.backends.cudnn
    before = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, cudnn.benchmark
    cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, cudnn.benchmark = "tf32", "ieee", True
    yield lambda: (cudnn.enabled, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, cudnn.benchmark)
    cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, cudnn.benchmark = before


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="precisions by operator are new in torch 2.9")
@pytest.mark.parametrize("fails", [False, True])
def test_precisions_of_convolutions_and_recurrent_layers_may_differ(fails, differing_precisions):
    flags = differing_precisions
    with pytest.raises(RuntimeError, match="half-way") if fails else torch.enable_grad(), frozen(nn.LSTM(3, 4)):
        inside = flags()
        if fails:
            raise RuntimeError("half-way")
    assert inside == (False, "tf32", "ieee", True)
    assert flags() == (True, "tf32", "ieee", True)
