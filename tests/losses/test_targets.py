"""Targets that are probabilities (mixup, CutMix), and weights of classes."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from lightning_clamp import losses
from tests.scenarios import LOSSES, drawn, formula_batch, formula_network, value_and_gradient

# Those that need to know which label is right.
HARD = ("cpc_loss", "crl_loss", "mmce_loss")
SOFT = {name: loss for name, loss in LOSSES.items() if name not in HARD}
every_soft_loss = pytest.mark.parametrize("loss", SOFT.values(), ids=SOFT)
# One number per label is averaged: not those that square the target, or the mean of it.
LINEAR = {name: loss for name, loss in SOFT.items() if name not in ("brier_loss", "mdca_loss", "dca_loss")}
WEIGHTED = {name: loss for name, loss in LOSSES.items() if name != "brier_loss"}
every_weighted_loss = pytest.mark.parametrize("loss", WEIGHTED.values(), ids=WEIGHTED)


def one_hot(target: Tensor, classes: int) -> Tensor:
    return F.one_hot(target, classes).movedim(-1, 1).double()


def mixed(*shape: int) -> tuple[Tensor, Tensor]:
    """Logits, and the target of mixup with a little smoothing."""
    logits, target = drawn(*shape)
    return logits, 0.6 * one_hot(target, shape[1]) + 0.3 * one_hot(target.flip(0), shape[1]) + 0.1 / shape[1]


@every_soft_loss
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(9, 4), (2, 4, 3, 5)], ids=["classes", "dense"])
def test_sure_probabilities_are_labels(loss, shape, reduction):
    logits, target = drawn(*shape)
    value, gradient = value_and_gradient(loss, logits, target, reduction=reduction)
    soft, slopes = value_and_gradient(loss, logits, one_hot(target, 4), reduction=reduction)
    assert soft.shape == value.shape
    torch.testing.assert_close(soft, value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slopes, gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LINEAR)
def test_the_loss_of_a_mixture_is_the_mixture_of_losses(name):
    logits, target = mixed(6, 4)
    # Equal logits are next to each other in dual focal's order, and count as one.
    logits[0, 1] = logits[0, 2]
    each = [LINEAR[name](logits, torch.full((6,), label), reduction="none") for label in range(4)]
    expected = (target * torch.stack(each, 1)).sum(1)
    torch.testing.assert_close(LINEAR[name](logits, target, reduction="none"), expected)


def test_the_others_are_their_formulas():
    logits, target = mixed(7, 4)
    z, y = logits.numpy(), target.numpy()
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    cross_entropy = -(y * np.log(p)).sum(1).mean()
    assert losses.brier_loss(logits, target).item() == pytest.approx(((p - y) ** 2).sum(1).mean())
    gap = np.abs(p.mean(0) - y.mean(0)).mean()
    assert losses.mdca_loss(logits, target, beta=2).item() == pytest.approx(cross_entropy + 2 * gap)
    gap = abs(p.max(1).mean() - y[range(7), p.argmax(1)].mean())
    assert losses.dca_loss(logits, target, beta=2).item() == pytest.approx(cross_entropy + 2 * gap)
    focal = (y * (1 - p) ** 2 * -np.log(p)).sum(1).mean()
    assert losses.focal_loss(logits, target, gamma=2).item() == pytest.approx(focal)
    # An exponent of the bin of each label's own probability.
    gamma = np.where(p < 0.3, 2.0, -1.0)
    adafocal = (y * (1 - np.sign(gamma) * p) ** abs(gamma) * -np.log(p)).sum(1)
    log_terms: dict[str, Tensor] = {}
    options = {"gamma": torch.tensor([2.0, -1.0]), "edges": torch.tensor([0.3]), "log_terms": log_terms}
    assert losses.adafocal_loss(logits, target, **options).item() == pytest.approx(adafocal.mean())
    assert log_terms["gamma"] == pytest.approx((y * gamma).sum(1).mean())


@pytest.mark.parametrize("name", [name for name in SOFT if name != "acls_loss"])
def test_gradients_are_those_of_the_values(name):
    logits, target = mixed(3, 4, 2)
    assert torch.autograd.gradcheck(lambda z: SOFT[name](z, target, reduction="none"), logits.requires_grad_())


@pytest.mark.parametrize("name", sorted({*LOSSES} - {"acls_loss", "cpc_loss", "mmce_loss"}))
def test_gradients_may_be_differentiated_again(name):
    for (logits, target), options in ((mixed(3, 4), {}), (drawn(3, 4), {}), (drawn(3, 4), {"ignore_index": 1})):
        if name in SOFT or not target.is_floating_point():
            assert torch.autograd.gradgradcheck(
                lambda z, y=target, o=options: LOSSES[name](z, y, **o), logits.requires_grad_()
            )


@pytest.mark.parametrize("name", ["acls_loss", "cpc_loss", "mmce_loss"])
def test_the_others_say_that_theirs_may_not(name):
    logits, target = drawn(3, 4)
    value = LOSSES[name](logits.requires_grad_(), target)
    with pytest.raises(RuntimeError, match=f"{name} cannot be differentiated twice: leave create_graph out"):
        torch.autograd.grad(value, logits, create_graph=True)


@pytest.mark.parametrize("mix", [v2.MixUp, v2.CutMix])
@every_soft_loss
def test_targets_of_torchvision_are_taken(loss, mix):
    torch.manual_seed(0)
    _, target = mix(num_classes=5)(torch.rand(8, 3, 4, 4), torch.arange(8) % 5)
    logits = drawn(8, 5)[0].float()
    for dtype in (torch.float32, torch.bfloat16):
        value, gradient = value_and_gradient(loss, logits.to(dtype), target.to(dtype))
        assert value.dtype == torch.float32
        assert value.isfinite()
        assert gradient.isfinite().all()


@every_soft_loss
def test_the_probability_of_1_is_a_binary_target(loss):
    logit, target = drawn(12, 1)[0][:, 0], torch.linspace(0, 1, 12).double()
    pair, both = torch.stack([-logit / 2, logit / 2], 1), torch.stack([1 - target, target], 1)
    torch.testing.assert_close(loss(logit, target, task="binary"), loss(pair, both))
    marked = target.clone()
    marked[3] = 255
    spoiled = logit.clone()
    spoiled[3] = torch.nan
    keep = torch.arange(12) != 3
    value, gradient = value_and_gradient(loss, spoiled, marked, task="binary", ignore_index=255)
    torch.testing.assert_close(value, loss(logit[keep], target[keep], task="binary"))
    assert gradient[3] == 0
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    "name", [name for name in SOFT if name not in ("acls_loss", "cals_loss", "mbls_loss", "label_smoothing_loss")]
)
def test_a_masked_class_has_no_part(name):
    logits, target = drawn(6, 4)
    masked = logits.index_fill(1, torch.tensor([3]), -torch.inf)
    value, gradient = value_and_gradient(SOFT[name], masked, one_hot(target % 3, 4))
    torch.testing.assert_close(value, SOFT[name](masked, target % 3))
    assert gradient.isfinite().all()
    assert not gradient[:, 3].any()


@every_weighted_loss
@pytest.mark.parametrize("soft", [False, True])
def test_weights_act_on_the_cross_entropy_as_torch_has_it(loss, soft):
    logits, target = mixed(9, 4) if soft and loss.func.__name__ not in HARD else drawn(9, 4)
    weight = torch.tensor([0.5, 2.0, 0.0, 1.0])
    log_terms: dict[str, Tensor] = {}
    loss(logits, target, weight=weight, log_terms=log_terms)
    expected = F.cross_entropy(logits, target, weight.double())
    assert log_terms["cross_entropy"] == pytest.approx(expected.item())
    torch.testing.assert_close(loss(logits, target, weight=torch.ones(4)), loss(logits, target))
    rows = loss(logits, target, weight=weight, reduction="none")
    torch.testing.assert_close(loss(logits, target, weight=weight, reduction="sum"), rows.sum())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weighted_losses_without_their_penalties_are_torchs(reduction):
    weight = torch.tensor([0.5, 2.0, 0.0, 1.0]).double()
    nothing = {"acls_loss": {"alpha": 0}, "mbls_loss": {"alpha": 0}, "entropy_penalty_loss": {"alpha": 0}}
    nothing |= {"mdca_loss": {"beta": 0}, "dca_loss": {"beta": 0}, "mmce_loss": {"lambda_": 0}}
    nothing |= {"focal_loss": {"gamma": 0}, "dual_focal_loss": {"gamma": 0}, "adafocal_loss": {"gamma": 0}}
    nothing |= {"cpc_loss": {"lambda_bdc": 0, "lambda_bec": 0}, "crl_loss": {}}
    nothing |= {"cals_loss": {"multiplier": 0, "margin": 1e3}}
    assert nothing.keys() == WEIGHTED.keys() - {"flsd_loss", "label_smoothing_loss"}
    for logits, target in (drawn(9, 4), mixed(9, 4), drawn(2, 4, 3), mixed(2, 4, 3)):
        expected = F.cross_entropy(logits, target, weight, reduction=reduction)
        for name, options in nothing.items():
            if name in SOFT or not target.is_floating_point():
                value = WEIGHTED[name](logits, target, weight=weight, reduction=reduction, **options)
                torch.testing.assert_close(value, expected)
        smoothed = losses.label_smoothing_loss(logits, target, alpha=0.1, weight=weight, reduction=reduction)
        theirs = F.cross_entropy(logits, target, weight, label_smoothing=0.1, reduction=reduction)
        torch.testing.assert_close(smoothed, theirs)
        if not target.is_floating_point():
            marked = target.masked_fill(target == 1, -100)
            ignoring = losses.mbls_loss(logits, marked, alpha=0, weight=weight, reduction=reduction, ignore_index=-100)
            torch.testing.assert_close(ignoring, F.cross_entropy(logits, marked, weight, reduction=reduction))
    assert losses.focal_loss(drawn(3, 4)[0], torch.full((3,), 2), weight=weight) == 0


def test_the_penalty_is_not_weighted():
    logits, target = drawn(9, 4)
    weight = torch.tensor([0.5, 2.0, 0.0, 1.0]).double()
    penalty = losses.mbls_loss(logits, target, margin=1) - F.cross_entropy(logits, target)
    weighted = losses.mbls_loss(logits, target, margin=1, weight=weight)
    torch.testing.assert_close(weighted - F.cross_entropy(logits, target, weight), penalty)


def test_a_gap_of_the_batch_counts_at_every_position_that_does():
    logits, target = drawn(9, 4)
    marked = target.masked_fill(target == 2, -100)
    plain = {"ignore_index": -100, "reduction": "sum"}
    for loss, option in ((losses.mdca_loss, "beta"), (losses.dca_loss, "beta"), (losses.mmce_loss, "lambda_")):
        log_terms: dict[str, Tensor] = {}
        loss(logits, marked, ignore_index=-100, log_terms=log_terms)
        without = loss(logits, marked, **plain, **{option: 0})
        added = loss(logits, marked, **plain, **{option: 2}) - without
        torch.testing.assert_close(added, 2 * log_terms["regularizer"] * (marked >= 0).sum())


X, P = torch.zeros(3, 4), torch.full((3, 4), 0.25)
BAD = {
    "several labels": ((X, torch.ones(3, 4)), {}, "must sum to 1 over the classes, got 4: for several labels per item"),
    "nothing": ((X, X), {}, "must sum to 1 over the classes, got 0"),
    "nan": ((X, P * torch.nan), {}, "must sum to 1 over the classes, got nan"),
    "negative": ((X, P + torch.tensor([-0.5, 0.5, 0, 0])), {}, "must not be negative, got -0.25"),
    "other classes": ((X, P[:, :3]), {}, r"must have the shape of the logits, \(3, 4\), got \(3, 3\)"),
    "classes last": ((torch.zeros(2, 3, 4, 4), torch.ones(2, 4, 4, 3) / 3), {}, r": use target.movedim\(-1, 1\)"),
    "ignored": ((X, P), {"ignore_index": 255}, "leave `ignore_index` out"),
}


@pytest.mark.parametrize("case", BAD)
@every_soft_loss
def test_what_is_no_probability_gets_one_sentence(loss, case):
    tensors, options, sentence = BAD[case]
    with pytest.raises(ValueError, match=sentence):
        loss(*tensors, **options)


def test_losses_of_labels_say_why_and_what_to_do():
    with pytest.raises(ValueError, match="neither right nor wrong: pass labels, or train with mdca_loss"):
        losses.mmce_loss(X, P)
    with pytest.raises(ValueError, match="neither right nor wrong"):
        losses.mmce_loss(X[:, 0], P[:, 0], task="binary")
    with pytest.raises(ValueError, match="names none: pass labels, or train with mbls_loss"):
        losses.cpc_loss(X, P)
    with pytest.raises(ValueError, match="neither right nor wrong of a target of probabilities: pass labels"):
        losses.crl_loss(X, P)
    with pytest.raises(ValueError, match="perturbs labels that are 0 or 1, and was given one between"):
        losses.sc_bce_loss(X[:, 0], P[:, 0])
    network = formula_network()
    inputs, target = formula_batch(network)
    with pytest.raises(ValueError, match="names none: pass labels, or train with acls_loss or mbls_loss"):
        losses.margin_aware_loss(network, inputs, one_hot(target, 5), clip=None)
