"""What real calibration sets do: classes without samples, masked logits, labels that are wrong or say nothing."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from lightning_clamp import fit_clamp
from lightning_clamp.clamping.map_loss import MapLoss, map_derivatives
from lightning_clamp.clamping.moments import logit_moments
from lightning_clamp.clamping.output_map import map_space
from tests.scenarios import calibrated_logits, rows, sampled

IDENTITY = torch.nn.Identity()


def fitted(logits, target, **options):
    """A fit of the output side alone, and what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = fit_clamp(IDENTITY, [(logits, target)], **{"grids": ()} | options)
    return result, " ".join(str(one.message) for one in caught)


def held_out(result, logits, target):
    return float(F.cross_entropy(result.clamp.scale(logits), target))


def too_sure(n=6000):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, 5, generator=generator)
    return 3 * logits, sampled(logits.double(), 7)


@pytest.mark.parametrize("left", [0, 2], ids=["absent", "next to none"])
@pytest.mark.parametrize("maps", [("bias",), ("vector",), ("matrix",), ("temperature", "vector", "matrix")])
def test_a_class_without_samples_keeps_the_common_map(maps, left):
    """Calibrating by class must not unlearn what the set does not show; temperature scaling does not."""
    logits, target = too_sure()
    of_three = (target[:3000] == 3).nonzero()[left:, 0]
    keep = torch.ones(3000, dtype=torch.bool).index_fill(0, of_three, False)
    # Biases that are worth finding, of the classes that are there.
    logits = logits + torch.tensor([1.5, -1.5, 0.0, 0.0, 0.0])
    result, warned = fitted(logits[:3000][keep], target[:3000][keep], output_maps=maps)
    alone, _ = fitted(logits[:3000][keep], target[:3000][keep], output_maps=("temperature",))
    assert "of class 3" in warned
    assert result.chosen.output_map in maps
    assert held_out(result, logits[3000:], target[3000:]) < held_out(alone, logits[3000:], target[3000:]) - 0.02
    recalled = [
        float((one.clamp.scale(logits[3000:]).argmax(1) == target[3000:])[target[3000:] == 3].float().mean())
        for one in (result, alone)
    ]
    assert recalled[0] > recalled[1] - 0.02
    if (scale := result.clamp.class_scale) is not None:
        assert float(scale[3]) == pytest.approx(1)
    if (matrix := result.clamp.class_matrix) is not None:
        torch.testing.assert_close(matrix[3], torch.eye(5)[3])
    bias = result.clamp.class_bias
    # What centres the scales is in the bias too, hence only for the map that has no scales.
    if maps == ("bias",):
        assert float(bias[3] - bias[[0, 1, 2, 4]].mean()) == pytest.approx(0, abs=1e-5)


def test_many_classes_without_samples_are_named_by_number():
    logits, target = calibrated_logits(2000, n_classes=60)
    keep = target >= 10
    _, warned = fitted(logits[keep], target[keep])
    assert "of 10 of 60 classes (0, 1, 2, 3, 4, …)" in warned


def test_classes_that_chance_leaves_out_are_shrunk_like_all_others_and_those_of_a_sorted_set_are_not():
    """Of 100 classes 250 samples leave some eight out; the half of a sorted set leaves out fifty."""
    logits, target = calibrated_logits(500, n_classes=100)
    moments = logit_moments(rows(logits[:250], target[:250]), 100)
    assert int((moments.counts == 0).sum()) > 3
    assert bool(moments.seen.all())
    half = target < 50
    moments = logit_moments(rows(logits[half], target[half]), 100)
    assert float(moments.expected.max()) < 10  # of no single class would its absence be a surprise
    assert torch.equal(moments.seen, moments.counts > 0)
    assert moments.are_missing


def test_nothing_is_said_of_classes_that_chance_leaves_out_where_only_a_temperature_is_fitted():
    logits, target = calibrated_logits(150, n_classes=60)
    result, warned = fitted(logits, target)
    assert len(target.unique()) < 60
    assert result.chosen.output_map == "temperature"
    assert warned == ""


