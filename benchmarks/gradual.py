"""Gradual pruning of ResNet-20 on CIFAR-10 in five epochs, fine-tuning included: docs/training.md.

    python benchmarks/gradual.py --criterion woodfisher --sparsity 0.9 --seed 0 >> gradual.csv

Everything but the criterion is the same for all methods. Prints one line: criterion, sparsity, seed, dense and pruned
test accuracy (%), points lost, seconds in all, and the share of them that pruning took.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

COMMON = "--task resnet20-cifar10 --epochs 5 --warm-up 0.1 --distil 0.5"
TRAINING = {
    "0.9": "--rate 0.02 --initial 0.5 --begin 0.1 --end 4 --every 0.39",
    "0.95": "--rate 0.1 --no-augment --initial 0.5 --begin 0.1 --end 2.5 --every 0.3",
    "0.98": "--rate 0.1 --no-augment --initial 0.5 --begin 0.1 --end 3.5 --every 0.5 --power 2",
}
"""Without augmentation where few weights are left: 5,400 of them can't fit even the training images as they are."""


def main() -> None:
    """Run one of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--criterion", default="woodfisher")
    parser.add_argument("--sparsity", choices=TRAINING, required=True)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--compile", action="store_true", help="faster, with other rounding")
    chosen = parser.parse_args()
    options = (
        f"{COMMON} {TRAINING[chosen.sparsity]} --criterion {chosen.criterion} --sparsity {chosen.sparsity}"
    )
    command = [sys.executable, "-m", "woodfisher", "train", *options.split(), "--seed", chosen.seed, "--json"]
    command += ["--compile"] if chosen.compile else []
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    dense, pruned = report["dense"]["metric"], report["pruned"]["metric"]
    print(
        f"{chosen.criterion},{chosen.sparsity},{chosen.seed},{dense:.2f},{pruned:.2f},{dense - pruned:.2f},"
        f"{report['seconds']['total']:.0f},{report['pruning_share']:.3f}"
    )


if __name__ == "__main__":
    main()
