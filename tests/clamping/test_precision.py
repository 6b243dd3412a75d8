"""What a lower precision of the network changes in the clamp: little, and within what the documentation says."""

import pytest
import torch
from torch import nn

from lightning_clamp import fit_clamp
from tests.scenarios import SmallNet, batches, shifted_images


class Precise(nn.Module):
    """A network as mixed precision (autocast) or true half precision (its weights) runs it."""

    def __init__(self, network, *, autocast=None, weights=torch.float32):
        super().__init__()
        self.network, self.autocast, self.weights = network.to(weights), autocast, weights

    def forward(self, x):
        with torch.autocast("cpu", dtype=self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            return self.network(x.to(self.weights))


KINDS = {
    "bf16-mixed": {"autocast": torch.bfloat16},
    "16-mixed": {"autocast": torch.float16},
    "bf16-true": {"weights": torch.bfloat16},
    "16-true": {"weights": torch.float16},
}


def fitted(**kind):
    _, x, y = shifted_images(2000)
    network = Precise(SmallNet(2.0), **kind)
    return fit_clamp(network, batches(x, y), grids=(1,), output_maps=("temperature",))


@pytest.fixture(scope="module")
def full():
    return fitted()


@pytest.mark.parametrize("kind", KINDS)
def test_the_clamp_is_that_of_full_precision_within_the_stated_tolerance(full, kind):
    """T to 1 %, every metric to .005; the sums, δ and log T themselves stay float32 or float64."""
    result = fitted(**KINDS[kind])
    assert {value.dtype for value in result.clamp.state_dict().values()} == {torch.float32}
    assert float(result.clamp.temperature) == pytest.approx(float(full.clamp.temperature), rel=0.01)
    assert (result.clamp.perturbation - full.clamp.perturbation).norm() < 0.1 * full.clamp.perturbation.norm()
    for name in ("nll", "ece", "accuracy"):
        assert result.after[name] == pytest.approx(full.after[name], abs=0.005)
