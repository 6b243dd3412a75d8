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
