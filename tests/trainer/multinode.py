"""Started by torchrun: trains and calibrates on all nodes, and writes down what this rank has."""

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer

from lightning_clamp import NeuralClamping
from tests.scenarios import LitClassifier, loader

if __name__ == "__main__":
    torch.set_num_threads(1)
    callback = NeuralClamping(loader(301, seed=30), output_maps=("temperature",), grids=(1,), save_to=False)
    trainer = Trainer(
        num_nodes=2, devices=1, accelerator="cpu", strategy="ddp", callbacks=[callback], max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(LitClassifier(lr=0.0), loader(100, seed=20, shift=False))
    assert trainer.node_rank == int(os.environ["GROUP_RANK"])
    content = {"clamp": callback.result.clamp.state_dict(), "n_samples": callback.result.n_samples}
    torch.save(content, Path(sys.argv[1]) / f"{trainer.global_rank}.pt")
