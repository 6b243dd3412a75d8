"""Output maps: the optimum, what shrinks it, what it costs, how sure the gain is, and known answers."""

import math

import pytest
import torch
from torch.nn import functional as F

from lightning_clamp import fit_clamp
from lightning_clamp.clamping.descent import minimise
from lightning_clamp.clamping.map_loss import MapLoss, map_derivatives, row_losses, standard_error
from lightning_clamp.clamping.moments import logit_moments
from lightning_clamp.clamping.newton import effective_parameters, solve
from lightning_clamp.clamping.output_map import map_space, n_parameters
from lightning_clamp.clamping.paths import WholePath
from lightning_clamp.clamping.shrinkage import (
    SHRINKAGES,
    Reference,
    average,
    fit_output_map,
    fit_path,
    shrinkage_path,
    temperature_map,
)
from lightning_clamp.clamping.temperature import fit_temperature
from tests.scenarios import calibrated_logits, rows, sampled

KINDS = ["temperature", "bias", "vector", "matrix"]
MATRIX = torch.eye(5) + 0.6 * torch.diag(torch.ones(4), 1) - 0.4 * torch.diag(torch.ones(4), -1)


def distorted(n):
    """Logits of five classes, each with a scale and a bias that are wrong."""
    logits, target = calibrated_logits(n)
    return logits * torch.linspace(1, 2, 5).double() + torch.linspace(-1, 1, 5).double(), target


