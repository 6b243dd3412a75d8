"""A loss in front of somebody's module: what it trains with, logs, saves and refuses."""

import copy
import inspect
import pickle
import re
import sys

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_clamp import NeuralClamping, losses
from lightning_clamp.losses import ACLSMixin, FocalMixin, LossMixin, MarginAwareMixin, acls_loss
from tests.scenarios import LitClassifier, Validating, loader, made, trainer

# The mixin of each function, and the beginning of its options.
OF_FUNCTION = {
    "acls_loss": (losses.ACLSMixin, "acls"),
    "adafocal_loss": (losses.AdaFocalMixin, "adafocal"),
    "brier_loss": (losses.BrierMixin, "brier"),
    "cals_loss": (losses.CALSMixin, "cals"),
    "cpc_loss": (losses.CPCMixin, "cpc"),
    "crl_loss": (losses.CRLMixin, "crl"),
    "dca_loss": (losses.DCAMixin, "dca"),
    "dual_focal_loss": (losses.DualFocalMixin, "dual_focal"),
    "entropy_penalty_loss": (losses.EntropyPenaltyMixin, "entropy"),
    "flsd_loss": (losses.FLSDMixin, "flsd"),
    "focal_loss": (losses.FocalMixin, "focal"),
    "label_smoothing_loss": (losses.LabelSmoothingMixin, "smoothing"),
    "margin_aware_loss": (losses.MarginAwareMixin, "margin"),
    "mbls_loss": (losses.MbLSMixin, "mbls"),
    "mdca_loss": (losses.MDCAMixin, "mdca"),
    "mmce_loss": (losses.MMCEMixin, "mmce"),
    "sc_bce_loss": (losses.SCBCEMixin, "sc_bce"),
}
COMMON = {"task", "ignore_index", "weight", "reduction", "log_terms", "generator"}
# With the defaults ACLS has nothing to do on logits as small as those of the tests.
AT_WORK = {losses.ACLSMixin: {"acls_margin": 1.0, "acls_alpha": 1.0}}
# Those that learn have tests of their own.
LEARNING = ("adafocal_loss", "cals_loss", "crl_loss")
OF_CLASSES = [name for name in OF_FUNCTION if name not in ("sc_bce_loss", "margin_aware_loss", *LEARNING)]
# Arguments that a mixin learns, and options of how it learns them.
LEARNED = {"correctness", "edges", "multiplier", "rho"}
OF_LEARNING = {
    "adafocal_loss": {"adafocal_gamma": (1.0, float), "adafocal_lambda": (1.0, float), "adafocal_n_bins": (15, int)},
    "cals_loss": {"cals_rho_every": (10, int)},
}


def test_every_loss_has_its_mixin():
    assert {name for name in losses.__all__ if name.endswith("_loss")} == set(OF_FUNCTION)
    mixins = {name for name in losses.__all__ if name.endswith("Mixin")}
    assert mixins == {mixin.__name__ for mixin, _ in OF_FUNCTION.values()} | {"LossMixin", "ASLPMixin"}


@pytest.mark.parametrize("name", OF_FUNCTION)
def test_the_options_of_a_mixin_are_those_of_its_function(name):
    mixin, prefix = OF_FUNCTION[name]
    function = inspect.signature(getattr(losses, name)).parameters.values()
    expected = {
        f"{prefix}_{one.name}".rstrip("_"): (one.default, one.annotation)
        for one in function
        if one.kind is one.KEYWORD_ONLY and one.name not in COMMON | LEARNED
    } | OF_LEARNING.get(name, {})
    if name == "sc_bce_loss":  # One number for all images: α per image is ASLP's.
        expected["sc_bce_alpha"] = (0.1, float)
    options = inspect.signature(mixin.__init__).parameters.values()
    assert {one.name: (one.default, one.annotation) for one in options if one.kind is one.KEYWORD_ONLY} == expected


