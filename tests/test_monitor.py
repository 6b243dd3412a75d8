"""The monitor: the metrics of what the validation computed, in time for other callbacks, and nothing else changed."""

import csv
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from lightning_clamp import CalibrationMonitor, NeuralClamping
from lightning_clamp.metrics import (
    Accuracy,
    best_temperature,
    expected_calibration_error,
    negative_log_likelihood,
    refined_negative_log_likelihood,
)
from tests.scenarios import LitClassifier, Segmenter, Validating, loader, maps, train_loader, trainer

NAMES = ("nll", "ece", "refined_nll", "temperature")
FUNCTIONS = (
    negative_log_likelihood,
    expected_calibration_error,
    refined_negative_log_likelihood,
    best_temperature,
)


def held_out(n=260, seed=30):
    return loader(n, seed, size=100, shift=False)


def expected(model, *loaders, prefix="val/", suffix="", **options):
    """The metrics of the model's outputs on data sets as a whole."""
    pairs = [one.dataset[:] for one in loaders]
    logits = torch.cat([model(x) for x, _ in pairs]).detach().float()
    target = torch.cat([y for _, y in pairs])
    return {
        f"{prefix}{name}{suffix}": float(function(logits, target, **options))
        for name, function in zip(NAMES, FUNCTIONS, strict=True)
    }


def logged(run, prefix="val/"):
    return {key: float(value) for key, value in run.callback_metrics.items() if key.startswith(prefix)}


def test_the_values_are_those_of_the_whole_validation_set(tmp_path):
    model, run = Validating(), trainer(tmp_path, CalibrationMonitor(metrics={"accuracy": Accuracy()}))
    run.fit(model, train_loader(), held_out())
    values = logged(run)
    inputs, target = held_out().dataset[:]
    assert values.pop("val/accuracy") == pytest.approx(float((model(inputs).argmax(1) == target).float().mean()))
    assert values == pytest.approx(expected(model, held_out()), rel=1e-4)
    assert values["val/refined_nll"] < values["val/nll"]


def test_training_does_not_notice_and_the_module_has_no_hook_left(tmp_path):
    ends = []
    for callbacks in ([], [CalibrationMonitor()]):
        torch.manual_seed(0)
        model = Validating(lr=0.1)
        calls = []
        model.net.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer(tmp_path, *callbacks, max_epochs=2).fit(model, train_loader(), held_out())
        assert not model._forward_hooks
        ends.append((len(calls), torch.cat([parameter.detach().flatten() for parameter in model.parameters()])))
    assert ends[0][0] == ends[1][0], "no second forward"
    assert torch.equal(ends[0][1], ends[1][1])


class Reading(Callback):
    """What other callbacks find at the end of a validation."""

    def __init__(self):
        self.found = []

    def on_validation_end(self, trainer, pl_module):
        self.found.append(sorted(logged(trainer)))


@pytest.mark.parametrize("first", [True, False])
def test_the_values_are_there_for_callbacks_before_and_behind(first, tmp_path):
    monitor, reading = CalibrationMonitor(), Reading()
    callbacks = [monitor, reading] if first else [reading, monitor]
    options = {"num_sanity_val_steps": 2, "max_epochs": 2, "val_check_interval": 0.5}
    trainer(tmp_path, *callbacks, **options).fit(Validating(), train_loader(), held_out())
    everything = sorted(f"val/{name}" for name in NAMES)
    assert reading.found == [[], *[everything] * 4], "nothing at the sanity check, all at four validations"


def test_three_callbacks_choose_stop_and_calibrate(tmp_path):
    """The weights of the least refined NLL are those that the clamp is fitted to."""
    best = ModelCheckpoint(tmp_path / "best", monitor="val/refined_nll")
    stopping = EarlyStopping(monitor="val/refined_nll", patience=2)
    clamping = NeuralClamping(held_out(), weights="best", method="temperature")
    logger = CSVLogger(tmp_path)
    # A rate at which training goes astray after a while.
    model = Validating(lr=2.0)
    run = trainer(tmp_path, clamping, best, stopping, CalibrationMonitor(), max_epochs=12, logger=logger)
    run.fit(model, train_loader(), held_out())
    with open(f"{logger.log_dir}/metrics.csv") as file:
        values = [float(row["val/refined_nll"]) for row in csv.DictReader(file) if row["val/refined_nll"]]
    assert len(values) < 12
    assert float(best.best_model_score) == pytest.approx(min(values))
    assert clamping.result.after["nll"] == pytest.approx(min(values), abs=1e-4)


