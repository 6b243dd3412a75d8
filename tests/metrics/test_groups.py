"""Metrics by group: those of each group's samples alone, whatever the split, the ranks or the metric."""

import matplotlib as mpl
import pytest
import torch
from matplotlib import pyplot as plt
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

from lightning_clamp.metrics import (
    Accuracy,
    BrierScore,
    ByGroup,
    ClasswiseCalibrationError,
    ExpectedCalibrationError,
    NegativeLogLikelihood,
    SmoothCalibrationError,
    brier_score,
    by_group,
    expected_calibration_error,
    plot_groups,
)
from tests.ranks import on_ranks
from tests.scenarios import calibrated_logits

MEMBERS = {
    "nll": NegativeLogLikelihood,
    "brier": BrierScore,
    "ece": ExpectedCalibrationError,
    "smooth": SmoothCalibrationError,
    "classwise": lambda: ClasswiseCalibrationError(5),
    "of torchmetrics": lambda: MulticlassAccuracy(5, average="micro"),
}


def data(n=400, n_groups=4):
    logits, target = calibrated_logits(n)
    return logits, target, torch.arange(n) * n_groups // n


@pytest.mark.parametrize("name", MEMBERS)
def test_each_group_s_value_is_that_of_its_samples_alone(name):
    logits, target, groups = data()
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    metric = ByGroup(MEMBERS[name](), 5, min_samples=50).set_dtype(torch.float64)
    for part in order.split(37):
        metric.update(logits[part], target[part], groups[part])
    values, sizes = metric.compute()
    assert sizes.tolist() == [100, 100, 100, 100, 0]
    assert values[4].isnan()
    for group in range(4):
        alone = MEMBERS[name]().set_dtype(torch.float64)
        alone.update(logits[groups == group], target[groups == group])
        assert float(values[group]) == pytest.approx(float(alone.compute()), abs=1e-9)
    metric.reset()
    metric.update(logits[:3], target[:3], groups[:3])
    assert metric.compute().sizes.tolist() == [3, 0, 0, 0, 0]


def test_the_function_gives_the_same():
    logits, target, groups = data()
    metric = ByGroup(BrierScore(), 4).set_dtype(torch.float64)
    values = metric(logits, target, groups)
    for result in (metric.compute(), by_group(brier_score, logits, target, groups, n_groups=4)):
        torch.testing.assert_close(result, values)


def test_images_have_a_group_each():
    logits, target = torch.randn(6, 3, 4, 4), torch.randint(3, (6, 4, 4))
    target[0, 0] = 255
    groups = torch.tensor([0, 1, 0, 1, 0, 0])
    metric = ByGroup(ExpectedCalibrationError(ignore_index=255), 2, min_samples=2).set_dtype(torch.float64)
    metric.update(logits, target, groups)
    values, sizes = metric.compute()
    assert sizes.tolist() == [4, 2]
    expected = expected_calibration_error(logits[groups == 0], target[groups == 0], ignore_index=255)
    torch.testing.assert_close(values[0], expected)


def test_groups_with_few_samples_are_not_judged():
    logits, target, groups = data(400, 3)
    values, sizes = by_group(brier_score, logits, target, groups.clamp(max=1), n_groups=3, min_samples=200)
    assert sizes.tolist() == [134, 266, 0]
    assert values.isnan().tolist() == [True, False, True]


def shares(cut):
    logits, target, groups = data()
    mine = slice(None, cut) if torch.distributed.get_rank() == 0 else slice(cut, None)
    metric = ByGroup(ExpectedCalibrationError(), 5).set_dtype(torch.float64)
    if torch.arange(400)[mine].numel():
        metric.update(logits[mine], target[mine], groups[mine])
    return metric.compute()


