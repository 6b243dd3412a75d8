"""What a fit costs: against the passes it is made of, the published method, other libraries, and the size of the data.

Times are wall-clock seconds, so a machine that does other things raises them. Loading data and importing libraries are
not counted.
"""

import copy
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar

import peers
import torch
from cases import Problem, load
from memory import held
from methods import OneBatch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet50

from lightning_clamp import CalibrationResult, Clamp, fit_clamp
from lightning_clamp._rows import as_rows
from lightning_clamp.clamping.temperature import fit_temperature

Result = TypeVar("Result")

# The kinds of pass that a fit is made of, as the tables call them.
_FORWARD, _GRADIENT = "forward", "with backward"
_SHAPE = (3, 16, 16)
_MATRIX = 8192


def report(data: Path, full: bool) -> Iterator[str]:
    """Sections in Markdown, each as soon as it is measured.

    Args:
        data: Folder with images and weights, see :mod:`cases`.
        full: All of it, for about half an hour on two CPU cores; else a smaller version, of four minutes at most.
    """
    yield _cost_of_a_fit(data, full)
    yield from _against_the_published_method(data, full)
    yield _temperature_alone(full)
    yield _cost_against_size(full)
    yield _memory_against_size(full)
    yield slow_loader_report("cuda" if torch.cuda.is_available() else "cpu")
    if torch.cuda.is_available():
        yield _on_an_accelerator(25_000 if full else 2_000)


def _table(head: str, rows: Iterable[Sequence[object]]) -> str:
    columns = [cell.strip() for cell in head.split("|")]
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def _clocked(run: Callable[[], Result]) -> tuple[Result, float]:
    started = time.perf_counter()
    result = run()
    return result, time.perf_counter() - started


def _fitted(
    network: Callable[[Tensor], Tensor], batches: Iterable[Sequence[Tensor]], **options: Any
) -> tuple[CalibrationResult, float]:
    """A fit and its seconds, the whole call's; without a word on networks that it leaves as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _clocked(lambda: fit_clamp(network, batches, **options))


# 1. A fit against the passes it makes


class _Counted(nn.Module):
    """A network that counts the images it is given, by whether their logits carry a gradient."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        images = {_FORWARD: 0, _GRADIENT: 0}
        # Not an attribute of the module, which a fit would put back.
        self.counts: Callable[[], dict[str, int]] = lambda: images

    @property
    def images(self) -> dict[str, int]:
        """Images by the kind of pass."""
        return self.counts()

    def forward(self, images: Tensor) -> Tensor:
        """The network's logits."""
        logits = self.network(images)
        self.images[_GRADIENT if logits.requires_grad else _FORWARD] += len(images)
        return logits

    def passes(self, n: int) -> dict[str, float]:
        """Passes over n images."""
        return {kind: images / n for kind, images in self.images.items()}