@pytest.mark.parametrize("name", OF_CLASSES)
def test_a_step_is_one_of_the_function(name, tmp_path):
    mixin, _ = OF_FUNCTION[name]
    model = made(mixin, lr=0.1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batches = loader(100, 20)
    run = trainer(tmp_path, max_steps=1)
    run.fit(model, batches)

    other = LitClassifier(lr=0.1)
    other.load_state_dict(before)
    inputs, target = next(iter(batches))
    loss = getattr(losses, name)(other(inputs), target)
    loss.backward()
    for (key, value), parameter in zip(model.state_dict().items(), other.parameters(), strict=True):
        torch.testing.assert_close(value, parameter.detach() - 0.1 * parameter.grad, msg=key)
    assert run.callback_metrics["train/loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert "train/cross_entropy" in run.callback_metrics


@pytest.mark.parametrize("name", [*OF_CLASSES, "adafocal_loss", "cals_loss", "margin_aware_loss"])
def test_several_labels_are_trained_on_single_ones_of_them(name):
    mixin, prefix = OF_FUNCTION[name]
    model = made(
        mixin, loss_task="multilabel", loss_ignore_index=-1, **({"margin_clip": None} if prefix == "margin" else {})
    )
    inputs, target = next(iter(loader(100, 20)))
    labels = F.one_hot(target, model(inputs).shape[1])
    labels[0, 0] = -1
    value = model.calibrated_loss_of(inputs, labels, None, {})
    expected = model.calibrated_loss_function(
        *([model] if prefix == "margin" else []),
        inputs if prefix == "margin" else model(inputs),
        labels,
        task="multilabel",
        ignore_index=-1,
    )
    torch.testing.assert_close(value, expected)
    value.backward()
    assert value.isfinite()


def test_crl_refuses_several_labels_when_the_module_is_made():
    with pytest.raises(ValueError, match="CRLMixin ranks items of one prediction each, and loss_task='multilabel' has"):
        made(losses.CRLMixin, loss_task="multilabel")
    assert made(losses.CRLMixin, loss_task="binary").loss_task == "binary"


def test_crl_ranks_items_of_one_prediction():
    model = made(losses.CRLMixin)
    inputs, target = next(iter(loader(100, 20)))
    model.forward = lambda x: torch.zeros(len(x), 3, 2, requires_grad=True)
    with pytest.raises(ValueError, match="CRL is for one prediction per item"):
        model.calibrated_loss(inputs, target.unsqueeze(1).expand(-1, 2) % 3, torch.arange(len(inputs)))


def test_options_reach_the_function():
    model = made(ACLSMixin, acls_alpha=0.5, acls_margin=1.0, acls_reference="paper", loss_ignore_index=3)
    inputs, target = next(iter(loader(100, 20)))
    expected = acls_loss(model(inputs), target, alpha=0.5, margin=1.0, reference="paper", ignore_index=3)
    trained = model.calibrated_loss_of(inputs, target, None, {})
    torch.testing.assert_close(trained, expected)


def test_the_margin_aware_mixin_attacks_the_module_itself(tmp_path):
    model = made(MarginAwareMixin, margin_clip=None, margin_lambda_s=0.2)
    run = trainer(tmp_path, max_steps=1)
    run.fit(model, loader(100, 20))
    logged = run.callback_metrics
    total = logged["train/cross_entropy"] + 0.5 * logged["train/divergence"] + 0.2 * logged["train/smoothness"]
    assert logged["train/loss"] == pytest.approx(float(total), rel=1e-5)
    assert {"train/margin", "train/margin_tail", "train/robust_margin", "train/robust_margin_tail"} <= set(logged)


def test_the_state_dict_is_the_modules_and_the_options_are_hyperparameters(tmp_path):
    model = made(FocalMixin, lr=0.05, focal_gamma=2.0)
    assert model.state_dict().keys() == LitClassifier().state_dict().keys()
    assert dict(model.hparams) == {
        "lr": 0.05, "temperature": 2.0, "focal_gamma": 2.0, "loss_task": "multiclass", "loss_ignore_index": None,
        "loss_batch_keys": None,
    }  # fmt: skip
    run = trainer(tmp_path)
    run.fit(model, loader(100, 20))
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = type(model).load_from_checkpoint(tmp_path / "last.ckpt")
    assert again.calibrated_loss_function.keywords == {"gamma": 2.0}
    # The module alone takes the weights too.
    assert LitClassifier.load_from_checkpoint(tmp_path / "last.ckpt").hparams["lr"] == 0.05


def test_a_step_of_ones_own_calls_the_loss(tmp_path):
    class Custom(FocalMixin, LitClassifier):
        def training_step(self, batch, batch_idx):
            loss = self.calibrated_loss(*batch)
            self.log("own", loss)
            return loss

    run = trainer(tmp_path, max_steps=1)
    run.fit(Custom(), loader(100, 20))
    assert {"own", "train/cross_entropy"} <= set(run.callback_metrics)
    assert "train/loss" not in run.callback_metrics


def test_a_step_that_forgets_the_loss_is_told_so(tmp_path):
    """The natural mistake: the mixin on a class that has a step of its own already."""

    class Forgetful(ACLSMixin, LitClassifier):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

    with pytest.warns(UserWarning, match=r"Forgetful did not call `self.calibrated_loss\(inputs, target\)`"):
        trainer(tmp_path, max_steps=1).fit(Forgetful(), loader(100, 20))


def test_the_loss_may_be_had_in_validation_and_logs_nothing_there(tmp_path):
    class Validating(FocalMixin, LitClassifier):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.calibrated_loss(*batch))

    run = trainer(tmp_path)
    run.fit(Validating(), loader(100, 20), loader(100, 40))
    # The training batch's, not the validation's.
    model = Validating()
    inputs, target = next(iter(loader(100, 20)))
    assert run.callback_metrics["train/cross_entropy"] == pytest.approx(
        F.cross_entropy(model(inputs), target).item(), rel=1e-5
    )


class Crowded(LitClassifier):
    """A module that has the names one is likely to have."""

    def __init__(self, **options):
        super().__init__(**options)
        self.criterion = self.loss = nn.CrossEntropyLoss()
        self.loss_function = nn.CrossEntropyLoss(label_smoothing=0.1)
        self._accuracy = nn.Identity()
        self.alpha, self.margin, self.rule = 1, 2, 3

    def loss_of(self, logits, target):
        return self.loss_function(logits, target)

    def validation_step(self, batch, batch_idx):
        self.log("val_accuracy", 0.5)
        self.log("val_loss", self.loss_of(self(batch[0]), batch[1]))


@pytest.mark.parametrize("mixin", [ACLSMixin, MarginAwareMixin])
def test_names_of_the_module_are_its_own(mixin, tmp_path):
    options = {"margin_clip": None} if mixin is MarginAwareMixin else {}
    model = made(mixin, Crowded, **options)
    trainer(tmp_path, max_steps=1).fit(model, loader(100, 20), loader(100, 40))
    assert isinstance(model.loss_function, nn.CrossEntropyLoss)
    assert (model.alpha, model.margin, model.rule) == (1, 2, 3)
    crowded = made(losses.ASLPMixin, Crowded)
    assert isinstance(crowded._accuracy, nn.Identity)


@pytest.mark.parametrize(
    ("mixin", "options", "sentence"),
    [
        (ACLSMixin, {"acls_margin": -1}, "`acls_margin` must be at least 0, got -1"),
        (ACLSMixin, {"acls_reference": "Paper"}, "`acls_reference` must be one of"),
        (ACLSMixin, {"loss_task": "regression"}, "`loss_task` must be one of"),
        (MarginAwareMixin, {"margin_std": (0.2, 0.0, 0.2)}, "`margin_std` must be positive"),
        (MarginAwareMixin, {"margin_std": (0.2, 0.2), "margin_mean": (0.5, 0.5, 0.5)}, "no axis 1 of 2 channels"),
        (losses.SCBCEMixin, {"sc_bce_kind": "IH"}, "`sc_bce_kind` must be one of"),
    ],
)
def test_options_are_checked_when_the_module_is_made(mixin, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        made(mixin, **options)


# What each option is refused for, with all that have a wrong value.
REFUSED = {
    losses.ACLSMixin: {"acls_alpha": -1, "acls_pos_lambda": -1, "acls_neg_lambda": -1, "acls_margin": -1,
                       "acls_reference": "Paper"},
    losses.ASLPMixin: {"aslp_kind": "IH", "aslp_beta": 3, "aslp_rule": "best", "aslp_eta": -1, "aslp_lambda": -1,
                      "aslp_warmup_epochs": -1},
    losses.AdaFocalMixin: {"adafocal_gamma": 0, "adafocal_lambda": -1, "adafocal_n_bins": 0},
    losses.BrierMixin: {},
    losses.CALSMixin: {"cals_margin": 0, "cals_rho_every": 0},
    losses.CPCMixin: {"cpc_lambda_bdc": -1, "cpc_lambda_bec": -1},
    losses.CRLMixin: {"crl_lambda": -1, "crl_confidence": "max"},
    losses.DCAMixin: {"dca_beta": -1},
    losses.DualFocalMixin: {"dual_focal_gamma": -1},
    losses.EntropyPenaltyMixin: {"entropy_alpha": -1, "entropy_reference": "mean"},
    losses.FLSDMixin: {"flsd_gamma": -1},
    losses.FocalMixin: {"focal_gamma": -1},
    losses.LabelSmoothingMixin: {"smoothing_alpha": 2},
    losses.MarginAwareMixin: {"margin_lambda_r": -1, "margin_lambda_s": -1, "margin_epsilon": -1,
                              "margin_step_size": -1, "margin_steps": -1, "margin_norm": "l1", "margin_std": 0.0,
                              "margin_attack_mode": "test", "margin_clip": (1.0, 0.0)},
    losses.MbLSMixin: {"mbls_alpha": -1, "mbls_margin": -1},
    losses.MDCAMixin: {"mdca_beta": -1},
    losses.MMCEMixin: {"mmce_lambda": -1},
    losses.SCBCEMixin: {"sc_bce_alpha": 2, "sc_bce_kind": "IH", "sc_bce_beta": 3},
}  # fmt: skip
# Any value will do, or it depends on the data: see below.
NOT_ALONE = {"aslp_accuracy", "margin_mean"}


@pytest.mark.parametrize(("mixin", "option"), [(mixin, option) for mixin in REFUSED for option in REFUSED[mixin]])
def test_refused_options_are_named_as_the_mixin_names_them(mixin, option):
    with pytest.raises(ValueError, match=f"^`{option}` must"):
        made(mixin, **{option: REFUSED[mixin][option]})


@pytest.mark.parametrize(
    ("mixin", "options"),
    [
        (FocalMixin, {"focal_gamma": "3"}),
        (FocalMixin, {"focal_gamma": None}),
        (losses.LabelSmoothingMixin, {"smoothing_alpha": "0.1"}),
        (losses.AdaFocalMixin, {"adafocal_lambda": "1"}),
        (MarginAwareMixin, {"margin_clip": (1.0,)}),
        (MarginAwareMixin, {"margin_clip": "none"}),
    ],
)
def test_options_of_another_type_are_named_too(mixin, options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"^`{name}` must .* got {re.escape(repr(value))}"):
        made(mixin, **options)


def test_no_option_of_a_mixin_is_forgotten():
    assert {mixin.__name__ for mixin in REFUSED} | {"LossMixin"} == {n for n in losses.__all__ if n.endswith("Mixin")}
    for mixin, refused in REFUSED.items():
        options = inspect.signature(mixin.__init__).parameters.values()
        assert {one.name for one in options if one.kind is one.KEYWORD_ONLY} - NOT_ALONE == set(refused)


def test_refused_data_name_the_options_of_the_mixin():
    inputs, target = next(iter(loader(10, 20)))
    model = made(MarginAwareMixin, margin_mean=0.5)
    with pytest.raises(
        ValueError,
        match=r"lie outside margin_clip=\(0, 1\): pass the `margin_mean` and `margin_std` .* margin_clip=None",
    ):
        model.calibrated_loss(inputs, target)
    with pytest.raises(ValueError, match=r"^`margin_mean` or `margin_std` holds 2 numbers"):
        made(MarginAwareMixin, margin_mean=(0.1, 0.2)).calibrated_loss(inputs, target)
    with pytest.raises(ValueError, match=r"got -100\. Pass loss_ignore_index= for positions to leave out"):
        made(FocalMixin).calibrated_loss(inputs, target - 100)
    with pytest.raises(ValueError, match='say loss_task="binary" for a one-logit'):
        made(FocalMixin, OneLogit).calibrated_loss(inputs, target)


class OneLogit(LitClassifier):
    def forward(self, x):
        return super().forward(x)[:, :1]


class Refusing(LitClassifier):
    def forward(self, x):
        raise ValueError("`gamma` must be that of the camera, not gamma=1.")


def test_what_the_network_refuses_is_said_in_its_words():
    with pytest.raises(ValueError, match=r"^`gamma` must be that of the camera, not gamma=1\.$"):
        made(FocalMixin, Refusing).calibrated_loss(torch.zeros(1), torch.zeros(1))


@pytest.mark.parametrize("mixin", [mixin for mixin, _ in OF_FUNCTION.values()] + [losses.ASLPMixin])
def test_a_module_may_be_made_without_memory(mixin):
    class Bare(mixin, LightningModule):
        def __init__(self, **options):
            super().__init__(**options)
            self.layer = nn.Linear(2, 2)

    with torch.device("meta"):
        assert Bare().layer.weight.is_meta


def test_a_module_may_be_copied_and_pickled():
    model = made(MarginAwareMixin, margin_mean=(0.5, 0.4, 0.3), margin_std=0.2)
    again = copy.deepcopy(model)
    assert again.calibrated_loss_function.keywords == model.calibrated_loss_function.keywords
    assert pickle.loads(pickle.dumps(model.calibrated_loss_function)).keywords["std"] == 0.2


def test_arguments_by_position_are_the_modules(tmp_path):
    class Positional(ACLSMixin, LitClassifier):
        pass

    model = Positional(0.3, 1.5, acls_margin=4.0)
    assert (model.hparams["lr"], model.hparams["temperature"]) == (0.3, 1.5)
    run = trainer(tmp_path)
    run.fit(model, loader(100, 20))
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = Positional.load_from_checkpoint(tmp_path / "last.ckpt")
    assert again.hparams["lr"] == 0.3
    assert again.calibrated_loss_function.keywords["margin"] == 4.0


def test_manual_optimization_has_its_own_step(tmp_path):
    class Manual(FocalMixin, LitClassifier):
        def __init__(self, **options):
            super().__init__(**options)
            self.automatic_optimization = False

    with pytest.raises(MisconfigurationException, match=r"Manual optimizes manually.*`self.manual_backward\(loss\)`"):
        trainer(tmp_path).fit(Manual(), loader(100, 20))

    class Stepping(MarginAwareMixin, LitClassifier):
        def __init__(self, **options):
            super().__init__(**options)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.calibrated_loss(*batch))
            optimizer.step()

    model = Stepping(margin_clip=None, lr=0.1)
    before = [parameter.clone() for parameter in model.parameters()]
    trainer(tmp_path, max_steps=1).fit(model, loader(100, 20))
    assert not torch.equal(before[0], next(model.parameters()))


def test_the_order_of_the_bases_is_checked_when_the_class_is_written():
    with pytest.raises(TypeError, match=r"step of LitClassifier, .* class Wrong\(ACLSMixin, LitClassifier\)"):

        class Wrong(LitClassifier, ACLSMixin):
            pass

    with pytest.raises(TypeError, match="Both has two losses, ACLSMixin and FocalMixin: keep one"):

        class Both(ACLSMixin, FocalMixin, LitClassifier):
            pass

    with pytest.raises(TypeError, match="Learning has two losses, AdaFocalMixin and CALSMixin: keep one"):

        class Learning(losses.AdaFocalMixin, losses.CALSMixin, LitClassifier):
            pass

    class Helper:
        """Has no step, and may stand anywhere."""

    class Right(Helper, ACLSMixin, LitClassifier):
        pass

    class Derived(Right):
        pass

    with pytest.raises(TypeError, match="two losses"):

        class Another(FocalMixin, Right):
            pass


def test_an_index_after_the_pair_is_let_by(tmp_path):
    inputs, target = next(iter(loader(20, 20)))
    data = losses.Indexed(TensorDataset(inputs, target))
    assert len(data) == 20
    trainer(tmp_path).fit(made(ACLSMixin), DataLoader(data, batch_size=10))


def test_a_mixin_of_ones_own(tmp_path):
    class MeanSquareMixin(LossMixin):
        def calibrated_loss_of(self, inputs, target, index, log_terms):
            probs = self(inputs).softmax(1)
            log_terms["worst"] = probs.amin()
            return F.mse_loss(probs, F.one_hot(target, 4).float())

    run = trainer(tmp_path, max_steps=1)
    run.fit(made(MeanSquareMixin), loader(100, 20))
    assert {"train/loss", "train/worst"} <= set(run.callback_metrics)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("mixin", [ACLSMixin, MarginAwareMixin, losses.MMCEMixin])
def test_lower_precision_gives_about_the_same_loss(mixin, precision, tmp_path):
    options = {"margin_clip": None} if mixin is MarginAwareMixin else {}
    found = {}
    for kind in ("32", precision):
        torch.manual_seed(0)
        run = trainer(tmp_path, max_steps=1, precision=kind)
        run.fit(made(mixin, **options), loader(100, 20))
        found[kind] = run.callback_metrics["train/loss"].item()
    assert found[precision] == pytest.approx(found["32"], rel=0.03)


@pytest.mark.parametrize("mixin", [ACLSMixin, MarginAwareMixin])
def test_accumulated_batches_are_one_batch(mixin, tmp_path):
    options = {"margin_clip": None} if mixin is MarginAwareMixin else AT_WORK.get(mixin, {})
    ends = []
    for size, accumulate in ((100, 1), (25, 4)):
        model = made(mixin, lr=0.1, **options)
        trainer(tmp_path, max_steps=1, accumulate_grad_batches=accumulate).fit(model, loader(100, 20, size=size))
        ends.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*ends)


