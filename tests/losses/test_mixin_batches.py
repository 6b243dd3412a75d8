"""Batches as people have them, and networks that return more than logits, or no logits at all."""

import ast
import inspect
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lightning_clamp
from lightning_clamp import losses
from lightning_clamp.losses import ACLSMixin, ASLPMixin, CRLMixin, FocalMixin, Indexed, LossMixin, MarginAwareMixin
from tests.scenarios import LitClassifier, Segmenter, loader, made, maps, trainer


class Items(Dataset):
    """Samples in a shape of one's own."""

    def __init__(self, item, n=100):
        self.item, self.tensors = item, loader(n, 20).dataset.tensors

    def __len__(self):
        return len(self.tensors[0])

    def __getitem__(self, index):
        x, y = (tensor[index] for tensor in self.tensors)
        return self.item(x, y)


class Two(LitClassifier):
    """Takes two inputs, of which the second adds nothing."""

    def forward(self, x, more):
        return super().forward(x) + 0 * more.sum()


BATCHES = {
    "dict": (lambda x, y: {"image": x, "label": y, "name": 3}, ("image", "label"), LitClassifier),
    "longer tuple": (lambda x, y: (x, 3, y), (0, 2), LitClassifier),
    "two of a dict": (lambda x, y: {"x": x, "more": x, "label": y}, (("x", "more"), "label"), Two),
    "two of a tuple": (lambda x, y: (x, x, y), ((0, 1), 2), Two),
    "a dict of inputs": (lambda x, y: ({"x": x, "more": x}, y), None, Two),
}


@pytest.mark.parametrize("case", BATCHES)
def test_batches_are_read_as_the_calibration_reads_them(case, tmp_path):
    item, keys, module = BATCHES[case]
    run = trainer(tmp_path, max_steps=1)
    run.fit(made(ACLSMixin, module, loss_batch_keys=keys), DataLoader(Items(item), batch_size=100))
    plain = trainer(tmp_path, max_steps=1)
    plain.fit(made(ACLSMixin), loader(100, 20))
    assert run.callback_metrics["train/loss"] == plain.callback_metrics["train/loss"]


def test_batches_that_are_objects():
    x, y = loader(10, 20).dataset.tensors
    inputs, target, index = made(ACLSMixin, loss_batch_keys=("x", "y")).calibrated_loss_batch(SimpleNamespace(x=x, y=y))
    assert inputs is x
    assert target is y
    assert index is None


