"""Networks and data whose right answer is known."""

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

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
    "one axis": (_LOGITS[0], _TARGET, {}, ValueError, r"must have shape \(N, C\) or \(N, C, ...\), got \(5,\)"),
    "one class": (_LOGITS[:, :1], _TARGET, {}, ValueError, 'say task="binary"'),
    "shapes": (_LOGITS, _TARGET[:3], {}, ValueError, "need a target of shape"),
    "labels with an axis too many": (_LOGITS, _TARGET[:, None], {}, ValueError, "need a target of shape"),
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
