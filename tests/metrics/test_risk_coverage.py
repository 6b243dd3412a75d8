"""When to abstain: against NumPy, against torch-uncertainty's numbers, over orders of ties, within the histogram."""

import math
from itertools import pairwise, permutations, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from torchmetrics import MetricCollection

from lightning_clamp.metrics import (
    AccuracyAtCoverage,
    AreaUnderRiskCoverage,
    CoverageAtAccuracy,
    ExpectedCalibrationError,
    RiskCoverageCurve,
    RiskCoverageDiagram,
    accuracy,
    accuracy_at_coverage,
    area_under_risk_coverage,
    coverage_at_accuracy,
    plot_risk_coverage,
    risk_coverage_curve,
)
from tests import references as ref
from tests.scenarios import calibrated_logits

AREAS = [{"excess": excess, "generalized": generalized} for excess, generalized in product([False, True], repeat=2)]
SHARES = [0.01, 0.07, 0.3, 0.5, 0.8, 0.95, 1.0]


def two_class(confidence, correct):
    """Probabilities and labels whose confidence and correctness these are."""
    confidence = torch.as_tensor(confidence, dtype=torch.float64)
    return torch.stack([confidence, 1 - confidence], 1), 1 - torch.as_tensor(correct).long()


def drawn(n, seed, values=None):
    """Confidences above a half, of so many values (all different by default), and whether they are right."""
    generator = np.random.default_rng(seed)
    confidence = generator.uniform(0.51, 1, n) if values is None else generator.integers(1, values + 1, n) / values
    confidence = 0.5 + confidence / 2 if values is not None else confidence
    return confidence, generator.uniform(size=n) < confidence


# Values.


@pytest.mark.parametrize("key", ["K10", "K100", "K100_s24"])
def test_torch_uncertainty_takes_the_trapezoid_rule_of_the_same_curve(key):
    """Half of its first and last point less than our mean; the points themselves are the same."""
    logits, target = ref.official_inputs(key)
    expected = ref.OFFICIAL[key]["torch_uncertainty"]
    confidence, correct = ref.confidences(logits.softmax(1).numpy(), target.numpy())
    n = len(confidence)
    for generalized, name in ((False, "aurc"), (True, "augrc")):
        assert ref.aurc_torch_uncertainty(confidence, correct, generalized) == pytest.approx(expected[name], abs=1e-6)
        ours = float(area_under_risk_coverage(logits, target, generalized=generalized))
        errors = ref.errors_answered(confidence, correct)
        ends = (errors[0] / (n if generalized else 1) + errors[-1] / n) / 2
        assert (n * ours - ends) / (n - 1) == pytest.approx(expected[name], abs=1e-6)
    assert float(accuracy_at_coverage(logits, target)) == pytest.approx(1 - expected["risk_at_80_coverage"], abs=1e-6)
    coverage = float(coverage_at_accuracy(logits, target, accuracy=0.7))
    assert coverage == pytest.approx(expected["coverage_at_30_risk"], abs=1e-6)


@pytest.mark.slow
@given(st.integers(1, 60), st.integers(0, 10**6), st.sampled_from([None, 1, 3, 20]))
@settings(deadline=None, max_examples=25)
def test_every_value_is_that_of_numpy(n, seed, values):
    confidence, correct = drawn(n, seed, values)
    preds = two_class(confidence, correct)
    curve = risk_coverage_curve(*preds, probs=True)
    for options in AREAS:
        expected = ref.aurc(confidence, correct, **options)
        assert float(area_under_risk_coverage(*preds, probs=True, **options)) == pytest.approx(expected, abs=1e-12)
        assert float(curve.area(**options)) == pytest.approx(expected, abs=1e-12)
    for share in SHARES:
        rows = math.ceil(round(share * n, 9))
        expected = ref.accuracy_at_coverage(confidence, correct, rows)
        actual = accuracy_at_coverage(*preds, probs=True, coverage=share)
        assert float(actual) == pytest.approx(expected, abs=1e-12)
        expected = ref.coverage_at_accuracy(confidence, correct, share)
        assert float(coverage_at_accuracy(*preds, probs=True, accuracy=share)) == pytest.approx(expected, abs=1e-12)


def test_ties_are_averaged_over_their_orders():
    """Every order of five rows, two of them tied with each other and three more."""
    confidence, correct = np.array([0.9, 0.9, 0.7, 0.7, 0.7]), np.array([1, 0, 1, 0, 0])
    orders = [[*first, *second] for first in permutations([0, 1]) for second in permutations([2, 3, 4])]
    apart = np.linspace(0.9, 0.6, 5)
    preds = two_class(confidence, correct)
    for options in AREAS:
        expected = np.mean([ref.aurc(apart, correct[order], **options) for order in orders])
        assert float(area_under_risk_coverage(*preds, probs=True, **options)) == pytest.approx(expected, abs=1e-12)
    for rows in range(1, 6):
        expected = np.mean([correct[order][:rows].mean() for order in orders])
        assert float(accuracy_at_coverage(*preds, probs=True, coverage=rows / 5)) == pytest.approx(expected, abs=1e-12)


