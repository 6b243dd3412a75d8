"""Every way a Trainer can be used, and what comes of it: calibrated, refused before training, or skipped in words."""

import logging
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch.nn import functional as F

from lightning_clamp import CalibrationModule, Clamp, NeuralClamping
from tests.scenarios import LitClassifier, Validating, loader, train_loader, trainer

HELD_OUT = loader(1000, seed=30, size=250)
UNSEEN = loader(200, seed=54)


@dataclass
class Life:
    """One user's session: a folder, and what was made in it."""

    path: Path
    run: Trainer | None = None
    model: LitClassifier | None = None
    callback: NeuralClamping | None = None

    def fit(self, *others, model=None, data=None, ckpt_path=None, callback=None, first=False, **options):
        """Fit with the callback; before the other callbacks in the list, or behind them."""
        self.callback = callback or self.callback or clamping()
        self.model = model or self.model or LitClassifier(lr=0.05)
        callbacks = [self.callback, *others] if first else [*others, self.callback]
        self.run = trainer(self.path, *callbacks, **options)
        self.run.fit(self.model, *(data or [train_loader()]), ckpt_path=ckpt_path, weights_only=True)
        return self

    def nll(self, **options):
        return self.run.test(self.model, UNSEEN, verbose=False, **options)[0]["test_nll"]


def clamping(*args, **options):
    return NeuralClamping(*(args or [HELD_OUT]), **{"output_maps": ("temperature",), "grids": (1,), **options})


def keeper(life, **options):
    return ModelCheckpoint(life.path, **options)


class Scripted(Validating):
    """Its validation loss is what it is told, so that the best epoch is known."""

    def __init__(self, losses=(3.0, 1.0, 2.0)):
        super().__init__(lr=0.05)
        self.losses = losses

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", torch.tensor(self.losses[self.current_epoch]))


class Failing(LitClassifier):
    """Raises in the second step of training, or when it is called after training, or before."""

    def __init__(self, where, error):
        super().__init__()
        self.where, self.error = where, error

    def forward(self, x):
        if self.where == ("training" if self.training else "calibration") and self.trainer.global_step:
            raise self.error
        if self.where == "try" and not self.training:
            raise self.error
        return super().forward(x)


# What comes of it


def calibrated(life, caplog):
    """There is a clamp that helps; predict uses it; test data confirm it."""
    result = life.callback.result
    assert result.after["nll"] < result.before["nll"]
    module, y = life.callback.calibrated_module(), UNSEEN.dataset.tensors[1]
    predicted, standing_alone, bare = (
        torch.cat(life.run.predict(model, UNSEEN))
        for model in (life.model, module, CalibrationModule(module.network, Clamp()))
    )
    torch.testing.assert_close(predicted, standing_alone)
    # A dry run predicts one batch.
    assert F.cross_entropy(predicted, y[: len(predicted)]) < F.cross_entropy(bare, y[: len(predicted)])


@dataclass
class Said:
    """Nothing was calibrated, and the user was told so, by a warning or a log line; what was before is kept."""

    message: str
    warns: bool = True
    earlier: bool = False

    def __call__(self, life, caplog):
        assert (life.callback.result is not None) == self.earlier
        if not self.warns:
            assert self.message in caplog.text


@dataclass
class Raised:
    """The user's call ends with an error."""

    error: type[BaseException]
    message: str
    trained: bool = False

    def __call__(self, life, caplog):
        assert life.run is None or (life.run.global_step > 0) == self.trained


refused = Raised


@contextmanager
def expected(outcome):
    if isinstance(outcome, Raised):
        with pytest.raises(outcome.error, match=outcome.message):
            yield
    elif isinstance(outcome, Said) and outcome.warns:
        with pytest.warns(UserWarning, match=outcome.message):
            yield
    else:
        yield


# Situations


def plain(life):
    life.fit()


def no_logger_no_checkpoint(life):
    life.fit(barebones=True, default_root_dir=None, logger=None, enable_checkpointing=None,
             enable_progress_bar=None, enable_model_summary=None)  # fmt: skip


