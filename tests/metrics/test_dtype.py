"""Values are float32, as torchmetrics' own are, and float64 where that is asked for; what is behind them is float64."""

import warnings

import pytest
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection

from lightning_clamp.metrics import (
    Accuracy,
    BrierScore,
    ByGroup,
    CalibrationTest,
    ExpectedCalibrationError,
    ExponentialMarginTail,
    NegativeLogLikelihood,
    ReliabilityDiagram,
    brier_score,
    by_group,
    exponential_margin_tail,
    negative_log_likelihood,
)
from tests.metrics.test_conventions import NUMBERS, WITHOUT_A_NUMBER
from tests.metrics.test_functions import PAIRS, metric_of
from tests.metrics.test_metrics import METRICS, make, new, to_mps
from tests.references import flat
from tests.scenarios import calibrated_logits, trainer

BATCH = calibrated_logits(200)
OF_NUMBERS = [function for function, metric_class in PAIRS.items() if metric_class in NUMBERS]


def seen(metric):
    metric.update(*BATCH)
    return metric


@pytest.mark.parametrize("metric_class", NUMBERS)
def test_a_value_is_float32_or_what_was_asked_for(metric_class):
    exact = seen(make(metric_class)).compute()
    assert exact.dtype == torch.float64
    metric = new(metric_class)
    for value in (metric(*BATCH), metric.compute()):
        assert value.dtype == metric.dtype == torch.float32
        assert torch.equal(value, exact.float())
    # After a first value as well, which torchmetrics keeps.
    assert torch.equal(metric.set_dtype(torch.float64).compute(), exact)
    assert torch.equal(metric.set_dtype("torch.FloatTensor").compute(), exact.float())
    assert metric.sums.dtype == torch.float64


@pytest.mark.parametrize("metric_class", WITHOUT_A_NUMBER)
def test_what_more_is_computed_from_stays_float64(metric_class):
    metric = new(metric_class)
    for value in (metric(*BATCH), metric.compute(), seen(make(metric_class)).compute()):
        assert all(part.dtype == torch.float64 for part in value)
        assert torch.equal(flat(value), flat(metric.compute()))


@pytest.mark.parametrize("function", OF_NUMBERS, ids=lambda function: function.__name__)
def test_a_function_gives_float64_and_its_class_rounds(function):
    exact = seen(metric_of(function)).compute()
    assert function(*BATCH).dtype == torch.float64
    assert torch.equal(seen(new(PAIRS[function])).compute(), exact.float())


@pytest.mark.parametrize("average", ["macro", "micro", "none"])
def test_so_it_is_with_several_labels(average):
    scores, labels = torch.randn(50, 3), torch.randint(2, (50, 3))
    options = {"task": "multilabel", "average": average}
    metric = BrierScore(**options, **({} if average == "micro" else {"num_labels": 3}))
    value, exact = metric(scores, labels), brier_score(scores, labels, **options)
    assert value.dtype == torch.float32
    torch.testing.assert_close(metric.set_dtype(torch.float64).compute(), exact, rtol=0, atol=1e-15)
    assert torch.equal(value, metric.compute().float())


def test_the_default_dtype_is_that_of_torch_but_float32_at_least():
    for default, expected in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        torch.set_default_dtype(default)
        try:
            metric = BrierScore()
        finally:
            torch.set_default_dtype(torch.float32)
        assert seen(metric).compute().dtype == expected
    assert seen(BrierScore().set_dtype(torch.half)).compute().dtype == torch.float32


CASTS = {
    "half": lambda module: module.half(),
    "double": lambda module: module.double(),
    "to": lambda module: module.to(torch.bfloat16),
    "to and back": lambda module: module.to(torch.float16).to("cpu", torch.float32),
    "moved": lambda module: module.to("cpu"),
}


