"""Every example runs, prints what it says, and explains itself."""

import logging
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import lightning_clamp

ROOT = Path(lightning_clamp.__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture
def ran(monkeypatch, capsys):
    """Runs a script in this process, where torch and Lightning are imported already, and returns what it printed."""

    def run(script, *options):
        path = ROOT / "examples" / script
        monkeypatch.syspath_prepend(path if path.is_dir() else path.parent)
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, options)])
        capsys.readouterr()
        logger = logging.getLogger("lightning.pytorch")
        before, level = set(sys.modules), logger.level
        try:
            runpy.run_path(str(path), run_name="__main__")
        finally:
            logger.setLevel(level)
            # Scripts call their neighbours by short names, such as "cases".
            for name in set(sys.modules) - before:
                if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "examples")):
                    del sys.modules[name]
        return capsys.readouterr().out

    return run


def test_the_quickstart_runs_and_writes_what_it_says(ran, tmp_path):
    assert "held-out test" in ran("quickstart.py", "--epochs", "3", "--out", tmp_path)
    assert (tmp_path / "reliability.png").stat().st_size > 10_000
    assert list((tmp_path / "checkpoints").glob("*-calibrated.ckpt"))
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_each_of_several_labels_is_calibrated(ran, tmp_path):
    printed = ran("multilabel.py", "--epochs", "5", "--out", tmp_path)
    assert "above: means over 8 labels" in printed
    for label in ("even", "straight lines only", "mean"):
        assert re.search(rf"^{label} +(0\.\d+ +){{3}} *(\d+\.\d+% *){{3}}$", printed, re.MULTILINE)
    assert (tmp_path / "ece.png").stat().st_size > 10_000


def test_a_text_model_is_calibrated(ran, tmp_path):
    printed = ran("text.py", "--epochs", "1", "--modules", "pickle", "ssl", "--out", tmp_path)
    assert "outputs alone" in printed
    assert "clamp: " in printed
    assert (tmp_path / "text.png").stat().st_size > 10_000


def test_several_processes_fit_the_clamp_of_one(ran, tmp_path):
    printed = ran("ddp.py", "--strategy", "ddp_fork", "--epochs", "1", "--out", tmp_path)
    assert "801 samples of 801 were read by 2 processes" in printed
    assert float(re.search(r"largest difference of their logits: (\S+),", printed)[1]) < 1e-4
    assert (tmp_path / "reliability.png").stat().st_size > 10_000


def test_the_epoch_is_chosen_in_three_ways(ran):
    printed = ran("choose_epoch.py", "--seeds", "1", "--epochs", "3", "--noise", "labels")
    assert "noise in labels, 400 validation images, 1 seeds" in printed
    assert all(f"| `val/{name}` |" in printed for name in ("nll", "accuracy", "refined_nll"))


def test_other_class_frequencies_are_found_without_labels(ran):
    printed = ran("label_shift.py", "--seeds", "1", "--draws", "2", "--epochs", "5")
    assert "| NLL before | change |" in printed


def test_losses_are_compared(ran, tmp_path):
    printed = ran("compare_losses.py", "--seeds", "1", "--losses", "ce", "acls", "--epochs", "2", "--out", tmp_path)
    assert printed.count("then clamped") == 2
    assert "adaptive ECE" in (tmp_path / "comparison.md").read_text()
    assert (tmp_path / "comparison.png").stat().st_size > 10_000


@pytest.mark.filterwarnings("ignore:The outputs say next to nothing")
def test_losses_are_compared_with_the_paper_for_a_given_time(ran, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"x_{part}": rng.integers(256, size=(110, 32, 32, 3), dtype=np.uint8) for part in ("train", "test")}
    np.savez(tmp_path / "cifar.npz", **arrays, y_train=np.arange(110) % 10, y_test=np.arange(110) % 10)
    options = ("--data", tmp_path / "cifar.npz", "--steps", "2", "--minutes", "0", "--out", tmp_path)
    printed = ran("compare_losses.py", "--dataset", "cifar10", "--losses", "ce", "rob", *options)
    assert "0 minutes are over: CalMO, Rob. of seed 0 and what follows is left out" in printed
    assert printed.count("then clamped") == 1
    assert "75.2 ± 1.2, .081 ± .021 |" in (tmp_path / "comparison.md").read_text()


