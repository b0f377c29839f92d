"""What each part of the default brings on MLPNet, in points; and what refining the selection brings.

    python benchmarks/ablation.py DATA_ROOT [seeds]

Prints the tables of docs/pruning.md.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import woodfisher as wf
from woodfisher.gradients.batches import Replay
from woodfisher.pruning.method import METHODS, Method
from woodfisher.surgeon.ranking import survivors
from woodfisher.surgeon.refine import joint_objective, refine
from woodfisher.surgeon.saliency import saliency
from woodfisher.surgeon.update import joint_update
from woodfisher.tasks import Task, load_task

if TYPE_CHECKING:
    from torch import Tensor

    from woodfisher.curvature import InverseOperator

SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98)
DEFAULT = METHODS["woodfisher"]
assert isinstance(DEFAULT.curvature, wf.WoodFisher)
PLAN = wf.Adaptive()

VARIANTS: dict[str, Method] = {
    "the default": DEFAULT,
    "the same share removed at every stage (pace 1)": replace(DEFAULT, stages=replace(PLAN, pace=1.0)),
    "no rows carried along (a window of 124)": replace(DEFAULT, stages=replace(PLAN, window=124)),
    "no averaging of gradients": replace(DEFAULT, stages=replace(PLAN, momentum=0.0)),
    "samples as they come, not chosen": replace(DEFAULT, stages=replace(PLAN, among=1)),
    "damping fixed at 1e-3": replace(DEFAULT, curvature=replace(DEFAULT.curvature, damping=1e-3)),
    "no first-order term": replace(DEFAULT, first_order=False),
    "30 stages": replace(DEFAULT, stages=replace(PLAN, stages=30)),
    "16 stages of 400 samples (woodfisher-full)": METHODS["woodfisher-full"],
    "16 stages of 1000 samples, independent update (mfac)": METHODS["mfac"],
}


def stages(task: Task, seeds: int) -> None:
    """Accuracy of each variant, mean over seeds."""
    print("| |", " | ".join(f"{s:g}" for s in SPARSITIES), "| s |\n|---|" + "---|" * (len(SPARSITIES) + 1))
    for name, method in VARIANTS.items():
        rows, seconds = [], []
        for seed in range(seeds):
            data = Replay(load_task("mlpnet-mnist", data_root=Path(sys.argv[1]), seed=seed).train)
            start = time.perf_counter()
            points = wf.sweep(task.model, data, task.loss, SPARSITIES, criterion=method)
            seconds.append(time.perf_counter() - start)
            row = []
            for point in points:
                model = copy.deepcopy(task.model)
                point.write(model)
                row.append(task.evaluate(model))
            rows.append(row)
        means = (f"{statistics.fmean(column):.2f}" for column in zip(*rows, strict=True))
        print(f"| {name} |", " | ".join(means), f"| {statistics.fmean(seconds):.0f} |", flush=True)


def ranked(weights: Tensor, finv: InverseOperator, every: Tensor, count: int, rounds: int = 0) -> Tensor:
    """The kept set by ρ, after some rounds of swaps."""
    keep = survivors(saliency(weights, finv), every, count)
    return refine(weights, finv, keep, every, rounds)[0] if rounds else keep


def selection(task: Task) -> None:
    """The joint objective, its time and the accuracy after one shot, by how the kept set was chosen."""
    objective = wf.Objective(task.model, Replay(task.train), task.loss)
    finv = wf.WoodFisher(1000, None, 1e-3)(objective)
    weights, every = objective.weights.double(), objective.kept
    print("| sparsity | | joint objective | accuracy | s |\n|---|---|---|---|---|")
    for sparsity in (0.8, 0.9, 0.95):
        count = round((1 - sparsity) * len(weights))
        ways = {
            "magnitude ranking": partial(survivors, weights.abs(), every, count),
            "ranking by ρ": partial(ranked, weights, finv, every, count),
            "the same, 10 rounds of swaps": partial(ranked, weights, finv, every, count, 10),
            "the same, 40 rounds of swaps": partial(ranked, weights, finv, every, count, 40),
        }
        for name, choose in ways.items():
            start = time.perf_counter()
            keep = choose()
            seconds = time.perf_counter() - start
            value = joint_objective(weights, finv, keep)
            model = copy.deepcopy(task.model)
            objective.at(joint_update(weights, finv, keep), keep).write(model)
            print(
                f"| {sparsity:g} | {name} | {value:.5f} | {task.evaluate(model):.2f} | {seconds:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    torch.manual_seed(0)
    net = load_task("mlpnet-mnist", data_root=Path(sys.argv[1]))
    selection(net)
    stages(net, int(sys.argv[2]) if len(sys.argv) > 2 else 1)
