"""What calibration brings on data it has not seen: real networks, real images, both halves of the test set.

    python examples/benchmarks/heldout.py --data DIR

DIR holds ``load.py`` with ``images(name)`` (uint8, N×32×32×3) and ``labels(name)``, and ``weights/*.safetensors``. The
network is fitted on 5,000 test images and measured on the other 5,000, then the other way round. Everything is
compared with temperature scaling on the same halves; ± is one paired standard error.
"""

import argparse
import importlib.util
import math
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from networks import CifarResNet
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from lightning_clamp import CalibrationResult, Clamp, fit_clamp
from lightning_clamp.clamping import Candidate
from lightning_clamp.metrics import expected_calibration_error

CIFAR10 = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CIFAR100 = {"mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)}
CASES = {
    "cifar10-resnet20": ("cifar10-test", CifarResNet(20, 10, "A"), "cifar10_resnet20_optA", CIFAR10, None),
    "cifar100-resnet32": ("cifar100-test", CifarResNet(32, 100, "B"), "cifar100_resnet32_optB", CIFAR100, None),
    "cifar10-resnet20-jpeg": ("cifar10-test", CifarResNet(20, 10, "A"), "cifar10_resnet20_optA", CIFAR10, 40),
}


def main() -> None:
    """Fit, measure and print every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with load.py and weights/")
    parser.add_argument("--case", choices=CASES, action="append", help="only this case; may be repeated")
    parser.add_argument("--jpeg", type=int, default=40, help="JPEG quality of the shifted copy (default 40)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {arguments.device}, {torch.get_num_threads()} threads")
    summary = [row for case in arguments.case or CASES for row in run(case, arguments, torch.device(arguments.device))]
    print("\nHeld-out NLL (change against temperature scaling in units of .001, ± one paired standard error) and ECE")
    print("| network and data | uncalibrated | temperature | plain Neural Clamping | default |")
    print("|---|---|---|---|---|")
    print("\n".join(summary))


def run(case: str, arguments: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """Both directions of one case, each a row of the summary."""
    folder = arguments.data
    name, network, weights, normalisation, quality = CASES[case]
    network.load_state_dict(load_file(folder / "weights" / f"{weights}.safetensors"))
    network.to(device).eval().to(memory_format=torch.channels_last)
    images, target = read(folder, name, normalisation, None if quality is None else arguments.jpeg)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    for direction, (fit, held) in enumerate((order.chunk(2), order.chunk(2)[::-1]), start=1):
        batches = list(zip(images[fit].split(250), target[fit].split(250), strict=True))
        started = time.perf_counter()
        result = fit_clamp(network, batches)
        seconds = time.perf_counter() - started
        print(f"\n## {case}, direction {direction}: {len(fit)} to fit, {len(held)} held out")
        cells = report(result, network, images[held].to(device), target[held].to(device))
        print(f"{result.passes} passes, {seconds:.0f} s. {result.reason}")
        yield f"| {case}, direction {direction} | {' | '.join(cells)} |"


def read(folder: Path, name: str, normalisation: dict, quality: int | None) -> tuple[Tensor, Tensor]:
    """Normalised images and labels, re-encoded as JPEG if asked."""
    load = _module(folder / "load.py")
    images = torch.from_numpy(load.images(name)).permute(0, 3, 1, 2).contiguous()
    if quality is not None:
        images = torch.stack([v2.functional.jpeg(image, quality) for image in images])
    scaled = v2.functional.normalize(v2.functional.to_dtype(images, torch.float32, scale=True), **normalisation)
    return scaled, torch.from_numpy(load.labels(name)).long()


def report(result: CalibrationResult, network: nn.Module, images: Tensor, target: Tensor) -> list[str]:
    """Print one row per candidate; return the summary: uncalibrated, temperature, plain choice, default choice."""
    fitted = [candidate for candidate in result.candidates if candidate.clamp is not None]
    alone = scores(fitted[0].clamp, network, images, target)
    uncalibrated = scores(Clamp(), network, images, target)
    plain = min((c for c in fitted if c.output == "temperature"), key=lambda c: c.criterion)
    print(f"uncalibrated: NLL {uncalibrated[0].mean():.4f}, ECE {uncalibrated[1]:.2%}")
    print("| candidate | p | score test p | AIC | ΔNLL held out | NLL | ECE | accuracy | passes | chosen |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    cells = {}
    for candidate in fitted:
        losses, error, accuracy = scores(candidate.clamp, network, images, target)
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


def scores(clamp: Clamp, network: nn.Module, images: Tensor, target: Tensor) -> tuple[Tensor, float, float]:
    """Held-out losses per image, ECE and accuracy with a clamp."""
    clamp = clamp.to(images.device)
    with torch.no_grad():
        logits = torch.cat([clamp.scale(network(clamp.perturb(part))) for part in images.split(500)]).double()
    error = expected_calibration_error(logits.softmax(1), target)
    return (
        F.cross_entropy(logits, target, reduction="none"),
        float(error),
        float((logits.argmax(1) == target).double().mean()),
    )


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
