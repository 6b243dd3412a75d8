import math

import pytest
import torch
from scipy.optimize import brentq
from torch.nn import functional as F

from lightning_clamp import fit_clamp
from lightning_clamp.clamping.temperature import fit_temperature
from tests.scenarios import calibrated_logits, rows


def optimum(logits, target) -> float:
    """T by bisection on the slope of the loss in 1/T, in float64."""
    beta = torch.tensor(0.0, dtype=torch.float64)

    def slope(value: float) -> float:
        point = (beta + value).requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits.double() * point, target), point)
        return float(gradient)

    return 1 / brentq(slope, 1e-5, 1e3, xtol=1e-15, rtol=1e-14)


@pytest.mark.parametrize("temperature", [0.1, 0.4, 2.0, 20.0, 500.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_optimum_found_by_bisection_is_reached(temperature, dtype):
    logits, target = calibrated_logits(5000)
    logits = (temperature * logits).to(dtype)
    result = fit_clamp(torch.nn.Identity(), [(logits, target)], method="temperature")
    expected = optimum(logits, target)
    assert expected == pytest.approx(temperature, rel=0.1)
    assert float(result.clamp.temperature) == pytest.approx(expected, rel=1e-5)


def test_the_official_test_problem_has_its_official_temperature():
    """Root of the slope for the inputs of the reference runs (own computation there): T = 4.17344, NLL 1.84515."""
    i, k = torch.arange(1000.0, dtype=torch.float64)[:, None], torch.arange(10.0, dtype=torch.float64)
    logits = 6 * torch.sin(1.7 * i + 2.3 * k) + 3 * torch.cos(0.37 * i * k)
    n = torch.arange(1000)
    target = torch.where((37 * n) % 100 < 62, logits.argmax(1), (n**3 + 3 * n + n // 5) % 10)
    fit = fit_temperature(rows(logits, target))
    assert math.exp(fit.log_temperature) == pytest.approx(4.173442440049936, rel=1e-9)
    assert fit.nll == pytest.approx(1.8451527779382655, rel=1e-12)


def test_a_calibrated_network_has_temperature_1():
    logits, target = calibrated_logits(20000)
    assert fit_temperature(rows(logits, target)).log_temperature == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize("start", [-9.0, 0.0, 9.0])
def test_the_start_does_not_matter(start):
    logits, target = calibrated_logits()
    there = fit_temperature(rows(3 * logits, target), start=start).log_temperature
    assert there == pytest.approx(fit_temperature(rows(3 * logits, target)).log_temperature, abs=1e-8)


def test_where_no_temperature_is_best_it_says_so():
    """All right: the colder the better. All wrong: the hotter the better, and the hottest it is."""
    logits, _ = calibrated_logits(200)
    assert not fit_temperature(rows(logits, logits.argmax(1))).determined
    wrong = fit_temperature(rows(-logits, logits.argmax(1)))
    assert wrong.determined
    assert not wrong.informed
    assert wrong.nll == pytest.approx(math.log(5), abs=1e-3)
