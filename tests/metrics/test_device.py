"""On an accelerator a metric waits for nothing, or for one number: tensors without values (meta) stand for one."""

from contextlib import suppress

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_clamp.metrics import (
    Accuracy,
    BootstrapSums,
    BrierScore,
    ClasswiseCalibrationError,
    ExpectedCalibrationError,
    NegativeLogLikelihood,
    PredictiveEntropy,
    ReliabilityDiagram,
)
from lightning_clamp.metrics._binning import _bin_edges, _cell_edges, bin_index, cell_count, cell_index, merged
from lightning_clamp.metrics._reading import _top_label, _top_label_at_once
from lightning_clamp.metrics.classwise import _AT_ONCE_DEVICE, _add_all, _copies
from tests.kernels import is_kernel
from tests.metrics.test_metrics import METRICS, POOLED, make
from tests.scenarios import calibrated_logits

# What gives a number to Python, or a shape that depends on values.
WAITING = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "bincount", "_unique2", "masked_select"}
KINDS = {
    "logits": ({}, (40, 5), (40,)),
    "probabilities": ({"probs": True}, (40, 5), (40,)),
    "pixels": ({}, (4, 5, 3, 3), (4, 3, 3)),
    "one logit": ({"task": "binary"}, (40,), (40,)),
    "one probability": ({"task": "binary", "probs": True}, (40, 1), (40,)),
    "labels": ({"task": "multilabel", "num_labels": 3}, (40, 3), (40, 3)),
    "labels of pixels": ({"task": "multilabel", "average": "micro"}, (4, 3, 5), (4, 3, 5)),
}


WITHOUT_LABELS = [ClasswiseCalibrationError]


class Waits(TorchDispatchMode):
    """Counts what an accelerator would be waited for.

    Numbers that are read are 1, as a sum of probabilities is; the first of several is the count of rows that are fine.
    """

    def __init__(self, rows=1):
        super().__init__()
        self.found = []
        self.rows = rows

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        devices = {str(one.device) for one in args if isinstance(one, torch.Tensor)}
        devices.add(str(kwargs.get("device")))
        moved = name in ("copy_", "_to_copy") and len(devices - {"None"}) > 1
        masks = [one for one in (args[1] if name == "index" else []) if one is not None and one.dtype == torch.bool]
        if name in WAITING or masks or moved:
            self.found.append(name)
            if name == "_to_copy" and str(kwargs.get("device")) == "cpu":
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype", args[0].dtype)).index_fill_(
                    0, torch.tensor([0]), self.rows
                )
            if name == "_local_scalar_dense":
                return 1.0
        return function(*args, **kwargs)


def waits(metric, *batch):
    with Waits(batch[1].numel()) as seen:
        metric.update(*batch)
    return seen.found


@pytest.mark.filterwarnings("ignore:.* was given values that look like probabilities")
@pytest.mark.parametrize(
    ("validate", "kind"),
    [
        *((False, kind) for kind in KINDS),
        # All check in the same place.
        *((True, kind) for kind in ("logits", "one probability", "labels")),
    ],
)
@pytest.mark.parametrize("metric_class", METRICS)
def test_no_update_waits_for_the_device_or_for_one_number_if_it_is_to_check(metric_class, kind, validate):
    options, shape, labels = KINDS[kind]
    if options.get("task") == "multilabel":
        if metric_class in WITHOUT_LABELS:
            return
        if metric_class in POOLED:
            options = {"task": "multilabel", "average": "micro"}
    metric = make(metric_class, 2 if "task" in options else 5, validate_args=validate, **options).to("meta")
    batch = torch.empty(shape, device="meta"), torch.empty(labels, device="meta", dtype=torch.int64)
    for _ in range(2):  # the tables that are kept are made in the first
        found = waits(metric, *batch)
    assert len(found) == validate, found


