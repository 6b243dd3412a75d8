"""The losses of logits: the official numbers, the gradients, the layouts, and what is refused."""

import inspect

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_clamp import losses
from lightning_clamp.losses import acls_loss, entropy_penalty_loss, mbls_loss, mmce_loss
from lightning_clamp.losses.batch_statistics import _over_pairs, _over_ranks
from tests import references as ref
from tests.scenarios import LOSSES, drawn, every_loss, value_and_gradient

# What each official number was computed with.
CASES = {
    "acls_default": (losses.acls_loss, {}),
    "acls_m2": (losses.acls_loss, {"margin": 2, "alpha": 0.5, "pos_lambda": 0.7, "neg_lambda": 0.3}),
    "mbls_m10": (losses.mbls_loss, {}),
    "mbls_m2": (losses.mbls_loss, {"margin": 2}),
    "ls_byliu_0.05": (losses.label_smoothing_loss, {}),
    "ls_byliu_0.1": (losses.label_smoothing_loss, {"alpha": 0.1}),
    "focal_mdca_g1": (losses.focal_loss, {"gamma": 1}),
    "focal_torrvision_g2": (losses.focal_loss, {"gamma": 2, "reduction": "sum"}),
    "focal_mdca_g3": (losses.focal_loss, {}),
    "dual_focal_g1": (losses.dual_focal_loss, {"gamma": 1, "reduction": "sum"}),
    "dual_focal_g3": (losses.dual_focal_loss, {"gamma": 3, "reduction": "sum"}),
    "dual_focal_g5_mean": (losses.dual_focal_loss, {}),
    "flsd53": (losses.flsd_loss, {"reduction": "sum"}),
    "flsd_gamma2": (losses.flsd_loss, {"gamma": 2, "reduction": "sum"}),
    "flsd53_mdca": (losses.flsd_loss, {}),
    "ecp_1.0": (losses.entropy_penalty_loss, {"alpha": 1}),
    "ecp_0.1": (losses.entropy_penalty_loss, {}),
    "brier_torrvision": (losses.brier_loss, {}),
    "mmce_total_l2": (losses.mmce_loss, {"lambda_": 2}),
    "nll_mdca_b1": (losses.mdca_loss, {}),
    "dca_mdca_b1": (losses.dca_loss, {"beta": 1}),
    "dca_fourm": (losses.dca_loss, {}),
}


def test_every_loss_has_an_official_number():
    # tests/losses/test_learned.py has those of the others.
    elsewhere = {"adafocal_loss", "cals_loss", "cpc_loss", "crl_loss"}
    assert {loss.__name__ for loss, _ in CASES.values()} | elsewhere == set(LOSSES)


