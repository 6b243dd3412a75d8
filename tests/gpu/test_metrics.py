"""No update of a metric waits for the device without checks, and one number is read with them. Skipped without CUDA."""

from contextlib import contextmanager

import pytest
import torch

from lightning_clamp.metrics import ClasswiseCalibrationError, ExpectedCalibrationError, NegativeLogLikelihood
from tests.metrics.test_device import KINDS, POOLED, WITHOUT_LABELS
from tests.metrics.test_metrics import METRICS, make
from tests.references import flat

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@contextmanager
def no_waiting():
    """Whatever waits for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def drawn(kind, metric_class):
    """Options, number of classes and a batch on the CPU."""
    options, shape, labels = KINDS[kind]
    several = options.get("task") == "multilabel"
    options = {"task": "multilabel", "average": "micro"} if several and metric_class in POOLED else options
    preds = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if options.get("probs"):
        preds = preds.sigmoid() if "task" in options else preds.softmax(1)
    n_classes = 2 if "task" in options else 5
    target = torch.randint(n_classes, labels, generator=torch.Generator().manual_seed(1))
    return options, n_classes, preds, target


@pytest.mark.filterwarnings("ignore:.*the last that is looked at")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric_class", METRICS)
def test_an_update_waits_for_nothing_and_sums_what_the_cpu_does(metric_class, kind):
    if kind.startswith("labels") and metric_class in WITHOUT_LABELS:
        return
    options, n_classes, preds, target = drawn(kind, metric_class)
    here = make(metric_class, n_classes, **options)
    there = make(metric_class, n_classes, validate_args=False, **options).to("cuda")
    batch = preds.cuda(), target.cuda()
    there.update(*batch)  # the tables that are kept are made here
    with no_waiting():
        there.update(*batch)
    for _ in range(2):
        here.update(preds, target)
    torch.testing.assert_close(flat(there.compute()).cpu(), flat(here.compute()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("metric_class", [ClasswiseCalibrationError, ExpectedCalibrationError, NegativeLogLikelihood])
def test_many_rows_on_few_sums_are_added_up_as_on_the_cpu(metric_class):
    """Of a number of rows that nothing divides, and with the same probabilities, so that only rounding may differ."""
    generator = torch.Generator().manual_seed(0)
    probs = (2 * torch.randn(100_003, 12, generator=generator)).softmax(1)
    target = torch.randint(12, (len(probs),), generator=generator)
    here, there = make(metric_class, 12, probs=True), make(metric_class, 12, probs=True).to("cuda")
    here.update(probs, target)
    there.update(probs.cuda(), target.cuda())
    torch.testing.assert_close(there.compute().cpu(), here.compute(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("metric_class", METRICS)
def test_what_is_wrong_is_refused_on_the_device_too(metric_class):
    """And a label out of range does not end the process."""
    _, n_classes, preds, target = drawn("logits", metric_class)
    metric = make(metric_class, n_classes).to("cuda")
    beyond, broken = target.clone(), preds.clone()
    beyond[3], broken[2, 1] = n_classes, torch.nan
    for batch, message in (
        ((preds, beyond), r"Targets must lie in \[0, 4\], got 5"),
        ((broken, target), "nan or inf in 1"),
    ):
        with pytest.raises(ValueError, match=message):
            metric.update(*(one.cuda() for one in batch))
        assert not metric.sums.any()
