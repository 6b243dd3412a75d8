"""CPC, CRL, AdaFocal and CALS: the official numbers, the formulas in NumPy, and what is learned as state of a run."""

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_clamp.losses import (
    AdaFocalMixin,
    ASLPMixin,
    CALSMixin,
    CRLMixin,
    Indexed,
    adafocal_loss,
    cals_loss,
    cpc_loss,
    crl_loss,
)
from lightning_clamp.losses.adafocal import confidence_cells, equal_mass_bins, updated_gamma
from lightning_clamp.losses.cals import Multipliers, distance_sums, updated_multipliers
from lightning_clamp.losses.crl import CONFIDENCES, correct_items, normalised_correctness
from tests import references as ref
from tests.scenarios import LitClassifier, Segmenter, Validating, drawn, loader, made, maps, trainer, value_and_gradient

OFFICIAL = ref.OFFICIAL_LOSSES["losses"]
KEYS = ["K10", "K2", "K100", "K10_s12"]
every_key = pytest.mark.parametrize("key", KEYS)


def assert_official(value, gradient, official, rel=1e-9):
    assert gradient.abs().sum() == pytest.approx(official["grad"]["abs_sum"], rel=rel)
    for row in (0, 17):
        assert gradient[row, :5].tolist() == pytest.approx(official["grad"][f"row{row}"], rel=rel, abs=1e-11)
    assert value == pytest.approx(official["value"].get("loss", official["value"].get("penalty")), rel=rel)


def without_cross_entropy(loss):
    return lambda z, y, **options: loss(z, y, **options) - F.cross_entropy(z, y)


# CPC


@pytest.mark.parametrize("key", ["K10", "K100", "K10_s12"])
@pytest.mark.parametrize(("name", "options"), [("cpc_cfg", {}), ("cpc", {"lambda_bdc": 1.0})])
def test_cpc_is_the_official_one_but_for_a_constant(key, name, options):
    logits, target = ref.official_inputs(key, 64)
    # The code counts the pair of a class with itself.
    constant = np.log(2) / 2 / (logits.shape[1] - 2)
    value, gradient = value_and_gradient(cpc_loss, logits, target, **options)
    assert_official(value + constant, gradient, OFFICIAL[key][name])


def test_cpc_of_two_classes_has_no_pair_of_others():
    logits, target = ref.official_inputs("K2", 64)
    log_terms = {}
    value = cpc_loss(logits, target, log_terms=log_terms)
    assert log_terms["discrimination"] == pytest.approx(OFFICIAL["K2"]["cpc"]["value"]["bdc"], rel=1e-9)
    assert log_terms["exclusion"] == 0
    torch.testing.assert_close(value, 1.1 * F.cross_entropy(logits, target))


@pytest.mark.parametrize("shape", [(6, 5), (6, 3), (2, 4, 3)])
def test_cpc_is_its_formula(shape):
    logits, target = drawn(*shape)
    rows, labels = logits.movedim(1, -1).reshape(-1, shape[1]).numpy(), target.flatten().numpy()
    log_sigmoid, total = lambda x: -np.log1p(np.exp(-x)), []
    for z, y in zip(rows, labels, strict=True):
        others = [j for j in range(len(z)) if j != y]
        bdc = -np.mean([log_sigmoid(z[y] - z[j]) for j in others])
        bec = -np.mean([0.5 * log_sigmoid(z[j] - z[k]) for j in others for k in others if j != k])
        total.append(np.log(np.exp(z - z[y]).sum()) + 0.3 * bdc + 0.7 * bec)
    value = cpc_loss(logits, target, lambda_bdc=0.3, lambda_bec=0.7, reduction="none")
    np.testing.assert_allclose(value.flatten(), total, rtol=1e-12)


# CRL


@every_key
@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_crl_is_the_official_one(key, confidence):
    logits, target = ref.official_inputs(key, 64)
    counts = torch.arange(64) * 3 % 7
    correctness = normalised_correctness(counts.double(), 0, 8)
    loss = without_cross_entropy(crl_loss)
    value, gradient = value_and_gradient(loss, logits, target, correctness=correctness, confidence=confidence)
    official = OFFICIAL[key][f"crl_{confidence}"]
    _, slope = value_and_gradient(lambda z, y: F.cross_entropy(z, y), logits, target)
    _, both = value_and_gradient(crl_loss, logits, target, correctness=correctness, confidence=confidence)
    torch.testing.assert_close(gradient, both - slope)
    if confidence == "entropy":
        # The official code has log(10) and log(100) with six digits, and log(10) for every other number of classes.
        factor = np.log(logits.shape[1]) / (4.605170 if key == "K100" else 2.302585)
        if abs(factor - 1) > 1e-6:
            return
        assert_official(value, gradient, official, rel=1e-6)
    else:
        assert_official(value, gradient, official)