def compiled_whole(model):
    return torch.compile(model, backend="aot_eager")


def compiled_part(model):
    model.net = torch.compile(model.net, backend="aot_eager")
    return model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec")
# Older compilers' own, about every autograd function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
@pytest.mark.parametrize("how", [compiled_whole, compiled_part])
@pytest.mark.parametrize("mixin", [ACLSMixin, MarginAwareMixin, losses.MDCAMixin])
def test_compiled_modules_train_as_they_do_uncompiled(mixin, how, tmp_path):
    """The margin's gradient is differentiated twice, which no compiled network allows: it is run as it was written."""
    torch.compiler.reset()
    options = {"margin_clip": None} if mixin is MarginAwareMixin else AT_WORK.get(mixin, {})
    ends = []
    for prepare in (lambda model: model, how):
        model = made(mixin, lr=0.1, **options)
        trainer(tmp_path, max_steps=2).fit(prepare(model), loader(200, 20))
        ends.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*ends)


class Writing:
    """Saves the weights of every rank."""

    folder = ""

    def on_train_end(self):
        torch.save([parameter.detach() for parameter in self.parameters()], f"{self.folder}/{self.global_rank}.pt")


@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders")
# Python's and torch's, about forks of a process that has threads; nothing here uses them in the children.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
@pytest.mark.parametrize("mixin", [ACLSMixin, MarginAwareMixin])
def test_two_processes_step_like_one(mixin, tmp_path):
    options = {"margin_clip": None} if mixin is MarginAwareMixin else AT_WORK.get(mixin, {})
    one = made(mixin, lr=0.1, **options)
    trainer(tmp_path, max_steps=1).fit(one, loader(100, 20))
    two = type("Both", (mixin, Writing, LitClassifier), {})(lr=0.1, **options)
    two.folder = str(tmp_path)
    trainer(tmp_path, max_steps=1, devices=2, strategy="ddp_fork").fit(two, loader(100, 20, size=50))
    for rank in (0, 1):
        for value, expected in zip(torch.load(tmp_path / f"{rank}.pt"), one.parameters(), strict=True):
            torch.testing.assert_close(value, expected.detach())


