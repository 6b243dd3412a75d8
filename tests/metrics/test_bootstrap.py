import math

import pytest
import torch
from torch.nn import functional as F

from lightning_clamp.metrics import BootstrapSums, expected_calibration_error, paired_bootstrap
from tests.scenarios import calibrated_logits


def sums_of(logits, target, size=300, **options):
    metric = BootstrapSums(**options)
    for part, labels in zip(logits.split(size), target.split(size), strict=True):
        metric.update(part, labels)
    return metric.compute()


def test_the_sums_give_the_metrics():
    logits, target = calibrated_logits(5000)
    both = sums_of(3 * logits, target)
    assert both.metrics["nll"] == pytest.approx(float(F.cross_entropy(3 * logits, target)))
    assert both.metrics["accuracy"] == pytest.approx(float((logits.argmax(1) == target).double().mean()))
    expected = expected_calibration_error(3 * logits, target)
    assert float(both.curve.calibration_error()) == pytest.approx(float(expected), abs=1e-12)
    assert both.metrics["ece"] == pytest.approx(float(expected), abs=1e-12)


def test_the_change_is_after_minus_before_within_its_interval():
    logits, target = calibrated_logits(2000)
    before, after = sums_of(3 * logits, target), sums_of(logits, target)
    change = paired_bootstrap(before, after)
    assert set(change) == {"nll", "ece", "accuracy"}
    assert change["nll"].value == pytest.approx(after.metrics["nll"] - before.metrics["nll"])
    ece = float(after.curve.calibration_error() - before.curve.calibration_error())
    assert change["ece"].value == pytest.approx(ece)
    assert change["nll"].low < change["nll"].value < change["nll"].high < 0
    assert change["ece"].high < 0
    assert change["accuracy"] == (0, 0, 0)  # a temperature moves no prediction, in no resample


@pytest.mark.parametrize("n", [1500, 20_000])
def test_the_width_is_that_of_the_paired_normal_interval(n):
    """Of each item its own block, and of ten items to a block."""
    logits, target = calibrated_logits(n)
    nll = [F.cross_entropy(scale * logits, target, reduction="none") for scale in (1.3, 1.0)]
    expected = 2 * 1.96 * float((nll[1] - nll[0]).std()) / math.sqrt(n)
    change = paired_bootstrap(sums_of(1.3 * logits, target), sums_of(logits, target), resamples=4000)["nll"]
    assert change.high - change.low == pytest.approx(expected, rel=0.08)


def test_pairing_makes_the_interval_narrow():
    logits, target = calibrated_logits(1000)
    generator = torch.Generator().manual_seed(0)
    other = torch.randperm(1000, generator=generator)
    before, after = sums_of(1.1 * logits, target), sums_of(logits, target)
    paired = paired_bootstrap(before, after)["nll"]
    unpaired = paired_bootstrap(before, sums_of(logits[other], target[other]))["nll"]
    assert (paired.high - paired.low) * 5 < unpaired.high - unpaired.low


def test_pixels_of_an_image_are_drawn_together():
    """Two hundred copies of every pixel tell no more than one."""
    logits, target = calibrated_logits(500)
    copied = logits[:, :, None].expand(-1, -1, 200)
    one = paired_bootstrap(sums_of(2 * logits, target), sums_of(logits, target))
    many = [sums_of(scale * copied, target[:, None].expand(-1, 200), size=50) for scale in (2, 1)]
    for name, interval in paired_bootstrap(*many).items():
        assert interval == pytest.approx(one[name], abs=1e-9)


def test_it_does_not_depend_on_the_batches_or_the_random_state():
    logits, target = calibrated_logits(3000)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = paired_bootstrap(sums_of(2 * logits, target), sums_of(logits, target))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = paired_bootstrap(sums_of(2 * logits, target, size=71), sums_of(logits, target, size=3000))
    for name in first:
        assert first[name] == pytest.approx(second[name], abs=1e-9)


@pytest.mark.slow
def test_intervals_cover_the_truth():
    """The change of the NLL, and of the ECE of networks that stay miscalibrated, 60 draws of 1,000 samples each.

    At a true coverage of 95 %, fewer than 51 hits of 60 has probability 0.001.
    """
    logits, target = calibrated_logits(400_000)
    truth = paired_bootstrap(sums_of(2 * logits, target, 10_000), sums_of(1.3 * logits, target, 10_000), resamples=2)
    hits = {"nll": 0, "ece": 0}
    for part in torch.arange(60_000).split(1000):
        sample = [sums_of(scale * logits[part], target[part]) for scale in (2, 1.3)]
        change = paired_bootstrap(*sample, resamples=300)
        for name in hits:
            hits[name] += change[name].low <= truth[name].value <= change[name].high
    assert min(hits.values()) >= 51


def test_items_without_labels_are_not_drawn():
    """Sixty images of which six are labelled: the intervals are those of the six."""
    logits, target = torch.randn(60, 4, 10).double(), torch.randint(4, (60, 10))
    some = torch.arange(60) % 10 == 3
    masked = torch.where(some[:, None], target, 255)
    sides = [
        [sums_of(z, y, ignore_index=255) for z in (3 * z, z)]
        for z, y in ((logits, masked), (logits[some], target[some]))
    ]
    many, few = (paired_bootstrap(*side) for side in sides)
    assert many == few
    assert not any(math.isnan(number) for interval in many.values() for number in interval)


@pytest.mark.parametrize("n", [1, 2])
def test_one_item_has_no_interval(n):
    logits, target = calibrated_logits(n)
    change = paired_bootstrap(sums_of(3 * logits, target), sums_of(logits, target))
    assert not math.isnan(change["nll"].value)
    assert math.isnan(change["nll"].low) == (n == 1)


def test_large_dense_batches_are_taken_in_parts(monkeypatch):
    logits, target = torch.randn(9, 4, 10).double(), torch.randint(4, (9, 10))
    whole = sums_of(logits, target)
    for elements in (1, 100):
        monkeypatch.setattr("lightning_clamp._rows._BLOCK_ELEMENTS", elements)
        torch.testing.assert_close(sums_of(logits, target).blocks, whole.blocks)


def test_a_metric_that_was_not_computed_is_named():
    with pytest.raises(TypeError, match=r"takes what BootstrapSums.compute\(\) gives, got BootstrapSums"):
        paired_bootstrap(BootstrapSums(), BootstrapSums())


def test_bad_pairs_and_levels_are_named():
    logits, target = calibrated_logits(100)
    whole, half = sums_of(logits, target), sums_of(logits[:50], target[:50])
    with pytest.raises(ValueError, match="needs the same items, in the same order"):
        paired_bootstrap(whole, half)
    with pytest.raises(ValueError, match="needs the same items"):
        paired_bootstrap(whole, sums_of(logits, target, n_bins=10))
    masked = sums_of(logits, target, ignore_index=0)
    with pytest.raises(ValueError, match="needs the same items"):
        paired_bootstrap(whole, masked)
    with pytest.raises(ValueError, match="`resamples` must be at least 2, got 0"):
        paired_bootstrap(whole, whole, resamples=0)
    with pytest.raises(ValueError, match=r"`level` must lie in \(0, 1\), got 95"):
        paired_bootstrap(whole, whole, level=95)
