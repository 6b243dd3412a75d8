"""Output maps of many classes: the curvature class by class, what it says of the price, and the same clamp."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_clamp import fit_clamp
from lightning_clamp.clamping.beta import beta_space
from lightning_clamp.clamping.class_blocks import BlockPath, ClassBlocks
from lightning_clamp.clamping.map_loss import curvature_product, map_derivatives
from lightning_clamp.clamping.moments import logit_moments
from lightning_clamp.clamping.output_map import map_space
from lightning_clamp.clamping.passes import CalibrationSet
from lightning_clamp.clamping.paths import WholePath
from lightning_clamp.clamping.ranks import Ranks
from lightning_clamp.clamping.score_pass import _square
from lightning_clamp.clamping.shrinkage import promise, temperature_map
from lightning_clamp.clamping.summary import summarize
from lightning_clamp.clamping.temperature import fit_temperature
from lightning_clamp.clamping.wide_matrix import MatrixBlocks, MatrixPath, vector_space
from lightning_clamp.spec import Spec
from tests.scenarios import batches, rows, sampled, shifted_images

IDENTITY = torch.nn.Identity()


class Sent(TorchDispatchMode):
    """Counts what is copied from the CPU to another device, and numbers that are read one by one."""

    def __init__(self):
        super().__init__()
        self.count = self.read = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.read += func is torch.ops.aten._local_scalar_dense.default
        if func is torch.ops.aten._to_copy.default:
            self.count += args[0].device.type == "cpu" != result.device.type
        return result


def distorted(n, classes, seed=0):
    """Logits, each with a scale and a bias of its own that are wrong, and labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    bias = torch.linspace(-1, 1, classes).double()
    return logits * torch.linspace(1, 2, classes).double() + bias, sampled(logits, seed + 1)


