"""What a fit costs on a GPU: a ResNet-50 of ImageNet's size, 10 to 1,000 classes, output maps alone, a slow loader.

Metrics and losses too, and at last the outcome of the tests that need a GPU. Nothing is read from files. Where an
estimate, from a tenth of the data, says that a fit does not fit into its time, the table has the estimate instead.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import losses
import metrics
import torch
from precision import InPrecision
from speed import slow_loader_report
from synthetic import Stream, overconfident, set_batch_statistics
from timing import FORWARD, GRADIENT, Counted, chosen, clocked, fitted, forward_pass, gradient_pass, summed, table
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50

from lightning_clamp import CalibrationResult

# How much too sure the network is.
_TEMPERATURE = 1.5
_FITS: dict[str, dict[str, Any]] = {
    '`method="temperature"`': {"method": "temperature"},
    '`output_maps=("temperature",)`': {"output_maps": ("temperature",)},
    "default": {},
}
_FORWARDS = "whole fit, in forwards"
# Seconds after which the tests are left.
_PATIENCE = 200


class Plan(NamedTuple):
    """Sizes.

    Attributes:
        images: Of the ResNet-50.
        side: Of an image.
        batch: Images in a batch.
        seconds: For all fits of the ResNet-50.
        classes: Of the ResNet-50.
        by_classes: Numbers of classes of a ResNet-18,
        small_images: its images,
        small_side: and their side.
        logits: Numbers of rows and classes of the logits that output maps are fitted to.
        cpu_seconds: For one fit of these on the CPU, which is run twice.
        loader_batches: Of the slow loader.
        metrics: Rows and classes of the batches that metrics are given.
        losses: Shapes of the logits that losses are given,
        compiled: and names of the losses that torch.compile is tried with, on all shapes but the first.
        loss_seconds: For each cell of their tables.
    """

    images: int
    side: int
    batch: int
    seconds: float
    classes: int
    by_classes: tuple[int, ...]
    small_images: int
    small_side: int
    logits: tuple[tuple[int, int], ...]
    cpu_seconds: float
    loader_batches: int
    metrics: tuple[tuple[int, int], ...]
    losses: tuple[tuple[int, ...], ...]
    compiled: tuple[str, ...]
    loss_seconds: float


FULL = Plan(
    images=25_000,
    side=224,
    batch=250,
    seconds=110,
    classes=1000,
    by_classes=(10, 100, 1000),
    small_images=5000,
    small_side=224,
    logits=((5000, 10), (5000, 100), (5000, 1000), (25_000, 1000)),
    cpu_seconds=15,
    loader_batches=50,
    metrics=metrics.DEVICE_SIZES,
    losses=losses.SHAPES,
    compiled=("ACLS", "MDCA"),
    loss_seconds=0.3,
)
SMALL = FULL._replace(images=2500, small_images=1000, small_side=32, loader_batches=20)
SMOKE = Plan(
    images=24,
    side=32,
    batch=12,
    seconds=60,
    classes=10,
    by_classes=(3,),
    small_images=24,
    small_side=32,
    logits=((200, 10),),
    cpu_seconds=5,
    loader_batches=1,
    metrics=((20, 10),),
    losses=((4, 5), (2, 3, 2, 2)),
    compiled=(),
    loss_seconds=0.01,
)


def report(device: str, plan: Plan, parts: list[str]) -> Iterator[str]:
    """Sections in Markdown, each as soon as it is measured.

    Args:
        device: Such as ``"cuda"``.
        plan: Sizes.
        parts: Keys of :data:`PARTS`.
    """
    for part in parts:
        yield from PARTS[part](device, plan)


# 1. ResNet-50


def _of_a_resnet(device: str, plan: Plan) -> Iterator[str]:
    network, stream = _overconfident_resnet(device, plan)
    head = (
        "precision | fit | forward, s | with backward, s | passes: forward + with backward | floor, s | fit, s | "
        f"{_FORWARDS} | fit / floor{' | peak, GB' if device == 'cuda' else ''} | chosen"
    )
    yield f"""## ResNet-50, {plan.images:,} images of {plan.side} × {plan.side}, {plan.classes:,} classes

