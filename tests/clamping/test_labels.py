"""Several labels per item: derivatives, what a label costs, known answers, and honest promises."""

import warnings

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from lightning_clamp import fit_clamp
from lightning_clamp._rows import as_rows
from lightning_clamp.clamping.label_path import LabelPath
from lightning_clamp.clamping.labels import LabelSpace, label_moments, label_space
from lightning_clamp.clamping.map_loss import MapLoss, map_derivatives
from tests.scenarios import RowList

IDENTITY = torch.nn.Identity()
KINDS = ["bias", "vector"]


def drawn(n: int, n_labels: int, *, seed: int = 0, shared: float = 0.0) -> tuple[Tensor, Tensor]:
    """True logits, and labels drawn from them; ``shared`` is the correlation of what decides an item's labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, n_labels, generator=generator, dtype=torch.float64) - 1
    common, own = torch.randn(n, 1, generator=generator), torch.randn(n, n_labels, generator=generator)
    u = torch.special.ndtr((shared**0.5 * common + (1 - shared) ** 0.5 * own).double())
    return logits, (u < logits.sigmoid()).float()


def rows_of(logits: Tensor, target: Tensor, **options) -> RowList:
    parts = zip(logits.split(40), target.split(40), strict=True)
    return RowList(as_rows(a.double(), b, task="multilabel", **options).doubled() for a, b in parts)


def space_and_point(kind: str, rows: RowList, n_labels: int) -> tuple[LabelSpace, Tensor]:
    space = label_space(kind, label_moments(rows, n_labels), 1.2)
    noise = torch.randn(len(space.weight), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return space, space.temperature_only(1.5) + 0.2 * noise


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_are_those_of_the_formula(kind):
    logits, target = drawn(100, 3)
    target[:, 1] = 0  # stays at the temperature alone
    rows = rows_of(logits, target)
    space, free = space_and_point(kind, rows, 3)
    centre = logits.mean(0)

    def losses(free):
        own = free[:3] if kind == "vector" else torch.zeros(3)
        mapped = free[-1] * logits + own * (logits - centre) + free[-5:-2] + free[-2]
        mapped = torch.stack([mapped[:, 0], logits[:, 1] / 1.2, mapped[:, 2]], 1)
        return F.binary_cross_entropy_with_logits(mapped, target.double(), reduction="none").sum(1)

    loss, gradient = MapLoss(rows, space)(free)
    scores = torch.autograd.functional.jacobian(losses, free)
    assert loss == pytest.approx(float(losses(free).sum()))
    torch.testing.assert_close(gradient, scores.sum(0))
    sums = map_derivatives(rows, space, free, dense=True)
    torch.testing.assert_close(sums.covariance, scores.T @ scores)
    torch.testing.assert_close(sums.curvature, torch.autograd.functional.hessian(lambda f: losses(f).sum(), free))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_invert_the_whole_curvature(kind):
    logits, target = drawn(200, 4)
    rows = rows_of(logits, target)
    space, free = space_and_point(kind, rows, 4)
    whole = map_derivatives(rows, space, free, dense=False).curvature + (3 * space.weight).diag()
    gradient = torch.linspace(-1, 1, len(free)).double()
    path = LabelPath(rows, space, free)
    torch.testing.assert_close(path.solve(3, gradient), torch.linalg.solve(whole, gradient))
    torch.testing.assert_close(path.renewed(rows, space, free, 3)(gradient), path.solve(3, gradient))


def test_free_labels_cost_a_parameter_each_and_what_they_share_what_items_say():
    logits, target = drawn(4000, 5, shared=0.8)
    rows = rows_of(logits, target)
    space = label_space("vector", label_moments(rows, 5))
    path = LabelPath(rows, space, space.temperature_only(1.0))
    assert path.effective_parameters(1e-3) == pytest.approx(10, abs=0.1)
    # The common bias alone, of labels that often agree.
    shared = map_derivatives(rows, space, space.temperature_only(1.0), dense=True)
    common = [part[-2:, -2:] for part in (shared.curvature, shared.covariance)]
    strict = float(torch.linalg.solve(*common).trace())
    assert strict > 3
    assert path.effective_parameters(1e9) == pytest.approx(strict, rel=0.02)
    independent = rows_of(*drawn(4000, 5))
    assert LabelPath(independent, space, space.temperature_only(1.0)).effective_parameters(1e9) == pytest.approx(
        2, abs=0.15
    )


def distorted(n: int, **options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits that need another scale and bias for each label, labels, and these scales and biases."""
    logits, target = drawn(n, 6, **options)
    scale, bias = torch.linspace(0.4, 1.4, 6).double(), torch.linspace(-1, 0.5, 6).double()
    return (logits - bias) / scale, target, scale, bias


