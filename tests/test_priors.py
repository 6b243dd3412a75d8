"""Class frequencies from samples without labels, and the clamp for them."""

import copy

import pytest
import torch
from scipy.optimize import minimize
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_clamp import CalibrationModule, Clamp, shifted_priors
from lightning_clamp.clamping.label_shift import class_frequencies, condition_number
from tests.scenarios import LitClassifier, calibrated_logits, loader

KEPT = torch.tensor([1.0, 0.25, 0.25, 0.1, 0.6]).double()


def shifted_data(n: int = 20_000, seed: int = 0):
    """Logits that are calibrated for the old frequencies, of samples of which some classes have become rarer."""
    logits, target = calibrated_logits(n, seed=seed)
    old = logits.softmax(1).mean(0)
    draw = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    kept = draw < KEPT[target]
    new = old * KEPT / (old * KEPT).sum()
    return logits[kept], target[kept], old, new


def module_of(clamp=None, **settings) -> CalibrationModule:
    return CalibrationModule(nn.Identity(), clamp or Clamp(), **settings)


def batches(*tensors, size=500):
    return DataLoader(TensorDataset(*tensors), batch_size=size)


def test_the_frequencies_are_found_and_the_losses_fall_to_those_of_the_truth():
    logits, target, old, new = shifted_data()
    module = module_of(Clamp(class_bias=torch.tensor([0.3, 0, 0, 0, -0.3]).double()))
    moved = logits - module.clamp.class_bias
    found = shifted_priors(module, batches(moved, target), priors=old)
    assert found.n_samples == len(logits)
    torch.testing.assert_close(found.after.values, new, atol=0.02, rtol=0)
    assert float(found.after.p_no_shift) < 1e-6
    right = F.cross_entropy(logits + (new / old).log(), target)
    after, before = F.cross_entropy(found.module(moved), target), F.cross_entropy(module(moved), target)
    assert float(after) == pytest.approx(float(right), abs=1e-3)
    assert after < before - 0.05
    assert found.module.result is None


@pytest.mark.slow
def test_intervals_hold_the_truth_and_no_shift_is_seldom_taken_for_one():
    held, false_alarms = [], 0
    for seed in range(100):
        logits, _, old, new = shifted_data(3000, seed=2 * seed)
        found = class_frequencies(logits.softmax(1), old)
        held.append(((found.low <= new) & (new <= found.high)).double().mean())
        same, _ = calibrated_logits(1000, seed=2 * seed)
        uniform = torch.full((5,), 0.2).double()
        false_alarms += int(class_frequencies(same.softmax(1), uniform).p_no_shift < 0.05)
    assert 0.9 < float(torch.stack(held).mean()) < 0.99
    assert false_alarms <= 12


def test_the_estimate_is_the_most_likely_one():
    """Found by another optimiser."""
    logits, _, old, _ = shifted_data(1500)
    ratios = (logits.softmax(1) / old).numpy()

    def loss(free):
        frequencies = torch.tensor([0.0, *free]).softmax(0).numpy()
        return -float(torch.from_numpy(ratios @ frequencies).log().mean())

    best = torch.tensor([0.0, *minimize(loss, [0.0] * 4, tol=1e-12).x]).softmax(0).double()
    torch.testing.assert_close(class_frequencies(logits.softmax(1), old).values, best, atol=2e-4, rtol=0)


@pytest.mark.slow
def test_labelled_samples_give_the_old_frequencies():
    logits, _, _, new = shifted_data()
    old_logits, old_target = calibrated_logits(3000, seed=50)
    found = shifted_priors(module_of(), batches(logits), labelled=batches(old_logits, old_target))
    torch.testing.assert_close(found.before, old_logits.softmax(1).mean(0))
    torch.testing.assert_close(found.after.values, new, atol=0.03, rtol=0)
    again = shifted_priors(
        module_of(), batches(logits.flip(0), size=77), labelled=batches(old_logits, old_target, size=9)
    )
    torch.testing.assert_close(again.after, found.after, rtol=1e-6, atol=1e-6)


def test_a_one_logit_head_is_one_of_two_classes():
    generator = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(6000, generator=generator, dtype=torch.float64)
    y = (torch.rand(6000, generator=generator, dtype=torch.float64) < z.sigmoid()).long()
    kept = (y == 0) | (torch.arange(6000) % 4 == 0)
    found = shifted_priors(module_of(task="binary"), batches(z[kept, None]), priors=[0.5, 0.5])
    assert float(found.after.values[1]) == pytest.approx(float(y[kept].double().mean()), abs=0.02)
    assert found.module.clamp.class_bias.shape == (1,)
    moved = found.module(z[kept, None]) - z[kept, None]
    expected = (found.after.values[1] / found.after.values[0]).log()
    torch.testing.assert_close(moved, expected.expand_as(moved), atol=1e-5, rtol=0)


