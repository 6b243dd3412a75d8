"""Tests of calibration: right size on calibrated data, also where rows are correlated, and power where they are not."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_clamp.clamping.temperature import fit_temperature
from lightning_clamp.metrics import CalibrationTest, calibration_test
from lightning_clamp.metrics._tails import holm, p_of_independent, p_of_items
from tests.scenarios import calibrated_logits, rows, sampled


def p_values(draws, n, n_classes=5, scale=2.0, **options):
    """Of temperature, Spiegelhalter and class 0 (uncorrected), and whether any class is below 0.05 after correction."""
    found = []
    for seed in range(draws):
        logits, target = calibrated_logits(n, n_classes, scale, seed=2 * seed)
        evidence = calibration_test(logits, target, **options)
        found.append([evidence.p_temperature, evidence.p_spiegelhalter, evidence.p_classes.min(), evidence.p])
    return np.array(found, dtype=float)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "n_classes", "scale"), [(300, 3, 2.0), (300, 10, 5.0)])
def test_p_values_are_uniform_on_calibrated_data(n, n_classes, scale):
    """At the level of 0.001 of Kolmogorov and Smirnov; and no more than their share is below 0.05."""
    found = p_values(500, n, n_classes, scale)
    for column in (0, 1):
        assert stats.kstest(found[:, column], "uniform").pvalue > 0.001
    for column in (2, 3):
        assert (found[:, column] < 0.05).mean() < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 500)
    assert (found[:, 2] < 0.05).mean() > 0.02, "no more careful than it must be"


@pytest.mark.slow
@pytest.mark.parametrize("task", ["multiclass", "binary"])
def test_correlated_pixels_of_images_do_not_raise_the_alarm(task):
    """One noise decides all pixels of an image: each is calibrated, and together they say little more than one."""
    generator = torch.Generator().manual_seed(0)
    found, by_row = [], []
    for _ in range(200):
        shape = (120, 3, 10) if task == "multiclass" else (120, 1, 10)
        logits = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
        uniform = torch.rand((120, shape[1], 1), generator=generator, dtype=torch.float64)
        if task == "multiclass":
            target = (logits - (-uniform.log()).log()).argmax(1)
            flat = logits.movedim(1, -1).flatten(0, 1), target.flatten()
        else:
            target = (uniform < logits.sigmoid()).long()
            flat = logits.flatten(), target.flatten()
        for kept, batch in ((found, (logits, target)), (by_row, flat)):
            evidence = calibration_test(*batch, task=task)
            kept.append(
                [float(evidence.p_temperature), float(evidence.p_spiegelhalter), evidence.scalars()["p_classes"]]
            )
    sizes, naive = ((np.array(kept) < 0.05).mean(0) for kept in (found, by_row))
    assert (sizes < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)).all()
    assert naive[2] > 0.25, "rows taken one by one would say so of calibrated data"


@pytest.mark.parametrize("factor", [0.4, 0.7, 1.4, 2.5])
def test_a_wrong_temperature_is_found_and_the_right_one_named(factor):
    logits, target = calibrated_logits(2000, 10)
    evidence = calibration_test(factor * logits, target)
    assert evidence.p < 1e-6
    best = math.exp(fit_temperature(rows(factor * logits, target)).log_temperature)
    assert float(evidence.temperature) == pytest.approx(best, rel=0.005)
    assert (float(evidence.brier_excess) > 0) == (factor > 1)
    assert f"T would be {1.5 * float(evidence.temperature):.2f} instead of 1.50; p < 0.001; calibrate again." in (
        evidence.describe(temperature=1.5)
    )


@pytest.mark.parametrize(("factor", "words"), [(100.0, "at least 4.00"), (0.01, "at most 0.25")])
def test_a_temperature_beyond_the_ladder_is_a_bound(factor, words):
    logits, target = calibrated_logits(2000)
    assert f"T would be {words} instead of 1.00" in calibration_test(factor * logits, target).describe()


def test_classes_that_have_become_rarer_are_named():
    logits, target = calibrated_logits(3000, 10)
    kept = (target != 7) | (torch.arange(3000) % 2 == 0)
    evidence = calibration_test(logits[kept], target[kept])
    assert int(evidence.p_classes.argmin()) == 7
    excess = (torch.bincount(target[kept], minlength=10) - logits[kept].softmax(1).sum(0)).double()
    torch.testing.assert_close(evidence.class_excess, excess)
    assert f"more or fewer rows than the probabilities say are of class 7 ({excess[7]:+.0f})" in evidence.describe()


def test_calibrated_probabilities_get_a_sentence_that_claims_no_proof():
    evidence = calibration_test(*calibrated_logits(2000))
    assert evidence.describe(subject="the clamp is").startswith(
        "Nothing speaks against it on these 2,000 samples: as far as they tell, the clamp is calibrated (p = "
    )


def test_the_scores_of_two_classes_are_those_of_the_literature():
    """Spiegelhalter's z and the calibration in the large of Cox, written out."""
    generator = torch.Generator().manual_seed(0)
    z = 0.3 + torch.randn(4000, generator=generator, dtype=torch.float64)
    y = sampled(torch.stack([0 * z, 1.2 * z], 1))
    evidence = calibration_test(z, y, task="binary")
    p = z.sigmoid()
    spiegelhalter = ((y - p) * (1 - 2 * p)).sum() / (((1 - 2 * p) ** 2 * p * (1 - p)).sum()).sqrt()
    large = (y - p).sum() / (p * (1 - p)).sum().sqrt()
    for value, score in ((evidence.p_spiegelhalter, spiegelhalter), (evidence.p_classes[0], large)):
        assert float(value) == pytest.approx(2 * stats.norm.sf(abs(float(score))), rel=0.05, abs=1e-4)
    torch.testing.assert_close(evidence.p_classes[0], evidence.p_classes[1])
    expected = ((y - p) ** 2).mean() * 2 - (2 * p * (1 - p)).mean()
    torch.testing.assert_close(evidence.brier_excess, expected)


