"""Views: the mean over mirror images of what the network says, wherever a clamp is fitted or applied."""

import logging
from io import BytesIO

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_clamp import CalibrationModule, Clamp, NeuralClamping, calibrate, fit_clamp
from lightning_clamp._trainer.hooks import ClampHooks
from lightning_clamp.checkpoint import result_from_state, state_of_result
from lightning_clamp.export import fold, to_exported_program, to_onnx
from lightning_clamp.spec import Spec
from tests.scenarios import (
    SHIFT,
    DenseNet,
    LitClassifier,
    SmallNet,
    batches,
    images,
    loader,
    sampled,
    train_loader,
    trainer,
)

QUICK = {"grids": (1,), "output_maps": ("temperature",), "uniform_share": False}


class Symmetric(nn.Module):
    """A network that gives the same for an image and its mirror image."""

    def __init__(self) -> None:
        super().__init__()
        self.net = SmallNet(2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x + x.flip(-1)) / 2)


def linear(n_outputs: int = 4, seed: int = 0) -> nn.Sequential:
    """Logits that are linear in the pixels, and not symmetric."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, n_outputs))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return network


def by_hand(network: nn.Module, clamp: Clamp, x: Tensor) -> Tensor:
    """Calibrated logits with mirror images, δ not mirrored."""
    views = [network(clamp.perturb(view)) for view in (x, x.flip(-1))]
    return clamp.scale((views[0] + views[1]) / 2)


def delta() -> Tensor:
    return torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(2))


def test_the_perturbation_is_added_to_a_view_and_not_turned_with_it():
    network, clamp, x = linear(), Clamp(delta(), 0.4, torch.randn(4), torch.rand(4) + 0.5), images(7)
    module = CalibrationModule(network, clamp, views=("hflip",))
    weight, bias = network[1].weight, network[1].bias
    turned = weight.reshape(4, 3, 8, 8).flip(-1).flatten(1)
    mean = x.flatten(1) @ ((weight + turned) / 2).T + delta().flatten() @ weight.T + bias
    torch.testing.assert_close(module(x), clamp.scale(mean))
    torch.testing.assert_close(module(x), by_hand(network, clamp, x))
    torch.testing.assert_close(module.predict_proba(x), module(x).softmax(1))
    torch.testing.assert_close(module({"input": x[:3]}), module(x)[:3])


class InPlace(nn.Module):
    """A network that changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.net = linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.sub_(0.5).mul_(2.0))


@pytest.mark.parametrize("perturbed", [False, True])
def test_a_network_may_change_its_input_in_place(perturbed):
    """Views are made of the images as they were, in a module, around somebody else's, and in an export."""
    network, x = InPlace(), images(6)
    clamp = Clamp(delta() if perturbed else None, 0.4)
    views = [network.net(2 * (clamp.perturb(view) - 0.5)) for view in (x, x.flip(-1), x.flip(-2))]
    expected = clamp.scale(sum(views) / 3)
    module = CalibrationModule(network, clamp, views=("hflip", "vflip"))
    torch.testing.assert_close(module(x.clone()), expected)
    torch.testing.assert_close(to_exported_program(module, x).module()(x.clone()), expected)
    hooks = ClampHooks(network, clamp, Spec(views=("hflip", "vflip")))
    torch.testing.assert_close(network(x.clone()), expected)
    hooks.remove()


def test_the_mean_is_that_of_log_probabilities_to_a_softmax():
    network, x = SmallNet(), images(5)
    log_probs = (network(x).log_softmax(1) + network(x.flip(-1)).log_softmax(1)) / 2
    probs = CalibrationModule(network, Clamp(log_temperature=0.7), views=["hflip"]).predict_proba(x)
    torch.testing.assert_close(probs, (log_probs / torch.tensor(0.7).exp()).softmax(1))


