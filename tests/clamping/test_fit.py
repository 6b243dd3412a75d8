"""The engine's promises: what it refuses, what it never does, and what does not change its answer."""

import math
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from lightning_clamp import Clamp, fit_clamp
from tests.scenarios import SmallNet, assert_same, batches, calibrated_logits, images, sampled, shifted_images, trace

IDENTITY = nn.Identity()


def test_the_clamp_is_what_the_result_says():
    network, x, y = shifted_images(2000)
    result = fit_clamp(network, batches(x, y))
    with torch.no_grad():
        logits = result.clamp.scale(network(result.clamp.perturb(x)))
    assert result.after["nll"] == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-5)
    assert result.after["accuracy"] == pytest.approx(float((logits.argmax(1) == y).double().mean()))
    assert result.before["nll"] > result.after["nll"]
    for name, (value, low, high) in result.change.items():
        assert value == pytest.approx(result.after[name] - result.before[name], abs=1e-12)
        assert low <= value <= high
    assert result.change["nll"].high < 0
    assert result.chosen in result.candidates
    assert result.chosen.clamp is result.clamp
    assert result.n_samples == 2000
    assert result.reliability[0].counts.sum() == 2000


def test_every_candidate_is_on_record_with_its_figures():
    network, x, y = shifted_images(2000)
    result = fit_clamp(network, batches(x, y))
    fitted = [c for c in result.candidates if not c.refusal]
    ruled_out = {c.grid: c.refusal.words for c in result.candidates if c.refusal}
    assert ruled_out == dict.fromkeys((2, 4, 8), "the first pass promises less than it costs")
    assert [(c.grid, c.output_map) for c in fitted] == [
        (g, o) for g in (0, 1) for o in ("temperature", "vector", "matrix")
    ]
    for candidate in result.candidates:
        grid, maps = 3 * candidate.grid**2, {"temperature": 1, "vector": 7, "matrix": 15}
        assert candidate.n_parameters == grid + maps[candidate.output_map]
        assert (candidate.p_value is None) == (candidate.predicted_gain is None) == (candidate.grid == 0)
    for candidate in fitted:
        extra = candidate.effective_parameters - 1
        assert candidate.expected_change == pytest.approx(extra / 2000 - candidate.achieved_gain)
        assert candidate.criterion == pytest.approx(candidate.expected_change + candidate.standard_error)
        if candidate.output_map == "temperature":
            assert candidate.effective_parameters == pytest.approx(candidate.n_parameters + 3 * (candidate.grid > 0))
        else:
            assert 1 < candidate.effective_parameters - 3 * candidate.grid**2 < candidate.n_parameters
    # Of maps that are as good within half a nat the simplest is taken.
    best = min(fitted, key=lambda c: c.criterion)
    as_good = [c for c in fitted if c.grid == best.grid and 2000 * (c.criterion - best.criterion) <= 0.5]
    assert result.chosen is as_good[0]
    assert result.chosen.criterion < 0
    assert result.chosen.name in result.reason


def test_each_part_of_a_clamp_is_measured_alone():
    network, x, y = shifted_images()
    both = fit_clamp(network, batches(x, y), grids=(1,), output_maps=("temperature",)).clamp
    parts = [Clamp(), Clamp(both.perturbation), Clamp(log_temperature=both.log_temperature), both]
    with torch.no_grad():
        nothing, perturbation, temperature, together = (
            float(F.cross_entropy(clamp.scale(network(clamp.perturb(x))), y)) for clamp in parts
        )
    # The perturbation was fitted with the temperature, and where the network is too sure it need not help alone.
    assert together < temperature - 0.01 < nothing - 0.02
    assert abs(perturbation - nothing) > 0.001
    assert together < perturbation - 0.01


def test_plain_neural_clamping_has_no_output_map():
    network, x, y = shifted_images(1000)
    result = fit_clamp(network, batches(x, y), output_maps=("temperature",))
    assert {candidate.output_map for candidate in result.candidates} == {"temperature"}
    assert result.clamp.class_bias is None


@pytest.mark.slow
@pytest.mark.parametrize("method", ["clamp", "temperature"])
def test_batches_and_order_do_not_matter(method):
    network, x, y = shifted_images(1200)
    order = torch.randperm(len(x))
    first = fit_clamp(network, batches(x, y, 400), method=method)
    second = fit_clamp(network, batches(x[order], y[order], 37), method=method)
    assert first.clamp.temperature == pytest.approx(float(second.clamp.temperature), abs=1e-6)
    assert first.after == pytest.approx(second.after, abs=1e-6)
    if method == "clamp":
        torch.testing.assert_close(first.clamp.perturbation, second.clamp.perturbation, rtol=0, atol=1e-5)
        for one, other in zip(first.candidates, second.candidates, strict=True):
            assert one.criterion == pytest.approx(other.criterion, abs=1e-6)


