"""Planned against measured peak memory, for each place that rows can be kept in: `python -m benchmarks.memory`.

Each run is a process of its own: a network of three million weights, 200 rows, pruned by blocks of 2000 in one shot.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import replace

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import woodfisher as wf
from woodfisher.curvature.planning import KEEPS, Keep
from woodfisher.memory import format_bytes, peak_memory
from woodfisher.pruning.method import Update


def measured(keep: Keep, update: Update) -> dict[str, object]:
    """Plan and peak of a run in this process."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    layers = [nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4)]
    layers += [nn.Conv2d(64, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(1024, 2048), nn.ReLU(), nn.Linear(2048, 400))
    data = [(torch.randn(50, 3, 32, 32), torch.randint(400, (50,))) for _ in range(4)]
    curvature = replace(wf.WoodFisher(200, 2000, "auto"), keep=keep)
    model(data[0][0])
    made = wf.plan(wf.Objective(model, data, cross_entropy), curvature)
    wf.prune(model, data, cross_entropy, 0.8, curvature=curvature, update=update, stages=1, recalibrate=0)
    return {"keep": keep, "update": update, "planned": made.peak, "measured": peak_memory()}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2)
    one = parser.parse_args().one
    if one:
        print(json.dumps(measured(*one)))
        return
    print("| rows kept | update | planned peak | measured peak | ratio |\n| --- | --- | --- | --- | --- |")
    for keep in KEEPS:
        for update in ("independent", "joint"):
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", "--one", keep, update]
            run = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            planned, peak = run["planned"], run["measured"]
            print(
                f"| {keep} | {update} | {format_bytes(planned)} | {format_bytes(peak)} | {peak / planned:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
