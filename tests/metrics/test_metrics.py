"""What holds for every metric: splits, ranks, dtypes, layouts, states, collections, bad input."""

import copy
import pickle
import re
import warnings

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection

from lightning_clamp.metrics import (
    Accuracy,
    AccuracyAtCoverage,
    AdaptiveCalibrationError,
    AreaUnderRiskCoverage,
    BestTemperature,
    BlockSums,
    BootstrapSums,
    BrierScore,
    CalibrationTest,
    ClasswiseCalibrationError,
    CoverageAtAccuracy,
    ExpectedCalibrationError,
    ExponentialMarginTail,
    MaximumCalibrationError,
    NegativeLogLikelihood,
    OverconfidenceError,
    PredictiveEntropy,
    RefinedNegativeLogLikelihood,
    ReliabilityDiagram,
    RiskCoverageDiagram,
    RootMeanSquareCalibrationError,
    SmoothCalibrationError,
    expected_calibration_error,
)
from tests.metrics.test_functions import PAIRS
from tests.ranks import on_ranks
from tests.references import flat
from tests.scenarios import BAD_PREDICTIONS, NAN, calibrated_logits

SELECTIVE = [AccuracyAtCoverage, AreaUnderRiskCoverage, CoverageAtAccuracy, RiskCoverageDiagram]
CONFIDENCE = [
    *SELECTIVE,
    AdaptiveCalibrationError,
    ExpectedCalibrationError,
    MaximumCalibrationError,
    OverconfidenceError,
    ReliabilityDiagram,
    RootMeanSquareCalibrationError,
    SmoothCalibrationError,
]
MEANS = [Accuracy, BrierScore, ExponentialMarginTail, NegativeLogLikelihood, PredictiveEntropy]
LADDER = [BestTemperature, RefinedNegativeLogLikelihood]
BY_CLASS = [CalibrationTest, ClasswiseCalibrationError]
# Of several labels they give what belongs to all entries.
POOLED = [BootstrapSums, CalibrationTest]
METRICS = [*CONFIDENCE, *MEANS, *LADDER, BootstrapSums, *BY_CLASS]
# Labels that were drawn without regard to the logits have no best temperature, which those two say.
pytestmark = pytest.mark.filterwarnings("ignore:.*where the outputs say nothing of the labels")


def new(metric_class, n_classes=5, **options):
    """A metric as users make it, whose values are float32."""
    return metric_class(n_classes, **options) if metric_class in BY_CLASS else metric_class(**options)


def make(metric_class, n_classes=5, **options):
    """The same with values in float64, which are compared exactly."""
    return new(metric_class, n_classes, **options).set_dtype(torch.float64)


def to_mps(tensor):
    """As Apple's MPS, which refuses such a tensor with this error."""
    if tensor.dtype == torch.float64:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
    return tensor


def computed(metric, *batches) -> torch.Tensor:
    for preds, target in batches:
        metric.update(preds, target)
    return flat(metric.compute())


