"""Calibration metrics side by side: time, peak memory and value, ours and those of other libraries.

    python examples/benchmarks/metrics.py                     # all cases, about ten minutes
    python examples/benchmarks/metrics.py --case rows --scale 0.1
    python examples/benchmarks/metrics.py --device cuda       # only the time of an update on an accelerator

Other libraries take part when they are installed (pip install -e . --group peers) and are named as missing when not.
Logits are twice those that the labels were drawn from, so that every network is over-confident alike. Batches are made
before the clock starts; seconds are those of all updates and the computation, the best of three runs (of one, if it
takes more than 20 s). Memory is the peak above what the batches and the imports occupy (Linux), measured in a process
of its own for every line. State is what the metric holds after the last update, which is what ranks exchange.
"""

import argparse
import importlib.util
import json
import logging
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from memory import held
from torch import Tensor

Batches = list[tuple[Tensor, Tensor]]


class Case(NamedTuple):
    """How many rows or images, of how many classes, and how many to a batch."""

    title: str
    n: int
    classes: int
    batch: int
    size: tuple[int, ...] = ()

    def batches(self, scale: float) -> Batches:
        """Batches of logits and labels; those of the dense case repeat, to fit in memory."""
        n, batch = max(1, round(self.n * scale)), min(self.batch, max(1, round(self.n * scale)))
        generator = torch.Generator().manual_seed(0)
        made: Batches = []
        for start in range(0, n, batch):
            if self.size and len(made) == 2:
                return [made[i % 2] for i in range(-(-n // batch))]
            shape = (min(batch, n - start), self.classes, *self.size)
            logits = 2 * torch.randn(shape, generator=generator)
            noise = -torch.log(-torch.log(torch.rand(shape, generator=generator).clamp(1e-7, 1 - 1e-7)))
            made.append((2 * logits, (logits + noise).argmax(1)))
        return made


CASES = {
    "classes": Case("50k x 1000", 50_000, 1000, 1000),
    "rows": Case("1M x 100", 1_000_000, 100, 1000),
    "dense": Case("100 x 21 x 512 x 512", 100, 21, 4, (512, 512)),
    "classwise": Case("25k x 1000", 25_000, 1000, 1000),
}


class Gathered:
    """A function of all probabilities at once, made to look like a metric."""

    def __init__(self, compute: Callable[[Tensor, Tensor], float]) -> None:
        self.function = compute
        self.probs: list[Tensor] = []
        self.target: list[Tensor] = []

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Keep the probabilities as rows."""
        self.probs.append(_rows(preds.softmax(1)))
        self.target.append(target.flatten())

    def compute(self) -> float:
        """The value of what was kept."""
        return self.function(torch.cat(self.probs), torch.cat(self.target))


class ProbabilityRows:
    """A metric that takes rows of probabilities."""

    def __init__(self, metric: Any) -> None:
        self.metric = metric

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Give it what it takes."""
        self.metric.update(_rows(preds.softmax(1)), target.flatten())

    def compute(self) -> Any:
        """Its value."""
        return self.metric.compute()


def _rows(dense: Tensor) -> Tensor:
    return dense.movedim(1, -1).flatten(0, -2)


def ours(name: str, classes: int) -> Any:
    """One of this library's metrics, or a collection of all that share the histogram."""
    from torchmetrics import MetricCollection

    from lightning_clamp import metrics

    if name == "ClasswiseCalibrationError":
        return metrics.ClasswiseCalibrationError(classes)
    if name != "all of them":
        return getattr(metrics, name)()
    names = [
        "ExpectedCalibrationError",
        "MaximumCalibrationError",
        "RootMeanSquareCalibrationError",
        "OverconfidenceError",
        "AdaptiveCalibrationError",
        "SmoothCalibrationError",
        "ReliabilityDiagram",
    ]
    return MetricCollection({name: getattr(metrics, name)() for name in names})


def of_torchmetrics(name: str, classes: int) -> Any:
    """Its only calibration error."""
    from torchmetrics.classification import MulticlassCalibrationError

    return MulticlassCalibrationError(classes, n_bins=15)


def of_torch_uncertainty(name: str, classes: int) -> Any:
    """Its metric of this name, with its own defaults but 15 bins."""
    from torch_uncertainty import metrics

    if name == "CalibrationError":
        return metrics.CalibrationError("multiclass", num_bins=15, num_classes=classes)
    if name == "AdaptiveCalibrationError":
        return ProbabilityRows(metrics.AdaptiveCalibrationError("multiclass", num_bins=15, num_classes=classes))
    if name == "ClasswiseCalibrationError":
        return ProbabilityRows(metrics.ClasswiseCalibrationError(classes))
    return ProbabilityRows(metrics.SmoothCalibrationError(kernel_type="reflected"))


def of_netcal(name: str, classes: int) -> Any:
    """Its ECE over bins of equal width or mass, on all probabilities."""
    from netcal.metrics import ECE

    error = ECE(15, equal_intervals=name == "equal width")
    return Gathered(lambda probs, target: error.measure(probs.numpy(), target.numpy()))


def of_relplot(name: str, classes: int) -> Any:
    """Its smECE of the top label."""
    import relplot

    def compute(probs: Tensor, target: Tensor) -> float:
        top, predicted = probs.max(1)
        return float(relplot.smECE(top.double().numpy(), (predicted == target).double().numpy()))

    return Gathered(compute)


LIBRARIES: dict[str, tuple[str, Callable[[str, int], Any]]] = {
    "lightning_clamp": ("lightning_clamp", ours),
    "torchmetrics": ("torchmetrics", of_torchmetrics),
    "torch-uncertainty": ("torch_uncertainty", of_torch_uncertainty),
    "netcal": ("netcal", of_netcal),
    "relplot": ("relplot", of_relplot),
}

# Per metric: the libraries that have it, and its name there.
CONTESTS: dict[str, dict[str, str]] = {
    "expected": {
        "lightning_clamp": "ExpectedCalibrationError",
        "torchmetrics": "l1",
        "torch-uncertainty": "CalibrationError",
        "netcal": "equal width",
    },
    "adaptive": {
        "lightning_clamp": "AdaptiveCalibrationError",
        "torch-uncertainty": "AdaptiveCalibrationError",
        "netcal": "equal mass",
    },
    "smooth": {
        "lightning_clamp": "SmoothCalibrationError",
        "torch-uncertainty": "SmoothCalibrationError",
        "relplot": "smECE",
    },
    "seven in one collection": {"lightning_clamp": "all of them"},
    "class-wise": {
        "lightning_clamp": "ClasswiseCalibrationError",
        "torch-uncertainty": "ClasswiseCalibrationError",
    },
}


def contests(case: str) -> Iterator[tuple[str, str]]:
    """Metric and library of every line of a case."""
    for metric, libraries in CONTESTS.items():
        if (metric == "class-wise") == (case == "classwise"):
            for library in libraries:
                yield metric, library


def measure(case: str, metric: str, library: str, scale: float, repeats: int) -> dict[str, float]:
    """Seconds, peak memory in MB, size of the state in KB and value of one line."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    build = LIBRARIES[library][1]
    name = CONTESTS[metric][library]
    what = CASES[case]
    batches = what.batches(scale)
    warm = build(name, what.classes)
    warm.update(*batches[0])
    warm.compute()
    seconds, peak, state, value = [], float("nan"), 0.0, 0.0
    for _ in range(repeats):
        instance = build(name, what.classes)
        before = _reset_peak()
        started = time.perf_counter()
        for preds, target in batches:
            instance.update(preds, target)
        result = instance.compute()
        seconds.append(time.perf_counter() - started)
        peak = held("VmHWM") - before
        state = _state_bytes(instance) / 1e3
        value = float("nan") if isinstance(result, dict) else float(result)
        if seconds[0] > 20:
            break
    return {"seconds": min(seconds), "peak": peak, "state": state, "value": value}


def _state_bytes(instance: Any) -> int:
    """Tensors a metric holds; of a collection, each state once."""
    if isinstance(instance, Gathered):
        held = instance.probs + instance.target
    elif isinstance(instance, ProbabilityRows):
        return _state_bytes(instance.metric)
    else:
        groups = getattr(instance, "compute_groups", None)
        leaders = [instance[members[0]] for members in groups.values()] if groups else [instance]
        states = [state for leader in leaders for state in leader.metric_state.values()]
        held = [part for state in states for part in (state if isinstance(state, list) else [state])]
    return sum(part.nbytes for part in held)


def _reset_peak() -> float:
    """Start a new peak, and give what is held now, in MB; nan where there is no /proc."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return float("nan")
    return held("VmRSS")


# Rows and classes of one batch, as of a classifier, of a large batch of it, and of pixels.
DEVICE_SIZES = ((256, 1000), (4096, 1000), (100_000, 100))
# What is timed, beside torchmetrics' calibration error, whose checks of float predictions look at shapes alone.
DEVICE_METRICS = (
    "ExpectedCalibrationError",
    "ReliabilityDiagram",
    "ClasswiseCalibrationError",
    "NegativeLogLikelihood",
)


def device_report(device: str = "cuda", sizes: Sequence[tuple[int, int]] = DEVICE_SIZES) -> Iterator[str]:
    """Microseconds per update on a device, in Markdown, line by line."""
    yield "| batch | metric | lightning_clamp | torchmetrics | ratio | ours, no checks | theirs, no checks | ratio |"
    yield "|---|---|---|---|---|---|---|---|"
    for n, classes in sizes:
        generator = torch.Generator().manual_seed(0)
        batch = (2 * torch.randn(n, classes, generator=generator)).to(device)
        labels = torch.randint(classes, (n,), generator=generator).to(device)
        for name in DEVICE_METRICS:
            pairs = [pair(name, classes, device, validate_args=checked) for checked in (True, False)]
            times = in_turns([*pairs[0], *pairs[1]], batch, labels)
            cells = (f"{ours:.0f} | {theirs:.0f} | {ours / theirs:.2f}" for ours, theirs in (times[:2], times[2:]))
            yield f"| {n:,} x {classes:,} | {name} | {' | '.join(cells)} |"


def pair(name: str, classes: int, device: str, *, validate_args: bool) -> list[Any]:
    """One of this library's metrics on a device, and torchmetrics' calibration error."""
    from torchmetrics.classification import MulticlassCalibrationError

    from lightning_clamp import metrics

    first = (classes,) if name == "ClasswiseCalibrationError" else ()
    ours = getattr(metrics, name)(*first, validate_args=validate_args)
    theirs = MulticlassCalibrationError(classes, n_bins=15, validate_args=validate_args)
    return [ours.to(device), theirs.to(device)]


def in_turns(members: list[Any], preds: Tensor, target: Tensor, rounds: int = 5, updates: int = 50) -> list[float]:
    """Microseconds per update of each, the best of several rounds in which all take part in turn."""
    best = [float("inf")] * len(members)
    for metric in members:
        metric.update(preds, target)
    for _ in range(rounds):
        for index, metric in enumerate(members):
            metric.reset()
            wait(preds)
            started = time.perf_counter()
            for _ in range(updates):
                metric.update(preds, target)
            wait(preds)
            best[index] = min(best[index], (time.perf_counter() - started) / updates * 1e6)
    return best


def wait(tensor: Tensor) -> None:
    """Until what was asked of the tensor's device is done."""
    if tensor.device.type != "cpu":
        torch.accelerator.synchronize(tensor.device)


def main() -> None:
    """Print the table, one process per line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, action="append", help="only this case; may be repeated")
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the rows or images (default 1)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--line", nargs=3, metavar=("CASE", "METRIC", "LIBRARY"), help=argparse.SUPPRESS)
    parser.add_argument("--device", help="the time of an update there, such as cuda, instead of all else")
    options = parser.parse_args()
    if options.device:
        print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, {options.device}\n")
        sizes = [(max(1, round(n * options.scale)), classes) for n, classes in DEVICE_SIZES]
        for row in device_report(options.device, sizes):
            print(row, flush=True)
        return
    if options.line:
        print(json.dumps(measure(*options.line, options.scale, options.repeats)))
        return
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, {torch.get_num_threads()} threads, CPU\n")
    print("| data | metric | library | seconds | peak MB | state KB | value |")
    print("|---|---|---|---|---|---|---|")
    for case in options.case or CASES:
        for metric, library in contests(case):
            cells = line(case, metric, library, options)
            print(f"| {CASES[case].title} | {metric} | {library} | {cells} |", flush=True)


def line(case: str, metric: str, library: str, options: argparse.Namespace) -> str:
    """The cells of one line, or a word on why there are none."""
    if importlib.util.find_spec(LIBRARIES[library][0]) is None:
        return "not installed (pip install -e . --group peers) | | |"
    command = [sys.executable, __file__, "--scale", str(options.scale), "--repeats", str(options.repeats)]
    done = subprocess.run([*command, "--line", case, metric, library], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"])[-1]
        return f"failed: {reason[:80]} | | |"
    found = json.loads(done.stdout.splitlines()[-1])
    value = "" if found["value"] != found["value"] else f"{found['value']:.6f}"
    return f"{found['seconds']:.3f} | {found['peak']:.0f} | {found['state']:,.0f} | {value}"


if __name__ == "__main__":
    main()
