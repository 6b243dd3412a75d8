"""Checkpoints that hold a part of the weights: of an adapter, of a head on a frozen backbone."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_clamp import CalibrationModule, NeuralClamping
from tests.scenarios import Validating, images, loader, train_loader, trainer

# Lightning's own words for such files.
pytestmark = pytest.mark.filterwarnings("ignore:Found keys that are in the model state dict but not in the checkpoint")
HELD_OUT = loader(300, seed=30)
X = images(20)


class HeadOnly(Validating):
    """Trains and saves its head; the backbone comes from elsewhere."""

    def __init__(self, backbone: float = 1.0) -> None:
        super().__init__(lr=0.05)
        self.save_hyperparameters(ignore="backbone")
        self.strict_loading = False
        self.net.conv.requires_grad_(False)
        with torch.no_grad():
            self.net.conv.weight.mul_(backbone)

    def state_dict(self, *args, **options):
        state = super().state_dict(*args, **options)
        return {name: value for name, value in state.items() if name.startswith("net.linear")}


class Pruned(HeadOnly):
    """The same with the hook instead."""

    def state_dict(self, *args, **options):
        return Validating.state_dict(self, *args, **options)

    def on_save_checkpoint(self, checkpoint):
        for name in ("net.conv.weight", "net.conv.bias"):
            del checkpoint["state_dict"][name]


def fitted(folder, model, **options):
    callback = NeuralClamping(HELD_OUT, output_maps=("temperature",), grids=(), **options)
    # The loss of the first epoch is the lowest, so that the last weights are not the best.
    keeper = ModelCheckpoint(folder, monitor="epoch", mode="min")
    run = trainer(folder, callback, keeper, max_epochs=2)
    run.fit(model, train_loader(), HELD_OUT)
    return callback, run


@pytest.fixture(params=[HeadOnly, Pruned])
def kind(request):
    return request.param


def test_a_part_of_the_weights_is_restored_with_the_rest(tmp_path, kind):
    callback, _ = fitted(tmp_path, kind())
    expected = callback.calibrated_module()(X)
    assert len(torch.load(callback.checkpoint_path, weights_only=True)["state_dict"]) == 2
    assert torch.equal(CalibrationModule.from_checkpoint(callback.checkpoint_path, kind)(X), expected)
    with pytest.raises(ValueError, match="what it does not hold, such as a frozen backbone, is another one"):
        CalibrationModule.from_checkpoint(callback.checkpoint_path, kind, backbone=2.0)


def test_another_backbone_under_the_same_head_is_not_what_was_calibrated(tmp_path, kind):
    model = kind()
    callback, run = fitted(tmp_path, model)
    clamped = torch.cat(run.predict(model, HELD_OUT))
    other = kind(backbone=2.0)
    other.load_state_dict(model.state_dict(), strict=False) if kind is HeadOnly else None
    with pytest.warns(UserWarning, match="The weights are not the ones that NeuralClamping calibrated"):
        bare = torch.cat(run.predict(other, HELD_OUT, ckpt_path=callback.checkpoint_path, weights_only=True))
    assert torch.equal(bare, other(HELD_OUT.dataset.tensors[0]).detach())
    assert not torch.equal(bare, clamped)


def test_the_best_of_them_are_calibrated_and_the_last_are_kept(tmp_path, kind):
    model = kind()
    callback, run = fitted(tmp_path, model, weights="best")
    best = torch.load(run.checkpoint_callback.best_model_path, weights_only=True)["state_dict"]
    assert not torch.equal(model.net.linear.weight, best["net.linear.weight"])
    module = callback.calibrated_module()
    assert torch.equal(module.network.net.linear.weight, best["net.linear.weight"])
    assert torch.equal(module.network.net.conv.weight, model.net.conv.weight)
    last, _ = fitted(tmp_path / "last", kind())
    assert torch.equal(model.net.linear.weight, last.calibrated_module().network.net.linear.weight)


def test_a_file_that_was_moved_costs_one_sentence(tmp_path):
    model = Validating()
    callback, _ = fitted(tmp_path, model)
    with torch.no_grad():
        model.net.linear.bias += 1
    (moved := tmp_path / "moved").mkdir()
    (tmp_path / callback.checkpoint_path).rename(moved / "it.ckpt")
    with pytest.raises(RuntimeError, match=r"calibrated.ckpt', where those were saved, is not there any more: if it"):
        callback.calibrated_module()
    CalibrationModule.from_checkpoint(moved / "it.ckpt", Validating)
