"""What importing costs, what the layers may know of each other, and that every example runs."""

import ast
import importlib
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_clamp

ROOT = Path(lightning_clamp.__file__).parent
# Of the losses, what needs Lightning.
MIXINS = ("aslp.py", "mixin.py", "mixins.py", "monitor.py")
HEAVY = ("torchvision", "matplotlib", "tensorboard", "wandb", "sklearn", "scipy")


def test_importing_the_package_imports_nothing_heavy():
    code = f"import sys, lightning_clamp; print([m for m in {HEAVY} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_every_public_name_is_there_and_others_are_not():
    for name in lightning_clamp.__all__:
        assert getattr(lightning_clamp, name) is not None
        assert name in dir(lightning_clamp)
    with pytest.raises(AttributeError, match="no attribute 'NeuralClamp'; it offers CalibrationModule"):
        _ = lightning_clamp.NeuralClamp


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_public_name_shadows_a_module(path):
    """Python sets a module as an attribute of its package, and a function of that name would take its place."""
    if path.name == "__main__.py":
        return
    package, name = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).rsplit(".", 1)
    module = importlib.import_module(package if name == "__init__" else f"{package}.{name}")
    assert name == "__init__" or getattr(importlib.import_module(package), name) is module


def imports(path: Path) -> set[str]:
    """Names imported when the module is, with those inside functions and TYPE_CHECKING left out."""
    tree = ast.parse(path.read_text())
    nodes = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names} | {
        n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module
    }


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    names = imports(path)
    assert not {name for name in names if name.split(".")[0] in HEAVY}
    part = path.relative_to(ROOT).parts[0]
    if part in ("clamping", "metrics", "_rows.py") or (part == "losses" and path.name not in MIXINS):
        assert not {name for name in names if name.split(".")[0] == "lightning"}
    ours = {name.split(".")[1] for name in names if name.startswith("lightning_clamp.")}
    allowed = {
        "metrics": {"metrics", "_rows"},
        "losses": {"losses", "metrics", "_rows"},
        "clamping": {"clamping", "metrics", "_rows"},
        "_rows.py": set(),
    }
    assert ours <= allowed.get(part, ours)


def ran(script, *options):
    command = [sys.executable, ROOT.parent / "examples" / script, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_quickstart_runs_and_writes_what_it_says(tmp_path):
    assert "held-out test" in ran("quickstart.py", "--epochs", "8", "--out", tmp_path)
    assert (tmp_path / "reliability.png").stat().st_size > 10_000
    assert list((tmp_path / "checkpoints").glob("*-calibrated.ckpt"))
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_a_text_model_is_calibrated(tmp_path):
    printed = ran("text.py", "--epochs", "1", "--modules", "pickle", "ssl", "--out", tmp_path)
    assert "outputs alone" in printed
    assert "clamp: " in printed
    assert (tmp_path / "text.png").stat().st_size > 10_000


def test_several_processes_fit_the_clamp_of_one(tmp_path):
    printed = ran("ddp.py", "--strategy", "ddp_fork", "--epochs", "1", "--out", tmp_path)
    assert "801 samples of 801 were read by 2 processes" in printed
    assert float(re.search(r"largest difference of their logits: (\S+),", printed)[1]) < 1e-4
    assert (tmp_path / "reliability.png").stat().st_size > 10_000


def test_losses_are_compared(tmp_path):
    printed = ran("compare_losses.py", "--seeds", "1", "--losses", "ce", "acls", "--epochs", "2", "--out", tmp_path)
    assert printed.count("then clamped") == 2
    assert "adaptive ECE" in (tmp_path / "comparison.md").read_text()
    assert (tmp_path / "comparison.png").stat().st_size > 10_000


def test_segmentation_is_compared(tmp_path):
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


def test_the_benchmarks_print_their_tables(tmp_path):
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
    assert again[again.index("### cifar100") :].strip() == printed[start : printed.rindex("\n\n")].strip()


SCRIPTS = [
    path
    for folder in ("examples", "docs")
    for path in sorted((ROOT.parent / folder).rglob("*.py"))
    if "def main(" in path.read_text()
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_example_explains_itself(script, monkeypatch, capsys):
    monkeypatch.syspath_prepend(script.parent)
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(script), run_name="__main__")
    assert "usage:" in capsys.readouterr().out
