"""Pictures of results. Needs the extra `plots`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from woodfisher.errors import extra
from woodfisher.results.numbers import score

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from woodfisher.bench import Bench
    from woodfisher.pruning.report import Layer
    from woodfisher.training.gradual import Trained

INK = "#222222"
"""Of lines that belong to no method."""

COLOURS = ("#1b6ca8", "#9aa3ad", "#c8553d", "#588157", "#8d6a9f", "#d9a441", "#3d5a80", "#7f5539", "#2a9d8f")
"""Of methods, in their order."""


_MARKERS = "oDs^vPX"


def require_plots() -> None:
    """Raise, before any work, where matplotlib is missing."""
    new_figure((1, 1))


def plot_layers(layers: Mapping[str, Sequence[Layer]], overall: float, path: Path) -> None:
    """Bars of every layer's sparsity, one colour a method, with the sparsity of the whole as a line.

    Parameters
    ----------
    layers:
        Method → its layers; the same layers in the same order for each.
    overall:
        Sparsity of all layers together, which a uniform choice would give each.
    """
    names = [
        plain(f"{layer.name.removesuffix('.weight')}  ({layer.size:,})")
        for layer in next(iter(layers.values()))
    ]
    height = 0.8 / len(layers)
    figure, axes = _figure((7.2, 1.6 + 0.34 * len(names)))
    for row, (method, rows) in enumerate(layers.items()):
        positions = [index + (row + 0.5) * height - 0.4 for index in range(len(rows))]
        values = [100 * layer.sparsity for layer in rows]
        axes.barh(positions, values, height * 0.92, label=method, color=COLOURS[row % len(COLOURS)])
    axes.axvline(100 * overall, color=INK, linewidth=1, linestyle="--", label=f"whole: {overall:.1%}")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("sparsity, %")
    figure.suptitle("Weights removed from each layer (its size)", fontsize=11)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def plot_accuracy(
    curves: Mapping[str, Sequence[tuple[float, float, float | None]]], dense: float, metric: str, path: Path
) -> None:
    """Lines of the metric against sparsity, one for each method, with the dense model's as a line.

    Each is thinner than the ones that it may hide.

    Parameters
    ----------
    curves:
        Method → (sparsity, mean of the metric, its standard deviation or None).
    """
    figure, axes = _figure((7.2, 4.4))
    for row, (method, points) in enumerate(curves.items()):
        if not points:
            axes.plot([], [], " ", label=f"{method}: failed")
            continue
        above = 1 - row / len(curves)
        sparsities, values, spreads = zip(*sorted(points), strict=True)
        axes.errorbar(
            [100 * s for s in sparsities],
            values,
            [spread or 0.0 for spread in spreads],
            capsize=2,
            marker=_MARKERS[row % len(_MARKERS)],
            markersize=3 + 3 * above,
            linewidth=1 + 1.5 * above,
            label=method,
            color=COLOURS[row % len(COLOURS)],
            linestyle="-" if row < len(COLOURS) else "--",
        )
    axes.axhline(dense, color=INK, linewidth=1, linestyle="--", label=f"dense: {score(dense, metric)}")
    axes.set_xlabel("sparsity, %")
    axes.set_ylabel(plain(metric))
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def plot_training(trained: Trained, metric: str, path: Path) -> None:
    """Sparsity and the validation metric over the steps of the optimizer, with the best epoch marked."""
    figure, axes = _figure((7.2, 4.4))
    steps = [0, *(removal.step for removal in trained.history), trained.epochs[-1].step]
    sparsities = [0.0, *(removal.sparsity for removal in trained.history), trained.sparsity]
    axes.step(
        steps, [100 * s for s in sparsities], where="post", color=COLOURS[1], linewidth=1.5, label="sparsity"
    )
    axes.set_xlabel("steps of the optimizer")
    axes.set_ylabel("sparsity, %")
    axes.set_ylim(0, 100)
    right = axes.twinx()
    right.spines["top"].set_visible(False)
    right.plot(
        [epoch.step for epoch in trained.epochs],
        [epoch.validation for epoch in trained.epochs],
        color=COLOURS[0],
        marker="o",
        markersize=3,
        label="validation",
    )
    right.plot(
        [trained.best.step],
        [trained.best.validation],
        "*",
        color=COLOURS[2],
        markersize=12,
        label="best epoch",
    )
    right.axhline(trained.dense, color=INK, linewidth=1, linestyle="--", label="dense")
    right.set_ylabel(metric)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def plot_roofline(bench: Bench, path: Path) -> None:
    """Counted GFLOP/s of every case against its operations for each byte of the rows, under the machine's two roofs.

    Peers stand at the same intensity, at the same count over their own time.
    """
    figure, axes = _figure((7.2, 5.2))
    cases = [m.case for m in bench.measurements]
    rate, bandwidth = bench.matrix_rate / 1e9, bench.bandwidth / 1e9
    ridge = rate / bandwidth
    left = min(ridge, *(case.intensity for case in cases)) / 4
    right = max(ridge, *(case.intensity for case in cases)) * 4
    axes.plot([left, ridge, right], [bandwidth * left, rate, rate], color=INK, linewidth=1.2)
    axes.text(right, rate * 1.08, f"float32 matrix product, {rate:.0f} GFLOP/s", ha="right", fontsize=8)
    axes.text(left, bandwidth * left / 1.25, f"copy, {bandwidth:.0f} GB/s", va="top", fontsize=8)
    series = {"woodfisher": [m.rate.median for m in bench.measurements]}
    for peers in zip(*(m.peers for m in bench.measurements), strict=True):
        series[peers[0].name] = [case.flops / p.seconds.median for case, p in zip(cases, peers, strict=True)]
    handles = []
    for row, (name, rates) in enumerate(series.items()):
        style = {"marker": "oDs^"[row % 4], "markersize": 5 if row else 10, "color": COLOURS[row]}
        points = [r / 1e9 for r in rates]
        handles += axes.plot([case.intensity for case in cases], points, linestyle="", label=name, **style)
    for number, (case, r) in enumerate(zip(cases, series["woodfisher"], strict=True), start=1):
        where = (case.intensity, r / 1e9)
        axes.annotate(f"{number}", where, ha="center", va="center_baseline", fontsize=7, color="white")
        axes.plot([], [], linestyle="", marker=f"${number}$", color=INK, label=str(case))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("counted operations for each byte of the rows")
    axes.set_ylabel("GFLOP/s")
    axes.grid(alpha=0.25)
    axes.legend(handles=axes.get_lines()[-len(cases) :], fontsize=8, framealpha=0.8)
    figure.suptitle("Factor and score", fontsize=11)
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def plain(text: str) -> str:
    """Text of a user's as it is, where matplotlib would take what stands between dollars for mathematics."""
    return text.replace("$", r"\$")


def new_figure(size: tuple[float, float]) -> Any:
    """An empty figure of that size in inches."""
    with extra("plots", "pictures need matplotlib"):
        from matplotlib.figure import Figure
    return Figure(figsize=size, layout="constrained")


def _figure(size: tuple[float, float]) -> tuple[Any, Any]:
    figure = new_figure(size)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
