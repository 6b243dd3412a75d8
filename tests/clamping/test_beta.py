"""Beta maps of two classes: what they are, known answers, and where there are none."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from lightning_clamp import Clamp, fit_clamp
from lightning_clamp._rows import as_rows
from lightning_clamp.clamping.beta import beta_space
from lightning_clamp.clamping.map_loss import MapLoss, map_derivatives
from lightning_clamp.clamping.moments import logit_moments
from lightning_clamp.clamping.output_map import map_space
from lightning_clamp.clamping.shrinkage import (
    Reference,
    average,
    fit_output_map,
    fit_path,
    shrinkage_path,
    temperature_map,
)
from lightning_clamp.clamping.temperature import fit_temperature
from tests.scenarios import RowList, SmallNet, batches, calibrated_logits, images, rows, sampled

IDENTITY = torch.nn.Identity()
# Slopes of log p and of -log(1 - p), and a bias.
TRUTH = (0.4, 1.8, 0.4)


def beta(margin, a, b, c):
    """Log-odds of Kull, Silva Filho and Flach, p = sigmoid(margin)."""
    return a * F.logsigmoid(margin) - b * F.logsigmoid(-margin) + c


def bent(n, truth=TRUTH, seed=0):
    """Log-odds, labels that a beta map of them explains, and the true log-odds."""
    generator = torch.Generator().manual_seed(seed)
    margin = 2.5 * torch.randn(n, generator=generator, dtype=torch.float64)
    true = beta(margin, *truth)
    return margin, (torch.rand(n, generator=generator).double() < true.sigmoid()).long(), true


def columns(margin, level=0.0):
    """Logits of two classes."""
    return torch.stack([level - margin / 2, level + margin / 2], 1)


def both(margin):
    """A one-logit head, and two logits whose sum says nothing."""
    generator = torch.Generator().manual_seed(9)
    level = torch.randn(len(margin), generator=generator, dtype=torch.float64)
    return {"binary": margin, "multiclass": columns(margin, level)}


def nll(clamp, logits, target):
    scaled = clamp.scale(logits).double()
    if logits.ndim == 1:
        return float(F.binary_cross_entropy_with_logits(scaled, target.double()))
    return float(F.cross_entropy(scaled, target))


def space_of(data, temperature=1.0):
    return beta_space(data, logit_moments(data, 2), temperature)


def base_of(data):
    return temperature_map(data, 2, fit_temperature(data), dense=False)


def random_point(space):
    noise = torch.randn(len(space.weight), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return space.temperature_only(1.5) + 0.3 * noise


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_derivatives_are_those_of_automatic_differentiation(share):
    margin, target, _ = bent(200)
    logits = both(margin)["multiclass"]
    data = rows(logits, target)
    space = replace(space_of(data, 1.3), share=share)
    free = random_point(space)

    def losses(free):
        return space.loss_of_label(space.apply(logits, free).log_softmax(1), target)[0]

    # Those in the scales of the logits are not asked for: a fit leaves them at 0.
    asked = torch.tensor([0, 0, 1, 1, 1, 1]).double()
    loss, gradient = MapLoss(data, space)(free)
    scores = torch.autograd.functional.jacobian(losses, free) * asked
    assert loss == pytest.approx(float(losses(free).sum()))
    torch.testing.assert_close(gradient, scores.sum(0))
    sums = map_derivatives(data, space, free, dense=True)
    torch.testing.assert_close(sums.gradient, scores.sum(0))
    torch.testing.assert_close(sums.covariance, scores.T @ scores)
    if not share:
        hessian = torch.autograd.functional.hessian(lambda f: losses(f).sum(), free)
        torch.testing.assert_close(sums.curvature, asked[:, None] * hessian * asked)


@pytest.mark.parametrize("kind", ["temperature", "bias", "vector"])
def test_the_average_holds_maps_of_other_kinds_as_they_are(kind):
    margin, target, _ = bent(300)
    logits = both(margin)["multiclass"]
    data = rows(logits, target)
    moments = logit_moments(data, 2)
    narrow, space = map_space(kind, moments), beta_space(data, moments, 1.7)
    free = random_point(narrow)
    torch.testing.assert_close(space.apply(logits, space.widened(free, narrow)), narrow.apply(logits, free))
    torch.testing.assert_close(space.offset(space.widened(free, narrow)), narrow.offset(free))


@pytest.mark.parametrize("shrinkage", [0.3, 30.0])
def test_it_is_the_vector_map_of_the_log_probabilities(shrinkage):
    margin, target, _ = bent(1000)
    logits = both(margin)["multiclass"]
    log_probs = 1.3 * (logits / 1.3).log_softmax(1)
    data, as_log_probs = rows(logits, target), rows(log_probs, target)
    fits = []
    for values, source, space in [
        (logits, data, space_of(data, 1.3)),
        (log_probs, as_log_probs, map_space("vector", logit_moments(as_log_probs, 2))),
    ]:
        path = shrinkage_path(source, space, base_of(source), dense=False)
        start = space.temperature_only(base_of(source).temperature)
        fit = fit_output_map(MapLoss(source, space), path, shrinkage, start, 1000)
        fits.append((fit.effective_parameters, space.apply(values, fit.free).softmax(1)))
    assert fits[0][0] == pytest.approx(fits[1][0], rel=1e-6)
    torch.testing.assert_close(fits[0][1], fits[1][1], rtol=0, atol=0.003)


def test_the_parameters_of_a_known_map_are_found():
    margin, target, _ = bent(100_000)
    data = RowList([as_rows(columns(margin), target)])
    space, base = space_of(data), base_of(data)
    path = shrinkage_path(data, space, base, dense=False)
    fit = fit_output_map(MapLoss(data, space), path, 0.03, space.temperature_only(base.temperature), 100_000)
    scale, skew, offset = fit.free[-1], space.skew(fit.free), space.offset(fit.free)
    found = torch.stack([scale + skew, scale - skew, offset[1] - offset[0]])
    torch.testing.assert_close(found, torch.tensor(TRUTH).double(), rtol=0, atol=0.07)


@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_a_beta_map_is_found_where_there_is_one(task):
    margin, target, true = bent(12_000)
    logits = both(margin)[task]
    result = fit_clamp(IDENTITY, [(logits[:3000], target[:3000])], task=task, grids=())
    assert result.chosen.output_map == "beta"
    truth = float(F.binary_cross_entropy_with_logits(true[3000:], target[3000:].double()))
    held = nll(result.clamp, logits[3000:], target[3000:])
    plain = [one for one in result.candidates if one.output_map in ("bias", "vector")]
    assert held < truth + 0.003
    assert held < min(nll(one.clamp, logits[3000:], target[3000:]) for one in plain) - 0.005
    assert result.chosen.expected_change == pytest.approx(result.after["nll"] - result.before["nll"], abs=0.1)
    assert "; evidence for class 1 counts more than evidence for class 0" in result.reason
    assert f"skew={float(result.clamp.skew):.4g}" in repr(result.clamp)


def test_one_logit_gets_the_map_of_its_two_class_twin():
    margin, target, _ = bent(1500)
    maps = ("bias", "beta")
    one = fit_clamp(IDENTITY, [(margin, target)], task="binary", grids=(), output_maps=maps)
    two = fit_clamp(IDENTITY, [(torch.stack([0 * margin, margin], 1), target)], grids=(), output_maps=maps)
    assert one.chosen.output_map == two.chosen.output_map == "beta"
    assert one.after == pytest.approx(two.after, abs=1e-9)
    assert one.clamp.skew.shape == one.clamp.class_scale.shape == (1,)
    # The other way round, the other class.
    turned = fit_clamp(IDENTITY, [(-margin, 1 - target)], task="binary", grids=(), output_maps=maps)
    assert "evidence for class 0 counts more than evidence for class 1" in turned.reason
    torch.testing.assert_close(turned.clamp.scale(-margin), -one.clamp.scale(margin), rtol=1e-3, atol=1e-3)
    pair = two.clamp.scale(torch.stack([0 * margin, margin], 1))
    torch.testing.assert_close(one.clamp.scale(margin), pair[:, 1] - pair[:, 0])


def test_the_clamp_is_the_map_with_masked_logits_too():
    margin, target, _ = bent(2000)
    logits = both(margin)["multiclass"]
    logits[:100] = logits[:100].where(F.one_hot(target[:100], 2) == 1, -1e4)
    result = fit_clamp(IDENTITY, [(logits, target)], grids=())
    assert result.chosen.output_map == "beta"
    scaled = result.clamp.scale(logits)
    assert torch.equal(scaled[logits <= -1e4], logits[logits <= -1e4])
    assert result.after["nll"] == pytest.approx(float(F.cross_entropy(scaled, target)), rel=1e-6)
    data = rows(logits, target)
    (first, *_) = data
    assert bool((space_of(data).skewness(first.logits)[:100] == 0).all())
    # The rows that are sure say nothing, and change nothing.
    rest = fit_clamp(IDENTITY, [(logits[100:], target[100:])], grids=())
    torch.testing.assert_close(rest.clamp.skew, result.clamp.skew, rtol=0.05, atol=0.01)


def test_the_average_is_one_map():
    margin, target, _ = bent(800)
    logits = both(margin)["multiclass"]
    data = rows(logits, target)
    base, moments = base_of(data), logit_moments(data, 2)
    fits, against = [], Reference.of(data, base, 1.0, 800)
    for space in (map_space("vector", moments), beta_space(data, moments, base.temperature)):
        path = shrinkage_path(data, space, base, dense=False)
        fits += fit_path(space, path, base, against)
    mean, _ = average(fits, against, head_start=3.0)
    assert mean.space.kind == "beta"
    weights = torch.softmax(-torch.tensor([-3.0, *(one.criterion for one in fits)]).double() / 3, 0)
    maps = [fit.space.apply(logits, fit.free).diff(dim=1)[:, 0] for fit in (base, *(one.fit for one in fits))]
    mapped = mean.space.apply(logits, mean.free).diff(dim=1)[:, 0]
    torch.testing.assert_close(mapped, weights @ torch.stack(maps))


def test_more_evidence_never_counts_less():
    """Half of those that are surest of class 1 are of class 0: the best curve would come down again."""
    generator = torch.Generator().manual_seed(0)
    margin = 2.5 * torch.randn(3000, generator=generator, dtype=torch.float64)
    truth = torch.where(margin > 4, -1.0, margin)
    target = (torch.rand(3000, generator=generator).double() < truth.sigmoid()).long()
    result = fit_clamp(
        IDENTITY, [(margin, target)], task="binary", grids=(), output_maps=("beta",), uniform_share=False
    )
    mapped = result.clamp.scale(torch.linspace(-20, 20, 400).double())
    assert bool((mapped.diff() >= 0).all())


@pytest.mark.parametrize("task", ["binary", "multiclass"])
def test_calibrated_data_want_none(task):
    chosen, lost = [], []
    for seed in range(8):
        margin, target, true = bent(4000, (1, 1, 0), seed)
        logits = 2 * both(margin)[task]
        result = fit_clamp(IDENTITY, [(logits[:400], target[:400])], task=task, grids=())
        ideal = float(F.binary_cross_entropy_with_logits(true[400:], target[400:].double()))
        chosen.append(result.chosen.output_map)
        lost.append(nll(result.clamp, logits[400:], target[400:]) - ideal)
    assert chosen.count("temperature") >= 5
    assert sum(lost) / len(lost) < 0.004


@pytest.mark.parametrize(
    ("task", "asked", "fitted"),
    [
        ("multiclass", ("temperature", "vector", "matrix"), ["temperature", "vector", "beta"]),
        ("multiclass", ("vector",), ["temperature", "vector"]),
        ("multiclass", ("beta",), ["temperature", "beta"]),
        ("binary", ("temperature", "vector", "matrix"), ["temperature", "bias", "beta"]),
        ("binary", ("vector",), ["temperature", "bias"]),
        ("multilabel", ("matrix",), ["temperature", "vector"]),
    ],
)
def test_which_maps_are_fitted_with_two_classes(task, asked, fitted):
    margin, target, _ = bent(300)
    logits = both(margin)["multiclass"] if task != "binary" else margin
    target = torch.stack([target, 1 - target], 1) if task == "multilabel" else target
    result = fit_clamp(IDENTITY, [(logits, target)], task=task, grids=(), output_maps=asked)
    assert [one.output_map for one in result.candidates] == fitted


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_other_outputs_have_none_and_are_told_so(task):
    logits, target = calibrated_logits(300)
    target = target if task == "multiclass" else (torch.rand_like(logits) < logits.sigmoid()).long()
    result = fit_clamp(IDENTITY, [(logits, target)], task=task, grids=(), output_maps=("beta",))
    assert result.candidates[-1].refusal.code == "no two classes"
    assert "left out: beta because it is for two classes" in result.reason


def test_logits_that_are_not_kept_are_read_for_smaller_maps_alone():
    margin, target, _ = bent(400)
    result = fit_clamp(IDENTITY, [(margin, target)], task="binary", grids=(), cache_bytes=0)
    assert result.candidates[-1].refusal.code == "too many passes"


def test_a_class_next_to_never_seen_gets_nothing_of_its_own():
    margin, target, _ = bent(400)
    logits = columns(margin)
    data = rows(logits, target)
    space = replace(space_of(data), seen=torch.tensor([True, False]))
    free = random_point(space)
    torch.testing.assert_close(space.apply(logits, free), free[-1] * logits)
    torch.testing.assert_close(MapLoss(data, space)(free)[1][:-1], torch.zeros(5).double())


@pytest.mark.parametrize("shape", [(6, 1, 4, 4), (6, 4, 4)], ids=str)
def test_one_logit_per_pixel(shape):
    margin, target, true = bent(60 * 16)
    logits, target = margin.reshape(60, *shape[1:]), target.reshape(60, *shape[1:])
    result = fit_clamp(IDENTITY, batches(logits, target, 20), task="binary", grids=())
    assert result.chosen.output_map == "beta"
    scaled = result.clamp.scale(logits)
    assert scaled.shape == logits.shape
    after = F.binary_cross_entropy_with_logits(scaled, target.double())
    assert result.after["nll"] == pytest.approx(float(after), rel=1e-6)
    assert float(after) < float(F.binary_cross_entropy_with_logits(true, target.flatten().double())) + 0.003


def test_rows_that_repeat_each_other_count_once():
    """Pixels of one image that are all the same: the price and the ridge are those of one pixel."""
    margin, target, _ = bent(700)
    one = fit_clamp(IDENTITY, [(margin, target)], task="binary", grids=(), uniform_share=False)
    dense = [tensor[:, None, None].expand(-1, 3, 3) for tensor in (margin, target)]
    many = fit_clamp(IDENTITY, [tuple(dense)], task="binary", grids=(), uniform_share=False)
    assert many.chosen.output_map == one.chosen.output_map == "beta"
    torch.testing.assert_close(many.clamp.skew, one.clamp.skew, rtol=0.1, atol=0.02)


def test_a_grid_goes_on_from_another_map_and_gets_one():
    network, x = SmallNet(), images(2000)
    pair = network(x).detach().double()
    margin = 2 * (pair[:, 1] - pair[:, 0])
    target = sampled(columns(beta(margin, 0.3, 1.5, 0.5)))

    def shifted(inputs):
        logits = network(inputs + 0.6)
        return 2 * (logits[:, 1] - logits[:, 0])

    result = fit_clamp(shifted, batches(x, target), task="binary", grids=(1,))
    names = [one.name for one in result.candidates if one.clamp is not None]
    assert "beta" in names
    assert "1×1 grid + beta" in names
    assert result.clamp.perturbation is not None


@pytest.mark.parametrize("shape", [(7, 2), (3, 2, 4), (3, 2, 4, 5)], ids=str)
def test_a_skew_bends_the_log_odds_at_the_temperature(shape):
    logits, bias, scale = torch.randn(shape), torch.tensor([0.3, -0.1]), torch.tensor([1.2, 0.7])
    clamp = Clamp(None, 0.4, bias, scale, skew=torch.tensor(0.6))
    plain = Clamp(None, 0.4, bias, scale).scale(logits)
    added = 0.6 * (logits / math.exp(0.4)).log_softmax(1).sum(1)
    torch.testing.assert_close(clamp.scale(logits).diff(dim=1), plain.diff(dim=1) + added[:, None])
    assert not clamp.is_identity
    again = Clamp.from_state(clamp.state_dict())
    assert torch.equal(again.scale(logits), clamp.scale(logits))


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 1, 4, 4), (6, 2), (6, 4, 4)], ids=str)
def test_a_skew_of_one_logit_takes_any_layout(shape):
    logits = 3 * torch.randn(shape)
    clamp = Clamp(None, 0.4, torch.tensor([0.2]), torch.tensor([1.1]), skew=torch.tensor([0.6]))
    scaled = logits / math.exp(0.4)
    expected = 1.1 * scaled + 0.2 + 0.6 * (F.logsigmoid(scaled) + F.logsigmoid(-scaled))
    torch.testing.assert_close(clamp.scale(logits), expected)


def test_a_skew_leaves_what_is_masked_and_what_it_is_masked_for():
    clamp = Clamp(None, 1.0, torch.tensor([0.2, 0.0]), skew=torch.tensor(0.6))
    logits = torch.tensor([[2.0, -torch.inf], [-1e4, 1.0], [0.5, 0.4]])
    scaled = clamp.scale(logits)
    assert torch.equal(scaled[logits <= -1e4], logits[logits <= -1e4])
    torch.testing.assert_close(scaled[0, 0], 2 / torch.tensor(1.0).exp() + 0.2)
    torch.testing.assert_close(clamp.scale(torch.tensor([-torch.inf, 1.0])[None])[0, 0], -torch.tensor(torch.inf))


def test_a_skew_is_one_number():
    with pytest.raises(ValueError, match="`skew` must be one number, got tensor"):
        Clamp(skew=torch.zeros(2))