def test_each_label_gets_its_own_temperature_and_bias():
    z, target, scale, bias = distorted(2000)
    clamp = fit_clamp(IDENTITY, [(z, target)], task="multilabel", grids=()).clamp
    torch.testing.assert_close(clamp.class_scale / clamp.temperature, scale, rtol=0.15, atol=0)
    torch.testing.assert_close(clamp.class_bias, bias, rtol=0, atol=0.2)
    torch.testing.assert_close(clamp.scale(z), z * clamp.class_scale / clamp.temperature + clamp.class_bias)


def test_a_bias_that_all_labels_have_is_that_of_rare_ones_too():
    """As of a loss that weighs positives: three positives are no evidence of an exception."""
    logits, target = drawn(1000, 8)
    target[:, 7], logits[:, 7] = 0, -6
    target[[1, 2, 3], 7] = 1
    z = 1.5 * logits + 2
    result = fit_clamp(IDENTITY, [(z, target)], task="multilabel", grids=())
    torch.testing.assert_close(result.clamp.scale(z)[:, 7].mean(), torch.tensor(-6.0).double(), rtol=0, atol=0.5)
    assert result.candidates[-1].effective_parameters < 8


@pytest.mark.parametrize("value", [0, 1])
def test_a_label_that_is_never_or_always_there_keeps_the_common_map_and_is_named(value):
    logits, target = drawn(1000, 4)
    z = 2 * logits * torch.tensor([1.0, 1.4, 1.0, 0.7]) + torch.tensor([1.0, -1.0, 0.0, 0.0])
    target[:, 2] = value
    with pytest.warns(UserWarning, match="no samples with or none without label 2, or next to none"):
        result = fit_clamp(IDENTITY, [(z, target)], task="multilabel", grids=())
    assert result.chosen.output_map == "vector"
    assert float(result.clamp.class_scale[2]) == pytest.approx(1, abs=1e-6)
    others = [0, 1, 3]
    alone = fit_clamp(IDENTITY, [(z[:, others], target[:, others])], task="multilabel", grids=())
    torch.testing.assert_close(result.clamp.scale(z)[:, others], alone.clamp.scale(z[:, others]), rtol=0.02, atol=0.02)
    assert abs(float(result.clamp.class_bias[2])) < 0.2


def test_labels_that_are_not_known_take_no_part():
    z, target, *_ = distorted(500)
    unknown = torch.rand(target.shape, generator=torch.Generator().manual_seed(5)) < 0.3
    kept = fit_clamp(IDENTITY, [(z, target.where(~unknown, -1))], task="multilabel", ignore_index=-1, grids=())
    noise = z.where(~unknown, 50.0)
    again = fit_clamp(IDENTITY, [(noise, target.where(~unknown, -1))], task="multilabel", ignore_index=-1, grids=())
    for name, value in kept.clamp.state_dict().items():
        torch.testing.assert_close(again.clamp.state_dict()[name], value)
    assert dict(again.before) == dict(kept.before)