def test_without_room_for_logits_the_answer_is_the_same():
    network, x, y = shifted_images(600)
    kept, streamed = (fit_clamp(network, batches(x, y), cache_bytes=size) for size in (2**28, 0))
    assert streamed.passes > kept.passes
    assert streamed.after == pytest.approx(kept.after, abs=1e-7)
    torch.testing.assert_close(streamed.clamp.perturbation, kept.clamp.perturbation, rtol=0, atol=1e-6)


class CountedBatches:
    """Batches made on the fly, that knows how many are alive when it makes the next."""

    def __init__(self, x, y, n):
        self.x, self.y, self.n = x, y, n
        self.most_alive = 0

    def __iter__(self):
        alive = weakref.WeakSet()
        for _ in range(self.n):
            self.most_alive = max(self.most_alive, len(alive))
            inputs = self.x.clone()
            alive.add(inputs)
            yield inputs, self.y


@pytest.mark.parametrize("n", [3, 12])
def test_memory_does_not_grow_with_the_calibration_set(n):
    network, x, y = shifted_images(100)
    data = CountedBatches(x, y, n)
    fit_clamp(network, data, cache_bytes=0, grids=(1,), max_passes=2, output_maps=("temperature",))
    assert data.most_alive <= 2


@pytest.mark.parametrize("shape", [(6,), (4, 10), ()])
def test_inputs_that_are_no_images_have_one_coefficient_per_channel(shape):
    size = torch.Size(shape).numel()
    network = nn.Sequential(nn.Flatten() if shape else nn.Unflatten(0, (-1, 1)), nn.Linear(size, 3))
    x = torch.randn(3000, *shape)
    y = sampled(network(x).detach().double())
    result = fit_clamp(network, batches(x + 0.7, y))
    one = next(c for c in result.candidates if c.grid == 1)
    assert one.n_parameters == (shape[0] if shape else 1) + (1 if one.output_map == "temperature" else 5)
    assert one.predicted_gain > 0
    assert {c.refusal.words for c in result.candidates if c.grid > 1} == {f"inputs of shape {shape} have no such grid"}


def dense_problem(n=400, temperature=2.0):
    layer = nn.Conv2d(3, 4, 3, padding=1)
    with torch.no_grad():
        layer.weight.mul_(4)
    x = images(n)
    y = sampled(layer(x).detach().double())
    return (lambda inputs: temperature * layer(inputs)), x, y


@pytest.mark.parametrize("method", ["clamp", "published", "temperature"])
@pytest.mark.filterwarnings("ignore:The network was left as it is")
def test_dense_outputs_leave_ignored_pixels_out(method):
    network, x, y = dense_problem()
    masked = y.clone()
    masked[:, :3] = 255
    garbage = y.clone()
    garbage[:, :3] = torch.randint(4, garbage[:, :3].shape)
    options = {"epochs": 5, "lr": 0.1} if method == "published" else {}
    result = fit_clamp(network, batches(x, masked, 100), method=method, ignore_index=255, **options)
    assert float(result.reliability[0].counts.sum()) == 400 * 5 * 8
    assert float(result.clamp.temperature) > 1.2
    if method != "published":
        assert float(result.clamp.temperature) == pytest.approx(2, rel=0.05)
        options = {"uniform_share": False} if method == "clamp" else {}
        spoiled = fit_clamp(network, batches(x, garbage, 100), method=method, **options)
        assert float(spoiled.clamp.temperature) > 2.5


