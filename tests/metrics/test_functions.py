"""A metric and the function beside it are one thing: values, errors and warnings of every pair, and the margin."""

import inspect
import warnings

import pytest
import torch

from lightning_clamp import metrics
from tests.references import flat
from tests.scenarios import BAD_PREDICTIONS, calibrated_logits

PAIRS = {
    metrics.accuracy: metrics.Accuracy,
    metrics.accuracy_at_coverage: metrics.AccuracyAtCoverage,
    metrics.adaptive_calibration_error: metrics.AdaptiveCalibrationError,
    metrics.area_under_risk_coverage: metrics.AreaUnderRiskCoverage,
    metrics.best_temperature: metrics.BestTemperature,
    metrics.brier_score: metrics.BrierScore,
    metrics.classwise_calibration_error: metrics.ClasswiseCalibrationError,
    metrics.coverage_at_accuracy: metrics.CoverageAtAccuracy,
    metrics.expected_calibration_error: metrics.ExpectedCalibrationError,
    metrics.exponential_margin_tail: metrics.ExponentialMarginTail,
    metrics.maximum_calibration_error: metrics.MaximumCalibrationError,
    metrics.negative_log_likelihood: metrics.NegativeLogLikelihood,
    metrics.overconfidence_error: metrics.OverconfidenceError,
    metrics.predictive_entropy: metrics.PredictiveEntropy,
    metrics.refined_negative_log_likelihood: metrics.RefinedNegativeLogLikelihood,
    metrics.reliability_curve: metrics.ReliabilityDiagram,
    metrics.risk_coverage_curve: metrics.RiskCoverageDiagram,
    metrics.root_mean_square_calibration_error: metrics.RootMeanSquareCalibrationError,
    metrics.smooth_calibration_error: metrics.SmoothCalibrationError,
}
OPTIONS = [
    (metrics.accuracy_at_coverage, {"coverage": 0.33}),
    (metrics.adaptive_calibration_error, {"norm": "l2", "debias": True}),
    (metrics.adaptive_calibration_error, {"norm": "max", "n_bins": 7}),
    (metrics.area_under_risk_coverage, {"excess": True}),
    (metrics.area_under_risk_coverage, {"excess": True, "generalized": True}),
    (metrics.classwise_calibration_error, {"average": "none", "n_bins": 10}),
    (metrics.coverage_at_accuracy, {"accuracy": 0.75}),
    (metrics.expected_calibration_error, {"n_bins": 7}),
    (metrics.reliability_curve, {"n_bins": 10}),
    (metrics.root_mean_square_calibration_error, {"debias": True}),
    (metrics.smooth_calibration_error, {"bandwidth": 0.05}),
]
# Labels that were drawn without regard to the logits have no best temperature, which two functions say.
pytestmark = pytest.mark.filterwarnings("ignore:.*where the outputs say nothing of the labels")
every_pair = pytest.mark.parametrize("function", PAIRS, ids=lambda function: function.__name__)


def metric_of(function, n_classes=5, **options):
    metric_class = PAIRS[function]
    if metric_class is metrics.ClasswiseCalibrationError:
        options["num_classes"] = 2 if options.get("task") == "binary" else n_classes
    return metric_class(**options).set_dtype(torch.float64)


def divided_share(metric):
    """Share of the rows whose cell holds several and lies across two bins of equal mass, which may exchange them."""
    count = metric.sums[0]
    last = count.cumsum(0)
    edges = torch.arange(1, metric.n_bins, dtype=torch.float64)[:, None] / metric.n_bins * last[-1]
    divided = ((last - count < edges) & (edges < last)).any(0) & (count > 1)
    return float(count[divided].sum() / last[-1])


def mixed_share(metric):
    """What the order within cells of which some rows are right and some wrong can do to the area, at the most."""
    count, _, correct = metric.sums[:, metric.sums[0] > 0].flip(1)
    total = count.cumsum(0)
    # So many errors more or less than in the average order, over each row of the cell by the rows before it.
    exchanged = correct * (count - correct) / count
    return float((exchanged * count / (total - count + 1)).sum() / total[-1])


def values_of(value):
    """One vector; of a risk-coverage curve, whose points are rows or cells, its areas."""
    areas = (value.area(), value.area(generalized=True)) if isinstance(value, metrics.RiskCoverageCurve) else value
    return flat(areas)


