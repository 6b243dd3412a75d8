"""Gauss-Newton sharpness: the largest eigenvalue, what the margin tail bounds, and what does not count."""

import pytest
import torch
from torch import Tensor, nn

from lightning_clamp.metrics import expected_calibration_error, exponential_margin_tail
from lightning_clamp.sharpness import gauss_newton_sharpness
from tests.scenarios import Attending, formula_batch, formula_network


def slopes_of(network: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The logits, (N, K), and their derivatives in all weights, (N, K, P)."""
    logits, weights = network(inputs), list(network.parameters())
    rows = [torch.autograd.grad(z, weights, retain_graph=True) for z in logits.flatten()]
    slopes = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]).reshape(*logits.shape, -1)
    return logits.detach(), slopes


def exact_sharpness(network: nn.Module, inputs: Tensor) -> float:
    logits, slopes = slopes_of(network, inputs)
    probs = logits.softmax(1)
    middle = torch.diag_embed(probs) - probs[:, :, None] * probs[:, None]
    matrix = torch.einsum("nka,nkl,nlb->ab", slopes, middle, slopes) / len(inputs)
    return float(torch.linalg.eigvalsh(matrix)[-1])


def test_sharpness_is_the_largest_eigenvalue():
    network = formula_network()
    inputs, target = formula_batch(network)
    exact = exact_sharpness(network, inputs)
    found = gauss_newton_sharpness(network, [(inputs, target)], tolerance=1e-10, max_iterations=500)
    assert found == pytest.approx(exact, rel=1e-6)
    parts = gauss_newton_sharpness(network, [(inputs[:7], target[:7]), (inputs[7:], target[7:])])
    assert parts == pytest.approx(exact, rel=5e-3)
    assert parts <= exact * (1 + 1e-12)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_sharpness_and_error_are_bounded_by_the_margin_tail():
    """Theorem 4.1, with the largest ||J|| of the data for C_J."""
    network = formula_network()
    inputs, target = formula_batch(network)
    logits, slopes = slopes_of(network, inputs)
    tail = float(exponential_margin_tail(logits, target))
    assert float(expected_calibration_error(logits, target)) <= 4 * tail
    largest = float(torch.linalg.matrix_norm(slopes, 2).amax())
    assert gauss_newton_sharpness(network, [(inputs, target)]) <= 2 * largest**2 * 4 * tail


def test_sharpness_of_what_is_ignored_or_frozen_does_not_count():
    network = formula_network()
    inputs, target = formula_batch(network)
    marked = target.masked_fill(torch.arange(40) >= 10, -1)
    options = {"tolerance": 1e-8, "max_iterations": 300}
    few = gauss_newton_sharpness(network, [(inputs, marked)], ignore_index=-1, **options)
    assert few == pytest.approx(exact_sharpness(network, inputs[:10]), rel=1e-4)
    network[0].requires_grad_(False)
    assert gauss_newton_sharpness(network, [(inputs, target)], **options) < exact_sharpness_of_all(network, inputs)
    with pytest.raises(ValueError, match="no trainable parameters"):
        gauss_newton_sharpness(network.requires_grad_(False), [(inputs, target)])
    with pytest.raises(ValueError, match="no batch holds a position that counts"):
        gauss_newton_sharpness(formula_network(), [])


def exact_sharpness_of_all(network: nn.Module, inputs: Tensor) -> float:
    copy = formula_network()
    copy.load_state_dict(network.state_dict())
    return exact_sharpness(copy, inputs)


def test_networks_with_attention_are_differentiated_twice():
    torch.manual_seed(0)
    network = Attending()
    inputs, target = torch.rand(5, 4, 8), torch.tensor([0, 1, 2, 0, 1])
    assert gauss_newton_sharpness(network, [(inputs, target)], max_iterations=3) > 0