def confused(n, classes, seed=0):
    """Logits of which each class's says something of the next one too, and labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return logits, sampled(logits + 0.7 * logits.roll(1, 1), seed + 1)


def whole_and_not(monkeypatch, logits, target, n, most_together):
    """Fits to the first n with the whole curvature and with less of it, and their NLL on the others."""
    whole = fit_clamp(IDENTITY, [(logits[:n], target[:n])], grids=())
    monkeypatch.setattr("lightning_clamp.clamping.shrinkage._MOST_TOGETHER", most_together)
    results = whole, fit_clamp(IDENTITY, [(logits[:n], target[:n])], grids=())
    return results, [float(F.cross_entropy(one.clamp.scale(logits[n:]), target[n:])) for one in results]


def at(kind, logits, target, **changes):
    data, classes = rows(logits, target), logits.shape[1]
    space = replace(map_space(kind, logit_moments(data, classes)), **changes)
    return data, space, space.temperature_only(1.5)


@pytest.mark.parametrize("kind", ["bias", "vector"])
@pytest.mark.parametrize("changes", [{}, {"share": 0.1}, {"seen": torch.arange(6) > 0}], ids=["all", "share", "unseen"])
def test_blocks_are_those_of_the_curvature(kind, changes):
    data, space, free = at(kind, *distorted(300, 6), **changes)
    whole = map_derivatives(data, replace(space, seen=None), free, dense=False).curvature
    blocks = ClassBlocks(data, space, free)
    vectors, values = blocks.vectors, blocks.values
    found = vectors @ values.diag_embed() @ vectors.mT / (blocks.root[:, :, None] * blocks.root[:, None])
    parts = torch.arange(6 * space.n_own).reshape(-1, 6)
    for k in range(6):
        own = whole[parts[:, k]][:, parts[:, k]]
        known = space.seen is None or bool(space.seen[k])
        torch.testing.assert_close(found[k], own if known else torch.zeros_like(own))
    torch.testing.assert_close(blocks.corner, whole[-1, -1])


@pytest.mark.parametrize("seen", [None, torch.arange(6) > 0], ids=["all", "unseen"])
def test_a_product_needs_no_curvature(seen):
    data, space, free = at("vector", *distorted(300, 6), seen=seen)
    direction = torch.randn(len(free), generator=torch.Generator().manual_seed(0)).double()
    curvature = map_derivatives(data, space, free, dense=False).curvature
    torch.testing.assert_close(curvature_product(data, space, free, direction), curvature @ direction)


@pytest.mark.parametrize("n", [200, 2000])
def test_the_price_is_that_of_the_whole_curvature(n):
    """Within some hundredths, or half a parameter; that of the blocks alone is never below it."""
    data, space, free = at("vector", *distorted(n, 100))
    whole = WholePath(map_derivatives(data, space, free, dense=False), space.weight)
    path, blocks = BlockPath(data, space, free, dense=False), ClassBlocks(data, space, free)
    for shrinkage in (300.0, 30.0, 3.0, 0.3):
        alone = 1 + float((blocks.values / (blocks.values + shrinkage)).sum())
        exact = whole.effective_parameters(shrinkage)
        assert path.effective_parameters(shrinkage) == pytest.approx(exact, rel=0.06, abs=0.5)
        assert path.effective_parameters(shrinkage) <= alone
        assert exact <= alone


def test_correlated_rows_are_charged_by_the_covariance_within_a_class():
    data, space, free = at("vector", *distorted(300, 6))
    sums = map_derivatives(data, space, free, dense=True)
    parts = torch.arange(12).reshape(2, 6)
    expected = 2.0 * sums.covariance[-1, -1] / sums.curvature[-1, -1]
    for k in range(6):
        curvature, covariance = (one[parts[:, k]][:, parts[:, k]] for one in (sums.curvature, sums.covariance))
        expected += (torch.linalg.inv(curvature + 3 * space.weight[parts[:, k]].diag()) @ covariance).trace()
    assert BlockPath(data, space, free, dense=True).effective_parameters(3, 2) == pytest.approx(float(expected))


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_a_matrix_has_the_curvature_of_the_vector_and_the_diagonal_of_the_rest(share):
    data, space, free = at("matrix", *confused(300, 6), share=share)
    whole = map_derivatives(data, space, free, dense=False).curvature
    blocks = MatrixBlocks(data, space, free)
    vector = torch.cat([7 * torch.arange(6), torch.arange(36, 43)])
    known = WholePath(map_derivatives(data, vector_space(space), free[vector], dense=False), space.weight[vector])
    torch.testing.assert_close(blocks.vector.effective_parameters(3.0), known.effective_parameters(3.0))
    basis = torch.kron(blocks.left, blocks.right)
    profiled = whole[:36, :36] - torch.outer(whole[:36, -1], whole[-1, :36]) / whole[-1, -1]
    diagonal = (basis.T @ profiled @ basis).diagonal().reshape(6, 6) / space.weight[1]
    torch.testing.assert_close(blocks.values, diagonal.clamp_min(0))


@pytest.mark.parametrize("n", [200, 2000])
def test_the_price_of_a_matrix_is_that_of_the_whole_curvature(n):
    """Of one draw of signs, within some hundredths where shrinkage leaves little, a tenth or so elsewhere."""
    data, space, free = at("matrix", *confused(n, 16))
    whole = WholePath(map_derivatives(data, space, free, dense=False), space.weight)
    path = MatrixPath(data, space, free)
    for shrinkage, accuracy in ((1000.0, 0.02), (100.0, 0.05), (10.0, 0.12), (1.0, 0.2)):
        exact = whole.effective_parameters(shrinkage)
        assert path.effective_parameters(shrinkage) == pytest.approx(exact, rel=accuracy, abs=0.3)
        assert path.effective_parameters(shrinkage, 2) == path.effective_parameters(shrinkage) + 1


@pytest.mark.slow
@pytest.mark.parametrize("n", [400, 3000])
def test_a_wide_matrix_is_fitted_as_a_narrow_one(monkeypatch, n):
    (narrow, wide), held = whole_and_not(monkeypatch, *confused(n + 4000, 12), n, most_together=100)
    assert narrow.chosen.output_map == wide.chosen.output_map == "matrix"
    assert held[1] == pytest.approx(held[0], abs=0.01)
    assert wide.chosen.expected_change == pytest.approx(narrow.chosen.expected_change, abs=0.02)


@pytest.mark.slow
def test_a_matrix_of_many_classes_finds_what_a_vector_cannot():
    logits, target = confused(7000, 50)
    part = [(logits[:4000], target[:4000])]
    vector, matrix = (fit_clamp(IDENTITY, part, grids=(), output_maps=(kind,)) for kind in ("vector", "matrix"))
    held = [float(F.cross_entropy(one.clamp.scale(logits[4000:]), target[4000:])) for one in (vector, matrix)]
    truth = logits + 0.7 * logits.roll(1, 1)
    best = float(F.cross_entropy(truth[4000:], target[4000:]))
    assert best < held[1] < held[0] - 0.6 * (held[0] - best)
    found = matrix.clamp.class_matrix / matrix.clamp.temperature
    strongest = (found - found.diagonal().diag()).argmax(1)
    assert float((strongest == (torch.arange(50) - 1) % 50).double().mean()) > 0.9


@pytest.mark.slow
def test_a_large_matrix_is_fitted_only_where_its_first_step_promises_something(monkeypatch):
    monkeypatch.setattr("lightning_clamp.clamping.map_candidates._CHEAP", 0)
    monkeypatch.setattr("lightning_clamp.clamping.shrinkage._MOST_TOGETHER", 100)
    pays, does_not = (fit_clamp(IDENTITY, [data], grids=()) for data in (confused(3000, 12), distorted(3000, 12)))
    assert pays.chosen.output_map == "matrix"
    (matrix,) = (one for one in does_not.candidates if one.output_map == "matrix")
    assert matrix.refusal.code == "promises too little"
    assert "matrix because its first step promises less than it costs" in does_not.reason


def test_a_promise_is_what_a_quadratic_model_says():
    """At the temperature alone, at the strength where it is most, against the parameters' own curvature and price."""
    logits, target = confused(2000, 8)
    data, space, _ = at("matrix", logits, target)
    base = temperature_map(data, 8, fit_temperature(data), dense=False)
    free = space.temperature_only(base.temperature)
    at_base = map_derivatives(data, space, free, dense=False)
    curvature, gradient = at_base.curvature[:64, :64], at_base.gradient[:64]
    expected = []
    for strength in (10 ** (k / 2) for k in range(-3, 8)):
        inverse = torch.linalg.inv(curvature + strength * space.weight[1] * torch.eye(64).double())
        step = -inverse @ gradient
        change = gradient @ step + 0.5 * step @ curvature @ step
        expected.append(float(change + (inverse @ curvature).trace()))
    assert promise(data, space, base) == pytest.approx(min(expected), rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1000, 4000])