@pytest.mark.parametrize("key", ["K10", "K2", "K100", "K10_s12"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_the_official_ones(key, name):
    loss, options = CASES[name]
    official = ref.OFFICIAL_LOSSES["losses"][key][name]
    value, gradient = value_and_gradient(loss, *ref.official_inputs(key, 64), **options)
    assert value == pytest.approx(official["value"]["loss"], rel=1e-9)
    assert gradient.abs().sum() == pytest.approx(official["grad"]["abs_sum"], rel=1e-9)
    for row in (0, 17):
        assert gradient[row, :5].tolist() == pytest.approx(official["grad"][f"row{row}"], rel=1e-9, abs=1e-11)


@pytest.mark.parametrize("name", ["acls_default", "acls_m2", "mbls_m2", "nll_mdca_b1", "mmce_total_l2", "ecp_1.0"])
def test_log_terms_are_those_of_the_official_losses(name):
    loss, options = CASES[name]
    logits, target = ref.official_inputs("K10", 64)
    log_terms: dict[str, Tensor] = {}
    total = loss(logits.requires_grad_(), target, **options, log_terms=log_terms)
    assert log_terms["cross_entropy"] == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-12)
    assert not any(part.requires_grad for part in log_terms.values())
    official = ref.OFFICIAL_LOSSES["losses"]["K10"][name]["value"]
    weight = {"acls_default": 0.1, "acls_m2": 0.5, "mbls_m2": 0.1, "mmce_total_l2": 2.0, "ecp_1.0": -1.0}.get(name, 1.0)
    regularizer = log_terms.get("regularizer", log_terms.get("entropy"))
    assert log_terms["cross_entropy"] + weight * regularizer == pytest.approx(total.item(), rel=1e-12)
    if term := official.get("reg", official.get("ent")):
        assert regularizer == pytest.approx(term, rel=1e-11)


@every_loss
def test_every_loss_notes_the_cross_entropy(loss):
    logits, target = drawn(8, 5)
    log_terms: dict[str, Tensor] = {}
    loss(logits, target, log_terms=log_terms)
    assert log_terms["cross_entropy"] == pytest.approx(F.cross_entropy(logits, target).item())


@every_loss
@pytest.mark.parametrize("shape", [(8, 5), (2, 5, 3)], ids=["classes", "dense"])
def test_what_is_noted_changes_nothing(loss, shape):
    batch = drawn(*shape)
    torch.testing.assert_close(value_and_gradient(loss, *batch, log_terms={}), value_and_gradient(loss, *batch))


DEGENERATE = {
    "mmce": (losses.mmce_loss, {}, 1.0),
    "mdca": (losses.mdca_loss, {}, 1.0),
    "dca": (losses.dca_loss, {}, 0.0),
    "dual_focal_g2": (losses.dual_focal_loss, {"gamma": 2, "reduction": "sum"}, 0.0),
    "focal_g2": (losses.focal_loss, {"gamma": 2}, 0.0),
}


@pytest.mark.parametrize("name", sorted(ref.OFFICIAL_LOSSES["degenerate"]))
def test_all_right_all_wrong_and_one_row_are_the_official_ones(name):
    method, _, case = name.replace("_all_", " all_").replace("_single_", " single_").partition(" ")
    loss, options, minus_cross_entropy = DEGENERATE[method]
    logits = torch.from_numpy(ref.waves(1 if case.startswith("single") else 20, 5, 6.0)).requires_grad_()
    target = logits.argmax(1) if case.endswith("correct") else (logits.argmax(1) + 1) % 5
    value = loss(logits, target, **options) - minus_cross_entropy * F.cross_entropy(logits, target)
    (gradient,) = torch.autograd.grad(value, logits)
    official = ref.OFFICIAL_LOSSES["degenerate"][name]
    assert value.item() == pytest.approx(official["value"]["loss"], rel=1e-9)
    assert gradient.abs().sum() == pytest.approx(official["grad"]["loss"]["abs_sum"], rel=1e-9)
    assert gradient[0, :5].tolist() == pytest.approx(official["grad"]["loss"]["row0"], rel=1e-9, abs=1e-11)


# ACLS stops a gradient on purpose, so that it is not the derivative of its own value: see the test below.
@pytest.mark.parametrize("loss", [one for name, one in LOSSES.items() if name != "acls_loss"])
@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 2, 2)], ids=["classes", "dense"])
def test_gradients_are_those_of_the_values(loss, shape):
    logits, target = drawn(*shape)
    assert torch.autograd.gradcheck(
        lambda z: loss(z, target, ignore_index=1, reduction="none"), logits.requires_grad_()
    )


# Also where all logits are below 0, and no first term is above the margin.
@pytest.mark.parametrize("shift", [0, -20])
@pytest.mark.parametrize("reference", ["code", "paper"])
def test_acls_is_the_derivative_of_its_formula_with_the_stopped_terms_held(reference, shift):
    logits, target = drawn(6, 5)
    logits += shift
    top, low = logits.amax(1, keepdim=True), logits.amin(1, keepdim=True)
    is_top = logits == top
    half, share = (1.0, 1 / 4) if reference == "code" else (0.5, 1.0)
    floor = 0 if reference == "code" else low

    def formula(z: Tensor) -> Tensor:
        positive = torch.where(is_top, F.relu(z - floor - 1.5).square(), 0).sum(1)
        negative = torch.where(is_top, 0, F.relu(top - z - 1.5).square()).sum(1)
        return F.cross_entropy(z, target) + 0.3 * half * (0.7 * positive + 0.2 * share * negative).mean()

    options = {"alpha": 0.3, "pos_lambda": 0.7, "neg_lambda": 0.2, "margin": 1.5, "reference": reference}
    value, gradient = value_and_gradient(acls_loss, logits, target, **options)
    expected, slope = value_and_gradient(lambda z, _: formula(z), logits, target)
    assert torch.autograd.gradcheck(formula, logits.requires_grad_())
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, slope)


