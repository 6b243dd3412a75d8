"""The monitor: the numbers of the metrics and of the sharpness, as training goes on and does not notice."""

import json

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

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
            assert last["ece"] == pytest.approx(float(expected_calibration_error(logits.softmax(1), target)), rel=1e-5)
            assert last["sharpness"] > 0
            assert run.callback_metrics["monitor/sharpness"] == pytest.approx(last["sharpness"])
            assert [panel.get_ylabel() for panel in monitor.plot().axes] == ["ECE", "margin tail", "sharpness"]
    assert torch.equal(*ends)


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
    with pytest.raises(MisconfigurationException, match="and one batch at least"):
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
