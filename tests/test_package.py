"""What importing costs, what the layers may know of each other, and that every example runs."""

import ast
import re
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

import lightning_clamp
from lightning_clamp import fit_clamp, losses, metrics, sharpness
from lightning_clamp.report import scalars
from tests.scenarios import LitClassifier, Segmenter, SmallNet, images, loader, maps, shifted_images, trainer

ROOT = Path(lightning_clamp.__file__).parent
# Of the losses and the sharpness, what needs Lightning.
WITH_LIGHTNING = ("aslp.py", "mixin.py", "mixins.py", "monitor.py")
WITHOUT_LIGHTNING = ("clamping", "metrics", "_batch.py", "_checks.py", "_lazy.py", "_rows.py")
# Which parts of the package a part may know; any, where it is not here.
ALLOWED = {
    "_batch.py": set(),
    "_checks.py": set(),
    "_lazy.py": set(),
    "_rows.py": {"_checks"},
    "metrics": {"metrics", "_checks", "_rows"},
    "losses": {"losses", "metrics", "_checks", "_lazy", "_rows"},
    "sharpness": {"sharpness", "clamping", "losses", "metrics", "_batch", "_checks", "_lazy", "_rows", "_trainer"},
    "clamping": {"clamping", "metrics", "_batch", "_checks", "_rows"},
}
HEAVY = ("torchvision", "matplotlib", "tensorboard", "wandb", "sklearn", "scipy")


def modules_after(code):
    """Names of the modules that a fresh Python has once it ran ``code``."""
    command = [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"]
    return subprocess.check_output(command, text=True).split()


def test_importing_the_package_imports_nothing_heavy():
    assert not set(HEAVY) & set(modules_after("import lightning_clamp"))


def test_functions_of_losses_and_sharpness_import_no_lightning():
    functions = [name for name in losses.__all__ if name.endswith("_loss")] + ["LabelPerturbationRule"]
    found = modules_after(
        f"from lightning_clamp.losses import {', '.join(functions)}\n"
        "from lightning_clamp.sharpness import gauss_newton_sharpness"
    )
    assert "lightning_clamp.sharpness.gauss_newton" in found
    roots = {name.split(".")[0] for name in found if name.startswith(("lightning", "pytorch_lightning"))}
    assert roots <= {"lightning_clamp", "lightning_utilities"}


@pytest.mark.parametrize("package", [lightning_clamp, losses, sharpness], ids=lambda package: package.__name__)
def test_every_public_name_is_there_and_others_are_not(package):
    for name in package.__all__:
        assert getattr(package, name) is not None
        assert name in dir(package)
    with pytest.raises(AttributeError, match=f"no attribute 'NeuralClamp'; it offers {package.__all__[0]}"):
        _ = package.NeuralClamp


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
    if part in (*WITHOUT_LIGHTNING, "losses", "sharpness") and path.name not in WITH_LIGHTNING:
        assert not {name for name in names if name.split(".")[0] == "lightning"}
    ours = {name.split(".")[1] for name in names if name.startswith("lightning_clamp.")}
    assert ours <= ALLOWED.get(part, ours)


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


def python_blocks(name):
    return re.findall(r"```python\n(.*?)```", (ROOT.parent / name).read_text(), flags=re.DOTALL)


def test_all_pages_with_python_are_run():
    """Here, or in the tests of what they are about; that of the API page are doctests."""
    here = {"README", "choosing", "getting-started", "how-it-works", "loggers", "losses", "metrics"}
    pages = [ROOT.parent / "README.md", *(ROOT.parent / "docs").glob("*.md")]
    assert {page.stem for page in pages if "```python" in page.read_text()} == here | {"export", "api"}


def test_the_python_about_metrics_runs(capsys):
    names = {}
    for block in python_blocks("docs/metrics.md"):
        exec(block, names)
    assert "ece: " in capsys.readouterr().out


def test_the_python_about_losses_runs(tmp_path):
    names = {
        "MyModel": LitClassifier,
        "MySegmenter": Segmenter,
        "monitor_loader": loader(60, 3),
        "train_loader": loader(100, 20),
        "train_set": maps(4),
        "val_loader": DataLoader(maps(2)),
        "DataLoader": DataLoader,
        "trainer": trainer(tmp_path),
    }
    for block in python_blocks("docs/losses.md"):
        exec(block, names)
    run = trainer(tmp_path)
    run.fit(names["Custom"](), names["train_loader"])
    assert "mine" in run.callback_metrics


def test_every_public_loss_is_in_the_docs():
    text = (ROOT.parent / "docs" / "losses.md").read_text()
    assert not [name for name in (*losses.__all__, *sharpness.__all__) if name not in text]


def test_every_public_metric_is_in_the_docs():
    text = (ROOT.parent / "docs" / "metrics.md").read_text()
    assert not [name for name in metrics.__all__ if name not in text]


def given(**more):
    """What the pages take for granted."""
    return {
        "model": LitClassifier(),
        "network": SmallNet(2.0),
        "MyModel": LitClassifier,
        "dataset": loader(1500, 30).dataset,
        "train_loader": loader(200, 20, shift=False),
        "calibration_loader": loader(1000, 30),
        "test_loader": loader(200, 40),
        "images": images(5),
        "logits": torch.randn(100, 4),
        "target": torch.randint(4, (100,)),
        **more,
    }


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder of one's own, and a Trainer with Lightning's defaults but for what only costs time here."""
    monkeypatch.chdir(tmp_path)
    quiet = partial(Trainer, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    monkeypatch.setattr("lightning.pytorch.Trainer", quiet)


def test_the_readmes_python_runs(elsewhere):
    blocks = python_blocks("README.md")
    assert len(blocks) == 6
    names = given()
    for block in blocks:
        exec(block, names)
    assert names["probabilities"].shape == (5, 4)
    assert names["result"].after["nll"] < names["result"].before["nll"]
    assert Path("calibrated.onnx").stat().st_size > 1000


def test_ones_own_data_take_less_than_15_lines(elsewhere):
    blocks = python_blocks("docs/getting-started.md")
    assert len(blocks[0].splitlines()) < 15
    names = given()
    for block in blocks:
        exec(block, names)
    assert names["probabilities"].shape == (5, 4)
    assert names["clamping"].result.after["nll"] < names["clamping"].result.before["nll"]


@pytest.mark.parametrize(("page", "n_blocks"), [("how-it-works", 1), ("choosing", 2), ("loggers", 2)])
def test_the_python_of_the_guides_runs(page, n_blocks, elsewhere):
    blocks = python_blocks(f"docs/{page}.md")
    assert len(blocks) == n_blocks
    names = given()
    for block in blocks:
        exec(block, names)


def test_every_key_that_is_logged_is_in_the_docs():
    text = (ROOT.parent / "docs" / "loggers.md").read_text()
    network, x, y = shifted_images(200)
    assert not [key for key in scalars(fit_clamp(network, [(x, y)], method="temperature")) if key not in text]


def test_the_api_page_is_that_of_the_docstrings():
    page = runpy.run_path(str(ROOT.parent / "docs" / "api.py"))["page"]()
    assert (ROOT.parent / "docs" / "api.md").read_text() == page, "run: python docs/api.py"