@pytest.mark.slow
@pytest.mark.parametrize("method", ["clamp", "published", "temperature"])
@pytest.mark.parametrize("shape", ["(N,)", "(N, 1)", "dense"])
@pytest.mark.filterwarnings("ignore:The network was left as it is")
def test_one_logit_heads(method, shape):
    generator = torch.Generator().manual_seed(0)
    dense = shape == "dense"
    x = torch.randn(1500, 3, *((4, 4) if dense else ()), generator=generator)
    z = x.sum(1, keepdim=dense or shape == "(N, 1)")
    y = (torch.rand(z.shape, generator=generator) < z.sigmoid()).float()
    options = {"epochs": 20, "lr": 0.1} if method == "published" else {}

    def network(inputs):
        return 3 * (inputs.sum(1, keepdim=z.ndim > 1) + 0.6)

    result = fit_clamp(network, batches(x, y), method=method, task="binary", **options)
    after = F.binary_cross_entropy_with_logits(result.clamp.scale(network(result.clamp.perturb(x))), y)
    assert result.after["nll"] == pytest.approx(float(after), rel=1e-4)
    assert result.after["nll"] < result.before["nll"]
    if method == "clamp":
        # The offset is undone, by a bias or by a perturbation, and so is the temperature.
        ideal = float(F.binary_cross_entropy_with_logits(z, y))
        assert result.after["nll"] == pytest.approx(ideal, abs=0.003)


def test_a_one_logit_calibration_equals_that_of_its_two_class_twin():
    generator = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(2000, generator=generator, dtype=torch.float64)
    y = (torch.rand(2000, generator=generator) < (z / 2 - 0.5).sigmoid()).long()
    one = fit_clamp(IDENTITY, [(z, y)], task="binary", grids=())  # "vector" is "bias" here
    two = fit_clamp(IDENTITY, [(torch.stack([0 * z, z], 1), y)], grids=(), output_maps=("temperature", "bias"))
    assert one.after == pytest.approx(two.after, abs=1e-9)
    assert one.chosen.n_parameters == two.chosen.n_parameters == 2


def test_where_the_colder_the_better_nothing_is_changed():
    logits, _ = calibrated_logits(300)
    with pytest.warns(UserWarning, match="no temperature minimises the NLL"):
        result = fit_clamp(IDENTITY, [(logits, logits.argmax(1))], grids=())
    assert result.clamp.is_identity
    assert "every sample is right" in result.reason


def test_where_only_a_negative_temperature_would_do_the_classes_scales_have_it():
    logits, _ = calibrated_logits(300)
    with pytest.warns(UserWarning, match="say next to nothing of the labels"):
        hottest = fit_clamp(IDENTITY, [(logits, logits.argmin(1))], method="temperature")
    assert hottest.after["nll"] == pytest.approx(math.log(5), abs=1e-3)
    result = fit_clamp(IDENTITY, [(logits, logits.argmin(1))], grids=())
    assert float(result.clamp.temperature) > 0
    assert result.after["accuracy"] > 0.98 > 0.02 > result.before["accuracy"]


def test_a_bias_helps_where_no_temperature_does():
    """A rare class that the network finds likely, as after little training: the hotter, the better, but for a bias."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4000, generator=generator)
    y = (torch.rand(4000, generator=generator) < (z / 2 - 3).sigmoid()).long()
    with pytest.warns(UserWarning, match="say next to nothing of the labels"):
        hottest = fit_clamp(IDENTITY, [(z + 2, y)], task="binary", method="temperature")
    assert hottest.after["nll"] == pytest.approx(math.log(2), abs=1e-3)
    result = fit_clamp(IDENTITY, [(z + 2, y)], task="binary")
    assert result.chosen.output_map == "bias"
    assert float(result.clamp.temperature) == pytest.approx(2, rel=0.15)
    ideal = float(F.binary_cross_entropy_with_logits(z / 2 - 3, y.float()))
    assert result.after["nll"] == pytest.approx(ideal, abs=0.002)


@pytest.mark.slow
def test_a_clamp_that_would_raise_the_nll_is_not_returned():
    """Focal loss with a large exponent ends far too warm."""
    network = SmallNet()
    x = images(1000)
    y = sampled(network(x).detach().double())
    with pytest.warns(UserWarning, match="left as it is: the clamp had an NLL of"):
        result = fit_clamp(network, batches(x, y), method="published", gamma=10.0, epochs=40, lr=0.3)
    assert result.clamp.is_identity
    assert result.after == result.before
    assert set(result.change.values()) == {(0, 0, 0)}


@pytest.mark.filterwarnings("ignore:The network was left as it is")
def test_data_that_are_known_by_heart_raise_a_warning():
    logits, _ = calibrated_logits(300)
    with pytest.warns(UserWarning, match="is it the training set"):
        fit_clamp(IDENTITY, [(100 * logits, logits.argmax(1))], method="temperature")


def test_a_batch_that_no_longer_fits_its_grid_is_said():
    network, x, y = shifted_images(100)
    result = fit_clamp(network, batches(x, y))
    notes = {c.grid: c.refusal and c.refusal.words for c in result.candidates if c.output_map == "temperature"}
    assert notes[1] is None
    assert notes[2] == notes[8] == "100 samples are fewer than 10 per coefficient"
    assert "100 samples are fewer than 10 per coefficient" in result.reason


def test_inputs_of_several_sizes_keep_the_output_maps():
    layer = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    parts = [(5 * torch.randn(100, 3, side, side), torch.randint(4, (100,))) for side in (8, 12)]
    with pytest.warns(UserWarning, match="say next to nothing of the labels"):
        result = fit_clamp(layer, parts)
    assert {c.refusal.words for c in result.candidates if c.grid} == {"the inputs differ in shape"}


class Stateful(nn.Module):
    """Counts its calls in a buffer, and can fail at one of them."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.net, self.fail_at = SmallNet(), fail_at
        self.register_buffer("calls", torch.zeros(()))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        self.calls += 1
        if self.fail_at is not None and self.calls >= self.fail_at:
            raise RuntimeError("out of memory, half-way")
        return self.dropout(self.net(x))


