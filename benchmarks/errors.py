"""Errors of F⁻¹ against float64 on real gradient rows, beside those of the float32 recursion.

    python benchmarks/errors.py --data-root DIR > docs/accuracy.md

Rows are gradients of MLPNet on MNIST. For blocks up to 2000 weights the truth is the dense float64 matrix of the
2000 weights of the first layer with the largest gradients; for the whole layer (31,360 weights) it is the
recursion itself in float64, kept as rows. A second table goes to smaller damping, on the
weights of the second layer that have any gradient.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch import Tensor

from woodfisher import Objective, WoodFisher
from woodfisher.tasks import load_task

DAMPINGS = (1e-8, 1e-5, 1e-3, 1e-1)
BLOCKS = (1, 50, 500, 2000, 31360)
ROWS = (1, 100, 1000)

HEAD = """\
# Accuracy of the inverse

`python benchmarks/errors.py --data-root DIR > docs/accuracy.md` measured these on gradient rows of MLPNet on MNIST
(float32 rows; {torch}). Errors are relative: of the diagonal by norm and for the worst entry, of the product with
a random vector, and of the product with a gradient row, the hardest, which the inverse shrinks most. On the right
stands the diagonal from the paper's rank-one recursion in float32 on the same rows, and the share of its entries
that are not positive (an inverse Fisher has none) or not numbers (no NaN came out on these rows).

## First layer

{columns}"""

COLUMNS = """\
| λ | block | rows | diag, norm | diag, worst entry | F⁻¹v, random | F⁻¹v, gradient row | float32 recursion: diag, norm | not positive or NaN |
|---|---|---|---|---|---|---|---|---|"""  # noqa: E501

SECOND = """
## Second layer, less damping

The weights of the second layer that have any gradient. Here the float32 recursion loses its digits, and
its diagonal the sign: such weights would be scored by a negative or an infinite rise of the loss.
"""


def recursion(G: Tensor, damping: float) -> Tensor:
    """F⁻¹ of one block by Sherman–Morrison in the dtype of the rows `(N, B)`."""
    N, B = G.shape
    inverse = torch.eye(B, dtype=G.dtype) / damping
    for g in G:
        u = inverse @ g
        inverse -= torch.outer(u, u / (N + g @ u))
    return inverse


def recursion_as_rows(G: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The same recursion kept as u_n = F_n⁻¹g_n and N + g_nᵀu_n, without the B×B matrix."""
    N = len(G)
    U, scale = torch.zeros_like(G), torch.zeros(N, dtype=G.dtype)
    for n, g in enumerate(G):
        U[n] = g / damping - (U[:n] @ g / scale[:n]) @ U[:n]
        scale[n] = N + g @ U[n]
    return U, scale


def truth(G: Tensor, damping: float, V: Tensor) -> tuple[Tensor, Tensor]:
    """Diagonal of F⁻¹ and F⁻¹V of one block in float64."""
    N, B = G.shape
    if B > 2000:
        U, scale = recursion_as_rows(G, damping)
        return 1 / damping - (U.square() / scale[:, None]).sum(0), V / damping - U.T @ (
            (U @ V) / scale[:, None]
        )
    F = damping * torch.eye(B, dtype=torch.float64) + G.T @ G / N
    return torch.linalg.inv(F).diagonal(), torch.linalg.solve(F, V)


def measure(G: Tensor, B: int, damping: float) -> str:
    """One row of the table."""
    N, d = G.shape
    V = torch.stack([torch.randn(d, dtype=torch.float64), G[0].double()], dim=1)
    finv = WoodFisher(N, B, damping).of_rows(G)
    exact, products, single = [], [], []
    for block, v in zip(G.split(B, dim=1), V.split(B), strict=True):
        diagonal, product = truth(block.double(), damping, v)
        exact.append(diagonal)
        products.append(product)
        if B > 2000:
            U, scale = recursion_as_rows(block, damping)
            single.append(1 / damping - (U.square() / scale[:, None]).sum(0))
        else:
            single.append(recursion(block, damping).diagonal())
    diagonal, product, by_recursion = torch.cat(exact), torch.cat(products), torch.cat(single)
    error = finv.diag() - diagonal
    apart = (finv @ V - product).norm(dim=0) / product.norm(dim=0)
    off = float((by_recursion - diagonal).norm() / diagonal.norm())
    wrong = float((~(by_recursion > 0)).double().mean())
    cells = [
        f"{damping:.0e}",
        "layer" if B > 2000 else f"{B}",
        f"{N}",
        f"{float(error.norm() / diagonal.norm()):.1e}",
        f"{float((error / diagonal).abs().max()):.1e}",
        f"{float(apart[0]):.1e}",
        f"{float(apart[1]):.1e}",
        "NaN" if off != off else f"{off:.1e}",
        f"{wrong:.1%}" if wrong else "",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, default=os.environ.get("WOODFISHER_DATA"))
    task = load_task("mlpnet-mnist", data_root=parser.parse_args().data_root)
    torch.manual_seed(0)
    rows = Objective(task.model, task.train, task.loss, params="fc1").rows(max(ROWS))
    second = Objective(task.model, task.train, task.loss, params="fc2").rows(max(ROWS))
    live = second.any(dim=0).nonzero().squeeze(1)
    second = second[:, live[: len(live) // 50 * 50]]
    busiest = rows.square().sum(0).topk(2000).indices.sort().values
    print(HEAD.format(torch=f"torch {torch.__version__.split('+')[0]}", columns=COLUMNS))
    for damping in DAMPINGS:
        for B in BLOCKS:
            for N in ROWS:
                G = rows[:N] if B > 2000 else rows[:N, busiest]
                print(measure(G.contiguous(), B, damping), flush=True)
    print(SECOND)
    print(COLUMNS)
    for damping in (1e-6, 1e-8, 1e-10, 1e-12, 1e-14):
        for B in (50, second.shape[1]):
            print(measure(second, B, damping), flush=True)


if __name__ == "__main__":
    main()
