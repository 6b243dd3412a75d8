import copy
import importlib.util
import re
import subprocess
import sys
import warnings
from io import BytesIO
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim

import lightning_clamp
from lightning_clamp import CalibrationModule, Clamp
from lightning_clamp.export import fold, to_exported_program, to_onnx
from tests.scenarios import LitClassifier, SmallNet, images, loader, trainer
from tests.test_batch import TwoInputs

DOCS = Path(lightning_clamp.__file__).parent.parent / "docs"


def close(actual: Tensor, expected: Tensor) -> bool:
    return actual.shape == expected.shape and bool((actual - expected).abs().max() <= 1e-5 * expected.abs().max())


def reloaded(module: CalibrationModule, example: object) -> nn.Module:
    """The exported program as it comes out of its file."""
    file = BytesIO()
    torch.export.save(to_exported_program(module, example), file)
    file.seek(0)
    return torch.export.load(file).module()


def vector(n: int = 4, perturbation: Tensor | None = None) -> Clamp:
    return Clamp(perturbation, 0.4, torch.randn(n), torch.rand(n) + 0.5)


def mixing() -> Clamp:
    return Clamp(None, 0.4, torch.randn(4), class_matrix=torch.eye(4) + 0.3 * torch.randn(4, 4))


def skewed(n: int, shape: tuple[int, ...] = ()) -> Clamp:
    return Clamp(None, 0.4, torch.randn(n), torch.rand(n) + 0.5, skew=torch.full(shape, 0.4))


