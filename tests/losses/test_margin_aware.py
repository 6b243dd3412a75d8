"""CalMO: the formula's numbers, the attack in image units, the network left as it was."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_clamp.losses import margin_aware_loss
from lightning_clamp.losses.attack import Attack
from lightning_clamp.metrics import exponential_margin_tail
from tests import references as ref
from tests.scenarios import Attending, formula_batch, formula_network

FORMULA = ref.OFFICIAL_LOSSES["calmo"]


def test_values_and_gradients_are_those_of_the_formula():
    network = formula_network()
    log_terms: dict[str, Tensor] = {}
    loss = margin_aware_loss(network, *formula_batch(network), clip=None, log_terms=log_terms)
    assert loss.item() == pytest.approx(FORMULA["total"], rel=1e-12)
    for part, name in (("cross_entropy", "ce"), ("divergence", "kl"), ("smoothness", "smooth")):
        assert log_terms[part].item() == pytest.approx(FORMULA[name], rel=1e-12)
    loss.backward()
    conv, linear = network[0].weight.grad, network[4].weight.grad
    assert linear.norm() == pytest.approx(FORMULA["total_grad_fc_norm"], rel=1e-9)
    assert conv.norm() == pytest.approx(FORMULA["total_grad_conv_norm"], rel=1e-9)
    assert linear.flatten()[:4].tolist() == pytest.approx(FORMULA["total_grad_fc_first4"], rel=1e-9)


def test_each_regularizer_alone():
    network = formula_network()
    inputs, target = formula_batch(network)
    ce = FORMULA["ce"]
    flat = margin_aware_loss(network, inputs, target, lambda_r=0, lambda_s=1, clip=None)
    (gradient,) = torch.autograd.grad(flat - F.cross_entropy(network(inputs), target), network[0].weight)
    assert flat.item() == pytest.approx(ce + FORMULA["smooth"], rel=1e-12)
    assert gradient.norm() == pytest.approx(FORMULA["smooth_grad_conv_norm"], rel=1e-9)
    robust = margin_aware_loss(network, inputs, target, lambda_r=1, lambda_s=0, clip=None)
    (gradient,) = torch.autograd.grad(robust - F.cross_entropy(network(inputs), target), network[4].weight)
    assert robust.item() == pytest.approx(ce + FORMULA["kl"], rel=1e-12)
    # Gradients flow through p(x): detached, this would be .0202.
    assert gradient.norm() == pytest.approx(FORMULA["kl_grad_fc_norm"], rel=1e-9)


def test_six_steps_reach_the_ball_and_stay_inside():
    network = formula_network()
    inputs, target = formula_batch(network)
    log_terms: dict[str, Tensor] = {}
    margin_aware_loss(network, inputs, target, steps=6, clip=None, log_terms=log_terms)
    assert log_terms["divergence"].item() == pytest.approx(FORMULA["pgd6_projection_binding"]["kl"], rel=1e-12)


def test_per_item_losses_and_diagnostics():
    network = formula_network()
    inputs, target = formula_batch(network)
    log_terms: dict[str, Tensor] = {}
    rows = margin_aware_loss(network, inputs, target, clip=None, reduction="none", log_terms=log_terms)
    assert rows.shape == target.shape
    assert rows.mean().item() == pytest.approx(FORMULA["total"], rel=1e-12)
    assert log_terms["margin_tail"] == pytest.approx(exponential_margin_tail(network(inputs), target).item())
    assert log_terms["robust_margin"] < log_terms["margin"]
    assert log_terms["robust_margin_tail"] > log_terms["margin_tail"]


def attack(**options) -> Attack:
    return Attack(**{
        "epsilon": 8 / 255, "step_size": 2 / 255, "steps": 3, "norm": "linf", "mean": 0.0, "std": 1.0,
        "clip": (0.0, 1.0), "mode": "eval", **options,
    })  # fmt: skip


def test_the_radius_is_one_of_images_whatever_the_normalisation():
    images = torch.rand(6, 3, 4, 4, dtype=torch.float64)
    weight = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    shape = (3, 1, 1)
    m, s = (torch.tensor(value, dtype=torch.float64).reshape(shape) for value in (mean, std))
    for norm in ("linf", "l2"):
        plain = attack(norm=norm, step_size=0.03)(lambda x: (weight * x).sum(), images)
        moved = attack(norm=norm, step_size=0.03, mean=mean, std=std)(
            lambda x: (weight * (x * s + m)).sum(), (images - m) / s
        )
        torch.testing.assert_close(moved * s + m, plain)
        assert plain.min() >= 0
        assert plain.max() <= 1
        shift = (plain - images).abs()
        assert (shift.amax() if norm == "linf" else shift.flatten(1).norm(dim=1).amax()) <= 8 / 255 + 1e-12
        assert not moved.requires_grad


def test_a_single_channel_may_have_numbers_for_its_normalisation():
    images = torch.rand(3, 1, 4, 4)
    moved = attack(mean=0.5, std=[0.25])(lambda x: x.sum(), (images - 0.5) / 0.25)
    torch.testing.assert_close(moved * 0.25 + 0.5, (images + 6 / 255).clamp_max(1))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"epsilon": -1}, "`epsilon` must be at least 0"),
        ({"norm": "l1"}, r"`norm` must be one of \('linf', 'l2'\), got 'l1'"),
        ({"attack_mode": "test"}, "`attack_mode`"),
        ({"std": (1.0, 0.0, 1.0)}, "`std` must be positive"),
        ({"mean": (0.1, 0.2)}, "no axis 1 of 2 channels"),
        ({"mean": "text"}, "`mean` must be a finite number, or one for each channel, got 'text'"),
        ({"mean": None}, "`mean` must be a finite number"),
        ({"std": ("1", "1", "1")}, "`std` must be a finite number"),
        ({"std": float("nan")}, "`std` must be a finite number"),
        ({"clip": "01"}, "`clip` must be two numbers"),
        ({"clip": 1}, "`clip` must be two numbers"),
        ({"steps": 1.5}, "`steps` must be a whole number of at least 0, got 1.5"),
        ({"lambda_s": -1}, "`lambda_s`"),
        (
            {},
            r"Inputs of the range \[-1, 1\] lie outside clip=\(0, 1\): pass the `mean` and `std` of your normalisation",
        ),
    ],
)
def test_mistakes_get_one_sentence(options, sentence):
    network = formula_network()
    with pytest.raises(ValueError, match=sentence):
        margin_aware_loss(network, *formula_batch(network), **options)


def test_inference_mode_is_refused_and_no_grad_is_not():
    network = formula_network()
    inputs, target = formula_batch(network)
    with torch.no_grad():
        loss = margin_aware_loss(network, inputs, target, clip=None)
    assert loss.item() == pytest.approx(FORMULA["total"], rel=1e-12)
    assert not loss.requires_grad
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference mode has none"):
        margin_aware_loss(network, inputs, target, clip=None)


class Smooth(nn.Module):
    """A network with batch normalisation and dropout whose curvature is known to be smooth."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, classes)).double()
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_gradients_in_the_weights_are_those_of_the_value():
    network = Smooth().eval()
    inputs, target = torch.rand(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    names, values = zip(*network.named_parameters(), strict=True)

    # λ_r holds its moved inputs still, and they do not move: signs of gradients are constant nearby.
    def loss(*weights: Tensor) -> Tensor:
        state = dict(zip(names, weights, strict=True))
        return margin_aware_loss(
            lambda x: torch.func.functional_call(network, state, (x,)), inputs, target, lambda_s=0.3, clip=None
        )

    assert torch.autograd.gradcheck(loss, tuple(value.detach().requires_grad_() for value in values))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_modes_come_back_and_the_attack_moves_statistics_only_in_train_mode(mode):
    network = Smooth().train()
    network.net[2].eval()
    before = {name: module.training for name, module in network.named_modules()}
    inputs, target = torch.rand(8, 4, dtype=torch.float64), torch.arange(8) % 3
    margin_aware_loss(network, inputs, target, attack_mode=mode, clip=None)
    assert {name: module.training for name, module in network.named_modules()} == before
    # The clean and the moved batch are seen in the network's own mode.
    assert int(network.net[1].num_batches_tracked) == 2 + (3 if mode == "train" else 0)


def test_normalised_images_in_half_precision_are_within_their_range():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    m, s = (torch.tensor(value).reshape(3, 1, 1) for value in (mean, std))
    images = torch.rand(4, 3, 6, 6).round(decimals=1)
    for dtype in (torch.float16, torch.bfloat16):
        inputs = ((images - m) / s).to(dtype)
        moved = attack(mean=mean, std=std)(lambda x: -x.float().sum(), inputs)
        assert moved.dtype == dtype
        shift = (moved.float() - inputs.float()) * s
        # Three steps of 2/255 down, to the rounding of the dtype, and not below black.
        expected = torch.maximum(-6 / 255 * torch.ones_like(shift), -images)
        torch.testing.assert_close(shift, expected, atol=0.5 * torch.finfo(dtype).eps, rtol=0)


def test_networks_with_attention_are_differentiated_twice():
    torch.manual_seed(0)
    network = Attending()
    inputs, target = torch.rand(5, 4, 8), torch.tensor([0, 1, 2, 0, 1])
    margin_aware_loss(network, inputs, target, clip=None).backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_the_smoothness_of_large_images_does_not_underflow():
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, 3, padding=1))
    images, target = torch.rand(1, 1, 512, 512), torch.ones(1, 512, 512)
    found = {}
    for dtype in (torch.float32, torch.float16):
        log_terms: dict[str, Tensor] = {}
        with torch.autocast("cpu", dtype, enabled=dtype == torch.float16):
            margin_aware_loss(conv, images, target, lambda_r=0, task="binary", log_terms=log_terms)
        found[dtype] = log_terms["smoothness"].item()
    assert found[torch.float16] == pytest.approx(found[torch.float32], rel=0.01)


