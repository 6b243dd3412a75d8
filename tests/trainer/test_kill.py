"""The process is killed at random points of calibrating and saving: what was there before is still there, and whole."""

import multiprocessing
import os
import random
import signal
import time
import warnings
from unittest import mock

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_clamp import CalibrationModule, NeuralClamping, calibrate
from lightning_clamp._digest import fingerprint
from lightning_clamp._trainer import run
from lightning_clamp.checkpoint import calibrated_checkpoint
from tests.scenarios import LitClassifier, loader, train_loader, trainer

# Kills that must hit either stage, and at most how many are tried until they do: a busy machine is not where it was
# when the stages were timed.
ENOUGH, MOST = 8, 200
CALIBRATION = loader(400, seed=30)
OPTIONS = {"output_maps": ("temperature",), "grids": (1,), "max_passes": 3}


class Heavy(LitClassifier):
    """With enough weights that writing them takes a while."""

    def __init__(self, lr: float = 1e-3, temperature: float = 2.0) -> None:
        super().__init__(lr, temperature)
        self.register_buffer("ballast", torch.arange(2_000_000.0))


class Reporting(NeuralClamping):
    """Tells the parent when calibration starts, when it begins to save, and when it is done."""

    def __init__(self, pipe, *args, **options):
        super().__init__(*args, **options)
        self.pipe = pipe

    def on_train_end(self, trainer, pl_module):
        self.pipe.send("calibrating")
        with mock.patch.object(run, "calibrated_checkpoint", self.saving):
            super().on_train_end(trainer, pl_module)
        self.pipe.send("done")

    def saving(self, *args):
        self.pipe.send("saving")
        return calibrated_checkpoint(*args)


def train(folder, pipe):
    """A resumed training of one more epoch that saves, and then calibrates over an older calibrated file."""
    warnings.simplefilter("ignore")
    # That the newest file has a name of its own would make it easy: here it has that of the older one.
    callback = Reporting(pipe, CALIBRATION, **OPTIONS)
    once = trainer(
        folder, callback, ModelCheckpoint(folder, filename="trained", save_last=True, enable_version_counter=False)
    )
    once.fit(Heavy(), train_loader())


def started(folder):
    """A forked child and the moments it tells of."""
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=train, args=(folder, there))
    child.start()
    there.close()
    return child, here


def moments(pipe):
    return {pipe.recv(): time.perf_counter() for _ in range(3)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_kill_loses_nothing(tmp_path, capsys):
    child, pipe = started(tmp_path)
    at = moments(pipe)
    child.join()
    calibrating, saving = at["saving"] - at["calibrating"], at["done"] - at["saving"]
    (older,) = tmp_path.glob("*-calibrated.ckpt")
    expected = CalibrationModule.from_checkpoint(older, Heavy)
    draw = random.Random(0)
    counts = {"in calibration": 0, "in saving": 0, "after all": 0, "half-written left": 0}
    kills = 0
    while min(counts["in calibration"], counts["in saving"]) < ENOUGH and kills < MOST:
        kills += 1
        stage = "calibrating" if counts["in calibration"] < counts["in saving"] else "saving"
        child, pipe = started(tmp_path)
        while (told := pipe.recv()) != stage:
            pass
        time.sleep(draw.uniform(0, calibrating if stage == "calibrating" else saving))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        told = [stage]
        try:
            while True:
                told.append(pipe.recv())
        except EOFError:
            counts[{"calibrating": "in calibration", "saving": "in saving", "done": "after all"}[told[-1]]] += 1
        for temporary in tmp_path.glob("*.tmp"):
            counts["half-written left"] += temporary.stat().st_mtime > 0
            # As if a day had passed: who saves next removes it.
            os.utime(temporary, (0, 0))
        # The calibrated file is the older one or the new one, and whole; so is what training saved.
        kept = CalibrationModule.from_checkpoint(older, Heavy)
        assert fingerprint(kept) == fingerprint(expected)
        for name in ("trained.ckpt", "last.ckpt"):
            state = torch.load(tmp_path / name, weights_only=True)["state_dict"]
            assert torch.equal(state["ballast"], expected.network.ballast)
    with capsys.disabled():
        print(f"\n{kills} kills: {counts}, nothing lost")  # noqa: T201
    assert min(counts["in calibration"], counts["in saving"]) == ENOUGH
    # Resumed: the training that was killed needs no training, and is calibrated to the same clamp.
    model = Heavy.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    resumed = calibrate(trainer(tmp_path), model, CALIBRATION, save_to=older, **OPTIONS)
    assert torch.equal(resumed.clamp.log_temperature, expected.clamp.log_temperature)
    assert not list(tmp_path.glob("*.tmp"))
