"""Several labels per item: each is what task="binary" makes of it alone, whatever the split, layout or ranks."""

import warnings

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from torchmetrics import MetricCollection
from torchmetrics.classification import MultilabelAccuracy
from torchmetrics.wrappers import ClasswiseWrapper

from lightning_clamp import metrics
from lightning_clamp.metrics import (
    Accuracy,
    BrierScore,
    ClasswiseCalibrationError,
    ExpectedCalibrationError,
    NegativeLogLikelihood,
    OverconfidenceError,
    ReliabilityDiagram,
)
from tests import references
from tests.metrics.test_functions import PAIRS
from tests.metrics.test_metrics import CONFIDENCE, LADDER, MEANS, METRICS, POOLED, make
from tests.ranks import on_ranks
from tests.references import flat

DIAGRAMS = [metrics.ReliabilityDiagram, metrics.RiskCoverageDiagram]
NUMBERS = [metric_class for metric_class in [*CONFIDENCE, *MEANS, *LADDER] if metric_class not in DIAGRAMS]
FUNCTIONS = {metric_class: function for function, metric_class in PAIRS.items()}
# Labels that a few draws decide may have no best temperature, which two metrics say.
pytestmark = pytest.mark.filterwarnings("ignore:.*the last that is looked at")
every_number = pytest.mark.parametrize("metric_class", NUMBERS)


