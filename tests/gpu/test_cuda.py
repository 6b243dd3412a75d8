"""The Trainer's life on an accelerator: precision, compilation, NCCL. Skipped where there is none."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_clamp import CalibrationModule, NeuralClamping, calibrate, fit_clamp
from lightning_clamp.clamping import kept
from lightning_clamp.losses import ASLPMixin, Indexed, MarginAwareMixin
from tests.scenarios import (
    DenseNet,
    LitClassifier,
    Segmenter,
    batches,
    drawn,
    every_loss,
    images,
    loader,
    made,
    maps,
    sampled,
    shifted_images,
    train_loader,
    trainer,
    value_and_gradient,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

HELD_OUT = loader(1000, seed=30, size=250)
OPTIONS = {"output_maps": ("temperature",), "grids": (1,)}


def fitted(path, *, model=None, **options):
    callback = NeuralClamping(HELD_OUT, save_to=path, **OPTIONS)
    run, model = trainer(path, callback, **options), model or LitClassifier(lr=0.0)
    run.fit(model, train_loader())
    return run, model, callback


@pytest.mark.parametrize("precision", ["32-true", "64-true", "16-mixed", "bf16-mixed", "bf16-true", "16-true"])
def test_the_clamp_is_that_of_the_cpu_within_the_stated_tolerance(tmp_path, precision):
    _, _, expected = fitted(tmp_path / "cpu")
    run, model, callback = fitted(tmp_path / "cuda", accelerator="cuda", devices=1, precision=precision)
    dtype = torch.float64 if precision == "64-true" else torch.float32
    assert {value.dtype for value in callback.result.clamp.state_dict().values()} == {dtype}
    rel = 1e-3 if precision in ("32-true", "64-true") else 0.01
    assert float(callback.result.clamp.temperature) == pytest.approx(float(expected.result.clamp.temperature), rel=rel)
    for name in ("nll", "ece", "accuracy"):
        assert callback.result.after[name] == pytest.approx(expected.result.after[name], abs=0.005)
    module = CalibrationModule.from_checkpoint(callback.checkpoint_path, LitClassifier, map_location="cpu")
    assert module.clamp.log_temperature.device.type == "cpu"
    assert torch.cat(run.predict(model, HELD_OUT)).isfinite().all()


@pytest.mark.parametrize("kind", ["classes", "pixels", "one logit"])
def test_every_candidate_is_that_of_the_cpu(kind):
    """Output maps, grids and their curvature, with the default options."""
    if kind == "pixels":
        network, x = DenseNet(), images(200)
        y = sampled(network(x + 0.3).detach().double() / 2)
    else:
        network, x, y = shifted_images(2000)
    if kind == "one logit":
        network, y = nn.Sequential(network, nn.Linear(4, 1)), (y > 1).long()
    task = "binary" if kind == "one logit" else "multiclass"
    expected = fit_clamp(network, batches(x, y), task=task)
    there = fit_clamp(network.cuda(), [(a.cuda(), b.cuda()) for a, b in batches(x, y)], task=task)
    for one, other in zip(expected.candidates, there.candidates, strict=True):
        assert (one.name, one.refusal) == (other.name, other.refusal)
        if not one.refusal:
            assert other.criterion == pytest.approx(one.criterion, abs=1e-4)


def test_batches_kept_on_the_host_come_back_through_pinned_memory_with_the_same_bits(monkeypatch):
    """Those that there is room for on the device do not leave it."""
    pinned = []
    monkeypatch.setattr(kept, "_pinned", lambda value: pinned.append(value.pin_memory()) or pinned[-1])
    data = [(torch.randn(100, 3, 8, 8, device="cuda"), torch.arange(100, device="cuda")) for _ in range(20)]
    for room, n_pinned in ((2**30, 0), (0, 40)):
        monkeypatch.setattr(kept, "_free_on", lambda device, room=room: 4 * room)
        batches_kept = kept.KeptBatches(None)
        for inputs, target in data:
            batches_kept.add(inputs, target)
        for one, other in zip(data, batches_kept, strict=True):
            assert all(torch.equal(*pair) and pair[1].is_cuda for pair in zip(one, other, strict=True))
        assert len(pinned) == n_pinned
    assert all(value.is_pinned() for value in pinned)


def test_a_compiled_network(tmp_path):
    model = LitClassifier(lr=0.0)
    model.net = torch.compile(model.net)
    _, _, callback = fitted(tmp_path / "cuda", model=model, accelerator="cuda", devices=1)
    _, _, expected = fitted(tmp_path / "cpu")
    assert float(callback.result.clamp.temperature) == pytest.approx(float(expected.result.clamp.temperature), rel=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_several_devices_over_nccl(tmp_path):
    model = LitClassifier()
    alone = calibrate(trainer(tmp_path), model, HELD_OUT, **OPTIONS)
    several = trainer(tmp_path, accelerator="cuda", devices=2, strategy="ddp_spawn")
    together = calibrate(several, model, HELD_OUT, **OPTIONS)
    assert together.result.n_samples == alone.result.n_samples
    assert float(together.clamp.temperature) == pytest.approx(float(alone.clamp.temperature), rel=1e-3)


@every_loss
def test_losses_are_those_of_the_cpu(loss):
    logits, target = drawn(16, 5)
    value, gradient = value_and_gradient(loss, logits, target, ignore_index=2)
    for compiled in (loss, torch.compile(loss)):
        there = value_and_gradient(compiled, logits.cuda(), target.cuda(), ignore_index=2)
        torch.testing.assert_close([one.cpu() for one in there], [value, gradient])


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
def test_the_margin_aware_loss_trains_on_the_device(precision, tmp_path):
    found = {}
    for accelerator, kind in (("cpu", "32-true"), ("cuda", precision)):
        torch.manual_seed(0)
        run = trainer(tmp_path, max_steps=1, accelerator=accelerator, devices=1, precision=kind)
        run.fit(made(MarginAwareMixin, margin_clip=None), loader(100, 20))
        found[accelerator] = float(run.callback_metrics["train/loss"])
    assert found["cuda"] == pytest.approx(found["cpu"], rel=0.03)


def test_alpha_is_kept_on_the_device(tmp_path):
    model = made(ASLPMixin, Segmenter, aslp_warmup_epochs=1)
    train_set, val_set = (DataLoader(data, batch_size=4) for data in (Indexed(maps(8)), maps(2)))
    trainer(tmp_path, max_epochs=3, accelerator="cuda", devices=1).fit(model, train_set, val_set)
    assert (model.aslp_alphas.values > 0).all()
