"""Scale and bias per class: the optimum, what shrinks it, what it costs, and how sure the gain is."""

import math

import pytest
import torch
from torch.nn import functional as F

from lightning_clamp.clamping.newton import effective_parameters, solve
from lightning_clamp.clamping.output_map import (
    SHRINKAGES,
    fit_output_map,
    logit_square,
    map_derivatives,
    map_space,
    standard_error,
)
from lightning_clamp.clamping.temperature import fit_temperature
from tests.scenarios import calibrated_logits, rows


def distorted(n):
    """Logits of five classes, each with a scale and a bias that are wrong."""
    logits, target = calibrated_logits(n)
    return logits * torch.linspace(1, 2, 5).double() + torch.linspace(-1, 1, 5).double(), target


def fitted(kind, logits, target, shrinkage):
    data = rows(logits, target)
    space = map_space(kind, logits.shape[1], logit_square(data))
    fit = fit_output_map(data, space, shrinkage, space.temperature_only(1.0), dense=False)
    assert fit is not None
    return fit


@pytest.mark.parametrize("kind", ["temperature", "bias", "vector"])
@pytest.mark.parametrize("shrinkage", [0.0, 3.0, 300.0])
def test_the_optimum_is_a_stationary_point_of_loss_and_ridge(kind, shrinkage):
    """By automatic differentiation of the objective as it is documented; no other point of the kind is better."""
    logits, target = distorted(3000)
    fit = fitted(kind, logits, target, shrinkage)
    scale, bias = (part.clone().requires_grad_() for part in fit.point.chunk(2))
    square = float(((logits - logits.mean(1, keepdim=True)) ** 2).mean())
    loss = F.cross_entropy(scale * logits + bias, target, reduction="sum")
    ridge = square * ((scale - scale.mean()) ** 2).sum() + (bias**2).sum()
    by_scale, by_bias = torch.autograd.grad(loss + shrinkage / 2 * ridge, [scale, bias])
    if kind != "vector":
        by_scale = by_scale.sum()
        assert float(scale.detach().std()) < 1e-12
    assert float(by_scale.abs().max()) < 1e-4
    if kind == "temperature":
        assert not fit.point.chunk(2)[1].any()
    else:
        assert float(by_bias.abs().max()) < 1e-4
    assert float(fit.point.chunk(2)[1].sum()) == pytest.approx(0, abs=1e-12)
    assert fit.nll == pytest.approx(float(loss.detach()) / 3000, rel=1e-12)


def test_vector_scaling_undoes_a_known_distortion():
    logits, target = calibrated_logits(40000)
    scale, bias = torch.tensor([1.0, 1.5, 2.0, 2.5, 3.0]).double(), torch.tensor([1.0, -1.0, 0.5, -0.5, 0.0]).double()
    fit = fitted("vector", logits * scale + bias, target, 0.0)
    found_scale, found_bias = fit.point.chunk(2)
    torch.testing.assert_close(found_scale, 1 / scale, rtol=0.05, atol=0.02)
    recovered = found_bias + bias * found_scale
    torch.testing.assert_close(recovered - recovered.mean(), torch.zeros(5).double(), rtol=0, atol=0.1)


@pytest.mark.parametrize("kind", ["bias", "vector"])
def test_shrinkage_leads_from_the_temperature_to_the_free_map(kind):
    """The stronger, the fewer effective parameters and the smaller the gain; at the ends, one and all of them."""
    logits, target = distorted(2000)
    temperature = fit_temperature(rows(logits, target))
    fits = [fitted(kind, logits, target, shrinkage) for shrinkage in (1e9, *SHRINKAGES, 0.0)]
    costs, losses = [fit.effective_parameters for fit in fits], [fit.nll for fit in fits]
    assert costs == sorted(costs)
    assert losses == sorted(losses, reverse=True)
    assert costs[0] == pytest.approx(1, abs=1e-4)
    assert losses[0] == pytest.approx(temperature.nll, abs=1e-7)
    assert float(fits[0].free[-1]) == pytest.approx(math.exp(-temperature.log_temperature), rel=1e-4)
    assert costs[-1] == pytest.approx(fits[-1].space.n_parameters, abs=1e-6)


