"""The published method against numbers that its authors' code printed."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_clamp import fit_clamp
from lightning_clamp.clamping.passes import CalibrationSet
from lightning_clamp.clamping.published import data_driven_perturbation
from lightning_clamp.spec import Spec
from tests.scenarios import batches, shifted_images

OFFICIAL = json.loads((Path(__file__).parents[1] / "reference" / "neural_clamping.json").read_text())
RUNS = {
    "a_ce": {"gamma": None},
    "b_focal1": {},
    "c_focal2_adamw": {"gamma": 2.0, "optimizer": "adamw"},
    "d_ce_lam1": {"gamma": None, "norm_weight": 1.0},
    "e_ce_nesterov": {"gamma": None, "nesterov": True},
    "f_ce_adamw": {"gamma": None, "optimizer": "adamw"},
}


@pytest.fixture(scope="module")
def problem():
    """Network, inputs and labels of the reference runs, by formula."""
    grid = torch.meshgrid(*(torch.arange(float(n), dtype=torch.float64) for n in (40, 3, 8, 8)), indexing="ij")
    n, c, h, w = grid
    x = torch.sin(0.13 * n + 0.7 * c + 0.21 * h * w / 8 + 0.05 * h)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)
    ).double()
    formulas = [(0.3, 1.0), (0.1, 0.5), (4.0, 0.3), (0.1, 2.0)]
    with torch.no_grad():
        for parameter, (factor, offset) in zip(network.parameters(), formulas, strict=True):
            j = torch.arange(float(parameter.numel()), dtype=torch.float64)
            parameter.copy_((factor * torch.sin(j + offset)).reshape(parameter.shape))
        best = network(x * 1.1 + 0.2).argmax(1)
    index = torch.arange(40)
    return network, x, torch.where(index % 5 == 0, (best + 1) % 5, best)


def test_the_problem_is_the_official_one(problem):
    network, x, _ = problem
    assert network(x)[0].tolist() == pytest.approx(OFFICIAL["model_logits_x0"], abs=1e-12)


@pytest.mark.parametrize("name", RUNS)
def test_the_trajectory_is_the_official_one(problem, name):
    network, x, y = problem
    start = 0.001 * torch.cos(torch.arange(192.0, dtype=torch.float64)).reshape(3, 8, 8)
    result = fit_clamp(network, batches(x, y, 20), method="published", epochs=30, initial=start, **RUNS[name])
    official = OFFICIAL["train"][name]
    for epoch, loss, temperature in zip(official["epochs"], official["loss"], official["temp"], strict=True):
        step = result.history[epoch - 1]
        assert step["loss"] == pytest.approx(loss, abs=1e-6)
        assert step["temperature"] == pytest.approx(temperature, abs=1e-6)
    delta = result.clamp.perturbation
    assert float(result.clamp.temperature) == pytest.approx(official["final_T"], abs=1e-6)
    assert delta.flatten()[:4].tolist() == pytest.approx(official["final_delta_first4"], abs=1e-6)
    assert float(delta.norm()) == pytest.approx(official["final_delta_norm"], abs=1e-6)
    assert float(delta.sum()) == pytest.approx(official["final_delta_sum"], abs=1e-6)


@pytest.mark.parametrize(
    ("key", "temperature", "scale"), [("set_delta_init", 1.0, 0.0), ("set_delta_init_T2", 2.0, 0.1)]
)
def test_the_data_driven_start_is_the_official_one(problem, key, temperature, scale):
    network, x, y = problem
    data = CalibrationSet(network, batches(x, y, 20), Spec(), cache_bytes=0)
    point = scale * torch.cos(torch.arange(192.0, dtype=torch.float64)).reshape(3, 8, 8)
    start = data_driven_perturbation(data, point, temperature)
    assert float(start.norm()) == pytest.approx(OFFICIAL[key]["norm"], rel=1e-9)
    assert start.flatten()[:4].tolist() == pytest.approx(OFFICIAL[key]["first4"], rel=1e-9)


@pytest.mark.filterwarnings("ignore:The network was left as it is")
def test_equal_seeds_give_equal_clamps_with_dropout_and_augmentation():
    network, x, y = shifted_images(200)
    options = {"method": "published", "epochs": 2, "dropout": 0.3, "augmentation": lambda batch: batch + torch.rand(1)}
    first, second, third = (fit_clamp(network, batches(x, y), seed=s, **options) for s in (1, 1, 2))
    assert first.history == second.history
    assert first.history != third.history


@pytest.mark.filterwarnings("ignore:The network was left as it is")
def test_the_data_driven_start_is_an_option():
    network, x, y = shifted_images(200)
    histories = [
        fit_clamp(network, batches(x, y), method="published", epochs=1, initial=initial).history
        for initial in ("random", "data-driven")
    ]
    assert histories[0] != histories[1]


def test_a_temperature_that_crosses_zero_changes_nothing():
    network, x, y = shifted_images(100)
    options = {"method": "published", "epochs": 1, "optimizer": "adamw", "lr": 6.0, "initial_temperature": 5.0}
    with pytest.warns(UserWarning, match="left as it is: after 1 epoch T = -.*, which is no temperature"):
        result = fit_clamp(network, batches(x, y), **options)
    assert result.clamp.is_identity
    assert result.after == result.before


def test_inputs_that_differ_in_shape_have_no_common_perturbation():
    uneven = [(torch.randn(20, 3, side, side), torch.randint(4, (20,))) for side in (8, 12)]
    network, _, _ = shifted_images(10)
    with pytest.raises(ValueError, match="differ in shape"):
        fit_clamp(network, uneven, method="published")
