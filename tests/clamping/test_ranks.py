"""One clamp fitted by several ranks: the same as by one, and one error on all when a part goes wrong."""

import warnings

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F

from lightning_clamp import fit_clamp
from lightning_clamp.clamping.ranks import ALONE
from tests.ranks import on_ranks
from tests.scenarios import SHIFT, SmallNet, batches, images, sampled, shifted_images

pytestmark = pytest.mark.ddp


class DenseNet(nn.Module):
    """Three classes for every pixel."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x):
        return 2 * torch.tanh(self.conv(x))


def classes(n):
    network, x, y = shifted_images(n)
    return network, x, y, {}


def dense(n):
    network, x = DenseNet(), images(n)
    return network, x - 0.3, sampled(network(x).detach().double() / 2), {"grids": (1, 2)}


def binary(n):
    network, x = nn.Sequential(nn.Flatten(), nn.Linear(192, 1, bias=False)), images(n)
    generator = torch.Generator().manual_seed(6)
    network.requires_grad_(False)[1].weight.copy_(torch.randn(1, 192, generator=generator))
    p = torch.sigmoid(network(x)[:, 0] / 3)
    return network, x, (torch.rand(n, generator=generator) < p).long(), {"task": "binary"}


def bent(n):
    """One logit, and the map that it wants bends the log-odds."""
    network, x, _, options = binary(n)
    margin = network(x)[:, 0]
    true = 0.3 * F.logsigmoid(margin) - 1.5 * F.logsigmoid(-margin)
    generator = torch.Generator().manual_seed(7)
    return network, x, (torch.rand(n, generator=generator) < true.sigmoid()).long(), options


def multilabel(n):
    """Four labels, one of which is never there, and some of which are not known."""
    network, x = SmallNet(2.0), images(n)
    generator = torch.Generator().manual_seed(6)
    target = (torch.rand(n, 4, generator=generator) < (network(x).detach() / 2 + 1).sigmoid()).float()
    target[:, 2] = 0
    target[torch.rand(n, 4, generator=generator) < 0.2] = -1
    return network, x, target, {"task": "multilabel", "ignore_index": -1}


def mirrored(n):
    network, x = SmallNet(2.0), images(n)
    truth = (network(x + SHIFT) + network((x + SHIFT).flip(-1))) / 4
    return network, x, sampled(truth.detach().double()), {"views": ("hflip",), "output_maps": ("temperature",)}


# Data, number of samples, options; where each rank's part ends.
CASES = {
    "clamp": (classes, 101, {}),
    "scoring, more data": (classes, 1500, {"max_passes": 4}),
    "nothing cached": (classes, 300, {"cache_bytes": 0, "grids": (1,), "output_maps": ("temperature",)}),
    "temperature": (classes, 101, {"method": "temperature"}),
    "dense": (dense, 101, {}),
    "views": (mirrored, 303, {"grids": (1,)}),
    "binary": (binary, 303, {"grids": (1,)}),
    "beta": (bent, 606, {"grids": ()}),
    "multilabel": (multilabel, 303, {"grids": (1,)}),
}
PARTS = {"51/50": (0.505, 1), "1/100": (0.01, 1), "all/none": (1, 1), "none/34/67": (0, 0.34, 1)}
# The hardest parts are tried with all data.
FEW = {"51/50": ("clamp", "temperature"), "all/none": ("clamp", "temperature", "multilabel")}


def fitted(case, parts=None):
    """The result in figures that can be compared, of this rank's part."""
    make, n, options = CASES[case]
    network, x, y, more = make(n)
    group, part = None, slice(None)
    if parts is not None:
        group, ends = dist.group.WORLD, [0, *(round(n * end) for end in PARTS[parts])]
        part = slice(ends[dist.get_rank()], ends[dist.get_rank() + 1])
    x, y = x[part], y[part]
    data = batches(x, y, 40) if len(x) else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = fit_clamp(network, data, process_group=group, **options, **more)
    return {
        "clamp": dict(result.clamp.state_dict()),
        "before": dict(result.before),
        "after": dict(result.after),
        "change": {name: change.value for name, change in result.change.items()},
        "reliability": [tuple(curve) for curve in result.reliability],
        "by_label": {} if result.by_label is None else {**result.by_label.before, **result.by_label.after},
        "n_samples": result.n_samples,
        "passes": result.passes if options.get("cache_bytes") != 0 else None,
        "candidates": [
            (
                c.name,
                c.n_parameters,
                c.achieved_gain,
                c.lm_statistic,
                c.expected_change,
                c.criterion,
                c.passes,
                c.refusal,
            )
            for c in result.candidates
        ],
        "reason": result.reason,
    }