def test_acls_of_the_paper_has_the_gradient_of_the_paper():
    logits, target = drawn(7, 6)
    top, low = logits.amax(1, keepdim=True), logits.amin(1, keepdim=True)
    is_top = logits == top
    pull = torch.where(is_top, 0.1 * F.relu(logits - low - 2), -0.01 * F.relu(top - logits - 2))
    expected = (logits.softmax(1) - F.one_hot(target, 6) + pull) / 7
    _, gradient = value_and_gradient(acls_loss, logits, target, margin=2, reference="paper")
    torch.testing.assert_close(gradient, expected)


def test_a_constant_added_to_all_logits_changes_the_code_of_acls_and_nothing_else():
    logits, target = drawn(6, 5)
    for name, loss in LOSSES.items():
        same = torch.isclose(loss(logits + 20, target), loss(logits, target))
        assert bool(same) == (name != "acls_loss")
    assert torch.isclose(
        acls_loss(logits + 20, target, margin=2, reference="paper"),
        acls_loss(logits, target, margin=2, reference="paper"),
    )


def test_the_entropy_of_the_paper_is_summed_over_the_classes():
    logits, target = drawn(6, 5)
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    loss = entropy_penalty_loss(logits, target, alpha=0.3, reference="paper")
    torch.testing.assert_close(loss, F.cross_entropy(logits, target) - 0.3 * entropy)


def test_several_largest_logits_are_all_predicted():
    logits = torch.tensor([[5.0, 5.0, 1.0]], dtype=torch.float64)
    target = torch.tensor([2])
    cross_entropy = F.cross_entropy(logits, target)
    options = {"alpha": 1.0, "pos_lambda": 1.0, "neg_lambda": 1.0, "margin": 3.0}
    value, gradient = value_and_gradient(acls_loss, logits, target, **options)
    # relu(5 - 3)^2 twice, and relu(5 - 1 - 3)^2 / 2.
    assert value - cross_entropy == pytest.approx(8.5)
    pull = torch.tensor([[4.0, 4.0, -1.0]], dtype=torch.float64)
    torch.testing.assert_close(gradient, logits.softmax(1) - F.one_hot(target, 3) + pull)
    # The first is pulled down, as in the official code.
    _, ours = value_and_gradient(mbls_loss, logits, target, margin=3.0)
    _, torchs = value_and_gradient(
        lambda z, y: F.cross_entropy(z, y) + 0.1 * F.relu(z.max(1, keepdim=True).values - z - 3).mean(), logits, target
    )
    torch.testing.assert_close(ours, torchs)


@every_loss
def test_dense_outputs_are_rows_laid_out_otherwise(loss):
    logits, target = drawn(3, 4, 5, 6)
    flat, labels = logits.movedim(1, -1).reshape(-1, 4), target.flatten()
    dense, gradient = value_and_gradient(loss, logits, target, reduction="none")
    rows, slope = value_and_gradient(loss, flat, labels, reduction="none")
    assert dense.shape == target.shape
    torch.testing.assert_close(dense.flatten(), rows)
    torch.testing.assert_close(gradient.movedim(1, -1).reshape(-1, 4), slope)
    torch.testing.assert_close(loss(logits, target), rows.mean())
    torch.testing.assert_close(loss(logits, target, reduction="sum"), rows.sum())