def _forward_pass(network: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for images, _ in batches:
            network(images)


def _gradient_pass(network: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    """Forward, and backward to the input alone; the network is frozen."""
    for images, target in batches:
        point = images.detach().requires_grad_()
        torch.autograd.grad(F.cross_entropy(network(point), target, reduction="sum"), point)


def _cost_of_a_fit(data: Path, full: bool) -> str:
    cases = ["cifar10-resnet20", "cifar10-resnet20 jpeg 40", *(["cifar100-resnet32"] if full else [])]
    n = 5000 if full else 1000
    head = (
        "case | images | forward, s | with backward, s | fit, s | floor, s | passes: forward + with backward | "
        "forward-equivalents (goal: ≤ 15) | fit / floor (goal: ≤ 1.1) | chosen"
    )
    return f"""## Cost of a fit

`forward` is one pass over the images without gradients, `with backward` one forward and one backward to the input alone
(weights frozen); then the default `fit_clamp`. The three take turns: medians of three, and of the ratios within a turn.
The passes of the fit are counted at the network. The first look at the data is forward only; the others go back to the
input, since logits of this size are kept and not computed again. The floor is what these passes take on their own; a
forward-equivalent is one forward.

{_table(head, (_cost_line(case, load(case, data).part(torch.arange(n))) for case in cases))}
"""


def _cost_line(case: str, problem: Problem) -> list[object]:
    frozen, batches = copy.deepcopy(problem.network).requires_grad_(False), problem.batches()
    for run in (_forward_pass, _gradient_pass):
        run(frozen, batches[:1])
    turns = []
    for _ in range(3):
        once = {
            _FORWARD: _clocked(lambda: _forward_pass(frozen, batches))[1],
            _GRADIENT: _clocked(lambda: _gradient_pass(frozen, batches))[1],
        }
        counted = _Counted(problem.network)
        result, seconds = _fitted(counted, batches)
        passes = counted.passes(len(problem.target))
        floor = sum(passes[kind] * once[kind] for kind in once)
        turns.append([*once.values(), seconds, floor, seconds / once[_FORWARD], seconds / floor])
    *times, equivalents, ratio = (median(values) for values in zip(*turns, strict=True))
    return [
        case,
        len(problem.target),
        *(f"{value:.2f}" for value in times),
        f"{_sum(passes)} (`result.passes`: {result.passes})",
        f"{equivalents:.1f}",
        f"{ratio:.3f}",
        _chosen(result),
    ]


def _sum(passes: dict[str, float]) -> str:
    return " + ".join(f"{number:.4g}" for number in passes.values())


def _chosen(result: CalibrationResult) -> str:
    return "nothing" if result.chosen is None else result.chosen.name


# 2. Our fit and the published one


class _Epoch(NamedTuple):
    """Where the published method is after an epoch: its number, seconds on its own clock, held-out NLL."""

    number: int
    seconds: float
    nll: float


def _against_the_published_method(data: Path, full: bool) -> Iterator[str]:
    epochs, n, n_held_out = (100, 1000, 5000) if full else (20, 500, 1000)
    scaled = "" if full else f"\nOnly {epochs} epochs were run here; the time of 100 is {100 / epochs:g} times theirs."
    yield f"""## Against the published method

{n} calibration images and {n_held_out} held-out ones of the other half. The published method as its official code runs
it: an image-sized perturbation and T, 100 epochs of SGD (batches of 250, learning rate .01, momentum .9) on the focal
loss with γ = 1 plus .01‖δ‖, and `loss.backward()` through weights that are not frozen. Its held-out NLL is taken after
every epoch, outside of its clock: who calibrates cannot see it, so its best is more than the method delivers. No image
is augmented. Our fits are run before and after it: mean seconds.{scaled}
"""
    for case in ("cifar10-resnet20", "cifar10-resnet20 jpeg 40"):
        whole = load(case, data)
        half = len(whole.target) // 2
        duel = _duel(whole.part(torch.arange(n)), whole.part(torch.arange(half, half + n_held_out)), epochs)
        yield f"### {case}\n\n{duel}\n"


def _duel(problem: Problem, held_out: Problem, epochs: int) -> str:
    """The table of one case, and what it comes to in words."""
    fits = {'`method="temperature"`': {"method": "temperature"}, "default fit": {}}
    before = [_fitted(problem.network, problem.batches(), **options) for options in fits.values()]
    run = list(_published(problem, held_out, epochs))
    after = [_fitted(problem.network, problem.batches(), **options)[1] for options in fits.values()]
    rows = [["uncalibrated", "", "", f"{_nll(problem.network, held_out):.4f}"]]
    ours: list[tuple[str, float, float]] = []
    for name, (result, once), again in zip(fits, before, after, strict=True):
        ours.append((name, (once + again) / 2, _nll(partial(_clamped, problem.network, result.clamp), held_out)))
        chosen = f" ({_chosen(result)})" if result.chosen else ""
        rows.append([f"{name}{chosen}", f"{ours[-1][1]:.2f}", "", f"{ours[-1][2]:.4f}"])
    best, last = min(run, key=lambda epoch: epoch.nll), run[-1]
    hundred = last.seconds * 100 / epochs
    reached = f"{best.nll:.4f} (epoch {best.number}, {best.seconds:.1f} s)"
    rows.append([f"published, {epochs} epochs", f"{last.seconds:.1f}", reached, f"{last.nll:.4f}"])
    table = _table("method | seconds | best held-out NLL on the way | held-out NLL at the end", rows)
    ratio = hundred / ours[-1][1]
    return f"{table}\n\n100 epochs, {hundred:.0f} s: {ratio:.1f} times the default fit. {_time_to_equal(best, ours)}"


def _time_to_equal(best: _Epoch, ours: list[tuple[str, float, float]]) -> str:
    for name, seconds, nll in ours:
        if nll <= best.nll:
            ratio = f"{best.seconds:.1f} s / {seconds:.2f} s = {best.seconds / seconds:.1f}"
            return f"To equal its best held-out NLL took us {seconds:.2f} s ({name}): {ratio}."
    return "Its best held-out NLL was not equalled."


def _clamped(network: nn.Module, clamp: Clamp, inputs: Tensor) -> Tensor:
    return clamp.scale(network(clamp.perturb(inputs)))


def _nll(network: Callable[[Tensor], Tensor], held_out: Problem) -> float:
    with torch.no_grad():
        losses = [F.cross_entropy(network(x).double(), y, reduction="sum") for x, y in held_out.batches()]
    return float(sum(losses)) / len(held_out.target)


def _published(problem: Problem, held_out: Problem, epochs: int) -> Iterator[_Epoch]:
    """The steps of ``train_NC`` in https://github.com/yungchentang/NCToolkit with the options of its demo."""
    # A copy, since the official code leaves gradients on the weights: its optimiser clears only its own.
    network = copy.deepcopy(problem.network).requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    perturbation = (0.001 * torch.randn(problem.inputs.shape[1:], generator=generator)).requires_grad_()
    temperature = torch.ones(()).requires_grad_()
    optimizer = torch.optim.SGD([perturbation, temperature], lr=0.01, momentum=0.9)
    batches = problem._replace(batch_size=250).batches()
    seconds = 0.0
    for epoch in range(1, epochs + 1):
        started = time.perf_counter()
        for inputs, target in batches:
            optimizer.zero_grad()
            probs = (network(inputs + perturbation) / temperature).softmax(1)
            likelihood = probs.gather(1, target[:, None]).clamp(1e-7, 1 - 1e-7)
            focal = -((1 - likelihood) * likelihood.log()).mean()
            (focal + 0.01 * torch.linalg.vector_norm(perturbation)).backward()
            optimizer.step()
        seconds += time.perf_counter() - started
        point, divisor = perturbation.detach(), temperature.detach()
        yield _Epoch(epoch, seconds, _nll(partial(_moved, network, point, divisor), held_out))


def _moved(network: nn.Module, perturbation: Tensor, temperature: Tensor, inputs: Tensor) -> Tensor:
    return network(inputs + perturbation) / temperature


# 3. The temperature alone, ours and others'


def _whole_fit(logits: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
    """The public call, with its checks, metrics and bootstrap."""
    batches = list(zip(logits.split(1000), target.split(1000), strict=True))
    clamp = _fitted(nn.Identity(), batches, method="temperature")[0].clamp
    return lambda other: clamp.scale(other.double())


def _solver_alone(logits: Tensor, target: Tensor) -> Callable[[Tensor], Tensor]:
    """Newton's steps in log T and nothing else, from float32 logits."""
    parts = zip(logits.split(1000), target.split(1000), strict=True)
    fit = fit_temperature(OneBatch(as_rows(part.double(), labels) for part, labels in parts))
    temperature = torch.tensor(fit.log_temperature, dtype=torch.float64).exp()
    return lambda other: other.double() / temperature


def _temperature_alone(full: bool) -> str:
    n, classes = (25_000, 1000) if full else (5_000, 100)
    logits, target = _overconfident(n, classes)
    wanted = ("temperature", "bisection", "LBFGS")
    fits: dict[str, peers.Fit] = {"ours: temperature solver": _solver_alone, "ours: whole `fit_clamp`": _whole_fit}
    fits |= {name: fit for name, fit in peers.installed().items() if any(word in name for word in wanted)}
    best, calibrated = _best_of_three(fits, logits, target)
    rows = [["none", "", "1", f"{float(F.cross_entropy(logits.double(), target)):.5f}"]]
    rows += [[name, f"{best[name]:.3f}", *_figures(calibrated[name], logits, target)] for name in fits]
    return f"""## Temperature alone, {n:,} × {classes} logits

Labels are drawn from softmax(z), the logits are 2z: the best T is about 2. Seconds are the best of three, in turns with
the others, or of one beyond 10 s; a small fit before is not counted. T is the median ratio of centred logits, before to
after.

{_table("method | seconds | T | NLL", rows)}
"""


def _best_of_three(
    fits: dict[str, peers.Fit], logits: Tensor, target: Tensor
) -> tuple[dict[str, float], dict[str, Callable[[Tensor], Tensor]]]:
    """Seconds of every fit, and what it made."""
    best: dict[str, float] = {}
    calibrated: dict[str, Callable[[Tensor], Tensor]] = {}
    for turn in range(3):
        for name, fit in fits.items():
            if turn == 0:
                fit(*_overconfident(200, 10))
            elif best[name] > 10:
                continue
            calibrated[name], seconds = _clocked(partial(fit, logits, target))
            best[name] = min(best.get(name, math.inf), seconds)
    return best, calibrated


def _figures(calibrate: Callable[[Tensor], Tensor], logits: Tensor, target: Tensor) -> list[str]:
    """T and NLL."""
    ratios = _centred(logits[:100].double()) / _centred(calibrate(logits[:100]))
    parts = zip(logits.split(1000), target.split(1000), strict=True)
    nll = sum(float(F.cross_entropy(calibrate(part), labels, reduction="sum")) for part, labels in parts)
    return [f"{float(ratios.median()):.5f}", f"{nll / len(target):.5f}"]


def _overconfident(n: int, classes: int) -> tuple[Tensor, Tensor]:
    """Logits of twice the size at which they would be calibrated, and labels."""
    generator = torch.Generator().manual_seed(0)
    truth = 3 * torch.randn(n, classes, generator=generator)
    return 2 * truth, _drawn(truth, generator)


def _centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(1, keepdim=True)


def _drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Labels drawn from the softmax of logits."""
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device).clamp(1e-7, 1 - 1e-7)
    return (logits - (-uniform.log()).log()).argmax(1)


# 4. Against the size of the data


class _Stream:
    """Random images made anew in every pass, of which only the labels are kept.

    The labels are drawn from the network's outputs, and the images are shifted after: a perturbation mends it.
    """

    def __init__(
        self, network: nn.Module, n: int, shape: tuple[int, ...], *, batch: int = 250, device: str = "cpu"
    ) -> None:
        self.n, self.shape, self.batch, self.device = n, shape, batch, device
        generator = torch.Generator(device).manual_seed(1)
        with torch.no_grad():
            _standardise(network, next(self._images()))
            self.target = torch.cat([_drawn(network(images), generator) for images in self._images()])

    def _images(self) -> Iterator[Tensor]:
        generator = torch.Generator(self.device).manual_seed(0)
        for start in range(0, self.n, self.batch):
            shape = (min(self.batch, self.n - start), *self.shape)
            yield torch.rand(shape, generator=generator, device=self.device) - 0.5

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, target in zip(self._images(), self.target.split(self.batch), strict=True):
            yield images - 0.03, target


def _standardise(network: nn.Module, images: Tensor) -> None:
    """Give the outputs of untrained weights the spread of logits: mean 0 and standard deviation 2 in every class."""
    logits = network(images)
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    factor = 2 / logits.std(0)
    last.bias.copy_(factor * (last.bias - logits.mean(0)))
    last.weight.mul_(factor[:, None])


def _small_network(classes: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        convolutions = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()]
        return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, classes)).eval()


def _cost_against_size(full: bool) -> str:
    base = {"images": 8000 if full else 2000, "side": 16, "classes": 10, "r": 2}
    lines = [(name, factor * value) for name, value in base.items() for factor in (1, 2, 4)]
    best: dict[tuple[int, ...], float] = {}
    # In turns, so that a busy moment does not fall on one line alone; the base is one line of every size.
    for _ in range(3):
        for sizes in {tuple((base | {name: size}).values()) for name, size in lines}:
            best[sizes] = min(best.get(sizes, math.inf), _seconds_per_pass(*sizes))
    seconds = {line: best[tuple((base | dict([line])).values())] for line in lines}
    rows = []
    for name, size in lines:
        ratio = "" if size == base[name] else f"{seconds[name, size] / seconds[name, size // 2]:.2f}"
        rows.append([name, f"{size:,}", f"{seconds[name, size]:.4f}", ratio])
    fixed = ", ".join(f"{name} {value:,}" for name, value in base.items())
    return f"""## Cost against size

Two convolutions on random images in memory; `grids=(r,), output_maps=("temperature",), max_passes=3`. One size at a
time is doubled, from {fixed}. Seconds of the whole fit by its passes, the best of three, on one
thread.

{_table("what | size | seconds per pass | times the line above", rows)}
"""


@contextmanager
def _one_thread() -> Iterator[None]:
    """For batches this small: several threads would wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def _seconds_per_pass(images: int, side: int, classes: int, r: int) -> float:
    network = _small_network(classes)
    batches = list(_Stream(network, images, (3, side, side)))
    result, seconds = _fitted(network, batches, grids=(r,), output_maps=("temperature",), max_passes=3)
    return seconds / result.passes


def _memory_against_size(full: bool) -> str:
    sizes = (8000, 32_000, 128_000) if full else (2000, 8000, 32_000)
    rows = []
    for n in sizes:
        command = [sys.executable, "-c", f"import speed; print(speed._peak_memory({n}))"]
        # Large blocks are given back when freed, or the peak would be that of an allocator that keeps them.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
        done = subprocess.run(
            command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, check=True
        )
        images = n * 4 * torch.Size(_SHAPE).numel() / 1e6
        rows.append([f"{n:,}", f"{images:.0f}", f"{float(done.stdout.split()[-1]):.0f}"])
    return f"""## Memory against size

The same network and fit with `cache_bytes=2**20`, images made on the fly; a process for every line. The peak is
above what the process held with the network alone, and has the labels and one batch of images in it (Linux).

{_table("images | MB, were they kept | peak, MB", rows)}
"""


@_one_thread()
def _peak_memory(n: int) -> float:
    """MB that a fit needs at most; nan where there is no /proc.

    Not getrusage: its ru_maxrss starts, in a child, at what the parent held.
    """
    network = _small_network(10)
    before = held("VmRSS")
    stream = _Stream(network, n, _SHAPE)
    _fitted(network, stream, grids=(2,), output_maps=("temperature",), max_passes=3, cache_bytes=2**20)
    return held("VmHWM") - before


# 5. A loader that takes its time


class _Slow:
    """Batches that take their time each, as decoding images does; counts how often they are read."""

    def __init__(self, batches: list[Sequence[Tensor]], seconds: float) -> None:
        self.batches = batches
        self.seconds = seconds
        self.reads = 0

    def __iter__(self) -> Iterator[Sequence[Tensor]]:
        self.reads += 1
        for batch in self.batches:
            time.sleep(self.seconds)
            yield batch


def slow_loader_report(device: str, *, batches: int = 20, seconds: float = 0.02) -> str:
    """A fit with the batches kept in memory, and with every pass reading them again.

    Args:
        device: Of the network; the loader's batches are on the CPU.
        batches: How many, of 100 images each.
        seconds: That the loader takes over each.
    """
    network = _small_network(10)
    stream = _Stream(network, 100 * batches, (3, 32, 32), batch=100)
    network.to(device)
    # The first calls choose kernels.
    _fitted(network, list(islice(stream, 2)), grids=(1,), output_maps=("temperature",))
    rows = []
    for name, cache_bytes in (("kept in memory (default)", None), ("read in every pass (`cache_bytes=2**20`)", 2**20)):
        loader = _Slow(list(stream), seconds)
        result, took = _fitted(network, loader, cache_bytes=cache_bytes)
        rows.append(
            [name, loader.reads, result.passes, f"{took:.2f}", f"{took - loader.reads * batches * seconds:.2f}"]
        )
    head = "batches | reads of the loader | passes | fit, s | without the loader's time, s"
    return f"""## A slow loader, on {device}

{batches} batches of 100 images of 3 × 32 × 32; the loader takes {1000 * seconds:.0f} ms over each. Two convolutions,
the default fit.

{_table(head, rows)}
"""


# 6. Where there is an accelerator


def _on_an_accelerator(n: int, side: int = 224, batch: int = 250, device: str = "cuda") -> str:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = resnet50().to(device, memory_format=torch.channels_last)
    _set_batch_statistics(network, torch.rand(batch, 3, side, side, device=device) - 0.5)
    stream = _Stream(network, n, (3, side, side), batch=batch, device=device)
    # The first calls choose kernels.
    _fitted(network, list(islice(stream, 2)), grids=(1,), output_maps=("temperature",))
    counted = _Counted(network)
    result, seconds = _fitted(counted, stream)
    forwards = counted.images[_FORWARD] + 2 * counted.images[_GRADIENT]
    achieved, peak = forwards * 2 * 4.1e9 / seconds, _matmul_flops(device)
    speeds = [f"{flops / 1e12:.1f}" for flops in (achieved, peak)]
    row = [f"{n:,}", _sum(counted.passes(n)), f"{seconds:.1f}", *speeds, f"{achieved / peak:.0%}", _chosen(result)]
    head = "images | passes: forward + with backward | seconds | TFLOP/s | TFLOP/s of a matmul | share | chosen"
    return f"""## ResNet-50 at {side} × {side} on {torch.cuda.get_device_name(device)}

Untrained weights, random images made on the device in batches of {batch}, the default fit. 4.1 GMAC an image for a
forward and as much again for a backward to the input. The matmul has sides of {_MATRIX:,} and may use TF32, as
convolutions do by default.

{_table(head, [row])}
"""


def _set_batch_statistics(network: nn.Module, images: Tensor) -> None:
    """Those of one batch, without which untrained weights give outputs of any size; then eval mode."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        network.train()(images)
    network.eval()


def _matmul_flops(device: str, repeats: int = 20) -> float:
    """FLOP/s of a large matrix product in float32, with TF32 allowed."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        left, right = (torch.randn(_MATRIX, _MATRIX, device=device) for _ in range(2))
        float((left @ right)[0, 0])
        # Reading a number waits for the device.
        _, seconds = _clocked(lambda: [left @ right for _ in range(repeats)][-1][0, 0].item())
    finally:
        torch.set_float32_matmul_precision(before)
    return repeats * 2 * _MATRIX**3 / seconds