def test_a_calibrated_training_may_be_clamped_too(tmp_path):
    model = made(ACLSMixin, Validating)
    clamping = NeuralClamping(loader(400, 30), output_maps=("temperature",), grids=())
    trainer(tmp_path, clamping).fit(model, loader(200, 20), loader(100, 40))
    assert clamping.result.after["nll"] < clamping.result.before["nll"]


# Lightning 2.6 uses what newer jsonargparse calls deprecated.
@pytest.mark.filterwarnings("ignore:(?s).*(JsonargparseDeprecationWarning|was deprecated in v4)")
def test_lightning_cli_sets_the_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # LightningCLI would read pytest's own arguments.
    monkeypatch.setattr(sys, "argv", ["train.py"])

    class Calibrated(ACLSMixin, LitClassifier):
        pass

    cli = LightningCLI(
        Calibrated,
        run=False,
        args=["--model.acls_margin=6", "--model.lr=0.5", "--model.loss_ignore_index=7", "--trainer.logger=false"],
        save_config_callback=None,
        seed_everything_default=0,
    )
    assert cli.model.calibrated_loss_function.keywords["margin"] == 6.0

    class Margins(MarginAwareMixin, LitClassifier):
        pass

    options = ["--model.margin_mean=[0.5,0.4,0.3]", "--model.margin_clip=null", "--trainer.logger=false"]
    other = LightningCLI(Margins, run=False, args=options, save_config_callback=None, seed_everything_default=0)
    assert list(other.model.calibrated_loss_function.keywords["mean"]) == [0.5, 0.4, 0.3]
    assert other.model.calibrated_loss_function.keywords["clip"] is None
    assert cli.model.hparams["lr"] == 0.5
    assert cli.model.loss_ignore_index == 7
