"""Values: against NumPy, against the numbers that official implementations printed, and at the edges."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_clamp.metrics import (
    AdaptiveCalibrationError,
    BrierScore,
    ClasswiseCalibrationError,
    ExpectedCalibrationError,
    NegativeLogLikelihood,
    PredictiveEntropy,
    ReliabilityDiagram,
    RootMeanSquareCalibrationError,
    accuracy,
    adaptive_calibration_error,
    brier_score,
    class_margin,
    classwise_calibration_error,
    expected_calibration_error,
    exponential_margin_tail,
    maximum_calibration_error,
    negative_log_likelihood,
    overconfidence_error,
    predictive_entropy,
    reliability_curve,
    root_mean_square_calibration_error,
    smooth_calibration_error,
)
from tests import references as ref

MAIN = ["K10", "K100", "K100_s24"]
EDGES = [
    "edges_quarter_nb4",
    "edges_15ths_nb15",
    "conf_all_one_nb15",
    "single_correct_nb15",
    "single_wrong_nb15",
    "all_correct_nb15",
    "all_wrong_nb15",
]


def inputs(key):
    if key in EDGES:
        probs, target = ref.official_edges(key)
    else:
        logits, target = ref.official_inputs(key)
        probs = logits.softmax(1)
    return probs, target, 4 if key == "edges_quarter_nb4" else 15


def drawn(n, k, seed, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    probs = (spread * torch.randn(n, k, generator=generator, dtype=torch.float64)).softmax(1)
    return probs, torch.randint(k, (n,), generator=generator)


# The official implementations. Tolerances: torchmetrics computes in float32, the others in float64.


@pytest.mark.parametrize("key", MAIN + EDGES)
def test_torrvision_bins_as_we_do(key):
    """(lo, hi] throughout."""
    probs, target, n_bins = inputs(key)
    expected = ref.OFFICIAL[key]["torrvision"]
    for function, name in (
        (expected_calibration_error, "ece"),
        (maximum_calibration_error, "mce"),
        (root_mean_square_calibration_error, "rms"),
    ):
        assert float(function(probs, target, n_bins=n_bins, probs=True)) == pytest.approx(expected[name], abs=1e-12)


@pytest.mark.parametrize("key", MAIN)
def test_netcal_and_verified_calibration_agree_away_from_edges(key):
    probs, target, _ = inputs(key)
    expected = ref.OFFICIAL[key]
    assert float(expected_calibration_error(probs, target, probs=True)) == pytest.approx(
        expected["netcal"]["ece"], abs=1e-6
    )
    assert float(maximum_calibration_error(probs, target, probs=True)) == pytest.approx(
        expected["netcal"]["mce"], abs=1e-6
    )
    for debias, name in ((False, "rms"), (True, "rms_debiased")):
        value = root_mean_square_calibration_error(probs, target, debias=debias, probs=True)
        assert float(value) == pytest.approx(expected["verified"][name], abs=1e-12)
    value = float(classwise_calibration_error(probs, target, probs=True))
    assert value == pytest.approx(expected["torrvision"]["classwise"], abs=1e-12)
    assert value == pytest.approx(expected["verified"]["classwise"], abs=1e-12)
    assert float(brier_score(probs, target, probs=True)) == pytest.approx(expected["brier"], abs=1e-12)
    assert float(predictive_entropy(probs.log())) == pytest.approx(expected["entropy"], abs=1e-12)


@pytest.mark.parametrize("key", ["edges_quarter_nb4", "edges_15ths_nb15", "conf_all_one_nb15"])
def test_torchmetrics_differs_by_half_open_bins_and_a_bin_for_confidence_1(key):
    """[lo, hi), and what is exactly 1.0 in a bin beyond the last."""
    probs, target, n_bins = inputs(key)
    expected = ref.OFFICIAL[key]["torchmetrics"]
    # In float32, as torchmetrics computes: some edges are then on their other side.
    confidence, correct = ref.confidences(probs.float().numpy(), target.numpy())
    edges = torch.linspace(0, 1, n_bins + 1).numpy()
    index = np.searchsorted(edges, confidence, side="right") - 1
    members = [index == i for i in range(n_bins + 1)]
    confidence = confidence.astype(float)
    for norm, name in (("l1", "ece"), ("l2", "rms"), ("max", "mce")):
        assert ref.combined(confidence, correct, members, norm) == pytest.approx(expected[name], abs=1e-6)
    assert (confidence == 1).any()
    assert members[-1].any()


@pytest.mark.parametrize("key", ["edges_quarter_nb4", "edges_15ths_nb15", "all_correct_nb15", "all_wrong_nb15"])
def test_netcal_differs_by_half_open_bins(key):
    """[lo, hi), the last bin with its end; confidences kept a float64 epsilon away from 0 and 1."""
    probs, target, n_bins = inputs(key)
    confidence, correct = ref.confidences(probs.numpy(), target.numpy())
    confidence = confidence.clip(np.finfo(float).eps, 1 - np.finfo(float).eps)
    index = np.searchsorted(np.linspace(0, 1, n_bins + 1), confidence, side="right") - 1
    members = [index == i for i in range(n_bins)]
    for norm, name in (("l1", "ece"), ("max", "mce")):
        expected = ref.OFFICIAL[key]["netcal"][name]
        assert ref.combined(confidence, correct, members, norm) == pytest.approx(expected, abs=1e-6)


def test_the_phantom_bin_for_confidence_1_matters():
    """Confidences .95 and 1.0 in one bin, the first right: |.975 - .5|, not the mean of two gaps."""
    probs = torch.tensor([[0.95, 0.05], [1.0, 0.0]], dtype=torch.float64)
    target = torch.tensor([0, 1])
    assert float(expected_calibration_error(probs, target, n_bins=10, probs=True)) == pytest.approx(0.475)
    assert float(maximum_calibration_error(probs, target, n_bins=10, probs=True)) == pytest.approx(0.475)
    left = ref.binned(*ref.confidences(probs.numpy(), target.numpy()), 10, closed="left")
    assert left == pytest.approx(0.525)  # what torchmetrics gives


@pytest.mark.parametrize("key", MAIN)
def test_readings_of_equal_mass_differ_by_single_samples(key):
    """Three official readings, reproduced; ours, which shares boundary samples, is within a few samples of each."""
    probs, target, n_bins = inputs(key)
    expected = ref.OFFICIAL[key]
    confidence, correct = ref.confidences(probs.numpy(), target.numpy())
    assert ref.adaptive_torrvision(confidence, correct) == pytest.approx(expected["torrvision"]["adaptive"], abs=1e-12)
    assert ref.equal_mass_netcal(confidence, correct) == pytest.approx(expected["netcal"]["equal_mass"], abs=1e-6)
    verified = expected["verified"]
    assert ref.equal_mass_verified(confidence, correct) == pytest.approx(verified["equal_mass"], abs=1e-12)
    for debias, name in ((False, "equal_mass_rms"), (True, "equal_mass_rms_debiased")):
        value = ref.equal_mass_verified(confidence, correct, norm="l2", debias=debias)
        assert value == pytest.approx(verified[name], abs=1e-12)
    ours = float(adaptive_calibration_error(probs, target, probs=True))
    for theirs in (expected["torrvision"]["adaptive"], expected["netcal"]["equal_mass"], verified["equal_mass"]):
        assert abs(ours - theirs) < n_bins / len(confidence)
    by_square = float(adaptive_calibration_error(probs, target, norm="l2", debias=True, probs=True))
    assert abs(by_square - verified["equal_mass_rms_debiased"]) < n_bins / len(confidence)


@pytest.mark.parametrize(("key", "expected"), [("single_correct_nb15", 0.3), ("single_wrong_nb15", 0.7)])
def test_one_sample_is_in_a_bin_of_equal_mass(key, expected):
    """torrvision drops the least confident sample, and with it the only one: 0."""
    probs, target, _ = inputs(key)
    assert ref.OFFICIAL[key]["torrvision"]["adaptive"] == 0
    assert float(adaptive_calibration_error(probs, target, probs=True)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("key", ["single_correct_nb15", "single_wrong_nb15", "all_correct_nb15"])
def test_torrvision_leaves_out_classes_above_the_largest_label(key):
    """Its class-wise error has max(label) + 1 classes; every class counts for us."""
    probs, target, _ = inputs(key)
    classes = int(target.max()) + 1
    assert classes < probs.shape[1]
    each = classwise_calibration_error(probs, target, average="none", probs=True)
    assert float(each[:classes].mean()) == pytest.approx(ref.OFFICIAL[key]["torrvision"]["classwise"], abs=1e-12)
    assert float(classwise_calibration_error(probs, target, probs=True)) == pytest.approx(float(each.mean()), abs=1e-15)


# NumPy.


@pytest.mark.slow
@given(st.integers(1, 60), st.integers(2, 6), st.integers(1, 20), st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_every_error_is_that_of_numpy(n, k, n_bins, seed):
    probs, target = drawn(n, k, seed)
    p, y = probs.numpy(), target.numpy()
    confidence, correct = ref.confidences(p, y)

    def same(value, expected):
        assert float(value) == pytest.approx(expected, abs=1e-9)

    same(expected_calibration_error(probs, target, n_bins=n_bins, probs=True), ref.binned(confidence, correct, n_bins))
    same(
        maximum_calibration_error(probs, target, n_bins=n_bins, probs=True),
        ref.binned(confidence, correct, n_bins, "max"),
    )
    for debias in (False, True):
        value = root_mean_square_calibration_error(probs, target, n_bins=n_bins, debias=debias, probs=True)
        same(value, ref.binned(confidence, correct, n_bins, "l2", debias=debias))
    same(
        overconfidence_error(probs, target, n_bins=n_bins, probs=True), ref.overconfidence(confidence, correct, n_bins)
    )
    for norm in ("l1", "l2", "max"):
        value = adaptive_calibration_error(probs, target, n_bins=n_bins, norm=norm, probs=True)
        same(value, ref.adaptive(confidence, correct, n_bins, norm))
    same(classwise_calibration_error(probs, target, n_bins=n_bins, probs=True), ref.classwise(p, y, n_bins))


@pytest.mark.slow
@given(st.integers(1, 80), st.integers(1, 20), st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_laws_of_the_errors(n, n_bins, seed):
    probs, target = drawn(n, 4, seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    values = {}
    for function in (
        expected_calibration_error,
        maximum_calibration_error,
        root_mean_square_calibration_error,
        overconfidence_error,
        adaptive_calibration_error,
        classwise_calibration_error,
    ):
        value = function(probs, target, n_bins=n_bins, probs=True)
        assert 0 <= float(value) <= 1 + 1e-12
        torch.testing.assert_close(
            function(probs[order], target[order], n_bins=n_bins, probs=True), value, rtol=0, atol=1e-12
        )
        values[function] = float(value) - 1e-12
    assert values[expected_calibration_error] <= values[root_mean_square_calibration_error] + 1e-9
    assert values[root_mean_square_calibration_error] <= values[maximum_calibration_error] + 1e-9
    assert values[overconfidence_error] <= values[expected_calibration_error] + 1e-9
    debiased = root_mean_square_calibration_error(probs, target, n_bins=n_bins, debias=True, probs=True)
    assert float(debiased) <= values[root_mean_square_calibration_error] + 1e-9


def test_debiasing_takes_off_what_chance_brings():
    """A calibrated network: the plain estimate is far from 0 at N = 300, the debiased one has a mean square near 0."""
    plain, debiased = [], []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        probs = (2 * torch.randn(300, 4, generator=generator, dtype=torch.float64)).softmax(1)
        target = torch.multinomial(probs, 1, generator=generator)[:, 0]
        curve = reliability_curve(probs, target, probs=True)
        weight, gap = curve.counts / 300, (curve.confidence - curve.accuracy).nan_to_num(0.0)
        plain.append(float((weight * gap.square()).sum()))
        noise = curve.accuracy * (1 - curve.accuracy) / (curve.counts - 1)
        debiased.append(float((weight * (gap.square() - noise))[curve.counts > 1].sum()))
        estimate = root_mean_square_calibration_error(probs, target, debias=True, probs=True)
        assert float(estimate) == pytest.approx(max(debiased[-1], 0) ** 0.5, abs=1e-9)
    assert np.mean(plain) > 0.004
    assert abs(np.mean(debiased)) < 4 * np.std(debiased) / 200**0.5 + 2e-4


@given(st.integers(1, 40), st.integers(2, 6), st.floats(0.1, 8), st.integers(0, 10**6), st.integers(1, 20))
@settings(deadline=None, max_examples=60)
def test_the_margin_tail_bounds_the_calibration_error(n, k, spread, seed, n_bins):
    """Theorem 4.1 of "Too Sharp, Too Sure": ECE <= (K - 1) mean(exp(-m)), for any labels and bins; and 4.2."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(n, k, generator=generator, dtype=torch.float64)
    target = torch.randint(k, (n,), generator=generator)
    tail = float(exponential_margin_tail(logits, target))
    ece = float(expected_calibration_error(logits, target, n_bins=n_bins))
    assert ece <= (k - 1) * tail + 1e-12
    m = class_margin(logits, target)
    assert torch.equal(m > 0, logits.argmax(1) == target)
    right = logits.argmax(1)
    tail_right = float(exponential_margin_tail(logits, right))
    assert tail_right / k - 1e-12 <= float(expected_calibration_error(logits, right, n_bins=n_bins))
    lower = (-m).exp() / (1 + (k - 1) * (-m).exp())
    missing = 1 - logits.softmax(1).gather(1, target[:, None])[:, 0]
    assert (lower <= missing + 1e-9).all()


