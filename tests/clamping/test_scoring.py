"""The scores, the curvature and the score test against brute force; the fit against shifts that are known."""

import math
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from scipy.stats import chi2
from torch import nn
from torch.nn import functional as F

from lightning_clamp import fit_clamp
from lightning_clamp.clamping import score_pass as passes_of_scores
from lightning_clamp.clamping import scoring
from lightning_clamp.clamping.blocks import BlockDerivatives
from lightning_clamp.clamping.frozen import frozen
from lightning_clamp.clamping.map_loss import row_losses
from lightning_clamp.clamping.moments import logit_moments
from lightning_clamp.clamping.newton import LossDerivatives, effective_parameters, score_test
from lightning_clamp.clamping.output_map import map_space
from lightning_clamp.clamping.pace import Pace, to_come
from lightning_clamp.clamping.passes import CalibrationSet, summed
from lightning_clamp.clamping.perturbation import make_grid
from lightning_clamp.clamping.score_pass import score_pass
from lightning_clamp.clamping.scoring import bounded_step, first_pass, fit_grid, start_without_grid
from lightning_clamp.clamping.shrinkage import temperature_map
from lightning_clamp.clamping.summary import summarize
from lightning_clamp.clamping.temperature import fit_temperature
from lightning_clamp.spec import Spec
from tests.scenarios import SHIFT, DenseNet, SmallNet, batches, calibrated_logits, images, rows, sampled, shifted_images


def space_of(kind, y):
    """Of any logits: only the centre is theirs."""
    logits = calibrated_logits(100, 3 if y.ndim > 1 else 4)
    return map_space(kind, logit_moments(rows(*logits), logits[0].shape[1]))


def sums_at(network, x, y, size, coefficients=None, free=(0.7,), kind="temperature", per_batch=16):
    """Score sums of a grid and an output map at these coefficients and free parameters of the map."""
    grid = make_grid(size, x.shape[1:])
    space, free = space_of(kind, y), torch.as_tensor(free, dtype=torch.float64)
    data = CalibrationSet(network, batches(x, y, per_batch), Spec(), cache_bytes=2**20)
    image = None if coefficients is None else grid.image(coefficients).to(x.dtype)
    with frozen(network):
        (sums,) = score_pass(data, image, space, free, [grid], dense=y.ndim > 1, what="")
    return sums, grid


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["temperature", "bias", "vector", "matrix"])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("size", [1, 2])
def test_gradient_and_curvature_are_those_of_automatic_differentiation(dense, size, kind, monkeypatch):
    """Curvature: for class outputs the sum of score outer products, for dense ones on average Gauss and Newton's."""
    monkeypatch.setattr(passes_of_scores, "_PROBES", 400)
    network = DenseNet().double() if dense else SmallNet(dtype=torch.float64)
    n = 12 if dense else 40
    x = images(n, dtype=torch.float64)
    y = torch.randint(3, (n, 8, 8)) if dense else torch.randint(4, (n,))
    grid = make_grid(size, (3, 8, 8))
    space, p = space_of(kind, y), grid.n_coefficients
    free = space.temperature_only(1.3) + 0.1 * torch.randn(len(space.weight))
    point = torch.cat([0.1 * torch.randn(p).double(), free])
    sums, _ = sums_at(network, x, y, size, point[:p], free, kind)

    def scaled(parameters):
        logits = network(x + grid.image(parameters[:p])).movedim(1, -1)
        rows = space.apply(logits.reshape(-1, logits.shape[-1]), parameters[p:])
        return rows.reshape(logits.shape).movedim(-1, 1)

    def losses(parameters):
        return F.cross_entropy(scaled(parameters), y, reduction="none").reshape(n, -1).sum(1)

    scores = torch.autograd.functional.jacobian(losses, point)
    torch.testing.assert_close(sums.gradient, scores.sum(0))
    torch.testing.assert_close(sums.covariance, scores.T @ scores)
    if not dense:
        torch.testing.assert_close(sums.curvature, scores.T @ scores)
        return
    jacobian = torch.autograd.functional.jacobian(scaled, point).movedim(1, 3).flatten(0, 2)
    probs = scaled(point).detach().softmax(1).movedim(1, 3).flatten(0, 2)
    centred = jacobian - (probs[:, :, None] * jacobian).sum(1, keepdim=True)
    exact = torch.einsum("mcp,mc,mcq->pq", centred, probs, centred)
    # 400 probes of 12 items leave 2 % of chance.
    scale = exact.diagonal().clamp_min(1e-9).rsqrt()
    correlations = [scale[:, None] * matrix * scale for matrix in (sums.curvature, exact)]
    torch.testing.assert_close(*correlations, rtol=0, atol=0.1)


