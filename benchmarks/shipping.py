"""How fast pruned models run on this machine's CPU, against dense: docs/shipping.md.

    python benchmarks/shipping.py layers                       Linear and convolution layers by size, sparsity and batch
    python benchmarks/shipping.py mlp --data-root DIR          a wide MLP on MNIST, trained, pruned, and run sparse
    python benchmarks/shipping.py channels --data-root DIR     ResNet-20 on CIFAR-10 with channels cut out

Trained and pruned weights are kept in --folder, so that a second run measures only. The number of threads is that of
OMP_NUM_THREADS. Each prints a table in Markdown: ratios are dense over sparse time, from the medians of 15 turns each.
"""

from __future__ import annotations

import argparse
import copy
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import woodfisher as wf
from woodfisher.export import (
    OnnxModel,
    difference,
    load_export,
    measure_layers,
    race,
    save_dense,
    save_export,
    to_onnx,
    to_sparse,
)
from woodfisher.gradients.outputs import outputs_of
from woodfisher.tasks import Task, load_task
from woodfisher.tasks.loaders import image_loaders
from woodfisher.tasks.mnist import read_mnist

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

SPARSITIES = (0.8, 0.9, 0.95)
BATCHES = (1, 64)
LINEAR = ((64, 512), (512, 784), (2048, 784), (2048, 2048))
KERNELS = ((16, 32, 3), (64, 8, 3), (256, 14, 1), (256, 14, 3))
"""Channels in and out, height and width, kernel."""


def zeroed(layer: nn.Module, sparsity: float, block: int = 1) -> nn.Module:
    """The layer with random weights removed, in square blocks of its flat weight."""
    weight = layer.get_parameter("weight").data.flatten(1)
    kept = torch.rand(weight.shape[0] // block, weight.shape[1] // block) >= sparsity
    weight *= kept.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return layer


def layers() -> None:
    """Print ratios for single layers with random zeros."""
    print("| layer | batch | " + " | ".join(f"{s:.0%}" for s in SPARSITIES) + " |")
    print("|---|---|" + "---|" * len(SPARSITIES))
    cases: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], int]] = [
        (f"Linear {i} → {o}", partial(nn.Linear, i, o), (i,), 1) for o, i in LINEAR
    ]
    cases += [
        (f"Linear 2048 → 2048, blocks of {b}×{b}", partial(nn.Linear, 2048, 2048), (2048,), b)
        for b in (4, 16)
    ]
    cases += [
        (f"Conv2d {c} → {c}, {k}×{k}, on {h}×{h}", partial(nn.Conv2d, c, c, k, padding=k // 2), (c, h, h), 1)
        for c, h, k in KERNELS
    ]
    for name, build, shape, block in cases:
        for batch in BATCHES if len(shape) == 1 else (1, 8):
            x = torch.randn(batch, *shape)
            cells = []
            for sparsity in SPARSITIES:
                (speed,) = measure_layers(nn.Sequential(zeroed(build(), sparsity, block)), x)
                cells.append(
                    f"{speed.race.speedup:.2f}" + ("" if speed.layout == "csr" else f" ({speed.layout})")
                )
            print(f"| {name} | {batch} | " + " | ".join(cells) + " |", flush=True)


def wide_mlp(data_root: Path) -> Task:
    """784-2048-2048-10 for MNIST, untrained."""
    train, validation, test = image_loaders(*read_mnist(data_root), mean=0.1307, std=0.3081, seed=0)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10)
    )
    return Task("wide-mlp-mnist", model.eval(), train, validation, test, cross_entropy)