def mixed(n, seed=0):
    """Logits of five classes that lack a matrix, labels, and the logits with it."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, 5, generator=generator, dtype=torch.float64)
    truth = logits @ MATRIX.T.double()
    return logits, sampled(truth, seed + 1), truth


def base_of(logits, target):
    data = rows(logits, target)
    return temperature_map(data, logits.shape[1], fit_temperature(data), dense=False)


def fitted(kind, logits, target, shrinkage):
    data, base = rows(logits, target), base_of(logits, target)
    space = map_space(kind, logit_moments(data, logits.shape[1]))
    start = space.temperature_only(base.temperature)
    path = WholePath(map_derivatives(data, space, start, dense=False), space.weight)
    fit = fit_output_map(MapLoss(data, space), path, shrinkage, start, len(target))
    assert fit is not None
    return fit


def random_point(space, scale=0.2):
    noise = torch.randn(len(space.weight), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return space.temperature_only(1.5) + scale * noise


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_are_those_of_automatic_differentiation(kind):
    logits, target = distorted(200)
    space = map_space(kind, logit_moments(rows(logits, target), 5))
    free = random_point(space)

    def losses(free):
        return F.cross_entropy(space.apply(logits, free), target, reduction="none")

    sums = map_derivatives(rows(logits, target), space, free, dense=True)
    scores = torch.autograd.functional.jacobian(losses, free)
    torch.testing.assert_close(sums.gradient, scores.sum(0))
    torch.testing.assert_close(sums.covariance, scores.T @ scores)
    torch.testing.assert_close(sums.curvature, torch.autograd.functional.hessian(lambda f: losses(f).sum(), free))
    loss, gradient = MapLoss(rows(logits, target), space)(free)
    assert loss == pytest.approx(float(losses(free).sum()))
    torch.testing.assert_close(gradient, scores.sum(0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_is_linear_in_the_logits_and_leaves_them_alone_without_deviations(kind):
    logits, target = distorted(50)
    space = map_space(kind, logit_moments(rows(logits, target), 5))
    torch.testing.assert_close(space.apply(logits, space.temperature_only(2.0)), logits / 2)
    free, change = random_point(space), torch.randn(50, 5).double()
    moved = space.apply(logits + change, free) - space.apply(logits, free)
    torch.testing.assert_close(moved, space.linear(change, free))
    torch.testing.assert_close(space.apply(torch.zeros(1, 5).double(), free)[0], space.offset(free))


@pytest.mark.parametrize("kind", ["bias", "vector", "matrix"])
@pytest.mark.parametrize("shrinkage", [1.0, 100.0])
def test_the_optimum_is_that_of_the_objective_as_documented(kind, shrinkage):
    """Against L-BFGS of torch, far beyond the tolerance, on the formula of the docstring."""
    logits, target = distorted(2000)
    fit = fitted(kind, logits, target, shrinkage)
    centre = logits.mean(0)
    square = float(((logits - centre) ** 2).mean())
    own = torch.zeros(5, 5, dtype=torch.float64, requires_grad=kind != "bias")
    bias = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    common = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    allowed = torch.eye(5).double() if kind == "vector" else torch.ones(5, 5).double()
    charge = square * (4 * torch.ones(5, 5) - 3 * torch.eye(5)).double()

    def objective():
        deviations = own * allowed
        mapped = common * logits + (logits - centre) @ deviations.T + bias
        ridge = (charge * deviations**2).sum() + (bias**2).sum()
        return F.cross_entropy(mapped, target, reduction="sum") + shrinkage / 2 * ridge

    parameters = [part for part in (own, bias, common) if part.requires_grad]
    optimizer = torch.optim.LBFGS(parameters, max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = objective()
        value.backward()
        return value

    optimizer.step(closure)
    found = 2000 * fit.nll + 0.5 * float(fit.ridge @ fit.free**2)
    best = float(objective().detach())
    assert best - 1e-6 <= found <= best + 0.02 * fit.effective_parameters


def test_one_curvature_says_what_every_strength_costs_and_inverts():
    logits, target = distorted(500)
    data, base = rows(logits, target), base_of(logits, target)
    space = map_space("matrix", logit_moments(data, 5))
    at = map_derivatives(data, space, space.temperature_only(base.temperature), dense=False)
    path = WholePath(at, space.weight)
    for shrinkage in (0.1, 30.0):
        ridge = shrinkage * space.weight
        assert path.effective_parameters(shrinkage) == pytest.approx(effective_parameters(at, ridge), rel=1e-6)
        gradient = torch.randn(len(ridge)).double()
        step = path.solve(shrinkage, gradient)
        torch.testing.assert_close((at.curvature + ridge.diag()) @ step, gradient, rtol=1e-6, atol=1e-6)


def test_correlated_rows_are_charged_by_their_covariance():
    logits, target = distorted(300)
    data, base = rows(logits, target), base_of(logits, target)
    space = map_space("vector", logit_moments(data, 5))
    at = map_derivatives(data, space, space.temperature_only(base.temperature), dense=True)
    ridge = 3 * space.weight
    expected = float((torch.linalg.inv(at.curvature + ridge.diag()) @ at.covariance).trace())
    assert WholePath(at, space.weight).effective_parameters(3) == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bias", "vector", "matrix"])
def test_shrinkage_leads_from_the_temperature_to_the_free_map(kind):
    """The weaker, the more effective parameters and the larger the gain."""
    logits, target = distorted(2000)
    base = base_of(logits, target)
    fits = [fitted(kind, logits, target, shrinkage) for shrinkage in (1e9, *SHRINKAGES)]
    costs, losses = [fit.effective_parameters for fit in fits], [fit.nll for fit in fits]
    assert costs == sorted(costs)
    assert losses == sorted(losses, reverse=True)
    assert costs[0] == pytest.approx(1, abs=1e-4)
    assert losses[0] == pytest.approx(base.nll, abs=1e-6)
    assert costs[-1] <= n_parameters(kind, 5)


@pytest.mark.parametrize("change", [lambda z: 50 * z, lambda z: z + 7], ids=["units", "constant"])
@pytest.mark.parametrize("kind", ["vector", "matrix"])
def test_neither_units_nor_a_constant_matter(kind, change):
    logits, target = distorted(1000)
    one, other = (fitted(kind, z, target, 10.0) for z in (logits, change(logits)))
    mapped = [fit.space.apply(z, fit.free).softmax(1) for fit, z in ((one, logits), (other, change(logits)))]
    torch.testing.assert_close(mapped[0], mapped[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("maps", [("vector",), ("vector", "matrix")])
def test_permuted_classes_give_the_permuted_map(maps):
    logits, target, _ = mixed(1000)
    order = torch.tensor([3, 0, 4, 1, 2])
    inverse = order.argsort()
    one = fit_clamp(torch.nn.Identity(), [(logits, target)], grids=(), output_maps=maps).clamp
    other = fit_clamp(torch.nn.Identity(), [(logits[:, order], inverse[target])], grids=(), output_maps=maps).clamp
    probs, permuted = one.scale(logits).softmax(1), other.scale(logits[:, order]).softmax(1)
    torch.testing.assert_close(probs[:, order], permuted, rtol=1e-4, atol=1e-5)


def test_parameters_are_counted_without_what_changes_nothing():
    assert [n_parameters(kind, 10) for kind in KINDS] == [1, 10, 19, 99]


def test_vector_scaling_undoes_a_known_distortion():
    logits, target = calibrated_logits(40000)
    scale, bias = torch.tensor([1.0, 1.5, 2.0, 2.5, 3.0]).double(), torch.tensor([1.0, -1.0, 0.5, -0.5, 0.0]).double()
    clamp = fit_clamp(torch.nn.Identity(), [(logits * scale + bias, target)], grids=(), output_maps=("vector",)).clamp
    torch.testing.assert_close(clamp.class_scale / clamp.temperature, 1 / scale, rtol=0.05, atol=0.02)
    recovered = clamp.class_bias + bias * clamp.class_scale / clamp.temperature
    torch.testing.assert_close(recovered - recovered.mean(), torch.zeros(5).double(), rtol=0, atol=0.1)


@pytest.mark.parametrize(("n", "within"), [(1000, 0.03), (5000, 0.01)])
def test_a_matrix_is_found_where_there_is_one(n, within):
    logits, target, truth = mixed(n + 6000)
    result = fit_clamp(torch.nn.Identity(), [(logits[:n], target[:n])], grids=())
    held = F.cross_entropy(result.clamp.scale(logits[n:]), target[n:])
    assert result.chosen.output_map == "matrix"
    assert float(held) < float(F.cross_entropy(truth[n:], target[n:])) + within
    assert "class" in result.reason
    # The truth's row 0 has class 1's logit in it, and so on.
    found = result.clamp.class_matrix / result.clamp.temperature
    found = found - found.mean(0)
    torch.testing.assert_close(found, (MATRIX - MATRIX.mean(0)).double(), rtol=0, atol=0.3 if n == 1000 else 0.12)


def test_scales_may_be_negative_where_the_data_say_so():
    """The logits' mean tells nearly as much as their difference, and one of the scales has the wrong sign."""
    generator = torch.Generator().manual_seed(0)
    k, s = 2 * torch.randn(2, 6000, generator=generator)
    target = (torch.rand(6000, generator=generator) < (0.5 * s + 0.8 * k).sigmoid()).long()
    logits = torch.stack([k - s, k + s], 1)
    result = fit_clamp(torch.nn.Identity(), [(logits[:1000], target[:1000])], grids=())
    assert float(result.clamp.class_scale.min()) < 0 < float(result.clamp.temperature)
    held = F.cross_entropy(result.clamp.scale(logits[1000:]), target[1000:])
    truth = F.binary_cross_entropy_with_logits((0.5 * s + 0.8 * k)[1000:], target[1000:].float())
    assert float(held) == pytest.approx(float(truth), abs=0.01)


