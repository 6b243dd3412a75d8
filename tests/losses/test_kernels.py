"""How many kernels a step of each loss starts, which is what small batches on a GPU take their time for."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_clamp.losses import batch_statistics
from tests.kernels import is_kernel
from tests.scenarios import LOSSES

# At most so many beyond the five of cross-entropy, forward and backward. A version of torch may need one more.
BEYOND = {
    "acls_loss": 12,
    "adafocal_loss": 28,
    "brier_loss": 13,
    "cals_loss": 34,
    "crl_loss": 4,
    "dca_loss": 16,
    "dual_focal_loss": 25,
    "entropy_penalty_loss": 16,
    "flsd_loss": 25,
    "focal_loss": 14,
    "label_smoothing_loss": 14,
    "mbls_loss": 13,
    "mdca_loss": 12,
    "mmce_loss": 21,
}


class Kernels(TorchDispatchMode):
    """Counts operations, but those that compute nothing."""

    started = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.started += is_kernel(function)
        return function(*args, **(kwargs or {}))


def started(loss, *shape):
    # Tensors without data: none is read, as on a GPU.
    logits = torch.zeros(shape, device="meta", requires_grad=True)
    target = torch.zeros((shape[0], *shape[2:]), dtype=torch.long, device="meta")
    with Kernels() as kernels:
        loss(logits, target).backward()
    return kernels.started


def cross_entropy(logits, target):
    # Over dense outputs the mean is taken by itself: torch's own step takes longer.
    if logits.ndim > 2:
        return F.cross_entropy(logits, target, reduction="none").mean()
    return F.cross_entropy(logits, target)


@pytest.mark.parametrize("shape", [(8, 5), (2, 5, 3, 3)], ids=["classes", "dense"])
@pytest.mark.parametrize("name", BEYOND)
def test_a_step_takes_few_kernels(name, shape):
    assert started(LOSSES[name], *shape) - started(cross_entropy, *shape) <= BEYOND[name] + 1


def test_positions_that_are_too_many_for_pairs_take_few_kernels_too(monkeypatch):
    monkeypatch.setattr(batch_statistics, "_FEW", 0)
    assert started(LOSSES["mmce_loss"], 8, 5) - started(cross_entropy, 8, 5) <= 26 + 1


def test_every_loss_has_a_bound_but_that_whose_pairs_grow_with_the_classes():
    assert {*BEYOND, "cpc_loss"} == set(LOSSES)
