"""What users of torchmetrics expect of every metric: pictures, wrappers, collections, modules that are scripted."""

import pytest
import torch
from lightning.pytorch import LightningModule
from matplotlib import pyplot as plt
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection, MetricTracker
from torchmetrics.wrappers import BootStrapper, ClasswiseWrapper, MinMaxMetric, Running

from lightning_clamp.metrics import (
    BootstrapSums,
    CalibrationTest,
    ClasswiseCalibrationError,
    ExpectedCalibrationError,
    PredictiveEntropy,
    ReliabilityDiagram,
    RiskCoverageDiagram,
)
from tests.metrics.test_metrics import METRICS, computed, new
from tests.references import flat
from tests.scenarios import calibrated_logits, trainer

# The others give something to draw or to resample, as torchmetrics' own curves do, which no wrapper of numbers takes.
WITHOUT_A_NUMBER = (BootstrapSums, CalibrationTest, ReliabilityDiagram, RiskCoverageDiagram)
NUMBERS = [metric_class for metric_class in METRICS if metric_class not in WITHOUT_A_NUMBER]


class Holder(torch.nn.Module):
    """A module that holds a metric, or several."""

    def __init__(self, metric):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        self.metric = metric

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("metric_class", METRICS)
def test_a_value_and_its_course_are_drawn_where_one_likes(metric_class):
    logits, target = calibrated_logits(300)
    metric = new(metric_class)
    course = [metric(logits[part], target[part]) for part in torch.arange(300).split(100)]
    figure, axes = plt.subplots(1, 2)
    for ax, value in zip(axes, (course[0], course), strict=True):
        assert metric.plot(value, ax=ax) == (figure, ax)
        assert ax.lines
    figure, ax = metric.plot()
    assert ax in figure.axes
    plt.close("all")


@pytest.mark.slow
@pytest.mark.parametrize("metric_class", METRICS)
def test_a_module_that_holds_it_is_scripted(metric_class):
    x, holder = torch.randn(3, 2), Holder(new(metric_class))
    assert torch.equal(torch.jit.script(holder)(x), holder(x))


@pytest.mark.slow
def test_so_is_one_that_holds_a_collection():
    x, holder = torch.randn(3, 2), Holder(MetricCollection([BootstrapSums(), ExpectedCalibrationError()]))
    assert torch.equal(torch.jit.script(holder)(x), holder(x))


def halves():
    logits, target = calibrated_logits(200)
    return [(logits[part], target[part]) for part in torch.arange(200).split(100)]


WRAPPERS = {
    "bootstrap, a quantile": lambda metric: BootStrapper(metric, num_bootstraps=4, quantile=0.1, raw=True),
    "bootstrap, two": lambda metric: BootStrapper(metric, num_bootstraps=4, quantile=torch.tensor([0.05, 0.95])),
    "extremes": MinMaxMetric,
    "running": lambda metric: Running(metric, window=2),
    "sum": lambda metric: metric + 1,
}


