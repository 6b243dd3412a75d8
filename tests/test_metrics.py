import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from torch.nn import functional as F
from torchmetrics import MetricCollection

from lightning_clamp.metrics import (
    Accuracy,
    ExpectedCalibrationError,
    NegativeLogLikelihood,
    ReliabilityDiagram,
    expected_calibration_error,
    plot_reliability,
    reliability_curve,
)
from tests.scenarios import calibrated_logits

METRICS = [Accuracy, ExpectedCalibrationError, NegativeLogLikelihood, ReliabilityDiagram]


def reference_ece(probs: np.ndarray, target: np.ndarray, n_bins: int = 15) -> float:
    """Bin by bin, in NumPy: (lo, hi], the first bin closed below."""
    confidence, correct = probs.max(1), probs.argmax(1) == target
    total = 0.0
    for i in range(n_bins):
        inside = (confidence > i / n_bins) & (confidence <= (i + 1) / n_bins)
        inside |= (i == 0) & (confidence <= 0)
        if inside.any():
            total += inside.mean() * abs(confidence[inside].mean() - correct[inside].mean())
    return total


def official(n: int, k: int, s: float = 6.0):
    """Inputs of the official runs, by formula."""
    i, j = torch.arange(float(n), dtype=torch.float64)[:, None], torch.arange(float(k), dtype=torch.float64)
    logits = s * torch.sin(1.7 * i + 2.3 * j) + 0.5 * s * torch.cos(0.37 * i * j)
    index = torch.arange(n)
    return logits, torch.where((37 * index) % 100 < 62, logits.argmax(1), (index**3 + 3 * index + index // 5) % k)


OFFICIAL = json.loads((Path(__file__).parent / "reference" / "metrics.json").read_text())


@pytest.mark.parametrize(("key", "k", "s"), [("K10", 10, 6.0), ("K100", 100, 6.0), ("K100_s24", 100, 24.0)])
def test_the_official_implementations_agree(key, k, s):
    """torrvision's functions and netcal in float64, and the plain NLL, on their inputs."""
    logits, target = official(1000, k, s)
    assert ExpectedCalibrationError()(logits, target) == pytest.approx(OFFICIAL[key]["torrvision_ece"], abs=1e-12)
    assert ExpectedCalibrationError()(logits, target) == pytest.approx(OFFICIAL[key]["netcal_ece"], abs=1e-6)
    assert NegativeLogLikelihood()(logits, target) == pytest.approx(OFFICIAL[key]["nll"], rel=1e-12)
    assert Accuracy()(logits, target) == pytest.approx(OFFICIAL[key]["acc"], abs=1e-12)


@pytest.mark.parametrize("n_bins", [1, 4, 10, 15])
def test_every_edge_belongs_to_the_bin_below_it(n_bins):
    edges = np.arange(1, n_bins + 1) / n_bins
    confidence = torch.tensor(edges[edges >= 0.5])
    probs = torch.stack([confidence, 1 - confidence], 1)
    curve = reliability_curve(probs, torch.zeros(len(confidence)).long(), n_bins=n_bins)
    assert curve.counts.sum() == len(confidence)
    filled = torch.tensor(np.flatnonzero(edges >= 0.5))
    torch.testing.assert_close(curve.confidence[filled], confidence)


def test_confidence_0_and_1_are_in_the_first_and_the_last_bin():
    curve = reliability_curve(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([1, 0]))
    assert curve.counts[0] == curve.counts[-1] == 1


@given(st.integers(1, 60), st.integers(2, 6), st.integers(1, 20), st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_ece_is_the_reference_and_lies_in_0_1(n, k, n_bins, seed):
    generator = torch.Generator().manual_seed(seed)
    probs = (3 * torch.randn(n, k, generator=generator, dtype=torch.float64)).softmax(1)
    target = torch.randint(k, (n,), generator=generator)
    value = float(expected_calibration_error(probs, target, n_bins=n_bins))
    assert value == pytest.approx(reference_ece(probs.numpy(), target.numpy(), n_bins), abs=1e-12)
    assert 0 <= value <= 1


def flat(value) -> torch.Tensor:
    parts = value if isinstance(value, tuple) else (value,)
    return torch.cat([part.reshape(-1) for part in parts]).nan_to_num(-1)


@pytest.mark.parametrize("metric_class", METRICS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_split_gives_the_same_value(metric_class, dtype):
    logits, target = calibrated_logits(500)
    logits = logits.to(dtype)
    whole, split = metric_class(), metric_class()
    whole.update(logits, target)
    for part in torch.arange(500).split(37):
        split.update(logits[part], target[part])
    torch.testing.assert_close(flat(whole.compute()), flat(split.compute()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("metric_class", METRICS)
def test_reset_clone_and_pickle(metric_class):
    logits, target = calibrated_logits(200)
    metric = metric_class()
    metric.update(logits, target)
    value = flat(metric.compute())
    for twin in (metric.clone(), copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert torch.equal(flat(twin.compute()), value)
    metric.reset()
    metric.update(logits, target)
    assert torch.equal(flat(metric.compute()), value)


@pytest.mark.parametrize("metric_class", METRICS)
def test_state_is_float64_of_a_constant_size(metric_class):
    metric = metric_class()
    before = sum(value.nbytes for value in metric.metric_state.values())
    metric.update(*calibrated_logits(3000))
    assert sum(value.nbytes for value in metric.metric_state.values()) == before <= 360
    assert all(value.dtype == torch.float64 for value in metric.metric_state.values())


@pytest.mark.parametrize("metric_class", METRICS)
def test_logits_and_probabilities_are_told_apart_by_name(metric_class):
    logits, target = calibrated_logits(300)
    by_logits, by_probs = metric_class(), metric_class(probs=True)
    by_logits.update(logits, target)
    by_probs.update(logits.softmax(1), target)
    torch.testing.assert_close(flat(by_logits.compute()), flat(by_probs.compute()))


@pytest.mark.parametrize("metric_class", METRICS)
def test_one_logit_heads_are_their_two_class_twins(metric_class):
    z, y = 2 * torch.randn(300).double(), torch.randint(2, (300,))
    one, one_prob, two = metric_class(task="binary"), metric_class(task="binary", probs=True), metric_class()
    one.update(z[:, None], y)
    one_prob.update(z.sigmoid(), y.float())
    two.update(torch.stack([0 * z, z], 1), y)
    torch.testing.assert_close(flat(one.compute()), flat(two.compute()))
    torch.testing.assert_close(flat(one_prob.compute()), flat(two.compute()))


def test_a_one_logit_probability_of_exactly_1_is_certainty():
    """A float32 sigmoid saturates above 17."""
    probs, target = torch.tensor([20.0, -3.0, 2.0]).sigmoid(), torch.tensor([1, 0, 1])
    assert probs[0] == 1
    options = {"task": "binary", "probs": True}
    assert Accuracy(**options)(probs, target) == 1
    expected = F.binary_cross_entropy(probs, target.float())
    assert NegativeLogLikelihood(**options)(probs, target) == pytest.approx(float(expected), rel=1e-6)
    assert ExpectedCalibrationError(**options)(probs, target) < 0.1


@pytest.mark.parametrize("metric_class", METRICS)
def test_dense_outputs_are_counted_by_pixel_without_the_ignored(metric_class):
    logits, target = torch.randn(4, 3, 5, 6), torch.randint(3, (4, 5, 6))
    target[:, 0] = 255
    dense, rows = metric_class(ignore_index=255), metric_class()
    dense.update(logits, target)
    rows.update(logits[:, :, 1:].movedim(1, -1).flatten(0, 2), target[:, 1:].flatten())
    torch.testing.assert_close(flat(dense.compute()), flat(rows.compute()))


@pytest.mark.parametrize("metric_class", [Accuracy, NegativeLogLikelihood, ExpectedCalibrationError])
def test_an_all_ignored_batch_adds_nothing(metric_class):
    logits, target = calibrated_logits(50)
    metric = metric_class(ignore_index=-1)
    metric.update(logits, target)
    value = metric.compute()
    metric.update(logits, torch.full_like(target, -1))
    assert metric.compute() == value


def test_forty_million_pixels_in_one_bin_do_not_saturate():
    metric = ExpectedCalibrationError()
    z = torch.tensor(0.97).logit()
    logits = torch.stack([z.expand(2_000_000), torch.zeros(2_000_000)], 1)
    target = (torch.arange(2_000_000) % 10 == 0).long()
    for _ in range(20):
        metric.update(logits, target)
    assert float(metric.compute()) == pytest.approx(0.07, abs=1e-6)


def test_metrics_live_in_a_collection_together():
    logits, target = calibrated_logits(200)
    collection = MetricCollection({"nll": NegativeLogLikelihood(), "ece": ExpectedCalibrationError(n_bins=10)})
    values = collection(logits, target)
    assert values["nll"] == pytest.approx(float(F.cross_entropy(logits, target)))
    assert values["ece"] == pytest.approx(float(expected_calibration_error(logits.softmax(1), target, n_bins=10)))


@pytest.mark.parametrize("n_bins", [0, -3])
def test_bins_are_at_least_one(n_bins):
    with pytest.raises(ValueError, match=f"`n_bins` must be at least 1, got {n_bins}"):
        ExpectedCalibrationError(n_bins=n_bins)
    with pytest.raises(ValueError, match="`n_bins` must be at least 1"):
        expected_calibration_error(torch.ones(1, 2) / 2, torch.zeros(1).long(), n_bins=n_bins)


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="`task` must be one of"):
        Accuracy(task="multilabel")


@pytest.mark.parametrize("n_bins", [1, 15])
def test_the_diagram_is_drawn_with_one_bar_per_filled_bin(n_bins):
    diagram = ReliabilityDiagram(n_bins)
    diagram.update(*calibrated_logits(500))
    figure, ax = diagram.plot()
    filled = int((torch.atleast_1d(diagram.compute().counts) > 0).sum())
    bars = [container for container in ax.containers if container.get_label().startswith("accuracy, ECE")]
    assert len(bars[0]) == filled
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("confidence", "accuracy")
    _, own = plt.subplots()
    assert plot_reliability(diagram.compute(), before=diagram.compute(), ax=own)[1] is own
    assert figure is not own.figure