@pytest.mark.slow
def test_any_number_of_ranks_gives_the_same_value(tmp_path):
    """Also where a group is on one rank alone."""
    logits, target, groups = data()
    expected = by_group(expected_calibration_error, logits, target, groups, n_groups=5)
    for result in on_ranks(2, tmp_path / "uneven", shares, 200 + 50):
        torch.testing.assert_close(result, expected, equal_nan=True, rtol=0, atol=1e-9)


def test_a_collection_does_not_take_two_for_one():
    logits, target, groups = data()
    members = {"brier": ByGroup(BrierScore(), 4), "accuracy": ByGroup(Accuracy(), 4)}
    collection = MetricCollection(members)
    for part in torch.arange(400).split(100):
        collection.update(logits[part], target[part], groups[part])
    assert (collection.compute()["brier"].values != collection.compute()["accuracy"].values).all()


def test_a_module_that_is_cast_leaves_the_sums_alone():
    logits, target, groups = data()
    module = torch.nn.ModuleDict({"metric": ByGroup(BrierScore(), 4).set_dtype(torch.float64)}).to(torch.bfloat16)
    expected = by_group(brier_score, logits, target, groups, n_groups=4)
    torch.testing.assert_close(module["metric"](logits, target, groups), expected)


@pytest.mark.parametrize(
    ("options", "groups", "error", "message"),
    [
        (
            {},
            torch.zeros(400),
            TypeError,
            "`groups` must hold the number of each sample's group, int64, got torch.float32",
        ),
        ({}, ["a"] * 400, TypeError, "int64, got list"),
        ({}, torch.zeros(3).long(), ValueError, r"one number per sample, \(400,\), got the shape \(3,\)"),
        ({}, torch.full((400,), 4), ValueError, r"Groups must lie in \[0, 3\], got 4: is `n_groups` too small\?"),
        ({}, torch.full((400,), -1), ValueError, "got -1"),
        ({"metric": brier_score}, None, TypeError, "`metric` must be a metric, such as BrierScore"),
        ({"metric": MulticlassAUROC(5)}, None, ValueError, "keeps every sample, in preds, target: use a metric whose"),
        ({"n_groups": 0}, None, ValueError, "`n_groups` must be a whole number of at least 1, got 0"),
        ({"min_samples": -1}, None, ValueError, "`min_samples` must be a whole number of at least 0, got -1"),
    ],
)
def test_what_will_not_do_is_refused_in_a_sentence(options, groups, error, message):
    logits, target, _ = data()
    with pytest.raises(error, match=message):
        ByGroup(**{"metric": BrierScore(), "n_groups": 4, **options}).update(logits, target, groups)


def test_a_metric_that_gives_no_number_is_refused():
    metric = ByGroup(ClasswiseCalibrationError(5, average="none"), 4)
    metric.update(*data())
    with pytest.raises(ValueError, match="A metric by group must give one number, got Tensor; average it over classes"):
        metric.compute()


@pytest.mark.parametrize("style", ["default", "dark_background"])
def test_the_picture_has_the_worst_on_top_and_the_sizes(style):
    values, before = torch.tensor([0.1, torch.nan, 0.3]), torch.tensor([0.2, torch.nan, 0.25])
    with mpl.rc_context(), plt.style.context(style):
        figure, ax = plot_groups(values, torch.tensor([1200, 3, 500]), before=before, names=["a", "b", "c"])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["c (500)", "a (1,200)", "b (3)"]
    assert [text.get_text() for text in ax.texts] == ["too few to say"]
    figure.canvas.draw()
    plt.close(figure)


def test_of_many_groups_the_first_thirty_are_drawn():
    metric = ByGroup(BrierScore(), 40, min_samples=1)
    metric.update(*data(400, 40))
    figure, ax = metric.plot()
    assert len(ax.get_yticks()) == 30
    assert ax.get_xlabel() == "BrierScore"
    plt.close(figure)
    with pytest.raises(ValueError, match="`names` must have one name per group, 40, got 1"):
        metric.plot(names=["a"])