@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_crl_is_its_formula(confidence):
    logits, target = drawn(7, 5, scale=1.0)
    correctness = np.array([0.2, 0.9, 0.9, 0.1, 0.0, 1.0, 0.5])
    probs = logits.softmax(1).numpy()
    kappa = {
        "softmax": probs.max(1),
        "entropy": (probs * np.log(probs)).sum(1) / np.log(5),
        "margin": np.diff(np.sort(probs, 1)[:, -2:], axis=1)[:, 0],
    }[confidence]
    expected = []
    for i in range(7):
        j = (i + 1) % 7
        order = np.sign(correctness[i] - correctness[j])
        short = max(0.0, abs(correctness[i] - correctness[j]) - order * (kappa[i] - kappa[j])) if order else 0.0
        expected.append(-np.log(probs[i, target[i]]) + 0.5 * short)
    options = {"correctness": torch.from_numpy(correctness), "lambda_": 0.5, "confidence": confidence}
    value = crl_loss(logits, target, **options, reduction="none")
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda z: crl_loss(z, target, **options), logits.requires_grad_())


def test_pairs_with_an_item_that_is_left_out_have_no_order():
    logits, target = drawn(4, 3)
    correctness = torch.tensor([0.0, 0.3, 0.6, 1.0])
    log_terms = {}
    crl_loss(logits, target.index_fill(0, torch.tensor([1]), -1), correctness=correctness, ignore_index=-1,
             log_terms=log_terms)  # fmt: skip
    confidence = logits.softmax(1).amax(1)
    pairs = [F.relu(0.4 + confidence[2] - confidence[3]), F.relu(1 - confidence[3] + confidence[0])]
    assert log_terms["regularizer"] == pytest.approx(float(sum(pairs) / 3))


def test_one_logit_has_a_ranking_too():
    logits, target = drawn(6, 1)[0], torch.arange(6) % 2
    correctness = torch.linspace(0, 1, 6)
    pair = torch.cat([-logits / 2, logits / 2], 1)
    for confidence in CONFIDENCES:
        one = crl_loss(logits, target, correctness=correctness, confidence=confidence, task="binary")
        torch.testing.assert_close(one, crl_loss(pair, target, correctness=correctness, confidence=confidence))


def test_a_history_has_one_number_per_item():
    logits, target = drawn(4, 3)
    with pytest.raises(ValueError, match=r"`correctness` must have shape \(4,\), got \(3,\)"):
        crl_loss(logits, target, correctness=torch.zeros(3))
    logits, target = drawn(2, 3, 5)
    with pytest.raises(ValueError, match=r"a target of shape \(2, 5\) has several .* CRL is for one prediction"):
        crl_loss(logits, target, correctness=torch.zeros(2))


def test_correctness_is_normalised_by_the_least_and_the_epochs():
    counts = torch.tensor([1.0, 2.0, 4.0])
    assert normalised_correctness(counts, 1.0, 5).tolist() == [0.0, 0.25, 0.75]
    # In the first epoch, and where all were always right.
    assert normalised_correctness(torch.tensor([0.0, 1.0]), 0, 0).tolist() == [0.0, 1.0]
    assert normalised_correctness(torch.tensor([3.0, 3.0]), 3.0, 3).tolist() == [0.0, 0.0]


# AdaFocal


@every_key
@pytest.mark.parametrize("name", ["adafocal_init", "adafocal_upd1", "adafocal_upd3"])
def test_adafocal_is_the_official_one(key, name):
    logits, target = ref.official_inputs(key, 64)
    steps = {"init": 0, "upd1": 1, "upd3": 3}[name.split("_")[1]]
    gamma, bins = torch.ones(15, dtype=torch.float64), torch.arange(15, dtype=torch.float64)
    edges = torch.arange(1, 15, dtype=torch.float64) / 15
    for _ in range(steps):
        gamma = updated_gamma(gamma, 0.9 * torch.sin(1.3 * bins + 0.5) - 0.6)
    if steps:
        assert gamma.tolist() == pytest.approx(OFFICIAL[key][name]["gammas"], rel=1e-12)
        edges = edges**1.2
    value, gradient = value_and_gradient(adafocal_loss, logits, target, gamma=gamma, edges=edges, reduction="sum")
    assert_official(value, gradient, OFFICIAL[key][name])


