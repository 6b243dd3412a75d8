"""Output maps on an accelerator: what is of the size of classes times classes, or of samples, stays there."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_clamp import fit_clamp
from tests.scenarios import sampled

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


class Copies(TorchDispatchMode):
    """Numbers of elements of what was copied from the device."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].is_cuda and not result.is_cuda:
            self.sizes.append(result.numel())
        return result


def test_scales_and_biases_of_a_thousand_classes_are_fitted_there():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(6000, 1000, generator=generator)
    target = sampled(logits.double(), 1)
    logits = logits * torch.linspace(1, 2, 1000) + torch.linspace(-1, 1, 1000)
    expected = fit_clamp(torch.nn.Identity(), [(logits, target)], grids=())
    with Copies() as copies:
        there = fit_clamp(torch.nn.Identity(), [(logits.cuda(), target.cuda())], grids=())
    assert there.chosen.output_map == expected.chosen.output_map == "vector"
    assert there.chosen.criterion == pytest.approx(expected.chosen.criterion, abs=1e-4)
    torch.testing.assert_close(there.clamp.class_bias.cpu(), expected.clamp.class_bias, rtol=0, atol=1e-2)
    # Beside vectors of the classes, the sums of the metrics, which are of one size for all data.
    assert 0 < max(copies.sizes) < 100_000


def test_a_wide_matrix_is_that_of_the_cpu():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2000, 40, generator=generator)
    target = sampled(logits.double() + 0.7 * logits.double().roll(1, 1), 1)
    expected = fit_clamp(torch.nn.Identity(), [(logits, target)], grids=())
    batches = list(zip(logits.cuda().split(300), target.cuda().split(300), strict=True))
    there = fit_clamp(torch.nn.Identity(), batches, grids=())
    assert there.chosen.output_map == expected.chosen.output_map == "matrix"
    assert there.chosen.criterion == pytest.approx(expected.chosen.criterion, abs=1e-6)
    torch.testing.assert_close(there.clamp.class_matrix.cpu(), expected.clamp.class_matrix, rtol=0, atol=1e-4)