Untrained weights, {_TEMPERATURE} times too sure; random images, made on the device in batches of {plan.batch}, and
shifted. `forward` is one pass without gradients, `with backward` one forward and one backward to the input alone: what
a tenth of the images, or one batch, takes, times so much. The floor is what the passes of the fit, counted at the
network, take on their own.

{table(head, _resnet_rows(network, stream, plan))}
"""


def _overconfident_resnet(device: str, plan: Plan) -> tuple[nn.Module, Stream]:
    network = _untrained(resnet50, plan.classes, (plan.batch, 3, plan.side, plan.side), device)
    labelling = InPrecision(network, torch.bfloat16, mixed=True)
    return network, _stream(network, labelling, plan.images, plan.side, plan.batch, device)


def _untrained(make: Callable[..., nn.Module], classes: int, shape: tuple[int, ...], device: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = make(num_classes=classes).to(device, memory_format=torch.channels_last)
    set_batch_statistics(network, torch.rand(shape, device=device) - 0.5)
    return network.requires_grad_(False)


def _stream(network: Any, labelling: nn.Module, images: int, side: int, batch: int, device: str) -> Stream:
    stream = Stream(labelling, images, (3, side, side), batch=batch, device=device)
    for parameter in network.fc.parameters():
        parameter.mul_(_TEMPERATURE)
    return stream


def _resnet_rows(network: nn.Module, stream: Stream, plan: Plan) -> Iterator[list[object]]:
    deadline = time.perf_counter() + plan.seconds
    few = list(islice(stream, max(1, plan.images // plan.batch // 10)))
    factor = plan.images / sum(len(images) for images, _ in few)
    # In float32 not the one between: all parts together are to take no more than some minutes.
    for name, dtype, fits in (("bf16-mixed", torch.bfloat16, list(_FITS)), ("32", torch.float32, list(_FITS)[::2])):
        cast = InPrecision(network, dtype, mixed=dtype != torch.float32)
        once = {}
        for kind, run in {FORWARD: forward_pass, GRADIENT: gradient_pass}.items():
            run(cast, few[:2])
            once[kind] = factor * clocked(lambda run=run, cast=cast: run(cast, few))[1]
        for fit in fits:
            options = _FITS[fit]
            try:
                estimate = factor * fitted(cast, few, **options)[1]
                left_out = ["", "", f"left out, about {estimate:.0f}"]
                late = time.perf_counter() + estimate > deadline
                cells = left_out if late else _fit(cast, stream, once, options)
            except RuntimeError as error:
                cells = ["", "", _failed(error)]
            yield [name, fit, *_seconds(once.values()), *cells]


def _fit(network: nn.Module, stream: Stream, once: dict[str, float], options: dict[str, Any]) -> list[object]:
    on_gpu = stream.device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    counted = Counted(network)
    result, seconds = fitted(counted, stream, **options)
    passes = counted.passes(stream.n)
    floor = sum(passes[kind] * once[kind] for kind in once)
    peak = [f"{torch.cuda.max_memory_allocated() / 1e9:.1f}"] if on_gpu else []
    return [
        f"{summed(passes)} (`result.passes`: {result.passes})",
        *_seconds([floor, seconds]),
        f"{seconds / once[FORWARD]:.1f}",
        f"{seconds / floor:.2f}",
        *peak,
        chosen(result),
    ]


def _failed(error: RuntimeError) -> str:
    """A row that fails, for want of memory or otherwise, leaves the others."""
    return f"failed: {str(error).splitlines()[0][:80]}"


def _seconds(values: Any) -> list[str]:
    return [f"{value:.2f}" for value in values]


# 2. From ten to a thousand classes


def _by_number_of_classes(device: str, plan: Plan) -> Iterator[str]:
    head = (
        "classes | forward, s | with backward, s | passes: forward + with backward | floor, s | fit, s | "
        f"{_FORWARDS} | fit / floor{' | peak, GB' if device == 'cuda' else ''} | chosen"
    )
    yield f"""## All candidates, by the number of classes

The default fit of a ResNet-18 like the ResNet-50 above, on {plan.small_images:,} images of {plan.small_side} ×
{plan.small_side}, float32.