def test_the_module_itself_is_left_alone_and_its_perturbation_kept():
    """A hook that adds it is not installed twice."""
    module = CalibrationModule(LitClassifier(temperature=1.0), Clamp(torch.zeros(3, 8, 8) + 0.1), perturb_at="net")
    before = copy.deepcopy(module.state_dict())
    data = loader(300, 1)
    x = data.dataset.tensors[0]
    found = shifted_priors(module, data, priors=[0.25] * 4)
    torch.testing.assert_close(module.state_dict(), before)
    assert module.clamp.class_bias is None
    torch.testing.assert_close(found.module(x), module(x) + found.module.clamp.class_bias)


def test_it_prints_as_a_table():
    logits, _, old, _ = shifted_data(3000)
    printed = repr(shifted_priors(module_of(), batches(logits), priors=old))
    assert printed.splitlines()[0].split() == ["class", "before", "after", "95", "%", "interval"]
    assert len(printed.splitlines()) == 7
    assert "unlabelled samples: the frequencies have changed (p < 0.001)" in printed
    same = shifted_priors(module_of(), batches(calibrated_logits(500)[0]), priors=[0.2] * 5)
    assert "they may as well be the old ones (p = " in repr(same)


def test_a_class_that_is_absent_is_bounded_from_above():
    logits, target, old, _ = shifted_data(4000)
    found = shifted_priors(module_of(), batches(logits[target != 2]), priors=old)
    assert float(found.after.values[2]) < 0.02
    assert float(found.after.low[2]) == 0
    assert 0 < float(found.after.high[2]) < 0.03
    assert found.module.clamp.class_bias.isfinite().all()


def test_outputs_that_know_everything_or_nothing_have_the_condition_of_it():
    assert condition_number(torch.eye(4).repeat(5, 1)) == pytest.approx(1)
    assert condition_number(torch.full((5, 4), 0.25)) > 1e10
    assert condition_number(torch.tensor([[0.4, 0.6, 0.0], [0.7, 0.3, 0.0]])) == float("inf")


GOOD = calibrated_logits(400)
REFUSED = {
    "both": ({"labelled": batches(*GOOD), "priors": [0.2] * 5}, "Give `labelled`, held-out .* or `priors`"),
    "neither": ({}, "Give `labelled`"),
    "too few priors": ({"priors": [0.5, 0.5]}, r"`priors` must be 5 positive frequencies .* got \[0.5, 0.5\]"),
    "a class without": ({"priors": [0.0, 0.25, 0.25, 0.25, 0.25]}, "5 positive frequencies"),
    "uncalibrated": (
        {"labelled": batches(4 * GOOD[0], GOOD[1])},
        "frequencies of the classes need calibrated probabilities. On these 400 samples the clamp is off: T would be",
    ),
    "no labelled samples": ({"labelled": []}, "There are no labelled samples"),
    "no samples": ({"unlabelled": [], "priors": [0.2] * 5}, "There are no unlabelled samples"),
    "confused": (
        {"unlabelled": batches(0.01 * GOOD[0]), "priors": [0.2] * 5},
        "do not tell all classes apart .condition number .*e.04, at most 1000.",
    ),
    "dense": ({"unlabelled": [torch.randn(2, 5, 4, 4)], "priors": [0.2] * 5}, "one output per sample, got logits of"),
}


class WithLambda(nn.Module):
    """Its forward is a function that remembers the layer, which a deep copy would share."""

    def __init__(self):
        super().__init__()
        layer = self.layer = nn.Linear(5, 5, bias=False)
        nn.init.eye_(layer.weight)
        self.run = lambda x: layer(x)

    def forward(self, x):
        return self.run(x)


def test_the_new_module_shares_nothing_with_the_network():
    network, x = WithLambda(), GOOD[0].float()
    found = shifted_priors(CalibrationModule(network, Clamp()), batches(x), priors=[0.2] * 5)
    before = found.module(x[:3])
    with torch.no_grad():
        network.layer.weight.zero_()
    torch.testing.assert_close(found.module(x[:3]), before)


def test_a_uniform_share_is_refused():
    """Other frequencies go between the softmax and the share, where no bias is."""
    module = module_of()
    module.clamp.uniform_share = torch.tensor(0.1)
    with pytest.raises(ValueError, match=r"uniform share.*calibrate with uniform_share=False"):
        shifted_priors(module, batches(GOOD[0]), priors=[0.2] * 5)


def test_other_frequencies_are_added_after_a_skew():
    logits, _ = calibrated_logits(4000, 2)
    shifted = logits + torch.tensor([0.0, 1.0]).double()
    clamp = Clamp(None, 0.3, torch.tensor([0.1, -0.1]), skew=torch.tensor(0.2))
    module = module_of(clamp.double())
    old = module(logits).softmax(1).mean(0)
    found = shifted_priors(module, batches(shifted), priors=old)
    moved = (found.module(logits) - module(logits)).diff(dim=1)
    torch.testing.assert_close(moved, (found.after.values / old).log().diff().expand_as(moved))


@pytest.mark.parametrize("case", REFUSED)
def test_what_will_not_do_is_refused_in_a_sentence(case):
    given, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        shifted_priors(module_of(), **{"unlabelled": batches(GOOD[0]), **given})
    with pytest.raises(TypeError, match="takes a CalibrationModule, got Identity"):
        shifted_priors(nn.Identity(), [], priors=[1.0])