@pytest.mark.parametrize("method", ["clamp", "published", "temperature"])
@pytest.mark.parametrize("fail_at", [None, 1, 6])
@pytest.mark.filterwarnings("ignore:The network was left as it is")
def test_the_network_is_bit_identical_after_also_if_it_fails_half_way(method, fail_at):
    network = Stateful(fail_at if method != "temperature" or fail_at is None else min(fail_at, 2))
    network.net.linear.bias.requires_grad_(False)
    network.dropout.eval()
    _, x, y = shifted_images(300)
    network.net(x[:5]).sum().backward()
    before = trace(network)
    options = {"epochs": 3} if method == "published" else {}
    with pytest.raises(RuntimeError, match="half-way") if fail_at else warnings.catch_warnings():
        fit_clamp(network, batches(x, y, 100), method=method, **options)
    assert_same(before, trace(network))


def bad(**changes):
    network, x, y = shifted_images(100)
    problem = {"network": network, "batches": [(x, y)], **changes}
    return problem.pop("network"), problem.pop("batches"), problem


X, Y = images(100), torch.randint(4, (100,))
T = (2 * X).long()


def poisoned(value):
    x = X.clone()
    x[37] = value
    return [(x[:50], Y[:50]), (x[50:], Y[50:])]


class Once:
    """Batches that are gone once they were read."""

    def __init__(self, batches):
        self.batches = iter(batches)

    def __iter__(self):
        return self.batches


class OnceStream(Once, IterableDataset):
    """A dataset of that kind."""


class Shrinking(list):
    """Loses a batch with every pass."""

    def __iter__(self):
        yield from list(super().__iter__())
        self.pop()


class Module:
    """As a datamodule has its loaders."""

    def val_dataloader(self):
        return []