{table(head, (_row_of_classes(classes, device, plan) for classes in plan.by_classes))}
"""


def _row_of_classes(classes: int, device: str, plan: Plan) -> list[object]:
    network = _untrained(resnet18, classes, (plan.batch, 3, plan.small_side, plan.small_side), device)
    stream = _stream(network, network, plan.small_images, plan.small_side, plan.batch, device)
    few = list(islice(stream, 2))
    once = {}
    for kind, run in {FORWARD: forward_pass, GRADIENT: gradient_pass}.items():
        run(network, few)
        once[kind] = clocked(lambda run=run: run(network, stream))[1]
    # What a process does for the first time, such as a factorisation on a GPU, is not this fit's.
    fitted(network, few)
    _twice(*overconfident(plan.small_images, classes), device)
    return [classes, *_seconds(once.values()), *_fit(network, stream, once, {})]


# 3. Output maps alone


def _of_output_maps(device: str, plan: Plan) -> Iterator[str]:
    head = "logits | CPU, s | device, s | CPU / device | NLL, the two differ by | chosen"
    yield f"""## Output maps on logits alone

`fit_clamp(nn.Identity(), batches)` with its defaults, on the CPU ({torch.get_num_threads()} threads) and on the
device, in batches of 1,000; labels are drawn from softmax(z), the logits are 2z. The second of two fits.

{table(head, _maps_rows(device, plan))}
"""


def _maps_rows(device: str, plan: Plan) -> Iterator[list[object]]:
    per_number = 0.0
    for n, classes in plan.logits:
        estimate = per_number * n * classes
        try:
            there, there_seconds = _twice(*overconfident(n, classes), device)
            cells = [f"left out, about {estimate:.0f}", *_seconds([there_seconds]), "", "", chosen(there)]
            if estimate < plan.cpu_seconds:
                here, seconds = _twice(*overconfident(n, classes), "cpu")
                per_number = seconds / n / classes
                differ = f"{abs(here.after['nll'] - there.after['nll']):.1e}"
                ratio = f"{seconds / there_seconds:.2f}"
                cells = [*_seconds([seconds, there_seconds]), ratio, differ, chosen(there)]
        except RuntimeError as error:
            cells = [_failed(error)]
        yield [f"{n:,} × {classes:,}", *cells]


def _twice(logits: Tensor, target: Tensor, device: str) -> tuple[CalibrationResult, float]:
    batches = list(zip(logits.to(device).split(1000), target.to(device).split(1000), strict=True))
    fitted(nn.Identity(), batches)
    return fitted(nn.Identity(), batches)


# 4. What other files measure


def _of_a_slow_loader(device: str, plan: Plan) -> Iterator[str]:
    yield slow_loader_report(device, batches=plan.loader_batches)


def _of_metrics(device: str, plan: Plan) -> Iterator[str]:
    return metrics.device_report(device, plan.metrics)


def _of_losses(device: str, plan: Plan) -> Iterator[str]:
    budget = plan.loss_seconds
    yield from losses.device_report(torch.device(device), shapes=plan.losses, compiled=(), budget=budget)
    # Compilation takes some seconds for each cell.
    some = {"shapes": plan.losses[1:], "eager": (), "compiled": plan.compiled}
    yield from losses.device_report(torch.device(device), **some, budget=budget)


# 5. The tests


def _of_tests(device: str, plan: Plan) -> Iterator[str]:
    yield outcome_of(Path(__file__).parents[2] / "tests" / "gpu")


def outcome_of(tests: Path) -> str:
    """What pytest says of a folder of tests at last: which have failed, and how many have not."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=no", "-n", "4", str(tests)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, cwd=tests.parents[1])
        said = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        said += [
            *done.stdout.splitlines()[-1:],
            *done.stderr.splitlines()[-5:],
            f"pytest's exit code: {done.returncode}",
        ]
    except subprocess.TimeoutExpired:
        said = [f"not done after {_PATIENCE} s"]
    return "\n".join([f"## {tests.name} tests", "", *said])


PARTS: dict[str, Callable[[str, Plan], Iterator[str]]] = {
    "resnet": _of_a_resnet,
    "classes": _by_number_of_classes,
    "maps": _of_output_maps,
    "loader": _of_a_slow_loader,
    "metrics": _of_metrics,
    "losses": _of_losses,
    "tests": _of_tests,
}
