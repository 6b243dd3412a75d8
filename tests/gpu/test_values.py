"""What is computed on an accelerator is what the CPU computes: maps, metrics, monitors, losses, recorded steps."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from examples.cuda_graph import RecordedSteps
from lightning_clamp import CalibrationModule, CalibrationMonitor, NeuralClamping, fit_clamp
from lightning_clamp.losses import FocalMixin, MarginAwareMixin, margin_aware_loss
from lightning_clamp.metrics import ByGroup, CalibrationTest, NegativeLogLikelihood
from tests.references import flat
from tests.scenarios import (
    LitClassifier,
    SmallNet,
    Validating,
    batches,
    calibrated_logits,
    images,
    loader,
    made,
    sampled,
    shifted_images,
    train_loader,
    trainer,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = "cuda"


def assert_same_clamp(logits, target, **options):
    """A fit on logits gives one clamp on both devices; returns it."""
    here = fit_clamp(nn.Identity(), batches(logits, target), grids=(), **options)
    there = fit_clamp(nn.Identity(), batches(logits.to(DEVICE), target.to(DEVICE)), grids=(), **options)
    assert here.chosen.name == there.chosen.name
    assert here.clamp.state_dict().keys() == there.clamp.state_dict().keys()
    x = logits[:200]
    moved = there.clamp.to("cpu").scale(x)
    torch.testing.assert_close(moved, here.clamp.scale(x), rtol=1e-3, atol=1e-3)
    assert there.after["nll"] == pytest.approx(here.after["nll"], abs=1e-6)
    return here.clamp


def test_a_matrix_map():
    logits, target = calibrated_logits(4000, 4)
    mixed = logits @ torch.tensor([[2.0, 0, 0, 1], [0, 1, 0, 0], [0, 0.8, 2, 0], [0, 0, 0, 1]], dtype=torch.float64)
    assert assert_same_clamp(mixed, target).class_matrix is not None


@pytest.mark.filterwarnings("ignore:The calibration set has no samples")
def test_a_vector_map_of_many_classes_with_one_absent_and_one_masked():
    logits, target = calibrated_logits(3000, 60)
    biased = 2 * logits + torch.linspace(-3, 3, 60)
    target[target == 7] = 8
    biased[:, 9] = -torch.inf
    target[target == 9] = 10
    assert assert_same_clamp(biased, target).class_scale is not None


def test_a_beta_map():
    logits, _ = calibrated_logits(4000, 2)
    margin = logits.diff(dim=1)
    target = sampled(torch.cat([1.7 * F.logsigmoid(-margin), 0.4 * F.logsigmoid(margin)], 1))
    assert assert_same_clamp(logits, target).skew is not None


def test_a_uniform_share():
    logits, target = calibrated_logits(4000, 5)
    generator = torch.Generator().manual_seed(7)
    wrong = torch.rand(4000, generator=generator) < 0.05
    target[wrong] = torch.randint(5, (int(wrong.sum()),), generator=generator)
    assert assert_same_clamp(3 * logits, target, output_maps=("temperature",)).uniform_share is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_outputs_in_half_precision(dtype):
    logits, target = calibrated_logits(2000, 5)
    assert_same_clamp((2 * logits).to(dtype), target)


def test_the_published_method():
    network, x, y = shifted_images(500)
    options = {"method": "published", "epochs": 2, "lr": 0.1}
    here = fit_clamp(network, batches(x, y), **options)
    there = fit_clamp(network.to(DEVICE), batches(x.to(DEVICE), y.to(DEVICE)), **options)
    assert there.after["nll"] == pytest.approx(here.after["nll"], abs=1e-3)


def test_batches_of_the_cpu_are_moved():
    network, x, y = shifted_images(1000)
    here = fit_clamp(network, batches(x, y), method="temperature")
    there = fit_clamp(network.to(DEVICE), batches(x, y), method="temperature")
    assert float(there.clamp.temperature) == pytest.approx(float(here.clamp.temperature), rel=1e-3)


def test_the_metrics_of_groups():
    logits, target = calibrated_logits(400)
    groups = torch.arange(400) % 3
    values = []
    for device in ("cpu", DEVICE):
        metric = ByGroup(NegativeLogLikelihood(), 4, min_samples=50).to(device)
        for part in torch.arange(400).split(90):
            metric.update(logits[part].to(device), target[part].to(device), groups[part].to(device))
        found, sizes = metric.compute()
        values.append((found.cpu(), sizes.cpu()))
    torch.testing.assert_close(*values, equal_nan=True)


def test_the_test_of_calibration():
    logits, target = calibrated_logits(600)
    found = []
    for device in ("cpu", DEVICE):
        metric = CalibrationTest(5).to(device)
        for part in torch.arange(600).split(90):
            metric.update(1.3 * logits[part].to(device), target[part].to(device))
        found.append(flat(metric.compute()).cpu())
    torch.testing.assert_close(*found)


def test_the_monitor(tmp_path):
    found = []
    for accelerator in ("cpu", DEVICE):
        torch.manual_seed(0)
        run = trainer(tmp_path, CalibrationMonitor(), accelerator=accelerator, devices=1)
        run.fit(Validating(lr=0.0), train_loader(), loader(260, 30, shift=False))
        found.append({name: float(value) for name, value in run.callback_metrics.items()})
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    assert "val/refined_nll" in found[0]


def test_what_cannot_be_calibrated_is_refused_before_training(tmp_path):
    model = LitClassifier()
    model.net = nn.Sequential(model.net, nn.Softmax(1))
    run = trainer(tmp_path, NeuralClamping(loader(300, 30), on_error="raise"), accelerator=DEVICE, devices=1)
    with pytest.raises(ValueError, match="returns probabilities"):
        run.fit(model, train_loader())
    assert run.global_step == 0


def test_a_calibrated_module_that_is_compiled():
    network, x, y = shifted_images(1000)
    result = fit_clamp(network, batches(x, y), grids=(1,), output_maps=("temperature",))
    module = CalibrationModule(network, result.clamp).eval()
    with torch.no_grad():
        expected = module(x)
        found = torch.compile(module.to(DEVICE))(x.to(DEVICE))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("weights", [{}, {"lambda_r": 0.0}, {"lambda_s": 0.0}], ids=str)
def test_the_margin_aware_loss_is_that_of_the_cpu(weights):
    target = sampled(SmallNet()(images(20)).detach().double())
    found = []
    for device in ("cpu", DEVICE):
        network = SmallNet(2.0, torch.float64).to(device)
        x = images(20, dtype=torch.float64).to(device)
        loss = margin_aware_loss(network, x, target.to(device), clip=None, mean=(0.1, 0.2, 0.3), std=0.5, **weights)
        loss.backward()
        found.append([loss.detach().cpu(), *(parameter.grad.cpu() for parameter in network.parameters())])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("mixin", "options"),
    [(None, {}), (FocalMixin, {}), (MarginAwareMixin, {"margin_clip": (-10.0, 10.0), "margin_mean": (0.1, 0.0, 0.2)})],
    ids=["plain", "focal", "margin-aware"],
)
def test_a_recorded_step_trains_as_an_ordinary_one(mixin, options, tmp_path):
    """A loss can be part of a CUDA graph: no number is read, and nothing is copied from the CPU; the last batch of an
    epoch is smaller and takes the ordinary way.
    """
    weights = []
    for strategy in ("auto", RecordedSteps(torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE))):
        torch.manual_seed(0)
        model = made(mixin, lr=0.1, **options) if mixin else LitClassifier(lr=0.1)
        run = trainer(tmp_path, accelerator=DEVICE, devices=1, strategy=strategy, max_epochs=2)
        run.fit(model, loader(70, 20, size=20))
        weights.append(torch.cat([parameter.detach().cpu().flatten() for parameter in model.parameters()]))
    assert run.global_step == 8
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)
    assert not torch.equal(weights[1], torch.cat([p.flatten() for p in LitClassifier().parameters()]).detach())


@pytest.mark.filterwarnings("ignore:The outputs say next to nothing", "ignore:The network was left as it is")
def test_memory_does_not_grow_with_the_images():
    """Images made in every pass, which are not kept: what is held besides is the labels and the logits of a block."""

    class Made:
        def __init__(self, n):
            self.n, self.target = n, torch.arange(n * 50, device=DEVICE) % 4

        def __iter__(self):
            generator = torch.Generator(DEVICE).manual_seed(0)
            for part in self.target.split(50):
                yield torch.randn(50, 3, 64, 64, generator=generator, device=DEVICE), part

    network = SmallNet().to(DEVICE)
    options = {"grids": (1,), "output_maps": ("temperature",), "max_passes": 2, "cache_bytes": 2**16}
    peaks = []
    for n in (4, 4, 40):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fit_clamp(network, Made(n), **options)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    kept = 36 * 50 * 3 * 64 * 64 * 4
    assert peaks[2] - peaks[1] < kept / 20