@pytest.mark.parametrize("metric_class", METRICS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_split_gives_the_same_value(metric_class, dtype):
    logits, target = calibrated_logits(500)
    logits = logits.to(dtype)
    parts = [(logits[part], target[part]) for part in torch.arange(500).split(37)]
    whole = computed(make(metric_class), (logits, target))
    torch.testing.assert_close(whole, computed(make(metric_class), *parts), rtol=1e-9, atol=1e-9)
    if metric_class is not BootstrapSums:  # which keeps the items apart, in order
        torch.testing.assert_close(whole, computed(make(metric_class), *parts[::-1]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("metric_class", METRICS)
def test_batches_larger_than_a_block_give_the_same_value(metric_class, monkeypatch):
    """Rows, and positions of a single image, that do not fit in one block."""
    logits, target = torch.randn(3, 5, 4, 5), torch.randint(5, (3, 4, 5))
    target[0, 0] = 255
    rows = (logits.movedim(1, -1).flatten(0, 2), target.flatten())
    expected = computed(make(metric_class, ignore_index=255), (logits, target))
    by_row = computed(make(metric_class, ignore_index=255), rows)
    for elements in (1, 7, 40, 120):
        monkeypatch.setattr("lightning_clamp._rows._BLOCK_ELEMENTS", elements)
        for batch, value in (((logits, target), expected), (rows, by_row)):
            actual = computed(make(metric_class, ignore_index=255), batch)
            torch.testing.assert_close(actual, value, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("metric_class", METRICS)
def test_reset_clone_pickle_and_state_dict(metric_class):
    logits, target = calibrated_logits(200)
    metric = make(metric_class)
    value = computed(metric, (logits, target))
    for twin in (metric.clone(), copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert torch.equal(flat(twin.compute()), value)
    metric.persistent(True)
    restored = make(metric_class)
    restored.persistent(True)
    restored.load_state_dict(metric.state_dict())
    restored.update(logits[:0], target[:0])
    assert torch.equal(flat(restored.compute()), value)
    metric.reset()
    assert torch.equal(computed(metric, (logits, target)), value)


@pytest.mark.parametrize("metric_class", METRICS)
def test_state_is_float64_of_a_constant_size(metric_class):
    metric = make(metric_class, n_classes=1000)
    before = sum(value.nbytes for value in metric.metric_state.values())
    metric.update(torch.randn(300, 1000), torch.randint(1000, (300,)))
    assert sum(value.nbytes for value in metric.metric_state.values()) == before <= 400_000
    assert all(value.dtype == torch.float64 for value in metric.metric_state.values())


@pytest.mark.parametrize("n_bins", [1, 10, 100, 1000, 20_000])
def test_more_bins_take_little_more_memory(n_bins):
    metric = make(ExpectedCalibrationError, n_bins=n_bins)
    assert sum(value.nbytes for value in metric.metric_state.values()) <= max(400_000, 60 * n_bins)
    logits, target = calibrated_logits(500)
    expected = expected_calibration_error(logits, target, n_bins=n_bins)
    assert computed(metric, (logits, target)).item() == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize("metric_class", METRICS)
def test_logits_and_probabilities_are_told_apart_by_name(metric_class):
    logits, target = calibrated_logits(300)
    by_logits = computed(make(metric_class), (logits, target))
    by_probs = computed(make(metric_class, probs=True), (logits.softmax(1), target))
    torch.testing.assert_close(by_logits, by_probs)


@pytest.mark.parametrize("metric_class", METRICS)
def test_one_logit_heads_are_their_two_class_twins(metric_class):
    z, y = 2 * torch.randn(300).double(), torch.randint(2, (300,))
    options = {"n_classes": 2, "task": "binary"}
    two = computed(make(metric_class, n_classes=2), (torch.stack([0 * z, z], 1), y))
    if metric_class is BrierScore:
        two = two / 2  # (p - y)^2 is one of two equal terms
    torch.testing.assert_close(computed(make(metric_class, **options), (z[:, None], y)), two)
    torch.testing.assert_close(computed(make(metric_class, **options, probs=True), (z.sigmoid(), y.float())), two)


@pytest.mark.parametrize("metric_class", [metric for metric in CONFIDENCE if metric not in SELECTIVE])
def test_the_positive_class_is_asked_for_by_name(metric_class):
    z, y = 2 * torch.randn(300).double(), torch.randint(2, (300,))
    options = {"task": "binary", "confidence": "positive"}
    value = computed(metric_class(**options), (z, y))
    torch.testing.assert_close(computed(metric_class(**options, probs=True), (z.sigmoid(), y)), value)
    assert not torch.allclose(value, computed(metric_class(task="binary"), (z, y)))
    with pytest.raises(ValueError, match='confidence="positive" is the probability of class 1 and needs task="binary"'):
        metric_class(confidence="positive")
    with pytest.raises(ValueError, match="`confidence` must be 'top' or 'positive', got 'max'"):
        metric_class(confidence="max")


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
    logits, target = torch.randn(4, 5, 5, 6), torch.randint(5, (4, 5, 6))
    target[:, 0] = 255
    kept = logits[:, :, 1:], target[:, 1:]
    dense = computed(make(metric_class, ignore_index=255), (logits, target))
    torch.testing.assert_close(dense, computed(make(metric_class), kept))


@pytest.mark.parametrize("metric_class", [*CONFIDENCE, Accuracy, BootstrapSums])
def test_of_tied_logits_the_first_is_the_prediction(metric_class):
    """Also in half precision, where ties are common, and for 300 rows at once."""
    logits = torch.randint(3, (300, 5)).half()
    target = torch.randint(5, (300,))
    shifted = logits.double() - 1e-9 * torch.arange(5)
    torch.testing.assert_close(
        computed(make(metric_class), (logits, target)),
        computed(make(metric_class), (shifted, target)),
        atol=1e-6,
        rtol=1e-6,
    )


@pytest.mark.parametrize("metric_class", [*CONFIDENCE, Accuracy, BootstrapSums])
def test_a_temperature_moves_no_prediction_however_high(metric_class):
    """Rounding of a softmax over nearly equal logits would make ties."""
    logits = calibrated_logits(5000)[0].float()
    metric = make(metric_class)
    metric.update(logits / 1e5, logits.argmax(1))
    if metric_class is Accuracy:
        assert metric.compute() == 1
    elif metric_class is BootstrapSums:
        assert metric.compute().metrics["accuracy"] == 1
    else:
        assert metric.sums[2].sum() == 5000


@pytest.mark.parametrize("metric_class", METRICS)
def test_masked_classes_are_no_nan(metric_class):
    """A logit of -inf rules a class out."""
    logits, target = calibrated_logits(100)
    wide = torch.cat([logits, torch.full((100, 1), -torch.inf)], 1)
    expected = computed(make(metric_class), (logits, target))
    actual = computed(make(metric_class, n_classes=6), (wide, target))
    if metric_class is ClasswiseCalibrationError:
        actual = actual * 6 / 5
    elif metric_class is CalibrationTest:  # of which the class is one of those that are not judged
        assert [float(actual[8]), float(actual[-1])] == [-1, 0]
        actual = torch.cat([actual[:8], actual[9:-1]])
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("metric_class", METRICS)
def test_an_all_ignored_batch_adds_nothing(metric_class):
    logits, target = calibrated_logits(50)
    metric = make(metric_class, ignore_index=-1)
    value = computed(metric, (logits, target))
    metric.update(logits, torch.full_like(target, -1))
    again = flat(metric.compute())
    if metric_class is BootstrapSums:  # where the items themselves are counted
        again, value = again.view(1024, -1)[:, 1:], value.view(1024, -1)[:, 1:]
    assert torch.equal(again, value)


EMPTY = {
    "no update": (lambda metric: None, "compute.. method of metric .* was called before"),
    "empty batch": (lambda m: m.update(torch.zeros(0, 5), torch.zeros(0).long()), "is nan: no position was scored"),
    "all ignored": (lambda m: m.update(torch.randn(3, 5), torch.full((3,), -1)), "all targets were ignore_index=-1"),
}


@pytest.mark.parametrize("metric_class", METRICS)
@pytest.mark.parametrize("case", EMPTY)
def test_nothing_seen_is_nan_and_one_warning(metric_class, case):
    metric = make(metric_class, ignore_index=-1)
    feed, message = EMPTY[case]
    feed(metric)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = metric.compute()
    (warning,) = caught
    assert re.search(message, str(warning.message))
    if metric_class is ReliabilityDiagram:
        assert value.counts.sum() == 0
        value = value.calibration_error()
    elif metric_class is BootstrapSums:
        assert value.curve.counts.sum() == 0
        value = torch.tensor(value.metrics["nll"])
    elif metric_class is RiskCoverageDiagram:
        value = torch.stack([*value, value.area(), value.accuracy_at(0.5), value.coverage_at(0.5)])
    elif metric_class is CalibrationTest:
        assert value.n_samples == 0
        value = torch.cat([part.reshape(-1) for part in value[1:]])
    assert torch.isnan(value).all()


def overall(value):
    """Without the layout of the blocks, which differs between one rank and two."""
    return value.blocks.sum(0)[1:] if isinstance(value, BlockSums) else value


def shards() -> dict:
    """Shards of 431 and 69 rows, of 500 and none, of none and none; and a batch of ignored rows on one rank."""
    rank = torch.distributed.get_rank()
    warnings.simplefilter("ignore")  # the rank without rows is told so
    logits, target = calibrated_logits(500)
    values = {}
    for metric_class in METRICS:
        for name, cut in (("uneven", 431), ("one rank", 500)):
            mine = slice(None, cut) if rank == 0 else slice(cut, None)
            metric = make(metric_class, ignore_index=-1)
            if name == "uneven" or rank == 0:
                metric.update(logits[mine], target[mine])
            if name == "uneven" and rank == 1:
                metric.update(logits[:7], torch.full((7,), -1))
            values[metric_class.__name__, name] = overall(metric.compute())
        values[metric_class.__name__, "empty"] = overall(make(metric_class).compute())
    return values


@pytest.mark.slow
def test_any_number_of_ranks_gives_the_same_value(tmp_path):
    results = on_ranks(2, tmp_path / "run", shards)
    logits, target = calibrated_logits(500)
    for metric_class in METRICS:
        metric = make(metric_class)
        metric.update(logits, target)
        expected = flat(overall(metric.compute()))
        for result in results:
            for name in ("uneven", "one rank"):
                actual = flat(result[metric_class.__name__, name])
                torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)
            empty = result[metric_class.__name__, "empty"]
            assert (flat(empty) <= 0).all()  # nan (here -1), or sums of nothing


def test_a_collection_of_confidence_metrics_keeps_one_state():
    logits, target = calibrated_logits(400)
    members = {metric_class.__name__: metric_class() for metric_class in CONFIDENCE}
    members |= {"l2": AdaptiveCalibrationError(norm="l2"), "debiased": RootMeanSquareCalibrationError(debias=True)}
    collection = MetricCollection(copy.deepcopy(members))
    for part in torch.arange(400).split(90):
        collection.update(logits[part], target[part])
    assert len(collection.compute_groups) == 1
    values = collection.compute()
    for name, metric in members.items():
        torch.testing.assert_close(flat(values[name]), computed(metric, (logits, target)))


def test_a_collection_does_not_merge_what_is_equal_by_chance():
    """A saturated first batch: NLL, Brier score and entropy are all 0, and every layout of bins has one filled cell."""
    logits, target = calibrated_logits(300)
    sure = 1e4 * F.one_hot(target[:20], 5).double()
    members = {
        "nll": NegativeLogLikelihood(),
        "brier": BrierScore(),
        "entropy": PredictiveEntropy(),
        "tail": ExponentialMarginTail(),
        "ece15": ExpectedCalibrationError(),
        "ece10": ExpectedCalibrationError(10),
        "ignoring": ExpectedCalibrationError(ignore_index=0),
    }
    collection = MetricCollection(copy.deepcopy(members))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collection.update(sure, target[:20])
    collection.update(logits, target)
    values = collection.compute()
    for name, metric in members.items():
        expected = computed(metric, (sure, target[:20]), (logits, target))
        torch.testing.assert_close(values[name].reshape(1), expected)


@pytest.mark.parametrize("metric_class", METRICS)
def test_forward_gives_the_batch_value_and_adds_to_the_whole(metric_class):
    logits, target = calibrated_logits(300)
    metric = make(metric_class)
    batch = metric(logits[:100].requires_grad_(), target[:100])
    torch.testing.assert_close(flat(batch), computed(make(metric_class), (logits[:100], target[:100])))
    assert not flat(batch).requires_grad
    metric(logits[100:], target[100:])
    torch.testing.assert_close(flat(metric.compute()), computed(make(metric_class), (logits, target)))


# One for each way to add a batch.
@pytest.mark.slow
@pytest.mark.parametrize(
    "metric_class",
    [ExpectedCalibrationError, BrierScore, NegativeLogLikelihood, BestTemperature, BootstrapSums, *BY_CLASS],
)
def test_a_compiled_caller_gets_the_same(metric_class):
    logits, target = calibrated_logits(64)
    metric = make(metric_class)

    def step(x, y):
        z = 2 * x
        metric.update(z, y)
        return z.sum()

    compiled = torch.compile(step, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo's own, about graph breaks
        compiled(logits, target)
        compiled(logits, target)
    expected = computed(make(metric_class), (2 * logits, target), (2 * logits, target))
    torch.testing.assert_close(flat(metric.compute()), expected)
    torch.compiler.reset()


@pytest.mark.parametrize("metric_class", METRICS)
def test_moving_casting_and_inference_mode_leave_the_sums_alone(metric_class):
    logits, target = calibrated_logits(100)
    expected = computed(make(metric_class), (logits, target), (logits, target))
    metric = make(metric_class).to("cpu").half().float().to(torch.device("cpu"))
    with torch.inference_mode():
        metric.reset()
        metric.update(logits, target)
    metric.update(logits, target)
    assert torch.equal(flat(metric.compute()), expected)
    assert metric.sums.dtype == torch.float64


@pytest.mark.parametrize("metric_class", METRICS)
def test_a_module_that_is_cast_leaves_the_sums_alone(metric_class):
    """As Lightning does with precision="bf16-true"; stands for the private `_apply`."""
    logits, target = calibrated_logits(100)
    module = torch.nn.ModuleDict({"layer": torch.nn.Linear(2, 2), "metric": make(metric_class)})
    module["metric"].update(logits, target)
    module.to(torch.bfloat16).to(torch.float16)
    assert module["layer"].weight.dtype == torch.float16
    expected = computed(make(metric_class), (logits, target), (logits, target))
    assert torch.equal(computed(module["metric"], (logits, target)), expected)
    module["metric"].reset()
    assert module["metric"].sums.dtype == torch.float64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("metric_class", METRICS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_cuda_gives_the_same_value(metric_class, dtype):
    logits, target = torch.randn(50, 5, 20).to(dtype), torch.randint(5, (50, 20))
    target[:, 0] = 255
    expected = computed(make(metric_class, ignore_index=255), (logits, target))
    metric = make(metric_class, ignore_index=255).to("cuda")
    value = computed(metric, (logits.cuda(), target.cuda()))
    assert metric.sums.device.type == "cuda"
    torch.testing.assert_close(value.cpu(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("metric_class", METRICS)
def test_a_device_without_float64_leaves_the_sums_on_the_cpu(metric_class):
    """As Apple's MPS; stands for the private `_apply` as well."""
    metric = make(metric_class)
    with pytest.warns(UserWarning, match=f"no float64: {metric_class.__name__} keeps its sums on the CPU"):
        metric._apply(to_mps)
    logits, target = calibrated_logits(50)
    assert torch.equal(computed(metric, (logits, target)), computed(make(metric_class), (logits, target)))


def test_it_is_logged_by_a_lightning_module(tmp_path):
    logits, target = calibrated_logits(100)

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.errors = MetricCollection({"ece": ExpectedCalibrationError(), "smooth": SmoothCalibrationError()})

        def test_step(self, batch, index):
            self.errors.update(*batch)
            self.log_dict(self.errors, on_epoch=True, on_step=False)

    loader = DataLoader(TensorDataset(logits, target), batch_size=30)
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    (result,) = Trainer(accelerator="cpu", default_root_dir=tmp_path, **quiet).test(Module(), loader, verbose=False)
    assert result["ece"] == pytest.approx(float(expected_calibration_error(logits, target)), abs=1e-6)


# test_functions.py has those that have a function beside them.
@pytest.mark.parametrize("metric_class", [one for one in METRICS if one not in PAIRS.values()])
@pytest.mark.parametrize("case", BAD_PREDICTIONS)
def test_bad_input_is_named(metric_class, case):
    preds, target, options, error, message = BAD_PREDICTIONS[case]
    metric = make(metric_class, **options)
    with pytest.raises(error, match=message):
        metric.update(preds, target)
    assert not metric.sums.any()


@pytest.mark.parametrize("metric_class", [*CONFIDENCE, *MEANS, ClasswiseCalibrationError])
def test_unchecked_nan_stays_nan(metric_class):
    """And is no index out of range, which would end a process that computes on CUDA."""
    value = make(metric_class, validate_args=False)(NAN, torch.zeros(40).long())
    if metric_class is ReliabilityDiagram:
        value = value.confidence[value.counts > 0].sum()
    if metric_class is RiskCoverageDiagram:
        value = torch.stack([value.area(), value.accuracy_at(0.5), value.coverage_at(0.5), value.threshold_at(0.5)])
    assert torch.isnan(value).all()


@pytest.mark.parametrize("metric_class", CONFIDENCE)
def test_a_probability_that_rounding_lifted_above_1_is_1(metric_class):
    probs = torch.tensor([[1.0000001, 0.0], [0.4, 0.6]])
    target = torch.tensor([0, 0])
    expected = computed(metric_class(probs=True), (probs.clamp(max=1), target))
    torch.testing.assert_close(computed(metric_class(probs=True), (probs, target)), expected)


@pytest.mark.parametrize("metric_class", METRICS)
def test_a_bad_row_in_a_later_block_leaves_nothing_counted(metric_class, monkeypatch):
    """And the batch may come again, mended."""
    monkeypatch.setattr("lightning_clamp._rows._BLOCK_ELEMENTS", 20)
    metric = make(metric_class)
    metric.update(*calibrated_logits(30))
    before = metric.sums.clone()
    logits, target = calibrated_logits(40, seed=2)
    beyond = target.clone()
    beyond[-1] = 5
    for preds, labels, message in (
        (NAN.flip(0), target, "nan or inf in 1 of"),
        (logits, beyond, r"Targets must lie in \[0, 4\], got 5"),
    ):
        for refusing in (metric.update, metric):
            with pytest.raises(ValueError, match=message):
                refusing(preds, labels)
            assert torch.equal(metric.sums, before)
    metric.update(logits, target)
    expected = computed(make(metric_class), calibrated_logits(30), (logits, target))
    assert torch.equal(flat(metric.compute()), expected)


@pytest.mark.parametrize("metric_class", METRICS)
@pytest.mark.parametrize("probs", [False, True])
def test_predictions_stay_as_they_are_refused_or_not(metric_class, probs):
    """What is looked at for bad labels is marked in place."""
    logits, target = calibrated_logits(20)
    preds = logits.softmax(1) if probs else logits
    kept, metric = preds.clone(), new(metric_class, probs=probs)
    metric.update(preds, target)
    target[3] = 7
    with pytest.raises(ValueError, match="7"):
        metric.update(preds, target)
    assert torch.equal(preds, kept)


@pytest.mark.slow
@pytest.mark.parametrize("metric_class", [BootstrapSums, ExpectedCalibrationError])
def test_a_large_refused_batch_may_come_again(metric_class):
    logits, target = calibrated_logits(300_000, n_classes=10)
    mended = target.clone()
    target[-1] = 10
    metric = make(metric_class, n_classes=10)
    for refusing in (metric.update, metric):
        with pytest.raises(ValueError, match=r"Targets must lie in \[0, 9\], got 10"):
            refusing(logits, target)
    assert torch.equal(computed(metric, (logits, mended)), computed(make(metric_class, n_classes=10), (logits, mended)))


@pytest.mark.parametrize("metric_class", METRICS)
def test_a_refused_step_leaves_the_metric_as_it_was(metric_class):
    """Also its options of synchronising, and what the collection around it counted."""
    logits, target = calibrated_logits(60)
    collection = MetricCollection({"one": make(metric_class), "two": make(metric_class)})
    collection.update(logits, target)
    collection.update(logits, target)
    expected = flat(collection.compute()["two"])
    for refusing in (collection.update, collection):
        with pytest.raises(ValueError, match="nan or inf"):
            refusing(NAN, torch.zeros(40).long())
        assert torch.equal(flat(collection.compute()["two"]), expected)
    single = collection["one"]
    before = {name: value for name, value in vars(single).items() if not isinstance(value, torch.Tensor)}
    with pytest.raises(ValueError, match="nan or inf"):
        single(NAN, torch.zeros(40).long())
    assert before == {name: value for name, value in vars(single).items() if not isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("metric_class", METRICS)
def test_labels_that_nobody_checked_and_torch_refuses_count_nothing(metric_class):
    logits, target = calibrated_logits(60)
    target[-1] = 5
    metric = make(metric_class, validate_args=False)
    try:
        metric.update(logits, target)
    except (IndexError, RuntimeError, ValueError):
        assert not metric.sums.any()


@pytest.mark.parametrize("metric_class", METRICS)
@pytest.mark.parametrize("task", ["multiclass", "binary"])
def test_probabilities_taken_as_logits_are_noticed_once(metric_class, task):
    logits, target = calibrated_logits(30, n_classes=2)
    probs = logits.softmax(1) if task == "multiclass" else logits.diff(dim=1)[:, 0].sigmoid()
    metric = make(metric_class, n_classes=2, task=task)
    for part in torch.arange(9).split(4):  # too little to tell
        metric.update(probs[part], target[part])
    with pytest.warns(UserWarning, match="look like probabilities, and took them as logits: say probs=True"):
        metric.update(probs[9:12], target[9:12])
    metric.update(probs, target)
    told = make(metric_class, n_classes=2, task=task)
    told.update(logits if task == "multiclass" else logits.diff(dim=1), target)
    told.update(probs, target)


@pytest.mark.parametrize(
    ("make_metric", "message"),
    [
        (lambda: ExpectedCalibrationError(n_bins=0), "`n_bins` must be a whole number of at least 1, got 0"),
        (lambda: ExpectedCalibrationError(n_bins=7.5), "`n_bins` must be a whole number of at least 1, got 7.5"),
        (lambda: ClasswiseCalibrationError(1), "`num_classes` must be at least 2, got 1"),
        (lambda: ClasswiseCalibrationError(5, average="micro"), "`average` must be 'macro' or 'none', got 'micro'"),
        (lambda: AdaptiveCalibrationError(norm="l0"), "`norm` must be one of"),
        (lambda: AdaptiveCalibrationError(debias=True), "`debias` is known for norm='l2' only, got norm='l1'"),
        (lambda: BootstrapSums(n_blocks=1), "`n_blocks` must be at least 2, got 1"),
        (lambda: Accuracy(task="regression"), "`task` must be one of"),
        (lambda: ClasswiseCalibrationError(4).update(torch.randn(3, 5), torch.zeros(3).long()), "preds have 5 classes"),
    ],
)
def test_bad_options_are_named(make_metric, message):
    with pytest.raises(ValueError, match=message):
        make_metric()