def labelled(n=400, k=3, seed=0, *, dense=False):
    """Logits too sure by half, a label that is rare, and a tenth of the entries unknown."""
    generator = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(n, k, generator=generator, dtype=torch.float64) - torch.arange(k)
    y = (torch.rand(n, k, generator=generator) < (z / 1.5).sigmoid()).long()
    y[torch.rand(n, k, generator=generator) < 0.1] = -1
    return (
        (z.view(n // 8, 2, 4, k).permute(0, 3, 1, 2), y.view(n // 8, 2, 4, k).permute(0, 3, 1, 2)) if dense else (z, y)
    )


def of(metric_class, average, k=3, **options):
    labels = {} if average == "micro" else {"num_labels": k}
    return metric_class(task="multilabel", ignore_index=-1, average=average, **labels, **options)


def value(metric, *batches):
    metric.set_dtype(torch.float64)  # as the functions give it
    for preds, target in batches:
        metric.update(preds, target)
    return metric.compute()


def one_by_one(metric_class, z, y, **options):
    """K metrics of one logit each."""
    return torch.stack(
        [value(metric_class(task="binary", ignore_index=-1, **options), (z[:, k], y[:, k])) for k in range(z.shape[1])]
    )


@every_number
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_each_label_is_what_one_logit_would_be(metric_class, dense, dtype):
    z, y = labelled(dense=dense)
    z = z.to(dtype)
    expected = one_by_one(metric_class, z, y)
    parts = [(z[part], y[part]) for part in torch.arange(len(z)).split(17)]
    for batches in ([(z, y)], parts, parts[::-1]):
        torch.testing.assert_close(value(of(metric_class, "none"), *batches), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(value(of(metric_class, "macro"), *batches), expected.mean(), rtol=1e-9, atol=1e-9)
    pooled = value(metric_class(task="binary", ignore_index=-1), (z.flatten(), y.flatten()))
    torch.testing.assert_close(value(of(metric_class, "micro"), *parts), pooled, rtol=1e-9, atol=1e-9)


@every_number
def test_the_function_is_that_of_one_logit_for_each_label(metric_class):
    z, y = labelled()
    function, options = FUNCTIONS[metric_class], {"task": "multilabel", "ignore_index": -1}
    expected = torch.stack([function(z[:, k], y[:, k], task="binary", ignore_index=-1) for k in range(3)])
    assert torch.equal(function(z, y, average="none", **options), expected)
    assert torch.equal(function(z, y, **options), expected.mean())
    pooled = function(z.flatten(), y.flatten(), task="binary", ignore_index=-1)
    torch.testing.assert_close(function(z, y, average="micro", **options), pooled)


@every_number
def test_one_label_is_one_logit(metric_class):
    z, y = labelled(k=1)
    expected = value(metric_class(task="binary", ignore_index=-1), (z, y))
    assert value(of(metric_class, "macro", 1), (z, y)) == pytest.approx(float(expected), abs=1e-12)
    assert torch.equal(
        FUNCTIONS[metric_class](z, y, task="multilabel", ignore_index=-1),
        FUNCTIONS[metric_class](z, y, task="binary", ignore_index=-1),
    )


@every_number
def test_probabilities_bools_floats_and_small_blocks_make_no_difference(metric_class, monkeypatch):
    z, y = labelled()
    known = y >= 0
    expected = value(of(metric_class, "none"), (z, y))
    for preds, target, options in (
        (z.sigmoid(), y, {"probs": True}),
        (z, y.float(), {}),
        (z.sigmoid(), y.to(torch.int8), {"probs": True}),
    ):
        torch.testing.assert_close(value(of(metric_class, "none", **options), (preds, target)), expected)
    monkeypatch.setattr("lightning_clamp._rows._BLOCK_ELEMENTS", 50)
    torch.testing.assert_close(value(of(metric_class, "none"), (z, y)), expected)
    whole = value(metric_class(task="multilabel", num_labels=3), (z, known))
    torch.testing.assert_close(whole, value(metric_class(task="multilabel", num_labels=3), (z, known.long())))


@every_number
def test_a_label_without_entries_is_left_out_of_the_mean(metric_class):
    z, y = labelled()
    y[:, 1] = -1
    expected = one_by_one(metric_class, z[:, ::2], y[:, ::2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*the last that is looked at")
        each = value(of(metric_class, "none"), (z, y))
        torch.testing.assert_close(value(of(metric_class, "macro"), (z, y)), expected.mean())
        function = FUNCTIONS[metric_class](z, y, task="multilabel", ignore_index=-1, average="none")
    assert each.isnan().tolist() == function.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(each[::2], expected)
    nothing = z, torch.full_like(y, -1)
    with pytest.warns(UserWarning, match="is nan: no position was scored"):
        assert value(of(metric_class, "macro"), nothing).isnan()
    with pytest.warns(UserWarning, match="is nan: no position was scored"):
        assert FUNCTIONS[metric_class](*nothing, task="multilabel", ignore_index=-1).isnan()


def in_numpy(z, y, name):
    """Each label by the formulas, in NumPy."""
    found = []
    for k in range(z.shape[1]):
        known = (y[:, k] >= 0).numpy()
        p, label = z[:, k].sigmoid().numpy()[known], y[:, k].numpy()[known]
        confidence, correct = np.maximum(p, 1 - p), ((p > 0.5) == label).astype(float)
        found.append(
            {
                "nll": -np.log(np.where(label == 1, p, 1 - p)).mean(),
                "brier": ((p - label) ** 2).mean(),
                "accuracy": correct.mean(),
                "ece": references.binned(confidence, correct),
                "positive": references.binned(p, label.astype(float)),
                "overconfidence": references.overconfidence(confidence, correct),
            }[name]
        )
    return torch.tensor(np.array(found))


IN_NUMPY = {
    "nll": (NegativeLogLikelihood, {}),
    "brier": (BrierScore, {}),
    "accuracy": (Accuracy, {}),
    "ece": (ExpectedCalibrationError, {}),
    "positive": (ExpectedCalibrationError, {"confidence": "positive"}),
    "overconfidence": (OverconfidenceError, {}),
}


@pytest.mark.parametrize("name", IN_NUMPY)
def test_an_independent_computation_gives_the_same(name):
    z, y = labelled(1000, 4)
    metric_class, options = IN_NUMPY[name]
    each = value(of(metric_class, "none", 4, **options), (z, y))
    torch.testing.assert_close(each, in_numpy(z, y, name), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("average", ["macro", "micro", "none"])
def test_torchmetrics_accuracy_is_the_same(average):
    z, y = labelled(1000)
    theirs = MultilabelAccuracy(3, average=average, ignore_index=-1)
    torch.testing.assert_close(value(of(Accuracy, average), (z, y)), value(theirs, (z.sigmoid(), y)))


@pytest.mark.parametrize("metric_class", POOLED)
def test_what_belongs_to_all_entries_is_that_of_one_logit_per_position(metric_class):
    z, y = labelled()
    options = {"task": "multilabel", "ignore_index": -1, "average": "micro"}
    parts = [(z[part], y[part]) for part in torch.arange(400).split(17)]
    together = flat(value(make(metric_class, 2, **options), *parts))
    as_positions = make(metric_class, 2, task="binary", ignore_index=-1)
    torch.testing.assert_close(together, flat(value(as_positions, (z[:, None], y[:, None]))))


def test_diagrams_are_of_all_entries_or_of_each_label():
    z, y = labelled()
    for diagram in DIAGRAMS:
        pooled = value(diagram(task="multilabel", ignore_index=-1), (z, y))
        as_one = value(diagram(task="binary", ignore_index=-1), (z.flatten(), y.flatten()))
        torch.testing.assert_close(pooled, as_one, equal_nan=True)
        each = value(of(diagram, "none"), (z, y))
        assert list(each) == ["label 0", "label 1", "label 2"]
        alone = value(diagram(task="binary", ignore_index=-1), (z[:, 1], y[:, 1]))
        torch.testing.assert_close(each["label 1"], alone, equal_nan=True)
    torch.testing.assert_close(
        metrics.reliability_curve(z, y, task="multilabel", ignore_index=-1),
        value(ReliabilityDiagram(task="multilabel", ignore_index=-1), (z, y)),
        equal_nan=True,
    )
    with mpl.rc_context():
        metric = of(ReliabilityDiagram, "none")
        metric.update(z, y)
        figure, ax = metric.plot()
        assert "label 2" in str([text.get_text() for text in ax.get_legend().get_texts()])
        plt.close(figure)


def test_labels_have_names_in_logs_and_share_a_state_in_collections():
    z, y = labelled()
    names = ["cardiomegaly", "edema", "nodule"]
    wrapped = ClasswiseWrapper(of(ExpectedCalibrationError, "none"), labels=names, prefix="ece_")
    wrapped.update(z, y)
    expected = one_by_one(ExpectedCalibrationError, z, y).tolist()
    assert wrapped.compute() == pytest.approx(dict(zip([f"ece_{name}" for name in names], expected, strict=True)))
    collection = MetricCollection(
        {average: of(ExpectedCalibrationError, average) for average in ("none", "macro", "micro")}
    )
    for part in torch.arange(400).split(90):
        collection.update(z[part], y[part])
    assert sorted(map(len, collection.compute_groups.values())) == [1, 2]
    assert collection.compute()["macro"] == pytest.approx(np.mean(expected))
    figure, _ = collection["none"].plot()
    plt.close(figure)


def shares(cut):
    z, y = labelled()
    mine = slice(None, cut) if torch.distributed.get_rank() == 0 else slice(cut, None)
    found = []
    for metric_class in (ExpectedCalibrationError, BrierScore, metrics.BestTemperature):
        metric = of(metric_class, "none").set_dtype(torch.float64)
        if len(z[mine]):
            metric.update(z[mine], y[mine])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the rank without rows is told so
            found.append(metric.compute())
    return torch.stack(found)


@pytest.mark.slow
def test_two_ranks_give_the_same_value(tmp_path):
    z, y = labelled()
    expected = torch.stack(
        [
            value(of(metric_class, "none"), (z, y))
            for metric_class in (ExpectedCalibrationError, BrierScore, metrics.BestTemperature)
        ]
    )
    for cut in (150, 400):
        for result in on_ranks(2, tmp_path / str(cut), shares, cut):
            torch.testing.assert_close(result, expected, rtol=0, atol=1e-9)


Z, Y = labelled(6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: Accuracy(task="multilabel"),
            'Accuracy keeps sums for every label .*: pass num_labels, or average="micro"',
        ),
        (lambda: Accuracy(task="multilabel", num_labels=0), "`num_labels` must be a whole number of at least 1, got 0"),
        (
            lambda: Accuracy(num_labels=3),
            '`num_labels` is for task="multilabel", got num_labels=3 and task=.multiclass',
        ),
        (lambda: Accuracy(average="none"), '`average` is for the labels of task="multilabel", got average=.none'),
        (lambda: of(Accuracy, "weighted"), r"`average` must be one of \('macro', 'micro', 'none'\), got 'weighted'"),
        (lambda: of(ReliabilityDiagram, "macro"), r"`average` must be one of \('micro', 'none'\), got 'macro'"),
        (lambda: of(metrics.BootstrapSums, "none"), r"`average` must be one of \('macro', 'micro'\), got 'none'"),
        (lambda: of(Accuracy, "macro", 4).update(Z, Y), r"`num_labels` is 4, but preds have the shape \(6, 3\)"),
        (
            lambda: of(Accuracy, "macro").update(Z, Y[:, :2]),
            r"a target of 0 and 1 in the shape of the logits, \(6, 3\)",
        ),
        (lambda: of(Accuracy, "macro").update(Z, Y + 1), r"Targets must lie in \[0, 1\], got 2"),
        (lambda: of(Accuracy, "macro").update(Z, (Y == 1) * 0.5), "must be 0 or 1, got a value between: soft labels"),
        (lambda: of(Accuracy, "macro").update(Z, Y / 0 * 0.0), "must be 0 or 1, got nan: let unknown labels be -1"),
        (lambda: of(Accuracy, "macro", probs=True).update(Z, Y), "With probs=True `preds` must be probabilities"),
        (lambda: of(Accuracy, "macro").update(Z / 0 * 0, Y), "`preds` holds nan or inf in"),
        (lambda: metrics.accuracy(Z, Y, task="multilabel", average="all"), "`average` must be one of"),
        (lambda: metrics.accuracy(Z[0], Y[0], task="multilabel"), "needs one logit per label on axis 1"),
        (lambda: ClasswiseCalibrationError(3, task="multilabel"), "for the error of every label take ExpectedCalibr"),
        (lambda: metrics.classwise_calibration_error(Z, Y, task="multilabel"), 'confidence="positive", average="none"'),
    ],
)
def test_what_will_not_do_is_refused_in_a_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_every_metric_takes_several_labels_but_one():
    assert {*NUMBERS, *DIAGRAMS, *POOLED} == {*METRICS} - {ClasswiseCalibrationError}