def test_images_of_integers_are_refused():
    with pytest.raises(TypeError, match="Inputs must be float to be moved, got"):
        margin_aware_loss(formula_network(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2).long())


def test_modes_come_back_after_an_error():
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("broken")

    network = Failing().train()
    with pytest.raises(RuntimeError, match="broken"):
        margin_aware_loss(network, torch.rand(2, 3), torch.zeros(2, dtype=torch.long))
    assert network.training


def test_dense_outputs_and_one_logit():
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(1, 1, 3, padding=1).double()
    images = torch.rand(3, 1, 5, 5, generator=generator, dtype=torch.float64)
    target = torch.randint(2, (3, 5, 5), generator=generator)
    marked = target.clone()
    marked[0, :2] = 255
    log_terms: dict[str, Tensor] = {}
    loss = margin_aware_loss(conv, images, marked, task="binary", ignore_index=255, lambda_s=0.5, log_terms=log_terms)
    images.requires_grad_()
    sign = 2.0 * target - 1
    keep = marked != 255
    margin = ((sign * conv(images)[:, 0] * keep).sum((1, 2)) / keep.sum((1, 2))).sum()
    (gradient,) = torch.autograd.grad(margin, images)
    per_item = gradient.square().sum((1, 2, 3))
    expected = (per_item * keep.sum((1, 2))).sum() / keep.sum()
    assert log_terms["smoothness"] == pytest.approx(expected.item())
    assert log_terms["cross_entropy"] == pytest.approx(
        F.binary_cross_entropy_with_logits(conv(images)[:, 0][keep], target[keep].double()).item()
    )
    assert loss.isfinite()


def test_no_attack_is_made_and_no_second_derivative_taken_where_the_weights_are_zero():
    calls = []

    def network(x: Tensor) -> Tensor:
        calls.append(x.requires_grad)
        return torch.cat([x, -x], 1)

    inputs, target = torch.rand(3, 1), torch.tensor([0, 1, 0])
    value = margin_aware_loss(network, inputs, target, lambda_r=0, lambda_s=0)
    torch.testing.assert_close(value, F.cross_entropy(network(inputs), target))
    assert calls == [False, False]
    margin_aware_loss(network, inputs, target, lambda_s=0)
    assert len(calls) == 2 + 1 + 3 + 1
