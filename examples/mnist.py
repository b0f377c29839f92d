"""Prune a trained network once, with little data, and compare with removing the smallest weights.

    python examples/mnist.py --data-root DIR   # the MLP of the WoodFisher paper on MNIST; DIR holds its files
    python examples/mnist.py --small           # a small one on scikit-learn's digits, trained here; needs no files

What is needed: the trained model, batches that it was trained on, and its loss. The test set only judges the result.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

from my_task import digits_mlp

import woodfisher as wf
from woodfisher.tasks import accuracy, load_task


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    """Print the test accuracy of each method at each sparsity."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", type=Path, help="folder with mnist.npz and mlpnet_mnist.pt")
    parser.add_argument("--small", action="store_true", help="scikit-learn's digits instead of MNIST")
    chosen = parser.parse_args(arguments)
    task = digits_mlp() if chosen.small else load_task("mlpnet-mnist", data_root=chosen.data_root)

    sparsities = (0.5, 0.8, 0.9) if chosen.small else (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
    dense = accuracy(task.model, task.test)
    print(f"{task.name}: dense test accuracy {dense:.2f} %")
    print(f"{'sparsity':<22}" + "".join(f"{sparsity:>8.0%}" for sparsity in sparsities))
    stages = wf.Adaptive(stages=20, window=300) if chosen.small else "auto"
    rows, trial = {}, copy.deepcopy(task.model)
    # --8<-- [start:sweep]
    for name, options in {
        "magnitude": {"criterion": "magnitude"},
        "the paper's protocol": {"preset": "paper"},  # 100 gradients, one shot
        "woodfisher": {"stages": stages},  # the default: many small stages, checked on held-out samples
    }.items():
        points = wf.sweep(task.model, task.train, task.loss, sparsities, **options)
        rows[name] = []
        for point in points:  # the model is as it was; each point goes into a copy
            point.write(trial)
            rows[name].append(accuracy(trial, task.test))
        # --8<-- [end:sweep]
        print(f"{name:<22}" + "".join(f"{value:>8.2f}" for value in rows[name]))
    return rows


if __name__ == "__main__":
    main()
