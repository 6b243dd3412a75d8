"""Perturbations at the input of a submodule: token models, tabular models, and what is refused."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_clamp import CalibrationModule, Clamp, NeuralClamping, calibrate, fit_clamp
from lightning_clamp._trainer.hooks import ClampHooks
from lightning_clamp.clamping import score_pass
from lightning_clamp.spec import Spec
from tests.scenarios import (
    SHIFT,
    DenseNet,
    LitClassifier,
    SmallNet,
    batches,
    images,
    sampled,
    shifted_images,
    trainer,
)

OPTIONS = {"grids": (1, 2), "output_maps": ("temperature",)}


class Staged(nn.Module):
    """A fixed first stage, then a network of its own."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)
        self.stages = nn.ModuleDict({"second": network})
        with torch.no_grad():
            self.first.weight.copy_(torch.randn(3, 3, 1, 1, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.stages["second"](x=torch.tanh(self.first(x)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classes", "pixels"])
@pytest.mark.parametrize("method", ["clamp", "published"])
def test_a_clamp_at_a_submodule_is_the_clamp_of_that_submodule(kind, method, monkeypatch):
    # Probes are drawn by what goes into the whole network.
    monkeypatch.setattr(score_pass, "seeds_of", lambda inputs: torch.arange(len(inputs)))
    second = SmallNet(2.0) if kind == "classes" else DenseNet()
    network, x = Staged(second), images(1000 if kind == "classes" else 200)
    hidden = torch.tanh(network.first(x)).detach()
    y = sampled(second(hidden + 2 * SHIFT).detach().double() / 2)
    options = OPTIONS if method == "clamp" else {"method": "published", "epochs": 2}
    expected = fit_clamp(second, batches(hidden, y, 60), **options)
    result = fit_clamp(network, batches(x, y, 60), perturb_at="stages.second", **options)
    assert result.clamp.perturbation is not None
    for name, value in expected.clamp.state_dict().items():
        torch.testing.assert_close(result.clamp.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert result.passes == expected.passes
    clamped = expected.clamp.scale(second(expected.clamp.perturb(hidden)))
    torch.testing.assert_close(CalibrationModule(network, result.clamp, perturb_at="stages.second")(x), clamped)


class Transformer(nn.Module):
    """Tokens to logits: embedding, one encoder layer, mean over what is not padding (token 0)."""

    def __init__(self, n_features: int = 8, n_classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, n_features)
        layer = nn.TransformerEncoderLayer(n_features, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(n_features, n_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == 0
        hidden = self.encoder(self.embed(tokens), src_key_padding_mask=padding)
        kept = hidden.masked_fill(padding[..., None], 0).sum(1) / (~padding).sum(1, keepdim=True)
        return 12 * self.head(kept)


class LitTransformer(LitClassifier):
    def __init__(self, lr: float = 0.0) -> None:
        super().__init__(lr=lr)
        self.net = Transformer()


def shifted_truth(shift: float) -> Transformer:
    """The network that labels are drawn from: with something added to every embedding."""
    truth = Transformer().eval()
    truth.encoder.register_forward_pre_hook(lambda _, args: (args[0] + shift * feature_shift(), *args[1:]))
    return truth


def token_batches(n: int = 2000, shift: float = 0.0) -> list[tuple[Tensor, Tensor]]:
    """Sequences of different length, the network twice as sure as it should be, and labels with that shift."""
    truth = shifted_truth(shift)
    generator = torch.Generator().manual_seed(5)
    found = []
    for length in range(4, 12, 2):
        tokens = torch.randint(1, 20, (n // 4, length), generator=generator)
        tokens[::3, -2:] = 0
        found.append((tokens, sampled(truth(tokens).detach().double() / 2, length)))
    return found


def feature_shift() -> Tensor:
    return torch.randn(8, generator=torch.Generator().manual_seed(7))


def test_a_token_model_is_clamped_at_its_embeddings():
    data = token_batches(4000, shift=0.15)
    result = fit_clamp(Transformer(), data, perturb_at="encoder", output_maps=("temperature",))
    assert result.chosen.name == "1×1 grid + temperature"
    assert result.clamp.perturbation.shape == (8,)
    alone = fit_clamp(Transformer(), data, method="temperature")
    assert result.after["nll"] < alone.after["nll"] - 0.01
    # Three classes do not tell eight features apart, but the probabilities are those of the unshifted embeddings.
    truth = shifted_truth(0.15)
    right = [nn.functional.cross_entropy(truth(tokens).detach() / 2, target) for tokens, target in data]
    assert result.after["nll"] == pytest.approx(float(sum(right)) / len(right), abs=0.005)
    module = CalibrationModule(Transformer(), result.clamp, perturb_at="encoder")
    tokens, target = (torch.cat([pair[i] for pair in data if pair[0].shape[1] == 8]) for i in (0, 1))
    before, after = (nn.functional.cross_entropy(z, target) for z in (Transformer().eval()(tokens), module(tokens)))
    assert after < before


def test_tokens_without_a_place_to_perturb_have_their_outputs_calibrated():
    result = fit_clamp(Transformer(), token_batches())
    assert result.clamp.perturbation is None
    assert 1.5 < float(result.clamp.temperature) < 2.7
    assert "nothing can be added to integer inputs: perturb_at can name the submodule" in result.reason


@pytest.mark.slow
def test_a_trainer_tests_predicts_saves_and_restores_with_the_submodule(tmp_path):
    data = DataLoader(token_batches(1200, shift=0.15), batch_size=None)
    callback = NeuralClamping(
        data, perturb_at="net.encoder", save_to=tmp_path, grids=(1,), output_maps=("temperature",)
    )
    run, model = trainer(tmp_path, callback), LitTransformer()
    run.fit(model, DataLoader(token_batches(40), batch_size=None))
    assert callback.result.clamp.perturbation.shape == (8,)
    module = CalibrationModule.from_checkpoint(callback.checkpoint_path, LitTransformer)
    assert module.spec.perturb_at == "net.encoder"
    expected = [module(tokens) for tokens, _ in data]
    torch.testing.assert_close(run.predict(model, data), expected)
    torch.testing.assert_close([callback.calibrated_module()(tokens) for tokens, _ in data], expected)
    alone = calibrate(
        trainer(tmp_path), model, data, perturb_at="net.encoder", grids=(1,), output_maps=("temperature",)
    )
    tokens, _ = next(iter(data))
    torch.testing.assert_close(alone(tokens), expected[0])
    (own,) = run.test(module, data, verbose=False)
    assert own["calibrated/nll"] == pytest.approx(callback.result.after["nll"], abs=1e-5)
    # The hook is gone after the Trainer's test.
    assert not torch.allclose(model(tokens), expected[0])


def test_tabular_features_are_clamped_at_the_input():
    generator = torch.Generator().manual_seed(2)
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    features = torch.randn(4000, 6, generator=generator)
    with torch.no_grad():
        target = sampled(8 * network(features).double())
        right = nn.functional.cross_entropy(8 * network(features), target)
        network[2].weight.mul_(16)
        network[2].bias.mul_(16)
    shift = torch.tensor([0.4, -0.3, 0.2, 0.0, -0.5, 0.3])
    result = fit_clamp(network, batches(features - shift, target), output_maps=("temperature",))
    assert result.clamp.perturbation.shape == (6,)
    assert [c.refusal.words for c in result.candidates if c.grid > 1] == 3 * ["inputs of shape (6,) have no such grid"]
    assert "2×2" not in result.reason
    # Three classes do not tell six features apart, but the probabilities are those of the unshifted table.
    assert result.after["nll"] == pytest.approx(float(right), abs=0.005)
    assert (
        fit_clamp(network, batches(features - shift, target), method="temperature").after["nll"] > float(right) + 0.02
    )


class Repeated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


class SequenceFirst(Transformer):
    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(tokens).transpose(0, 1)).mean(0))


FEATURES = [(torch.randn(50, 3), torch.randint(3, (50,)))]


@pytest.mark.parametrize(
    ("network", "data", "perturb_at", "message"),
    [
        (Transformer(), token_batches(100), "encodr", "'encodr' to perturb at: did you mean 'encoder'."),
        (Transformer(), token_batches(100), "layers", "'layers' to perturb at: did you mean 'encoder.layers'."),
        (Transformer(), token_batches(100), "zzz", "'zzz' to perturb at: it has embed, encoder, h"),
        (Transformer(), token_batches(100), "embed", r"'embed', and what enters there is torch.int64 of shape \(25"),
        (SequenceFirst(), token_batches(100), "encoder", r"of shape \(4, 25, 8\): it must be floats of shape \(25, "),
        (Repeated(), FEATURES, "layer", "'layer' was called 2 times in one forward"),
        (nn.Sequential(nn.Linear(3, 3), nn.Identity()).forward, FEATURES, "2", "no submodule '2'"),
        (lambda x: x, FEATURES, "encoder", "the network is a function: pass the module"),
    ],
    ids=["unknown", "unknown inside", "unlike any", "integers", "sequence first", "called twice", "method", "function"],
)  # fmt: skip
def test_what_cannot_be_perturbed_is_refused(network, data, perturb_at, message):
    with pytest.raises(ValueError, match=message):
        fit_clamp(network, data, perturb_at=perturb_at)


def test_the_published_solver_refuses_integers():
    with pytest.raises(TypeError, match="inputs are integers, and a perturbation needs floats"):
        fit_clamp(Transformer(), [token_batches(100)[0]], method="published", epochs=1)


OWN = {"perturb_at": "stages.second", "grids": (1,), "output_maps": ("temperature",)}


def staged(n: int = 600) -> tuple[Staged, Tensor, Tensor]:
    network, x = Staged(SmallNet(2.0)), images(n)
    hidden = torch.tanh(network.first(x)).detach()
    return network, x, sampled(network.stages["second"](hidden + 2 * SHIFT).detach().double() / 2)


@pytest.mark.slow
def test_a_network_that_was_traced_before_is_perturbed_all_the_same():
    network, x, y = staged()
    expected = fit_clamp(network, batches(x, y), **OWN)
    compiled = torch.compile(network.eval().requires_grad_(False), backend="eager")
    bare = compiled(x)
    result = fit_clamp(compiled, batches(x, y), **OWN)
    assert torch.equal(result.clamp.perturbation, expected.clamp.perturbation)
    hooks = ClampHooks(compiled, result.clamp, result.spec)
    clamped = compiled(x)
    assert hooks.used
    hooks.remove()
    torch.testing.assert_close(compiled(x), bare)
    torch.testing.assert_close(clamped, CalibrationModule(network, result.clamp, perturb_at="stages.second")(x))


def test_a_compiled_network_that_does_not_run_the_hook_is_an_error():
    network, x, _ = staged(10)
    compiled = torch.compile(network.eval().requires_grad_(False), backend="eager")
    with torch.no_grad():
        compiled(x)
        module = CalibrationModule(compiled, Clamp(torch.ones(3, 1, 1).expand(3, 8, 8)), perturb_at="stages.second")
        with pytest.raises(RuntimeError, match=r"did not run what adds the perturbation at 'stages.second'"):
            module(x)


def test_a_network_is_perturbed_once():
    """What would break if torch moved the hooks that a module has."""
    network = staged(10)[0]
    clamp = Clamp(torch.zeros(3, 8, 8))
    first = CalibrationModule(network, clamp, perturb_at="stages.second")
    with pytest.raises(ValueError, match=r"added at 'stages.second' already, by a CalibrationModule .* copy\.deepcopy"):
        CalibrationModule(network, clamp, perturb_at="stages.second")
    with pytest.raises(ValueError, match="already, by a CalibrationModule"):
        ClampHooks(first.network, clamp, Spec(perturb_at="stages.second"))
    # Without a perturbation there is nothing to add.
    CalibrationModule(network, Clamp(), perturb_at="stages.second")


class Named(nn.Module):
    """Called by names, the input not the first of them."""

    def __init__(self) -> None:
        super().__init__()
        self.second = WithMask()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(mask=torch.ones(len(x), 1, 1, 1), x=x)


class WithMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = SmallNet(2.0)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.net(x * mask)


def test_the_first_parameter_is_perturbed_whatever_is_named_first():
    network, x, y = shifted_images(500)
    expected = fit_clamp(network, batches(x, y), grids=(1,))
    result = fit_clamp(Named(), batches(x, y), perturb_at="second", grids=(1,))
    torch.testing.assert_close(result.clamp.perturbation, expected.clamp.perturbation)


def test_a_module_called_with_nothing_has_nothing_to_perturb():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Bare()

        def forward(self, x):
            return x + self.inner()

    class Bare(nn.Module):
        def forward(self):
            return torch.zeros(3)

    with pytest.raises(TypeError, match="it was called with nothing"):
        fit_clamp(Constant(), FEATURES, perturb_at="inner")
