"""Batches that are kept: the same bits as read again, in their place, and never more than may be."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_clamp import fit_clamp
from lightning_clamp.clamping import kept
from lightning_clamp.clamping.kept import KeptBatches, free_host_memory
from tests.scenarios import SmallNet, shifted_images

OPTIONS = {"grids": (1,), "output_maps": ("temperature",)}


class Loader:
    """Batches that are made anew, or in one buffer; counts its reads."""

    def __init__(self, x, y, *, wrap=lambda x, y: (x, y), buffered=False, size=100):
        self.x, self.y, self.wrap, self.size = x, y, wrap, size
        self.buffer = torch.empty(size, *x.shape[1:]) if buffered else None
        self.reads = 0

    def __iter__(self):
        self.reads += 1
        for x, y in zip(self.x.split(self.size), self.y.split(self.size), strict=True):
            yield self.wrap(x.clone() if self.buffer is None else self.buffer[: len(x)].copy_(x), y.clone())


class InPlace(nn.Module):
    """Changes its input."""

    def __init__(self):
        super().__init__()
        self.net = SmallNet(2.0)

    def forward(self, x):
        return self.net(x.mul_(2).sub_(0.1).div_(2).add_(0.05))


class TwoInputs(nn.Module):
    """Of images, and a number that is added."""

    def __init__(self):
        super().__init__()
        self.net = SmallNet(2.0)

    def forward(self, image, extra):
        return self.net(image + extra.mul_(1)[:, None, None, None])


def named(x, y):
    return {"image": x, "extra": torch.zeros(len(x)), "label": y, "path": ["a.jpg"] * len(x)}


CASES = {
    "a pair": (SmallNet(2.0), {}, {}),
    "one buffer for all": (SmallNet(2.0), {"buffered": True}, {}),
    "a network that changes its input": (InPlace(), {}, {}),
    "named, with strings": (
        TwoInputs(),
        {"wrap": named},
        {"batch_keys": (["image", "extra"], "label"), "perturb_at": "net"},
    ),
    "an empty batch": (SmallNet(2.0), {"wrap": lambda x, y: (x[: 100 * (y[0] > 0)], y[: 100 * (y[0] > 0)])}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_kept_or_read_again_the_bits_are_the_same(case):
    network, made, options = CASES[case]
    _, x, y = shifted_images(600)
    loaders = [Loader(x, y, **made) for _ in range(2)]
    # Logits of 600 rows are 9.6 KB, and their labels 4.8 KB; the images are 461 KB.
    once, again = (
        fit_clamp(network, data, cache_bytes=size, **options, **OPTIONS)
        for data, size in zip(loaders, (None, 2**15), strict=True)
    )
    assert loaders[0].reads == 1
    assert loaders[1].reads == again.passes == once.passes > 2
    assert torch.equal(once.clamp.perturbation, again.clamp.perturbation)
    assert [one.criterion for one in once.candidates] == [one.criterion for one in again.candidates]
    assert once.after == again.after


def test_a_network_that_changes_its_input_is_fitted_as_any_other_and_leaves_the_data_alone():
    _, x, y = shifted_images(600)
    data = [(x.clone(), y)]
    result = fit_clamp(InPlace(), data, **OPTIONS)
    plain = fit_clamp(SmallNet(2.0), [(x, y)], **OPTIONS)
    torch.testing.assert_close(result.clamp.perturbation, plain.clamp.perturbation, rtol=0, atol=1e-3)
    assert torch.equal(data[0][0], x)


def test_epochs_of_the_published_method_draw_anew():
    _, x, y = shifted_images(200)
    data = Loader(x, y)
    fit_clamp(SmallNet(2.0), data, method="published", epochs=3)
    assert data.reads == 1 + 3 + 1


@pytest.mark.slow
def test_a_loader_with_workers_is_read_once():
    _, x, y = shifted_images(200)
    result = fit_clamp(SmallNet(2.0), DataLoader(TensorDataset(x, y), 50, num_workers=1), grids=(1,))
    assert result.n_samples == 200


def test_what_a_pass_that_broke_off_has_kept_is_let_go_of():
    kept = KeptBatches(None)
    for _ in range(2):
        kept.start()
        kept.add(torch.ones(2), torch.ones(2))
    kept.complete()
    assert len(list(kept)) == 1


def kept_of(limit, *sizes, **options):
    batches = KeptBatches(limit, **options)
    for size in sizes:
        batches.add(torch.zeros(size, dtype=torch.uint8), torch.zeros(0))
    batches.complete()
    return batches


def test_what_cannot_be_pinned_is_sent_all_the_same(monkeypatch):
    def fail(value):
        raise RuntimeError("out of memory")

    value = torch.arange(3)
    monkeypatch.setattr(torch.Tensor, "pin_memory", fail)
    assert kept._pinned(value) is value
    assert kept._sent(value, torch.device("cpu")) is value


def test_all_are_kept_or_none():
    assert [len(x) for x, _ in kept_of(100, 40, 60)] == [40, 60]
    over = kept_of(100, 40, 61, 1)
    assert not over.is_complete
    assert not list(over)
    assert not kept_of(0, 0).is_complete


def test_by_default_a_quarter_of_what_is_free_is_kept_and_ranks_share_it(monkeypatch):
    monkeypatch.setattr(kept, "free_host_memory", lambda: 400)
    assert kept_of(None, 60, 40).is_complete
    assert not kept_of(None, 60, 41).is_complete
    assert kept_of(None, 50, n_ranks=2).is_complete
    assert not kept_of(None, 51, n_ranks=2).is_complete


def test_what_fills_the_device_goes_to_the_host(monkeypatch):
    monkeypatch.setattr(kept, "free_host_memory", lambda: 400)
    monkeypatch.setattr(kept, "_free_on", lambda device: 200)
    assert kept_of(None, 40, 60, 10, 40).is_complete
    assert not kept_of(None, 40, 60, 10, 41).is_complete
    # A size that is given is that of all of them.
    assert kept_of(70, 50, 20).is_complete
    assert not kept_of(70, 50, 21).is_complete


def grouped(tmp_path, controllers, inner, limits):
    """Control groups from the outermost in: limit, use, and file cache."""
    own = tmp_path / "own"
    own.write_text(f"3:cpu:/else\n{'4' if controllers else '0'}:{controllers}:{inner}\n")
    folder = tmp_path / "groups" / controllers
    names = kept._NAMES[controllers]
    for name, values in limits.items():
        group = folder / name
        group.mkdir(parents=True, exist_ok=True)
        for file, value in zip(names[:2], values, strict=False):
            (group / file).write_text(f"{value}\n")
        (group / "memory.stat").write_text(f"anon 5\n{names[2]} {values[2]}\n")
    return kept._free_in_groups(tmp_path / "groups", own)


@pytest.mark.parametrize("controllers", ["", "memory"])
def test_a_container_has_what_is_left_of_its_limits(tmp_path, controllers):
    limits = {".": ("max" if not controllers else 10**18, 900, 0), "a": (1000, 900, 50), "a/b": (600, 590, 5)}
    left = grouped(tmp_path, controllers, "/a/b", limits)
    assert left[:2] == [15, 150]
    assert min(left) == 15


def test_what_is_free_here_is_known():
    assert 2**20 < free_host_memory() < 2**50