def validation_set(life):
    life.fit(model=Validating(), data=[train_loader(), HELD_OUT], callback=clamping(None))


def limited_validation_set(life):
    life.fit(model=Validating(), data=[train_loader(), HELD_OUT], callback=clamping(None), limit_val_batches=2)
    assert life.callback.result.n_samples == 500


def limited_training(life):
    life.fit(limit_train_batches=1)


def no_validation(life):
    life.fit(model=Validating(), data=[train_loader(), HELD_OUT], callback=clamping(None), limit_val_batches=0)


def fast_dev_run(life):
    life.fit(keeper(life), fast_dev_run=True)
    assert life.callback.checkpoint_path is None


def fast_dev_run_of_best(life):
    life.fit(callback=clamping(weights="best"), fast_dev_run=True)


def early_stopping(life):
    stop = EarlyStopping("val_loss", patience=0)
    life.fit(stop, model=Scripted((1.0, 2.0, 3.0)), data=[train_loader(), HELD_OUT], max_epochs=3)
    assert life.run.current_epoch == 2


def max_steps(life):
    life.fit(max_epochs=-1, max_steps=3)


def resumed(life):
    life.fit(keeper(life))
    first = life.callback.checkpoint_path
    life.fit(ckpt_path=life.path / "epoch=0-step=2.ckpt", max_epochs=2)
    assert life.callback.checkpoint_path is None
    assert first is not None


def resumed_from_the_calibrated(life):
    life.fit(callback=clamping(save_to=life.path / "calibrated.ckpt"))
    life.fit(ckpt_path=life.path / "calibrated.ckpt", max_epochs=2)


def resumed_with_another_keeper(life):
    life.fit(keeper(life))
    life.fit(keeper(life), ckpt_path=life.path / "epoch=0-step=2.ckpt", max_epochs=2)
    assert life.callback.checkpoint_path.endswith("epoch=1-step=4-calibrated.ckpt")


def finished_before(life):
    life.fit(keeper(life))
    life.callback = clamping()
    life.fit(ckpt_path=life.path / "epoch=0-step=2.ckpt")


def refit_of_a_finished_run(life):
    life.fit()
    life.run.fit(life.model, train_loader())


def refit_for_longer(life):
    life.fit()
    before = life.callback.result
    life.run.fit_loop.max_epochs = 2
    life.run.fit(life.model, train_loader())
    assert life.callback.result is not before


def averaged(make, first):
    def situation(life):
        bare = trainer(life.path, make(), max_epochs=3)
        model = LitClassifier(lr=0.1)
        bare.fit(model, train_loader())
        life.fit(make(), first=first, model=LitClassifier(lr=0.1), max_epochs=3)
        for mine, theirs in zip(life.model.parameters(), model.parameters(), strict=True):
            assert torch.equal(mine, theirs)

    return situation


def ema():
    return EMAWeightAveraging(decay=0.5)


def swa():
    return StochasticWeightAveraging(1e-3, swa_epoch_start=1)


def ema_of_best(life):
    monitor = keeper(life, monitor="val_loss")
    life.fit(ema(), monitor, model=Scripted(), data=[train_loader(), HELD_OUT], max_epochs=3,
             callback=clamping(weights="best"))  # fmt: skip
    saved = torch.load(monitor.best_model_path, weights_only=True)["state_dict"]
    for name, value in life.callback.calibrated_module().network.state_dict().items():
        assert torch.equal(value, saved[name])
    load_best(life)


def best_weights(life):
    monitor = keeper(life, monitor="val_loss", save_top_k=1)
    life.fit(
        monitor, model=Scripted(), data=[train_loader(), HELD_OUT], max_epochs=3, callback=clamping(weights="best")
    )
    last = {name: value.clone() for name, value in life.model.state_dict().items()}
    best = torch.load(monitor.best_model_path, weights_only=True)["state_dict"]
    assert any(not torch.equal(last[name], best[name]) for name in last)
    module = life.callback.calibrated_module()
    assert all(torch.equal(value, best[name]) for name, value in module.network.state_dict().items())
    assert life.callback.checkpoint_path.endswith("epoch=1-step=4-calibrated.ckpt")
    with pytest.warns(UserWarning, match="The weights are not the ones that NeuralClamping calibrated"):
        life.nll()
    assert life.nll(ckpt_path="best", weights_only=True) == pytest.approx(
        float(F.cross_entropy(module(UNSEEN.dataset.tensors[0]), UNSEEN.dataset.tensors[1])), rel=1e-5
    )
    load_best(life)


