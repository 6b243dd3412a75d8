"""Several labels per item, from a Trainer to files, exports and the command line."""

from pathlib import Path
from textwrap import indent

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_clamp import (
    CalibrationModule,
    CalibrationMonitor,
    Clamp,
    NeuralClamping,
    calibrate,
    fit_clamp,
    shifted_priors,
)
from lightning_clamp.checkpoint import read_result
from lightning_clamp.cli import main
from lightning_clamp.group_report import Groups
from lightning_clamp.metrics import (
    ExpectedCalibrationError,
    best_temperature,
    expected_calibration_error,
    negative_log_likelihood,
    refined_negative_log_likelihood,
)
from lightning_clamp.report import scalars
from lightning_clamp.spec import Spec
from tests.scenarios import SHIFT, LitClassifier, SmallNet, images, trainer


def tags(n: int, seed: int, *, shift: bool = False) -> DataLoader:
    """Images, and for each of four labels whether it is there: held-out data of :class:`LitTagger`."""
    x = images(n, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        target = (torch.rand(n, 4, generator=generator) < SmallNet()(x).sigmoid()).float()
    return DataLoader(TensorDataset(x - SHIFT if shift else x, target), batch_size=100)


class LitTagger(LitClassifier):
    """A tiny over-confident tagger, as a user would write it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + torch.tensor([2.0, 0.0, 0.0, -1.0])

    def training_step(self, batch, batch_idx):
        return F.binary_cross_entropy_with_logits(self(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.log("test_nll", F.binary_cross_entropy_with_logits(self(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0]).sigmoid()

    def calibration_dataloader(self):
        return tags(500, 30)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A model that was trained with the callback, which calibrated and saved it."""
    folder, model = tmp_path_factory.mktemp("tags"), LitTagger(lr=0.0)
    callback = NeuralClamping(tags(600, 30), task="multilabel", grids=(), save_to=folder, on_error="raise")
    run = trainer(folder, callback)
    run.fit(model, tags(100, 20))
    return run, model, callback


def test_the_callback_calibrates_each_label(fitted):
    run, model, callback = fitted
    (logged,) = run.test(model, tags(2000, 40), verbose=False)
    x, target = tags(2000, 40).dataset.tensors
    with torch.no_grad():
        bare = float(F.binary_cross_entropy_with_logits(model.net(x) + torch.tensor([2.0, 0.0, 0.0, -1.0]), target))
    assert logged["test_nll"] < bare - 0.05
    assert callback.result.after["nll"] < callback.result.before["nll"]
    probs = callback.calibrated_module().predict_proba(x[:7])
    assert probs.shape == (7, 4)
    torch.testing.assert_close(torch.cat(run.predict(model, DataLoader(TensorDataset(x[:7]), batch_size=7))), probs)


def test_a_calibrated_tagger_comes_back_from_its_file(fitted):
    _, _, callback = fitted
    again = CalibrationModule.from_checkpoint(callback.checkpoint_path, LitTagger)
    x = images(5)
    assert again.spec.task == "multilabel"
    torch.testing.assert_close(again.predict_proba(x), callback.calibrated_module().predict_proba(x))


@pytest.mark.slow
def test_a_module_tests_itself_and_folds_and_exports(tmp_path):
    network = SmallNet()
    with torch.no_grad():
        network.linear.weight.mul_(2)
        network.linear.bias.copy_(torch.tensor([1.0, 0.0, 0.0, -1.0]))
    result = fit_clamp(network, tags(1500, 30), task="multilabel", grids=())
    assert result.clamp.class_scale is not None
    module, x = CalibrationModule.from_result(network, result), images(6)
    folded = module.folded(x).network
    torch.testing.assert_close(folded(x), module(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.to_exported_program(x).module()(x), module(x))
    (logged,) = trainer(tmp_path).test(module, tags(2000, 40), verbose=False)
    assert logged["calibrated/ece"] < 0.05
    assert logged["calibrated/nll"] == pytest.approx(result.after["nll"], abs=0.03)


@pytest.mark.parametrize("options", [{"method": "temperature"}, {"method": "published", "epochs": 3}])
def test_other_methods_scale_all_labels_alike(options, tmp_path):
    result = fit_clamp(SmallNet(3.0), tags(400, 30), task="multilabel", **options)
    assert result.clamp.class_scale is None
    assert result.after["nll"] < result.before["nll"]
    if options["method"] == "temperature":
        assert float(result.clamp.temperature) == pytest.approx(3, rel=0.2)


@pytest.mark.slow
def test_a_perturbation_undoes_a_shift_of_tagged_images():
    result = fit_clamp(SmallNet(), tags(1500, 30, shift=True), task="multilabel", grids=(1,))
    assert result.clamp.perturbation is not None
    torch.testing.assert_close(result.clamp.perturbation[:, 0, 0], SHIFT.flatten(), rtol=0, atol=0.4)
    held_x, held_target = tags(4000, 50, shift=True).dataset.tensors
    module = CalibrationModule.from_result(SmallNet(), result)
    shifted = F.binary_cross_entropy_with_logits(SmallNet()(held_x), held_target)
    true = F.binary_cross_entropy_with_logits(SmallNet()(held_x + SHIFT), held_target)
    assert F.binary_cross_entropy_with_logits(module(held_x), held_target) - true < 0.3 * (shifted - true)


def test_one_label_is_calibrated_like_one_logit():
    x, target = tags(800, 30).dataset.tensors
    with torch.no_grad():
        z = SmallNet(2.0)(x)[:, :1] + 1
    results = [
        fit_clamp(torch.nn.Identity(), [(z, target[:, :1])], task=task, grids=(), uniform_share=False)
        for task in ("multilabel", "binary")
    ]
    assert all(result.chosen.output_map == "bias" for result in results)
    assert results[0].after["nll"] == pytest.approx(results[1].after["nll"], abs=1e-3)


def test_other_frequencies_are_refused():
    module = CalibrationModule(SmallNet(), fit_clamp(SmallNet(2.0), tags(200, 1), grids=(), task="multilabel").clamp)
    module.spec = Spec("multilabel")
    with pytest.raises(ValueError, match=r"classes that exclude each other, .* calibrate on them"):
        shifted_priors(module, [images(20)], priors=[0.25] * 4)


def test_a_network_without_an_axis_of_labels_is_refused():
    with pytest.raises(ValueError, match=r'one logit per label on axis 1, .* got \(20,\): .* say task="binary"'):
        calibrate(trainer(Path()), LitFlat(lr=0.0), [(images(20), torch.zeros(20))], task="multilabel", save_to=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r'The target has the shape of the logits, \(100, 4\): for several labels .* say task="multilabel"'),
        ({"task": "multilabel"}, "has the target -1, .* pass ignore_index=-1"),
    ],
)
def test_mistakes_are_found_before_training(tmp_path, settings, message):
    x, target = tags(200, 30).dataset.tensors
    target[3, 2] = -1
    data = DataLoader(TensorDataset(x, target), batch_size=100)
    model = LitTagger(lr=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserWarning, match=f"before training.*{message}"):
        trainer(tmp_path, NeuralClamping(data, **settings)).fit(model, tags(100, 20))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("network", ["last axis", "fewer"])