@pytest.mark.filterwarnings("ignore:.* was given values that look like probabilities")
@pytest.mark.parametrize("task", ["binary", "multilabel"])
@pytest.mark.parametrize("validate", [False, True])
def test_float_targets_are_looked_at_with_the_rest(task, validate):
    options = {"average": "micro"} if task == "multilabel" else {}
    for metric_class in (BrierScore, BootstrapSums):
        metric = metric_class(task=task, validate_args=validate, **options).to("meta")
        for _ in range(2):  # the tables that are kept are made in the first
            found = waits(metric, torch.empty(9, 2, device="meta"), torch.empty(9, 2, device="meta"))
        assert len(found) == validate


# Of an update without checks and with them; one of torchmetrics' MulticlassCalibrationError takes 9.
KERNELS = {
    ExpectedCalibrationError: (7, 11),
    ReliabilityDiagram: (7, 11),
    ClasswiseCalibrationError: (6, 11),
    NegativeLogLikelihood: (5, 8),
    Accuracy: (7, 10),
    BrierScore: (7, 10),
    PredictiveEntropy: (6, 9),
}


class Kernels(Waits):
    """Also counts what an accelerator would be given to do: all but views and new memory."""

    def __init__(self, rows=1):
        super().__init__(rows)
        self.launched = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if is_kernel(function):
            self.launched.append(function.overloadpacket.__name__)
        return super().__torch_dispatch__(function, types, args, kwargs)


@pytest.mark.parametrize("metric_class", KERNELS)
@pytest.mark.parametrize("validate", [False, True])
def test_an_update_is_few_kernels(metric_class, validate):
    """What decides about the time of a small batch; the first batches also ask whether logits are probabilities."""
    metric = make(metric_class, 5, validate_args=validate).to("meta")
    metric.reader.learn(40, seem_probs=False)
    for _ in range(2):
        with Kernels(40) as seen:
            metric.update(torch.empty(40, 5, device="meta"), torch.empty(40, device="meta", dtype=torch.int64))
    assert len(seen.launched) <= KERNELS[metric_class][validate], seen.launched


@pytest.mark.parametrize("metric_class", [ClasswiseCalibrationError, ExpectedCalibrationError, NegativeLogLikelihood])
def test_an_update_of_many_rows_is_few_kernels_and_waits_for_nothing(metric_class):
    metric = make(metric_class, 1000, validate_args=False).to("meta")
    batch = torch.empty(4096, 1000, device="meta"), torch.empty(4096, device="meta", dtype=torch.int64)
    metric.update(*batch)
    with Kernels() as seen:
        metric.update(*batch)
    assert len(seen.launched) <= 8, seen.launched
    assert not seen.found


def test_leaving_positions_out_costs_one_wait():
    metric = ExpectedCalibrationError(ignore_index=255, validate_args=False).to("meta")
    with Waits() as seen, suppress(NotImplementedError):
        metric.update(torch.empty(4, 5, 3, device="meta"), torch.empty(4, 3, device="meta", dtype=torch.int64))
    assert seen.found == ["nonzero"]


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: float(x.sum()),
        lambda x: x[x > 0],
        lambda x: (x > 0).nonzero(),
        lambda x: x.sum(0).tolist(),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: torch.ones(3).to(x),
    ],
)
def test_the_count_sees_what_waits(waiting):
    # There is no shape that depends on values without values.
    with Waits() as seen, suppress(NotImplementedError):
        waiting(torch.empty(3, device="meta"))
    assert seen.found


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_top_label_in_few_launches_is_the_one_that_suits_a_processor(dtype):
    """With ties, and with differences that the rounding of a softmax would take for some."""
    logits = torch.cat([torch.randint(3, (200, 5)), 1e-5 * torch.randn(200, 5)]).to(dtype).float()
    target = torch.randint(5, (400,))
    confidence, predicted, label = _top_label_at_once(logits, target)
    expected, correct, _ = _top_label(logits, target)
    torch.testing.assert_close(confidence, expected)
    assert torch.equal(predicted == label, correct)


