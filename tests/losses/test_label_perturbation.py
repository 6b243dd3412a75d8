"""SC-BCE and ASLP: the official numbers in the paper's β, the draws, and α as state of a run."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_clamp import CalibrationModule, calibrate
from lightning_clamp.losses import ASLPMixin, Indexed, LabelPerturbationRule, SCBCEMixin, sc_bce_loss
from lightning_clamp.losses.label_perturbation import signed_logit
from lightning_clamp.losses.samples import SampleValues
from tests import references as ref
from tests.scenarios import Segmenter, maps, trainer

ASLP = ref.OFFICIAL_LOSSES["aslp"]


def official_maps() -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels, and logits that are right everywhere, of six images, by formula."""
    n, h, w = np.arange(6.0)[:, None, None, None], np.arange(16.0)[None, None, :, None], np.arange(16.0)
    wave = torch.from_numpy(np.sin(0.9 * n + 0.31 * h + 0.47 * w))
    target = torch.from_numpy((((h - 8 - n) ** 2 + (w - 9 + n) ** 2) < 30) * 1.0)
    return 4 * wave, target, (2 * target - 1) * (2 + wave)


@pytest.mark.parametrize("half_beta", ["0.5", "0.75", "1.0"])
def test_values_and_gradients_are_the_official_ones_with_twice_their_beta(half_beta):
    official = ASLP["slp"][half_beta]
    logits, target, _ = official_maps()
    logits.requires_grad_()
    # An image with α = 1 is always perturbed, and one with α = 0 never.
    alpha = torch.tensor(official["perturbed"]).double()
    loss = sc_bce_loss(logits, target, alpha=alpha, beta=2 * float(half_beta))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(official["bce_loss"], rel=1e-12)
    assert gradient.abs().sum() == pytest.approx(official["grad_abs_sum"], rel=1e-9)
    for image in (0, 3):
        assert gradient[image, 0, 8, :5].tolist() == pytest.approx(official[f"grad_n{image}_h8_w0_5"], rel=1e-9)


def test_labels_outside_0_and_1_are_refused():
    """The official default, 2 there and 4 here, turns labels into -1 and 2."""
    logits, target, _ = official_maps()
    with pytest.raises(ValueError, match=r"`beta` must lie in \(0, 2\], so that labels stay in \[0, 1\], got 4"):
        sc_bce_loss(logits, target, beta=4.0)


@pytest.mark.parametrize(("kind", "labels"), [("HI", (1.0, 0.0)), ("SI", (0.75, 0.25)), ("M", (0.5, 0.5))])
def test_each_kind_perturbs_labels_as_it_says(kind, labels):
    logits, target, _ = official_maps()
    perturbed = torch.where(target == 0, labels[0], labels[1]).double()
    loss = sc_bce_loss(logits, target, alpha=1.0, kind=kind, reduction="none")
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits, perturbed, reduction="none"))


def test_dynamic_moderation_adds_truncated_noise():
    logits = torch.full((20, 1, 50, 50), 3.0, dtype=torch.float64)
    target = torch.arange(20).reshape(20, 1, 1, 1).expand(20, 1, 50, 50) % 2
    loss = sc_bce_loss(logits, target, alpha=1.0, kind="DM", reduction="none")
    # BCE is softplus(z) - label z.
    label = (F.softplus(logits) - loss) / logits
    assert label.min() >= 0.25
    assert label.max() <= 0.75
    assert label.min() < 0.251
    assert label.max() > 0.749
    assert label.mean() == pytest.approx(0.5, abs=0.003)
    # Standard deviation of a standard normal within 1/4: a little below that of a uniform, .1443.
    assert label.std() == pytest.approx(0.1438, abs=0.001)


def test_images_are_perturbed_as_often_as_alpha_says():
    log_terms: dict[str, Tensor] = {}
    draws, again = (
        sc_bce_loss(
            torch.ones(8000, 1),
            torch.ones(8000),
            alpha=torch.linspace(0, 1, 4).repeat(2000),
            reduction="none",
            generator=torch.Generator().manual_seed(0),
            log_terms=log_terms,
        )
        for _ in range(2)
    )
    flipped = (draws > 1).float().reshape(2000, 4).mean(0)
    torch.testing.assert_close(flipped, torch.linspace(0, 1, 4), atol=0.03, rtol=0)
    assert log_terms["perturbed"] == pytest.approx(0.5, abs=0.02)
    assert torch.equal(draws, again)