def load_best(life):
    """Predict below with what is calibrated."""
    life.model.load_state_dict(life.callback.calibrated_module().network.state_dict())


def best_without_a_keeper(life):
    life.fit(callback=clamping(weights="best"))


def best_without_a_monitor(life):
    life.fit(keeper(life), callback=clamping(weights="best"))


def best_never_saved(life):
    monitor = keeper(life, monitor="val_loss", every_n_epochs=5)
    life.fit(monitor, model=Scripted(), data=[train_loader(), HELD_OUT], callback=clamping(weights="best"))


def failing(where, error, **options):
    def situation(life):
        life.fit(model=Failing(where, error), callback=clamping(**options))

    return situation


def two_instances(life):
    life.fit(clamping(), callback=clamping())


def other_weights_in_test(life):
    life.fit(keeper(life))
    other = life.path / "other.ckpt"
    checkpoint = torch.load(life.path / "epoch=0-step=2.ckpt", weights_only=True)
    checkpoint["state_dict"]["net.linear.bias"] += 1
    torch.save(checkpoint, other)
    bare = trainer(life.path).test(life.model, UNSEEN, verbose=False, ckpt_path=other, weights_only=True)
    assert life.nll(ckpt_path=other, weights_only=True) == bare[0]["test_nll"]
    life.callback = SimpleNamespace(result=None)


def other_weights_refitted(life):
    life.fit(callback=clamping(other_weights="refit"))
    before = life.callback.result
    with torch.no_grad():
        life.model.net.linear.weight.mul_(2)
    calm = life.nll()
    assert life.callback.result is not before
    with torch.inference_mode():
        assert calm < trainer(life.path).test(life.model, UNSEEN, verbose=False)[0]["test_nll"]


def no_fit_refitted(life):
    life.callback, life.model = clamping(other_weights="refit"), LitClassifier()
    life.run = trainer(life.path, life.callback)
    life.nll()


def no_fit(life):
    life.callback, life.model = clamping(), LitClassifier()
    life.run = trainer(life.path, life.callback)
    life.nll()


def submodule_compiled_and_traced(life):
    model = LitClassifier()
    model.net = torch.compile(model.net, backend="eager")
    with torch.no_grad():
        model(UNSEEN.dataset.tensors[0][:100])
    life.fit(model=model)


def module_compiled(life):
    life.callback = clamping()
    life.model = torch.compile(LitClassifier(), backend="eager")
    life.run = trainer(life.path, life.callback)
    life.run.fit(life.model, train_loader())


def module_compiled_in_place(life):
    life.model = LitClassifier()
    life.model.compile(backend="eager")
    trainer(life.path).test(life.model, UNSEEN, verbose=False)
    life.fit(model=life.model)
    bare = trainer(life.path).test(life.model, UNSEEN, verbose=False)[0]["test_nll"]
    assert life.nll() < bare
    assert trainer(life.path).test(life.model, UNSEEN, verbose=False)[0]["test_nll"] == bare


def module_compiled_and_traced(life):
    """Steps that were traced without the clamp's hooks do not see them."""
    life.model = torch.compile(LitClassifier(), backend="eager")
    trainer(life.path).test(life.model, UNSEEN, verbose=False)
    life.callback = clamping()
    life.run = trainer(life.path, life.callback)
    life.run.fit(life.model, train_loader())
    bare = trainer(life.path).test(life.model, UNSEEN, verbose=False)[0]["test_nll"]
    assert life.nll() < bare


def around_forward(life):
    class Around(LitClassifier):
        def test_step(self, batch, batch_idx):
            self.net(batch[0])

    life.fit(model=Around()).nll()


def inference_mode_off(life):
    life.fit(model=Validating(), data=[train_loader(), HELD_OUT], callback=clamping(None), inference_mode=False)


