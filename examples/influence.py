"""The inverse Fisher without pruning: the training samples that a prediction owes its loss to.

    python examples/influence.py            # a convex model and a network, some minutes
    python examples/influence.py --small    # few samples, some seconds

A model is trained to the minimum of (1/n) Σ ℓᵢ(w) + ½ λ ‖w‖². Without the samples of a set S the minimum moves, to
first order, by F⁻¹ Σ_S ∇ℓᵢ / n, where F is the curvature at the minimum, weight decay included. So the loss ℓ of a
prediction changes by

    ∇ℓᵀ F⁻¹ Σ_S ∇ℓᵢ / n          (Koh and Liang, Understanding Black-box Predictions via Influence Functions, ICML 2017)

One inverse-Fisher-vector product, `finv @ gradient`, gives it for all training samples at once. The damping of the
operator is the weight decay: nothing has to be made up. This script predicts changes in that way. Then it leaves the
samples out, trains again, and compares: by the correlation of predicted and actual changes, and by the share of the
actual change that is predicted.
"""

from __future__ import annotations

import argparse
import copy

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import woodfisher as wf

DECAY = 1e-2

Samples = tuple[Tensor, Tensor]
"""Images `(n, 64)`, float64, and their digits `(n,)`."""


def read_data(count: int) -> tuple[Samples, Samples]:
    """Scikit-learn's digits, scaled to mean 0 and variance 1: `count` to train on, all others for the test."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    inputs = (torch.from_numpy(pixels)[order] - pixels.mean()) / pixels.std()
    targets = torch.from_numpy(labels)[order].long()
    return (inputs[:count], targets[:count]), (inputs[count:], targets[count:])


def fit(model: nn.Module, train: Samples, left_out: Tensor | None = None) -> None:
    """Minimise (1/n) Σ ℓᵢ + ½ λ ‖w‖² from where the model is; n counts all samples, also those left out."""
    inputs, targets = train
    keep = torch.ones(len(targets), dtype=torch.bool)
    if left_out is not None:
        keep[left_out] = False
    parameters = list(model.parameters())
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=3000, tolerance_grad=1e-8, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        fitted = cross_entropy(model(inputs[keep]), targets[keep], reduction="sum") / len(targets)
        value = fitted + DECAY / 2 * sum(parameter.square().sum() for parameter in parameters)
        value.backward()
        return value

    optimizer.step(loss)


def losses(model: nn.Module, tests: list[Samples]) -> Tensor:
    """Mean loss on each of the test sets: `(len(tests),)`."""
    with torch.no_grad():
        return torch.stack([cross_entropy(model(inputs), targets) for inputs, targets in tests])


# --8<-- [start:influence]
def influence(model: nn.Module, train: Samples, tests: list[Samples], curvature: object) -> Tensor:
    """What leaving out each training sample adds to the loss on each test set, predicted: `(n, len(tests))`."""
    n = len(train[1])
    objective = wf.Objective(model, [train], cross_entropy, params="*")
    finv = curvature(objective)
    gradients = torch.stack([objective.on([test]).gradient(len(test[1])) for test in tests], dim=1)
    return objective.rows(n) @ (finv @ gradients) / n
    # --8<-- [end:influence]


def measure(
    start: nn.Module, full: nn.Module, train: Samples, tests: list[Samples], sets: list[Tensor]
) -> Tensor:
    """The same for sets of samples, by leaving them out and training from `start`: `(len(sets), len(tests))`."""
    before, changes = losses(full, tests), []
    for left_out in sets:
        model = copy.deepcopy(start)
        fit(model, train, left_out)
        changes.append(losses(model, tests) - before)
    return torch.stack(changes)


def agreement(predicted: Tensor, actual: Tensor) -> tuple[float, float]:
    """Correlation, and the share of the actual change that is predicted (least squares through the origin)."""
    correlation = torch.corrcoef(torch.stack([predicted, actual]))[0, 1]
    return float(correlation), float(predicted @ actual / (actual @ actual))


def curvatures(n: int, draws: int) -> dict[str, object]:
    """From the exact one to none; each says with its damping that the loss has weight decay."""
    full = wf.WoodFisher(samples=n, block_size=None, damping=DECAY)
    return {
        "exact Hessian": wf.ExactHessian(samples=n, damping=DECAY),
        f"Fisher, {draws} draws a sample": lambda objective: wf.WoodFisher(
            samples=draws * n, block_size=None, damping=DECAY, labels="model"
        )(objective.on(objective.data * draws)),
        "empirical Fisher": full,
        "empirical Fisher, blocks of 64": wf.WoodFisher(samples=n, block_size=64, damping=DECAY),
        "its diagonal": wf.DiagonalFisher(samples=n, damping=DECAY),
        "none (inner product of gradients)": wf.Identity(),
    }


def compare(
    name: str,
    start: nn.Module,
    train: Samples,
    test: Samples,
    sizes: dict[int, int],
    draws: int,
    *,
    again: bool = False,
) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Predict and measure for random sets (size → how many): from the minimum and, with `again`, from the start."""
    n = len(train[1])
    full = copy.deepcopy(start)
    fit(full, train)
    with torch.no_grad():
        outputs = full(test[0])
    hardest = int(cross_entropy(outputs, test[1], reduction="none").argmax())
    tests = [(test[0][[hardest]], test[1][[hardest]]), test]
    generator = torch.Generator().manual_seed(1)
    sets = {
        size: [torch.randperm(n, generator=generator)[:size] for _ in range(count)]
        for size, count in sizes.items()
    }
    weights = sum(parameter.numel() for parameter in full.parameters())
    accuracy = 100 * (outputs.argmax(1) == test[1]).double().mean()
    print(f"\n{name}: {weights} weights, {n} training samples, test accuracy {accuracy:.2f} %")
    starts = {"trained on from the minimum": full}
    if again:
        starts["trained again from the start"] = start
    torch.manual_seed(0)  # labels="model" draws targets
    predictions = {
        kind: influence(full, train, tests, curvature) for kind, curvature in curvatures(n, draws).items()
    }
    results = {}
    for how, origin in starts.items():
        print(f"\n  {how}: correlation with what is predicted (share of it that is predicted)")
        heads = [f"{what}, {size} out" for what in ("one image", "test loss") for size in sizes]
        print(f"  {'curvature':<34}" + "".join(f"{head:>20}" for head in heads))
        actual = {size: measure(origin, full, train, tests, chosen) for size, chosen in sets.items()}
        for kind, each in predictions.items():
            cells = []
            for which in range(len(tests)):
                for size, chosen in sets.items():
                    predicted = torch.stack([each[left_out, which].sum() for left_out in chosen])
                    cells.append(agreement(predicted, actual[size][:, which]))
            print(f"  {kind:<34}" + "".join(f"{r:>13.3f} ({share:.2f})" for r, share in cells))
            results[how, kind] = cells
    return results


def main(arguments: list[str] | None = None) -> dict[str, dict]:
    """Compare for a convex model, whose minimum is unique, and for a network."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="few samples, some seconds")
    small = parser.parse_args(arguments).small
    train, test = read_data(200 if small else 1400)
    sizes = {1: 8, 10: 8} if small else {1: 40, 70: 40}
    hidden, draws = (3, 4) if small else (16, 16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        convex = nn.Linear(64, 10).double()
        network = nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 10)).double()
    return {
        "logistic regression": compare("logistic regression", convex, train, test, sizes, draws),
        "network": compare(
            "network", network, train, test, {10: 4} if small else {1: 24, 70: 24}, draws, again=True
        ),
    }


if __name__ == "__main__":
    main()