def compare(function, preds, target, **options):
    """Exact but for what is computed from the histogram, which differs as the classes say.

    The coverages and accuracies that are asked for lie at the edge of a cell here; see test_risk_coverage.py.
    """
    metric = metric_of(function, **options)
    metric.update(preds, target)
    actual, expected = values_of(function(preds, target, **options)), values_of(metric.compute())
    assert actual.dtype == torch.float64
    rtol, atol = 0.0, 1e-12
    if function is metrics.adaptive_calibration_error:
        atol += 2 * divided_share(metric)
    elif function in (metrics.area_under_risk_coverage, metrics.risk_coverage_curve):
        atol += mixed_share(metric)
    elif function is metrics.smooth_calibration_error:
        rtol = 2e-4
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def batch(layout, probs, ignore_index, dtype):
    """Logits or probabilities of 420 positions, and labels of which a tenth are ignored if any are."""
    logits, target = calibrated_logits(420)
    if layout != "classes":
        logits, target = logits.view(6, 7, 10, 5).permute(0, 3, 1, 2), target.view(6, 7, 10)
    if layout.startswith("one logit"):
        logits, target = logits[:, :1], target % 2
    if layout == "one logit":
        logits, target = logits.flatten()[:, None], target.flatten()
    if ignore_index is not None:
        target[..., ::10] = ignore_index
    if probs:
        logits = logits.sigmoid() if layout.startswith("one logit") else logits.softmax(1)
    return logits.to(dtype), target


@every_pair
@pytest.mark.parametrize(
    ("layout", "probs", "ignore_index", "dtype"),
    [  # every pair of two of them
        ("classes", False, None, torch.float64),
        ("classes", True, 255, torch.float16),
        ("dense", False, 255, torch.float16),
        ("dense", True, None, torch.float64),
        ("one logit", False, 255, torch.float64),
        ("one logit", True, None, torch.float16),
        ("one logit, dense", False, None, torch.float16),
        ("one logit, dense", True, 255, torch.float64),
    ],
)
def test_the_function_is_the_metric_of_one_batch(function, layout, probs, ignore_index, dtype):
    preds, target = batch(layout, probs, ignore_index, dtype)
    task = "binary" if layout.startswith("one logit") else "multiclass"
    compare(function, preds, target, probs=probs, task=task, ignore_index=ignore_index)


@pytest.mark.parametrize(("function", "options"), OPTIONS)
def test_so_it_is_with_options(function, options):
    compare(function, *calibrated_logits(420), **options)


@every_pair
def test_and_with_the_positive_class(function):
    if "confidence" in inspect.signature(function).parameters:
        preds, target = batch("one logit", False, None, torch.float64)
        compare(function, preds, target, task="binary", confidence="positive")


@every_pair
def test_batches_larger_than_a_block_give_the_same_value(function, monkeypatch):
    preds, target = batch("dense", False, 255, torch.float64)
    expected = flat(function(preds, target, ignore_index=255))
    for elements in (1, 100):
        monkeypatch.setattr("lightning_clamp._rows._BLOCK_ELEMENTS", elements)
        torch.testing.assert_close(flat(function(preds, target, ignore_index=255)), expected, rtol=1e-9, atol=1e-12)


def test_every_function_of_predictions_is_in_the_pairs():
    # Those two have tests of their own: one needs groups, the other gives evidence and no number.
    others = {metrics.by_group, metrics.calibration_test}
    functions = [getattr(metrics, name) for name in metrics.__all__ if inspect.isfunction(getattr(metrics, name))]
    assert {function for function in functions if "preds" in inspect.signature(function).parameters} - others == set(
        PAIRS
    )


def test_the_same_options_in_the_same_place():
    for function in PAIRS:
        parameters = list(inspect.signature(function).parameters.values())
        assert [parameter.name for parameter in parameters[:2]] == ["preds", "target"]
        assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters[2:])
        defaults = {parameter.name: parameter.default for parameter in parameters[2:]}
        last = {"probs": False, "task": "multiclass", "ignore_index": None}
        if function is metrics.classwise_calibration_error:  # of which the average is over classes
            del defaults["average"]
        elif not function.__name__.endswith("_curve"):  # of which there is no mean
            last["average"] = "macro"
        assert list(defaults.items())[-len(last) :] == list(last.items())