def test_sums_are_additive_over_any_split():
    network, x, y = SmallNet(dtype=torch.float64), images(300, dtype=torch.float64), torch.randint(4, (300,))
    whole, _ = sums_at(network, x, y, 2)
    parts = [sums_at(network, a, b, 2)[0] for a, b in ((x[:7], y[:7]), (x[7:200], y[7:200]), (x[200:], y[200:]))]
    for total, part in zip(whole, summed((tuple(p) for p in parts), [t.shape for t in whole]), strict=True):
        torch.testing.assert_close(total, part, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_the_score_test_is_chi_squared_where_the_input_is_right():
    """Labels drawn from the network itself: the statistic has mean p and the p-values are uniform."""
    network = SmallNet()
    statistics = []
    for seed in range(150):
        x = images(1000, seed)
        y = sampled(network(x).detach().double(), 1000 + seed)
        sums, _ = sums_at(network, x, y, 1, free=(1.0,), per_batch=1000)
        statistics.append(score_test(sums, 3).statistic)
    statistics = torch.tensor(statistics)
    assert float(statistics.mean()) == pytest.approx(3, abs=4 * math.sqrt(6 / 150))
    assert 0.03 < float((statistics > chi2.ppf(0.9, 3)).double().mean()) < 0.2


@pytest.mark.slow
def test_a_known_shift_and_temperature_are_recovered():
    network, x, y = shifted_images(20000, temperature=2.0)
    result = fit_clamp(network, batches(x, y, 2000), grids=(1,), output_maps=("temperature",))
    assert result.chosen is not None
    assert result.chosen.grid == 1
    assert result.chosen.p_value < 1e-10
    assert float(result.clamp.temperature) == pytest.approx(2.0, rel=0.03)
    torch.testing.assert_close(result.clamp.perturbation, SHIFT.expand(3, 8, 8), rtol=0, atol=0.05)
    held_x, held_y = (images(5000, 99) - SHIFT), sampled(SmallNet()(images(5000, 99)).detach().double(), 7)
    scaled = result.clamp.scale(network(result.clamp.perturb(held_x)))
    ideal = F.cross_entropy(SmallNet()(images(5000, 99)), held_y)
    assert float((F.cross_entropy(scaled, held_y) - ideal).detach()) < 0.001


def test_a_calibrated_network_is_left_alone():
    network = SmallNet()
    x = images(4000)
    result = fit_clamp(network, batches(x, sampled(network(x).detach().double())))
    assert result.chosen is not None
    assert result.chosen.name == "temperature"
    assert result.clamp.perturbation is None
    assert float(result.clamp.temperature) == pytest.approx(1, abs=0.05)


def test_the_prediction_before_the_first_step_is_close_to_what_is_achieved():
    network, x, y = shifted_images(4000)
    result = fit_clamp(network, batches(x, y), grids=(1,), output_maps=("temperature",))
    assert result.chosen is not None
    assert result.chosen.achieved_gain == pytest.approx(result.chosen.predicted_gain, rel=0.3)


@pytest.mark.parametrize("size", [1, 2])
def test_the_best_iterate_is_a_minimum_of_the_calibration_loss(size):
    network, x, y = shifted_images(3000)
    result = fit_clamp(network, batches(x, y), grids=(size,), output_maps=("temperature",))
    grid = make_grid(size, (3, 8, 8))
    delta = result.clamp.perturbation

    def loss(moved):
        return float(F.cross_entropy(result.clamp.scale(network(x + moved)), y).detach())

    here = loss(delta)
    for direction in torch.randn(5, grid.n_coefficients).double():
        image = grid.image(direction / direction.norm()).float()
        assert min(loss(delta + 0.2 * image), loss(delta - 0.2 * image)) > here - 1e-5


class CountedNet(nn.Module):
    """Counts the samples that it is given with and without a gradient."""

    def __init__(self, network):
        super().__init__()
        self.network, self.samples = network, Counter()

    def forward(self, x):
        logits = self.network(x)
        self.samples[logits.requires_grad] += len(x)
        return logits


@pytest.fixture
def shifted_start():
    """What the first pass says of a grid on images that are shifted."""
    network, x, y = shifted_images(1000)
    network = CountedNet(network)
    data = CalibrationSet(network, batches(x, y), Spec(), cache_bytes=2**24)
    grid = make_grid(2, (3, 8, 8))
    with frozen(network):
        summary = summarize(data)
        base = temperature_map(summary.logits, 4, fit_temperature(summary.logits), dense=False)
        (first,) = first_pass(data, summary, start_without_grid(summary, base), [grid])
        network.samples.clear()
        yield partial(fit_grid, data, summary, grid, first), network.samples, first, summary


def test_a_grid_that_fell_behind_costs_one_forward_pass(shifted_start):
    """However much it promised: what the step brought decides."""
    fit, samples, first, _ = shifted_start
    left = fit(10, to_beat=-1.0)
    assert samples == {False: 1000}
    assert left.passes == 2
    assert left.map_fit.nll < first.map_fit.nll


def test_a_grid_that_may_still_win_is_followed(shifted_start):
    """As far as the parabola through promise and fall goes on, and some more."""
    fit, samples, first, summary = shifted_start
    one = fit(2, to_beat=0.0)
    fall = summary.n_rows * (first.map_fit.nll - one.map_fit.nll)
    behind, hope = one.expected(first, 0.0, summary), to_come(first.step(Pace())[1], fall) / summary.n_rows
    followed = fit(10, to_beat=behind - 0.9 * hope)
    assert followed.passes > 2
    assert samples[True] > 0
    assert fit(10, to_beat=behind - 1.1 * hope).passes == 2


def test_a_step_that_is_near_certain_brings_the_next_gradient_along(shifted_start):
    """One pass where a forward pass and then one with backward would do; the last is forward alone."""
    fit, samples, first, summary = shifted_start
    half = first.predicted.criterion + first.predicted_gain / 2
    sure = fit(4, to_beat=half + 1e-6)
    assert len(sure.history) == sure.passes > 2
    assert samples == {True: 1000 * (sure.passes - 2), False: 1000}
    samples.clear()
    careful = fit(4, to_beat=half - 1e-6)
    assert samples == {True: 1000, False: 2000}
    assert len(careful.history) == careful.passes - 1
    assert sure.objective(summary.n_rows) < careful.objective(summary.n_rows)


@pytest.mark.parametrize("kind", ["temperature", "vector"])
def test_sums_are_carried_over_to_the_best_map(kind):
    """To first order: of how the coefficients' gradient differs there, the more is known the nearer it is."""
    network = SmallNet()
    x = images(4000)
    y = sampled(network(x).detach().double())
    free = space_of(kind, y).temperature_only(1.0)
    shift = 0.02 * torch.ones(len(free)).double()
    here, there = (sums_at(network, x, y, 2, free=free + move, kind=kind)[0] for move in (0, shift))
    carried = here.at_best_map(shift, there.gradient[12:])
    assert torch.equal(carried.gradient[12:], there.gradient[12:])
    missing, whole = ((one.gradient - there.gradient)[:12].norm() for one in (carried, here))
    assert float(missing) < 0.25 * float(whole)


def test_the_losses_of_a_start_are_read_once(shifted_start, monkeypatch):
    """Where logits are not kept, each reading is a forward pass."""
    fit, _, first, _ = shifted_start
    read = []
    monkeypatch.setattr(scoring, "row_losses", lambda rows, *map_: read.append(rows) or row_losses(rows, *map_))
    best = fit(5, to_beat=0.0)
    assert 0 < len(read) < best.passes
    assert all(rows is not first.logits for rows in read)


def test_the_error_of_a_grid_is_that_of_the_losses_change(shifted_start):
    fit, _, first, _ = shifted_start
    best = fit(10, to_beat=0.0)
    losses = []
    for one in (first, best):
        mapped = torch.cat([one.map_fit.space.apply(batch.logits, one.map_fit.free) for batch in one.logits])
        target = torch.cat([batch.target for batch in one.logits])
        losses.append(F.cross_entropy(mapped, target, reduction="none"))
    change = losses[1] - losses[0]
    expected = float(change.std(correction=0)) / math.sqrt(len(change))
    assert best.standard_error == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("damping", "kept", "expected"),
    [(0.0, -math.inf, 0.25), (0.25, -0.1, 1.0), (0.25, 0.1, 1.0), (0.25, 0.5, 0.25), (1.0, 0.9, 0.25), (0.0, 1.2, 0.0)],
)
def test_damping_follows_how_far_a_step_kept_its_promise(damping, kept, expected):
    assert Pace(damping).after(kept).damping == expected


