"""N:M and block patterns, one shot: the rise of the loss on data that no row came from.

    PYTHONPATH=. python benchmarks/patterns.py

For the Linear layers of the transformer of `networks.py`, prints one row a pattern: the mean rise of the test loss over
dense (and the accuracy) by magnitude, and by WoodFisher with the paper's independent update and with the joint one; a
mean over seeds, which choose the samples.
"""

from __future__ import annotations

import copy
import statistics
import warnings
from dataclasses import replace

from benchmarks.networks import transformer

import woodfisher as wf

SEEDS = range(3)
_FULL = wf.METHODS["woodfisher-full"]
METHODS = {
    "magnitude": wf.METHODS["magnitude"],
    "independent": replace(_FULL, update="independent"),
    "joint": _FULL,
}
PATTERNS = [wf.NM(2, 4), wf.NM(4, 8), wf.Block(4)]


def measured() -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Pattern → method → (rise of the test loss, accuracy) of each seed."""
    results: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for seed in SEEDS:
        task = transformer(seed)
        test = wf.Objective(task.model, task.test, task.loss)
        dense = test.mean_loss()
        for pattern in PATTERNS:
            sparsity = pattern.sparsity if isinstance(pattern, wf.NM) else 0.5
            for name, method in METHODS.items():
                model = copy.deepcopy(task.model)
                wf.prune(
                    model, task.train, task.loss, sparsity, pattern=pattern, curvature=method.curvature,
                    update=method.update, stages=1,
                )  # fmt: skip
                rise = wf.Objective(model, task.test, task.loss).mean_loss() - dense
                cells = results.setdefault(str(pattern), {}).setdefault(name, [])
                cells.append((rise, task.evaluate(model)))
    return results


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore", wf.WoodfisherWarning)
    print(f"| pattern | {' | '.join(METHODS)} |\n|---|{'---|' * len(METHODS)}")
    for pattern, by_method in measured().items():
        cells = [
            f"{statistics.fmean(r for r, _ in runs):+.4f} ({statistics.fmean(a for _, a in runs):.1f})"
            for runs in by_method.values()
        ]
        print(f"| {pattern} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