@every_pair
@pytest.mark.parametrize("case", BAD_PREDICTIONS)
def test_what_is_refused_is_refused_in_the_same_sentence(function, case):
    preds, target, options, error, message = BAD_PREDICTIONS[case]
    with pytest.raises(error, match=message) as by_function:
        function(preds, target, **options)
    metric = metric_of(function, **options)
    with pytest.raises(error) as by_metric:
        metric.update(preds, target)
    assert str(by_function.value) == str(by_metric.value)
    assert not metric.sums.any()


@every_pair
@pytest.mark.parametrize("task", ["multiclass", "binary"])
def test_probabilities_taken_as_logits_are_noticed_once_a_call(function, task, monkeypatch):
    logits, target = calibrated_logits(30, n_classes=2)
    probs = logits.softmax(1) if task == "multiclass" else logits.diff(dim=1)[:, 0].sigmoid()
    function(probs[:9], target[:9], task=task)  # too little to tell
    monkeypatch.setattr("lightning_clamp._rows._BLOCK_ELEMENTS", 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(probs, target, task=task)
    (warning,) = caught
    assert str(warning.message) == (
        f"{function.__name__} was given values that look like probabilities, and took them as logits: say probs=True "
        "if they are probabilities, or give it logits."
    )


@every_pair
def test_no_rows_are_nan_and_a_warning(function):
    logits, target = calibrated_logits(4)
    for preds, labels in ((logits[:0], target[:0]), (logits, torch.full_like(target, -1))):
        with pytest.warns(UserWarning, match=f"{function.__name__} is nan: no position was scored"):
            value = function(preds, labels, ignore_index=-1)
        if function is metrics.reliability_curve:
            value = value.calibration_error()
        elif function is metrics.risk_coverage_curve:
            value = torch.cat([*value, value.coverage])
        assert torch.isnan(value).all()


@every_pair
def test_the_value_has_no_gradient(function):
    logits, target = calibrated_logits(20)
    assert not flat(function(logits.requires_grad_(), target)).requires_grad


@pytest.mark.parametrize("layout", ["classes", "dense", "one logit", "one logit, dense"])
@pytest.mark.parametrize("probs", [False, True], ids=["logits", "probs"])
def test_the_entropy_needs_no_target(layout, probs):
    preds, target = batch(layout, probs, None, torch.float64)
    options = {"probs": probs, "task": "binary" if layout.startswith("one logit") else "multiclass"}
    metric = metric_of(metrics.predictive_entropy, **options)
    metric.update(preds)
    expected = metrics.predictive_entropy(preds, target, **options)
    assert metrics.predictive_entropy(preds, **options) == expected
    assert float(metric.compute()) == pytest.approx(float(expected), abs=1e-12)


def test_the_entropy_needs_one_to_leave_positions_out():
    logits, _ = calibrated_logits(5)
    metric = metrics.PredictiveEntropy(ignore_index=255)
    for call in (lambda: metric.update(logits), lambda: metrics.predictive_entropy(logits, ignore_index=255)):
        with pytest.raises(ValueError, match="ignore_index=255 leaves positions out by their target: pass a target"):
            call()
    with pytest.raises(TypeError, match="float tensor of logits, got list"):
        metrics.predictive_entropy([[1.0, 2.0]])


def test_log_probabilities_are_logits():
    """A softmax leaves them as they are: who has them needs no option."""
    logits, target = calibrated_logits(400)
    for function in PAIRS:
        actual = flat(function(logits.log_softmax(1), target))
        torch.testing.assert_close(actual, flat(function(logits, target)), rtol=1e-9, atol=1e-12)


# The margin, which is one number per position.


def test_the_margin_of_positions_is_that_of_their_rows_and_has_a_gradient():
    logits, target = batch("dense", False, None, torch.float64)
    rows = metrics.class_margin(logits.movedim(1, -1).flatten(0, 2), target.flatten())
    margin = metrics.class_margin(logits.requires_grad_(), target)
    assert torch.equal(margin.detach().flatten(), rows)
    margin.sum().backward()
    assert logits.grad.gather(1, target[:, None]).eq(1).all()
    assert logits.grad.sum() == pytest.approx(0)


@pytest.mark.parametrize(
    "case", ["label above", "float target", "a list", "a list of labels", "one axis", "one class", "shapes"]
)
def test_the_margin_refuses_what_it_cannot_read(case):
    preds, target, _, error, message = BAD_PREDICTIONS[case]
    with pytest.raises(error, match=message):
        metrics.class_margin(preds, target)