class Dense(nn.Module):
    """Logits of every pixel, for images of any size."""

    def __init__(self, n_outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.last = nn.Conv2d(8, n_outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


class OneLogit(nn.Module):
    """One logit per item, without an axis for it."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(5, 7)
        self.last = nn.Linear(7, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.hidden(x))).squeeze(-1)


class Tokens(nn.Module):
    """Two inputs by name, and a mapping that has the logits, as in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        hidden = self.encoder(self.embedding(input_ids), src_key_padding_mask=attention_mask == 0)
        return {"logits": self.head(hidden[:, 0])}


def tokens(n: int) -> dict[str, Tensor]:
    mask = torch.ones(n, 6)
    mask[:, 4:] = 0
    return {"input_ids": torch.randint(20, (n, 6)), "attention_mask": mask}


KINDS = {
    "temperature": lambda: CalibrationModule(SmallNet(), Clamp(log_temperature=0.4)),
    "bias": lambda: CalibrationModule(SmallNet(), Clamp(None, 0.4, torch.randn(4))),
    "vector": lambda: CalibrationModule(SmallNet(), vector()),
    "perturbation": lambda: CalibrationModule(SmallNet(), Clamp(torch.randn(3, 8, 8), 0.4)),
    "both": lambda: CalibrationModule(SmallNet(), vector(4, torch.randn(3, 8, 8))),
    "dense": lambda: CalibrationModule(Dense(4), vector(4, torch.randn(3, 8, 8))),
    "matrix": lambda: CalibrationModule(SmallNet(), mixing()),
    "dense matrix": lambda: CalibrationModule(Dense(4), mixing()),
    "one logit per pixel": lambda: CalibrationModule(Dense(1), vector(1, torch.randn(3, 8, 8)), task="binary"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_program_and_the_folded_network_are_the_module(kind):
    module = KINDS[kind]()
    program, folded = reloaded(module, images(1)), fold(module, images(3))
    for n in (1, 2, 7):
        x = images(n, seed=n)
        assert close(program(x), module(x))
        assert close(folded.network(x if folded.perturbation is None else x + folded.perturbation), module(x))


SKEWED = {
    "two logits": lambda: CalibrationModule(Ends(nn.Linear(216, 2)), skewed(2)),
    "two logits per pixel": lambda: CalibrationModule(Dense(2), skewed(2)),
    "one logit": lambda: CalibrationModule(Ends(nn.Linear(216, 1)), skewed(1, (1,)), task="binary"),
    "one logit per pixel": lambda: CalibrationModule(Dense(1), skewed(1, (1,)), task="binary"),
}


@pytest.mark.parametrize("kind", SKEWED)
def test_a_skew_is_exported_and_cannot_be_folded(kind):
    module, x = SKEWED[kind](), images(7, seed=2)
    assert close(reloaded(module, images(1))(x), module(x))
    with pytest.raises(ValueError, match=r"has a skew .* fit with output_maps=\('vector',\)"):
        fold(module, x)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["two logits", "one logit per pixel"])
def test_a_skew_in_onnx(kind):
    module, x = SKEWED[kind](), images(3)
    assert close(onnx_logits(module, images(2), {"inputs": x}), module(x))


def test_one_logit_without_an_axis_for_it():
    module, x = CalibrationModule(OneLogit(), vector(1, torch.randn(5)), task="binary"), torch.randn(6, 5)
    network, perturbation = fold(module, x)
    assert close(network(x + perturbation), module(x))
    assert close(reloaded(module, x[:1])(x), module(x))


def test_float64_stays_float64():
    module = CalibrationModule(SmallNet(dtype=torch.float64), vector())
    x = images(3, dtype=torch.float64)
    for logits in (fold(module, x).network(x), reloaded(module, x)(x)):
        torch.testing.assert_close(logits, module(x), rtol=1e-13, atol=1e-13)


def onnx_logits(module: CalibrationModule, example: object, inputs: dict[str, Tensor]) -> Tensor:
    file = BytesIO()
    to_onnx(module, file, example)
    session = onnxruntime.InferenceSession(file.getvalue())
    (logits,) = session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})
    return torch.from_numpy(logits)


@pytest.mark.slow
def test_a_classifier_of_torchvision():
    module = CalibrationModule(torchvision.models.resnet18(num_classes=10), vector(10, torch.randn(3, 32, 32)))
    example, x = torch.rand(1, 3, 32, 32), torch.rand(3, 3, 32, 32)
    network, perturbation = fold(module, example)
    assert close(network(x + perturbation), module(x))
    assert close(reloaded(module, example)(x), module(x))


@pytest.mark.slow
def test_a_classifier_of_timm():
    network = timm.create_model("test_resnet.r160_in1k", pretrained=False, num_classes=10)
    module = CalibrationModule(network, vector(10, torch.randn(3, 32, 32)))
    example, x = torch.rand(1, 3, 32, 32), torch.rand(3, 3, 32, 32)
    network, perturbation = fold(module, example)
    assert close(network(x + perturbation), module(x))
    assert close(onnx_logits(module, example, {"inputs": x}), module(x))


@pytest.mark.slow
def test_a_dict_of_inputs_and_a_perturbation_inside_of_the_network():
    clamp = vector(3, torch.randn(8))
    plain = CalibrationModule(Tokens(), Clamp(None, clamp.log_temperature, clamp.class_bias, clamp.class_scale))
    module = CalibrationModule(copy.deepcopy(plain.network), clamp, perturb_at="encoder")
    x = tokens(5)
    assert not close(module(x), plain(x))
    assert close(reloaded(module, tokens(1))(x), module(x))
    assert close(onnx_logits(module, tokens(1), dict(reversed(x.items()))), module(x))
    with pytest.raises(ValueError, match="inside the network, at 'encoder', where no state dict can hold it: export"):
        fold(module, x)
    network, perturbation = fold(plain, x)
    assert perturbation is None
    assert close(network(**x)["logits"], plain(x))


NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(216, 4)

    def forward(self, x):
        return self.head(self.body(x))
"""

ELSEWHERE = """
import sys


class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("lightning_clamp", "lightning"):
            raise ModuleNotFoundError(f"{name} is not installed here")


sys.meta_path.insert(0, NotInstalled())
try:
    import lightning_clamp
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("lightning_clamp can be imported")

from pathlib import Path

import onnxruntime
import torch
from safetensors.torch import load_file

here = Path(sys.argv[1])
sys.path.insert(0, str(here))
from net import Net

x = torch.load(here / "x.pt")
logits = {"program": torch.export.load(here / "net.pt2").module()(x), "torchscript": torch.jit.load(here / "net.ts")(x)}
session = onnxruntime.InferenceSession(here / "net.onnx")
logits["onnx"] = torch.from_numpy(session.run(["logits"], {"inputs": x.numpy()})[0])
tensors = load_file(here / "net.safetensors")
perturbation = tensors.pop("perturbation")
network = Net().eval()
network.load_state_dict(tensors)
logits["weights"] = network(x + perturbation).detach()
assert not [name for name in sys.modules if name.startswith("lightning")]
torch.save(logits, here / "logits.pt")
"""


def user_class(folder: Path) -> type[nn.Module]:
    (folder / "net.py").write_text(NET)
    spec = importlib.util.spec_from_file_location("net", folder / "net.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Net


@pytest.mark.slow
def test_what_was_exported_works_where_the_package_is_not_installed(tmp_path, capsys):
    module = CalibrationModule(user_class(tmp_path)(), vector(4, torch.randn(3, 8, 8)))
    example, x = images(2, seed=1), images(9, seed=2)
    torch.save(x, tmp_path / "x.pt")
    torch.export.save(to_exported_program(module, example), tmp_path / "net.pt2")
    written = to_onnx(module, tmp_path / "net.onnx", example, opset_version=20)
    assert written.model.opset_imports[""] == 20
    assert capsys.readouterr().out == ""
    assert len(list(tmp_path.glob("net.onnx*"))) == 1
    folded = fold(module, example)
    save_file({**folded.network.state_dict(), "perturbation": folded.perturbation}, tmp_path / "net.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch and Lightning call it deprecated
        module.to_torchscript(tmp_path / "net.ts", method="trace", example_inputs=example)
    command = [sys.executable, "-I", "-c", ELSEWHERE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    loaded = torch.load(tmp_path / "logits.pt")
    assert set(loaded) == {"program", "onnx", "weights", "torchscript"}
    for name, logits in loaded.items():
        assert close(logits, module(x)), name
        torch.testing.assert_close(logits.softmax(1), module.predict_proba(x), rtol=0, atol=1e-5)


def test_without_onnx_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr("lightning_clamp.export.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="Export to ONNX needs onnx and onnxscript: pip install onnx onn"):
        to_onnx(KINDS["vector"](), None, images(1))


def test_nobodys_data_are_in_a_program():
    program = to_exported_program(KINDS["both"](), images(5))
    (inputs,), _ = program.example_inputs
    assert inputs.count_nonzero() == 0


def test_other_axes_may_vary_and_the_batch_may_not():
    module = CalibrationModule(Dense(4), vector())
    shapes = ({2: Dim("height", max=64), 3: Dim("width", max=64)},)
    program = to_exported_program(module, images(2), dynamic_shapes=shapes).module()
    x = torch.randn(2, 3, 11, 13)
    assert close(program(x), module(x))
    with pytest.raises((AssertionError, RuntimeError), match=r"== 2|equal to 2"):
        program(x[:1])


def test_the_example_of_the_network_serves_if_none_is_given():
    network = LitClassifier(temperature=1.0)
    module, x = CalibrationModule(network, vector()), images(4)
    for export in (to_exported_program, to_onnx, fold):
        with pytest.raises(ValueError, match="needs an example: pass a batch of inputs, or set the model's exam"):
            export(module)
    network.example_input_array = images(2)
    assert close(to_exported_program(module).module()(x), module(x))
    assert close(fold(module).network(x), module(x))


@pytest.mark.parametrize("example", ["text", {"x": "text"}, ("text",)])
def test_an_example_is_a_tensor_or_a_dict_of_tensors(example):
    with pytest.raises(TypeError, match=r"must be a batch of inputs, a tensor or a dict of tensors, got str"):
        to_exported_program(KINDS["vector"](), example)


def test_an_example_of_several_inputs_has_the_names_of_forward(tmp_path):
    module, x, b = CalibrationModule(TwoInputs(), Clamp(None, 0.4, None, torch.rand(4) + 0.5)), images(5), torch.rand(5)
    expected, named = module(x, b), {"image": x, "brightness": b}
    assert close(reloaded(module, (x[:2], b[:2]))(named), expected)
    assert close(fold(module, (x, b)).network(x, b), expected)
    module.network.example_input_array = (x[:1], b[:1])
    to_onnx(module, tmp_path / "two.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "two.onnx")
    feed = {name: tensor.numpy() for name, tensor in named.items()}
    assert close(torch.from_numpy(session.run(["logits"], feed)[0]), expected)
    with pytest.raises(
        TypeError, match=r"has 3 inputs, and forward of TwoInputs takes 2 \(image, brightness\): pass o"
    ):
        fold(module, (x, b, b))


def test_a_module_that_a_trainer_has_tested_is_exported_and_left_alone(tmp_path):
    module, x = CalibrationModule(LitClassifier(temperature=1.0), vector(4, torch.randn(3, 8, 8))), images(5)
    trainer(tmp_path).test(module, loader(50, 1), verbose=False)
    before, logits = copy.deepcopy(module.state_dict()), module(x)
    assert close(reloaded(module, x)(x), logits)
    network, perturbation = fold(module, x)
    assert close(network(x + perturbation), logits)
    assert type(network) is LitClassifier
    assert module.trainer is not None
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(module(x), logits)


class Ends(nn.Module):
    """A network that ends as it is told, behind a layer of its own."""

    def __init__(self, head: nn.Module, end=lambda logits: logits) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten())
        self.head = head
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.head(self.body(x)))


class TwoHeads(Ends):
    """With a second head that comes last, and is not what is returned."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(216, 4))
        self.auxiliary = nn.Linear(216, 4)
        self.alias = self.head


def scaled(no_bias: bool = False) -> Clamp:
    return Clamp(None, 0.4, None if no_bias else torch.randn(4), torch.rand(4) + 0.5)


@pytest.mark.parametrize(
    ("network", "clamp"),
    [
        (Ends(nn.Linear(216, 4, bias=False)), scaled(no_bias=True)),
        (Ends(nn.Linear(216, 4), lambda logits: 3 * logits), scaled(no_bias=True)),
        (Ends(nn.Linear(216, 4), torch.relu), scaled(no_bias=True)),
        (Ends(nn.Sequential(nn.Unflatten(1, (6, 6, 6)), nn.Conv2d(6, 4, 3)), lambda z: z.mean((2, 3))), scaled()),
        (TwoHeads(), scaled()),
    ],
    ids=["no bias", "a factor after it", "relu after it", "mean after it", "auxiliary head, and an alias"],
)
def test_ends_that_fold(network, clamp):
    module, x = CalibrationModule(network, clamp), images(20, seed=3)
    folded = fold(module, images(10)).network
    assert close(folded(x), module(x))
    assert list(folded.state_dict()) == list(network.state_dict())


class InPlace(Ends):
    """A network that changes its input in place."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sub_(0.5))


def test_a_network_that_changes_its_input_in_place_folds_and_leaves_the_example():
    module, x = CalibrationModule(InPlace(nn.Linear(216, 4)), scaled()), images(10)
    folded = fold(module, x).network
    assert torch.equal(x, images(10))
    assert close(folded(x.clone()), module(x.clone()))


class TiedHead(nn.Module):
    """Invariant under a scale of its embedding: to fold a temperature into the head gives the logits asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 8)
        self.norm = nn.LayerNorm(8, eps=0.0)
        self.head = nn.Linear(8, 4, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding((x[:, 0, 0, :4] > 0).long()).sum(1)))


