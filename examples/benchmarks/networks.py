"""CIFAR ResNets (He et al., 2016, section 4.2) with the layer names of the weights that are loaded; a small U-Net."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SubsampledShortcut(nn.Module):
    """Option A: every second pixel, and zero channels on both sides."""

    def __init__(self, added: int) -> None:
        super().__init__()
        self.added = added

    def forward(self, x: Tensor) -> Tensor:
        """Halve the image and widen it with zeros."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added // 2, self.added // 2))


def _shortcut(before: int, after: int, stride: int, option: str) -> nn.Module:
    if stride == 1 and before == after:
        return nn.Sequential()
    if option == "A":
        return SubsampledShortcut(after - before)
    return nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut."""

    def __init__(self, before: int, after: int, stride: int, option: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut = _shortcut(before, after, stride, option)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        hidden = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(hidden)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet of ``depth`` 6n+2 for 32×32 images; widths 16, 32, 64.

    Args:
        depth: 20, 32, 44, 56 or 110.
        num_classes: Number of classes.
        option: Shortcut where the size changes, ``"A"`` (no weights) or ``"B"`` (1×1 convolution).
        mean: Per-channel mean, subtracted inside the network; images are in [0, 1].
        std: Per-channel standard deviation, divided by inside the network.
    """

    def __init__(self, depth: int, num_classes: int, option: str = "A") -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for stage, (before, after) in enumerate([(16, 16), (16, 32), (32, 64)], start=1):
            first = Block(before, after, 1 if stage == 1 else 2, option)
            rest = [Block(after, after, 1, option) for _ in range(blocks - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of normalised images ``(N, 3, 32, 32)``."""
        hidden = F.relu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3):
            hidden = stage(hidden)
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(hidden, 1), 1))


def _double_convolution(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(),
        nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(),
    )  # fmt: skip


class UNet(nn.Module):
    """Two levels, one logit per pixel (Ronneberger et al., 2015, much smaller)."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.fine = _double_convolution(3, width)
        self.middle = _double_convolution(width, 2 * width)
        self.coarse = _double_convolution(2 * width, 2 * width)
        self.up_middle = _double_convolution(4 * width, width)
        self.up_fine = _double_convolution(2 * width, width)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, 1, H, W)`` of images ``(N, 3, H, W)``; H and W multiples of 4."""
        fine = self.fine(x)
        middle = self.middle(F.max_pool2d(fine, 2))
        coarse = self.coarse(F.max_pool2d(middle, 2))
        middle = self.up_middle(torch.cat([F.interpolate(coarse, scale_factor=2), middle], 1))
        return self.head(self.up_fine(torch.cat([F.interpolate(middle, scale_factor=2), fine], 1)))
