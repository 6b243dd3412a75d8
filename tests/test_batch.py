"""Batches and outputs as people have them: pairs, dicts, dataclasses, extra items; tensors, `.logits`, mappings."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_clamp import CalibrationModule, NeuralClamping, calibrate, fit_clamp
from lightning_clamp._batch import as_pair, check_batch_keys, input_of, logits_of, with_logits
from tests.scenarios import LitClassifier, SmallNet, batches, loader, shifted_images, train_loader, trainer

OPTIONS = {"grids": (1,), "output_maps": ("temperature",)}


@dataclass
class Sample:
    image: Tensor
    label: Tensor
    name: str = "x"


X, Y = torch.arange(6.0).reshape(3, 2), torch.tensor([0, 1, 0])
LAYOUTS = {
    "pair": ((X, Y), None),
    "list": ([X, Y], None),
    "extra item": ((X, Y, torch.arange(3)), (0, 1)),
    "target first": ((Y, X), (1, 0)),
    "last": ((X, "names", Y), (0, -1)),
    "first of several": ((X, X > 1, Y), (0, 2)),
    "dict": ({"image": X, "label": Y, "index": 3}, ("image", "label")),
    "dict, as a list": ({"image": X, "label": Y}, ["image", "label"]),
    "dataclass": (Sample(X, Y), ("image", "label")),
    "namedtuple": (namedtuple("Pair", "image label")(X, Y), ("image", "label")),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_input_and_target_are_found(name):
    batch, keys = LAYOUTS[name]
    check_batch_keys(keys)
    inputs, target = as_pair(batch, keys)
    assert inputs is X
    assert target is Y


def test_several_inputs_have_the_names_of_arguments():
    batch = {"tokens": X, "mask": X > 1, "label": Y}
    inputs, target = as_pair(batch, (["tokens", "mask"], "label"))
    assert list(inputs) == ["tokens", "mask"]
    assert target is Y
    assert list(input_of({"tokens": X, "mask": X}, (["tokens", "mask"], "label"))) == ["tokens", "mask"]
    assert as_pair(({"tokens": X, "mask": X}, Y))[0] == {"tokens": X, "mask": X}


def test_several_inputs_of_a_tuple_are_arguments_in_their_order():
    for batch, keys in [((X, X > 1, Y), ((0, 1), 2)), ([Y, X, X > 1], [[1, 2], 0])]:
        check_batch_keys(keys)
        inputs, target = as_pair(batch, keys)
        assert isinstance(inputs, tuple)
        assert torch.equal(torch.stack([inputs[0] > 1, inputs[1]]), torch.stack([X > 1, X > 1]))
        assert target is Y
    for several in ((X, X > 1), [X, X > 1]):
        inputs, target = as_pair((several, Y))
        assert isinstance(inputs, tuple)
        assert inputs[0] is X
        assert target is Y
        assert input_of({"image": several}, ("image", "label"))[1] is several[1]
    with pytest.raises(TypeError, match="no entry 4, which `batch_keys` names: got tuple of 3 items"):
        as_pair((X, X, Y), ((0, 4), 2))


@pytest.mark.parametrize(
    ("batch", "proposed"),
    [
        ((X, X, Y), r"batch_keys=\(0, 2\) or \(0, 1\), or for a network of several inputs batch_keys=\(\(0, 1\), 2\)"),
        ((X, X, X, Y), r"for a network of several inputs batch_keys=\(\(0, 1, 2\), 3\)"),
        ({"img": X, "lbl_path": "x", "cls_label": Y}, r"such as batch_keys=\('img', 'cls_label'\)"),
        ({"label": Y, "x": X, "index": Y}, r"such as batch_keys=\('x', 'label'\)"),
        ({"input_ids": X, "attention_mask": X, "labels": Y}, r"=\(\['input_ids', 'attention_mask'\], 'labels'\)"),
        ({"a": X, "b": Y}, r"such as batch_keys=\('a', 'b'\)"),
        (Sample(X, Y), r"such as batch_keys=\('image', 'label'\)"),
        ({"a": X}, r"batch_keys=\('image', 'label'\)"),
        (X, r"got Tensor of 3 items: .* for a single batch the list \[\(inputs, target\)\]"),
    ],
)
def test_the_keys_that_are_proposed_are_the_batchs_own(batch, proposed):
    with pytest.raises(TypeError, match=proposed) as caught:
        as_pair(batch)
    if "such as" in proposed:
        keys = eval(str(caught.value).split("batch_keys=")[1].rstrip("."))
        check_batch_keys(keys)
        as_pair(batch, keys)


@pytest.mark.parametrize(
    ("batch", "keys", "message"),
    [
        ({"image": X, "label": Y}, None, r"got dict of image, label: pass .* such as batch_keys=\('image', 'label'\)"),
        (([X[0], X[1]], Y), None, "input of a batch is 2 tensors of 2 items, and the target has 3 items: stack items"),
        (([X, X[:2]], Y), None, "input of a batch is list of 2 items of different length: stack items into one; sev"),
        (([X, "names"], Y), None, "The input 1 of a batch must be a tensor, got str"),
        (([], Y), None, "must be a tensor, or several in a dict or a tuple, got list: stack items into one; several"),
        (Sample(X, Y), None, "got Sample: pass a loader"),
        ({"image": X}, ("image", "label"), "no entry 'label', which `batch_keys` names: got dict of image"),
        ((X, Y), ("image", "label"), "no entry 'image', .* got tuple of 2 items"),
        (Sample(X, Y), ("pixels", "label"), "no entry 'pixels'"),
        ((X, Y), (0, 5), "no entry 5"),
        (
            Sample(X, Y),
            ("name", "label"),
            "input of a batch must be a tensor, or several in a dict or a tuple, got str",
        ),
        (Sample(X, Y), ("image", "name"), "target of a batch must be a tensor, got str"),
        (Sample(X, Y), (["image", "name"], "label"), "input 'name' of a batch must be a tensor, got str"),
    ],
)
def test_what_is_not_there_is_said(batch, keys, message):
    with pytest.raises(TypeError, match=message):
        as_pair(batch, keys)


@pytest.mark.parametrize(
    "keys",
    ["image", ("image",), ("a", "b", "c"), ([], "b"), (None, "b"), (["a"], ["b"]), ([0, "b"], 2), ((0, 1), None), 3],
)
def test_keys_that_are_no_pair_are_refused_early(keys):
    with pytest.raises(ValueError, match="`batch_keys` must be a pair, the key of the input"):
        NeuralClamping(batch_keys=keys)


@dataclass
class Output:
    logits: Tensor
    loss: float = 0.5


@dataclass(frozen=True)
class Frozen:
    logits: Tensor


Named = namedtuple("Named", "logits loss")
OUTPUTS = [
    X, Output(X), Frozen(X), Named(X, 0.5), {"logits": X, "loss": 0.5}, OrderedDict(out=X, aux=0.5),
]  # fmt: skip


@pytest.mark.parametrize("output", OUTPUTS, ids=lambda output: type(output).__name__)
def test_logits_are_found_and_replaced_in_a_copy(output):
    assert logits_of(output) is X
    changed = with_logits(output, 2 * X)
    assert type(changed) is type(output)
    assert torch.equal(logits_of(changed), 2 * X)
    assert logits_of(output) is X


def test_logits_of_several_heads_are_said_to_be_no_tensor():
    with pytest.raises(
        TypeError, match=r"`\.logits`, got logits that are a dict of a, b: let its forward return the log"
    ):
        logits_of({"logits": {"a": X, "b": X}})


class DictData(Dataset):
    """The same images and labels as dicts, with an index on top."""

    def __init__(self, pairs: Dataset) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index):
        image, label = self.pairs[index]
        return {"image": image, "label": label, "index": index}


class LitDict(LitClassifier):
    """As its user has it: batches are dicts, and the output holds more than logits."""

    def forward(self, image):
        return Output(self.net(image))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch["image"]).logits, batch["label"])

    def test_step(self, batch, batch_idx):
        self.log("test_nll", nn.functional.cross_entropy(self(image=batch["image"]).logits, batch["label"]))

    def predict_step(self, batch, batch_idx):
        return self(batch["image"]).logits


def dicts(pairs: DataLoader) -> DataLoader:
    return DataLoader(DictData(pairs.dataset), batch_size=100)


KEYS = ("image", "label")


@pytest.mark.slow
def test_a_module_of_dicts_comes_out_as_one_of_pairs_does(tmp_path):
    held_out, test = loader(1000, seed=30), loader(200, seed=40)
    expected = NeuralClamping(held_out, **OPTIONS)
    trainer(tmp_path, expected).fit(LitClassifier(lr=0.0), train_loader())
    callback = NeuralClamping(dicts(held_out), batch_keys=KEYS, save_to=tmp_path, **OPTIONS)
    run, model = trainer(tmp_path, callback), LitDict(lr=0.0)
    run.fit(model, dicts(train_loader()))
    for name, value in expected.result.clamp.state_dict().items():
        assert torch.equal(callback.result.clamp.state_dict()[name], value)
    module = CalibrationModule.from_checkpoint(callback.checkpoint_path, LitDict)
    assert module.spec.batch_keys == KEYS
    assert module.result.after == callback.result.after
    (hooked,) = run.test(model, dicts(test), verbose=False)
    (own,) = run.test(module, dicts(test), verbose=False)
    assert hooked["test_nll"] == pytest.approx(own["calibrated/nll"], abs=1e-6)
    predicted = torch.cat(run.predict(model, dicts(test)))
    torch.testing.assert_close(torch.cat(run.predict(module, dicts(test))), predicted)
    torch.testing.assert_close(module({"image": test.dataset.tensors[0]}), predicted)
    bare = DataLoader(TensorDataset(test.dataset.tensors[0]), 100)
    torch.testing.assert_close(torch.cat(run.predict(module, bare)), predicted)
    again = calibrate(trainer(tmp_path), model, dicts(held_out), batch_keys=KEYS, **OPTIONS)
    assert torch.equal(again.clamp.log_temperature, expected.result.clamp.log_temperature)


def test_batches_that_are_no_pairs_are_refused_before_training(tmp_path):
    with pytest.raises(Exception, match=r"cannot use the calibration set.*image, label, index.*batch_keys="):
        trainer(tmp_path, NeuralClamping(dicts(loader(100, 1)))).fit(LitDict(), dicts(train_loader()))


@pytest.mark.parametrize(
    "several",
    [
        lambda a, b: [a, b],
        lambda a, b: {"first": a, "second": b},
        lambda a, b: [a, list(b)],
        lambda a, b: {"first": list(a), "second": list(b)},
        lambda a, b: CombinedLoader([a, b], "sequential"),
    ],
    ids=["list", "dict", "list with batches", "dict of batches", "CombinedLoader"],
)
def test_several_loaders_are_one_calibration_set(tmp_path, several):
    one = loader(700, seed=30, size=50)
    parts = [DataLoader(TensorDataset(*(t[i] for t in one.dataset.tensors)), 50) for i in (slice(300), slice(300, 700))]
    expected, callback = (NeuralClamping(data, **OPTIONS) for data in (one, several(*parts)))
    for each in (expected, callback):
        trainer(tmp_path, each).fit(LitClassifier(lr=0.0), train_loader())
    assert callback.result.n_samples == 700
    torch.testing.assert_close(callback.result.clamp.log_temperature, expected.result.clamp.log_temperature)


def test_several_loaders_are_dealt_out_to_ranks_without_repeats(tmp_path):
    parts = [loader(31, seed=30, size=10), loader(50, seed=31, size=10)]
    alone, together = NeuralClamping(parts, **OPTIONS), NeuralClamping(parts, **OPTIONS)
    trainer(tmp_path, alone).fit(LitClassifier(lr=0.0), train_loader())
    trainer(tmp_path, together, devices=2, strategy="ddp_fork").fit(LitClassifier(lr=0.0), train_loader())
    assert together.result.n_samples == 81
    torch.testing.assert_close(together.result.clamp.log_temperature, alone.result.clamp.log_temperature)


class TwoInputs(nn.Module):
    """Two tensors by name, of which nothing is perturbed unless a submodule is named."""

    def __init__(self) -> None:
        super().__init__()
        self.net = SmallNet(2.0)

    def forward(self, image: Tensor, brightness: Tensor) -> Tensor:
        return self.net(image + brightness[:, None, None, None])


def test_several_inputs_are_keyword_arguments_of_the_network():
    network, x, y = shifted_images(1000)
    split = [tensor.split(250) for tensor in (x, torch.full((len(x),), 0.5), y)]
    named = [{"image": a - 0.5, "brightness": b, "y": c} for a, b, c in zip(*split, strict=True)]
    keys = (["image", "brightness"], "y")
    result = fit_clamp(TwoInputs(), named, batch_keys=keys)
    assert "perturb_at names no submodule" in result.reason
    assert result.clamp.perturbation is None
    expected = fit_clamp(network, batches(x, y), **OPTIONS)
    at_net = fit_clamp(TwoInputs(), named, batch_keys=keys, perturb_at="net", **OPTIONS)
    for name, value in expected.clamp.state_dict().items():
        torch.testing.assert_close(at_net.clamp.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    in_order = [(b, y, a - 0.5) for a, b, y in zip(*split, strict=True)]
    by_position = fit_clamp(TwoInputs(), in_order, batch_keys=((2, 0), 1), perturb_at="net", **OPTIONS)
    assert torch.equal(by_position.clamp.perturbation, at_net.clamp.perturbation)
    module = CalibrationModule.from_result(TwoInputs(), by_position)
    one = tuple(in_order[0][key] for key in (2, 0))
    assert torch.equal(module(one), module({"image": one[0], "brightness": one[1]}))
    assert torch.equal(module.predict_step(in_order[0], 0), module(one))
    named = {"image": one[0], "brightness": one[1]}
    for logits in (module(*one), module(**named), module(one)):
        assert torch.equal(logits, module(one))
    for probs in (module.predict_proba(*one), module.predict_proba(**named)):
        assert torch.equal(probs, module(one).softmax(1))
    nested = fit_clamp(TwoInputs(), [((x, b), y) for b, y, x in in_order], perturb_at="net", **OPTIONS)
    assert torch.equal(nested.clamp.perturbation, by_position.clamp.perturbation)
    nested_module = CalibrationModule.from_result(TwoInputs(), nested)
    assert torch.equal(nested_module.predict_step([list(one), y], 0), module(one))