def all_cases(parts):
    return {case: fitted(case, parts) for case in FEW.get(parts, CASES)}


@pytest.fixture(scope="module")
def alone():
    return {case: fitted(case) for case in CASES}


def assert_close(first, second, where=""):
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for name in first:
            assert_close(first[name], second[name], f"{where} {name}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for i, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_close(a, b, f"{where} {i}")
    elif isinstance(first, float | torch.Tensor):
        torch.testing.assert_close(
            torch.as_tensor(first), torch.as_tensor(second), rtol=1e-6, atol=1e-6, equal_nan=True,
            msg=lambda message: f"{where}: {message}",
        )  # fmt: skip
    else:
        assert first == second, where


@pytest.mark.slow
@pytest.mark.parametrize("parts", PARTS)
def test_ranks_with_parts_of_any_size_agree_with_one_process(alone, parts, tmp_path):
    for theirs in on_ranks(len(PARTS[parts]), tmp_path / "run", all_cases, parts):
        for case, values in theirs.items():
            assert_close(alone[case], values, case)


# What goes wrong on one rank


class Poisoned(SmallNet):
    """Fails at one of the calls on one rank."""

    def __init__(self, rank, at, error):
        super().__init__(2.0)
        self.rank, self.at, self.error, self.calls = rank, at, error, 0

    def forward(self, x):
        self.calls += 1
        if dist.get_rank() == self.rank and self.calls == self.at:
            raise self.error
        return super().forward(x)


class Torn(list):
    """A set whose last file is missing."""

    def __iter__(self):
        yield from super().__iter__()
        raise FileNotFoundError("part-7.tar")


def spoiled(kind, x, y):
    rank = dist.get_rank()
    if kind == "nan" and rank == 1:
        x[3] = float("nan")
    if kind == "label" and rank == 1:
        y[5] = 17
    data = batches(x, y, 50)
    if kind == "generator" and rank == 1:
        return iter(data)
    return Torn(data) if kind == "loader" and rank == 1 else data


def slip(what, n_batches):
    raise OSError("no such terminal")


# What one of two ranks was given in another way.
GIVEN = {
    "perturb_at": {"perturb_at": "nowhere"},
    "option": {"grids": (0,)},
    "keyword": {"gridz": (1,)},
    "progress": {"progress": slip},
    "settings": {"max_passes": 3},
}


def failure(kind):
    """Type, words and aftermath of what is raised on this rank."""
    network = SmallNet(2.0 + (kind == "weights") * dist.get_rank())
    if kind.startswith("call"):
        network = Poisoned(1, int(kind.split()[1]), MemoryError("no memory left"))
    if kind == "interrupt":
        network = Poisoned(1, 1, KeyboardInterrupt())
    if kind == "weights":
        network.linear.weight.data += dist.get_rank()
    if kind == "nan weights":
        network.linear.weight.data.fill_(torch.nan)
    if kind == "buffers" and dist.get_rank() == 1:
        network.register_buffer("cache", torch.zeros(3))
    true = images(100, seed=dist.get_rank())
    # Far enough off that a grid is stepped: the sixth call is in its second pass.
    x, y = true - 3 * SHIFT, sampled(SmallNet()(true).detach().double())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    options = {"output_maps": ("temperature",), **(GIVEN.get(kind, {}) if dist.get_rank() == 1 else {})}
    try:
        fit_clamp(network, spoiled(kind, x, y), process_group=dist.group.WORLD, **options)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - of any kind
        kept = all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
        return type(error).__name__, str(error), kept
    return None


FAILURES = {
    "nan": ("ValueError", "NaN or infinite logits for sample 3 of the part of the calibration set that rank 1 has"),
    "label": ("ValueError", "has the label 17, but the network has 4 classes"),
    "loader": ("FileNotFoundError", "part-7.tar"),
    "call 1": ("MemoryError", "no memory left"),
    "call 3": ("MemoryError", "no memory left"),
    "call 4": ("MemoryError", "no memory left"),
    "call 6": ("MemoryError", "no memory left"),
    "generator": ("TypeError", "which can be read once"),
    "perturb_at": ("ValueError", "no submodule 'nowhere'"),
    "option": ("ValueError", "`grids` must be a sequence"),
    "keyword": ("TypeError", "fit_clamp has no argument `gridz`"),
    "progress": ("OSError", "no such terminal"),
    "interrupt": ("KeyboardInterrupt", ""),
}


def all_failures():
    return {kind: failure(kind) for kind in [*FAILURES, "weights", "buffers", "settings", "nan weights"]}


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    return on_ranks(2, tmp_path_factory.mktemp("failures") / "run", all_failures)


@pytest.mark.parametrize("kind", FAILURES)
def test_what_goes_wrong_on_one_rank_is_raised_on_all(failures, kind):
    name, words = FAILURES[kind]
    other, its_own = (theirs[kind] for theirs in failures)
    assert its_own[0] == name
    assert words in its_own[1]
    assert other == ("RuntimeError", f"Rank 1 failed with {name}: {its_own[1]}".removesuffix(": "), True)
    assert its_own[2]


def test_weights_that_are_nan_everywhere_are_no_different_networks(failures):
    for rank, theirs in enumerate(failures):
        name, words, _ = theirs["nan weights"]
        assert name == "ValueError"
        assert "NaN or infinite logits for sample 0 of" in words
        assert f"that rank {rank} has" in words


@pytest.mark.parametrize("kind", ["weights", "buffers"])
def test_different_networks_are_refused_on_all_ranks(failures, kind):
    for theirs in failures:
        assert theirs[kind] == (
            "RuntimeError", "The ranks hold different networks: load the same weights on all of them.", True
        )  # fmt: skip


def test_different_settings_are_refused_on_all_ranks(failures):
    for theirs in failures:
        assert theirs["settings"] == (
            "ValueError", "`max_passes` is 6 on rank 0 and 3 on rank 1: pass the same on all.", True
        )  # fmt: skip


def warned():
    """What is raised on this rank where warnings are errors, which are given on the first alone."""
    warnings.simplefilter("error")
    logits = torch.eye(4)[torch.arange(100) % 4] * 3
    with pytest.raises(Exception, match="left as it is") as caught:
        fit_clamp(nn.Identity(), [(logits, logits.argmax(1))], method="temperature", process_group=dist.group.WORLD)
    return type(caught.value).__name__


def test_a_warning_that_is_an_error_is_one_on_all_ranks(tmp_path):
    assert on_ranks(2, tmp_path / "run", warned) == ["UserWarning", "RuntimeError"]


def with_statistics_of_its_own():
    """A batch normalisation whose running mean is another one on every rank."""
    norm = nn.BatchNorm2d(3)
    norm.running_mean += dist.get_rank() if dist.is_initialized() else 0
    network, part = nn.Sequential(norm, SmallNet(2.0)), slice(None)
    if dist.is_initialized():
        part = slice(dist.get_rank(), None, 2)
    _, x, y = shifted_images(200)
    group = dist.group.WORLD if dist.is_initialized() else None
    result = fit_clamp(network, batches(x[part], y[part]), method="temperature", process_group=group)
    return float(result.clamp.log_temperature), result.change, float(norm.running_mean[0])


def test_buffers_are_the_first_ranks_meanwhile_and_each_ranks_own_after(tmp_path):
    temperature, change, _ = with_statistics_of_its_own()
    for rank, (theirs, their_change, mean) in enumerate(on_ranks(2, tmp_path / "run", with_statistics_of_its_own)):
        assert theirs == pytest.approx(temperature, abs=1e-6)
        assert mean == rank
        # Items dealt out in turn are resampled as in one process.
        for name in change:
            assert their_change[name] == pytest.approx(change[name], abs=1e-6)


def sgd_on_ranks():
    with pytest.raises(ValueError, match='method="published" takes a step after every batch, so 2 ranks'):
        fit_clamp(SmallNet(), [], method="published", process_group=dist.group.WORLD)


def test_the_published_solver_is_refused_on_several_ranks(tmp_path):
    on_ranks(2, tmp_path / "run", sgd_on_ranks)


def repeats():
    """What is warned of where ranks have the set in orders of their own, parts of their own, or overlapping ones."""
    _, x, y = shifted_images(300)
    rank, generator = dist.get_rank(), torch.Generator().manual_seed(dist.get_rank())
    order = torch.randperm(300, generator=generator)
    tokens = torch.randint(3, (300, 2), generator=generator)
    embedded = nn.Sequential(nn.Embedding(3, 4), nn.Flatten(), nn.Linear(8, 4))
    torch.manual_seed(0)
    for parameter in embedded.parameters():
        nn.init.normal_(parameter)
    cases = {
        "order": (SmallNet(2.0), x[order], y[order]),
        "split": (SmallNet(2.0), x[order[:60]], y[order[:60]]),
        "parts": (SmallNet(2.0), x[rank::2], y[rank::2]),
        "equal by nature": (embedded, tokens, y),
    }
    said = {}
    for name, (network, inputs, target) in cases.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit_clamp(network, batches(inputs, target), method="temperature", process_group=dist.group.WORLD)
        said[name] = [str(each.message) for each in caught if "count more than once" in str(each.message)]
    return said


@pytest.mark.slow
def test_samples_that_several_ranks_read_are_said_on_the_first(tmp_path):
    first, second = on_ranks(2, tmp_path / "run", repeats)
    assert not any(second.values())
    assert "The ranks read 600 samples of the calibration set, of which only 300 differ" in first["order"][0]
    assert "read 120 samples" in first["split"][0]
    assert not first["parts"]
    assert not first["equal by nature"]


def alone_among_others():
    """The first rank alone fits, without a group: it must wait for nobody."""
    if dist.get_rank() == 0:
        _, x, y = shifted_images(100)
        return fit_clamp(SmallNet(2.0), batches(x, y), method="temperature").n_samples
    return None


def test_without_a_group_a_rank_fits_alone(tmp_path):
    assert on_ranks(2, tmp_path / "run", alone_among_others) == [100, None]


def collectives():
    """How many all-reduces a fit takes, and how many sums over samples it forms."""
    calls = {"all_reduce": 0, "sums": 0}
    reduce, total = dist.all_reduce, type(ALONE).total

    def counted(*args, **kwargs):
        calls["all_reduce"] += 1
        return reduce(*args, **kwargs)

    def summing(*args, **kwargs):
        calls["sums"] += 1
        return total(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted)
        patch.setattr(type(ALONE), "total", summing)
        fitted("clamp", "51/50")
    return calls


@pytest.mark.slow
def test_every_sum_is_one_all_reduce(tmp_path):
    for calls in on_ranks(2, tmp_path / "run", collectives):
        assert calls["all_reduce"] == calls["sums"] > 10