def test_adafocal_is_its_formula():
    logits, target = drawn(9, 4, scale=1.0)
    gamma, edges = np.array([-1.5, 0.7, 3.0]), np.array([0.2, 0.5])
    expected = []
    for z, y in zip(logits.numpy(), target.numpy(), strict=True):
        p = np.exp(z[y]) / np.exp(z).sum()
        g = gamma[(p >= edges).sum()]
        expected.append(-((1 - np.sign(g) * p) ** abs(g)) * np.log(p))
    options = {"gamma": torch.from_numpy(gamma), "edges": torch.from_numpy(edges)}
    np.testing.assert_allclose(adafocal_loss(logits, target, **options, reduction="none"), expected, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda z: adafocal_loss(z, target, **options), logits.requires_grad_())


def test_exponents_stay_in_their_range():
    gamma = updated_gamma(torch.tensor([10.0, -1.9, 0.21, -0.21]), torch.tensor([2.0, -0.9, -0.5, 0.5]))
    assert gamma.tolist() == pytest.approx([20.0, -2.0, -0.2, 0.2])


def test_bins_have_equal_counts_and_begin_at_the_first_of_their_samples():
    logits, target = drawn(60, 4)
    cells = sum(
        confidence_cells(z, y, 5, task="multiclass") for z, y in zip(logits.split(7), target.split(7), strict=True)
    )
    excess, edges = equal_mass_bins(cells, 5)
    confidence, predicted = logits.softmax(1).max(1)
    order = confidence.argsort()
    right = (predicted == target)[order].double().reshape(5, 12)
    expected = confidence[order].reshape(5, 12)
    torch.testing.assert_close(excess, (expected - right).mean(1))
    torch.testing.assert_close(edges, expected[1:, 0])


def test_fewer_samples_than_bins_give_bins_all_the_same():
    logits, target = drawn(3, 4)
    excess, edges = equal_mass_bins(confidence_cells(logits, target, 15, task="multiclass"), 15)
    assert excess.isfinite().all()
    assert (edges.diff() >= 0).all()


def test_exponents_and_edges_belong_together():
    logits, target = drawn(4, 3)
    for gamma, edges in ((torch.ones(3), None), (torch.ones(3), torch.tensor([0.5])), (2.0, torch.tensor([0.5]))):
        with pytest.raises(ValueError, match="`gamma` must be one number without `edges`, or have one per bin"):
            adafocal_loss(logits, target, gamma=gamma, edges=edges)


# CALS


@every_key
@pytest.mark.parametrize("name", ["cals_phr_m10", "cals_phr_default_m20"])
def test_cals_is_the_official_one(key, name):
    logits, target = ref.official_inputs(key, 64)
    k = torch.arange(logits.shape[1], dtype=torch.float64)
    options = {"margin": 20.0}
    if name == "cals_phr_m10":
        options = {"multiplier": 0.1 + 0.05 * (k % 5), "rho": 1 + 0.25 * (k % 3)}
    log_terms = {}
    cals_loss(logits, target, **options, log_terms=log_terms)
    _, gradient = value_and_gradient(without_cross_entropy(cals_loss), logits, target, **options)
    assert_official(log_terms["regularizer"].item(), gradient, OFFICIAL[key][name])


@every_key
def test_multipliers_are_the_official_ones(key):
    logits, target = ref.official_inputs(key, 64)
    learned = Multipliers(*(part.double() if part.is_floating_point() else part for part in Multipliers.start()))
    for step in OFFICIAL[key]["cals_phr_updates"]["steps"]:
        scaled = step["logit_scale"] * logits
        # Any split of the data gives the same.
        sums = sum(
            distance_sums(z, y, learned, 5.0, task="multiclass")
            for z, y in zip(scaled.split(10), target.split(10), strict=True)
        )
        learned = updated_multipliers(learned, sums, rho_every=1)
        for name, values in (("lambd", learned.multiplier), ("rho", learned.rho), ("constraints", learned.distance)):
            assert values[:5].tolist() == pytest.approx(step[name], rel=1e-9)
        log_terms = {}
        cals_loss(logits, target, multiplier=learned.multiplier, rho=learned.rho, margin=5.0, log_terms=log_terms)
        if step is OFFICIAL[key]["cals_phr_updates"]["steps"][0]:
            assert log_terms["regularizer"] == pytest.approx(step["penalty_after"], rel=1e-9)