BAD = {
    "NaN": (bad(batches=poisoned(float("nan"))), ValueError, "NaN or infinite logits for sample 37"),
    "infinite": (bad(network=lambda x: SmallNet()(x) / 0), ValueError, "NaN or infinite logits for sample 0"),
    "softmax": (
        bad(network=lambda x: SmallNet()(x).softmax(1)),
        ValueError,
        "returns probabilities .* leave the final",
    ),
    "label too large": (
        bad(batches=[(X, Y + 1)]),
        ValueError,
        "has the label 4, but the network has 4 classes, 0 to 3",
    ),
    "label negative": (bad(batches=[(X, -Y)]), ValueError, "start the labels at 0, or name a padding label"),
    "a regression": (
        bad(batches=[(X, Y + 0.5)]),
        TypeError,
        "got torch.float32 between whole numbers: only a classifier can be calibrated",
    ),
    "float labels": (bad(batches=[(X, Y.float())]), TypeError, r"use target.long\(\)"),
    "one-hot": (bad(batches=[(X, F.one_hot(Y, 4))]), ValueError, "one-hot"),
    "one class": (bad(network=lambda x: x.mean((1, 2, 3))[:, None]), ValueError, 'say task="binary"'),
    "empty": (bad(batches=[]), ValueError, "is empty: pass a loader"),
    "tiny": (bad(batches=[(X[:9], Y[:9])]), ValueError, "has 9 samples; a temperature needs at least 10"),
    "all ignored": (bad(batches=[(X, Y * 0 + 9)], ignore_index=9), ValueError, "Every label .* `ignore_index`"),
    "generator": (bad(batches=iter([(X, Y)])), TypeError, "got list_iterator, which can be read once: no generator"),
    "read once": (
        bad(batches=Once([(X, Y)])),
        TypeError,
        "got Once, which can be read once: .* always returns the same",
    ),
    "stream read once": (
        bad(batches=DataLoader(OnceStream([(X, Y)]), batch_size=None)),
        TypeError,
        "got DataLoader, which can be read",
    ),
    "dataset": (
        bad(batches=TensorDataset(X, Y)),
        TypeError,
        r"got TensorDataset: pass DataLoader\(dataset, batch_size",
    ),
    "subset": (bad(batches=Subset(TensorDataset(X, Y), [0, 1])), TypeError, r"got Subset: pass DataLoader\(dataset"),
    "datamodule": (
        bad(batches=Module()),
        TypeError,
        r"got Module: pass one of its loaders, such as .*val_dataloader\(\)",
    ),
    "number": (bad(batches=3), TypeError, r"must be a DataLoader or a list of batches, got int\."),
    "the name of a loader": (bad(batches="val"), TypeError, "a list of batches, got str: pass the loader itself"),
    "signs for labels": (
        bad(network=lambda x: SmallNet()(x)[:, 0], batches=[(X, Y % 2 * 2 - 1)], task="binary"),
        ValueError,
        r"has the labels -1 and 1: let them be 0 and 1, \(target \+ 1\) // 2",
    ),
    "signs for several labels": (
        bad(batches=[(X, F.one_hot(Y, 4) * 2 - 1)], task="multilabel"),
        ValueError,
        "has the labels -1 and 1: let them be 0 and 1",
    ),
    "no parentheses": (bad(batches=lambda: [(X, Y)]), TypeError, "got function: call it, and pass what it returns"),
    "a class for a network": (
        bad(network=SmallNet),
        TypeError,
        r"got the class SmallNet: pass one, SmallNet\(\.\.\.\)",
    ),
    "predictions": (
        bad(network=lambda x: SmallNet()(x).argmax(1)),
        TypeError,
        "float tensor of logits, got torch.int64: the numbers before the softmax or argmax",
    ),
    "arrays": (
        bad(batches=[(X.numpy(), Y)]),
        TypeError,
        r"a tuple, got ndarray: convert it, torch.as_tensor\(\.\.\.\)",
    ),
    "an array of labels": (bad(batches=[(X, Y.numpy())]), TypeError, "must be a tensor, got ndarray: convert it"),
    "images one by one": (
        bad(batches=[(list(X), Y)]),
        TypeError,
        "3 items, and the target has 100 items: stack items into one",
    ),
    "names for labels": (
        bad(batches=[(X, ["cat"] * len(X))]),
        TypeError,
        "must be a tensor, got list: number the classes from 0 on",
    ),
    "one sample": (bad(batches=[(X[:1], Y[:1])]), ValueError, "has 1 sample; a temperature needs at least 10"),
    "samples": (bad(batches=DataLoader(TensorDataset(X, Y), None)), TypeError, "a single number: if the loader yields"),
    "samples with numbers": (bad(batches=[(X[0], 3)]), TypeError, "got int: if the loader yields samples, pass DataL"),
    "shrinking": (
        bad(batches=Shrinking([(X, Y)] * 3), cache_bytes=0),
        ValueError,
        "gave 300 samples when it was read first, and now 200",
    ),
    "dict": (
        bad(batches=[{"x": X, "y": Y}]),
        TypeError,
        r"pair \(inputs, target\), got dict of x, y: pass a loader that yields pairs, or say",
    ),
    "triple": (bad(batches=[(X, Y, Y)]), TypeError, "got tuple of 3 items"),
    "bare": (bad(batches=[X]), TypeError, r"pair \(inputs, target\), got Tensor"),
    "lists": (bad(batches=[([1], [2])]), TypeError, "The input 0 of a batch must be a tensor, got int"),
    "no_grad": (
        bad(network=torch.no_grad()(SmallNet()), method="published"),
        RuntimeError,
        'method="published" descends along the gradient .* under `no_grad`',
    ),
    "not a tensor": (
        bad(network=lambda x: {"scores": x}),
        TypeError,
        "must return a tensor of logits.* got dict of sc",
    ),
    "rows": (bad(network=lambda x: SmallNet()(x)[:5]), ValueError, r"logits of shape \(5, 4\) for a batch of 100"),
    "squeezed": (bad(network=lambda x: SmallNet()(x).sum()), ValueError, r"logits of shape \(\) for a batch of 100"),
    "method": (bad(method="adam"), ValueError, "must be one of .*'clamp'.*got 'adam'"),
    "task": (bad(task="regression"), ValueError, "`task` must be one of"),
    "option": (bad(lr=0.1), TypeError, '`lr` is an option of method="published", and the method is "clamp"'),
    "unknown": (
        bad(gridz=(1,)),
        TypeError,
        r"has no argument `gridz`: did you mean `grids`\? It takes network, dataloa",
    ),
    "unknown here": (bad(num_classes=4), TypeError, "has no argument `num_classes`.* It takes .*, output_maps, "),
    "old name": (bad(batch_key=(0, 1)), TypeError, "did you mean `batch_keys`"),
    "label": (bad(ignore_index="x"), ValueError, "`ignore_index` must be a label, .* got 'x'"),
    "momentum": (
        bad(method="published", momentum=-3),
        ValueError,
        "`momentum` must be a number at least 0 and",
    ),
    "weight": (bad(method="published", loss_weight="a"), ValueError, "`loss_weight` must be a number .* got 'a'"),
    "text": (bad(method="published", lr="0.1"), ValueError, "`lr` must be a number above 0, got '0.1'"),
    "seed": (bad(method="published", seed=1.5), ValueError, "`seed` must be a whole number of at least 0, got 1.5"),
    "nesterov": (bad(method="published", nesterov=True, momentum=0), ValueError, "`nesterov` needs a `momentum`"),
    "augmentation": (bad(method="published", augmentation=3), ValueError, "`augmentation` must be callable, or None"),
    "output": (bad(output_maps=("tensor",)), ValueError, r"`output_maps` must be .* got \('tensor',\)"),
    "outputs as text": (
        bad(output_maps="temperature"),
        ValueError,
        "`output_maps` must be a sequence .* got 'temperature'",
    ),
    "grid": (bad(grids=(0,)), ValueError, r"`grids` must be a sequence of whole numbers of at least 1, got \(0,\)"),
    "grids as number": (bad(grids=4), ValueError, "`grids` must be a sequence .* got 4"),
    "passes": (bad(max_passes=0), ValueError, "`max_passes` must be a whole number of at least 1, got 0"),
    "optimizer": (bad(method="published", optimizer="adam"), ValueError, "`optimizer` must be one of .* got 'adam'"),
    "start": (bad(method="published", initial="datadriven"), ValueError, "`initial` must be 'random', 'data-driven'"),
    "start's shape": (bad(method="published", initial=torch.zeros(1, 3, 8, 8)), ValueError, "the shape of one input"),
    "learning rate": (bad(method="published", lr=-3.0), ValueError, "`lr` must be a number above 0, got -3.0"),
    "tokens": (
        bad(method="published", network=lambda x: SmallNet()(x.float()), batches=[(T, Y)]),
        TypeError,
        "needs float",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_sentence_and_leaves_the_network_as_it_was(case):
    (network, data, options), error, message = BAD[case]
    before = trace(network) if isinstance(network, nn.Module) else None
    with pytest.raises(error, match=message) as caught:
        fit_clamp(network, data, **options)
    assert "\n" not in str(caught.value)
    if before is not None:
        assert_same(before, trace(network))


@pytest.mark.parametrize("method", ["clamp", "published", "temperature"])
def test_empty_batches_take_no_part(method):
    network, x, y = shifted_images(200)
    options = {"clamp": {"grids": (1,)}, "published": {"epochs": 1}, "temperature": {}}[method]
    data = batches(x, y, 100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, padded = (
            fit_clamp(network, each, method=method, **options)
            for each in (data, [(x[:0], y[:0]), data[0], (x[:0], y[:0]), data[1]])
        )
    for name, value in plain.clamp.state_dict().items():
        assert torch.equal(value, padded.clamp.state_dict()[name])
    with pytest.raises(ValueError, match="is empty: pass a loader"):
        fit_clamp(network, [(x[:0], y[:0])], method=method, **options)


def test_one_logit_outputs_between_0_and_1_raise_a_warning():
    x = torch.rand(100)
    with pytest.warns(UserWarning, match="leave the final sigmoid out"):
        fit_clamp(IDENTITY, [(x, (torch.rand(100) < x).long())], task="binary", method="temperature")


def test_a_sigmoid_for_each_of_the_classes_raises_it_too():
    x, y = calibrated_logits(400, 4)
    with pytest.warns(UserWarning, match="Every output of the network lies in .*leave the final sigmoid out"):
        fit_clamp(lambda z: z.sigmoid(), [(x, y)], method="temperature")


def test_integer_inputs_have_their_outputs_calibrated():
    network = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 3))
    tokens = torch.randint(10, (500, 3))
    y = sampled(network(tokens).detach().double())
    result = fit_clamp(lambda x: 3 * network(x), [(tokens, y)])
    assert float(result.clamp.temperature) > 1
    assert result.clamp.perturbation is None
    assert "grid because nothing can be added to integer inputs" in result.reason
    with pytest.raises(TypeError, match=r"inputs are torch.int64, and a perturbation needs float"):
        Clamp(torch.zeros(3)).perturb(tokens)


def test_a_method_of_a_module_is_frozen_with_it():
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    x, y = images(200), torch.randint(4, (200,))
    before = trace(network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit_clamp(network.forward, batches(3 * x, y), method="published", epochs=2)
    assert_same(before, trace(network))


def test_even_a_function_around_a_module_leaves_no_gradients_on_it():
    network, x, y = shifted_images(100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit_clamp(lambda inputs: network(inputs), batches(x, y), method="published", epochs=1)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_class_that_is_separated_or_missing_has_a_finite_map():
    """Without shrinkage its scale and bias would grow for ever, and be whatever the tolerance makes them."""
    logits, y = calibrated_logits(600, 4)
    logits[:, 2] = torch.where(y == 2, 8.0, -8.0)
    keep = y != 3
    with pytest.warns(UserWarning, match="next to none, of class 3: "):
        result = fit_clamp(IDENTITY, [(2 * logits[keep], y[keep])], grids=())
    clamps = {one.output_map: one.clamp for one in result.candidates}
    assert result.chosen.output_map == "matrix"
    for scale in (clamps["vector"].class_scale, clamps["matrix"].class_matrix.diagonal()):
        assert 0 < float(scale.min()) <= float(scale.max()) < 5
    for name in ("vector", "matrix"):
        assert float(clamps[name].class_bias.abs().max()) < 20
    assert float(clamps["matrix"].class_matrix.abs().max()) < 5


def test_a_class_s_scale_may_be_negative():
    """The third class's logit says the opposite of what it should: its scale comes out below zero."""
    logits, y = calibrated_logits(6000, 3)
    truth = F.cross_entropy(logits[4000:], y[4000:])
    logits[:, 2] *= -1
    result = fit_clamp(IDENTITY, [(logits[:4000], y[:4000])], grids=(), output_maps=("vector",))
    assert float(result.clamp.class_scale[2]) < 0 < float(result.clamp.class_scale[0])
    assert float(F.cross_entropy(result.clamp.scale(logits[4000:]), y[4000:])) == pytest.approx(float(truth), abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("classes", "n"), [(3, 10), (10, 60), (10, 100), (10, 250)])
def test_a_handful_of_samples_gets_little_more_than_a_temperature(classes, n):
    """Akaike's estimate means nothing where there are about as many parameters as samples."""
    worst = -1.0
    for seed in range(12):
        logits, y = calibrated_logits(n + 4000, classes)
        order = torch.randperm(n + 4000, generator=torch.Generator().manual_seed(seed))
        logits, y = 2 * logits[order], y[order]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = fit_clamp(IDENTITY, [(logits[:n], y[:n])], grids=())
            alone = fit_clamp(IDENTITY, [(logits[:n], y[:n])], method="temperature")
        assert all(c.refusal or (c.effective_parameters - 1) * 4 <= n for c in result.candidates)
        held = [float(F.cross_entropy(r.clamp.scale(logits[n:]), y[n:])) for r in (result, alone)]
        worst = max(worst, held[0] - held[1])
    assert worst < 0.05


def test_items_that_are_ignored_change_no_figure():
    network, x, y = dense_problem(60)
    y[:, :2] = 255
    more_x, more_y = torch.cat([x, x]), torch.cat([y, torch.full_like(y, 255)])
    first = fit_clamp(network, batches(x, y, 20), ignore_index=255, grids=())
    second = fit_clamp(network, batches(more_x, more_y, 20), ignore_index=255, grids=())
    for one, other in zip(first.candidates, second.candidates, strict=True):
        assert one.standard_error == pytest.approx(other.standard_error, abs=1e-12)
        assert one.criterion == pytest.approx(other.criterion, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("n", [60, 300, 1500])
def test_with_few_samples_and_many_classes_the_temperature_is_not_made_worse(n):
    """100 classes and a calibrated network: unshrunk vector scaling would lose whole nats here."""
    logits, y = calibrated_logits(n + 20000, 100)
    with warnings.catch_warnings():
        # At 60 samples classes are missing.
        warnings.simplefilter("ignore")
        result = fit_clamp(IDENTITY, [(2 * logits[:n], y[:n])], grids=())
    temperature = fit_clamp(IDENTITY, [(2 * logits[:n], y[:n])], method="temperature")
    held = [float(F.cross_entropy(r.clamp.scale(2 * logits[n:]), y[n:])) for r in (result, temperature)]
    assert held[0] <= held[1] + 0.003


def test_dense_outputs_in_half_precision_have_grids():
    network, x, y = dense_problem(200)
    options = {"grids": (1,), "output_maps": ("temperature",)}
    half, whole = (
        fit_clamp(net, batches(x - 0.3, y, 100), **options)
        for net in (lambda inputs: network(inputs).bfloat16(), network)
    )
    assert half.chosen.grid == whole.chosen.grid == 1
    assert half.after["nll"] == pytest.approx(whole.after["nll"], abs=0.01)


def test_dense_passes_are_those_of_class_outputs():
    """Their curvature takes backward passes, which are no passes over the data."""
    network, x, y = dense_problem(400)
    result = fit_clamp(network, batches(x - 0.3, y, 100), grids=(1,), output_maps=("temperature",))
    (candidate,) = [one for one in result.candidates if one.grid]
    assert candidate.passes > 2
    assert result.passes == 1 + candidate.passes


def test_recurrent_networks_work():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            return 5 * self.head(self.rnn(x)[0][:, -1])

    network, x = Recurrent(), torch.randn(400, 6, 4)
    y = sampled(network(x).detach().double() / 2)
    result = fit_clamp(network, [(x, y)], grids=(1,))
    assert result.after["nll"] < result.before["nll"]


def test_progress_is_told_batch_by_batch():
    network, x, y = shifted_images(300)
    told = []
    fit_clamp(
        network,
        batches(x, y, 100),
        grids=(1,),
        output_maps=("temperature",),
        max_passes=2,
        progress=lambda *step: told.append(step),
    )
    assert told[:3] == [("first look", 1), ("first look", 2), ("first look", 3)]
    assert told[-1] == ("grid 1, pass 2", 3)


def test_half_precision_networks_are_calibrated_close_to_full_ones():
    network, x, y = shifted_images(2000)
    half = SmallNet(2.0).to(torch.bfloat16)
    full = fit_clamp(network, batches(x, y), method="temperature")
    rounded = fit_clamp(half, batches(x.bfloat16(), y), method="temperature")
    assert float(rounded.clamp.temperature) == pytest.approx(float(full.clamp.temperature), rel=0.02)
    assert rounded.clamp.log_temperature.dtype == torch.float32


def test_the_identity_clamp_is_measured_as_before():
    logits, y = calibrated_logits(500)
    result = fit_clamp(IDENTITY, [(logits, y)], method="temperature")
    assert isinstance(result.clamp, Clamp)
    assert result.before["nll"] == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-12)


@pytest.mark.parametrize("mask", [-1e9, torch.finfo(torch.float32).min], ids=["1e9", "finfo"])
def test_masked_logits_are_calibrated_as_they_are(mask):
    """Entries that a network rules out by a huge negative number: no overflow, and the temperature is unharmed."""
    logits, y = calibrated_logits(1000)
    masked = (2 * logits).float().masked_fill(torch.rand(1000, 5) < 0.2, mask)
    masked.scatter_(1, y[:, None], (2 * logits).float().gather(1, y[:, None]))
    result = fit_clamp(IDENTITY, [(masked, y)], grids=())
    assert result.after["nll"] < result.before["nll"]
    assert torch.isfinite(result.clamp.scale(masked)[masked > mask]).all()


def test_a_matrix_is_not_fitted_to_logits_that_are_computed_again_each_time():
    logits, y = calibrated_logits(1000)
    result = fit_clamp(IDENTITY, [(2 * logits, y)], grids=(), cache_bytes=0)
    assert "left out: matrix because the logits exceed `cache_bytes`" in result.reason
    assert result.passes < 80