class Caching(Validating):
    """Makes a tensor when it is first validated, and keeps it."""

    def __init__(self, as_buffer):
        super().__init__()
        self.register_buffer("scale", None) if as_buffer else setattr(self, "scale", None)

    def forward(self, x):
        if self.training:
            return super().forward(x)
        if self.scale is None:
            self.scale = torch.full((4,), 1.5)
        return super().forward(x) * self.scale


def validated_before(as_buffer, inference_mode=True):
    def situation(life):
        model = Caching(as_buffer)
        trainer(life.path, inference_mode=inference_mode).validate(model, HELD_OUT, verbose=False)
        assert model.scale.is_inference() == inference_mode
        kept = model.scale
        usable = as_buffer or not inference_mode
        words = "outputs alone, without a perturbation: .*Inference tensors cannot be saved for backward"
        with nullcontext() if usable else pytest.warns(UserWarning, match=words):
            life.fit(model=model, data=[train_loader(), HELD_OUT])
        assert model.scale is kept

    return situation


class Manual(LitClassifier):
    """Two optimizers of its own, one of which steps every other batch."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for optimizer in self.optimizers()[: 1 + batch_idx % 2]:
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return [super(Manual, self).configure_optimizers() for _ in range(2)]


def manual_optimization(life):
    life.fit(model=Manual())


def accumulation(life):
    life.fit(accumulate_grad_batches=2)


def on_strategy(strategy):
    def situation(life):
        life.callback = clamping()
        # They cannot be set up without a GPU, and the refusal comes before that.
        refused_one = type(strategy.__name__, (strategy,), {"root_device": torch.device("cuda", 0)})
        fake = SimpleNamespace(strategy=object.__new__(refused_one), world_size=2)
        life.callback.setup(fake, LitClassifier(), "fit")

    return situation


def on_mps(life):
    class Mps(Trainer):
        @property
        def strategy(self):
            strategy = super().strategy
            strategy.__class__ = type("S", (type(strategy),), {"root_device": torch.device("mps")})
            return strategy

    life.callback = clamping()
    life.callback.setup(Mps(accelerator="cpu", logger=False, enable_checkpointing=False), LitClassifier(), "fit")


def precision(kind):
    def situation(life):
        life.fit(precision=kind)
        clamp, dtype = life.callback.result.clamp, torch.float64 if kind == "64-true" else torch.float32
        assert {part.dtype for part in clamp.state_dict().values()} == {dtype}

    return situation


CTRL_C = "The fit stopped with KeyboardInterrupt: the model was not calibrated. To calibrate what was trained so far"
NOTHING_LEFT = "Training had nothing left to do, so NeuralClamping did not run"
PRECISIONS = ("64-true", "bf16-mixed", "bf16-true", "16-true")
SPLIT = "calls the network on every device by itself, which {} does not allow: train without the callback and save"

SITUATIONS = {
    "plain": (plain, calibrated),
    "barebones": (no_logger_no_checkpoint, calibrated),
    "validation set": (validation_set, calibrated),
    "limit_val_batches": (limited_validation_set, calibrated),
    "limit_val_batches=0": (no_validation, refused(MisconfigurationException, "There is no calibration set: pass")),
    "limit_train_batches": (limited_training, calibrated),
    "fast_dev_run": (fast_dev_run, calibrated),
    "fast_dev_run, weights='best'": (fast_dev_run_of_best, calibrated),
    "early stopping": (early_stopping, calibrated),
    "max_steps": (max_steps, calibrated),
    "accumulate_grad_batches": (accumulation, calibrated),
    "manual optimization": (manual_optimization, calibrated),
    "resumed": (resumed, calibrated),
    "resumed from the calibrated file": (
        resumed_from_the_calibrated, Raised(MisconfigurationException, "is a model without its training")
    ),
    "resumed, saving": (resumed_with_another_keeper, calibrated),
    "resumed when max_epochs was reached": (finished_before, Said(NOTHING_LEFT)),
    "refit of a finished run": (refit_of_a_finished_run, Said(NOTHING_LEFT, earlier=True)),
    "refit for longer": (refit_for_longer, calibrated),
    "EMA behind": (averaged(ema, first=True), calibrated),
    "EMA before": (averaged(ema, first=False), calibrated),
    "SWA behind": (averaged(swa, first=True), calibrated),
    "SWA before": (averaged(swa, first=False), calibrated),
    "best weights": (best_weights, calibrated),
    "best weights under EMA": (ema_of_best, calibrated),
    "best weights without a ModelCheckpoint": (
        best_without_a_keeper, refused(MisconfigurationException, "weights='best' .* this Trainer has none")
    ),
    "best weights without a monitor": (
        best_without_a_monitor, refused(MisconfigurationException, "weights='best' .* this Trainer has none")
    ),
    "best weights never saved": (best_never_saved, Said("weights='best', but the ModelCheckpoint saved nothing")),
    "Ctrl-C in training": (failing("training", KeyboardInterrupt()), Raised(SystemExit, "1", trained=True)),
    "Ctrl-C in calibration": (failing("calibration", KeyboardInterrupt()), Raised(SystemExit, "1", trained=True)),
    "exception in training": (failing("training", OSError("no disk")), Raised(OSError, "no disk", trained=True)),
    "exception in the try, raised": (failing("try", OSError("no disk"), on_error="raise"), Raised(OSError, "no disk")),
    "exception in calibration": (
        failing("calibration", OSError("no disk")), Said("the model stays uncalibrated. OSError: no disk")
    ),
    "exception in calibration, raised": (
        failing("calibration", OSError("no disk"), on_error="raise"), Raised(OSError, "no disk", trained=True)
    ),
    "two instances": (two_instances, refused(MisconfigurationException, "One Trainer takes one NeuralClamping")),
    "test without fit": (no_fit, Said("has calibrated nothing yet")),
    "test without fit, refit": (no_fit_refitted, calibrated),
    "test with other weights": (other_weights_in_test, Said("weights are not the ones that NeuralClamping calibrated")),
    "test with other weights, refit": (other_weights_refitted, calibrated),
    "compiled submodule, traced before": (submodule_compiled_and_traced, calibrated),
    "compiled module": (module_compiled, calibrated),
    "compiled in place, traced before": (module_compiled_in_place, calibrated),
    "compiled module, traced before": (module_compiled_and_traced, calibrated),
    "self.net(x) in test_step": (
        around_forward, Raised(MisconfigurationException, r"test_step did not call self\(x\)", trained=True)
    ),
    "inference_mode=False": (inference_mode_off, calibrated),
    "a buffer made under inference mode": (validated_before(as_buffer=True), calibrated),
    "a tensor made under inference mode": (validated_before(as_buffer=False), calibrated),
    "a tensor kept, inference_mode=False": (validated_before(as_buffer=False, inference_mode=False), calibrated),
    **{f"precision={kind}": (precision(kind), calibrated) for kind in PRECISIONS},
    "FSDP": (on_strategy(FSDPStrategy), refused(MisconfigurationException, SPLIT.format("FSDPStrategy"))),
    "ModelParallel": (
        on_strategy(ModelParallelStrategy), refused(MisconfigurationException, SPLIT.format("ModelParallelStrategy"))
    ),
    "DeepSpeed": (
        on_strategy(DeepSpeedStrategy), refused(MisconfigurationException, SPLIT.format("DeepSpeedStrategy"))
    ),
    "MPS": (on_mps, refused(MisconfigurationException, "float64, which MPS does not have")),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:NeuralClamping will calibrate on the validation set")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("situation", SITUATIONS)
def test_what_comes_of_it(tmp_path, situation, caplog):
    act, outcome = SITUATIONS[situation]
    life = Life(tmp_path)
    torch._dynamo.reset()
    with caplog.at_level(logging.INFO), expected(outcome):
        act(life)
    if life.model is not None:
        assert not life.model._forward_hooks or isinstance(life.model, torch._dynamo.OptimizedModule)
    if situation.startswith("Ctrl-C"):
        assert CTRL_C in caplog.text
    outcome(life, caplog)