@every_loss
@pytest.mark.parametrize("shape", [(9, 4), (2, 4, 3, 3)], ids=["classes", "dense"])
def test_ignored_positions_are_as_if_they_were_not_there(loss, shape):
    logits, target = drawn(*shape)
    ignored = torch.rand(target.shape, generator=torch.Generator().manual_seed(3)) < 0.4
    marked = target.masked_fill(ignored, 255)
    value, gradient = value_and_gradient(loss, logits, marked, ignore_index=255)
    rows = logits.movedim(1, -1)[~ignored]
    torch.testing.assert_close(value, loss(rows, target[~ignored]))
    assert not gradient.movedim(1, -1)[ignored].any()
    assert gradient.movedim(1, -1)[~ignored].all(1).any()
    assert not loss(logits, marked, ignore_index=255, reduction="none")[ignored].any()
    for garbage in (torch.nan, torch.inf, -torch.inf):
        spoiled = torch.where(ignored.unsqueeze(1), garbage, logits)
        again, slopes = value_and_gradient(loss, spoiled, marked, ignore_index=255)
        assert torch.equal(again, value)
        assert torch.equal(slopes, gradient)


@every_loss
def test_a_batch_of_nothing_costs_nothing(loss):
    logits, target = drawn(3, 4)
    value, gradient = value_and_gradient(loss, logits, torch.full_like(target, -100), ignore_index=-100)
    assert value == 0
    assert not gradient.any()
    value, gradient = value_and_gradient(loss, logits[:0], target[:0])
    assert value == 0
    assert gradient.shape == (0, 4)


@every_loss
def test_one_logit_is_two_classes(loss):
    logit, target = drawn(12, 1)[0][:, 0], torch.arange(12) % 2
    pair = torch.stack([-logit / 2, logit / 2], 1)
    expected = loss(pair, target)
    for shape in ((12,), (12, 1), (3, 1, 2, 2), (3, 2, 2), (3, 1, 1, 4), (3, 1, 4)):
        labels = target.reshape(shape)
        torch.testing.assert_close(loss(logit.reshape(shape), labels, task="binary"), expected)
        assert loss(logit.reshape(shape), labels, task="binary", reduction="none").shape == labels.shape
    torch.testing.assert_close(loss(logit, target.double(), task="binary"), expected)
    # Neither class is preferred.
    torch.testing.assert_close(loss(-logit, 1 - target, task="binary"), expected)


def test_binary_label_smoothing_is_that_of_two_classes():
    logit, target = drawn(12, 1)[0][:, 0], torch.arange(12) % 2
    ours = losses.label_smoothing_loss(logit, target, alpha=0.2, task="binary")
    torch.testing.assert_close(ours, F.binary_cross_entropy_with_logits(logit, target.double() * 0.8 + 0.1))


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(loss, dtype):
    # Squares of such logits are beyond float16.
    logits, target = drawn(16, 6, scale=150.0)
    half = logits.to(dtype)
    value, gradient = value_and_gradient(loss, half, target)
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(value, loss(half.float(), target))
    assert value.isfinite()


@every_loss
def test_saturated_rows_have_finite_gradients(loss):
    logits = torch.tensor([[200.0, 0.0, -200.0], [0.0, 0.0, 0.0], [-200.0, 200.0, 0.0]])
    options = {"gamma": 0.5} if "gamma" in inspect.signature(loss).parameters else {}
    for target in (torch.tensor([0, 1, 1]), torch.tensor([2, 2, 0])):
        value, gradient = value_and_gradient(loss, logits, target, **options)
        assert value.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("n", [1, 2, 50])
def test_mmce_is_its_sum_over_pairs(n):
    logits, target = drawn(n, 4, scale=1.0)
    confidence, predicted = logits.softmax(1).max(1)
    excess = (predicted == target).double() - confidence
    kernel = torch.exp(-(confidence[:, None] - confidence[None]).abs() / 0.4)
    expected = F.cross_entropy(logits, target) + 3 * (excess[:, None] * excess[None] * kernel).sum() / n**2
    torch.testing.assert_close(mmce_loss(logits, target, lambda_=3), expected)


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("n", [0, 1, 60])
def test_mmce_by_pairs_is_mmce_by_ranks(n, precision):
    generator = torch.Generator().manual_seed(n)
    log_confidence = -2 * torch.rand(n, generator=generator)
    correct, keep = (torch.rand(n, generator=generator) < part for part in (0.5, 0.8))
    for kept in (None, keep):
        with torch.autocast("cpu", precision, enabled=precision is not None):
            pairs, ranks = (way(log_confidence, correct, kept) for way in (_over_pairs, _over_ranks))
        torch.testing.assert_close(pairs, ranks)


