"""Networks and data whose right answer is known."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_clamp import losses
from lightning_clamp._rows import as_rows
from lightning_clamp.clamping.ranks import ALONE

SHIFT = torch.tensor([0.5, -0.4, 0.3]).reshape(3, 1, 1)


def sampled(logits: Tensor, seed: int = 1) -> Tensor:
    """Labels drawn from the softmax of ``logits`` (axis 1): the network that returns them is calibrated."""
    generator = torch.Generator().manual_seed(seed)
    gumbel = -torch.log(-torch.log(torch.rand(logits.shape, generator=generator, dtype=logits.dtype)))
    return (logits + gumbel).argmax(1)


def calibrated_logits(n: int = 2000, n_classes: int = 5, scale: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, n_classes, generator=generator, dtype=torch.float64)
    return logits, sampled(logits, seed + 1)


NAN = calibrated_logits(40)[0]
NAN[3, 2] = torch.nan
_LOGITS, _TARGET = calibrated_logits(9)
_NO_PROBS = "With probs=True `preds` must be probabilities"
# Predictions, target, options of the metric, error, message.
BAD_PREDICTIONS = {
    "nan": (NAN, torch.zeros(40).long(), {}, ValueError, "`preds` holds nan or inf in 1 of 40 rows"),
    "inf": (NAN.nan_to_num(torch.inf), torch.zeros(40).long(), {}, ValueError, "nan or inf in 1 of 40 rows"),
    "nothing left": (torch.full((2, 5), -torch.inf), torch.zeros(2).long(), {}, ValueError, "nan or inf in 2 of 2"),
    "label above": (_LOGITS, torch.full((9,), 5), {}, ValueError, r"Targets must lie in \[0, 4\], got 5"),
    "label below": (_LOGITS, torch.full((9,), -100), {}, ValueError, r"got -100\. .* ignore_index"),
    "logits as probs": (_LOGITS, _TARGET, {"probs": True}, ValueError, _NO_PROBS),
    "probs twice as large": (2 * _LOGITS.softmax(1), _TARGET, {"probs": True}, ValueError, _NO_PROBS),
    "nan as probs": (torch.nan * _LOGITS, _TARGET, {"probs": True}, ValueError, _NO_PROBS),
    "float target": (_LOGITS, _TARGET.double(), {}, TypeError, "class indices as int64"),
    "integer preds": (_LOGITS.long(), _TARGET, {}, TypeError, "float tensor of logits"),
    "a list": ([[1.0, 2.0]], torch.zeros(1).long(), {}, TypeError, "float tensor of logits, got list"),
    "a list of labels": (_LOGITS, _TARGET.tolist(), {}, TypeError, "The target must be a tensor, got list"),
    "one axis": (_LOGITS[0], _TARGET, {}, ValueError, r"on axis 1, \(N, C\) or \(N, C, ...\), got \(5,\)"),
    "one class": (_LOGITS[:, :1], _TARGET, {}, ValueError, 'say task="binary"'),
    "shapes": (_LOGITS, _TARGET[:3], {}, ValueError, "need a target of shape"),
    "labels with an axis too many": (_LOGITS, _TARGET[:, None, None], {}, ValueError, "need a target of shape"),
    "a scalar": (torch.tensor(1.0), torch.tensor(1), {"task": "binary"}, ValueError, "A batch needs an axis"),
}


class SmallNet(nn.Module):
    """A fixed nonlinear image network, ``temperature`` times over-confident."""

    def __init__(self, temperature: float = 1.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.linear = nn.Linear(24, 4)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            self.conv.weight.mul_(0.3)
            self.linear.weight.mul_(0.5)
        self.temperature = temperature
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.adaptive_avg_pool2d(torch.tanh(self.conv(x)), 2).flatten(1)
        return self.temperature * self.linear(hidden)


def images(n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, 3, 4, 4, generator=generator, dtype=torch.float64)
    return F.interpolate(coarse, size=(8, 8), mode="bilinear").to(dtype)


def shifted_images(n: int = 4000, temperature: float = 2.0) -> tuple[SmallNet, Tensor, Tensor]:
    """Inputs from which SHIFT was subtracted, and a network ``temperature`` times too sure: the clamp undoes both."""
    true = images(n)
    target = sampled(SmallNet()(true).detach().double())
    return SmallNet(temperature), true - SHIFT, target


def batches(inputs: Tensor, target: Tensor, size: int = 250) -> list[tuple[Tensor, Tensor]]:
    return list(zip(inputs.split(size), target.split(size), strict=True))


class LitClassifier(LightningModule):
    """A tiny over-confident classifier of (3, 8, 8) images, as a user would write it."""

    def __init__(self, lr: float = 1e-3, temperature: float = 2.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = SmallNet(temperature)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("test_nll", F.cross_entropy(self(x), y))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])


class Validating(LitClassifier):
    """The same with a validation loop."""

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))


def loader(n: int, seed: int, size: int = 100, shift: bool = True) -> DataLoader:
    """Calibrated labels for images that may be shifted: held-out data of :class:`LitClassifier`."""
    true = images(n, seed)
    target = sampled(SmallNet()(true).detach().double(), seed + 1)
    return DataLoader(TensorDataset(true - SHIFT if shift else true, target), batch_size=size)


def train_loader() -> DataLoader:
    """What :class:`LitClassifier` is trained on."""
    return loader(200, seed=20, shift=False)


def trainer(tmp_path, *callbacks, **options) -> Trainer:
    """A quiet Trainer of one epoch, which saves checkpoints where a callback asks for them."""
    settings = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    }
    return Trainer(callbacks=list(callbacks), **{**settings, **options})


def made(mixin: type, module: type = LitClassifier, **options):
    return type(f"With{mixin.__name__}", (mixin, module), {})(**options)


class Segmenter(LightningModule):
    """One logit per pixel, as a user would write it."""

    def __init__(self, lr: float = 0.1, accuracy: float | None = 0.9) -> None:
        super().__init__()
        self.save_hyperparameters()
        # Right on most pixels from the start, so that α rises.
        self.conv = nn.Conv2d(1, 1, 1)
        nn.init.constant_(self.conv.weight, 4.0)
        nn.init.constant_(self.conv.bias, -2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def training_step(self, batch, batch_idx):
        return F.binary_cross_entropy_with_logits(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        if self.hparams["accuracy"] is not None:
            self.log("val_accuracy", self.hparams["accuracy"])
        self.log("val_loss", 0.3)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])


def maps(n: int = 8) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    target = (torch.rand(n, 1, 4, 4, generator=generator) < 0.4).float()
    return TensorDataset(target + 0.3 * torch.randn(n, 1, 4, 4, generator=generator), target)


class Attending(nn.Module):
    """A transformer's layer, whose fused attention has a first derivative only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


