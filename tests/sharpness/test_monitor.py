"""The monitor: the numbers of the metrics and of the sharpness, as training goes on and does not notice."""

import json
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_clamp.metrics import expected_calibration_error, exponential_margin_tail
from lightning_clamp.sharpness import SharpnessMonitor
from tests.scenarios import LitClassifier, loader, trainer


def test_the_monitor_measures_and_draws_and_training_does_not_notice(tmp_path):
    ends = []
    for with_monitor in (True, False):
        torch.manual_seed(0)
        model = LitClassifier(lr=0.1)
        monitor = SharpnessMonitor(loader(60, 3), every_n_epochs=2)
        run = trainer(tmp_path, *[monitor] * with_monitor, max_epochs=4)
        run.fit(model, loader(200, 1))
        ends.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
        if with_monitor:
            assert [one["epoch"] for one in monitor.history] == [2, 4]
            last = monitor.history[-1]
            inputs, target = next(iter(loader(60, 3)))
            logits = model(inputs).detach()
            assert last["margin_tail"] == pytest.approx(float(exponential_margin_tail(logits, target)), rel=1e-5)
            assert last["ece"] == pytest.approx(float(expected_calibration_error(logits, target)), rel=1e-5)
            assert last["sharpness"] > 0
            assert run.callback_metrics["monitor/sharpness"] == pytest.approx(last["sharpness"])
            assert [panel.get_ylabel() for panel in monitor.plot().axes] == ["ECE", "margin tail", "sharpness"]
    assert torch.equal(*ends)


def test_a_margin_tail_beyond_float32_is_measured(tmp_path):
    network, monitor = LitClassifier(lr=0.0, temperature=100.0), SharpnessMonitor(loader(60, 3))
    trainer(tmp_path, monitor).fit(network, loader(20, 1))
    inputs, target = next(iter(loader(60, 3)))
    expected = exponential_margin_tail(network(inputs).detach(), target)
    assert 1e39 < expected < torch.inf
    assert monitor.history[0]["margin_tail"] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["compiled", "bf16-true"])
def test_the_monitor_measures_compiled_and_cast_networks(how, tmp_path):
    torch.compiler.reset()
    model, monitor = LitClassifier(), SharpnessMonitor(loader(60, 3))
    if how == "compiled":
        model.net = torch.compile(model.net, backend="aot_eager")
    precision = "32-true" if how == "compiled" else how
    trainer(tmp_path, monitor, precision=precision).fit(model, loader(100, 1))
    plain = SharpnessMonitor(loader(60, 3))
    trainer(tmp_path, plain).fit(LitClassifier(), loader(100, 1))
    rel = 1e-4 if how == "compiled" else 0.05
    assert monitor.history[0]["sharpness"] == pytest.approx(plain.history[0]["sharpness"], rel=rel)


def test_a_monitor_of_nothing_is_refused_before_training(tmp_path):
    with pytest.raises(
        MisconfigurationException, match="SharpnessMonitor needs a loader that yields one batch at least"
    ):
        trainer(tmp_path, SharpnessMonitor([])).fit(LitClassifier(), loader(100, 1))


def test_two_monitors_have_two_names(tmp_path):
    monitors = [SharpnessMonitor(loader(60, seed), name=name) for seed, name in ((1, "train"), (3, "held_out"))]
    run = trainer(tmp_path, *monitors)
    run.fit(LitClassifier(), loader(100, 1))
    assert {"train/sharpness", "held_out/sharpness"} <= set(run.callback_metrics)
    assert len({monitor.state_key for monitor in monitors}) == 2


def test_the_monitor_goes_on_where_it_was():
    monitor = SharpnessMonitor(loader(60, 3))
    with pytest.raises(ValueError, match="Nothing has been measured"):
        monitor.plot()
    history = [{"epoch": 1, "ece": 0.1, "margin_tail": 2.0, "sharpness": 3.0}]
    monitor.load_state_dict(json.loads(json.dumps({"history": history})))
    assert monitor.state_dict() == {"history": history}
    with pytest.raises(ValueError, match="`every_n_epochs` must be at least 1"):
        SharpnessMonitor(loader(60, 3), every_n_epochs=0)