# Edges.


@pytest.mark.parametrize("n_bins", [1, 4, 10, 15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_edge_belongs_to_the_bin_below_it(n_bins, dtype):
    edges = np.arange(1, n_bins + 1) / n_bins
    edges = edges[edges >= 0.5]
    confidence = torch.tensor(edges)
    probs = torch.stack([confidence, 1 - confidence], 1).to(dtype)
    target = torch.zeros(len(edges)).long()
    diagram = ReliabilityDiagram(n_bins, probs=True)
    diagram.update(probs, target)
    # A float32 value next to an edge belongs where it lies, not where the float64 edge would.
    expected = np.maximum(np.ceil(probs[:, 0].double().numpy() * n_bins - 1e-12 * (dtype == torch.float64)), 1) - 1
    counts = np.bincount(np.minimum(expected.astype(int), n_bins - 1), minlength=n_bins)
    for curve in (reliability_curve(probs, target, n_bins=n_bins, probs=True), diagram.compute()):
        assert np.atleast_1d(curve.counts.numpy()).tolist() == counts.tolist()


@pytest.mark.parametrize("confidence", [0.0, 1.0])
def test_confidence_0_and_1_are_in_the_first_and_the_last_bin(confidence):
    diagram = ReliabilityDiagram(task="binary", probs=True, confidence="positive")
    diagram.update(torch.tensor([confidence]), torch.tensor([1]))
    curve = diagram.compute()
    filled = -1 if confidence else 0
    assert curve.counts[filled] == 1
    assert curve.confidence[filled] == confidence


@pytest.mark.parametrize(
    ("right", "ece", "over"), [(True, 0.1, 0.0), (False, 0.9, 0.81)], ids=["all right", "all wrong"]
)
def test_all_right_and_all_wrong(right, ece, over):
    probs = torch.tensor([[0.9, 0.1]], dtype=torch.float64).repeat(50, 1)
    target = torch.full((50,), 0 if right else 1)
    for function in (
        expected_calibration_error,
        maximum_calibration_error,
        root_mean_square_calibration_error,
        adaptive_calibration_error,
        classwise_calibration_error,
    ):
        assert float(function(probs, target, probs=True)) == pytest.approx(ece, abs=1e-12)
    assert float(overconfidence_error(probs, target, probs=True)) == pytest.approx(over, abs=1e-12)


def test_equal_confidences_are_shared_alike_whatever_their_order():
    """Half of the rows at .9 are right: sorted by correctness, naive equal-mass bins would report .4 or more."""
    probs = torch.tensor([[0.9, 0.1]], dtype=torch.float64).repeat(100, 1)
    target = torch.tensor([0] * 90 + [1] * 10)
    assert float(adaptive_calibration_error(probs, target, probs=True)) == pytest.approx(0, abs=1e-12)
    metric = AdaptiveCalibrationError(probs=True)
    metric.update(probs, target)
    assert float(metric.compute()) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 7, 14])
