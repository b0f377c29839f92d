"""Functions that run in several processes, as tests start them."""

from __future__ import annotations

import functools
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed


def run(body, size: int, folder, *arguments) -> list:
    """What `body(rank, *arguments)`, a function of a module, returns in each of `size` processes with a group."""
    context = torch.multiprocessing.get_context("spawn")
    main = functools.partial(_in_a_process, body, size, str(folder), arguments)
    processes = [context.Process(target=main, args=(rank,)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _in_a_process(body, size, folder, arguments, rank):
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    distributed.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    torch.save(body(rank, *arguments), Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()