@pytest.mark.slow
def test_where_there_is_nothing_to_find_the_temperature_is_kept_or_next_to_nothing_lost():
    chosen, lost = [], []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        logits = 2 * torch.randn(3500, 10, generator=generator, dtype=torch.float64)
        target = sampled(logits, seed + 100)
        part = [(2 * logits[:500], target[:500])]
        clamps = [
            fit_clamp(torch.nn.Identity(), part, grids=()),
            fit_clamp(torch.nn.Identity(), part, method="temperature"),
        ]
        held = [float(F.cross_entropy(one.clamp.scale(2 * logits[500:]), target[500:])) for one in clamps]
        chosen.append(clamps[0].chosen.output_map)
        lost.append(held[0] - held[1])
    assert chosen.count("temperature") >= 14
    assert sum(lost) / len(lost) < 0.001


def test_the_average_is_no_worse_than_the_mean_and_counts_the_temperature():
    logits, target = distorted(400)
    data, base = rows(logits, target), base_of(logits, target)
    space = map_space("matrix", logit_moments(data, 5))
    against = Reference.of(data, base, 1.0, 400)
    path = list(fit_path(space, shrinkage_path(data, space, base, dense=False), base, against))
    mean, losses_of_rows = average(path, against, head_start=3.0)
    assert float(torch.cat(losses_of_rows).mean()) == pytest.approx(mean.nll)
    weights = torch.softmax(-torch.tensor([-3.0, *(criterion for _, criterion in path)]).double() / 3, 0)
    losses = torch.tensor([base.nll, *(fit.nll for fit, _ in path)]).double()
    assert mean.nll <= float(weights @ losses) + 1e-9
    costs = torch.tensor([1.0, *(fit.effective_parameters for fit, _ in path)]).double()
    assert mean.effective_parameters == pytest.approx(float(weights @ costs))


