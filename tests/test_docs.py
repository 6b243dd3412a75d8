"""The documentation's claims about files: links lead somewhere, quoted messages are those of the code, tests exist."""

import ast
import re
from functools import cache
from itertools import chain
from pathlib import Path

import pytest

import lightning_clamp

PACKAGE = Path(lightning_clamp.__file__).parent
ROOT = PACKAGE.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


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
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"


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


# What the project set out to have, by the first words of its row.
MUST = (
    "temperature scaling",
    "perturbation of the input",
    "temperature and perturbation apart",
    "segmentation",
    "one-logit",
    "report of the fit, and never a higher NLL",
    "warnings of small sets and of leaks",
    "callback, automatic after `fit`",
    "your own LightningModule, untouched",
    "a model that was trained earlier",
    "test and predict use it",
    "best or last weights, and a fingerprint",
    "averaged weights (EMA, SWA)",
    "the calibration survives saving and loading",
    "export as one module",
    "command line",
    "numbers in TensorBoard, W&B, CSV",
    "pictures in TensorBoard, W&B",
    "before and after side by side, and a picture of δ",
    "trains under DDP",
    "ranks share the calibration set",
    "no sample twice",
    "expected, maximum, root-mean-square error",
    "adaptive error",
    "class-wise error",
    "smooth error",
    "debiased error, intervals by bootstrap",
    "NLL and Brier score",
    "reliability diagram",
    "torchmetrics objects",
    "state of a size that does not grow",
    "right for tens of millions of pixels",
    "logits or probabilities, by name",
    "focal loss, label smoothing, entropy penalty",
    "MbLS, ACLS, ASLP",
    "a mixin for any LightningModule",
)


def test_every_feature_is_there():
    table = rows("features.md", "feature")
    assert all(row[1].startswith("yes: ") for row in table)
    assert not [must for must in MUST if not any(row[0].startswith(must) for row in table)]
    assert {len(row) for row in table} == {9}


def test_every_test_on_the_page_exists():
    for row in rows("features.md", "feature"):
        named = re.findall(r"`(tests/\w+\.py)::(\w+)`", row[-1])
        assert named, f"{row[0]} is shown by nothing"
        for file, name in named:
            body = ast.parse((ROOT / file).read_text()).body
            assert name in {node.name for node in body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"