def test_equal_confidences_are_pairs_too():
    log_confidence, correct = -torch.arange(60.0).remainder(4), torch.arange(60) % 3 == 0
    pairs, ranks = (way(log_confidence, correct, None) for way in (_over_pairs, _over_ranks))
    torch.testing.assert_close(pairs[0], ranks[0])
    assert pairs[1].unique().numel() <= 8


LAYOUTS = {
    "classes": (drawn(8, 5), {}),
    "ignoring": (drawn(8, 5), {"ignore_index": 2}),
    "dense": (drawn(2, 3, 2, 4), {"ignore_index": 1, "reduction": "none"}),
    "one logit": ((drawn(6, 1)[0], torch.arange(6).reshape(6, 1) % 2.0), {"task": "binary"}),
}


# Older compilers' own, about every autograd function.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        # Layouts are read by one function for all; of them this one leaves positions out as well.
        *((name, "dense") for name in LOSSES),
        *(
            (name, layout)
            for name in ("focal_loss", "mmce_loss", "acls_loss")
            for layout in LAYOUTS
            if layout != "dense"
        ),
    ],
)
def test_compiled_losses_are_the_same(name, layout):
    loss = LOSSES[name]
    (logits, target), options = LAYOUTS[layout]
    torch.compiler.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    ours, theirs = (value_and_gradient(one, logits, target, **options) for one in (compiled, loss))
    torch.testing.assert_close(ours, theirs)


@every_loss
def test_memory_may_be_laid_out_in_any_way(loss):
    logits, target = drawn(2, 4, 3, 5)
    expected = value_and_gradient(loss, logits, target)
    for other in (logits.contiguous(memory_format=torch.channels_last), logits.mT.contiguous().mT):
        torch.testing.assert_close(value_and_gradient(loss, other, target), expected)
    torch.testing.assert_close(value_and_gradient(loss, logits, target.to(torch.uint8)), expected)


# Smoothing asks for its probability, and a margin has no finite distance to it.
ALL_CLASSES = ("acls_loss", "cals_loss", "cpc_loss", "mbls_loss", "label_smoothing_loss")


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ALL_CLASSES])
def test_a_masked_class_has_no_part(name):
    logits, target = drawn(6, 4)
    masked = logits.index_fill(1, torch.tensor([3]), -torch.inf)
    value, gradient = value_and_gradient(LOSSES[name], masked, target % 3)
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert not gradient[:, 3].any()


@every_loss
def test_labels_out_of_range_are_named(loss):
    logits, _ = drawn(3, 4)
    with pytest.raises(ValueError, match=r"Targets must lie in \[0, 3\], got 4. Pass ignore_index="):
        loss(logits, torch.tensor([0, 4, 1]))
    with pytest.raises(ValueError, match="got -100"):
        loss(logits, torch.tensor([0, -100, 1]))