def test_the_expectation_is_that_of_softened_labels():
    logits, target, _ = official_maps()
    both = [sc_bce_loss(logits, target, alpha=alpha, kind="SI") for alpha in (0.0, 1.0)]
    soft = (1 - 0.3 * 1.5) * target + 0.3 * 0.75
    torch.testing.assert_close(0.7 * both[0] + 0.3 * both[1], F.binary_cross_entropy_with_logits(logits, soft))


def test_layouts_ignored_positions_and_gradients():
    logits, target, _ = official_maps()
    marked = target.clone()
    marked[:, :, 3:9] = 255
    keep = marked != 255
    loss = sc_bce_loss(logits, marked, alpha=1.0, ignore_index=255)
    torch.testing.assert_close(loss, sc_bce_loss(logits[keep], target[keep], alpha=1.0))
    torch.testing.assert_close(loss, sc_bce_loss(logits[:, 0], marked[:, 0].long(), alpha=1.0, ignore_index=255))
    assert sc_bce_loss(logits, torch.full_like(target, 255), ignore_index=255) == 0
    small = logits[:2, :, :2, :3].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: sc_bce_loss(z, target[:2, :, :2, :3], alpha=torch.tensor([0.0, 1.0]), kind="SI"), small
    )
    assert sc_bce_loss(logits.half(), target, alpha=1.0).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"alpha": 1.2}, r"`alpha` must lie in \[0, 1\], got 1.2"),
        ({"alpha": torch.tensor([0.1, 0.2])}, r"have shape \(6,\), got \(2,\)"),
        ({"kind": "IH"}, r"`kind` must be one of \('HI', 'SI', 'M', 'DM'\), got 'IH'"),
        ({"beta": 0.0}, "`beta` must lie in"),
    ],
)
def test_options_out_of_range_are_named(options, sentence):
    logits, target, _ = official_maps()
    with pytest.raises(ValueError, match=sentence):
        sc_bce_loss(logits, target, **options)


@pytest.mark.parametrize("case", sorted(ASLP["alpha_update"]))
def test_the_rule_follows_the_official_steps(case):
    official = ASLP["alpha_update"][case]
    wavy, target, right = official_maps()
    rule = LabelPerturbationRule(min(2.0, 2 * official["beta"]), official["eta"], official["lbd"])
    # The official default is beyond what labels in [0, 1] allow; the rule itself goes on.
    object.__setattr__(rule, "beta", 2 * official["beta"])
    alpha = torch.tensor(official["alpha0"], dtype=torch.float64)
    logits = right if case.endswith("good") else wavy
    for step in official["steps"]:
        alpha = rule.updated(alpha, logits, target, accuracy=official["acc_val"], best_accuracy=1.0)
        assert alpha.tolist() == pytest.approx(step["alpha"], abs=1e-12)


def test_the_signed_logit_is_the_difference_of_the_two_cross_entropies():
    logits, target, _ = official_maps()
    for beta in (0.5, 1.5, 2.0):
        given, other = (
            sc_bce_loss(logits, target, alpha=alpha, beta=beta, reduction="none").flatten(1).mean(1)
            for alpha in (0.0, 1.0)
        )
        torch.testing.assert_close(signed_logit(logits, target), 2 / beta * (other - given))
    # Sure beyond the official clamp of probabilities counts no more.
    torch.testing.assert_close(
        signed_logit(torch.tensor([40.0, -40.0]), torch.tensor([1, 1])),
        torch.tensor([1, -1]) * np.float32(np.log(1e7 - 1)),
    )


def test_maximum_entropy_looks_at_the_best_accuracy():
    alpha, logits, target = torch.tensor([0.2, 0.3]), torch.tensor([1.0, -1.0]), torch.ones(2)
    rule = LabelPerturbationRule(2.0, eta=0.01, lambda_=10.0, rule="MEI")
    for accuracy, expected in ((0.9, [0.21, 0.29]), (0.8, [0.20, 0.28])):
        moved = rule.updated(alpha, logits, target, accuracy=accuracy, best_accuracy=0.9)
        torch.testing.assert_close(moved, torch.tensor(expected))
    # A network that fails for once leaves α as it is.
    logits[0] = torch.nan
    moved = rule.updated(alpha, logits, target, accuracy=0.9, best_accuracy=0.9)
    torch.testing.assert_close(moved, torch.tensor([0.2, 0.29]))
    for name, bad in (("eta", -1), ("lambda_", -1), ("rule", "MM"), ("beta", 3)):
        with pytest.raises(ValueError, match=f"`{name}` must"):
            LabelPerturbationRule(**{"beta": 2.0, name: bad})


