"""Gradual pruning of ResNet-20 on CIFAR-10 in five epochs, fine-tuning included: docs/training.md.

    OMP_NUM_THREADS=1 python benchmarks/gradual.py --criterion woodfisher --sparsity 0.9 --seed 0 >> gradual.csv

Everything but the criterion is the same for all methods. Prints one line: criterion, sparsity, seed, dense and pruned
test accuracy (%), points lost, seconds in all, and the share of them that pruning took. What follows `--` replaces
options of the training, as in `-- --end 4`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

COMMON = "--task resnet20-cifar10 --precision bfloat16 --epochs 5 --warm-up 0.1 --initial 0.5 --begin 0.1"
TRAINING = {
    "0.9": "--rate 0.06 --distil 1 --temperature 4 --no-augment --end 2.5 --every 0.29",
    "0.95": "--rate 0.08 --distil 1 --temperature 4 --no-augment --end 2.5 --every 0.3",
    "0.98": "--rate 0.2 --distil 1 --temperature 4 --no-augment --end 3 --every 0.29",
}
"""Without augmentation: in so few epochs, the weights that are left can't fit even the training images as they are."""


def main() -> None:
    """Run one of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--criterion", default="woodfisher")
    parser.add_argument("--sparsity", choices=TRAINING, required=True)
    parser.add_argument("--seed", default="0")
    parser.add_argument("others", nargs="*", help="options of `woodfisher train`, after --")
    chosen = parser.parse_args()
    options = (
        f"{COMMON} {TRAINING[chosen.sparsity]} --criterion {chosen.criterion} --sparsity {chosen.sparsity}"
    )
    command = [sys.executable, "-m", "woodfisher", "train", *options.split(), "--seed", chosen.seed, "--json"]
    command += chosen.others
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    dense, pruned = report["dense"]["metric"], report["pruned"]["metric"]
    print(
        f"{chosen.criterion},{chosen.sparsity},{chosen.seed},{dense:.2f},{pruned:.2f},{dense - pruned:.2f},"
        f"{report['seconds']['total']:.0f},{report['pruning_share']:.3f}"
    )


if __name__ == "__main__":
    main()
