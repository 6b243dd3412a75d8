"""A Trainer with several processes, by every launcher: the clamp of one process, and the state where the user is."""

import atexit
import os
import socket
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import distributed as dist
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_clamp import CalibrationModule, Clamp, NeuralClamping, calibrate
from lightning_clamp._trainer.devices import take_group_down_at_exit
from tests.scenarios import LitClassifier, Validating, loader, trainer

pytestmark = pytest.mark.ddp

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:It is recommended to use `self.log"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    # Python's and torch's, about forks of a process that has threads; nothing here uses them in the children.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork"),
]


class Normalised(Validating):
    """With the statistics of its own batches on every rank; weights that stay as they are."""

    def __init__(self):
        super().__init__(lr=0.0)
        self.norm = nn.BatchNorm2d(3, affine=False, momentum=0.01)

    def forward(self, x):
        return super().forward(self.norm(x))


def fitted(path, n, *, strategy="ddp_fork", model=None, data=(), callback=None, **options):
    path.mkdir(exist_ok=True)
    callback = callback or NeuralClamping(loader(301, seed=30), output_maps=("temperature",), grids=(1, 2))
    model = model or LitClassifier(lr=0.0)
    run = trainer(path, callback, ModelCheckpoint(path), devices=n, strategy=strategy if n > 1 else "auto", **options)
    run.fit(model, *(data or [loader(100, seed=20, shift=False)]))
    return run, model, callback


def assert_same(first, second):
    """Clamp, candidates and metrics."""
    for name, value in first.clamp.state_dict().items():
        torch.testing.assert_close(second.clamp.state_dict()[name], value, rtol=1e-6, atol=1e-6)
    assert first.n_samples == second.n_samples
    for a, b in zip(first.candidates, second.candidates, strict=True):
        assert a.name == b.name
        assert b.criterion == pytest.approx(a.criterion, abs=1e-6)
    for when in ("before", "after"):
        assert getattr(second, when) == pytest.approx(getattr(first, when), abs=1e-6)
    for name, interval in first.change.items():
        assert second.change[name] == pytest.approx(interval, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3])
def test_the_result_of_one_process_is_back_in_the_main_process(tmp_path, n):
    _, _, alone = fitted(tmp_path / "alone", 1)
    run, model, callback = fitted(tmp_path / "together", n)
    assert_same(alone.result, callback.result)
    assert float(run.callback_metrics["calibration/temperature"]) == pytest.approx(
        float(callback.result.clamp.temperature)
    )
    module = CalibrationModule.from_checkpoint(callback.checkpoint_path, LitClassifier)
    with pytest.raises(RuntimeError, match="was trained in other processes"):
        callback.calibrated_module()
    data = loader(60, seed=53)
    expected = run.test(module, data, verbose=False)
    clamped = run.test(model, data, verbose=False)
    assert (
        clamped[0]["test_nll"]
        < trainer(tmp_path, devices=n, strategy="ddp_fork").test(model, data, verbose=False)[0]["test_nll"]
    )
    assert expected[0]["calibrated/nll"] < 1


class Shipping(LitClassifier):
    """Defined where spawned processes can import it; says what each rank predicts with."""

    def __init__(self, witness):
        super().__init__(lr=0.0)
        self.witness = witness

    def setup(self, stage):
        # Functions registered earlier run later. The test that follows the fit never calibrates.
        if dist.is_initialized():
            atexit.register(self.look)
        if self.trainer.state.fn == "test":
            take_group_down_at_exit()

    def look(self):
        self.witness.with_suffix(f".{self.global_rank}").write_text(f"group at exit: {dist.is_initialized()}")

    def on_test_epoch_end(self):
        self.log("clamped", float(bool(self._forward_hooks)), sync_dist=True)


@pytest.mark.slow
def test_spawned_processes_leave_their_result_behind_and_end_in_order(tmp_path):
    run, model, callback = fitted(tmp_path / "run", 2, strategy="ddp_spawn", model=Shipping(tmp_path / "exit"))
    assert [path.read_text() for path in tmp_path.glob("exit.*")] == 2 * ["group at exit: False"]
    # Into one process, as every rank takes the model along in the same way.
    run = trainer(tmp_path, callback, devices=1, strategy="ddp_spawn")
    (metrics,) = run.test(model, loader(60, seed=53), verbose=False)
    assert metrics["clamped"] == 1.0
    _, _, alone = fitted(tmp_path / "alone", 1)
    assert_same(alone.result, callback.result)
    assert callback.checkpoint_path.startswith(str(tmp_path / "run"))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def on_node(rank, port, folder):
    """A process on a host of its own, which torchrun tells where it is by these variables."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank),
        "GROUP_RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none",
    }  # fmt: skip
    callback = NeuralClamping(loader(301, seed=30), output_maps=("temperature",), grids=(1,), save_to=False)
    run = trainer(folder / f"node-{rank}", callback, num_nodes=2, devices=1, strategy="ddp")
    run.fit(LitClassifier(lr=0.0), loader(100, seed=20, shift=False))
    assert run.node_rank == run.global_rank == rank
    content = {"clamp": callback.result.clamp.state_dict(), "n_samples": callback.result.n_samples}
    torch.save(content, folder / f"{rank}.pt")


@pytest.mark.slow
def test_two_nodes_fit_the_clamp_of_one(tmp_path):
    torch.multiprocessing.start_processes(on_node, (free_port(), tmp_path), nprocs=2, start_method="fork")
    callback = NeuralClamping(loader(301, seed=30), output_maps=("temperature",), grids=(1,), save_to=False)
    _, _, alone = fitted(tmp_path / "alone", 1, callback=callback)
    for rank in (0, 1):
        theirs = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert theirs["n_samples"] == 301
        for name, value in alone.result.clamp.state_dict().items():
            torch.testing.assert_close(theirs["clamp"][name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:NeuralClamping will calibrate on the validation set")
def test_the_validation_set_is_read_without_lightnings_repeats(tmp_path):
    """51 samples that Lightning pads to 26 and 26."""
    data = [loader(100, seed=20, shift=False), loader(51, seed=44, size=10)]
    for n in (2, 3):
        callback = NeuralClamping(method="temperature")
        fitted(tmp_path / str(n), n, model=Validating(lr=0.0), data=data, callback=callback)
        assert callback.result.n_samples == 51


@pytest.mark.slow
def test_rank_0s_batch_statistics_are_calibrated_and_all_ranks_are_clamped(tmp_path):
    run, _, callback = fitted(tmp_path / "run", 2, model=Normalised())
    module = CalibrationModule.from_checkpoint(callback.checkpoint_path, Normalised)
    content = torch.load(callback.checkpoint_path, weights_only=True)
    trained = torch.load(run.checkpoint_callback.best_model_path, weights_only=True)
    for name in ("norm.running_mean", "norm.running_var"):
        assert torch.equal(content["state_dict"][name], trained["state_dict"][name])
    x, y = (torch.cat(parts) for parts in zip(*loader(301, seed=30), strict=True))
    assert float(nn.functional.cross_entropy(module(x), y)) == pytest.approx(callback.result.after["nll"], abs=1e-5)


class OwnStream(IterableDataset):
    """Deals its samples out by itself, unevenly."""

    def __init__(self):
        self.pairs = list(zip(*loader(301, seed=30).dataset.tensors, strict=True))

    def __iter__(self):
        if not dist.is_initialized():
            return iter(self.pairs)
        return iter(self.pairs[:40] if dist.get_rank() == 0 else self.pairs[40:])


@pytest.mark.slow
def test_an_iterable_set_that_deals_itself_out_is_read_as_it_is(tmp_path):
    results = []
    for n in (1, 2):
        callback = NeuralClamping(DataLoader(OwnStream(), 50), output_maps=("temperature",), grids=(1,))
        fitted(tmp_path / str(n), n, callback=callback)
        results.append(callback.result)
    assert [result.n_samples for result in results] == [301, 301]
    assert float(results[0].clamp.log_temperature) == pytest.approx(float(results[1].clamp.log_temperature), abs=1e-6)


class FailingOnOne(LitClassifier):
    """One rank cannot go on after training."""

    def forward(self, x):
        if not self.training and self.trainer.global_rank == 1:
            raise MemoryError("no memory left")
        return super().forward(x)


@pytest.mark.slow
def test_a_rank_that_fails_costs_the_clamp_and_no_rank_hangs(tmp_path):
    callback = NeuralClamping(loader(301, seed=30))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run, _, _ = fitted(tmp_path / "run", 2, model=FailingOnOne(lr=0.0), callback=callback)
    assert run.state.finished
    assert callback.result is None
    with pytest.raises(Exception, match="MemoryError: no memory left"):
        fitted(tmp_path / "raised", 2, model=FailingOnOne(lr=0.0), callback=NeuralClamping(
            loader(301, seed=30), on_error="raise"
        ))  # fmt: skip


class Torn(list):
    """A list of batches that cannot be read to its end on one rank."""

    def __init__(self, batches, where):
        super().__init__(batches)
        self.where = where

    def fail(self, where):
        if where == self.where and dist.is_initialized() and dist.get_rank() == 1:
            raise FileNotFoundError("part-7.tar")

    def __iter__(self):
        self.fail("start")
        first, *more = super().__iter__()
        yield first
        self.fail("second batch")
        yield from more

    def __len__(self):
        self.fail("length")
        return super().__len__()


class TornProvider(LitClassifier):
    """Brings its calibration set along."""

    def __init__(self, where):
        super().__init__(lr=0.0)
        self.data = Torn(loader(301, seed=30), where)

    def calibration_dataloader(self):
        self.data.fail("hook")
        return self.data


@pytest.mark.slow
@pytest.mark.parametrize("where", ["hook", "start", "second batch", "length"])
def test_a_refit_whose_data_one_rank_cannot_read_is_given_up_on_all(tmp_path, where):
    callback = NeuralClamping(other_weights="refit", method="temperature")
    run = trainer(tmp_path, callback, devices=2, strategy="ddp_fork")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (metrics,) = run.test(TornProvider(where), loader(60, seed=53), verbose=False)
    assert metrics["test_nll"] > 0


def test_the_published_solver_is_refused_before_training(tmp_path):
    with pytest.raises(Exception, match='method="published" takes a step after every batch, so 2 ranks'):
        fitted(tmp_path / "run", 2, callback=NeuralClamping(loader(301, seed=30), method="published", epochs=1))


@pytest.mark.slow
def test_one_rank_logs_and_saves(tmp_path):
    logger = CSVLogger(tmp_path / "csv")
    _, _, callback = fitted(tmp_path / "run", 2, logger=logger, log_every_n_steps=1)
    (written,) = (tmp_path / "csv").rglob("metrics.csv")
    lines = written.read_text().splitlines()
    assert sum("calibration/temperature" in line for line in lines) == 1
    assert [path.name for path in (tmp_path / "run").glob("*calibrated*")] == [Path(callback.checkpoint_path).name]


@pytest.mark.slow
@pytest.mark.parametrize(("n", "strategy"), [(2, "ddp_fork"), (1, "ddp_spawn")])
def test_a_model_that_was_trained_earlier_is_calibrated_in_other_processes(tmp_path, n, strategy):
    model, options = LitClassifier(), {"output_maps": ("temperature",), "grids": (1,)}
    alone = calibrate(trainer(tmp_path), model, loader(301, seed=30), **options)
    several = trainer(tmp_path, devices=n, strategy=strategy)
    together = calibrate(several, model, loader(301, seed=30), save_to=tmp_path / "a-calibrated.ckpt", **options)
    assert_same(alone.result, together.result)
    x = loader(20, seed=3).dataset.tensors[0]
    torch.testing.assert_close(together(x), alone(x))
    again = CalibrationModule.from_checkpoint(tmp_path / "a-calibrated.ckpt", LitClassifier)
    assert torch.equal(again(x), together(x))
    assert isinstance(several, Trainer)


def test_whether_a_clamp_holds_does_not_depend_on_the_number_of_processes(tmp_path):
    data, found = loader(300, seed=41, size=50), []
    for n in (1, 2):
        module = CalibrationModule(LitClassifier(), Clamp(log_temperature=0.2))
        run = trainer(tmp_path, devices=n, strategy="ddp_fork" if n > 1 else "auto")
        found += run.test(module, data, verbose=False)
    assert found[1] == pytest.approx(found[0], rel=1e-5, abs=1e-6)
    assert found[0]["calibrated/p"] < 0.05