class WithASLP(ASLPMixin, Segmenter):
    pass


class WithSCBCE(SCBCEMixin, Segmenter):
    pass


def train_loader(n: int = 8, size: int = 4) -> DataLoader:
    return DataLoader(Indexed(maps(n)), batch_size=size)


def val_loader() -> DataLoader:
    return DataLoader(maps(2), batch_size=2)


def test_alpha_is_learned_after_the_warm_up_and_is_in_the_checkpoint(tmp_path):
    model = WithASLP(aslp_warmup_epochs=3)
    run = trainer(tmp_path, max_epochs=3)
    run.fit(model, train_loader(), val_loader())
    assert model.aslp_alphas.values.tolist() == [0.0] * 8
    run = trainer(tmp_path, max_epochs=5)
    model = WithASLP(aslp_warmup_epochs=3, aslp_kind="SI")
    run.fit(model, train_loader(), val_loader())
    learned = model.aslp_alphas.values
    assert (learned > 0).any()
    assert learned.max() <= 0.1 / 0.75 + 0.01
    run.save_checkpoint(tmp_path / "last.ckpt")

    # A plain module takes the weights; α is not among them.
    plain = Segmenter.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(plain.conv.weight, model.conv.weight)
    resumed = WithASLP(aslp_warmup_epochs=3, aslp_kind="SI")
    trainer(tmp_path, max_epochs=5).fit(resumed, train_loader(), val_loader(), ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(resumed.aslp_alphas.values, learned)
    assert WithASLP.load_from_checkpoint(tmp_path / "last.ckpt").aslp_learning.beta == 1.5


class OfTheHook(WithASLP):
    """Logs the accuracy when the epoch ends, as modules with a torchmetrics object do; here it grows."""

    def validation_step(self, batch, batch_idx):
        pass

    def on_validation_epoch_end(self):
        self.log("val_accuracy", 0.8 + 0.02 * self.current_epoch)
        super().on_validation_epoch_end()


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("interval", [1.0, 0.5])
def test_a_resumed_run_knows_what_it_knew(tmp_path, interval):
    """Checkpoints of ModelCheckpoint, saved when the validation ends."""
    ends = []
    for resumed in (False, True):
        # α stays below what perturbs an image: the two runs draw other random numbers.
        model = OfTheHook(aslp_warmup_epochs=0, aslp_eta=1e-9, lr=0.0)
        options = {"val_check_interval": interval, "num_sanity_val_steps": 0}
        if resumed:
            saving = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}-{step}")
            trainer(tmp_path, saving, max_epochs=2, **options).fit(model, train_loader(), val_loader())
            model = OfTheHook(aslp_warmup_epochs=0, aslp_eta=1e-9, lr=0.0)
            checkpoint = max(tmp_path.glob("epoch=1-*.ckpt"))
            saved = torch.load(checkpoint, weights_only=True)["calibrated_loss"]
            assert saved["aslp_accuracies"].tolist() == pytest.approx([0.82, 0.82])
            trainer(tmp_path, max_epochs=3, **options).fit(model, train_loader(), val_loader(), ckpt_path=checkpoint)
        else:
            trainer(tmp_path, max_epochs=3, **options).fit(model, train_loader(), val_loader())
        ends.append((model.aslp_alphas.values, model._aslp_measured, model._aslp_best))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=1e-5, atol=0)
    assert (ends[0][0] > 0).all()
    assert ends[0][1:] == ends[1][1:]


def test_one_of_two_validation_sets_has_the_accuracy(tmp_path):
    model = WithASLP(aslp_warmup_epochs=1, aslp_accuracy="val_accuracy/dataloader_idx_1")
    trainer(tmp_path, max_epochs=3).fit(model, train_loader(), [val_loader(), val_loader()])
    assert (model.aslp_alphas.values > 0).all()