def test_the_standard_error_is_that_of_the_paired_differences():
    logits, target = distorted(500)
    one, other = fitted("vector", logits, target, 1.0), base_of(logits, target)
    change = [F.cross_entropy(fit.space.apply(logits, fit.free), target, reduction="none") for fit in (one, other)]
    expected = float((change[0] - change[1]).std(correction=0)) / math.sqrt(500)
    data = rows(logits, target)
    first, second = (row_losses(data, fit.space, fit.free) for fit in (one, other))
    assert standard_error(data, first, second) == pytest.approx(expected, rel=1e-9)
    assert standard_error(data, first, first) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vector", "matrix"])
def test_the_expected_change_is_unbiased_where_the_model_is_right(kind):
    """Held-out minus calibration loss is twice the effective parameters over 2n, on average."""
    spread = []
    for seed in range(60):
        logits, target = calibrated_logits(21000)
        order = torch.randperm(21000, generator=torch.Generator().manual_seed(seed))
        logits, target = logits[order], target[order]
        fit = fitted(kind, logits[:500], target[:500], 10.0)
        held = F.cross_entropy(fit.space.apply(logits[500:], fit.free), target[500:])
        known = F.cross_entropy(logits[500:], target[500:]) - F.cross_entropy(logits[:500], target[:500])
        spread.append((float(held - known) - fit.nll, fit.effective_parameters / 500))
    gap, price = torch.tensor(spread).T
    error = float(gap.std()) / math.sqrt(len(spread))
    assert abs(float(gap.mean() - price.mean())) < 4 * error + 0.1 * float(price.mean())


def test_directions_without_curvature_are_left_at_zero():
    matrix = torch.diag(torch.tensor([2.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(solve(matrix, torch.tensor([1.0, 1.0]).double()), torch.tensor([0.5, 0.0]).double())
    known = matrix + torch.eye(2).double()
    torch.testing.assert_close(known @ solve(known, torch.eye(2).double()), torch.eye(2).double())


def test_descent_finds_the_minimum_of_a_function_its_inverse_knows_badly():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    hessian, centre = root @ root.T + torch.eye(6).double(), torch.randn(6, generator=generator).double()

    def objective(point):
        away = point - centre
        return 0.5 * float(away @ hessian @ away) + float((away**4).sum()), hessian @ away + 4 * away**3

    point, value = minimise(
        objective, torch.zeros(6).double(), lambda g: 0.1 * g, lambda _: lambda g: 0.1 * g, tolerance=1e-12, patience=50
    )
    torch.testing.assert_close(point, centre, rtol=0, atol=1e-5)
    assert value == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("maps", [("vector",), ("matrix",)])
def test_a_network_that_says_the_opposite_is_turned_round(maps):
    """No temperature helps, and the common scale comes out negative: the classes' own scales carry the sign."""
    logits, target = calibrated_logits(4000)
    result = fit_clamp(torch.nn.Identity(), [(-2 * logits[:2000], target[:2000])], grids=(), output_maps=maps)
    held = F.cross_entropy(result.clamp.scale(-2 * logits[2000:]), target[2000:])
    assert float(held) < float(F.cross_entropy(logits[2000:], target[2000:])) + 0.02
    assert 0 < float(result.clamp.temperature) < 10