def test_labels_in_the_wrong_place_are_found_before_training(tmp_path, network):
    model = LitTagger(lr=0.1)
    model.forward = lambda x: {"last axis": lambda z: z[:, None], "fewer": lambda z: z[:, :3]}[network](model.net(x))
    message = r"before training.*needs a target of 0 and 1 in the shape of the logits, \(100, "
    with pytest.raises(UserWarning, match=message):
        trainer(tmp_path, NeuralClamping(tags(200, 30), task="multilabel")).fit(model, tags(100, 20))


def test_the_file_has_the_metrics_of_each_label(fitted):
    _, _, callback = fitted
    labels = callback.result.by_label
    again = read_result(callback.checkpoint_path)
    assert str(again) == str(callback.result)
    assert again.by_label.worst == labels.worst


@pytest.mark.slow
def test_tensorboard_gets_the_table_and_the_worst_label(tmp_path):
    logger, callback = TensorBoardLogger(tmp_path), NeuralClamping(tags(600, 30), task="multilabel", grids=())
    trainer(tmp_path, callback, logger=logger, log_every_n_steps=1).fit(LitTagger(lr=0.0), tags(100, 20))
    events = EventAccumulator(logger.log_dir).Reload()
    assert set(events.Tags()["images"]) == {"calibration/reliability", "calibration/reliability_worst_label"}
    (event,) = events.Scalars("calibration/before/nll_3")
    assert event.value == pytest.approx(float(callback.result.by_label.before["nll"][3]))
    (event,) = events.Tensors("calibration/labels/text_summary")
    assert event.tensor_proto.string_val[0].decode() == indent(callback.result.by_label.table(), "    ")


def test_groups_are_of_all_labels_of_their_samples(tmp_path):
    network, held_out = SmallNet(2.0), tags(400, 40)
    x, target = held_out.dataset.tensors
    target[::3, 1] = -1
    groups = (torch.arange(400) >= 150).long()
    result = fit_clamp(network, tags(600, 30), task="multilabel", ignore_index=-1, batch_keys=(0, 1), grids=())
    module = CalibrationModule.from_result(network, result)
    module.groups = Groups(2, ["Basel", "Bern"])
    data = DataLoader(TensorDataset(x, target, groups), batch_size=100)
    (logged,) = trainer(tmp_path).test(module, data, verbose=False)
    for name, chosen in (("Basel", slice(150)), ("Bern", slice(150, None))):
        for side, logits in (("bare", network(x)), ("calibrated", module(x))):
            expected = negative_log_likelihood(
                logits[chosen], target[chosen], task="multilabel", ignore_index=-1, average="micro"
            )
            assert logged[f"{side}/groups/{name}/nll"] == pytest.approx(float(expected), rel=1e-5)
    assert logged["calibrated/p"] > 0.001