def test_classes_of_which_hardly_any_is_expected_are_not_judged():
    logits, target = calibrated_logits(300)
    rare = torch.cat([logits, torch.full((300, 2), -12.0).double()], 1)
    evidence = calibration_test(rare, target)
    assert evidence.p_classes[5:].isnan().all()
    torch.testing.assert_close(evidence.p_classes[:5], calibration_test(logits, target).p_classes, atol=1e-3, rtol=0)


@pytest.mark.parametrize("n", [1, 3])
def test_too_few_images_say_nothing(n):
    evidence = calibration_test(torch.randn(n, 3, 6, 6), torch.randint(3, (n, 6, 6)))
    assert math.isnan(evidence.p)
    assert evidence.scalars() == {}
    assert evidence.describe() == f"These {n} samples are too few to say whether the probabilities are calibrated."


def test_images_without_a_label_do_not_count():
    logits, target = torch.randn(10, 3, 6, 6), torch.randint(3, (10, 6, 6))
    target[4:] = 255
    whole, part = (calibration_test(logits[:n], target[:n], ignore_index=255) for n in (10, 4))
    assert int(whole.n_samples) == 4
    torch.testing.assert_close(whole, part, equal_nan=True)


def test_an_impossible_label_is_no_nan():
    logits, target = calibrated_logits(500)
    logits[:, 0] = -torch.inf
    assert calibration_test(logits, target).p < 1e-6


def test_student_s_p_values_are_those_of_the_distribution():
    for n in (5, 10, 100):
        terms = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) + 0.5
        p = p_of_items(terms.sum(), terms.square().sum(), torch.tensor(float(n)))
        assert float(p) == pytest.approx(stats.ttest_1samp(terms.numpy(), 0).pvalue, rel=0.02)


@pytest.mark.parametrize(("mean", "count"), [(3.0, 9), (10.0, 22), (50.0, 75), (50.0, 28)])
def test_rare_counts_get_the_p_values_of_counts(mean, count):
    """Of which the normal distribution calls the first five times as rare as it is."""
    p = p_of_independent(*(torch.tensor(value).double() for value in (count - mean, mean, mean)))
    tail = stats.poisson.sf(count, mean) if count > mean else stats.poisson.cdf(count - 1, mean)
    exact = 2 * (tail + stats.poisson.pmf(count, mean) / 2)
    assert float(p) == pytest.approx(exact, rel=0.3)


def test_holm_s_correction():
    p = torch.tensor([0.01, torch.nan, 0.04, 0.03, 0.005]).double()
    torch.testing.assert_close(holm(p), torch.tensor([0.03, torch.nan, 0.06, 0.06, 0.02]).double(), equal_nan=True)


def test_the_number_of_classes_is_held_to():
    with pytest.raises(ValueError, match="`num_classes` must be at least 2, got 1"):
        CalibrationTest(1)
    with pytest.raises(ValueError, match="`num_classes` is 4, but preds have 5 classes"):
        CalibrationTest(4).update(*calibrated_logits(10))