class Bytes(LitClassifier):
    """Its images arrive as whole numbers up to 255, and are augmented in training alone."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        return x / 255, y

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        return (x.flip(3) if self.trainer.training else x), y


def of_bytes(n, seed):
    images, target = loader(n, seed).dataset.tensors
    return DataLoader(TensorDataset(255 * images, target), batch_size=20)


def test_a_generator_that_training_shares_is_as_it_was(tmp_path):
    weights = []
    for monitored in (False, True):
        generator = torch.Generator().manual_seed(3)
        options = {"batch_size": 20, "shuffle": True, "generator": generator}
        data = [DataLoader(loader(60, seed).dataset, **options) for seed in (1, 3)]
        model = LitClassifier(lr=0.1)
        trainer(tmp_path, *[SharpnessMonitor(data[1], max_iterations=1)][:monitored]).fit(model, data[0])
        weights.append(model.net.linear.weight.detach())
    assert torch.equal(*weights)


def test_the_monitor_sees_batches_as_a_validation_step_does(tmp_path):
    monitor, model = SharpnessMonitor(of_bytes(60, 3)), Bytes(lr=0.0)
    trainer(tmp_path, monitor).fit(model, of_bytes(100, 1))
    plain = SharpnessMonitor(loader(60, 3, size=20))
    trainer(tmp_path, plain).fit(LitClassifier(lr=0.0), loader(100, 1))
    assert monitor.history[0] == pytest.approx(plain.history[0], rel=1e-4)
    inputs, target = loader(60, 3).dataset.tensors
    tail = float(exponential_margin_tail(model(inputs).detach(), target))
    assert monitor.history[0]["margin_tail"] == pytest.approx(tail, rel=1e-5)


def test_the_trainer_trains_on_after_the_monitor_has_read(tmp_path):
    class Asking(LitClassifier):
        def on_train_start(self):
            assert self.trainer.training

    trainer(tmp_path, SharpnessMonitor(loader(60, 3))).fit(Asking(), loader(100, 1))


class ByName(LitClassifier):
    """Takes its input by name and returns an object, as the models of other libraries do."""

    def forward(self, image):
        return SimpleNamespace(logits=super().forward(image))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x).logits, y)


@pytest.mark.parametrize("keys", [("image", "label"), (["image"], "label")])
def test_batches_may_be_dicts(keys, tmp_path):
    dicts = [{"image": x, "label": y} for x, y in loader(60, 3, size=20)]
    monitor, plain = SharpnessMonitor(dicts, batch_keys=keys), SharpnessMonitor(loader(60, 3, size=20))
    trainer(tmp_path, monitor).fit(ByName(lr=0.0), loader(100, 1))
    trainer(tmp_path, plain).fit(LitClassifier(lr=0.0), loader(100, 1))
    assert monitor.history == [pytest.approx(plain.history[0])]


@pytest.mark.parametrize(
    ("batch", "keys", "sentence"),
    [
        (
            {"image": 1},
            None,
            r"must be a pair \(inputs, target\), got dict of image: .*batch_keys=\('image', 'label'\)",
        ),
        ((torch.zeros(2, 3, 8, 8), [0, 1]), None, "The target of a batch must be a tensor, got list"),
        ((1, 2), ("image", "label"), "no entry 'image', which `batch_keys` names"),
    ],
)
def test_other_batches_get_one_sentence(batch, keys, sentence, tmp_path):
    monitor = SharpnessMonitor([batch], batch_keys=keys)
    with pytest.raises(MisconfigurationException, match=f"SharpnessMonitor cannot use its loader. .*{sentence}"):
        trainer(tmp_path, monitor).fit(LitClassifier(), loader(100, 1))


def test_keys_are_checked_when_the_monitor_is_made():
    with pytest.raises(ValueError, match="`batch_keys` must be a pair"):
        SharpnessMonitor(loader(60, 3), batch_keys="image")
