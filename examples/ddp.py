r"""Train on several processes and come out calibrated, with the clamp that one process would have fitted.

    python examples/ddp.py --devices 2 --strategy ddp_spawn
    python examples/ddp.py --devices 2 --strategy ddp
    torchrun --nproc-per-node 2 examples/ddp.py --devices 2 --strategy ddp

The processes are on the CPU and talk over gloo. The calibration set is shared out, every sample to one process, also
where their number does not divide it. What they sum over their samples is added up, so that all arrive at the clamp of
one process, up to rounding; here it is often the same to the last bit. The network and the handwritten digits are those
of quickstart.py, beside this file. ``ddp/`` gets the calibrated checkpoint and a picture.

With ``ddp_spawn`` and ``ddp_fork`` the Trainer starts the processes, and what follows ``fit`` runs once, where ``main``
was called. With ``ddp`` and with torchrun every process runs the whole script, so what is for one has to ask
``trainer.is_global_zero``. For two machines that share the folder ``--out``, start this on each:

    torchrun --nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        examples/ddp.py --nodes 2 --devices 2 --strategy ddp
"""

import argparse
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from quickstart import LitDigits, digits
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_clamp import CalibrationModule, NeuralClamping, fit_clamp, metrics

# Sets of this size need no worker processes, whatever Lightning says. Not in main, which spawned processes do not run.
warnings.filterwarnings("ignore", ".*does not have many workers.*")
warnings.filterwarnings("ignore", ".*The number of training batches.*")
warnings.filterwarnings("ignore", ".*LeafSpec.*")


def main() -> None:
    """Train and calibrate on all processes; on one, calibrate again and compare."""
    options = parsed()
    seed_everything(0)
    # An odd number to calibrate on, which two processes cannot halve.
    train, calibration, test = digits(n_calibration=801)
    calibration_loader = DataLoader(calibration, batch_size=256)
    clamping = NeuralClamping(calibration_loader)
    trainer = Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        devices=options.devices,
        num_nodes=options.nodes,
        strategy=options.strategy,
        callbacks=[clamping, ModelCheckpoint(options.out / "checkpoints")],
        logger=False,
    )
    model = LitDigits(width=32)
    trainer.fit(model, DataLoader(train, batch_size=16, shuffle=True))

    # Every process that runs this script comes here; what follows is for one.
    if trainer.is_global_zero:
        print(f"{clamping.result.n_samples} samples of {len(calibration)} were read by {trainer.world_size} processes")
        compare(clamping.checkpoint_path, calibration_loader, test, options.out)


def compare(path: str, calibration_loader: DataLoader, test: Dataset, out: Path) -> None:
    """Fit a clamp to the same weights in this process alone, and hold the two against each other."""
    together = CalibrationModule.from_checkpoint(path, LitDigits)
    network = LitDigits.load_from_checkpoint(path).eval()
    alone = fit_clamp(network, calibration_loader).clamp
    images, target = next(iter(DataLoader(test, batch_size=len(test))))
    with torch.no_grad():
        logits = {
            "before": network(images),
            "all processes": together(images),
            "one process": alone.scale(network(alone.perturb(images))),
        }
    print(f"T = {together.clamp.temperature:.7f} of all processes, {alone.temperature:.7f} of one")
    apart = (logits["all processes"] - logits["one process"]).abs().max()
    print(f"largest difference of their logits: {apart:.1e}, of logits up to {logits['one process'].abs().max():.1f}\n")
    print_table(logits, target)
    before, after = (metrics.reliability_curve(logits[name], target) for name in ("before", "all processes"))
    figure, _ = metrics.plot_reliability({"before": before, "after": after}, title="digits, held-out test")
    figure.savefig(out / "reliability.png", dpi=130)
    print(f"written: {out / 'reliability.png'} and {path}")


def print_table(logits: dict[str, Tensor], target: Tensor) -> None:
    """A column for every clamp."""
    print(f"{'held-out test':<16}" + "".join(f"{name:>16}" for name in logits))
    for name, metric, form in (
        ("nll", metrics.NegativeLogLikelihood(), ".4f"),
        ("ece", metrics.ExpectedCalibrationError(), ".2%"),
        ("accuracy", metrics.Accuracy(), ".2%"),
    ):
        print(f"{name:<16}" + "".join(f"{float(metric(one, target)):>16{form}}" for one in logits.values()))


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=2, help="processes on every machine")
    parser.add_argument("--nodes", type=int, default=1, help="machines")
    parser.add_argument("--strategy", choices=("ddp_spawn", "ddp", "ddp_fork"), default="ddp_spawn")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("ddp"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