@pytest.mark.parametrize(
    ("kept", "length"), [(-math.inf, 1), (0.2, 1), (0.5, 2 / 3), (1, 1), (1.2, 1.25), (1.4, 1.5), (2.5, 1.5)]
)
def test_a_step_is_as_long_as_the_last_should_have_been(kept, length):
    """As far as the minimum of the parabola, up to a half more; one that failed is damped instead."""
    pace = Pace().after(kept)
    assert pace.length == pytest.approx(length)
    assert pace.after(1.4).length == pytest.approx(1.5 if length <= 1 else 1)
    assert pace.is_sure is (kept > 0.5)


@pytest.mark.parametrize(
    ("fall", "expected"), [(0.1, 0.2), (0.5, 1 / 6), (1.0, 1 / 3), (1.5, 0.5), (1.8, 3.2), (3.0, 6.0)]
)
def test_what_may_follow_a_fall_is_what_is_left_on_the_parabola(fall, expected):
    """Of a promise of one nat; a third of the fall at least, twice the fall at most."""
    assert to_come(1.0, fall) == pytest.approx(expected)
    assert to_come(10.0, 10 * fall) == pytest.approx(10 * expected)


@pytest.mark.parametrize("max_passes", [1, 2, 6])
def test_passes_are_bounded(max_passes):
    network, x, y = shifted_images(1000)
    result = fit_clamp(network, batches(x, y), max_passes=max_passes)
    assert max(candidate.passes for candidate in result.candidates) <= max_passes
    # One look, one first pass for all, and what each of the fitted grids adds.
    fitted = {candidate.grid: candidate.passes for candidate in result.candidates if candidate.passes}
    assert result.passes == 2 + sum(passes - 1 for passes in fitted.values())


