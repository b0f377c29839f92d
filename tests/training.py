"""Training loops with a pruner, and what must hold after each of their steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

import woodfisher as wf
from models import mlp, samples
from woodfisher.curvature.base import Estimator

FISHER = wf.WoodFisher(samples=8, damping=1e-2)


@dataclass(frozen=True)
class Recorder(Estimator):
    """The curvature that it is given, with a record of the rows, of what was kept and of the inputs each time."""

    inner: wf.WoodFisher = FISHER
    samples: int = FISHER.samples
    seen: list = None

    def estimate(self, objective):
        inputs = torch.cat([batch[0] for batch in objective.data])
        self.seen.append((objective.rows(self.samples), objective.kept.clone(), inputs))
        return self.inner(objective)


def data(count=40, batch=8, seed=1):
    """Batches in a list."""
    return list(zip(*(part.split(batch) for part in samples(count, seed=seed)), strict=True))


def pruner_of(model, schedule, batches=None, loss=cross_entropy, **parts):
    batches = data() if batches is None else batches
    return wf.Pruner(model, wf.Objective(model, batches, loss), schedule, **{"curvature": FISHER, **parts})


def plain(model, optimizer, batch, _step=0):
    optimizer.zero_grad()
    cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def assert_held(model, pruner, *optimizers):
    """Removed weights, their gradients and their numbers in the optimizers' state are exactly zero."""
    for name, kept in pruner.masks.items():
        parameter = model.get_parameter(name)
        state = tree_leaves([optimizer.state.get(parameter) for optimizer in optimizers])
        alike = [
            t for t in state if torch.is_tensor(t) and t.shape == parameter.shape and t.is_floating_point()
        ]
        for tensor in [parameter, parameter.grad, *alike]:
            assert tensor is None or not tensor[~kept].any(), name


def two_processes(rank: int, folder: str) -> None:
    """One of two processes that train one model, then one that fails; what each has lands in files."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = DistributedDataParallel(mlp())
    pruner = pruner_of(model, wf.Milestones({1: 0.4, 3: 0.7}), data(seed=rank))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step, batch in enumerate(data(seed=10 + rank)):
        plain(model, optimizer, batch)
        assert_held(model.module, pruner, optimizer)
        report = pruner.step()
        assert_held(model.module, pruner, optimizer)
        assert (report is not None) == (step in (1, 3))
        assert report is None or report.masks.keys() == pruner.masks.keys()
    result = {"model": model.module.state_dict(), "pruner": pruner.state_dict(), "error": ""}

    poisoned = data()
    if rank == 0:
        poisoned[0][0][0, 0] = float("nan")
    other = mlp()
    failing = pruner_of(other, wf.one_shot(0.5), poisoned)
    before = other[0].weight.detach().clone()
    try:
        failing.step()
    except wf.WoodfisherError as error:
        result["error"] = str(error)
    assert torch.equal(other[0].weight, before)
    torch.save(result, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()