def test_a_symmetric_network_is_calibrated_alike_with_and_without():
    network, x = Symmetric(), images(400)
    y = sampled(network(x + SHIFT).detach().double() / 2)
    options = {"grids": (1,), "output_maps": ("vector",)}
    with_views, without = (fit_clamp(network, batches(x, y), views=views, **options) for views in (("hflip",), ()))
    assert with_views.chosen_name == without.chosen_name
    for name, value in without.clamp.state_dict().items():
        torch.testing.assert_close(with_views.clamp.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert with_views.after["nll"] == pytest.approx(without.after["nll"], abs=1e-6)
    assert with_views.passes == without.passes


def problem(n: int = 1000) -> tuple[nn.Module, Tensor, Tensor]:
    """Labels that a shifted image and its mirror image tell together, and a network that is twice too sure."""
    x, network = images(n), SmallNet(2.0)
    truth = (network(x + SHIFT) + network((x + SHIFT).flip(-1))) / 4
    return network, x, sampled(truth.detach().double())


def test_a_fit_takes_views_and_says_so():
    network, x, y = problem()
    result = fit_clamp(network, batches(x, y, 100), views=("hflip",), **QUICK)
    module = CalibrationModule.from_result(network, result)
    assert module.spec.views == ("hflip",)
    assert result.clamp.perturbation is not None
    torch.testing.assert_close(module(x), by_hand(network, result.clamp, x))
    assert result.after["nll"] == pytest.approx(float(F.cross_entropy(module(x), y)), abs=1e-5)
    assert result.before["nll"] == pytest.approx(float(F.cross_entropy(network(x), y)), abs=1e-5)
    assert result.after["nll"] < fit_clamp(network, batches(x, y, 100), **QUICK).after["nll"] - 0.01
    assert result.reason.endswith("; mean of 2 views (as it is, hflip)")
    assert f"{result.passes} passes of 2 views, " in str(result)


@pytest.mark.parametrize("options", [{"cache_bytes": 0}, {"size": 37}, {"views": ("vflip", "hflip")}])
def test_batches_caches_and_the_order_of_views_change_nothing(options):
    network, x, y = problem(300)
    views = options.get("views", ("hflip",))
    expected = fit_clamp(network, batches(x, y, 100), views=views[::-1], **QUICK)
    result = fit_clamp(
        network,
        batches(x, y, options.get("size", 100)),
        views=views,
        cache_bytes=options.get("cache_bytes", 2**28),
        **QUICK,
    )
    assert result.before["nll"] == pytest.approx(expected.before["nll"], abs=1e-6)
    assert result.after["nll"] == pytest.approx(expected.after["nll"], abs=1e-6)
    torch.testing.assert_close(result.clamp.perturbation, expected.clamp.perturbation, rtol=1e-4, atol=1e-5)


class AllFlips(nn.Module):
    """The mean over an image and two views, written out."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return (self.network(x) + self.network(x.flip(-2)) + self.network(x.flip(-1))) / 3


@pytest.mark.parametrize("options", [{"method": "temperature"}, {"grids": (), "output_maps": ("vector",)}])
def test_without_a_perturbation_it_is_the_fit_of_the_mean(options):
    network, x, y = problem(400)
    result = fit_clamp(network, batches(x, y), views=("hflip", "vflip"), **options)
    expected = fit_clamp(AllFlips(network), batches(x, y), **options)
    assert result.after["nll"] == pytest.approx(expected.after["nll"], abs=1e-6)
    module = CalibrationModule.from_result(network, result)
    torch.testing.assert_close(module(x), expected.clamp.scale(AllFlips(network)(x)), rtol=1e-4, atol=1e-4)
    assert result.reason.endswith("; mean of 3 views (as it is, hflip, vflip)")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["clamp", "published"])
def test_the_perturbation_may_enter_at_a_submodule(method):
    network, x, y = problem()
    inside = nn.Sequential(nn.Identity(), network)
    options = QUICK if method == "clamp" else {"method": "published", "epochs": 2, "lr": 0.1}
    expected = fit_clamp(network, batches(x, y, 50), views=("hflip",), **options)
    by_itself = by_hand(network, expected.clamp, x)
    result = fit_clamp(inside, batches(x, y, 50), views=("hflip",), perturb_at="1", **options)
    assert result.clamp.perturbation is not None
    for name, value in expected.clamp.state_dict().items():
        torch.testing.assert_close(result.clamp.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(CalibrationModule.from_result(inside, result)(x), by_itself, rtol=1e-4, atol=1e-4)


def test_the_gradient_of_a_perturbation_is_that_of_all_views():
    """A step along it lowers the loss as it promises: else no grid would be worth its cost."""
    network, x, y = problem()
    result = fit_clamp(network, batches(x, y), views=("hflip",), **QUICK)
    (grid,) = [one for one in result.candidates if one.grid == 1]
    assert grid.achieved_gain == pytest.approx(grid.predicted_gain, rel=0.3)
    torch.testing.assert_close(result.clamp.perturbation.mean((1, 2)), SHIFT.flatten(), rtol=0, atol=0.25)


class Masking(nn.Module):
    """Masks the second class of bright images whose left half is the brighter one: in one view, not its mirror."""

    def __init__(self, mask: float) -> None:
        super().__init__()
        self.net, self.mask = SmallNet(2.0), mask

    def forward(self, x: Tensor) -> Tensor:
        left, right = x[..., :4].sum((1, 2, 3)), x[..., 4:].sum((1, 2, 3))
        masked = (left > right) & (left + right > 0)
        return self.net(x).masked_fill(masked[:, None] & (torch.arange(4) == 1), self.mask)


@pytest.mark.parametrize("views", [("hflip",), ("vflip", "hflip")])
@pytest.mark.parametrize("mask", [-1e4, -2.5e4, -torch.inf])
def test_a_class_that_one_view_masks_is_masked_in_the_mean(mask, views):
    x = images(60)
    logits = CalibrationModule(Masking(mask), Clamp(), views=views)(x)
    assert torch.equal(logits[:, 1] <= -1e4, x.sum((1, 2, 3)) > 0)
    others = CalibrationModule(Masking(0.0), Clamp(), views=views)(x)
    torch.testing.assert_close(logits[:, [0, 2, 3]], others[:, [0, 2, 3]])


def test_a_fit_takes_it_for_masked():
    x = images(400)
    truth = AllFlips(Masking(-1e9))(x) * torch.tensor([0.5, 0.5, 0.3, 0.5]) + torch.tensor([1.5, 0, -1, 0])
    data, options = batches(x, sampled(truth.detach().double())), {"grids": (), "output_maps": ("vector",)}
    expected, result = (fit_clamp(Masking(mask), data, views=("hflip",), **options) for mask in (-1e9, -1e4))
    assert result.chosen_name == "vector"
    torch.testing.assert_close(result.clamp.class_scale, expected.clamp.class_scale)


def test_a_label_that_one_view_masks_is_refused():
    x = images(60)
    with pytest.raises(ValueError, match=r"of the calibration set has the label 1, .* counts as masked"):
        fit_clamp(Masking(-1e4), [(x, torch.arange(60) % 4)], views=("hflip",), **QUICK)


# Outputs per pixel


class Pixels(nn.Module):
    """One logit per pixel in several layouts, at an edge that a mirror moves."""

    def __init__(self, squeeze: bool = False, pool: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 3, padding=1)
        self.squeeze, self.pool = squeeze, pool

    def forward(self, x: Tensor) -> Tensor:
        logits = self.conv(x)
        logits = F.avg_pool2d(logits, 2) if self.pool else logits
        return logits[:, 0] if self.squeeze else logits


@pytest.mark.parametrize("task", ["multiclass", "binary", "binary without an axis"])
def test_outputs_per_pixel_are_turned_back(task):
    network = DenseNet() if task == "multiclass" else Pixels(squeeze="without" in task)
    x = images(6)[..., :6]
    module = CalibrationModule(network, Clamp(log_temperature=0.3), task=task.split()[0], views=("hflip", "vflip"))
    mean = (network(x) + network(x.flip(-1)).flip(-1) + network(x.flip(-2)).flip(-2)) / 3
    torch.testing.assert_close(module(x), module.clamp.scale(mean))


def test_outputs_per_pixel_are_fitted():
    network, x = DenseNet(), images(60)
    truth = (network(x) + network(x.flip(-1)).flip(-1)) / 4
    result = fit_clamp(network, batches(x, sampled(truth.detach().double()), 20), views=("hflip",), **QUICK)
    assert result.after["nll"] < result.before["nll"]
    assert float(result.clamp.temperature) == pytest.approx(2, rel=0.1)


def test_one_position_has_no_place_to_be_turned_back_to():
    network, x = nn.Sequential(nn.Conv2d(3, 4, 8)), images(5)
    module = CalibrationModule(network, Clamp(), views=("hflip",))
    assert module(x).shape == (5, 4, 1, 1)
    torch.testing.assert_close(module(x), (network(x) + network(x.flip(-1))) / 2)


# Refusals


@pytest.mark.parametrize("views", ["hflip", ("mirror",), ("hflip", "hflip"), (1,), 2, None, ([],)])
def test_views_that_there_are_not_are_refused(views):
    sentence = r"`views` must be a sequence of names among \('hflip', 'vflip'\), each once, got "
    for call in (
        lambda: fit_clamp(nn.Identity(), [], views=views),
        lambda: NeuralClamping(views=views),
        lambda: CalibrationModule(SmallNet(), Clamp(), views=views),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x + y).mean((2, 3))


NO_IMAGES = {
    "features": (nn.Linear(5, 3), torch.randn(20, 5), {}, r"the input is torch\.float32 of shape \(20, 5\)"),
    "sequences": (nn.Flatten(), torch.randn(20, 2, 2), {}, r"of shape \(20, 2, 2\)"),
    "integers": (nn.Flatten(), torch.ones(20, 3, 2, 2).long(), {}, r"the input is torch\.int64"),
    "channels last": (nn.Flatten(), torch.randn(20, 8, 8, 3), {}, r"channels last, \(20, 8, 8, 3\): let the network"),
    "pixels of another size": (Pixels(pool=True), images(20), {"task": "binary"}, r"\(20, 1, 4, 4\) are not of .* \(8"),
    "several": (Two(), (images(20), images(20)), {}, "the input of a batch has 2 parts"),
}


class AsFloats(nn.Module):
    """Takes integers too."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *x: Tensor) -> Tensor:
        return self.network(*(part.float() for part in x))


@pytest.mark.parametrize("kind", NO_IMAGES)
def test_what_is_no_image_is_refused(kind):
    network, inputs, options, sentence = NO_IMAGES[kind]
    network, n = AsFloats(network), 20
    target = torch.zeros(n, 1, 4, 4).long() if "pixels" in kind else torch.zeros(n).long()
    batch, keys = ((inputs, target), None) if isinstance(inputs, Tensor) else ((*inputs, target), ((0, 1), 2))
    with pytest.raises(ValueError, match=rf"^`views` .*{sentence}.*leave `views` out\.$"):
        fit_clamp(network, [batch], views=("hflip",), batch_keys=keys, **options)


def test_a_network_that_a_mirror_misleads_is_warned_of():
    network, x = SmallNet(2.0), images(400)
    y = sampled(network(x).detach().double() / 2)
    with pytest.warns(UserWarning, match="Views do harm here: .* with them and .* without: leave `views`"):
        fit_clamp(network, batches(x, y), views=("hflip",), **QUICK)


def test_a_network_that_is_left_alone_is_left_without_views():
    """Outputs that say nothing have no temperature; the mean over views would be something else all the same."""
    network, x = linear(), images(50)
    y = (network(x) + network(x.flip(-1))).argmax(1)
    with pytest.warns(UserWarning, match="The network was left as it is"):
        result = fit_clamp(network, batches(x, y), views=("hflip",), **QUICK)
    assert result.chosen_name == "identity"
    assert result.spec.views == ()
    assert result.after == result.before
    assert torch.equal(CalibrationModule.from_result(network, result)(x), network(x))


# Files, Trainer, export


def test_views_are_saved_and_restored():
    network, x, y = problem(200)
    result = fit_clamp(network, batches(x, y), views=["hflip"], **QUICK)
    file = BytesIO()
    torch.save(state_of_result(result), file)
    file.seek(0)
    again = result_from_state(torch.load(file, weights_only=True))
    assert again.spec == result.spec
    restored, expected = (CalibrationModule.from_result(network, one) for one in (again, result))
    assert torch.equal(restored(x), expected(x))


class Stepping(LitClassifier):
    """Returns logits and features, and counts its calls."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.net(x), "inputs": x}

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0])["logits"], batch[1])

    def predict_step(self, batch, batch_idx):
        return self(x=batch[0])

    def test_step(self, batch, batch_idx):
        self.log("test_nll", F.cross_entropy(self(batch[0])["logits"], batch[1]))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["own input", "submodule"])
def test_a_trainer_calibrates_tests_and_predicts_with_views(where, tmp_path, caplog):
    perturb_at = "net" if where == "submodule" else None
    held = DataLoader(TensorDataset(*problem()[1:]), batch_size=100)
    callback = NeuralClamping(held, views=("hflip",), perturb_at=perturb_at, save_to=tmp_path, **QUICK)
    run, model, data = trainer(tmp_path, callback), Stepping(lr=0.0), loader(120, 5)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        run.fit(model, train_loader())
    assert any("averages over 2 views of every image" in line for line in caplog.messages)
    assert callback.result.clamp.perturbation is not None
    module = CalibrationModule.from_checkpoint(callback.checkpoint_path, Stepping)
    x, y = data.dataset.tensors
    expected = by_hand(model.net, callback.result.clamp, x)
    torch.testing.assert_close(module(x), expected)
    predicted = run.predict(model, data)
    torch.testing.assert_close(torch.cat([part["logits"] for part in predicted]), expected)
    # All else that the network returns is that of the image as it is.
    inputs = x if where == "submodule" else callback.result.clamp.perturb(x)
    torch.testing.assert_close(torch.cat([part["inputs"] for part in predicted]), inputs)
    (numbers,) = run.test(model, data, verbose=False)
    assert numbers["test_nll"] == pytest.approx(float(F.cross_entropy(expected.detach(), y)), abs=1e-5)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    torch.testing.assert_close(torch.cat(trainer(tmp_path).predict(module, data)), expected)


def test_hooks_of_others_see_a_view_as_they_see_an_image():
    network, clamp, x = nn.Sequential(SmallNet()), Clamp(log_temperature=0.4), images(5)
    network.register_forward_pre_hook(lambda _, args: (2 * args[0] + 1,))
    network.register_forward_hook(lambda _, args, output: output**2)
    expected = CalibrationModule(network, clamp, views=("hflip",))(x)
    hooks = ClampHooks(network, clamp, Spec(views=("hflip",)))
    torch.testing.assert_close(network(x), expected)
    assert hooks.used
    hooks.remove()
    torch.testing.assert_close(network(x), (SmallNet()(2 * x + 1)) ** 2)


def test_a_view_that_fails_leaves_the_hooks_as_they_were():
    network = nn.Sequential(nn.Linear(5, 3))
    hooks = ClampHooks(network, Clamp(log_temperature=0.4), Spec(views=("hflip",)))
    for _ in range(2):
        with pytest.raises(ValueError, match="`views` turn images round"):
            network(torch.randn(4, 5))
    hooks.remove()


def test_calibrate_takes_views(tmp_path):
    with pytest.warns(UserWarning, match="Views do harm"):
        module = calibrate(trainer(tmp_path), LitClassifier(), loader(100, 1), views=("hflip",), **QUICK)
    x = images(4)
    torch.testing.assert_close(module(x), by_hand(module.network, module.clamp, x))


@pytest.mark.parametrize("clamp", [Clamp(None, 0.4, torch.randn(4)), Clamp(delta(), 0.4)])
def test_a_program_calls_the_network_on_every_view(clamp):
    network = SmallNet()
    module = CalibrationModule(network, clamp, views=("hflip", "vflip"))
    exported = to_exported_program(module, images(1))
    convolutions = [node for node in exported.graph.nodes if "conv2d" in str(node.target)]
    assert len(convolutions) == 3
    x = images(7)
    torch.testing.assert_close(exported.module()(x), module(x))


@pytest.mark.slow
def test_onnx_calls_the_network_on_every_view(tmp_path):
    import onnxruntime

    module = CalibrationModule(DenseNet(), Clamp(delta(), 0.4), views=("hflip",))
    to_onnx(module, tmp_path / "m.onnx", images(1))
    session, x = onnxruntime.InferenceSession(tmp_path / "m.onnx"), images(5)
    (logits,) = session.run(None, {"inputs": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), module(x), rtol=1e-4, atol=1e-4)


def test_no_last_layer_holds_a_mean_over_views():
    module = CalibrationModule(SmallNet(), Clamp(log_temperature=0.4), views=("hflip",))
    with pytest.raises(ValueError, match="mean over 2 views of an image, which no layer's weights can hold: export"):
        fold(module, images(2))


@pytest.mark.slow
def test_compiled_modules_take_views():
    module, x = CalibrationModule(SmallNet(), Clamp(delta(), 0.4), views=("hflip",)), images(6)
    torch.testing.assert_close(torch.compile(module, backend="eager", fullgraph=True)(x), module(x))
    network = SmallNet().eval().requires_grad_(False)
    for compiled in (torch.compile(network, backend="eager"), network):
        if compiled is network:
            network.compile(backend="eager")
        hooks = ClampHooks(compiled, module.clamp, module.spec)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), module(x))
        hooks.remove()
