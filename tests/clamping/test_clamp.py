import pytest
import torch

from lightning_clamp import Clamp


def test_the_default_clamp_is_the_identity():
    inputs, logits = torch.randn(2, 3, 4, 4), torch.randn(2, 5)
    clamp = Clamp()
    assert clamp.is_identity
    assert clamp.perturb(inputs) is inputs
    assert torch.equal(clamp.scale(logits), logits)


def test_scale_is_scale_over_temperature_plus_bias():
    logits, scale, bias = torch.randn(6, 3), torch.rand(3) + 0.5, torch.randn(3)
    clamp = Clamp(log_temperature=0.7, class_bias=bias, class_scale=scale)
    torch.testing.assert_close(clamp.scale(logits), scale * logits / torch.tensor(0.7).exp() + bias)
    assert not clamp.is_identity


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5), (6, 3, 4, 2)])
def test_class_values_broadcast_along_axis_1(shape):
    logits, bias = torch.randn(shape), torch.arange(3.0)
    moved = Clamp(class_bias=bias).scale(logits) - logits
    torch.testing.assert_close(moved.movedim(1, -1), bias.expand(moved.movedim(1, -1).shape))


@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 1, 4, 4), (6, 4, 4)])
def test_one_logit_heads_of_any_layout_take_one_value(shape):
    logits = torch.randn(shape)
    clamp = Clamp(log_temperature=1.0, class_bias=torch.tensor([0.5]))
    torch.testing.assert_close(clamp.scale(logits), logits / torch.tensor(1.0).exp() + 0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_are_scaled_in_float32_and_half_inputs_stay_half(dtype):
    clamp = Clamp(perturbation=torch.full((2,), 0.25))
    assert clamp.scale(torch.randn(4, 3, dtype=dtype)).dtype == torch.float32
    assert clamp.perturb(torch.zeros(4, 2, dtype=dtype)).dtype == dtype


def test_inputs_of_another_shape_are_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"shape \(3, 8, 8\), got a batch of shape \(2, 3, 9, 9\)"):
        Clamp(torch.zeros(3, 8, 8)).perturb(torch.zeros(2, 3, 9, 9))


def test_state_round_trips_without_the_parts_that_were_not_chosen():
    clamp = Clamp(torch.randn(3, 2, 2), 0.3, class_bias=torch.randn(4))
    assert set(clamp.state_dict()) == {"perturbation", "log_temperature", "class_bias"}
    again = Clamp.from_state(clamp.state_dict())
    assert all(torch.equal(again.state_dict()[name], value) for name, value in clamp.state_dict().items())


def test_a_foreign_state_is_refused():
    with pytest.raises(ValueError, match="weight"):
        Clamp.from_state({"log_temperature": torch.tensor(0.0), "weight": torch.zeros(1)})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.zeros(2)])
def test_a_temperature_is_one_finite_number(value):
    with pytest.raises(ValueError, match="log_temperature"):
        Clamp(log_temperature=value)


def test_a_clamp_has_nothing_to_train():
    assert list(Clamp(torch.zeros(2), 0.1).parameters()) == []
    assert "temperature=1.105" in repr(Clamp(torch.zeros(2), 0.1))


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_cast_of_the_module_around_it_keeps_float32(cast):
    clamp = Clamp(torch.randn(3, 4, 4), 0.1234567, torch.randn(5))
    before = {name: value.clone() for name, value in clamp.state_dict().items()}
    around = torch.nn.Sequential(torch.nn.Linear(2, 2), clamp).to(cast)
    assert around[0].weight.dtype == cast
    kept = torch.promote_types(cast, torch.float32)
    for name, value in clamp.state_dict().items():
        assert value.dtype == kept
        assert torch.equal(value, before[name].to(kept))


@pytest.mark.parametrize("shape", [(7, 4), (2, 4, 3, 5)])
def test_a_matrix_mixes_the_classes_along_axis_1(shape):
    logits, matrix, bias = torch.randn(shape), torch.randn(4, 4), torch.randn(4)
    clamp = Clamp(log_temperature=0.7, class_bias=bias, class_matrix=matrix)
    rows = logits.movedim(1, -1)
    expected = (rows @ matrix.T / float(clamp.temperature) + bias).movedim(-1, 1)
    torch.testing.assert_close(clamp.scale(logits), expected)
    assert not clamp.is_identity
    assert "class_matrix" in repr(clamp)
    again = Clamp.from_state(clamp.state_dict())
    assert torch.equal(again.scale(logits), clamp.scale(logits))


def test_a_matrix_keeps_its_digits_under_autocast():
    """A product of matrices would be rounded to bfloat16 there."""
    logits, clamp = torch.randn(50, 4), Clamp(class_matrix=torch.randn(4, 4))
    expected = clamp.scale(logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(clamp.scale(logits), expected)


def test_a_scale_and_a_matrix_are_one_too_many():
    with pytest.raises(ValueError, match="a `class_scale` or a `class_matrix`: put the scale on its diagonal"):
        Clamp(class_scale=torch.ones(4), class_matrix=torch.eye(4))