def test_a_threshold_does_not_divide_ties():
    """Three of four are right at 0.9, and so many are right at no other threshold."""
    preds = two_class([0.9, 0.9, 0.9, 0.9, 0.7], [1, 1, 1, 0, 0])
    assert coverage_at_accuracy(*preds, probs=True, accuracy=0.75) == 0.8
    assert coverage_at_accuracy(*preds, probs=True, accuracy=0.76) == 0
    assert risk_coverage_curve(*preds, probs=True).threshold_at(0.76) == torch.inf


def test_the_order_of_a_confidence_that_says_nothing_and_of_one_that_says_all():
    preds = two_class(np.full(40, 0.8), np.arange(40) < 30)
    assert float(area_under_risk_coverage(*preds, probs=True)) == pytest.approx(0.25, abs=1e-12)
    for generalized in (False, True):
        options = {"probs": True, "excess": True, "generalized": generalized}
        sure = two_class(np.linspace(0.99, 0.51, 40), np.arange(40) < 30)
        assert float(area_under_risk_coverage(*sure, **options)) == pytest.approx(0, abs=1e-12)
        for correct in (np.ones(40), np.zeros(40)):
            assert area_under_risk_coverage(*two_class(np.linspace(0.99, 0.51, 40), correct), **options) == 0


def test_fractions_in_floating_point_are_the_fractions_that_are_meant():
    """0.07 * 100 is more than 7, and 1 - 0.8 less than 0.2."""
    preds = two_class(np.linspace(0.99, 0.51, 100), np.arange(100) < 7)
    assert accuracy_at_coverage(*preds, probs=True, coverage=0.07) == 1
    preds = two_class(np.full(5, 0.8), [1, 0, 0, 0, 0])
    assert coverage_at_accuracy(*preds, probs=True, accuracy=0.2) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_who_answers_above_the_threshold_is_right_so_often(dtype):
    logits, target = calibrated_logits(500)
    logits = logits.to(dtype)
    curve = risk_coverage_curve(logits, target)
    confidence, predicted = logits.float().softmax(1).max(1)
    for wanted in (0.75, 0.9, 0.95):
        answers = confidence >= curve.threshold_at(wanted)
        assert float(answers.double().mean()) == pytest.approx(float(curve.coverage_at(wanted)))
        assert (predicted == target)[answers].double().mean() >= wanted
    assert curve.threshold_at(float(accuracy(logits, target))) == 0


def test_a_temperature_moves_no_value_of_a_binary_head():
    z, y = 2 * torch.randn(300).double(), torch.randint(2, (300,))
    for function in (area_under_risk_coverage, accuracy_at_coverage, coverage_at_accuracy):
        torch.testing.assert_close(function(z / 3, y, task="binary"), function(z, y, task="binary"))


# The histogram.


def extreme(cells, *, best):
    """The curve of the best or the worst order of the rows within each cell, row by row."""
    count, confidence, correct = cells[:, cells[0] > 0]
    # From the least confident row on: for the best order, those that are wrong come first.
    ends = zip(count - correct, correct, strict=True) if best else zip(correct, count - correct, strict=True)
    flags = [flag for first, last in ends for flag in [not best] * int(first) + [best] * int(last)]
    mean = (confidence / count).repeat_interleave(count.long())
    return RiskCoverageCurve.from_sums(torch.stack([torch.ones_like(mean), mean, torch.tensor(flags).double()]))


@pytest.mark.parametrize("n", [30, 400, 20_000])
def test_the_metric_is_between_the_best_and_the_worst_order_within_cells(n):
    """So is the function, whose order is one of them; and the two orders differ by little."""
    logits, target = calibrated_logits(n)
    diagram = RiskCoverageDiagram()
    diagram.update(logits, target)
    best, worst = (extreme(diagram.sums, best=best) for best in (True, False))
    curve, exact = diagram.compute(), risk_coverage_curve(logits, target)
    for options in AREAS:
        low, high = float(best.area(**options)), float(worst.area(**options))
        for value in (float(curve.area(**options)), float(exact.area(**options))):
            assert low - 1e-12 <= value <= high + 1e-12
        assert high - low < 1e-4
    for share in SHARES:
        low, high = float(worst.accuracy_at(share)), float(best.accuracy_at(share))
        for value in (float(curve.accuracy_at(share)), float(exact.accuracy_at(share))):
            assert low - 1e-12 <= value <= high + 1e-12
        assert curve.coverage_at(share) <= exact.coverage_at(share) <= best.coverage_at(share)


