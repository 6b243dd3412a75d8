"""What calibration brings on data it has not seen: real networks, real images, both halves of a held-out set.

    python examples/benchmarks/heldout.py --data DIR

DIR holds ``load.py`` with ``images(name)`` (uint8, N×32×32×3), ``labels(name)`` and ``nuclei()`` (images and masks),
and ``weights/*.safetensors``. The network is fitted on one half and measured on the other, then the other way round.
Everything is compared with temperature scaling on the same halves; ± is one paired standard error over the images.
"""

import argparse
import importlib.util
import math
import time
from collections.abc import Callable, Iterator
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

from lightning_clamp import CalibrationResult, Clamp, fit_clamp
from lightning_clamp.clamping import Candidate
from lightning_clamp.metrics import Accuracy, ExpectedCalibrationError

CIFAR10 = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CIFAR100 = {"mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)}


class Problem(NamedTuple):
    """A trained network, data it has not seen, and how many samples to take at a time."""

    network: nn.Module
    images: Tensor
    target: Tensor
    task: str
    batch_size: int


def cifar(
    data: ModuleType,
    options: argparse.Namespace,
    *,
    name: str,
    depth: int,
    weights: str,
    normalisation: dict,
    jpeg: bool,
) -> Problem:
    """A CIFAR ResNet and its test set, re-encoded as JPEG if asked."""
    network = CifarResNet(depth, 100 if name.startswith("cifar100") else 10, weights[-1])
    network.load_state_dict(load_file(options.data / "weights" / f"{weights}.safetensors"))
    images = torch.from_numpy(data.images(name)).permute(0, 3, 1, 2).contiguous()
    if jpeg:
        images = torch.stack([v2.functional.jpeg(image, options.jpeg) for image in images])
    scaled = v2.functional.normalize(v2.functional.to_dtype(images, torch.float32, scale=True), **normalisation)
    return Problem(network, scaled, torch.from_numpy(data.labels(name)).long(), "multiclass", 250)


def nuclei(data: ModuleType, options: argparse.Namespace) -> Problem:
    """A small U-Net trained here on 100 of the images, halved in size: a dense task with one logit per pixel."""
    images, masks = (torch.from_numpy(array) for array in data.nuclei())
    images = F.avg_pool2d(images.permute(0, 3, 1, 2).float() / 255, 2)
    masks = masks[:, ::2, ::2].long().contiguous()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, masks = images[order], masks[order]
    torch.manual_seed(0)
    network = UNet()
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(12):
        for part in torch.randperm(100).split(10):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(network(images[part])[:, 0], masks[part].float()).backward()
            optimizer.step()
    return Problem(network, images[100:], masks[100:], "binary", 16)


RESNET20 = partial(cifar, name="cifar10-test", depth=20, weights="cifar10_resnet20_optA", normalisation=CIFAR10)
RESNET32 = partial(cifar, name="cifar100-test", depth=32, weights="cifar100_resnet32_optB", normalisation=CIFAR100)
CASES: dict[str, Callable[[ModuleType, argparse.Namespace], Problem]] = {
    "cifar10-resnet20": partial(RESNET20, jpeg=False),
    "cifar100-resnet32": partial(RESNET32, jpeg=False),
    "cifar10-resnet20-jpeg": partial(RESNET20, jpeg=True),
    "nuclei-unet": nuclei,
}


def main() -> None:
    """Fit, measure and print every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with load.py and weights/")
    parser.add_argument("--case", choices=CASES, action="append", help="only this case; may be repeated")
    parser.add_argument("--jpeg", type=int, default=40, help="JPEG quality of the shifted copy (default 40)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    data = _module(options.data / "load.py")
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads")
    summary = [row for case in options.case or CASES for row in run(case, data, options)]
    print("\nHeld-out NLL (change against temperature scaling in units of .001, ± one paired standard error) and ECE")
    print("| network and data | uncalibrated | temperature | plain Neural Clamping | default |")
    print("|---|---|---|---|---|")
    print("\n".join(summary))


def run(case: str, data: ModuleType, options: argparse.Namespace) -> Iterator[str]:
    """Both directions of one case, each a row of the summary."""
    problem = CASES[case](data, options)
    problem.network.to(options.device).eval().to(memory_format=torch.channels_last)
    order = torch.randperm(len(problem.images), generator=torch.Generator().manual_seed(0))
    for direction, (fit, held) in enumerate((order.chunk(2), order.chunk(2)[::-1]), start=1):
        parts = (problem.images[fit].split(problem.batch_size), problem.target[fit].split(problem.batch_size))
        started = time.perf_counter()
        result = fit_clamp(problem.network, list(zip(*parts, strict=True)), task=problem.task)
        seconds = time.perf_counter() - started
        print(f"\n## {case}, direction {direction}: {len(fit)} to fit, {len(held)} held out")
        held_out = problem._replace(images=problem.images[held], target=problem.target[held])
        cells = report(result, held_out, options.device)
        print(f"{result.passes} passes, {seconds:.0f} s. {result.reason}")
        yield f"| {case}, direction {direction} | {' | '.join(cells)} |"


def report(result: CalibrationResult, held: Problem, device: str) -> list[str]:
    """Print one row per candidate; return the summary: uncalibrated, temperature, plain choice, default choice."""
    fitted = [candidate for candidate in result.candidates if candidate.clamp is not None]
    alone = scores(fitted[0].clamp, held, device)
    uncalibrated = scores(Clamp(), held, device)
    plain = min((c for c in fitted if c.output == "temperature"), key=lambda c: c.criterion)
    print(f"uncalibrated: NLL {uncalibrated[0].mean():.4f}, ECE {uncalibrated[1]:.2%}")
    print("| candidate | p | score test p | predicted | ΔNLL held out | NLL | ECE | accuracy | passes | chosen |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    cells = {}
    for candidate in fitted:
        losses, error, accuracy = scores(candidate.clamp, held, device)
        change = losses - alone[0]
        deviation = float(change.std()) / math.sqrt(len(change))
        print(
            f"| {candidate.name} | {candidate.n_parameters} | {_number(candidate.p_value, '.1e')} "
            f"| {1000 * candidate.expected_change:+.1f} | {1000 * float(change.mean()):+.1f} ± {1000 * deviation:.1f} "
            f"| {losses.mean():.4f} | {error:.2%} | {accuracy:.2%} | {candidate.passes} "
            f"| {' and '.join(_choices(candidate, plain, result.chosen))} |"
        )
        change_text = f" ({1000 * float(change.mean()):+.1f} ± {1000 * deviation:.1f})" if change.any() else ""
        cells[candidate.name] = f"{candidate.name}: {losses.mean():.4f}{change_text}, {error:.1%}"
    assert result.chosen is not None
    return [
        f"{uncalibrated[0].mean():.4f}, {uncalibrated[1]:.1%}",
        cells["temperature"].removeprefix("temperature: "),
        cells[plain.name],
        cells[result.chosen.name],
    ]


def _choices(candidate: Candidate, plain: Candidate, chosen: Candidate | None) -> Iterator[str]:
    if candidate is plain:
        yield "plain"
    if candidate is chosen:
        yield "default"


def scores(clamp: Clamp, held: Problem, device: str) -> tuple[Tensor, float, float]:
    """Held-out loss of every sample (mean over its pixels), ECE and accuracy with a clamp."""
    clamp = clamp.to(device)
    error, accuracy = (metric(task=held.task).to(device) for metric in (ExpectedCalibrationError, Accuracy))
    losses = []
    for images, target in zip(held.images.split(250), held.target.to(device).split(250), strict=True):
        with torch.no_grad():
            logits = clamp.scale(held.network(clamp.perturb(images.to(device)))).double()
        if held.task == "binary":
            loss = F.binary_cross_entropy_with_logits(logits[:, 0], target.double(), reduction="none")
        else:
            loss = F.cross_entropy(logits, target, reduction="none")
        losses.append(loss.reshape(len(images), -1).mean(1))
        error.update(logits, target)
        accuracy.update(logits, target)
    return torch.cat(losses), float(error.compute()), float(accuracy.compute())


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _module(path: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location("calibration_data", path)
    if specification is None or specification.loader is None or not path.exists():
        raise FileNotFoundError(f"{path} is missing: --data needs a folder with load.py.")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
