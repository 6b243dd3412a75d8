"""Data made on the fly: labels drawn from what a network says, so that it is off by a known amount."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def overconfident(n: int, classes: int) -> tuple[Tensor, Tensor]:
    """Logits of twice the size at which they would be calibrated, and labels."""
    generator = torch.Generator().manual_seed(0)
    truth = 3 * torch.randn(n, classes, generator=generator)
    return 2 * truth, drawn(truth, generator)


def drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Labels drawn from the softmax of logits."""
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device).clamp(1e-7, 1 - 1e-7)
    return (logits - (-uniform.log()).log()).argmax(1)


class Stream:
    """Random images made anew in every pass, of which only the labels are kept.

    The labels are drawn from the network's outputs, and the images are shifted after: a perturbation mends it.
    """

    def __init__(
        self, network: nn.Module, n: int, shape: tuple[int, ...], *, batch: int = 250, device: str = "cpu"
    ) -> None:
        self.n, self.shape, self.batch, self.device = n, shape, batch, device
        generator = torch.Generator(device).manual_seed(1)
        with torch.no_grad():
            standardise(network, next(self._images()))
            self.target = torch.cat([drawn(network(images), generator) for images in self._images()])

    def _images(self) -> Iterator[Tensor]:
        generator = torch.Generator(self.device).manual_seed(0)
        for start in range(0, self.n, self.batch):
            shape = (min(self.batch, self.n - start), *self.shape)
            yield torch.rand(shape, generator=generator, device=self.device) - 0.5

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, target in zip(self._images(), self.target.split(self.batch), strict=True):
            yield images - 0.03, target


def standardise(network: nn.Module, images: Tensor) -> None:
    """Give the outputs of untrained weights the spread of logits: mean 0 and standard deviation 2 in every class."""
    logits = network(images)
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    factor = 2 / logits.std(0)
    last.bias.copy_(factor * (last.bias - logits.mean(0)))
    last.weight.mul_(factor[:, None])


def set_batch_statistics(network: nn.Module, images: Tensor) -> None:
    """Those of one batch, without which untrained weights give outputs of any size; then eval mode."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        network.train()(images)
    network.eval()
