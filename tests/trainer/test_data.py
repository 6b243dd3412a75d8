"""Which sets can be calibrated on, and which share samples with the training set."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from lightning_clamp import NeuralClamping
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
