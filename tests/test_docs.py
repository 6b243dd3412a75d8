"""The documentation: its Python runs, its links lead somewhere, and the messages it quotes are those of the code."""

import ast
import re
from functools import cache, partial
from itertools import chain
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

import lightning_clamp
from lightning_clamp import CalibrationMonitor, fit_clamp, losses, metrics, sharpness
from lightning_clamp.report import scalars
from tests.scenarios import (
    LitClassifier,
    Segmenter,
    SmallNet,
    Validating,
    images,
    loader,
    maps,
    shifted_images,
    trainer,
)
from tests.test_multilabel import LitTagger, tags

pytestmark = pytest.mark.docs
PACKAGE = Path(lightning_clamp.__file__).parent
ROOT = PACKAGE.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
# The site has no page for these files, so that pages link to them where the project is published.
PUBLISHED = "https://github.com/lightning-clamp/lightning-clamp/blob/main/"


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What a page's headings are linked by."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_and_images_lead_somewhere(page):
    text = without_code(page.read_text())
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for target in targets:
        name, _, anchor = target.removeprefix(PUBLISHED).partition("#")
        if "://" in name:
            continue
        folder = ROOT if target.startswith(PUBLISHED) else page.parent
        file = folder / name if name else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"


def test_the_citation_has_the_packages_version():
    assert f"\nversion: {lightning_clamp.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def printed(node: ast.AST) -> str:
    """A string of the source as it is printed, with … for each of its fields; empty for what is no string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join("…" if isinstance(part, ast.FormattedValue) else printed(part) for part in node.values)
    return ""


def normal(text: str) -> str:
    return re.sub("…+", "…", " ".join(text.split()))


@cache
def messages() -> frozenset[str]:
    """Every string of the package that is no docstring."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
        found |= {normal(printed(node)) for node in nodes if node not in docstrings}
    return frozenset(found)


def rows(page: str, first_column: str) -> list[list[str]]:
    """The cells of all tables of a page whose first column is called that."""
    found, wanted = [], False
    for line in (ROOT / "docs" / page).read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("|"):
            wanted = False
        elif wanted and not line.startswith("|---"):
            found.append(cells)
        else:
            wanted = wanted or cells[0] == first_column
    return found


def test_every_message_on_the_page_is_one_of_the_package():
    quoted = [re.findall("`(.+?)`", row[0]) for row in rows("troubleshooting.md", "it says")]
    assert len(quoted) > 40
    for message in map(normal, chain.from_iterable(quoted)):
        assert len(message.strip("….").split()) > 1, "anything would do"
        assert any(text.startswith(message.rstrip("…")) for text in messages()), message
    assert all(quoted)


def python_blocks(name):
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)


def test_all_pages_with_python_are_run():
    """Here, or in the tests of what they are about."""
    here = {"README", "choosing", "getting-started", "how-it-works", "loggers", "losses", "metrics"}
    here |= {"conformal", "export", "multilabel", "production"}
    assert {page.stem for page in PAGES if "```python" in page.read_text()} == here


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
        "logits": torch.randn(10, 4),
        "target": torch.arange(10) % 4,
    }
    for block in python_blocks("docs/losses.md"):
        exec(block, names)
    run = trainer(tmp_path)
    run.fit(names["Custom"](), names["train_loader"])
    assert "mine" in run.callback_metrics


def test_every_public_loss_is_in_the_docs():
    text = (ROOT / "docs" / "losses.md").read_text()
    assert not [name for name in (*losses.__all__, *sharpness.__all__) if name not in text]


def test_every_public_metric_is_in_the_docs():
    text = (ROOT / "docs" / "metrics.md").read_text()
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


@pytest.mark.slow
def test_the_readmes_python_runs(elsewhere):
    (block,) = python_blocks("README.md")
    names = given()
    exec(block, names)
    assert names["probabilities"].shape == (5, 4)


@pytest.mark.slow
def test_ones_own_data_take_less_than_15_lines(elsewhere):
    blocks = python_blocks("docs/getting-started.md")
    assert len(blocks[0].splitlines()) < 15
    names = given()
    for block in blocks:
        exec(block, names)
    assert names["probabilities"].shape == (5, 4)
    assert names["clamping"].result.after["nll"] < names["clamping"].result.before["nll"]
    assert names["result"].after["nll"] < names["result"].before["nll"]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "n_blocks"), [("how-it-works", 1), ("choosing", 2), ("loggers", 3)])
def test_the_python_of_the_guides_runs(page, n_blocks, elsewhere):
    blocks = python_blocks(f"docs/{page}.md")
    assert len(blocks) == n_blocks
    names = given(MyModel=Validating, val_loader=loader(200, 31))
    for block in blocks:
        exec(block, names)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_the_page_from_training_to_production_runs(elsewhere):
    blocks = python_blocks("docs/production.md")
    assert sum(len(block.splitlines()) for block in blocks) < 40
    x, y = loader(600, 40, shift=False).dataset.tensors
    grouped = DataLoader(TensorDataset(x, y, torch.arange(600) % 2), batch_size=100)
    clean = {name: loader(600, seed, shift=False) for name, seed in (("unlabelled", 61), ("held_out", 62))}
    names = given(MyModel=Validating, val_loader=loader(200, 31), calibration_loader=loader(1000, 30, shift=False))
    names |= {"grouped_test_loader": grouped, "new_loader": grouped}
    names |= {f"{name}_loader": data for name, data in clean.items()}
    for block in blocks:
        exec(block, names)
    assert len(names["answers"]) == 5


@pytest.mark.slow
def test_the_python_about_conformal_sets_runs(elsewhere):
    """And the sets hold the right class as often as they should, but for what 400 and 400 samples leave to chance."""
    pytest.importorskip("mapie")
    calibration, conformal, test = (loader(400, seed) for seed in (30, 40, 50))
    names = given(calibration_loader=calibration, conformal_loader=conformal, test_loader=test)
    for block in python_blocks("docs/conformal.md"):
        exec(block, names)
    labels = torch.cat([target for _, target in test])
    assert 0.85 < names["sets"][range(len(labels)), labels, 0].mean() < 0.95


@pytest.mark.slow
def test_the_python_about_several_labels_runs(elsewhere, capsys):
    x, target = tags(300, 30).dataset.tensors
    target[:20, 1] = -1
    held_out = DataLoader(TensorDataset(x, target), batch_size=100)
    names = given(model=LitTagger(), train_loader=tags(100, 20), calibration_loader=held_out)
    (block,) = python_blocks("docs/multilabel.md")
    exec(block, names)
    assert names["probabilities"].shape == (5, 4)
    assert "fluid                         280 " in capsys.readouterr().out


def test_every_key_that_is_logged_is_in_the_docs(tmp_path):
    text = (ROOT / "docs" / "loggers.md").read_text()
    network, x, y = shifted_images(200)
    assert not [key for key in scalars(fit_clamp(network, [(x, y)], method="temperature")) if key not in text]
    run = trainer(tmp_path, CalibrationMonitor())
    run.validate(Validating(), loader(100, 1), verbose=False)
    logged = [key for key in run.callback_metrics if key.startswith("val/")]
    assert len(logged) == 4
    assert not [key for key in logged if f"`{key}`" not in text]