@pytest.mark.slow
def test_repeated_pixels_cost_and_count_what_one_would():
    """A dense output that repeats one decision 16 times: Takeuchi's trace must charge 16 pixels as one sample."""
    network, x, y = shifted_images(4000)
    once = fit_clamp(network, batches(x, y), grids=(1,), output_maps=("temperature",))
    # With an axis for the classes: there are four of them, and four rows and columns.
    repeated = y[:, None, None, None].expand(-1, 1, 4, 4)
    many = fit_clamp(
        lambda inputs: network(inputs)[:, :, None, None].expand(-1, -1, 4, 4),
        batches(x, repeated),
        grids=(1,),
        output_maps=("temperature",),
    )
    one, other = once.candidates[-1], many.candidates[-1]
    assert one.grid == other.grid == 1
    assert other.achieved_gain == pytest.approx(one.achieved_gain, rel=1e-3)
    assert other.effective_parameters == pytest.approx(16 * one.effective_parameters, rel=0.15)
    assert other.criterion == pytest.approx(one.criterion, rel=0.02)
    assert other.lm_statistic == pytest.approx(one.lm_statistic, rel=0.15)


def test_repeated_pixels_are_shrunk_as_one_would_be():
    """The ridge of an output map is as strong against 16 pixels that say the same as against one."""
    logits, y = calibrated_logits(500, 5)
    logits = 2 * logits + torch.linspace(-1, 1, 5).double()
    once = fit_clamp(nn.Identity(), batches(logits, y), grids=())
    tiled = logits[:, :, None, None].expand(-1, -1, 4, 4)
    many_y = y[:, None, None].expand(-1, 4, 4)
    many = fit_clamp(nn.Identity(), batches(tiled, many_y), grids=())
    assert once.chosen.output_map == many.chosen.output_map == "vector"
    torch.testing.assert_close(many.clamp.class_bias, once.clamp.class_bias, rtol=0.1, atol=0.02)
    spaces = [
        map_space("vector", logit_moments(rows(*data), 5), repeats)
        for data, repeats in (((logits, y), 1), ((tiled, many_y), 16))
    ]
    torch.testing.assert_close(spaces[1].weight, 16 * spaces[0].weight)


