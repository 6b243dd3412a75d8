"""Which sets can be calibrated on, and which share samples with the training set."""

import warnings
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from lightning_clamp import NeuralClamping, fit_clamp
from lightning_clamp._trainer.data import warn_if_training_data
from tests.scenarios import LitClassifier, loader, train_loader, trainer

X, Y = torch.randn(100, 3), torch.arange(100) % 2
DATA = TensorDataset(X, Y)


def part(*numbers, of=DATA):
    return Subset(of, range(*numbers))


SHARED = {
    "the same dataset": (DATA, DATA, "is the training set itself"),
    "subsets of one": (part(60), part(50, 100), "shares 10 samples"),
    "a subset of the training set": (part(30), DATA, "shares 30 samples"),
    "from the end": (Subset(DATA, [-1, -2]), Subset(TensorDataset(X, Y), [99]), "shares 1 samples"),
    "a subset of a subset": (part(10, of=part(40, 80)), part(45, 60), "shares 5 samples"),
    "the same tensors": (TensorDataset(X, Y), DATA, "shares 100 samples"),
    "overlapping slices": (TensorDataset(X[80:], Y[80:]), TensorDataset(X[:90], Y[:90]), "shares 10 samples"),
    "a subset of the same tensors": (part(20), Subset(TensorDataset(X, Y), torch.arange(10, 40)), "shares 10 samples"),
    "a list of batches": ([*zip(X[50:].split(10), Y[50:].split(10), strict=True)], part(60), "shares 10 samples"),
    "one of several": (part(30), {"a": DataLoader(part(30, 60)), "b": DataLoader(part(25, 50))}, "shares 5 samples"),
    "one of a combined loader": (part(7), CombinedLoader([DataLoader(DATA)]), "shares 7 samples"),
}  # fmt: skip
APART = {
    "parts of one": (part(50), part(50, 100)),
    "slices of the same tensors": (TensorDataset(X[:50], Y[:50]), TensorDataset(X[50:], Y[50:])),
    "copies": (TensorDataset(X.clone(), Y), DATA),
    "sparse": (TensorDataset(torch.eye(9).to_sparse()), TensorDataset(torch.eye(9).to_sparse())),
    "nothing to compare": ([{"x": X}], None),
}


def looked_at(calibration, training):
    calibration = calibration if isinstance(calibration, list) else DataLoader(calibration, 10)
    training = DataLoader(training, 10) if isinstance(training, torch.utils.data.Dataset) else training
    warn_if_training_data(calibration, SimpleNamespace(train_dataloader=training, world_size=1))


@pytest.mark.parametrize("case", SHARED)
def test_samples_that_are_trained_on_are_seen(case):
    calibration, training, message = SHARED[case]
    with pytest.warns(UserWarning, match=f"The calibration set {message}"):
        looked_at(calibration, training)


@pytest.mark.parametrize("case", APART)
def test_samples_apart_are_not_complained_of(case):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        looked_at(*APART[case])


class Once(IterableDataset):
    """Samples that are gone once they were read."""

    def __init__(self, dataset):
        self.samples = iter([dataset[i] for i in range(len(dataset))])

    def __iter__(self):
        return self.samples


class Restarting(Once):
    """As streams of others do it: an iterator of its own that starts anew when it is asked for."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        self.samples = (self.dataset[i] for i in range(len(self.dataset)))
        return self

    def __next__(self):
        return next(self.samples)


def test_a_stream_that_starts_anew_is_read_in_full(tmp_path):
    held_out = loader(101, seed=30)
    callback = NeuralClamping(DataLoader(Restarting(held_out.dataset), 10), method="temperature", cache_bytes=0)
    trainer(tmp_path, callback).fit(LitClassifier(lr=0.0), train_loader())
    assert callback.result.n_samples == 101


WRONG = {
    "read once": (DataLoader(Once(DATA), 10), "got DataLoader, which can be read once"),
    "a dataset": (DATA, r"got TensorDataset: pass DataLoader\(dataset, batch_size"),
    "samples": (DataLoader(DATA, batch_size=None), "cannot use the calibration set.*: if the loader yields samples"),
}


@pytest.mark.parametrize("case", WRONG)
def test_sets_that_cannot_be_used_are_refused_before_training(tmp_path, case):
    data, message = WRONG[case]
    with pytest.raises(MisconfigurationException, match=message):
        trainer(tmp_path, NeuralClamping(data)).fit(LitClassifier(), train_loader())


class Spent(Restarting):
    """Another that goes on where it was left."""

    def __init__(self, dataset):
        self.samples = iter([dataset[i] for i in range(len(dataset))])

    def __iter__(self):
        return self


@pytest.mark.parametrize("method", ["temperature", "clamp"])
def test_a_stream_that_goes_on_where_it_was_left_is_told(tmp_path, method):
    data = DataLoader(Spent(loader(101, seed=30).dataset), 10)
    callback = NeuralClamping(data, method=method, on_error="raise")
    with pytest.raises(MisconfigurationException, match="can be read once, and its first batch was taken to try it"):
        trainer(tmp_path, callback).fit(LitClassifier(lr=0.0), train_loader())
    # Without a try nothing is lost.
    data = DataLoader(Spent(loader(101, seed=30).dataset), 10)
    assert fit_clamp(LitClassifier(), data, method=method).n_samples == 101


class CountedDataset(TensorDataset):
    """Counts how often its samples are read."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("cache_bytes", [None, 2**18, 2**16])
def test_loaders_are_read_once_where_there_is_room_and_else_in_every_pass(tmp_path, cache_bytes):
    # 200 images of 768 bytes are 150 KB.
    data = CountedDataset(*loader(200, seed=30).dataset.tensors)
    part = [DataLoader(Subset(data, range(120)), 50), DataLoader(Subset(data, range(120, 200)), 50)]
    callback = NeuralClamping(part, grids=(1,), output_maps=("temperature",), cache_bytes=cache_bytes)
    trainer(tmp_path, callback).fit(LitClassifier(lr=0.0), train_loader())
    # The first batch of each loader is tried before training.
    assert data.reads - 100 == 200 * (callback.result.passes if cache_bytes == 2**16 else 1)
    assert callback.result.passes > 1


class Augmenting(LitClassifier):
    """Draws for every batch that is transferred, and remembers what it was."""

    drawn: ClassVar[list[Tensor]] = []

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        if not self.trainer.validating:
            return batch
        self.drawn.append(x + 0.1 * torch.randn_like(x))
        return self.drawn[-1], y


def test_all_passes_see_the_one_draw_of_what_is_random(tmp_path):
    module = Augmenting(lr=0.0)
    module.drawn.clear()
    callback = NeuralClamping(loader(200, seed=30), grids=(1,), output_maps=("temperature",))
    trainer(tmp_path, callback).fit(module, train_loader())
    assert len(module.drawn) == 1 + 2
    y = torch.cat([y for _, y in loader(200, seed=30)])
    again = fit_clamp(module.net, [(torch.cat(module.drawn[1:]), y)], grids=(1,), output_maps=("temperature",))
    assert callback.result.passes == 2
    assert callback.result.candidates[-1].lm_statistic == pytest.approx(again.candidates[-1].lm_statistic, rel=1e-5)