@pytest.mark.parametrize("metric_class", NUMBERS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_torchmetrics_wraps_it(metric_class, wrapper):
    wrapped = WRAPPERS[wrapper](new(metric_class))
    for batch in halves():
        wrapped(*batch)
    value = wrapped.compute()
    twin = wrapped.clone().compute()
    if wrapper.startswith("bootstrap"):
        low, high = value["quantile"].reshape(-1)[[0, -1]].tolist()
        assert low <= high
        assert low > 0
    elif wrapper == "extremes":
        seen = [float(new(metric_class)(*batch)) for batch in halves()]
        assert (value["min"], value["max"]) == pytest.approx((min(seen), max(seen)))
    else:
        whole = computed(new(metric_class), *halves())
        assert value == pytest.approx(float(whole) + (wrapper == "sum"))
    assert str(twin) == str(value)
    # Every metric is drawn above, and torchmetrics draws no sum.
    if metric_class is ExpectedCalibrationError and wrapper != "sum":
        wrapped.plot()
    wrapped.reset()


@pytest.mark.parametrize("metric_class", METRICS)
def test_a_tracker_keeps_it_over_the_epochs(metric_class):
    tracker = MetricTracker(new(metric_class), maximize=bool(new(metric_class).higher_is_better))
    for batch in halves():
        tracker.increment()
        tracker.update(*batch)
    values = tracker.compute_all()
    assert [flat(value).tolist() for value in values] == [computed(new(metric_class), one).tolist() for one in halves()]
    if metric_class in NUMBERS:
        best, step = tracker.best_metric(return_step=True)
        assert best == pytest.approx(float(values[step]))
        tracker.plot(list(values))


def test_the_best_epoch_is_that_of_the_smallest_error():
    logits, target = calibrated_logits(2000)
    tracker = MetricTracker(ExpectedCalibrationError())
    for scale in (3.0, 1.0, 0.3):
        tracker.increment()
        tracker.update(scale * logits, target)
    assert tracker.best_metric(return_step=True)[1] == 1


def test_classes_may_have_names():
    wrapped = ClasswiseWrapper(ClasswiseCalibrationError(5, average="none"), labels=list("abcde"), prefix="ece_")
    wrapped.update(*calibrated_logits(100))
    value = wrapped.compute()
    expected = computed(ClasswiseCalibrationError(5, average="none"), calibrated_logits(100)).tolist()
    assert value == {f"ece_{name}": error for name, error in zip("abcde", expected, strict=True)}
    wrapped.plot()


@pytest.mark.slow
def test_a_collection_draws_all_of_its_metrics():
    collection = MetricCollection({metric_class.__name__: new(metric_class) for metric_class in METRICS})
    steps = [collection(*batch) for batch in halves()]
    with plt.rc_context({"figure.max_open_warning": 0}):
        assert len(collection.plot()) == len(METRICS)
    plt.close("all")
    axes = list(plt.subplots(6, 4, figsize=(16, 24))[1].flat)
    drawn = collection.plot(steps, ax=axes[: len(METRICS)])
    assert [ax for _, ax in drawn] == axes[: len(METRICS)]
    plt.close("all")
    numbers = MetricCollection({metric_class.__name__: new(metric_class) for metric_class in NUMBERS})
    numbers.plot([numbers(*batch) for batch in halves()], together=True)


def test_the_entropy_needs_no_target_wherever_it_is():
    logits, _ = calibrated_logits(100)
    expected = computed(PredictiveEntropy(), calibrated_logits(100))
    alone, collected = PredictiveEntropy(), MetricCollection([PredictiveEntropy()])
    alone.update(logits)
    collected.update(logits)
    assert flat(alone.compute()) == flat(collected.compute()["PredictiveEntropy"]) == expected
    assert flat(PredictiveEntropy()(logits)) == expected
    resampled = BootStrapper(PredictiveEntropy(), num_bootstraps=3)
    resampled.update(logits)
    assert 0 < resampled.compute()["mean"] < 2
    with pytest.raises(ValueError, match="ignore_index=0 leaves positions out by their target: pass a target"):
        PredictiveEntropy(ignore_index=0).update(logits)


def test_numbers_are_logged_together_and_the_diagram_is_drawn_beside_them(tmp_path):
    class Module(LightningModule):
        def __init__(self, *members):
            super().__init__()
            self.errors = MetricCollection({type(member).__name__: member for member in members})
            self.diagram = ReliabilityDiagram()

        def test_step(self, batch, index):
            self.errors.update(*batch)
            self.diagram.update(*batch)
            self.log_dict(self.errors)

        def on_test_epoch_end(self):
            self.legend = self.diagram.plot()[1].get_legend()

    data = DataLoader(TensorDataset(*calibrated_logits(200)), batch_size=100)
    module = Module(*map(new, NUMBERS))
    (logged,) = trainer(tmp_path).test(module, data, verbose=False)
    expected = {metric_class.__name__: float(computed(new(metric_class), *halves())) for metric_class in NUMBERS}
    assert logged == pytest.approx(expected, rel=1e-6)
    assert module.legend.get_title().get_text().startswith("ECE")
    # Lightning's own words, which the page on troubleshooting quotes.
    with pytest.raises(ValueError, match=r"return of the metric logged as 'ReliabilityDiagram' must be a tensor"):
        trainer(tmp_path).test(Module(ReliabilityDiagram()), data, verbose=False)