def test_fewer_samples_than_bins_are_no_exception(n):
    probs, target = drawn(n, 3, n)
    expected = ref.adaptive(*ref.confidences(probs.numpy(), target.numpy()))
    assert float(adaptive_calibration_error(probs, target, probs=True)) == pytest.approx(expected)


def test_the_positive_class_may_be_the_confidence():
    z = torch.tensor([-3.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    y = torch.tensor([0, 0, 1, 1])
    top = ExpectedCalibrationError(task="binary")
    positive = ExpectedCalibrationError(task="binary", confidence="positive")
    p = z.sigmoid()
    expected = float((p - y).abs().mean())  # four bins, one row each
    assert positive(z, y) == pytest.approx(expected)
    assert top(z, y) == pytest.approx(float((torch.maximum(p, 1 - p) - 1).abs().mean()))
    function = expected_calibration_error(p, y, confidence="positive", task="binary", probs=True)
    assert float(function) == pytest.approx(expected)


# Streaming.


def test_streaming_shares_cells_and_is_else_the_function():
    """NumPy's reading with the confidences of a cell averaged; off the exact function by their weight alone."""
    for key in MAIN:
        logits, target = ref.official_inputs(key)
        confidence, correct = ref.confidences(logits.softmax(1).numpy(), target.numpy())
        cell = np.floor(np.arcsin(np.sqrt(confidence)) * 2 / np.pi * 15_361) + np.ceil(confidence * 15)
        averaged = np.array([confidence[cell == c].mean() for c in cell])
        metric = AdaptiveCalibrationError()
        metric.update(logits, target)
        assert float(metric.compute()) == pytest.approx(ref.adaptive(averaged, correct), abs=1e-6)
        largest = np.bincount(np.unique(cell, return_inverse=True)[1]).max()
        exact = float(adaptive_calibration_error(logits, target))
        assert abs(float(metric.compute()) - exact) <= 2 * 14 * largest / len(cell)


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
def test_streaming_tells_saturated_confidences_apart(norm):
    """All above .99999, and the nearer to 1 the more often right: even cells would take them as one bin."""
    generator = torch.Generator().manual_seed(0)
    distance = 10 ** -(5 + 3 * torch.rand(20_000, generator=generator, dtype=torch.float64))
    probs = torch.stack([1 - distance, distance], 1)
    wrong = torch.rand(20_000, generator=generator, dtype=torch.float64) < 3e4 * distance
    metric = AdaptiveCalibrationError(probs=True, norm=norm)
    metric.update(probs, wrong.long())
    exact = float(adaptive_calibration_error(probs, wrong.long(), norm=norm, probs=True))
    assert float(metric.compute()) == pytest.approx(exact, rel=0.01)
    as_one = abs(float((1 - distance - (~wrong).double()).mean()))
    assert norm == "l1" or exact > 1.3 * as_one


@pytest.mark.parametrize("n_bins", range(1, 200))
def test_no_edge_of_a_bin_ends_a_step_of_the_cells(n_bins):
    """Where rounding would decide between two cells, and so between two bins."""
    edges = np.arange(1, n_bins) / n_bins
    steps = np.arcsin(np.sqrt(edges)) * 2 / np.pi * 15_361
    assert (abs(steps - np.round(steps)) > 1e-9).all()


def test_brier_has_scikit_learns_two_conventions():
    sklearn = pytest.importorskip("sklearn.metrics")
    p, y = torch.rand(200, dtype=torch.float64), torch.randint(2, (200,))
    binary = BrierScore(task="binary", probs=True)
    binary.update(p, y)
    assert float(binary.compute()) == pytest.approx(sklearn.brier_score_loss(y, p))
    probs, target = drawn(200, 4, 1)
    onehot = torch.nn.functional.one_hot(target, 4)
    assert float(brier_score(probs, target, probs=True)) == pytest.approx(
        float((probs - onehot).square().sum(1).mean())
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_300_000_half_precision_logits_are_within_a_thousandth(dtype):
    """Half-precision inputs are rounded, but what is computed from them is not."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(300_000, 2, generator=generator)
    logits[:, 0] += 2
    target = torch.multinomial((logits / 1.5).softmax(1), 1, generator=generator)[:, 0]
    for metric in (
        ExpectedCalibrationError(),
        RootMeanSquareCalibrationError(),
        AdaptiveCalibrationError(),
        ClasswiseCalibrationError(2),
        NegativeLogLikelihood(),
        BrierScore(),
        PredictiveEntropy(),
    ):
        exact, half = metric.clone(), metric.clone()
        exact.update(logits, target)
        half.update(logits.to(dtype), target)
        assert float(half.compute()) == pytest.approx(float(exact.compute()), abs=1e-3)


def test_300_000_half_precision_probabilities_are_no_nan():
    """Summed in half precision they are 0 from 100,000 and nan from 300,000 on."""
    metric = ExpectedCalibrationError(task="binary", probs=True)
    probs = torch.full((300_000,), 0.945, dtype=torch.float16)
    metric.update(probs, torch.arange(300_000) % 2)
    assert float(metric.compute()) == pytest.approx(float(probs[0]) - 0.5, abs=1e-6)


def test_logits_between_0_and_1_are_logits():
    """They were not said to be probabilities, and do not add up to 1."""
    logits, target = torch.rand(200, 4, dtype=torch.float64), torch.randint(4, (200,))
    metric = ExpectedCalibrationError()
    metric.update(logits, target)
    assert float(metric.compute()) == pytest.approx(float(expected_calibration_error(logits, target)))


@pytest.mark.slow
def test_forty_million_pixels_in_one_bin_do_not_saturate():
    metric = ExpectedCalibrationError()
    z = torch.tensor(0.97).logit()
    logits = torch.stack([z.expand(2_000_000), torch.zeros(2_000_000)], 1)
    target = (torch.arange(2_000_000) % 10 == 0).long()
    for _ in range(20):
        metric.update(logits, target)
    assert float(metric.compute()) == pytest.approx(0.07, abs=1e-6)


# The curve.


def test_the_interval_is_wilsons():
    """Against scipy's, for counts from 1 to many and accuracies from 0 to 1."""
    stats = pytest.importorskip("scipy.stats")
    for right, n in ((0, 1), (1, 1), (3, 10), (10, 10), (0, 40), (970, 1000)):
        probs = torch.tensor([[0.8, 0.2]]).repeat(n, 1)
        curve = reliability_curve(probs, (torch.arange(n) >= right).long(), n_bins=5, probs=True)
        (filled,) = torch.nonzero(curve.counts)[:, 0].tolist()
        expected = stats.binomtest(right, n).proportion_ci(method="wilson")
        assert float(curve.lower[filled]) == pytest.approx(expected.low, abs=1e-12)
        assert float(curve.upper[filled]) == pytest.approx(expected.high, abs=1e-12)
        assert curve.lower.isnan().sum() == 4


def test_the_simple_means():
    probs, target = drawn(300, 4, 5)
    expected = -np.log(probs.numpy()[np.arange(300), target.numpy()]).mean()
    assert float(negative_log_likelihood(probs.log(), target)) == pytest.approx(expected)
    assert float(accuracy(probs, target, probs=True)) == pytest.approx(
        (probs.numpy().argmax(1) == target.numpy()).mean()
    )


def test_debiasing_keeps_bins_of_two_rows():
    """At N = 2 n_bins every equal-mass bin holds 2 rows, up to rounding."""
    probs, target = drawn(50, 3, 2)
    sums = [adaptive_calibration_error(probs, target, n_bins=n, norm="l2", debias=True, probs=True) for n in (25, 5)]
    order = probs.max(1).values.argsort()
    confidence, correct = ref.confidences(probs[order].numpy(), target[order].numpy())
    pairs = [np.isin(np.arange(50), [2 * i, 2 * i + 1]) for i in range(25)]
    expected = ref.combined(confidence, correct, pairs, "l2", debias=True)
    assert float(sums[0]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda p, y: expected_calibration_error(p, y, n_bins=0),
            "`n_bins` must be a whole number of at least 1, got 0",
        ),
        (
            lambda p, y: classwise_calibration_error(p, y, n_bins=-1),
            "`n_bins` must be a whole number of at least 1, got -1",
        ),
        (lambda p, y: adaptive_calibration_error(p, y, norm="l3"), r"`norm` must be one of \('l1', 'l2', 'max'\)"),
        (lambda p, y: adaptive_calibration_error(p, y, debias=True), "`debias` is known for norm='l2' only"),
        (lambda p, y: classwise_calibration_error(p, y, average="micro"), "`average` must be 'macro' or 'none'"),
        (lambda p, y: smooth_calibration_error(p, y, bandwidth=0), r"`bandwidth` must lie in \[1/1024, 1\], got 0"),
        (lambda p, y: expected_calibration_error(p, y, confidence="positive"), 'needs task="binary"'),
        (lambda p, y: expected_calibration_error(p, y, confidence="max"), "`confidence` must be 'top' or 'positive'"),
        (lambda p, y: accuracy(p, y, task="labels"), r"`task` must be one of \('multiclass', 'binary', 'multilabel'\)"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*drawn(5, 3, 0))
