import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_clamp.metrics import SmoothCalibrationError, smooth_calibration_error
from tests import references as ref
from tests.scenarios import calibrated_logits


def positive(confidence: np.ndarray, correct: np.ndarray):
    """Positive-class probabilities and labels whose confidence and correctness these are."""
    return torch.from_numpy(confidence), torch.from_numpy(correct).long()


def interior():
    """Confidences far from 0 and 1."""
    i = np.arange(400.0)
    confidence = 0.55 + 0.25 * np.sin(1.3 * i)
    return confidence, (np.modf(0.618034 * i)[0] < confidence - 0.12 * np.cos(3 * confidence)).astype(float)


def test_relplot_agrees_where_it_follows_the_definition():
    """Within 0.1 %, bandwidth included: values of relplot 1.0.3 on confidences away from 0 and 1."""
    expected = ref.OFFICIAL["interior"]
    probs, target = positive(*interior())
    options = {"confidence": "positive", "task": "binary", "probs": True}
    for bandwidth, value in ((None, expected["auto"]), (0.05, expected["0.05"]), (0.1, expected["0.1"])):
        ours = smooth_calibration_error(probs, target, bandwidth=bandwidth, **options)
        assert float(ours) == pytest.approx(value, rel=1e-3)
    found = smooth_calibration_error(probs, target, bandwidth=expected["bandwidth"], **options)
    assert float(found) == float(smooth_calibration_error(probs, target, **options))


@pytest.mark.slow
@pytest.mark.parametrize(("key", "sigma"), [("K10", 0.05), ("K100", 0.2), ("K100_s24", 0.05)])
def test_relplot_differs_by_its_ends_and_its_kernel(key, sigma):
    """Its numbers are those of its discretisation, reproduced to 0.1 %; ours are those of the definition."""
    logits, target = ref.official_inputs(key)
    confidence, correct = ref.confidences(logits.softmax(1).numpy(), target.numpy())
    theirs = ref.OFFICIAL[key]["relplot"][str(sigma)]
    assert ref.smooth_relplot(confidence, correct, sigma) == pytest.approx(theirs, rel=1e-3)
    ours = float(smooth_calibration_error(logits, target, bandwidth=sigma))
    assert ours == pytest.approx(ref.smooth(confidence, correct, sigma), rel=1e-4)


def test_confidence_1_has_its_full_weight():
    """Half of the samples at confidence 1, all right, half at .6, all wrong: the error cannot exceed .3.

    relplot gives the samples on the end of the axis half their weight, which lifts it.
    """
    confidence = np.repeat([1.0, 0.6], 100)
    correct = np.repeat([1.0, 0.0], 100)
    probs = torch.stack([torch.from_numpy(confidence), 1 - torch.from_numpy(confidence)], 1)
    value = smooth_calibration_error(probs, torch.from_numpy(1 - correct).long(), bandwidth=0.05, probs=True)
    assert float(value) == pytest.approx(0.3, abs=1e-6)
    assert ref.smooth_relplot(confidence, correct, 0.05) > 0.38


@pytest.mark.slow
@given(st.integers(1, 40), st.sampled_from([0.01, 0.03, 0.1, 0.5, 1.0]), st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_it_is_the_definition(n, sigma, seed):
    generator = torch.Generator().manual_seed(seed)
    probs = (2 * torch.randn(n, 3, generator=generator, dtype=torch.float64)).softmax(1)
    target = torch.randint(3, (n,), generator=generator)
    expected = ref.smooth(*ref.confidences(probs.numpy(), target.numpy()), sigma)
    assert float(smooth_calibration_error(probs, target, bandwidth=sigma, probs=True)) == pytest.approx(
        expected, abs=2e-5
    )


@pytest.mark.slow
@given(st.integers(1, 60), st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_the_bandwidth_is_where_it_meets_the_error(n, seed):
    generator = torch.Generator().manual_seed(seed)
    probs = (2 * torch.randn(n, 3, generator=generator, dtype=torch.float64)).softmax(1)
    target = torch.randint(3, (n,), generator=generator)
    value = float(smooth_calibration_error(probs, target, probs=True))

    def meets(step):
        return float(smooth_calibration_error(probs, target, bandwidth=step / 1024, probs=True)) <= step / 1024

    # The error falls with the bandwidth, so that no bandwidth below the error can meet it.
    step = next(step for step in range(max(2, int(value * 1024)), 1025) if meets(step))
    assert value == float(smooth_calibration_error(probs, target, bandwidth=step / 1024, probs=True))
    assert step == 2 or not meets(step - 1)


def test_one_signed_residuals_give_their_mean_whatever_the_bandwidth():
    logits, _ = calibrated_logits(300)
    probs = logits.softmax(1)
    target = probs.argmax(1)
    expected = float((1 - probs.max(1).values).mean())
    for bandwidth in (None, 0.01, 0.3):
        assert float(smooth_calibration_error(probs, target, bandwidth=bandwidth, probs=True)) == pytest.approx(
            expected, abs=1e-9
        )


def test_streaming_is_the_function_to_the_width_of_a_cell():
    logits, target = calibrated_logits(3000)
    for bandwidth in (None, 0.005, 0.05):
        metric = SmoothCalibrationError(bandwidth=bandwidth)
        metric.update(3 * logits, target)
        expected = smooth_calibration_error(3 * logits, target, bandwidth=bandwidth)
        assert float(metric.compute()) == pytest.approx(float(expected), rel=2e-4)


def test_a_calibrated_network_has_a_small_error_and_an_overconfident_one_a_large():
    logits, target = calibrated_logits(20_000)
    assert float(smooth_calibration_error(logits, target)) < 0.012
    assert float(smooth_calibration_error(3 * logits, target)) > 0.1


@pytest.mark.parametrize("bandwidth", [0, -0.1, 1e-4, 1.5])
def test_the_bandwidth_is_checked(bandwidth):
    with pytest.raises(ValueError, match=r"`bandwidth` must lie in \[1/1024, 1\]"):
        SmoothCalibrationError(bandwidth=bandwidth)