@pytest.mark.slow
def test_a_grid_that_was_let_in_is_stepped_however_many_classes_there_are():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 100, generator=generator)
    x = torch.randn(2000, 3, 4, 4, generator=generator)

    def network(inputs):
        return 2 * inputs.mean((2, 3)) @ weight * 4

    y = sampled(network(x).double() / 2)
    result = fit_clamp(network, batches(x + 0.15, y), grids=(1,))
    fitted = [c for c in result.candidates if c.grid and not c.refusal]
    assert fitted
    assert all(c.clamp.perturbation is not None and c.passes > 1 for c in fitted)


def test_independent_pixels_are_counted_by_parameter():
    """Pixels whose labels are independent given the logits: the trace is about the number of parameters."""
    network = DenseNet()
    x = images(600)
    y = sampled(network(x).detach().double())
    sums, _ = sums_at(network, x, y, 1, free=(1.0,))
    assert effective_parameters(sums, torch.zeros(4).double()) == pytest.approx(4, rel=0.25)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_step_changes_the_temperature_by_a_factor_of_e_at_most(sign):
    """Outputs that say next to nothing of the labels have next to no curvature in 1/T."""
    curvature = torch.diag(torch.tensor([2.0, 1e-9], dtype=torch.float64))
    sums = LossDerivatives(torch.tensor([0.5, sign * 1e-6], dtype=torch.float64), curvature, curvature)
    step, promise = bounded_step(sums, common_scale=0.2)
    assert torch.equal(step, bounded_step(sums, common_scale=0.2, length=1.5)[0])
    assert (0.2 + float(step[-1])) / 0.2 == pytest.approx(math.exp(-sign))
    assert float(step[0] / step[-1]) == pytest.approx(sign * 0.25e-3)
    # What the quadratic model promises for that share of the step.
    change = -(sums.gradient @ step + 0.5 * step @ curvature @ step)
    assert promise == pytest.approx(float(change), rel=1e-9)


