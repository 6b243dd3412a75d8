"""Several ranks on one machine: forked, so that nothing is imported again, and talking over gloo."""

import datetime

import torch
from torch import distributed as dist


def _one(rank, n_ranks, folder, function, arguments):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=n_ranks,
        # A rank that is waited for in vain must fail the test, not stop the suite.
        timeout=datetime.timedelta(seconds=60),
    )
    # One that has nothing to do must not be gone before all are connected.
    dist.barrier()
    torch.save(function(*arguments), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def on_ranks(n_ranks, folder, function, *arguments):
    """What ``function(*arguments)`` returns on each of ``n_ranks`` ranks."""
    folder.mkdir()
    torch.multiprocessing.start_processes(
        _one, (n_ranks, str(folder), function, arguments), nprocs=n_ranks, start_method="fork"
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(n_ranks)]