def test_segmentation_is_compared(ran, tmp_path):
    options = ("--epochs", "1", "--size", "16", "--losses", "bce", "aslp", "--out", tmp_path)
    assert ran("segmentation.py", *options).count("+ clamp") == 2
    for picture in ("confidence", "reliability"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 10_000


LOG_PROBABILITIES = """
import numpy as np

def logprobs():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(1500, 20)).astype("float32") * 2
    labels = (truth + rng.gumbel(size=truth.shape)).argmax(1)
    logits = 2 * truth
    return logits - np.log(np.exp(logits).sum(1, keepdims=True)), labels
"""


def test_the_benchmarks_print_their_tables(ran, tmp_path):
    """On made-up outputs, and with those peers that are installed."""
    (tmp_path / "load.py").write_text(LOG_PROBABILITIES)
    printed = ran("benchmarks", "--smoke", "--data", tmp_path, "--out", tmp_path)
    (default,) = [line for line in printed.splitlines() if line.startswith("| default | +") or "| default | -" in line]
    # These outputs have a temperature and nothing else: it is neither better nor worse, also than vector scaling.
    assert default.endswith("| +0.0 | 0 of 1 | 0 | 0 of 1 |")
    assert "What the default chose" in printed
    assert (tmp_path / "quality.png").stat().st_size > 10_000
    again = ran("benchmarks", "--again", tmp_path / "quality.csv", "--out", tmp_path)
    start = printed.index("### cifar100")
    assert again[again.index("### cifar100") :].strip() == printed[start : printed.index("## Output maps")].strip()
    assert "no saved logits" in printed


def test_the_time_of_an_update_is_printed_for_a_device(ran):
    """Of which a CPU is one."""
    printed = ran("benchmarks/metrics.py", "--device", "cpu", "--scale", "0.001")
    assert printed.count("ExpectedCalibrationError") == printed.count("NegativeLogLikelihood") == 3
    assert "| 100 x 100 | ExpectedCalibrationError | " in printed


def test_the_benchmarks_judge_output_maps_on_saved_logits(ran, tmp_path):
    """Four classes of which each needs a bias, and again without anything but a temperature."""
    rng = np.random.default_rng(0)
    truth = 2 * rng.normal(size=(1200, 4))
    target = (truth + rng.gumbel(size=truth.shape)).argmax(1)
    (tmp_path / "hard").mkdir()
    np.savez(tmp_path / "hard" / "plain.npz", z=2 * truth, y=target)
    np.savez(tmp_path / "hard" / "biased-shifted.npz", z=2 * truth + [0, 3, -3, 6], y=target, n_calibration=600)
    printed = ran("benchmarks", "--smoke", "--only", "maps", "--data", tmp_path, "--out", tmp_path)
    assert "4 calibration sets of 2 networks and data" in printed
    assert "| default against temperature | 2 / 0 of 4 |" in printed
    assert "| biased-shifted | 250 |" in printed


def test_the_benchmarks_time_a_device_without_data(ran, tmp_path):
    options = ("--parts", "resnet", "classes", "maps", "loader", "metrics", "losses", "--out", tmp_path)
    printed = ran("benchmarks", "--smoke", "--only", "device", "--device", "cpu", *options)
    assert '| bf16-mixed | `method="temperature"` |' in printed
    assert "1 + 0 (`result.passes`: 1)" in printed
    (row,) = [line for line in printed.splitlines() if line.startswith("| 3 | ")]
    passes, forwards, ratio = (row.split(" | ")[i] for i in (3, 6, 7))
    assert passes.startswith("1 + ")
    assert float(forwards) > 0
    assert float(ratio) > 0
    assert "| 200 × 10 |" in printed
    assert "| 20 x 10 | ExpectedCalibrationError | " in printed
    assert "| eager | (4, 5) | (2, 3, 2, 2) |" in printed
    assert "| kept in memory (default) |" in printed
    assert "failed" not in printed


@pytest.mark.parametrize("in_time", [True, False])
def test_the_outcome_of_the_tests_is_printed(in_time, monkeypatch):
    def run(command, **options):
        if not in_time:
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return subprocess.CompletedProcess(command, 1, "F.\nFAILED a.py::test - KeyError\n1 failed, 1 passed\n", "")

    monkeypatch.syspath_prepend(ROOT / "examples" / "benchmarks")
    outcome_of = runpy.run_path(str(ROOT / "examples" / "benchmarks" / "device.py"))["outcome_of"]
    monkeypatch.setattr(subprocess, "run", run)
    said = outcome_of(ROOT / "tests" / "gpu").splitlines()[2:]
    failed = ["FAILED a.py::test - KeyError", "1 failed, 1 passed", "pytest's exit code: 1"]
    assert said == (failed if in_time else ["not done after 200 s"])


def test_the_losses_are_timed_on_a_device(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "benchmarks")
    report = runpy.run_path(str(ROOT / "examples" / "benchmarks" / "losses.py"))["device_report"]
    lines = list(report(torch.device("cpu"), shapes=[(4, 5), (2, 3, 2, 2)], compiled=(), budget=0.01))
    assert lines[0] == "| eager | (4, 5) | (2, 3, 2, 2) |"
    assert len(lines) == 3 + 12 + 1
    numbers = [float(cell) for line in lines[2:-1] for cell in re.findall(r"[\d.]+(?= \|)", line)]
    assert len(numbers) == 2 * 13
    assert min(numbers) > 0


SCRIPTS = [
    path
    for folder in ("examples", "docs")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "def main(" in path.read_text()
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_example_explains_itself(script, monkeypatch, capsys):
    monkeypatch.syspath_prepend(script.parent)
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(script), run_name="__main__")
    assert "usage:" in capsys.readouterr().out