def formula_network() -> nn.Sequential:
    """The network of the reference numbers: its weights are a formula."""
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)
    ).double()
    conv, linear = network[0], network[4]
    waves = {conv.weight: (0.3, 1), conv.bias: (0.1, 0.5), linear.weight: (4, 0.3), linear.bias: (0.1, 2)}
    for parameter, (scale, shift) in waves.items():
        index = torch.arange(parameter.numel(), dtype=torch.float64).reshape(parameter.shape)
        parameter.data = scale * torch.sin(index + shift)
    return network


def formula_batch(network: nn.Module) -> tuple[Tensor, Tensor]:
    n, c, h, w = np.ogrid[0:40, 0:3, 0:8, 0:8]
    inputs = torch.from_numpy(np.sin(0.13 * n + 0.7 * c + 0.21 * h * w / 8 + 0.05 * h))
    predicted = network(inputs * 1.1 + 0.2).argmax(1)
    return inputs, torch.where(torch.arange(40) % 5 == 0, (predicted + 1) % 5, predicted)


# Of the losses, those of (logits, target), with margins at which both terms of ACLS, and MbLS, are at work on logits
# that are drawn here.
_AT_WORK = {"acls_loss": {"margin": 1.5}, "mbls_loss": {"margin": 1.5}, "cals_loss": {"margin": 1.5}}
_OTHERS = ("margin_aware_loss", "sc_bce_loss")
LOSSES = {
    name: partial(getattr(losses, name), **_AT_WORK.get(name, {}))
    for name in losses.__all__
    if name.endswith("_loss") and name not in _OTHERS
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def value_and_gradient(loss, logits: Tensor, target: Tensor, **options) -> tuple[Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    value = loss(logits, target, **options)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    return value.detach(), gradient


def drawn(*shape: int, seed: int = 0, scale: float = 4.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
    return logits, torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)


def trace(network: nn.Module) -> dict:
    """Everything that must be as it was."""
    return {
        "values": {name: value.clone() for name, value in network.state_dict().items()},
        "grad": {n: None if p.grad is None else p.grad.clone() for n, p in network.named_parameters()},
        "requires_grad": [p.requires_grad for p in network.parameters()],
        "training": [m.training for m in network.modules()],
        "rng": torch.get_rng_state().clone(),
        "random": random.getstate(),
    }


def assert_same(first: dict, second: dict) -> None:
    for part in ("values", "grad"):
        for name, value in first[part].items():
            assert (value is None and second[part][name] is None) or torch.equal(value, second[part][name])
    assert torch.equal(first["rng"], second["rng"])
    for part in ("requires_grad", "training", "random"):
        assert first[part] == second[part]


class DenseNet(nn.Module):
    """Per-pixel logits of three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Tanh(), nn.Conv2d(5, 3, 1))
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x):
        return self.layers(x)


class RowList(list):
    """Rows as a fit takes them, of one process."""

    ranks = ALONE


def rows(logits, target) -> RowList:
    return RowList(as_rows(a.double(), b) for a, b in zip(logits.split(100), target.split(100), strict=True))