def test_cals_is_its_formula():
    logits, target = drawn(6, 4)
    multiplier, rho, m = np.array([0.1, 2.0, 1e-6, 0.5]), np.array([1.0, 1.2, 3.0, 10.0]), 3.0
    expected = []
    for z, y in zip(logits.numpy(), target.numpy(), strict=True):
        h = (z.max() - z - m) / m
        inside = multiplier + rho * h >= 0
        p = np.where(inside, multiplier * h + rho * h**2 / 2, -(multiplier**2) / (2 * rho))
        expected.append(np.log(np.exp(z - z[y]).sum()) + p.mean())
    options = {"multiplier": torch.from_numpy(multiplier), "rho": torch.from_numpy(rho), "margin": m}
    np.testing.assert_allclose(cals_loss(logits, target, **options, reduction="none"), expected, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda z: cals_loss(z, target, **options), logits.requires_grad_())


def test_there_is_one_multiplier_per_class():
    logits, target = drawn(4, 3)
    with pytest.raises(ValueError, match="`rho` must be one number or have one per class, 3, got 2"):
        cals_loss(logits, target, rho=torch.ones(2))
    with pytest.raises(ValueError, match="`margin` must be a number above 0, got 0"):
        cals_loss(logits, target, margin=0)


@pytest.mark.parametrize("shape", [(9, 4), (2, 4, 3, 3)])
def test_what_is_left_out_of_validation_data_is_not_measured(shape):
    logits, target = drawn(*shape)
    keep = target != 2
    rows, labels = logits.movedim(1, -1)[keep], target[keep]
    start = Multipliers.start()
    torch.testing.assert_close(
        distance_sums(logits, target, start, 3.0, task="multiclass", ignore_index=2),
        distance_sums(rows, labels, start, 3.0, task="multiclass"),
    )
    torch.testing.assert_close(
        confidence_cells(logits, target, 15, task="multiclass", ignore_index=2),
        confidence_cells(rows, labels, 15, task="multiclass"),
    )


# The mixins


def data(n=60, size=20):
    return DataLoader(Indexed(loader(n, 20).dataset), batch_size=size)


def val_data():
    return loader(100, 40, size=25)


CLASSES = {
    mixin: type(f"With{mixin.__name__}", (mixin, Validating), {}) for mixin in (CRLMixin, AdaFocalMixin, CALSMixin)
}
OPTIONS = {CALSMixin: {"cals_margin": 1.0, "cals_rho_every": 1}}
every_mixin = pytest.mark.parametrize("mixin", CLASSES)


def new(mixin, lr=0.1, **options):
    torch.manual_seed(0)
    return CLASSES[mixin](lr=lr, **OPTIONS.get(mixin, {}), **options)


def state(model):
    return {name: value.clone() for name, value in model.calibrated_loss_state().items()}


def test_two_epochs_of_crl_are_those_of_the_formula(tmp_path):
    model, other = new(CRLMixin), LitClassifier(lr=0.1)
    trainer(tmp_path, max_epochs=3).fit(model, data(), val_data())
    optimizer, counts = torch.optim.SGD(other.parameters(), lr=0.1), torch.zeros(60)
    for epoch in range(3):
        for inputs, target, index in data():
            low = counts.min()
            correctness = (counts[index] - low) / (max(epoch, 1) - low)
            logits = other(inputs)
            confidence = logits.softmax(1).amax(1)
            ahead = correctness - correctness.roll(-1)
            ranking = F.relu(ahead.abs() - ahead.sign() * (confidence - confidence.roll(-1)))[ahead != 0].sum() / 20
            optimizer.zero_grad()
            (F.cross_entropy(logits, target) + ranking).backward()
            optimizer.step()
            counts[index] += (logits.argmax(1) == target).float()
    assert torch.equal(model.crl_counts.values, counts)
    assert model._crl_epochs == 3
    for value, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(value, expected)