def test_labels_of_every_pixel_are_charged_by_image():
    z, target, *_ = distorted(400)
    images = z.repeat_interleave(4, 0).reshape(400, 2, 2, 6).movedim(-1, 1)
    labels = target.repeat_interleave(4, 0).reshape(400, 2, 2, 6).movedim(-1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dense = fit_clamp(IDENTITY, [(images, labels)], task="multilabel", grids=())
        alone = fit_clamp(IDENTITY, [(z, target)], task="multilabel", grids=())
    assert dense.clamp.scale(images).shape == images.shape
    torch.testing.assert_close(dense.clamp.scale(images)[:, :, 0, 0], alone.clamp.scale(z), rtol=0.05, atol=0.1)
    ours, theirs = dense.candidates[-1], alone.candidates[-1]
    assert ours.effective_parameters / 4 == pytest.approx(theirs.effective_parameters, rel=0.15)
    assert ours.expected_change == pytest.approx(theirs.expected_change, rel=0.1)


@pytest.mark.slow
def test_the_expected_change_is_that_of_new_data_though_labels_are_correlated():
    gaps, errors = [], []
    for seed in range(5):
        logits, target = drawn(3300, 6, seed=seed, shared=0.5)
        z = 1.5 * (logits + torch.linspace(-0.6, 0.6, 6))
        candidates = fit_clamp(IDENTITY, [(z[:300], target[:300])], task="multilabel", grids=()).candidates
        held = [
            F.binary_cross_entropy_with_logits(one.clamp.scale(z[300:]), target[300:].double()) for one in candidates
        ]
        gaps.append(float(held[-1] - held[0]) - candidates[-1].expected_change + candidates[0].expected_change)
        errors.append(candidates[-1].standard_error)
    gap, error = torch.tensor(gaps), torch.tensor(errors).mean()
    assert abs(float(gap.mean())) < float(error)
    assert float((gap**2).mean().sqrt()) < 1.5 * float(error)


def tagged_digits() -> tuple[Tensor, Tensor]:
    """Logits of an over-trained network for what is true of a digit, and whether it is; held-out images."""
    images, digits = load_digits(return_X_y=True)
    true_of = [(0, 2, 4, 6, 8), (5, 6, 7, 8, 9), (2, 3, 5, 7), (0, 6, 8, 9), (8,), (0, 1, 4, 9), (1, 4, 7), (3, 6, 9)]
    target = torch.stack([torch.isin(torch.tensor(digits), torch.tensor(those)) for those in true_of], 1).float()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(target), generator=generator)
    x, target = (
        (torch.tensor(images / 16).float() + 0.5 * torch.randn(images.shape, generator=generator))[order],
        target[order],
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(25):
        for part in range(0, 500, 50):
            optimizer.zero_grad()
            logits = network(x[part : part + 50])
            F.binary_cross_entropy_with_logits(
                logits, target[part : part + 50], pos_weight=torch.tensor(3.0)
            ).backward()
            optimizer.step()
    with torch.no_grad():
        return network(x[500:]).double(), target[500:]


@pytest.mark.slow
def test_labels_of_digits_are_better_off_together():
    z, target = tagged_digits()
    n = 400

    def held_out(clamps):
        mapped = torch.cat([clamp.scale(z[n:, one]) for clamp, one in clamps], 1)
        return float(F.binary_cross_entropy_with_logits(mapped, target[n:].double()))

    def fitted(one=slice(None), **options):
        return fit_clamp(IDENTITY, [(z[:n, one], target[:n, one])], **options).clamp, one

    together = held_out([fitted(task="multilabel", grids=())])
    temperature = held_out([fitted(task="multilabel", method="temperature")])
    one_map = held_out([fitted(task="binary", grids=(), uniform_share=False)])
    each = held_out([fitted(slice(k, k + 1), task="binary", grids=(), uniform_share=False) for k in range(8)])
    assert together < min(temperature, one_map, each)
    assert temperature - together > 0.003


def test_what_is_not_known_has_to_be_said():
    z, target, *_ = distorted(50)
    target[3, 2] = -1
    with pytest.raises(ValueError, match=r"has the target -1, and each of several labels is 0 or 1: .*ignore_index=-1"):
        fit_clamp(IDENTITY, [(z, target)], task="multilabel", grids=())
    with pytest.raises(ValueError, match="logits of 3 labels for one batch and 6 for another"):
        fit_clamp(IDENTITY, [(z[:3], target[:3]), (z[4:, :3], target[4:, :3])], task="multilabel", grids=())


def test_a_label_that_says_the_opposite_is_turned_round():
    z, target, scale, _ = distorted(1000)
    z[:, 4] *= -1
    clamp = fit_clamp(IDENTITY, [(z, target)], task="multilabel", grids=()).clamp
    assert (clamp.class_scale > 0).tolist() == [True, True, True, True, False, True]
    assert float(clamp.class_scale[4] / clamp.temperature) == pytest.approx(-float(scale[4]), rel=0.25)
    opposite = fit_clamp(IDENTITY, [(-z, target)], task="multilabel", grids=()).clamp
    assert (opposite.class_scale < 0).tolist() == [True, True, True, True, False, True]


def test_masked_labels_stay_masked():
    z, target, *_ = distorted(500)
    absent = torch.arange(500) < 100
    z[absent, 2], target[absent, 2] = -torch.inf, 0
    clamp = fit_clamp(IDENTITY, [(z, target)], task="multilabel", grids=()).clamp
    assert clamp.class_bias is not None
    assert bool((clamp.scale(z)[absent, 2] == -torch.inf).all())
