"""Which module of Python's standard library are these two lines from? A small transformer, and how sure it may be.

    python examples/text.py

The data are the sources of 16 modules as this Python has them, so nothing is downloaded, and another version of Python
prints other numbers. A snippet is two lines, empty ones left out, cut into words and signs. The first half of every
module trains. The second half calibrates and tests, in turns of ten snippets: no line serves twice (though one in a
hundred snippets of the test is word for word one of the training), the network has seen none of these functions, and
what it is calibrated on is much like what it is tested on. Many snippets could be from anywhere (``return result``), so
no network can always be right, nor should it be sure.

Tokens are integers, and snippets differ in length: δ is added where the embeddings enter the encoder, one value per
feature, the same at every position. The table says what δ brings, beside the temperature and beside the output map
alone. ``text/`` gets the calibrated checkpoint and a picture.
"""

import argparse
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from lightning_clamp import CalibrationModule, Clamp, NeuralClamping, fit_clamp, metrics

MODULES = [
    "argparse", "difflib", "doctest", "http.client", "inspect", "ipaddress", "mailbox", "optparse", "pickle", "shutil",
    "ssl", "statistics", "subprocess", "tarfile", "threading", "typing",
]  # fmt: skip
# Two lines, and the index of the module they are from.
Snippet: TypeAlias = tuple[str, int]
LENGTH = 40
PADDING, UNKNOWN = 0, 1
# Which entries of a batch are the input and the target, and where δ is added.
ENTRIES: dict[str, Any] = {"batch_keys": ("tokens", "label"), "perturb_at": "encoder"}


class LitText(LightningModule):
    """A transformer encoder as anyone would write it; nothing in it knows of calibration."""

    def __init__(self, n_words: int, n_classes: int, width: int = 32, lr: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(n_words, width, padding_idx=PADDING)
        self.position = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        layer = nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(width, n_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of tokens ``(N, length)``: nothing attends to padding, and the mean leaves it out."""
        padding = tokens == PADDING
        embedded = self.embedding(tokens) + self.position[: tokens.shape[1]]
        encoded = self.encoder(embedded, src_key_padding_mask=padding).masked_fill(padding[..., None], 0)
        return self.head(encoded.sum(1) / (~padding).sum(1, keepdim=True))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        loss = F.cross_entropy(self(batch["tokens"]), batch["label"])
        self.log("loss", loss, prog_bar=True, batch_size=len(batch["label"]))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, with nothing that keeps the network from learning its snippets by heart."""
        return torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])


