"""What samples, block size and damping do to one shot of pruning: the tables of docs/choosing.md.

    python benchmarks/choosing.py                                      # digits, needs no files
    python benchmarks/choosing.py --task mlpnet-mnist --data-root DIR

Validation accuracy in %, mean over seeds; all rows of a table see the same samples.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

import woodfisher as wf
from woodfisher.gradients.batches import take
from woodfisher.tasks import load_task

if TYPE_CHECKING:
    from woodfisher.curvature.damping import Damping

BLOCKS = (1, 50, 500, 2000, None)
SAMPLES = (25, 50, 100, 200, 400, 1000)
DAMPINGS: tuple[Damping, ...] = (
    1e-7,
    1e-6,
    1e-5,
    1e-4,
    1e-3,
    1e-2,
    wf.Relative(0.1),
    wf.Relative(1),
    wf.Relative(10),
    "auto",
)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="digits")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--seeds", type=int, default=3)
    chosen = parser.parse_args()
    tasks = [load_task(chosen.task, data_root=chosen.data_root, seed=seed) for seed in range(chosen.seeds)]
    data = [list(take(task.train, max(SAMPLES))) for task in tasks]
    trial = copy.deepcopy(tasks[0].model)

    def reached(curvature: wf.WoodFisher) -> str:
        values = []
        for task, batches in zip(tasks, data, strict=True):
            trial.load_state_dict(task.model.state_dict())
            wf.prune(trial, batches, task.loss, chosen.sparsity, curvature=curvature, stages=1)
            values.append(task.validate(trial))
        return f"{statistics.mean(values):.2f}"

    heads = ["one block" if block is None else f"B = {block}" for block in BLOCKS]
    print(f"{chosen.task}, {chosen.sparsity:.0%} removed; dense {tasks[0].validate(tasks[0].model):.2f}\n")
    print(f"| λ, with 400 samples | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
    for damping in DAMPINGS:
        name = f"{damping.factor:g} × mean" if isinstance(damping, wf.Relative) else str(damping)
        row = [reached(wf.WoodFisher(400, block, damping)) for block in BLOCKS]
        print(f"| {name} | {' | '.join(row)} |", flush=True)
    print(f"\n| samples, λ auto | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
    for samples in SAMPLES:
        row = [reached(wf.WoodFisher(samples, block, "auto")) for block in BLOCKS]
        print(f"| {samples} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