@pytest.mark.parametrize("metric_class", METRICS)
def test_a_module_that_is_cast_leaves_the_values_alone(metric_class):
    """Also those that torchmetrics keeps, which stands for its private `_computed` and `_forward_cache`."""
    for dtype in (torch.float32, torch.float64):
        metric = new(metric_class).set_dtype(dtype)
        batch, value = metric(*BATCH), metric.compute()
        for cast in CASTS:
            CASTS[cast](torch.nn.ModuleDict({"layer": torch.nn.Linear(2, 2), "metric": metric}))
            for again in (metric._forward_cache, metric.compute()):
                assert flat(again).dtype == flat(batch).dtype, cast
                assert torch.equal(flat(again), flat(value)), cast
        metric.reset()
        assert torch.equal(flat(seen(metric).compute()), flat(value))


@pytest.mark.parametrize("metric_class", METRICS)
def test_a_device_without_float64_takes_a_metric_that_gave_a_value(metric_class):
    """As Apple's MPS. No value of it goes there by itself, and those that are logged are float32."""
    metric = new(metric_class)
    metric(*BATCH)
    value = metric.compute()
    with pytest.warns(UserWarning, match="no float64"):
        metric._apply(to_mps)
    assert metric.compute() is value
    if metric_class in NUMBERS:
        to_mps(value)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true", "32-true"])
def test_a_trainer_that_casts_the_module_logs_float32(tmp_path, precision):
    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)
            self.errors = MetricCollection([ExpectedCalibrationError(), NegativeLogLikelihood()])

        def test_step(self, batch, index):
            # In what the batch was cast to; the labels come with it.
            self.errors.update(*batch)
            self.log_dict(self.errors)

        def on_test_epoch_end(self):
            self.value = self.errors.compute()

    module, logits = Module(), BATCH[0].half().float()
    (logged,) = trainer(tmp_path, precision=precision).test(
        module, DataLoader(TensorDataset(logits, BATCH[1]), batch_size=200), verbose=False
    )
    cast = logits.to(module.layer.weight.dtype)
    expected = negative_log_likelihood(cast, BATCH[1])
    assert module.value["NegativeLogLikelihood"].dtype == torch.float32
    assert logged["NegativeLogLikelihood"] == pytest.approx(float(expected), rel=1e-6)


def test_a_float32_cannot_hold_what_a_float64_can():
    """A p-value of 1e-60, which is in the evidence; and a tail of e^100, which is asked for."""
    evidence = CalibrationTest(2)(torch.tensor([0.0, 1.5]).expand(600, 2), torch.arange(600) % 2)
    assert 0 < evidence.p_temperature < 1e-60
    assert 0 < evidence.p < 1e-60
    batch = torch.tensor([[100.0, 0.0]]), torch.tensor([1])
    tail = ExponentialMarginTail()
    assert tail(*batch) == torch.inf
    assert tail.set_dtype(torch.float64).compute() == exponential_margin_tail(*batch) == pytest.approx(2.688117e43)


def test_groups_have_the_dtype_of_the_metric_or_of_their_own():
    groups = torch.arange(200) // 100
    exact = by_group(brier_score, *BATCH, groups, n_groups=2).values
    metric = ByGroup(BrierScore(), 2)
    for value in (metric(*BATCH, groups).values, metric.compute().values):
        assert value.dtype == torch.float32
        assert torch.equal(value, exact.float())
    for finer in (metric.set_dtype(torch.float64), ByGroup(BrierScore().set_dtype(torch.float64), 2)):
        finer.reset()
        finer(*BATCH, groups)
        torch.testing.assert_close(finer.compute().values, exact, rtol=0, atol=1e-15)
        assert finer.compute().sizes.dtype == torch.int64


def test_a_collection_is_told_at_once():
    collection = MetricCollection([Accuracy(), BrierScore(), ReliabilityDiagram()]).set_dtype(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = collection(*BATCH)
    assert values["Accuracy"].dtype == values["BrierScore"].dtype == torch.float64
