"""Random signs: their expectation, and that they depend on an item's content alone."""

import pytest
import torch

from lightning_clamp._rows import Rows
from lightning_clamp.clamping.frozen import frozen
from lightning_clamp.clamping.output_map import temperature_space
from lightning_clamp.clamping.passes import CalibrationSet
from lightning_clamp.clamping.perturbation import make_grid
from lightning_clamp.clamping.probes import probe, seeds_of
from lightning_clamp.clamping.score_pass import score_pass
from lightning_clamp.spec import Spec
from tests.scenarios import DenseNet, batches, images


def test_outer_products_are_expected_to_be_the_curvature_of_the_softmax():
    """And rows are independent of one another, of which an item's curvature is the sum."""
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]], dtype=torch.float64)
    rows = Rows(probs, torch.zeros(2).long(), torch.zeros(2).long(), 1)
    found = torch.stack([probe(probs, rows, torch.tensor([5]), number).flatten() for number in range(4000)])
    expected = torch.block_diag(*(p.diag() - torch.outer(p, p) for p in probs))
    torch.testing.assert_close(found.T @ found / len(found), expected, rtol=0, atol=0.015)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.bool])
def test_seeds_are_those_of_each_items_content(dtype):
    x = (3 * torch.randn(50, 2, 7)).to(dtype) if dtype.is_floating_point else torch.randint(2, (50, 2, 7)).to(dtype)
    x[1] = x[0]
    seeds = seeds_of({"a": x, "b": x[:, 0]})
    assert seeds[0] == seeds[1]
    distinct = len({tuple(item.flatten().double().tolist()) for item in x})
    assert len(set(seeds.tolist())) == distinct
    order = torch.randperm(50)
    part = x[order][:20]
    assert torch.equal(seeds_of({"a": part, "b": part[:, 0]}), seeds[order][:20])


def test_padding_changes_no_seed():
    """Sequences are padded to the longest of their batch."""
    x = torch.randint(1, 100, (4, 6))
    assert torch.equal(seeds_of(torch.cat([x, torch.zeros(4, 3).long()], 1)), seeds_of(x))


def test_the_curvature_of_dense_outputs_depends_on_neither_batches_nor_their_order():
    network, x, y = DenseNet().double(), images(40, dtype=torch.float64), torch.randint(3, (40, 8, 8))
    space, grid, order = temperature_space(3), make_grid(2, (3, 8, 8)), torch.randperm(40)
    free = space.temperature_only(1.3)
    found = []
    for inputs, target, size in ((x, y, 16), (x, y, 7), (x[order], y[order], 40)):
        data = CalibrationSet(network, batches(inputs, target, size), Spec(), cache_bytes=2**20)
        with frozen(network):
            (sums,) = score_pass(data, None, space, free, [grid], dense=True, what="")
        found.append(sums)
    for other in found[1:]:
        torch.testing.assert_close(other.curvature, found[0].curvature, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(other.covariance, found[0].covariance, rtol=1e-9, atol=1e-9)