@pytest.mark.parametrize(
    ("network", "clamp", "cause"),
    [
        (Ends(nn.Linear(216, 4, bias=False)), scaled(), "'head' has no bias, and the clamp has one"),
        (Ends(nn.Linear(216, 4), lambda logits: 3 * logits), scaled(), "'head' is not the last step: logits would be"),
        (Ends(nn.Linear(216, 4), lambda logits: logits.softmax(1)), scaled(), "'head' is not the last step"),
        (TiedHead(), Clamp(log_temperature=0.4), "'head' shares its parameters with another module"),
        (
            Ends(nn.utils.parametrizations.weight_norm(nn.Linear(216, 4))),
            scaled(),
            "'head' computes its weight from other parameters",
        ),
        (Ends(nn.Linear(216, 2), lambda logits: logits.repeat(1, 2)), scaled(), "none is linear with one output per"),
        (SmallNet(dtype=torch.bfloat16), scaled(), r"'linear' is torch.bfloat16, too coarse .* fold module.float\(\)"),
    ],
    ids=["no bias", "a factor", "softmax", "tied", "weight norm", "other outputs", "bfloat16"],
)
def test_ends_that_do_not_fold_are_refused_with_the_cause_and_the_way_out(network, clamp, cause):
    module = CalibrationModule(network, clamp)
    x = images(4, dtype=next(network.parameters()).dtype)
    with pytest.raises(ValueError, match=rf"takes the output map \({cause}.*\): export with to_exported_program or"):
        fold(module, x)


