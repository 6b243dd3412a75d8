"""The loss that the best temperature leaves: its exact minimum, where it is, and what lies beyond the ladder."""

import math
import warnings

import pytest
import torch
from torch.distributions import StudentT
from torch.nn import functional as F
from torchmetrics import MetricCollection

from lightning_clamp._rows import as_rows
from lightning_clamp.clamping.temperature import fit_temperature
from lightning_clamp.metrics import (
    BestTemperature,
    NegativeLogLikelihood,
    RefinedNegativeLogLikelihood,
    best_temperature,
    refined_negative_log_likelihood,
)
from tests.scenarios import RowList, calibrated_logits, rows, sampled


def exact(logits, target, low=-3.0, high=3.0):
    """Log T and loss by golden sections: the loss has one minimum."""
    ratio = (math.sqrt(5) - 1) / 2

    def loss(log_temperature):
        return float(F.cross_entropy(logits * math.exp(-log_temperature), target))

    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = loss(left), loss(right)
    while high - low > 1e-5:
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = loss(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = loss(right)
    return (low + high) / 2, min(at_left, at_right)


def scaled(lowest, highest):
    return math.exp(float(torch.empty(1).uniform_(math.log(lowest), math.log(highest))))


def tiny(n_classes):
    """A handful of samples, most of them right."""
    n = int(torch.randint(2, 12, ()))
    logits = scaled(0.1, 20) * torch.randn(n, n_classes).double()
    return logits, torch.where(torch.rand(n) < 0.7, logits.argmax(1), torch.randint(n_classes, (n,)))


def tailed(degrees, n=100):
    """Logits of which some are far out, and labels that follow them more or less."""
    logits = scaled(0.1, 10) * StudentT(degrees).sample((n, int(torch.randint(2, 40, ())))).double()
    return logits, sampled(logits * scaled(0.1, 3), seed=int(torch.randint(1000, ())))


def many_classes():
    """As of an image network: a thousand classes, one of which stands out."""
    logits = 2 * torch.randn(100, 1000).double()
    logits[:, 0] += 4 * torch.rand(100).add(0.1).log().neg() + 4
    return logits, sampled(logits * scaled(0.4, 1.5), seed=int(torch.randint(1000, ())))


SETS = {
    "two classes, tiny": (100, lambda: tiny(2)),
    "tiny": (100, lambda: tiny(int(torch.randint(3, 20, ())))),
    "tails": (60, lambda: tailed(1.5)),
    "heavy tails": (60, lambda: tailed(1.0)),
    "normal": (60, lambda: tailed(50.0)),
    "a thousand classes": (8, many_classes),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_it_is_the_exact_minimum(name):
    n_sets, draw = SETS[name]
    inside = 0
    for _ in range(n_sets):
        logits, target = draw()
        log_temperature, loss = exact(logits, target)
        if abs(log_temperature) > math.log(16) - 0.01:
            continue
        inside += 1
        assert float(refined_negative_log_likelihood(logits, target)) == pytest.approx(loss, abs=1e-5)
        assert float(refined_negative_log_likelihood(logits.float(), target)) == pytest.approx(loss, abs=1e-5)
    assert inside > n_sets / 4


@pytest.mark.parametrize("temperature", [0.0626, 0.1, 0.5, 1.0, 3.0, 15.9])
@pytest.mark.parametrize("n_classes", [2, 10])
def test_the_temperature_is_that_of_a_newton_fit(temperature, n_classes):
    logits, target = calibrated_logits(2000, n_classes)
    fit = fit_temperature(rows(logits, target))
    # Turned up so that the best temperature of the set, not of those it was drawn from, is the one asked for.
    logits = logits * math.exp(-fit.log_temperature) * temperature
    assert float(best_temperature(logits, target)) == pytest.approx(temperature, rel=1e-3)
    assert float(refined_negative_log_likelihood(logits, target)) == pytest.approx(fit.nll, abs=1e-6)


def test_one_logit_and_dense_outputs_have_the_minimum_of_their_rows():
    positive = 3 * torch.randn(600).double()
    target = (torch.rand(600) < (positive / 2).sigmoid()).long()
    fit = fit_temperature(RowList([as_rows(positive, target, task="binary")]))
    maps, labels = positive.view(6, 1, 10, 10), target.view(6, 10, 10).clone()
    assert float(refined_negative_log_likelihood(maps, labels, task="binary")) == pytest.approx(fit.nll, abs=1e-7)
    labels[:, 5:] = 255
    kept = refined_negative_log_likelihood(maps[:, :, :5], labels[:, :5], task="binary")
    assert refined_negative_log_likelihood(maps, labels, task="binary", ignore_index=255) == pytest.approx(float(kept))


def test_no_temperature_is_better_and_a_change_of_scale_changes_nothing():
    logits, target = calibrated_logits(500)
    refined = float(refined_negative_log_likelihood(logits, target))
    for scale in (0.2, 1.0, 5.0):
        assert float(refined_negative_log_likelihood(scale * logits, target)) == pytest.approx(refined, abs=1e-7)
        assert refined <= float(F.cross_entropy(scale * logits, target)) + 1e-9


@pytest.mark.parametrize(
    ("labels", "temperature", "why"),
    [("right", 1 / 16, "every sample is right"), ("wrong", 16.0, "the outputs say nothing of the labels")],
)
def test_a_minimum_beyond_the_ladder_is_said_and_the_end_is_given(labels, temperature, why):
    """Sets that a threshold divides, and labels against which the outputs go."""
    logits = torch.tensor([[0.2, 0.0, -0.3], [0.0, 0.1, 0.0], [-0.1, 0.0, 0.2]], dtype=torch.float64)
    target = logits.argmax(1) if labels == "right" else logits.argmin(1)
    metrics = {"nll": RefinedNegativeLogLikelihood(), "temperature": BestTemperature()}
    for name, metric in metrics.items():
        metric.set_dtype(torch.float64).update(logits, target)
        with pytest.warns(UserWarning, match=f"{type(metric).__name__}: the loss still falls at .*{why}"):
            value = float(metric.compute())
        expected = {"nll": float(F.cross_entropy(logits / temperature, target)), "temperature": temperature}
        assert value == pytest.approx(expected[name], abs=1e-12)


def test_a_set_that_is_right_with_certainty_has_no_loss_left():
    logits = 100 * torch.eye(5)
    assert refined_negative_log_likelihood(logits, torch.arange(5)) == 0


@pytest.mark.parametrize("probs", [False, True])
def test_a_label_that_was_ruled_out_is_infinite_as_in_the_nll(probs):
    logits, target = calibrated_logits(20)
    logits[3, target[3]] = -torch.inf
    preds = logits.softmax(1) if probs else logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert refined_negative_log_likelihood(preds, target, probs=probs) == torch.inf


def test_a_collection_computes_the_ladder_once(monkeypatch):
    from lightning_clamp.metrics import refined

    calls = []
    ladder = refined._ladder_values
    monkeypatch.setattr(refined, "_ladder_values", lambda rows: calls.append(1) or ladder(rows))
    collection = MetricCollection(
        {"refined": RefinedNegativeLogLikelihood(), "temperature": BestTemperature(), "nll": NegativeLogLikelihood()}
    )
    logits, target = calibrated_logits(600)
    for part in torch.arange(600).split(200):
        collection.update(3 * logits[part], target[part])
    assert len(calls) == 4  # twice at the first, when it finds out
    values = collection.compute()
    assert values["temperature"] == pytest.approx(3, rel=0.1)
    assert values["refined"] < values["nll"]