@pytest.mark.parametrize("n_bins", [1, 10, 15, 100, 20_000])
def test_the_cell_that_is_searched_for_is_the_one_that_is_computed(n_bins):
    """Up to the rounding at the edge of two cells; never at the edge of two bins."""
    edges = torch.arange(n_bins + 1, dtype=torch.float64) / n_bins
    beside = [edges, edges.nextafter(edges - 1), edges.nextafter(edges + 1), torch.rand(10_000).double()]
    confidence = torch.cat([*beside, torch.logspace(-9, 0, 1000).double(), 1 - torch.logspace(-9, -1, 1000).double()])
    confidence = confidence.clamp(0, 1)
    searched = torch.bucketize(confidence, _cell_edges(n_bins))
    computed_ = cell_index(confidence, n_bins)
    assert (searched - computed_).abs().max() <= 1
    assert (searched == computed_).double().mean() > 0.99
    assert searched[confidence == 1].unique().tolist() == [cell_count(n_bins) - 1]
    for index in (searched, computed_):
        cells = torch.zeros(3, cell_count(n_bins), dtype=torch.float64)
        cells[0] = torch.bincount(index, minlength=cell_count(n_bins))
        counts = torch.bincount(bin_index(confidence, n_bins), minlength=n_bins).double()
        assert torch.equal(merged(cells, n_bins)[0], counts)
    assert 0 <= int(torch.bucketize(torch.tensor(torch.nan), _cell_edges(n_bins))) < cells.shape[1]


@pytest.mark.parametrize("n_bins", [1, 10, 15, 100, 1000])
def test_bins_of_float32_are_those_of_float64(n_bins):
    edges = _bin_edges(n_bins).float()
    values = torch.cat([edges, edges.nextafter(edges - 1), edges.nextafter(edges + 1), torch.tensor([0.0, 1.0])])
    assert torch.equal(bin_index(values, n_bins), bin_index(values.double(), n_bins))


@pytest.mark.parametrize("rows", [300, 21, 1])
@pytest.mark.parametrize("spread", [None, 1, 40, 10_000])
def test_class_wise_sums_without_waiting_are_the_same(rows, spread, monkeypatch):
    """In parts, and by copies of the sums that do and that do not divide the rows, or are more than there are."""
    logits, target = calibrated_logits(rows)
    metric = make(ClasswiseCalibrationError)
    metric.update(logits.double(), target)
    monkeypatch.setattr("lightning_clamp.metrics.classwise._AT_ONCE_DEVICE", 200)
    if spread:
        monkeypatch.setattr("lightning_clamp.metrics.classwise._SPREAD_FROM", 0)
        monkeypatch.setattr("lightning_clamp.metrics.classwise._SPREAD", spread)
    sums = torch.zeros_like(metric.sums[:-1])
    _add_all(sums, logits.double().softmax(1), target)
    torch.testing.assert_close(sums, metric.sums[:-1])


def test_class_wise_sums_of_many_float32_are_right_to_their_rounding():
    logits, target = calibrated_logits(120_000, n_classes=9)
    metric = make(ClasswiseCalibrationError, 9)
    metric.update(logits, target)
    sums = torch.zeros_like(metric.sums[:-1])
    _add_all(sums, logits.softmax(1), target)
    # Of the rows, whose probabilities are themselves right to 1e-7.
    torch.testing.assert_close(sums, metric.sums[:-1], rtol=0, atol=1e-7 * len(logits))


def test_class_wise_sums_leave_given_probabilities_alone():
    probs = torch.empty(9, 4, device="meta", dtype=torch.float64)
    metric = make(ClasswiseCalibrationError, 4, probs=True, validate_args=False).to("meta")
    metric.update(probs, torch.empty(9, device="meta", dtype=torch.int64))
    # Private in torch, and what counts changes in place of a tensor that has no values.
    assert probs._version == 0
    assert probs.zero_()._version == 1


@pytest.mark.parametrize("classes", [2, 3, 21, 100, 1000, 20_000, 40_000])
def test_copies_of_class_wise_sums_are_small_and_of_at_most_1024_rows_each(classes):
    copies = _copies(classes)
    assert -(-(_AT_ONCE_DEVICE // classes) // copies) <= 1024
    assert 4 * 15 * copies * classes <= 2e6 or copies == 1