def test_one_state_together_with_the_calibration_error():
    logits, target = calibrated_logits(400)
    members = {
        "ece": ExpectedCalibrationError(),
        "aurc": AreaUnderRiskCoverage(),
        "e_aurc": AreaUnderRiskCoverage(excess=True),
        "selective": AccuracyAtCoverage(0.6),
        "coverage": CoverageAtAccuracy(0.8),
        "curve": RiskCoverageDiagram(),
    }
    collection = MetricCollection(members).set_dtype(torch.float64)
    for part in torch.arange(400).split(90):
        collection.update(logits[part], target[part])
    assert len(collection.compute_groups) == 1
    values = collection.compute()
    assert float(values["selective"]) == pytest.approx(float(accuracy_at_coverage(logits, target, coverage=0.6)))
    assert float(values["curve"].area(excess=True)) == float(values["e_aurc"]) < float(values["aurc"])


# Bad options.


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda value: AccuracyAtCoverage(value), "coverage"),
        (lambda value: CoverageAtAccuracy(value), "accuracy"),
        (lambda value: accuracy_at_coverage(*calibrated_logits(9), coverage=value), "coverage"),
        (lambda value: coverage_at_accuracy(*calibrated_logits(9), accuracy=value), "accuracy"),
        (lambda value: risk_coverage_curve(*calibrated_logits(9)).accuracy_at(value), "coverage"),
        (lambda value: risk_coverage_curve(*calibrated_logits(9)).threshold_at(value), "accuracy"),
    ],
)
@pytest.mark.parametrize("value", [0, 95, -0.5, math.nan])
def test_shares_out_of_range_are_named(call, name, value):
    with pytest.raises(ValueError, match=rf"`{name}` must lie in \(0, 1\], got {value}: it is a fraction, not percent"):
        call(value)


@pytest.mark.parametrize("metric_class", [AreaUnderRiskCoverage, AccuracyAtCoverage, RiskCoverageDiagram])
def test_the_positive_class_is_no_answer(metric_class):
    with pytest.raises(ValueError, match=f"{metric_class.__name__} knows confidence='top' only, got 'positive'"):
        metric_class(task="binary", confidence="positive")
    metric_class(task="binary", confidence="top")


# The picture.


def drawn_lines(ax):
    return {line.get_label().partition("AURC")[0]: line.get_ydata() for line in ax.lines}


def test_the_picture_has_the_curve_the_best_order_and_the_areas():
    logits, target = calibrated_logits(2000)
    diagram = RiskCoverageDiagram()
    diagram.update(logits, target)
    before, curve = risk_coverage_curve(logits[:, :4], target % 4), diagram.compute()
    _, ax = diagram.plot({"before": before, "after": curve})
    lines = drawn_lines(ax)
    assert set(lines) == {"before: ", "after: ", "best order, "}
    after = lines["after: "]
    for share, risk, other in ((0.5, after[249], 1), (1.0, after[-1], lines["best order, "][-1])):
        assert risk == pytest.approx(1 - float(curve.accuracy_at(share)), abs=1e-12)
        assert other >= risk - 1e-12
    assert all(a <= b for a, b in pairwise(lines["best order, "]))
    labels = " ".join(ax.get_legend_handles_labels()[1])
    for area in (curve.area(), curve.area() - curve.area(excess=True), before.area()):
        assert f"AURC {float(area):.1%}" in labels
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("coverage", "error rate of what is answered")


def test_a_single_confidence_is_a_level_line():
    _, own = plt.subplots()
    diagram = RiskCoverageDiagram()
    diagram.update(torch.zeros(40, 4), torch.arange(40) % 4)
    assert diagram.compute().errors.shape == ()  # as torchmetrics makes it
    figure, ax = diagram.plot(ax=own)
    assert (figure, ax) == (own.figure, own)
    assert drawn_lines(ax)[""] == pytest.approx(np.full(500, 0.75))


def test_nothing_wrong_has_a_scale_and_nothing_seen_is_said():
    _, ax = plot_risk_coverage(risk_coverage_curve(torch.eye(3), torch.arange(3), probs=True), title="all right")
    assert ax.get_title() == "all right"
    assert ax.get_ylim() == (0, 1)
    with pytest.warns(UserWarning, match="no position was scored"):
        nothing = risk_coverage_curve(torch.zeros(0, 3), torch.zeros(0).long())
    _, ax = plot_risk_coverage([nothing, nothing])
    assert [text.get_text() for text in ax.texts] == ["no data"]


@pytest.mark.parametrize("style", ["default", "dark_background"])
def test_colours_follow_the_background(style):
    with plt.style.context(style):
        _, ax = plot_risk_coverage([risk_coverage_curve(*calibrated_logits(50, seed=seed)) for seed in range(9)])
        for line in ax.lines:
            distance = zip(to_rgb(line.get_color()), to_rgb(ax.get_facecolor()), strict=True)
            assert sum(abs(a - b) for a, b in distance) > 0.6


@pytest.mark.parametrize(("curves", "error", "message"), [
    (torch.zeros(3), TypeError, "draws a RiskCoverageCurve, a list of them or a dict of them by name, got Tensor"),
    ({"one": 1}, TypeError, "got int as 'one'"),
    ([], ValueError, "needs at least one curve"),
])  # fmt: skip
def test_what_is_no_curve_is_refused(curves, error, message):
    with pytest.raises(error, match=message):
        plot_risk_coverage(curves)