def test_shrinkage_does_not_depend_on_the_units_of_the_logits():
    logits, target = distorted(1000)
    one, other = (fitted("vector", factor * logits, target, 10.0) for factor in (1.0, 50.0))
    torch.testing.assert_close(one.point.chunk(2)[0], 50 * other.point.chunk(2)[0], rtol=1e-6, atol=1e-9)
    assert one.nll == pytest.approx(other.nll, rel=1e-9)


def test_parameters_are_counted_without_the_common_bias():
    assert [map_space(kind, 10, 1.0).n_parameters for kind in ("temperature", "bias", "vector")] == [1, 10, 19]


def test_derivatives_are_those_of_automatic_differentiation():
    logits, target = distorted(200)
    space = map_space("vector", 5, 2.0)
    free = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def losses(free):
        scale, bias = space.point(free).chunk(2)
        return F.cross_entropy(scale * logits + bias, target, reduction="none")

    _, n_rows, sums = map_derivatives(rows(logits, target), space, free, dense=True)
    scores = torch.autograd.functional.jacobian(losses, free)
    assert n_rows == 200
    torch.testing.assert_close(sums.gradient, scores.sum(0))
    torch.testing.assert_close(sums.covariance, scores.T @ scores)
    torch.testing.assert_close(sums.curvature, torch.autograd.functional.hessian(lambda f: losses(f).sum(), free))


def test_the_standard_error_is_that_of_the_paired_differences():
    logits, target = distorted(500)
    one, other = fitted("vector", logits, target, 1.0).point, fitted("temperature", logits, target, 0.0).point
    change = [
        F.cross_entropy(point.chunk(2)[0] * logits + point.chunk(2)[1], target, reduction="none")
        for point in (one, other)
    ]
    expected = float((change[0] - change[1]).std(correction=0)) / math.sqrt(500)
    assert standard_error(rows(logits, target), one, other) == pytest.approx(expected, rel=1e-9)
    assert standard_error(rows(logits, target), one, one) == 0


@pytest.mark.slow
def test_the_expected_change_is_unbiased_where_the_model_is_right():
    """Held-out minus calibration loss of vector scaling is twice its effective parameters over 2n, on average."""
    spread = []
    for seed in range(60):
        logits, target = calibrated_logits(21000)
        order = torch.randperm(21000, generator=torch.Generator().manual_seed(seed))
        logits, target = logits[order], target[order]
        fit = fitted("vector", logits[:500], target[:500], 10.0)
        scale, bias = fit.point.chunk(2)
        held = F.cross_entropy(scale * logits[500:] + bias, target[500:])
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


def test_correlated_rows_are_charged_by_their_covariance():
    logits, target = distorted(300)
    space = map_space("vector", 5, 2.0)
    free, ridge = space.temperature_only(1.5), torch.linspace(0, 3, 9).double()
    apart, together = (map_derivatives(rows(logits, target), space, free, dense=dense)[2] for dense in (False, True))
    inverse = torch.linalg.inv(together.curvature + ridge.diag())
    assert effective_parameters(together, ridge) == pytest.approx(float((inverse @ together.covariance).trace()))
    assert effective_parameters(apart, ridge) == pytest.approx(float((inverse @ together.curvature).trace()))


@pytest.mark.parametrize("kind", ["temperature", "bias", "vector"])
@pytest.mark.parametrize("n_classes", [2, 3, 10])
def test_free_parameters_are_an_orthonormal_basis_of_the_deviations_and_the_common_scale(kind, n_classes):
    space = map_space(kind, n_classes, 1.0)
    columns = torch.stack([space.point(unit) for unit in torch.eye(space.n_parameters).double()], 1)
    gram = torch.eye(space.n_parameters).double()
    gram[-1, -1] = n_classes
    torch.testing.assert_close(columns.T @ columns, gram)
    torch.testing.assert_close(columns[:, -1], torch.cat([torch.ones(n_classes), torch.zeros(n_classes)]).double())
    torch.testing.assert_close(columns[:n_classes, :-1].sum(0), torch.zeros(space.n_parameters - 1).double())
    torch.testing.assert_close(columns[n_classes:].sum(0), torch.zeros(space.n_parameters).double())
    matrix = torch.randn(2 * n_classes, 2 * n_classes).double()
    matrix = matrix + matrix.T
    torch.testing.assert_close(space.reduced(matrix), matrix @ columns)
    torch.testing.assert_close(space.reduced_twice(matrix), columns.T @ matrix @ columns)