def test_a_step_of_adafocal_after_a_validation_is_one_of_the_formula(tmp_path):
    model, other = new(AdaFocalMixin), LitClassifier(lr=0.1)
    trainer(tmp_path, max_epochs=1, num_sanity_val_steps=2).fit(model, data(20), val_data())
    (inputs, target, _), optimizer = next(iter(data(20))), torch.optim.SGD(other.parameters(), lr=0.1)
    adafocal_loss(other(inputs), target).backward()
    optimizer.step()
    # Bins of the validation after the epoch, sample by sample: 100 samples make 15 bins of 6 2/3.
    x, y = val_data().dataset.tensors
    confidence, predicted = other(x).detach().double().softmax(1).max(1)
    order = confidence.argsort()
    excess = (confidence - (predicted == y).double())[order]
    parts = excess.repeat_interleave(3).reshape(15, 20).mean(1)
    torch.testing.assert_close(
        model.adafocal_gammas, updated_gamma(torch.ones(15), parts.float()), rtol=1e-4, atol=1e-5
    )
    place = torch.arange(1, 15) * 100 // 15
    torch.testing.assert_close(model.adafocal_edges, confidence[order][place].float(), rtol=1e-4, atol=1e-4)
    # And the next step uses them.
    expected = adafocal_loss(model(inputs), target, gamma=model.adafocal_gammas, edges=model.adafocal_edges)
    torch.testing.assert_close(model.calibrated_loss_of(inputs, target, None, {}), expected)


def test_a_step_of_cals_after_a_validation_is_one_of_the_formula(tmp_path):
    model, other = new(CALSMixin), LitClassifier(lr=0.1)
    trainer(tmp_path, max_epochs=2).fit(model, data(20), val_data())
    (inputs, target, _), optimizer = next(iter(data(20))), torch.optim.SGD(other.parameters(), lr=0.1)
    x, _ = val_data().dataset.tensors
    multiplier, rho, before = torch.full((4,), 1e-6), torch.ones(4), None
    for _ in range(2):
        optimizer.zero_grad()
        cals_loss(other(inputs), target, multiplier=multiplier, rho=rho, margin=1.0).backward()
        optimizer.step()
        with torch.no_grad():
            z = other(x)
        h = z.amax(1, keepdim=True) - z - 1
        multiplier = (multiplier + rho * h).clamp(1e-6, 1e6).mean(0)
        if before is not None:
            rho = torch.where(h.mean(0) > 0.9 * before.clamp_min(0), 1.2 * rho, rho)
        before = h.mean(0)
    torch.testing.assert_close(model.cals_learned.multiplier, multiplier)
    torch.testing.assert_close(model.cals_learned.rho, rho)
    assert (rho > 1).any()
    assert model.cals_learned.validations == 2
    for value, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(value, expected)


@every_mixin
def test_what_was_learned_is_in_the_checkpoint_and_the_plain_module_takes_it(mixin, tmp_path):
    model = new(mixin)
    run = trainer(tmp_path, max_epochs=2)
    run.fit(model, data(), val_data())
    assert model.state_dict().keys() == LitClassifier().state_dict().keys()
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = CLASSES[mixin].load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    for name, value in state(model).items():
        assert torch.equal(state(again)[name], value)
        assert not torch.equal(state(new(mixin))[name], value)
    Validating.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    # A checkpoint of another loss, or of none, says nothing.
    other = CRLMixin if mixin is CALSMixin else CALSMixin
    fresh = new(other)
    for checkpoint in (torch.load(tmp_path / "last.ckpt", weights_only=True), {}):
        fresh.on_load_checkpoint(checkpoint)
    for name, value in state(new(other)).items():
        assert torch.equal(state(fresh)[name], value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("interval", [1.0, 1])
@every_mixin
def test_a_resumed_run_is_an_uninterrupted_one(mixin, interval, tmp_path):
    """After an epoch, and in its midst: with a validation after every batch, the checkpoint is one of those."""
    options = {"val_check_interval": interval, "num_sanity_val_steps": 0}
    whole = new(mixin)
    trainer(tmp_path, max_epochs=4, **options).fit(whole, data(), val_data())
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}-{step}", save_on_train_epoch_end=False)
    trainer(tmp_path, saving, max_epochs=3, **options).fit(new(mixin), data(), val_data())
    resumed, checkpoint = new(mixin), tmp_path / ("epoch=1-step=6.ckpt" if interval == 1.0 else "epoch=1-step=5.ckpt")
    trainer(tmp_path, max_epochs=4, **options).fit(resumed, data(), val_data(), ckpt_path=checkpoint)
    for name, value in state(whole).items():
        torch.testing.assert_close(state(resumed)[name], value, rtol=0, atol=0, msg=name)
    for value, expected in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(value, expected)