@pytest.mark.slow
def test_the_loggers_get_numbers_every_time_and_a_diagram_now_and_then(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    run = trainer(tmp_path, CalibrationMonitor("held_out", diagram_every=2), logger=logger, max_epochs=3)
    run.fit(Validating(), train_loader(), held_out())
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    for name in NAMES:
        steps = [event.step for event in events.Scalars(f"held_out/{name}")]
        assert steps == [1, 3, 5]
    assert [event.step for event in events.Images("held_out/reliability")] == [1, 5]


def test_a_monitor_without_diagrams_draws_none(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_clamp.monitor.log_figures", lambda *_: pytest.fail("drawn"))
    trainer(tmp_path, CalibrationMonitor(diagram_every=0)).fit(Validating(), train_loader(), held_out())


def test_only_the_batches_that_were_validated_count(tmp_path):
    model, run = Validating(), trainer(tmp_path, CalibrationMonitor(), limit_val_batches=2)
    run.fit(model, train_loader(), held_out())
    inputs, target = held_out().dataset[:200]
    assert logged(run)["val/nll"] == pytest.approx(float(negative_log_likelihood(model(inputs), target)), rel=1e-5)


class TwoLoaders(Validating):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx)


def test_several_loaders_have_names_of_their_own(tmp_path):
    model, loaders = TwoLoaders(), [held_out(), held_out(120, 40)]
    run = trainer(tmp_path, CalibrationMonitor())
    run.fit(model, train_loader(), loaders)
    both = {}
    for index, one in enumerate(loaders):
        both |= expected(model, one, suffix=f"/dataloader_idx_{index}")
    assert logged(run) == pytest.approx(both, rel=1e-4)


def test_it_also_measures_in_trainer_validate(tmp_path):
    model, run = Validating(), trainer(tmp_path, CalibrationMonitor())
    run.validate(model, held_out(), verbose=False)
    assert logged(run) == pytest.approx(expected(model, held_out()), rel=1e-4)


class Silent(LitClassifier):
    """Its validation step can be compiled in one piece."""

    def validation_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


def whole(model):
    return torch.compile(model, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [whole, in_place])
def test_compiled_modules_are_heard(compiled, tmp_path):
    """Also if they were traced before."""
    torch.compiler.reset()
    model = compiled(Silent())
    trainer(tmp_path).validate(model, held_out(), verbose=False)
    run = trainer(tmp_path, CalibrationMonitor())
    run.fit(model, train_loader(), held_out())
    assert logged(run) == pytest.approx(expected(run.lightning_module, held_out()), rel=1e-4)
    torch.compiler.reset()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_is_measured_in_full(precision, tmp_path):
    model, run = Validating(), trainer(tmp_path, CalibrationMonitor(), precision=precision)
    run.fit(model, train_loader(), held_out())
    assert all(run.callback_metrics[key].dtype == torch.float32 for key in logged(run))
    assert logged(run) == pytest.approx(expected(model.float(), held_out()), rel=0.03, abs=0.02)


class Around(Validating):
    def validation_step(self, batch, batch_idx):
        self.net(batch[0])


class Twice(Validating):
    def validation_step(self, batch, batch_idx):
        self(batch[0] + 1)
        self(batch[0] - 1)


class Wordy(Validating):
    def forward(self, x):
        return [super().forward(x)] if not self.training else super().forward(x)

    def validation_step(self, batch, batch_idx):
        self(batch[0])


UNREADABLE = {
    "around": (Around, r"Around.validation_step did not call self\(x\), whose output is read; call self\(x\) there"),
    "twice": (Twice, "Twice.validation_step called self several times; call it once with the input of the batch"),
    "no tensor": (Wordy, "The network must return a tensor of logits"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_read_is_said_once_and_training_goes_on(case, tmp_path):
    module, sentence = UNREADABLE[case]
    run = trainer(tmp_path, CalibrationMonitor(), max_epochs=3)
    with pytest.warns(UserWarning, match=sentence) as told:
        run.fit(module(), train_loader(), held_out())
    assert sum("CalibrationMonitor" in str(warning.message) for warning in told) == 1
    assert run.current_epoch == 3
    assert not logged(run)


class Flipping(Validating):
    """Looks at an image twice, and once as it is."""

    def validation_step(self, batch, batch_idx):
        self(batch[0].flip(3))
        self(batch[0])
        self(batch[0].flip(2))


def test_of_several_calls_the_one_with_the_batch_counts(tmp_path):
    model, run = Flipping(), trainer(tmp_path, CalibrationMonitor())
    run.fit(model, train_loader(), held_out())
    assert logged(run) == pytest.approx(expected(model, held_out()), rel=1e-4)


class Diverging(Validating):
    """Returns nan in the second epoch."""

    def forward(self, x):
        return super().forward(x) * (torch.nan if not self.training and self.current_epoch == 1 else 1.0)


def test_a_validation_with_nan_is_left_out_and_the_next_one_counts(tmp_path):
    model, logger = Diverging(), CSVLogger(tmp_path)
    run = trainer(tmp_path, CalibrationMonitor(), max_epochs=3, logger=logger)
    with pytest.warns(UserWarning, match=r"logs nothing of it: `preds` holds nan or inf in 100 of 100 rows"):
        run.fit(model, train_loader(), held_out())
    with open(f"{logger.log_dir}/metrics.csv") as file:
        assert [row["epoch"] for row in csv.DictReader(file) if row["val/nll"]] == ["0", "2"]
    assert logged(run) == pytest.approx(expected(model, held_out()), rel=1e-4)


class Named(Validating):
    """Batches are dicts, and the output is an object, as in other libraries."""

    def forward(self, image):
        return SimpleNamespace(logits=super().forward(image))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(image=batch["image"]).logits, batch["label"])

    def validation_step(self, batch, batch_idx):
        self(image=batch["image"])


def test_batches_and_outputs_of_other_kinds(tmp_path):
    data = DataLoader([{"image": x, "label": y} for x, y in held_out()], batch_size=None)
    run = trainer(tmp_path, CalibrationMonitor(batch_keys=(["image"], "label")))
    model = Named()
    run.fit(model, data, data)
    plain = LitClassifier()
    plain.load_state_dict(model.state_dict())
    assert logged(run) == pytest.approx(expected(plain, held_out()), rel=1e-4)


class Pixels(Segmenter):
    def validation_step(self, batch, batch_idx):
        self(batch[0])


def test_one_logit_per_pixel_with_some_left_out(tmp_path):
    images, target = maps(8).tensors
    target[:, :, 0] = 7
    data = DataLoader(torch.utils.data.TensorDataset(images, target), batch_size=3)
    model = Pixels(lr=0.0)
    run = trainer(tmp_path, CalibrationMonitor(task="binary", ignore_index=7))
    run.fit(model, DataLoader(maps(8)), data)
    value = negative_log_likelihood(model(images).detach(), target, task="binary", ignore_index=7)
    assert logged(run)["val/nll"] == pytest.approx(float(value), rel=1e-5)


class Failing(Validating):
    def validation_step(self, batch, batch_idx):
        raise OSError("the disk is gone")


def test_a_validation_that_fails_leaves_no_hook(tmp_path):
    model = Failing()
    with pytest.raises(OSError, match="the disk is gone"):
        trainer(tmp_path, CalibrationMonitor(), num_sanity_val_steps=0).fit(model, train_loader(), held_out())
    assert not model._forward_hooks


def test_a_trainer_that_does_not_validate_is_told(tmp_path):
    with pytest.warns(UserWarning, match="CalibrationMonitor logs nothing: this Trainer does not validate"):
        trainer(tmp_path, CalibrationMonitor()).fit(LitClassifier(), train_loader())


def test_two_monitors_of_one_name_are_refused(tmp_path):
    """Lightning would log the mean of what they measure."""
    two = [CalibrationMonitor(), CalibrationMonitor(ignore_index=0)]
    with pytest.raises(
        MisconfigurationException, match=r"Two CalibrationMonitors log as 'val/…': give one another name"
    ):
        trainer(tmp_path, *two).fit(Validating(), train_loader(), held_out())
    trainer(tmp_path, CalibrationMonitor(), CalibrationMonitor("other")).fit(Validating(), train_loader(), held_out())


@pytest.mark.parametrize("metrics", [[Accuracy()], {"accuracy": Accuracy}, Accuracy()])
def test_metrics_that_are_none_are_refused_before_training(metrics):
    with pytest.raises(
        TypeError, match=r"`metrics` must be a dict of metrics by name, such as {'accuracy': Accuracy\(\)}"
    ):
        CalibrationMonitor(metrics=metrics)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="`diagram_every` must be a whole number of at least 0, got -1"):
        CalibrationMonitor(diagram_every=-1)
    with pytest.raises(ValueError, match="`task` must be one of"):
        CalibrationMonitor(task="regression")
    assert CalibrationMonitor().state_key != CalibrationMonitor("other").state_key


class Ranked(Validating):
    """With batch statistics, so that DDP has buffers; the second rank's batches may be of a kind that is no pair."""

    def __init__(self, broken=False):
        super().__init__(lr=0.0)
        self.broken = broken
        self.norm = nn.BatchNorm2d(3, affine=False, momentum=0.0)

    def forward(self, x):
        return super().forward(self.norm(x))

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if self.broken and self.global_rank == 1 and not self.trainer.training:
            return batch[0], batch[1], None
        return batch

    def validation_step(self, batch, batch_idx):
        return {"loss": F.cross_entropy(self(batch[0]), batch[1])}


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders")
@pytest.mark.filterwarnings("ignore:CalibrationMonitor could not read this validation")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
@pytest.mark.parametrize("broken", [False, True])
def test_two_ranks_log_what_one_does(broken, tmp_path):
    """Under DDP the module is called for the whole step too, which is no output."""
    alone, data = trainer(tmp_path, CalibrationMonitor()), held_out()
    alone.fit(Ranked(), train_loader(), data)
    logger = CSVLogger(tmp_path)
    run = trainer(tmp_path, CalibrationMonitor(), devices=2, strategy="ddp_fork", logger=logger, max_epochs=2)
    run.fit(Ranked(broken), train_loader(), DataLoader(Subset(data.dataset, range(260)), batch_size=50))
    assert logged(run) == ({} if broken else pytest.approx(logged(alone), rel=1e-4))