class LitFlat(LitTagger):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, 0]

    def training_step(self, batch, batch_idx):
        return self(batch[0]).sum()

    def validation_step(self, batch, batch_idx):
        self(batch[0])


class Validated(LitTagger):
    def validation_step(self, batch, batch_idx):
        self(batch[0])


def partly_known(n: int, seed: int) -> DataLoader:
    """Few entries of one label are known, and none of another: a mean over labels is not that of all entries."""
    x, target = tags(n, seed).dataset.tensors
    target[: n - 50, 1] = target[:, 2] = -1
    return DataLoader(TensorDataset(x, target), batch_size=100)


def test_the_monitor_logs_means_over_labels_and_what_it_is_given(tmp_path):
    model, held_out = Validated(lr=0.0), partly_known(300, 50)
    own = {"entries": ExpectedCalibrationError(task="multilabel", ignore_index=-1, average="micro")}
    run = trainer(tmp_path, CalibrationMonitor(task="multilabel", ignore_index=-1, metrics=own))
    run.fit(model, tags(100, 20), held_out)
    x, target = held_out.dataset.tensors
    for name, function, average in (
        ("nll", negative_log_likelihood, "macro"),
        ("ece", expected_calibration_error, "macro"),
        ("refined_nll", refined_negative_log_likelihood, "macro"),
        ("temperature", best_temperature, "micro"),
        ("entries", expected_calibration_error, "micro"),
    ):
        expected = function(model(x).detach(), target, task="multilabel", ignore_index=-1, average=average)
        assert float(run.callback_metrics[f"val/{name}"]) == pytest.approx(float(expected), rel=1e-5)


def test_a_module_tests_each_label_as_the_result_reports_it(tmp_path):
    network, data = SmallNet(2.0), partly_known(400, 30)
    result = fit_clamp(network, data, task="multilabel", ignore_index=-1, method="temperature")
    (logged,) = trainer(tmp_path).test(CalibrationModule.from_result(network, result), data, verbose=False)
    own = {key.removeprefix("calibrated/"): value for key, value in logged.items()}
    reported = {
        key.removeprefix("calibration/after/"): value for key, value in scalars(result).items() if "after" in key
    }
    assert {"nll", "ece", "accuracy", "nll_0", "ece_3"} < set(reported)
    assert "ece_1" not in own  # of which 50 entries are known
    assert {key: value for key, value in own.items() if key in reported} == pytest.approx(reported, abs=1e-6)
    assert {key for key in own if "_" in key and key[-1].isdigit()} == {key for key in reported if "_" in key}


def test_many_labels_are_tested_without_a_number_for_each(tmp_path):
    x, target = torch.randn(200, 101), torch.randint(2, (200, 101))
    module = CalibrationModule(torch.nn.Identity(), Clamp(), task="multilabel")
    (logged,) = trainer(tmp_path).test(module, DataLoader(TensorDataset(x, target), batch_size=50), verbose=False)
    expected = expected_calibration_error(x, target, task="multilabel")
    assert logged["calibrated/ece"] == pytest.approx(float(expected), rel=1e-5)
    assert not [key for key in logged if key[-1].isdigit()]


def test_outputs_without_an_axis_of_labels_are_told_by_the_monitor(tmp_path):
    with pytest.warns(UserWarning, match='logs nothing of it: task="multilabel" needs one logit per label on axis 1'):
        trainer(tmp_path, CalibrationMonitor(task="multilabel")).fit(LitFlat(lr=0.0), tags(100, 20), tags(100, 1))


class TagData(LightningDataModule):
    def __init__(self, shift: bool = False) -> None:
        super().__init__()
        self.shift = shift

    def test_dataloader(self):
        return tags(1000, 60, shift=self.shift)


# Lightning 2.6 uses what newer jsonargparse calls deprecated.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:(?s).*(JsonargparseDeprecationWarning|was deprecated in v4)")
def test_the_command_line_knows_the_task(fitted, tmp_path, monkeypatch, capsys):
    run, *_ = fitted
    monkeypatch.chdir(tmp_path)
    run.save_checkpoint("tags.ckpt")
    quiet = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    command = ["calibrate", "--model=tests.test_multilabel.LitTagger", *quiet, "--trainer.enable_checkpointing=false"]
    main([*command, "--ckpt_path=tags.ckpt", "--calibration.task=multilabel", "--calibration.grids=[]"])
    result = read_result("tags-calibrated.ckpt")
    assert result.spec.task == "multilabel"
    assert result.clamp.class_bias.shape == (4,)
    capsys.readouterr()
    main(["report", "tags-calibrated.ckpt"])
    assert "above: means over 4 labels" in capsys.readouterr().out
    check = ["check", "--model=tests.test_multilabel.LitTagger", *quiet, "--data=tests.test_multilabel.TagData"]
    main([*check, "--trainer.enable_checkpointing=false", "--ckpt_path=tags-calibrated.ckpt", "--fail_under=0.001"])
    assert "calibrated/p" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="1"):
        main([*check, "--data.shift=true", "--ckpt_path=tags-calibrated.ckpt", "--fail_under=0.01"])