class Writing:
    folder = ""

    def on_train_end(self):
        torch.save((state(self), list(self.parameters())), f"{self.folder}/{self.global_rank}.pt")


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders")
@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
# Python's and torch's, about forks of a process that has threads; nothing here uses them in the children.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
@every_mixin
def test_two_ranks_learn_what_one_process_learns_and_send_it_home(mixin, tmp_path):
    """Nothing is trained (lr 0), so that both see the same, also of CRL, whose pairs are formed on each rank."""
    one = new(mixin, lr=0.0)
    trainer(tmp_path, max_epochs=2).fit(one, data(), val_data())
    two = type("Both", (mixin, Writing, Validating), {})(lr=0.0, **OPTIONS.get(mixin, {}))
    two.folder = str(tmp_path)
    trainer(tmp_path, max_epochs=2, devices=2, strategy="ddp_fork").fit(two, data(size=10), val_data())
    ranks = [torch.load(tmp_path / f"{rank}.pt")[0] for rank in (0, 1)]
    for name, value in state(one).items():
        torch.testing.assert_close(ranks[0][name], value, rtol=1e-6, atol=1e-6)
        assert torch.equal(ranks[0][name], ranks[1][name])
        # This process knows it as well, and the state_dict is the plain module's again.
        assert torch.equal(state(two)[name], ranks[0][name])
    assert two.state_dict().keys() == LitClassifier().state_dict().keys()


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
def test_alphas_come_home_too(tmp_path):
    model = made(ASLPMixin, Segmenter, aslp_warmup_epochs=1)
    batches = DataLoader(Indexed(maps()), batch_size=4)
    trainer(tmp_path, max_epochs=3, strategy="ddp_fork", devices=1).fit(model, batches, DataLoader(maps(2)))
    assert (model.aslp_alphas.values > 0).all()
    assert len(model.aslp_alphas.values) == 8
    assert model.state_dict().keys() == Segmenter().state_dict().keys()


def test_the_launcher_of_processes_that_end_with_their_fit_is_where_it_was(tmp_path):
    """It has no public name."""
    for strategy in ("ddp_fork", "ddp_spawn"):
        assert isinstance(trainer(tmp_path, strategy=strategy, devices=2).strategy.launcher, _MultiProcessingLauncher)
    assert not isinstance(trainer(tmp_path, strategy="ddp", devices=2).strategy.launcher, _MultiProcessingLauncher)


@pytest.mark.parametrize("mixin", [AdaFocalMixin, CALSMixin])
def test_a_run_that_never_validates_is_refused(mixin, tmp_path):
    with pytest.raises(MisconfigurationException, match="learns from validation data: give the Trainer a validation"):
        trainer(tmp_path).fit(made(mixin), data())


@pytest.mark.parametrize("mixin", [AdaFocalMixin, CALSMixin])
def test_nothing_is_learned_outside_of_a_fit_or_from_other_sets(mixin, tmp_path):
    model = new(mixin)
    before = state(model)
    trainer(tmp_path).validate(model, val_data(), verbose=False)
    for name, value in before.items():
        assert torch.equal(state(model)[name], value)

    # Of two validation sets the first counts.
    class Several(mixin, LitClassifier):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            pass

    torch.manual_seed(0)
    both = Several(lr=0.1, **OPTIONS.get(mixin, {}))
    trainer(tmp_path).fit(both, data(), [val_data(), loader(50, 70)])
    trainer(tmp_path).fit(model, data(), val_data())
    for name, value in state(both).items():
        assert torch.equal(state(model)[name], value)


@every_mixin
def test_lower_precision_learns_about_the_same(mixin, tmp_path):
    found = {}
    for precision in ("32", "bf16-mixed", "bf16-true"):
        model = new(mixin, lr=0.0)
        trainer(tmp_path, precision=precision, max_epochs=1).fit(model, data(), val_data())
        found[precision] = state(model)
    for precision in ("bf16-mixed", "bf16-true"):
        for name, value in found["32"].items():
            torch.testing.assert_close(
                found[precision][name].to(value.dtype), value, rtol=0.1, atol=0.3 if mixin is AdaFocalMixin else 0.1
            )


def test_a_segmenter_learns_multipliers(tmp_path):
    model = made(CALSMixin, Segmenter, loss_task="binary", cals_margin=0.5)
    trainer(tmp_path).fit(model, DataLoader(maps(), batch_size=4), DataLoader(maps(2), batch_size=2))
    assert model.cals_learned.multiplier.shape == (2,)


def test_correct_items_are_those_whose_label_has_the_largest_logit():
    logits, target = torch.eye(3), torch.tensor([0, 0, 2])
    assert correct_items(logits, target, task="multiclass", ignore_index=2).tolist() == [1, 0, 0]