def read(modules: Sequence[str]) -> tuple[list[Snippet], list[Snippet], list[Snippet]]:
    """Snippets to train on, to calibrate on and to test."""
    train, calibration, test = [], [], []
    for label, name in enumerate(modules):
        lines = [line for line in source(name).splitlines() if line.strip()]
        snippets = [("\n".join(pair), label) for pair in zip(lines[::2], lines[1::2], strict=False)]
        middle = len(snippets) // 2
        train += snippets[:middle]
        for index, snippet in enumerate(snippets[middle:]):
            (test if index // 10 % 2 else calibration).append(snippet)
    return train, calibration, test


def source(name: str) -> str:
    """What is written in a module's file; the module itself is not imported."""
    try:
        text = find_spec(name).loader.get_source(name)
    except (ImportError, AttributeError):  # there is no such module, or no file
        text = None
    if text is None:
        raise SystemExit(f"This Python has no source of a module {name!r}: name others with --modules.")
    return text


def words(text: str) -> list[str]:
    """Runs of letters, runs of digits, and every other sign by itself."""
    return re.findall(r"[A-Za-z]+|\d+|\S", text)[:LENGTH]


def loader(snippets: Sequence[Snippet], vocabulary: dict[str, int], **options: Any) -> DataLoader:
    """Batches are dicts: tokens, int64 ``(N, words of the longest)``, and labels, int64 ``(N,)``."""
    items = [(torch.tensor([vocabulary.get(word, UNKNOWN) for word in words(text)]), label) for text, label in snippets]

    def padded(chosen: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
        tokens, labels = zip(*chosen, strict=True)
        return {"tokens": pad_sequence(tokens, True, PADDING), "label": torch.tensor(labels)}

    return DataLoader(items, batch_size=128, collate_fn=padded, **options)


def print_mistakes(before: Tensor, after: Tensor, test: Sequence[Snippet], modules: Sequence[str]) -> None:
    """Where the network was wrong and surest of it, and how sure it is when calibrated."""
    print("\nThe surest mistakes:")
    sure, guess = before.softmax(1).max(1)
    wrong = guess != torch.tensor([label for _, label in test])
    for index in sure.where(wrong, 0).topk(3).indices.tolist():
        (text, label), guessed = test[index], int(guess[index])
        now = float(after[index].softmax(0)[guessed])
        print(f"{text}\n-> {modules[guessed]}, {sure[index]:.1%} sure (now {now:.1%}); it is {modules[label]}\n")


def print_table(logits: dict[str, Tensor], target: Tensor) -> None:
    """A column for every way to calibrate."""
    print(f"{'held-out test':<16}" + "".join(f"{name:>16}" for name in logits))
    for name, metric, form in (
        ("nll", metrics.NegativeLogLikelihood(), ".4f"),
        ("ece", metrics.ExpectedCalibrationError(), ".2%"),
        ("accuracy", metrics.Accuracy(), ".2%"),
    ):
        print(f"{name:<16}" + "".join(f"{float(metric(one, target)):>16{form}}" for one in logits.values()))


def draw(before: Tensor, after: Tensor, target: Tensor, delta: Tensor | None, embedded: Tensor) -> Figure:
    """The reliability diagram of two logits, and δ beside the embeddings ``(words, features)``."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    one, other = (metrics.reliability_curve(logits, target) for logits in (before, after))
    metrics.plot_reliability({"before": one, "after": other}, ax=axes[0], title="held-out snippets")
    spread = embedded.std(0)
    features = range(len(spread))
    axes[1].use_sticky_edges = False
    axes[1].bar(features, 2 * spread, bottom=-spread, color="0.88", label="standard deviation of the embeddings")
    if delta is not None:
        axes[1].bar(features, delta, width=0.5, color="#4b7ba6", label="δ, added to every one")
    axes[1].set(xlabel="feature", title="what enters the encoder" + (" (no δ was chosen)" if delta is None else ""))
    axes[1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
    return figure


def main() -> None:
    """Train, calibrate, compare on held-out snippets, and draw."""
    options = parsed()
    # Sets of this size need no worker processes, whatever Lightning says.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")

    seed_everything(0)
    train, calibration, test = read(options.modules)
    print(f"{len(train)} snippets to train on, {len(calibration)} to calibrate on, {len(test)} to test")
    counts = Counter(word for text, _ in train for word in words(text))
    vocabulary = {word: 2 + rank for rank, (word, _) in enumerate(counts.most_common(2000))}
    calibration_loader, test_loader = loader(calibration, vocabulary), loader(test, vocabulary)
    clamping = NeuralClamping(calibration_loader, **ENTRIES)
    callbacks = [clamping, ModelCheckpoint(options.out / "checkpoints")]
    trainer = Trainer(max_epochs=options.epochs, accelerator="cpu", callbacks=callbacks, logger=False)
    model = LitText(2 + len(vocabulary), len(options.modules))
    trainer.fit(model, loader(train, vocabulary, shuffle=True))

    clamps = {
        "uncalibrated": Clamp(),
        "T alone": fit_clamp(model, calibration_loader, method="temperature", **ENTRIES).clamp,
        "outputs alone": fit_clamp(model, calibration_loader, grids=(), **ENTRIES).clamp,
    }
    modules = {name: CalibrationModule(model, clamp, **ENTRIES) for name, clamp in clamps.items()}
    modules["clamp"] = CalibrationModule.from_checkpoint(clamping.checkpoint_path, LitText)
    tester = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    logits = {name: torch.cat(tester.predict(module, test_loader)) for name, module in modules.items()}
    before, after, target = logits["uncalibrated"], logits["clamp"], torch.tensor([label for _, label in test])
    print_mistakes(before, after, test, options.modules)
    print_table(logits, target)
    print(f"clamp: {clamping.result.reason}")
    embedded = model.embedding(torch.cat([tokens for tokens, _ in test_loader.dataset]))
    picture = options.out / "text.png"
    draw(before, after, target, clamping.result.clamp.perturbation, embedded).savefig(picture, dpi=110)
    print(f"written: {picture} and {clamping.checkpoint_path}")


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="+", default=MODULES, metavar="NAME", help="two or more to tell apart")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("text"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
