"""Throughput of the factor phase with one process and with several, each with one thread.

    python -m benchmarks.processes --processes 2 --repeats 3

Runs alternate, so that what else the machine does meets both. The time of a run is that of the slowest process, from
the rows to the mask without the gradients; 3·N²·d operations are counted.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from torch import distributed, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import cross_entropy

import woodfisher as wf

WIDTH, LAYERS, SAMPLES = 1000, 4, 400


def main() -> None:
    """Measure, and print the ratio of the medians and all times as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    times: dict[int, list[float]] = {1: [], options.processes: []}
    for _ in range(options.repeats):
        for size, found in times.items():
            found.append(run(size))
    alone, shared = (statistics.median(found) for found in times.values())
    flops = 3 * SAMPLES**2 * WIDTH**2 * LAYERS
    print(
        json.dumps(
            {
                "seconds": times,
                "GFLOP/s": {size: flops / statistics.median(found) / 1e9 for size, found in times.items()},
                "speedup": alone / shared,
            }
        )
    )


def run(size: int) -> float:
    """Seconds of the slowest of `size` processes."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(one, (size, folder), nprocs=size)
        return max(float((Path(folder) / f"{rank}.txt").read_text()) for rank in range(size))


def one(rank: int, size: int, folder: str) -> None:
    """Prune in one of the processes, and write down its time."""
    torch.set_num_threads(1)
    if size > 1:
        distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size
        )
    torch.manual_seed(0)
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    data = [(torch.randn(SAMPLES, WIDTH), torch.randint(WIDTH, (SAMPLES,)))]
    curvature = wf.WoodFisher(samples=SAMPLES, damping=1e-2, keep="factors")
    report = wf.prune(
        nn.Sequential(*layers), data, cross_entropy, 0.8, curvature=curvature, stages=1, update="none"
    )
    # The first rank's report: the ranks wait for each other at the threshold, so that its time is the slowest's.
    (Path(folder) / f"{rank}.txt").write_text(str(report.seconds["curvature"] + report.seconds["saliency"]))
    if size > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
