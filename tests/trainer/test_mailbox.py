"""What worker processes leave for the one that started them: the clamp, whatever happens after, and no litter."""

import copy
import errno
import gc
import os
import pickle
import tempfile

import pytest
import torch

from lightning_clamp import NeuralClamping
from lightning_clamp._trainer import run
from lightning_clamp._trainer.mailbox import Mailbox
from tests.scenarios import LitClassifier, loader, train_loader, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork"),
    pytest.mark.filterwarnings("ignore:NeuralClamping failed. the model is calibrated"),
    pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders"),
]


@pytest.fixture(autouse=True)
def mail(tmp_path, monkeypatch):
    """The temporary folder of these processes."""
    folder = tmp_path / "mail"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


class Hooked(LitClassifier):
    """Raises when it is saved, on one rank."""

    def __init__(self, rank):
        super().__init__(lr=0.0)
        self.rank = rank

    def on_save_checkpoint(self, checkpoint):
        if self.global_rank == self.rank:
            raise RuntimeError("not this time")


def fitted(folder, model, devices=1):
    callback = NeuralClamping(loader(100, 30), save_to=folder / "out", output_maps=("temperature",), grids=())
    trainer(folder, callback, devices=devices, strategy="ddp_fork").fit(model, train_loader())
    return callback


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("rank", [0, 1])
def test_a_hook_that_raises_on_one_rank_costs_the_file_and_not_the_clamp(tmp_path, rank):
    callback = fitted(tmp_path, Hooked(rank), devices=2)
    assert float(callback.result.clamp.temperature) > 1
    assert callback.checkpoint_path is None
    assert not list(tmp_path.glob("out/*")), "nor is there a file that nobody knows of"


@pytest.mark.slow
@pytest.mark.ddp
def test_a_full_disk_costs_the_file_and_not_the_clamp(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run, "save", full)
    callback = fitted(tmp_path, LitClassifier(lr=0.0))
    assert float(callback.result.clamp.temperature) > 1
    assert callback.checkpoint_path is None


@pytest.mark.slow
@pytest.mark.ddp
def test_a_result_that_nobody_reads_leaves_nothing_behind(tmp_path, mail):
    callback = fitted(tmp_path, LitClassifier(lr=0.0))
    assert len(list(mail.glob("lightning_clamp-*"))) == 1
    del callback
    gc.collect()
    assert not list(mail.glob("lightning_clamp-*"))


def test_a_logger_that_fails_costs_neither_the_file_nor_its_path(tmp_path, monkeypatch):
    def failing(*_):
        raise ConnectionError("offline")

    monkeypatch.setattr("lightning_clamp.callback.log_result", failing)
    callback = NeuralClamping(loader(100, 30), save_to=tmp_path, output_maps=("temperature",), grids=())
    with pytest.warns(UserWarning, match="is calibrated, but not all of it is saved and logged. ConnectionError"):
        trainer(tmp_path, callback).fit(LitClassifier(), train_loader())
    assert os.path.exists(callback.checkpoint_path)


@pytest.mark.parametrize("made", [copy.deepcopy, lambda box: pickle.loads(pickle.dumps(box))])
def test_a_copy_that_goes_takes_nothing_along(mail, made):
    box = Mailbox()
    torch.save(1, box._path)
    copied = made(box)
    del copied
    assert len(list(mail.iterdir())) == 1
    del box
    assert not list(mail.iterdir())


def test_a_forked_mailbox_that_goes_leaves_it_to_its_parent(mail, monkeypatch):
    box = Mailbox()
    torch.save(1, box._path)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    del box
    assert len(list(mail.iterdir())) == 1
