"""Trained networks and real images they have not seen, as they are and shifted: what the benchmarks measure on.

The folder given as ``--data`` holds ``load.py`` with ``images(name)`` (uint8, N×32×32×3), ``labels(name)``,
``nuclei()`` (images and masks) and ``logprobs()`` (log-probabilities and labels), and ``weights/*.safetensors``.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from networks import CifarResNet, UNet
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2


class Problem(NamedTuple):
    """A trained network and data it has not seen.

    Attributes:
        network: In eval mode, from inputs to logits.
        inputs: What it takes, all samples, on the network's device.
        target: Labels, or masks, on the CPU.
        task: ``"multiclass"`` or ``"binary"``.
        batch_size: How many samples to take at a time.
        perturbable: Whether the inputs are images, so that a perturbation of them means something.
    """

    network: nn.Module
    inputs: Tensor
    target: Tensor
    task: str
    batch_size: int
    perturbable: bool = True

    def part(self, index: Tensor) -> "Problem":
        """The same with some of the samples."""
        return self._replace(inputs=self.inputs[index], target=self.target[index])

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Pairs of inputs and target, on the inputs' device."""
        target = self.target.to(self.inputs.device)
        return list(zip(self.inputs.split(self.batch_size), target.split(self.batch_size), strict=True))


# What happens to the images before the network sees them; severity is in each function's own unit.
def _noise(images: Tensor, severity: float) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return images.float().add(255 * severity * torch.randn(images.shape, generator=generator)).round().clamp(0, 255)


SHIFTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "jpeg": lambda images, quality: torch.stack([v2.functional.jpeg(image, int(quality)) for image in images]),
    "noise": _noise,
    "blur": lambda images, sigma: v2.functional.gaussian_blur(images, [5, 5], [sigma, sigma]),
    "contrast": lambda images, factor: v2.functional.adjust_contrast(images, factor),
    "brightness": lambda images, factor: v2.functional.adjust_brightness(images, factor),
}
SEVERITIES = {
    "jpeg": (60, 40, 20),
    "noise": (0.03, 0.06),
    "blur": (0.5, 0.8),
    "contrast": (0.5, 0.3),
    "brightness": (0.6,),
}

_CIFAR10 = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_CIFAR100 = {"mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)}


def _cifar(
    folder: Path, shift: str, severity: float, *, name: str, depth: int, weights: str, normalisation: dict
) -> Problem:
    """A CIFAR ResNet and its test set, shifted if asked."""
    data = data_module(folder)
    network = CifarResNet(depth, 100 if name.startswith("cifar100") else 10, weights[-1])
    network.load_state_dict(load_file(folder / "weights" / f"{weights}.safetensors"))
    images = torch.from_numpy(data.images(name)).permute(0, 3, 1, 2).contiguous()
    if shift:
        images = SHIFTS[shift](images, severity).to(torch.uint8)
    scaled = v2.functional.normalize(v2.functional.to_dtype(images, torch.float32, scale=True), **normalisation)
    return Problem(network.eval(), scaled, torch.from_numpy(data.labels(name)).long(), "multiclass", 250)


def _log_probabilities(folder: Path, shift: str, severity: float) -> Problem:
    """Outputs of a DenseNet, without the network: only the output side can be calibrated."""
    outputs, labels = (torch.from_numpy(array) for array in data_module(folder).logprobs())
    return Problem(nn.Identity(), outputs.float(), labels.long(), "multiclass", 1000, perturbable=False)


def _nuclei(folder: Path, shift: str, severity: float) -> Problem:
    """A small U-Net trained here on 100 of the images, halved in size: a dense task with one logit per pixel."""
    images, masks = (torch.from_numpy(array) for array in data_module(folder).nuclei())
    images = F.avg_pool2d(images.permute(0, 3, 1, 2).float() / 255, 2)
    masks = masks[:, ::2, ::2].long().contiguous()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, masks = images[order], masks[order]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = _trained(UNet(), images[:100], masks[:100])
    return Problem(network.eval(), images[100:], masks[100:], "binary", 16)


def _trained(network: nn.Module, images: Tensor, masks: Tensor) -> nn.Module:
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(12):
        for part in torch.randperm(len(images)).split(10):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(network(images[part])[:, 0], masks[part].float()).backward()
            optimizer.step()
    return network


NETWORKS: dict[str, Callable[[Path, str, float], Problem]] = {
    "cifar10-resnet20": partial(
        _cifar, name="cifar10-test", depth=20, weights="cifar10_resnet20_optA", normalisation=_CIFAR10
    ),
    "cifar10-resnet110": partial(
        _cifar, name="cifar10-test", depth=110, weights="cifar10_resnet110_optA", normalisation=_CIFAR10
    ),
    "cifar100-resnet32": partial(
        _cifar, name="cifar100-test", depth=32, weights="cifar100_resnet32_optB", normalisation=_CIFAR100
    ),
    "cifar100-densenet": _log_probabilities,
    "nuclei-unet": _nuclei,
}


def load(case: str, folder: Path, device: str = "cpu") -> Problem:
    """A case by its name: a network of :data:`NETWORKS`, and for CIFAR a shift, such as ``"cifar10-resnet20 jpeg 40"``.

    On a device, convolutions are kept in full float32, as on the CPU.

    Raises:
        ValueError: If there is no such case.
        FileNotFoundError: If the folder has no ``load.py``.
    """
    network, *shift = case.split()
    if network not in NETWORKS or (shift and (len(shift) != 2 or shift[0] not in SHIFTS)):
        raise ValueError(
            f"There is no case {case!r}: a network of {', '.join(NETWORKS)}, and for the CIFAR ones a shift of "
            f"{', '.join(SHIFTS)} with its severity, such as 'cifar10-resnet20 jpeg 40'."
        )
    problem = NETWORKS[network](folder, shift[0] if shift else "", float(shift[1]) if shift else 0.0)
    torch.backends.cudnn.allow_tf32 = False
    problem.network.to(device, memory_format=torch.channels_last)
    return problem._replace(inputs=problem.inputs.to(device))


def data_module(folder: Path) -> ModuleType:
    """The folder's ``load.py``."""
    path = folder / "load.py"
    specification = importlib.util.spec_from_file_location("calibration_data", path)
    if specification is None or specification.loader is None or not path.exists():
        raise FileNotFoundError(f"{path} is missing: --data needs a folder with load.py and weights/.")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