X, Y = torch.zeros(3, 4), torch.zeros(3, dtype=torch.long)
BAD = {
    "target float": ((X, Y.float()), {}, TypeError, "class indices as int64"),
    "one-hot": ((X, X.long()), {}, ValueError, "one-hot"),
    "too few labels": ((X, Y[:2]), {}, ValueError, r"need a target of shape \(3,\), got \(2,\)"),
    "one class": ((X[:, :1], Y), {}, ValueError, 'say task="binary"'),
    "no tensor": (([1.0], Y), {}, TypeError, "one float tensor of logits, got list"),
    "integers": ((X.long(), Y), {}, TypeError, "got torch.int64"),
    "reduction": ((X, Y), {"reduction": "average"}, ValueError, "`reduction` must be one of .* got 'average'"),
    "task": ((X, Y), {"task": "regression"}, ValueError, "`task` must be one of .* got 'regression'"),
    "binary labels": ((X[:, 0], Y + 2), {"task": "binary"}, ValueError, r"\[0, 1\], got 2"),
    "no probability": (
        (X[:, 0], Y + 1.5),
        {"task": "binary"},
        ValueError,
        r"in \[0, 1\], got 1.5. Pass ignore",
    ),
    "weights": ((X, Y), {"weight": torch.ones(3)}, ValueError, r"one number per class, \(4,\), got \(3,\)"),
    "negative weights": ((X, Y), {"weight": X[0] - 1}, ValueError, "`weight` must be at least 0, got -1"),
}


@pytest.mark.parametrize("case", BAD)
@every_loss
def test_bad_input_gets_one_sentence(loss, case):
    tensors, options, error, sentence = BAD[case]
    if "weight" in options and loss.func is losses.brier_loss:
        error, sentence = TypeError, "unexpected keyword argument"
    with pytest.raises(error, match=sentence):
        loss(*tensors, **options)


@pytest.mark.parametrize(
    ("loss", "options", "sentence"),
    [
        (losses.focal_loss, {"gamma": -1}, "`gamma` must be at least 0, got -1"),
        (losses.flsd_loss, {"gamma": float("nan")}, "`gamma` must be at least 0, got nan"),
        (losses.dual_focal_loss, {"gamma": -0.5}, "`gamma`"),
        (losses.label_smoothing_loss, {"alpha": 1.5}, r"`alpha` must lie in \[0, 1\], got 1.5"),
        (losses.acls_loss, {"margin": -1}, "`margin`"),
        (losses.acls_loss, {"reference": "Paper"}, "`reference` must be one of"),
        (losses.mbls_loss, {"alpha": -1}, "`alpha`"),
        (losses.entropy_penalty_loss, {"reference": "mean"}, "`reference`"),
        (losses.mdca_loss, {"beta": -1}, "`beta`"),
        (losses.dca_loss, {"beta": -1}, "`beta`"),
        (losses.mmce_loss, {"lambda_": -1}, "`lambda_`"),
        (losses.cpc_loss, {"lambda_bdc": -1}, "`lambda_bdc`"),
        (losses.crl_loss, {"confidence": "top"}, "`confidence` must be one of"),
        (losses.cals_loss, {"margin": 0}, "`margin` must be a number above 0"),
        (losses.adafocal_loss, {"gamma": torch.ones(2)}, "`gamma` must be one number without `edges`"),
    ],
)
def test_options_out_of_range_are_named(loss, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        loss(X, Y, **options)


@every_loss
@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 2, 2)], ids=["labels", "dense"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_each_label_of_several_is_a_position(loss, shape, reduction):
    logits = drawn(*shape)[0]
    target = torch.randint(2, shape, generator=torch.Generator().manual_seed(1)).float()
    value, gradient = value_and_gradient(loss, logits, target, task="multilabel", reduction=reduction)
    flat = value_and_gradient(loss, logits.flatten(), target.flatten(), task="binary", reduction=reduction)
    torch.testing.assert_close((value.flatten(), gradient.flatten()), (flat[0].flatten(), flat[1]))
    assert value.shape == (shape if reduction == "none" else ())


@every_loss
def test_single_labels_of_several_may_be_unknown(loss):
    logits, target = drawn(6, 3)[0], torch.arange(18).reshape(6, 3) % 2
    unknown = torch.arange(18).reshape(6, 3) % 5 == 0
    marked, spoiled = target.masked_fill(unknown, -1), logits.masked_fill(unknown, torch.nan)
    value, gradient = value_and_gradient(loss, spoiled, marked, task="multilabel", ignore_index=-1)
    torch.testing.assert_close(value, loss(logits[~unknown], target[~unknown], task="binary"))
    assert not gradient[unknown].any()
    assert gradient[~unknown].any()