def test_a_clamp_that_changes_nothing_needs_no_layer():
    module, x = CalibrationModule(TiedHead(), Clamp()), images(4)
    assert torch.equal(fold(module, x).network(x), module(x))


def test_a_coarse_network_folds_in_float32():
    module = CalibrationModule(SmallNet(dtype=torch.bfloat16), vector()).float()
    assert close(fold(module, images(4)).network(images(4)), module(images(4)))


@pytest.mark.slow
def test_compiled_it_is_the_same():
    for kind in ("vector", "both", "dense"):
        module = KINDS[kind]()
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        for n in (5, 3):
            assert close(compiled(images(n)), module(images(n)))


@pytest.mark.slow
def test_compiled_it_is_the_same_with_and_without_a_perturbation_inside_of_the_network():
    """Torch uses what it compiled for the first module also for the second, unless it sees where they differ."""
    for perturbation in (None, torch.randn(3, 8, 8)):
        module = CalibrationModule(LitClassifier(), vector(4, perturbation), perturb_at="net")
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        assert close(compiled(images(5)), module(images(5)))


@pytest.mark.slow
def test_the_python_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module, x = CalibrationModule(user_class(tmp_path)(), vector(4, torch.randn(3, 8, 8))), images(6)
    names = {"module": module, "images": x, "MyModel": type(module.network)}
    expected = module(x)
    for block in re.findall(r"```python\n(.*?)```", (DOCS / "export.md").read_text(), flags=re.DOTALL):
        exec(block, names)
        if "logits" in names:
            assert close(torch.as_tensor(names.pop("logits")), expected)
    torch.testing.assert_close(names["probabilities"], expected.softmax(1), rtol=0, atol=1e-5)