@pytest.mark.parametrize("kind", ["bias", "vector"])
def test_in_blocks_the_model_is_the_same(kind, monkeypatch):
    """As where the map has many parameters: step, promise, test and error."""
    network, x, y = shifted_images(400)
    free = space_of(kind, y).temperature_only(1.3)
    point, ridge = torch.cat([torch.zeros(12).double(), free]), torch.cat([torch.zeros(12), 2 * torch.ones(len(free))])
    ridge = ridge.double().index_fill(0, torch.tensor(len(ridge) - 1), 0.0)
    whole, _ = sums_at(network, x, y, 2, free=free, kind=kind)
    monkeypatch.setattr(passes_of_scores, "_MANY", 3)
    blocks, _ = sums_at(network, x, y, 2, free=free, kind=kind)
    assert isinstance(whole, LossDerivatives)
    assert isinstance(blocks, BlockDerivatives)
    (step, promise), (other, promised) = (sums.shrunk(point, ridge).newton_step() for sums in (whole, blocks))
    torch.testing.assert_close(step, other, rtol=1e-4, atol=1e-6)
    assert promise == pytest.approx(promised, rel=1e-5)
    assert whole.variance(step) == pytest.approx(blocks.variance(step), rel=1e-5)
    tests = [sums.shrunk(point, ridge).score_test(12).statistic for sums in (whole, blocks)]
    assert tests[0] == pytest.approx(tests[1], rel=1e-4)
    damped = [sums.shrunk(point, ridge).damped(12, 0.5).newton_step()[0] for sums in (whole, blocks)]
    torch.testing.assert_close(*damped, rtol=1e-3, atol=1e-5)
    assert float(damped[0][:12].norm()) < float(step[:12].norm())
    shift = 0.1 * torch.ones(len(free)).double()
    carried = [sums.at_best_map(shift, shift).gradient for sums in (whole, blocks)]
    torch.testing.assert_close(*carried, rtol=1e-4, atol=1e-4)


def test_later_passes_take_the_block_of_a_map_of_many_parameters_from_the_first(monkeypatch):
    """It is most of their work. The coefficients' own sums are those of the pass itself."""
    network, x, y = shifted_images(400)
    monkeypatch.setattr(passes_of_scores, "_MANY", 3)
    space, grid = space_of("vector", y), make_grid(2, (3, 8, 8))
    free, data = space.temperature_only(1.3), CalibrationSet(network, batches(x, y, 64), Spec(), cache_bytes=2**20)
    with frozen(network):
        (first,) = score_pass(data, None, space, free, [grid], dense=False, what="")
        image = grid.image(0.1 * torch.ones(12).double()).float()
        (formed,) = score_pass(data, image, space, free, [grid], dense=False, what="")
        (reused,) = score_pass(data, image, space, free, [grid], dense=False, what="", known=first)
    assert reused.of_map is first.of_map
    for name in ("gradient", "own", "cross"):
        assert torch.equal(getattr(reused, name), getattr(formed, name))
    assert not torch.equal(formed.of_map.products, first.of_map.products)


@pytest.mark.parametrize("kind", ["temperature", "bias", "vector", "matrix"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_to_the_input_are_those_of_automatic_differentiation(kind, masked):
    """In closed form through the map; masked logits pass nothing on."""
    network, x, y = SmallNet(dtype=torch.float64), images(40, dtype=torch.float64), torch.randint(4, (40,))
    space = replace(space_of(kind, y), masked=masked)
    free = space.temperature_only(1.3) + 0.1 * torch.randn(len(space.weight)).double()

    def masking(inputs):
        logits = network(inputs)
        return logits.masked_fill(torch.arange(4) == 3, -math.inf) if masked else logits

    y = y % 3
    data = CalibrationSet(masking, [(x, y)], Spec(), cache_bytes=2**20)
    ((gradient, scores),) = passes_of_scores._input_scores(data, x, y, None, space, free)
    point, parameters = x.clone().requires_grad_(), free.clone().requires_grad_()
    scaled = space.apply(masking(point).clamp_min(-1e12), parameters)
    expected = torch.autograd.grad(F.cross_entropy(scaled, y, reduction="sum"), (point, parameters))
    torch.testing.assert_close(gradient, expected[0], rtol=1e-12, atol=1e-12)
    if not masked:
        torch.testing.assert_close(scores.sum(0), expected[1], rtol=1e-12, atol=1e-9)