def trained(task: Task, epochs: int = 2) -> None:
    """Train with Adam and a rate that falls as a cosine."""
    optimizer = torch.optim.Adam(task.model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for inputs, targets in task.train:
            optimizer.zero_grad()
            cross_entropy(task.model(inputs), targets).backward()
            optimizer.step()
        schedule.step()


def mlp(data_root: Path, folder: Path) -> None:
    """Print accuracy, bytes and speed of the wide MLP by sparsity.

    It is pruned by magnitude, which takes no time; speed depends on how many weights are zero, not on which.
    """
    task = wide_mlp(data_root)
    model = task.model
    if not (folder / "mlp.safetensors").exists():
        trained(task)
        wf.save_weights(model, folder / "mlp.safetensors")
    dense_state = wf.load_weights(folder / "mlp.safetensors")
    save_dense(model, folder / "plain.safetensors")
    x, _ = next(iter(task.test))
    for sparsity in (0.0, *SPARSITIES):
        path = folder / f"mlp-{sparsity:g}.safetensors"
        model.load_state_dict(dense_state)
        if sparsity and not path.exists():
            report = wf.prune(model, [], sparsity=sparsity, criterion="magnitude", exclude=":last")
            wf.save_weights(model, path, report.masks)
        if not sparsity:
            print(f"Dense: {task.evaluate(model):.2f} % of the test images right.\n")
            print(
                "| sparsity | accuracy, % | bytes | csr, batch 1 | batch 64 | onnxruntime, batch 1 | batch 64 |"
            )
            print("|---|---|---|---|---|---|---|")
            continue
        model.load_state_dict(wf.load_weights(path))
        sparse = to_sparse(model, ["1", "3"])
        assert difference(outputs_of(sparse, x), outputs_of(model, x)) < 1e-5
        save_export(sparse, folder / "csr.safetensors")
        to_onnx(model, x[:2], folder / "model.onnx")
        size = path.stat().st_size / (folder / "plain.safetensors").stat().st_size
        cells = ratios(model, partial(outputs_of, sparse), x) + ratios(
            model, OnnxModel(folder / "model.onnx"), x
        )
        print(
            f"| {sparsity:.0%} | {task.evaluate(sparse):.2f} | {size:.3f} | " + " | ".join(cells) + " |",
            flush=True,
        )


def channels(data_root: Path, folder: Path, name: str) -> None:
    """Print accuracy, parameters and speed of a network from which channels are cut out."""
    task = load_task(name, data_root=data_root)
    dense, x = task.model.eval(), next(iter(task.test))[0]
    print(f"Dense: {task.evaluate(dense):.2f} % of the test images right.\n")
    print("| channels removed | accuracy, % | parameters | batch 1 | batch 64 |")
    print("|---|---|---|---|---|")
    for sparsity in (0.1, 0.2, 0.3, 0.5):
        path = folder / f"{name}-{sparsity:g}.safetensors"
        if not path.exists():
            model = copy.deepcopy(dense)
            pattern = wf.Channels.of(model, x[:1])
            wf.prune(
                model,
                task.train,
                task.loss,
                sparsity,
                pattern=pattern,
                params=pattern.params,
                criterion="woodfisher-block",
            )
            save_export(wf.shrink(model.eval(), x[:1]), path)
        small = load_export(dense, path)
        share = wf.cost_of(small, x[:1]).parameters / wf.cost_of(dense, x[:1]).parameters
        cells = ratios(dense, partial(outputs_of, small), x)
        print(
            f"| {sparsity:.0%} | {task.evaluate(small):.2f} | {share:.3f} | " + " | ".join(cells) + " |",
            flush=True,
        )


def ratios(dense: nn.Module, run: Callable[[Tensor], object], x: Tensor) -> list[str]:
    """Dense over sparse time for each batch size."""
    batches = [x[:batch].contiguous() for batch in BATCHES]
    return [f"{race(partial(outputs_of, dense, some), partial(run, some)).speedup:.2f}" for some in batches]


def main() -> None:
    """Run one of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("layers", "mlp", "channels"))
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("runs/shipping"), help="where weights are kept")
    parser.add_argument("--task", default="resnet20-cifar10", help="channels: a task")
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    print(f"{torch.get_num_threads()} threads", file=sys.stderr)
    if chosen.what == "layers":
        layers()
    elif chosen.what == "mlp":
        mlp(chosen.data_root, chosen.folder)
    else:
        channels(chosen.data_root, chosen.folder, chosen.task)


if __name__ == "__main__":
    main()