@pytest.mark.parametrize("kind", ["bias", "vector", "matrix"])
def test_derivatives_are_those_of_automatic_differentiation_where_a_class_is_absent(kind):
    logits, target = calibrated_logits(200)
    keep = target != 1
    logits, target = logits[keep], target[keep]
    space = map_space(kind, logit_moments(rows(logits, target), 5))
    noise = torch.randn(len(space.weight), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    free = space.temperature_only(1.5) + 0.2 * noise

    def losses(free):
        return F.cross_entropy(space.apply(logits, free), target, reduction="none")

    sums = map_derivatives(rows(logits, target), space, free, dense=True)
    scores = torch.autograd.functional.jacobian(losses, free)
    torch.testing.assert_close(sums.covariance, scores.T @ scores)
    hessian = torch.autograd.functional.hessian(lambda f: losses(f).sum(), free)
    torch.testing.assert_close(sums.curvature, hessian)


def test_labels_of_one_class_leave_the_class_wise_maps_and_the_grids_out():
    logits, target = too_sure(500)
    result, warned = fitted(logits, torch.zeros_like(target), grids=(1,))
    assert {one.refusal.code for one in result.candidates if one.refusal is not None} == {"one class"}
    assert "4 of 5 classes (1, 2, 3, 4)" in warned
    assert result.clamp.perturbation is None


@pytest.mark.parametrize(("shown", "code"), [(4, "missing classes"), (5, "costs more than it promises")])
def test_a_grid_needs_all_classes_that_the_network_expects(shown, code):
    """A perturbation moves the outputs of all classes."""
    logits, target = too_sure(3000)
    keep = target < shown
    result, _ = fitted(logits[keep], target[keep], grids=(1,))
    of_grid = next(one for one in result.candidates if one.grid == 1)
    assert of_grid.refusal.code == code


def masked_logits(value, n=4000):
    """Logits that want a vector map, of which about a third is masked; the truth's NLL is .65."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(n, 6, generator=generator, dtype=torch.float64)
    mask = torch.rand(n, 6, generator=generator) < 0.3
    mask[:, 0] &= ~mask.all(1)
    truth = logits * torch.linspace(0.5, 1.5, 6) + torch.linspace(-1, 1, 6)
    return logits.masked_fill(mask, value).float(), sampled(truth.masked_fill(mask, -1e30), 5), mask


@pytest.mark.parametrize("value", [-1e4, -1e9, torch.finfo(torch.float32).min, -math.inf])
def test_masked_logits_take_no_part(value):
    logits, target, mask = masked_logits(value)
    result, _ = fitted(logits[:2000], target[:2000])
    assert result.chosen.output_map == "vector"
    assert next(one for one in result.candidates if one.output_map == "matrix").refusal.code == "masked"
    scaled = result.clamp.scale(logits[2000:])
    assert float(scaled.softmax(1)[mask[2000:]].max()) == 0
    # A mask of -30 is an ordinary logit, too low to count.
    like = fitted(masked_logits(-30.0)[0][:2000], target[:2000], output_maps=("vector",))[0]
    assert held_out(result, logits[2000:], target[2000:]) < held_out(like, logits[2000:], target[2000:]) + 0.005
    assert math.isfinite(result.after["nll"])
    assert math.isfinite(result.after["ece"])


def test_the_value_of_a_mask_changes_nothing():
    clamps = [fitted(*masked_logits(value)[:2])[0].clamp for value in (-1e4, -math.inf)]
    torch.testing.assert_close(clamps[0].class_scale, clamps[1].class_scale)
    torch.testing.assert_close(clamps[0].class_bias, clamps[1].class_bias)


def test_the_logarithm_of_probabilities_that_are_zero_is_a_mask():
    """What people do who are told to return the logarithm of their probabilities."""
    logits, target = calibrated_logits(1000, n_classes=8)
    probs = (3 * logits).softmax(1)
    probs = probs * (probs > 1e-3).scatter(1, target[:, None], True)
    result, _ = fitted(probs.log(), target)
    assert result.after["nll"] < result.before["nll"]


@pytest.mark.parametrize("value", [-1e9, -math.inf])
def test_a_label_that_is_masked_is_named(value):
    logits, target, _ = masked_logits(value)
    logits[17, target[17]] = value
    with pytest.raises(ValueError, match=r"Sample 17 .* has the label \d, .* counts as masked .* unmask its class"):
        fitted(logits, target)


def test_a_clamp_keeps_masks_that_the_calibration_set_did_not_have():
    logits, target = too_sure(3000)
    matrix = fitted(logits @ (torch.eye(5) + 0.4 * torch.diag(torch.ones(4), 1)), target, output_maps=("matrix",))[0]
    negative = fitted(-logits, target, output_maps=("vector",))[0]
    for result in (matrix, negative):
        scaled = result.clamp.scale(logits[:8].masked_fill(torch.eye(5)[2].bool(), -1e9))
        assert bool(scaled.isfinite().all())
        assert float(scaled.softmax(1)[:, 2].max()) == 0


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("method", ["temperature", "clamp"])
def test_labels_that_have_nothing_to_do_with_the_logits_end_at_equal_probabilities(method, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(500, 8, generator=generator)
    target = torch.randint(0, 8, (500,), generator=generator)
    options = {"output_maps": ("temperature",), "grids": ()} if method == "clamp" else {}
    with pytest.warns(UserWarning, match="say next to nothing of the labels"):
        result = fit_clamp(IDENTITY, [(logits, target)], method=method, **options)
    assert result.after["nll"] == pytest.approx(math.log(8), abs=1e-3)


@pytest.mark.parametrize("scale", [1e-12, 1e-5, 1e3])
def test_the_unit_of_the_logits_does_not_matter(scale):
    logits, target = calibrated_logits(1000)
    result, _ = fitted(scale * logits, target)
    plain, _ = fitted(logits, target)
    assert result.reason == plain.reason
    assert float(result.clamp.temperature) == pytest.approx(scale * float(plain.clamp.temperature), rel=1e-4)


@pytest.mark.parametrize("scale", [1e5, 1e10, 1e30])
def test_logits_too_large_for_any_use_are_refused_in_a_sentence(scale):
    logits, target = calibrated_logits(200)
    with pytest.raises(ValueError, match="divide the outputs by a constant if nothing is masked"):
        fitted((scale * logits).float(), target)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("grids", [(), (1,)])
def test_constant_logits_are_left_alone(dtype, grids):
    _, target = calibrated_logits(200)
    constant = torch.nn.Conv1d(3, 5, 1).to(dtype)
    torch.nn.init.zeros_(constant.weight)
    inputs = torch.ones(200, 3, 1, dtype=dtype)
    with pytest.warns(UserWarning, match="all outputs are the same"):
        result = fit_clamp(lambda x: constant(x)[:, :, 0] * 0 + 1, [(inputs, target)], grids=grids)
    assert result.clamp.is_identity


def wrong_labels(n=4000, share=0.04):
    """Logits that are calibrated but for some labels, drawn at random from the classes."""
    logits, target = calibrated_logits(n, n_classes=8, scale=4)
    generator = torch.Generator().manual_seed(9)
    wrong = torch.rand(n, generator=generator) < share
    return logits, torch.where(wrong, torch.randint(0, 8, (n,), generator=generator), target)


def test_a_share_of_wrong_labels_is_found():
    logits, target = wrong_labels()
    result, _ = fitted(2 * logits[:2000], target[:2000])
    alone, _ = fitted(2 * logits[:2000], target[:2000], uniform_share=False)
    assert float(result.clamp.uniform_share) == pytest.approx(0.04, abs=0.015)
    assert float(result.clamp.temperature) == pytest.approx(2, rel=0.15)
    assert f"uniform share of {float(result.clamp.uniform_share):.2%}" in result.reason
    gain = held_out(alone, 2 * logits[2000:], target[2000:]) - held_out(result, 2 * logits[2000:], target[2000:])
    truth = torch.logaddexp(logits[2000:].log_softmax(1) + math.log(0.96), torch.tensor(0.04 / 8).log())
    assert gain > 0.02
    assert held_out(result, 2 * logits[2000:], target[2000:]) < float(F.nll_loss(truth, target[2000:])) + 0.01
    assert -result.chosen.expected_change == pytest.approx(gain, abs=3 * result.chosen.standard_error)


def test_a_share_of_wrong_labels_is_found_with_one_logit():
    generator = torch.Generator().manual_seed(0)
    logit = 4 * torch.randn(12000, generator=generator, dtype=torch.float64)
    target = (torch.rand(12000, generator=generator).double() < 0.05 / 2 + 0.95 * logit.sigmoid()).long()
    result, _ = fitted(2 * logit, target, task="binary")
    assert result.clamp.uniform_share.shape == (1,)
    assert float(result.clamp.uniform_share) == pytest.approx(0.05, abs=0.02)
    scaled = result.clamp.scale(2 * logit)
    torch.testing.assert_close(
        scaled.sigmoid().double(),
        pairs_of(result.clamp, 2 * logit).softmax(1)[:, 1],
        rtol=1e-4,
        atol=1e-4,
    )


def pairs_of(clamp, logit):
    """A one-logit head as two classes, by the formula."""
    bias = 0 if clamp.class_bias is None else clamp.class_bias.double()
    plain = (logit / clamp.temperature.double() + bias).sigmoid()
    share = clamp.uniform_share.double()
    positive = (1 - share) * plain + share / 2
    return torch.stack([(1 - positive).log(), positive.log()], 1)


@pytest.mark.parametrize("kind", ["temperature", "bias", "vector", "matrix"])
def test_the_gradient_with_a_share_is_that_of_automatic_differentiation(kind):
    logits, target = wrong_labels(200)
    space = replace(map_space(kind, logit_moments(rows(logits, target), 8)), share=0.1)
    noise = torch.randn(len(space.weight), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    free = (space.temperature_only(1.5) + 0.1 * noise).requires_grad_()
    mixed = torch.logaddexp(space.apply(logits, free).log_softmax(1) + math.log(0.9), torch.tensor(0.1 / 8).log())
    loss = F.nll_loss(mixed, target, reduction="sum")
    (expected,) = torch.autograd.grad(loss, free)
    value, gradient = MapLoss(rows(logits, target), space)(free.detach())
    assert value == pytest.approx(float(loss.detach()))
    torch.testing.assert_close(gradient, expected)


def test_calibrated_data_want_no_share():
    results = [fitted(*calibrated_logits(500, seed=10 * seed), output_maps=())[0] for seed in range(10)]
    assert all(result.clamp.uniform_share is None for result in results)


def test_one_sample_that_holds_the_loss_is_named_and_does_not_spoil_the_rest():
    logits, target = calibrated_logits(500)
    plain, _ = fitted(logits, target)
    logits[7, (int(target[7]) + 1) % 5] = 1e6
    result, warned = fitted(logits, target)
    assert "Sample 7 alone holds 100.0% of" in warned
    assert float(result.clamp.temperature) == pytest.approx(float(plain.clamp.temperature), rel=0.15)
    assert result.after["nll"] < plain.after["nll"] + 0.05
