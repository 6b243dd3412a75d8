"""Every test starts from the same random state, draws without a screen, and leaves no environment behind."""

import gc
import os

# Tests fork, and a child may wait for ever for a lock that a thread held: the parent must have no threads of its own.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("TQDM_MONITOR_INTERVAL", "0")

import matplotlib as mpl
import pytest
import torch
from matplotlib import pyplot

mpl.use("Agg")
# The tensors here are tiny: threads would only wait for each other, above all on a busy machine.
torch.set_num_threads(1)
# Autograd makes its threads at the first backward; if torch.export has run by then, in a way that no forked child can
# differentiate any more.
torch.ones(1, requires_grad=True).backward()
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")


# Also on a device that nothing has used yet.
torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _seeded():
    # torch.manual_seed notes where it was called from, until there is a device: as long as a short test.
    if torch.cuda.is_initialized():
        torch.manual_seed(0)
    else:
        torch.default_generator.manual_seed(0)


def pytest_collection_finish():
    """What is imported by now stays: to look through it for garbage again and again took a twentieth of the time."""
    gc.collect()
    gc.freeze()


def pytest_runtest_teardown():
    """No figures are left."""
    pyplot.close("all")