@pytest.mark.parametrize(
    ("batch", "keys", "sentence"),
    [
        (torch.zeros(3), None, "must be a pair .* got Tensor of 3 items: pass a loader that yields pairs"),
        ({"x": torch.zeros(2), "y": torch.ones(2)}, None, r"got dict of x, y: .* such as loss_batch_keys=\('x', 'y'\)"),
        ((torch.zeros(2),) * 4, None, r"loss_batch_keys=\(0, 3\) or \(0, 1\)"),
        ({"x": torch.zeros(2)}, ("x", "y"), "no entry 'y', which `loss_batch_keys` names: got dict of x"),
        ((torch.zeros(2), 3), None, r"got int: if the loader yields samples, pass DataLoader\(dataset, batch_size="),
    ],
)
def test_other_batches_get_one_sentence(batch, keys, sentence):
    with pytest.raises(TypeError, match=sentence):
        made(ACLSMixin, loss_batch_keys=keys).training_step(batch, 0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"loss_batch_keys": "image"}, "`loss_batch_keys` must be a pair, .* got 'image'"),
        ({"loss_ignore_index": "none"}, "`loss_ignore_index` must be a label, .* got 'none'"),
        ({"loss_ignore_index": True}, "`loss_ignore_index` must be a label, .* got True"),
    ],
)
def test_settings_are_checked_when_the_module_is_made(options, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        made(FocalMixin, **options)


class Answering(LitClassifier):
    """Returns its logits in one of the ways that are known."""

    def __init__(self, wrap, **options):
        super().__init__(**options)
        self.wrap = [wrap]

    def forward(self, x):
        return self.wrap[0](super().forward(x))


@pytest.mark.parametrize("mixin", [ACLSMixin, MarginAwareMixin, losses.MMCEMixin])
@pytest.mark.parametrize(
    "wrap", [lambda z: {"out": z, "aux": z}, lambda z: {"logits": z}, lambda z: SimpleNamespace(logits=z)]
)
def test_logits_are_found_in_what_networks_return(mixin, wrap):
    options = {"margin_clip": None} if mixin is MarginAwareMixin else {}
    inputs, target = next(iter(loader(20, 20)))
    model = made(mixin, Answering, wrap=wrap, **options)
    expected = made(mixin, **options).calibrated_loss_of(inputs, target, None, {})
    torch.testing.assert_close(model.calibrated_loss_of(inputs, target, None, {}), expected)
    # The attack changed the mode of the network's parts, and back.
    assert all(module.training for module in model.modules())


def test_the_attack_finds_the_parts_of_the_network_whatever_it_returns():
    seen = []

    class Noting(Answering):
        def forward(self, x):
            seen.append(self.net.training)
            return super().forward(x)

    inputs, target = next(iter(loader(4, 20)))
    made(MarginAwareMixin, Noting, wrap=lambda z: {"out": z}, margin_clip=None).calibrated_loss_of(
        inputs, target, None, {}
    )
    assert seen == [False, False, False, True, True]


def test_a_network_without_logits_is_told_so():
    inputs, target = next(iter(loader(4, 20)))
    with pytest.raises(TypeError, match=r"The network must return a tensor of logits, or have them as `\.logits`"):
        made(ACLSMixin, Answering, wrap=lambda z: {"scores": z}).calibrated_loss(inputs, target)


class Softmax(LitClassifier):
    """Softmax in forward, and again in the loss: a common mistake."""

    def forward(self, x):
        return super().forward(x).softmax(1)


class Sigmoid(Segmenter):
    def forward(self, x):
        return super().forward(x).sigmoid()


def test_probabilities_are_noticed_once_in_every_fit(tmp_path):
    model = made(FocalMixin, Softmax)
    for _ in range(2):
        with pytest.warns(
            UserWarning,
            match=r"^WithFocalMixin takes what the network returns as logits, and every row of the first batch lies in "
            r"\[0, 1\] and sums to 1, as probabilities do: leave the final softmax out\.$",
        ) as caught:
            trainer(tmp_path, max_epochs=2).fit(model, loader(200, 20))
        assert len([one for one in caught if "as logits" in str(one.message)]) == 1
    # By hand, the fit's warning is not repeated.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(FocalMixin, Softmax).eval().calibrated_loss(*next(iter(loader(20, 20))))


@pytest.mark.parametrize(
    ("mixin", "options"),
    [(FocalMixin, {"loss_task": "binary"}), (losses.SCBCEMixin, {}), (ASLPMixin, {}), (MarginAwareMixin, {})],
)
def test_probabilities_of_one_logit_are_noticed(mixin, options, tmp_path):
    if mixin is MarginAwareMixin:
        options = {"loss_task": "binary", "margin_clip": None}
    with pytest.warns(UserWarning, match="if these are probabilities, leave the final sigmoid out"):
        trainer(tmp_path, limit_train_batches=1).fit(
            made(mixin, Sigmoid, **options), DataLoader(Indexed(maps()), batch_size=4), DataLoader(maps(2))
        )


def test_logits_that_look_like_probabilities_of_one_item_are_let_by():
    class One(LitClassifier):
        def forward(self, x):
            return super().forward(x)[:, :1] * 0 + 0.5

    inputs, target = next(iter(loader(4, 20)))
    made(FocalMixin, One, loss_task="binary").calibrated_loss_of(inputs, target % 2, None, {})


def test_only_the_first_batch_is_read(tmp_path, monkeypatch):
    """A look at values makes the processor wait for the accelerator."""
    seen = []
    look = "lightning_clamp.losses.mixin.complaint_of_probabilities"
    monkeypatch.setattr(look, lambda logits, binary: seen.append(len(logits)))
    trainer(tmp_path, max_epochs=3).fit(made(FocalMixin), loader(200, 20, size=50))
    assert seen == [50]


def test_an_index_is_found_behind_the_pair_and_in_mappings():
    x, y = loader(4, 20).dataset.tensors
    pair = DataLoader(Indexed(TensorDataset(x, y)), batch_size=4)
    mapping = DataLoader(Indexed(Items(lambda x, y: {"image": x, "label": y}, 4)), batch_size=4)
    for data, keys in ((pair, None), (mapping, ("image", "label"))):
        *_, index = made(CRLMixin, loss_batch_keys=keys).calibrated_loss_batch(next(iter(data)))
        assert index.tolist() == [0, 1, 2, 3]
    # What a key names is no index.
    *_, index = made(CRLMixin, loss_batch_keys=(0, -1)).calibrated_loss_batch((x, y, y))
    assert index is None
    with pytest.raises(TypeError, match=r"keeps a number for each sample .* wrap the training set in"):
        made(CRLMixin, loss_batch_keys=(0, 2)).training_step((x, y, y), 0)


def refusals():
    """Every sentence that a loss raises, with the kind of its error."""
    package = Path(lightning_clamp.__file__).parent
    files = [*(package / "losses").glob("*.py"), *(package / name for name in ("_checks.py", "_rows.py", "_batch.py"))]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                yield (
                    ast.unparse(node.exc.func),
                    "".join(
                        part.value
                        for part in ast.walk(node.exc)
                        if isinstance(part, ast.Constant) and isinstance(part.value, str)
                    ),
                )


def test_every_refusal_that_names_an_option_of_a_loss_can_be_renamed():
    functions = [getattr(losses, name) for name in losses.__all__ if name.endswith("_loss")]
    options = {
        one.name for function in functions for one in inspect.signature(function).parameters.values()
        if one.kind is one.KEYWORD_ONLY
    }  # fmt: skip
    # Batches are read by nothing but that, and the mixin renames what is said of them.
    wrong = [
        (kind, text)
        for kind, text in refusals()
        if kind != "OptionError" and any(f"`{option}`" in text or f" {option}=" in text for option in options)
    ]
    assert not wrong


def test_words_that_are_no_options_of_the_loss_are_left_alone():
    class PaddedMixin(LossMixin):
        def __init__(self, *args, padded_width=3, **kwargs):
            super().__init__(*args, **kwargs)
            self.train_with(padded, prefix="padded_", width=padded_width)

    def padded(logits, target, *, width, **_):
        from lightning_clamp._checks import OptionError

        if len(logits):
            raise OptionError("`width` is too small: pass width=4, or DataLoader(batch_size=1).")
        return logits.sum()

    with pytest.raises(ValueError, match=r"^`padded_width` is .* padded_width=4, or DataLoader\(batch_size=1\)"):
        made(PaddedMixin).calibrated_loss(*next(iter(loader(4, 20))))


def test_soft_targets_reach_the_loss_as_they_are():
    class SoftMixin(LossMixin):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.train_with(lambda z, y, **_: F.cross_entropy(z, y) if len(z) else z.sum())

    x, _ = next(iter(loader(8, 20)))
    soft = torch.rand(8, 4).softmax(1)
    model = made(SoftMixin)
    _, target, _ = model.calibrated_loss_batch((x, soft))
    assert target is soft
    torch.testing.assert_close(model.calibrated_loss_of(x, target, None, {}), F.cross_entropy(model(x), soft))