def test_the_clamp_is_that_of_the_whole_curvature(monkeypatch, n):
    (whole, blocks), held = whole_and_not(monkeypatch, *distorted(n + 4000, 120), n, most_together=10)
    assert whole.chosen.output_map == blocks.chosen.output_map == "vector"
    assert held[1] == pytest.approx(held[0], abs=0.003)
    assert blocks.chosen.expected_change == pytest.approx(whole.chosen.expected_change, abs=0.005)


@pytest.mark.filterwarnings("ignore:The calibration set has no samples")
def test_no_sum_has_a_row_and_a_column_for_every_class(monkeypatch):
    """What ranks add up, and what an accelerator hands to the processor, are vectors."""
    sizes, total = [], Ranks.total

    def noted(self, terms, error=None):
        sizes.extend(term.numel() for term in terms)
        return total(self, terms, error)

    monkeypatch.setattr(Ranks, "total", noted)
    result = fit_clamp(IDENTITY, [distorted(100, 3000)], grids=(), output_maps=("vector",))
    (vector,) = (one for one in result.candidates if one.output_map == "vector")
    assert vector.refusal is None
    assert 1 < vector.effective_parameters < 100
    assert max(sizes) < 3000**2 / 100


def test_a_grid_starts_from_the_temperature_where_the_map_is_too_large_to_be_fitted_with_it(monkeypatch):
    network, x, y = shifted_images(2000)
    monkeypatch.setattr("lightning_clamp.clamping.selection._MOST_CURVATURE", 4)
    result = fit_clamp(network, batches(x, y), grids=(1,), output_maps=("vector",))
    on_grid = {one.output_map: one for one in result.candidates if one.grid}
    assert on_grid.keys() == {"temperature", "vector"}
    assert result.chosen in on_grid.values()


@pytest.mark.parametrize("kind", ["bias", "vector", "matrix"])
def test_nothing_is_sent_to_a_device_once_space_and_values_are_there(kind):
    _, space, free = at(kind, *distorted(100, 6), seen=torch.arange(6) > 0)
    logits = torch.empty(50, 6, dtype=torch.float64, device="meta")
    there = space.beside(logits)
    assert space.beside(logits) is there
    assert space.beside(torch.zeros(1, 6)) is space
    with Sent() as sent:
        mapped = there.apply(logits, free.to("meta"))
        there.pull(logits, mapped)
        there.pull_logits(logits, mapped, free.to("meta"))
        there.curvature(logits, mapped)
    assert sent.count == 2  # the values


def test_nor_where_there_is_a_skew():
    data, _, _ = at("vector", *distorted(100, 2))
    space = beta_space(data, logit_moments(data, 2), 1.5)
    logits = torch.empty(50, 2, dtype=torch.float64, device="meta")
    there, free = space.beside(logits), space.temperature_only(1.5).to("meta")
    with Sent() as sent:
        mapped = there.apply(logits, free)
        there.pull(logits, mapped)
        there.curvature(logits, mapped)
    assert sent.count == 0


def test_outer_products_are_whole_although_one_half_is_computed(monkeypatch):
    monkeypatch.setattr("lightning_clamp.clamping.score_pass._PANEL", 4)
    for count in (1, 4, 11):
        scores = torch.randn(20, count, generator=torch.Generator().manual_seed(0)).double()
        torch.testing.assert_close(_square(scores), scores.T @ scores)


def test_a_batch_more_of_the_first_look_is_no_number_more_to_wait_for():
    logits, target = distorted(400, 5)
    counts = []
    for size in (200, 50):
        data = CalibrationSet(IDENTITY, batches(logits, target, size), Spec(), cache_bytes=None)
        with Sent() as sent:
            summarize(data)
        counts.append(sent.read)
    assert counts[0] == counts[1]