MISTAKES = {
    "no index": (WithASLP, {}, {"train": DataLoader(maps(), batch_size=4)}, TypeError, "wrap the training set in"),
    "no accuracy": (
        WithASLP, {"accuracy": None}, {}, MisconfigurationException,
        r"learns α from 'val_accuracy', which validation_step did not log; there is \['val_loss'\]",
    ),
    "percent": (WithASLP, {"accuracy": 91.0}, {}, MisconfigurationException, r"an accuracy in \[0, 1\], got 91"),
    "no validation": (WithASLP, {}, {"val": None}, MisconfigurationException, "give the Trainer a validation loader"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_get_one_sentence_before_or_at_the_first_step(case, tmp_path):
    cls, options, loaders, error, sentence = MISTAKES[case]
    with pytest.raises(error, match=sentence):
        trainer(tmp_path, limit_train_batches=2).fit(
            cls(**options), loaders.get("train", train_loader()), loaders.get("val", val_loader())
        )


def test_a_validation_outside_of_a_fit_asks_for_no_accuracy(tmp_path):
    model = WithASLP(accuracy=None)
    trainer(tmp_path).validate(model, val_loader(), verbose=False)
    module = calibrate(
        trainer(tmp_path), model, DataLoader(maps(20), batch_size=5), task="binary", method="temperature"
    )
    assert isinstance(module, CalibrationModule)


def test_options_are_checked_when_the_module_is_made():
    with pytest.raises(ValueError, match="`aslp_rule`"):
        WithASLP(aslp_rule="best")
    with pytest.raises(ValueError, match="`aslp_beta`"):
        WithASLP(aslp_beta=3.0)


def test_items_are_pairs():
    with pytest.raises(TypeError, match=r"Indexed needs items \(inputs, target\) or mappings, got int"):
        Indexed([3])[0]
    assert Indexed([{"image": 1, "mask": 2}])[0] == {"image": 1, "mask": 2, "index": 0}


def test_indices_are_checked():
    alphas = SampleValues()
    for index in (torch.tensor([0.5]), torch.tensor([[1]]), torch.tensor([-1])):
        with pytest.raises(ValueError, match="Indices must be integers"):
            alphas.of(index)


def test_the_fixed_amount_takes_pairs(tmp_path):
    model = WithSCBCE(sc_bce_alpha=0.5, sc_bce_kind="M")
    run = trainer(tmp_path, max_epochs=1)
    run.fit(model, DataLoader(maps(), batch_size=4), val_loader())
    assert 0 <= run.callback_metrics["train/perturbed"] <= 1
    assert run.callback_metrics["train/loss"] > 0


def test_all_ranks_have_every_alpha():
    """Each rank has other images, one of them both, and the largest index is known to one rank alone."""
    seen = [
        (torch.tensor([0, 3]), torch.tensor([0.1, 0.2])),
        (torch.tensor([1, 5, 3]), torch.tensor([0.3, 0.4, 0.6])),
        (torch.tensor([2]), None),
    ]
    together = threading.Barrier(len(seen), timeout=30)
    given: dict[int, Tensor] = {}

    def merged(rank: int) -> Tensor:
        def reduce(values: Tensor, how: str) -> Tensor:
            given[rank] = values.clone()
            together.wait()
            stacked = torch.stack([given[other] for other in range(len(seen))])
            together.wait()
            return stacked.sum(0) if how == "sum" else stacked.amax(0)

        alphas, (index, values) = SampleValues(), seen[rank]
        alphas.of(index)
        if values is not None:
            alphas.put(index, values)
        alphas.merge(reduce)
        assert not alphas.pending
        return alphas.values

    with ThreadPoolExecutor(len(seen)) as pool:
        for values in pool.map(merged, range(len(seen))):
            torch.testing.assert_close(values, torch.tensor([0.1, 0.3, 0.0, 0.4, 0.0, 0.4]))


class Writing(WithASLP):
    folder = ""

    def validation_step(self, batch, batch_idx):
        # Without sync_dist every rank has its own.
        self.log("val_accuracy", 0.9 + 0.08 * self.global_rank)

    def on_train_end(self):
        torch.save((self.aslp_alphas.values, self._aslp_measured), f"{self.folder}/{self.global_rank}.pt")


@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders")
@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
# Python's and torch's, about forks of a process that has threads; nothing here uses them in the children.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
def test_two_processes_end_with_one_set_of_alphas(tmp_path):
    model = Writing(aslp_warmup_epochs=1)
    model.folder = str(tmp_path)
    trainer(tmp_path, max_epochs=3, devices=2, strategy="ddp_fork").fit(model, train_loader(9, 2), val_loader())
    (one, accuracy), (other, same) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert accuracy == same == pytest.approx(0.94)
    assert torch.equal(one, other)
    assert len(one) == 9
    assert (one > 0).all()
