"""Pictures of a tour: heat maps on one colour scale, block mass, spectra, samples. Needs the extra `plots`."""

from __future__ import annotations

import io
import math
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from woodfisher.files import write_folder
from woodfisher.results.numbers import fixed, per_cent, shortened, significant
from woodfisher.results.plots import COLOURS, INK, new_figure, plain
from woodfisher.tour import EMPIRICAL, FISHER, HESSIAN, NEGLIGIBLE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from woodfisher.gradients.layout import Layout
    from woodfisher.tour import Region, Stop, Tour

PIXELS = 170
"""Most pixels along a side of a heat map; entries beyond are pooled."""

DECADES = 5
"""Powers of ten that the colour scale covers; smaller entries are white."""

MOST_LAYERS = 8
"""Layers that pictures by layer show, the largest ones."""

LONGEST_NAME = 22
"""Letters of a layer's name that pictures have room for."""

_COLOURS = {HESSIAN: INK, FISHER: COLOURS[0], EMPIRICAL: COLOURS[2]}
_WIDTHS = {HESSIAN: 3.2, FISHER: 1.3, EMPIRICAL: 1.3}
_LAYER_COLOURS = (INK, COLOURS[0], *COLOURS[2:])
_GREY = COLOURS[1]


def plot_tour(tour: Tour, folder: str | Path) -> None:
    """Write all pictures of a tour into a folder: matrices, layers at each point, blocks, spectra and samples."""
    write_folder(Path(folder), pictures(tour))


def pictures(tour: Tour) -> dict[str, Callable[[Path], None]]:
    """File name → what writes that picture to a path."""
    layers = {
        f"layers-{number}-{re.sub(r'[^A-Za-z0-9]+', '-', stop.name).strip('-').lower()}.png": partial(
            plot_layers_of, tour, stop
        )
        for number, stop in enumerate(tour.stops, 1)
    }
    return {
        "matrices.png": partial(plot_matrices, tour),
        **layers,
        "blocks.png": partial(plot_blocks, tour),
        "spectra.png": partial(plot_spectra, tour),
        "samples.png": partial(plot_samples, tour),
    }


def plot_matrices(tour: Tour, path: Path) -> None:
    """Heat maps of the whole matrices, one row a point of training."""
    names = list(tour.stops[0].matrices)
    figure = new_figure((2.2 + 2.75 * len(names), 0.9 + 3.05 * len(tour.stops)))
    grid = figure.subplots(len(tour.stops), len(names), squeeze=False)
    norm, image = _norm(tour), None
    for row, stop in zip(grid, tour.stops, strict=True):
        for axes, name in zip(row, names, strict=True):
            image = _heat_map(axes, stop.matrices[name], norm)
            _draw_layers(axes, tour.layout, named=name == names[0])
            _caption(axes, stop.whole, name, within_layers=True)
        row[0].set_ylabel(f"{plain(stop.name)} (loss {stop.loss:.3g})", fontsize=10, labelpad=4)
    for axes, name in zip(grid[0], names, strict=True):
        axes.set_title(name, fontsize=11)
    _colour_bar(figure, image, grid)
    figure.suptitle(f"Curvature over all {tour.layout.size:,} weights, {tour.samples:,} samples", fontsize=12)
    _save(figure, path)


def plot_layers_of(tour: Tour, stop: Stop, path: Path) -> None:
    """Heat maps of the diagonal block of each layer at one point, on the colour scale of the whole tour."""
    names = list(stop.matrices)
    layers = _largest(stop.layers)
    figure = new_figure((2.0 + 2.4 * len(names), 0.9 + 2.75 * len(layers)))
    grid = figure.subplots(len(layers), len(names), squeeze=False)
    norm, image = _norm(tour), None
    for row, layer in zip(grid, layers, strict=True):
        span = tour.layout.slices[layer.name]
        for axes, name in zip(row, names, strict=True):
            image = _heat_map(axes, stop.matrices[name][span, span], norm)
            axes.set_xticks([])
            axes.set_yticks([])
            _caption(axes, layer, name, within_layers=False)
        row[0].set_ylabel(f"{_short(layer.name)} ({layer.size:,})", fontsize=10)
    for axes, name in zip(grid[0], names, strict=True):
        axes.set_title(name, fontsize=11)
    _colour_bar(figure, image, grid)
    figure.suptitle(f"Curvature within layers, {plain(stop.name)}{_which(stop.layers)}", fontsize=12)
    _save(figure, path)


def plot_blocks(tour: Tour, path: Path) -> None:
    """Share of each matrix's squared norm in diagonal blocks, against their size."""

    def draw(axes: Any, region: Region, _peers: Sequence[Region]) -> None:
        shuffled = {"color": _GREY, "linewidth": 1, "linestyle": "--", "label": "Hessian, weights shuffled"}
        axes.plot(region.block_sizes, _percents(region.by_chance[HESSIAN]), **shuffled)
        for name, mass in region.mass.items():
            axes.plot(region.block_sizes, _percents(mass), **_style(name))
        fan_in = _fan_in(tour.layout, region)
        if fan_in:
            axes.axvline(fan_in, color=_GREY, linewidth=0.8, linestyle=":", label="weights of one output")
        axes.set_xscale("log")
        axes.set_ylim(0, 104)

    title = "Share of the squared norm in diagonal blocks, %"
    _save(_curves(tour, draw, "weights in a block", title), path)


def plot_spectra(tour: Tour, path: Path) -> None:
    """Eigenvalues from the largest down, on log scales; the Hessian's negative ones by magnitude, dotted."""

    def draw(axes: Any, region: Region, peers: Sequence[Region]) -> None:
        top = max(float(values.abs().max()) for peer in peers for values in peer.eigenvalues.values())
        for name, values in region.eigenvalues.items():
            positive = values[values > 0].flip(0).tolist()
            axes.plot(range(1, len(positive) + 1), positive, **_style(name))
        negative = [-value for value in region.eigenvalues[HESSIAN].tolist() if value < 0]
        dotted = {
            "color": _COLOURS[HESSIAN],
            "linewidth": 1,
            "linestyle": ":",
            "label": "Hessian, −λ where negative",
        }
        axes.plot(range(1, len(negative) + 1), negative, **dotted)
        axes.set_xscale("log")
        if top > 0:
            axes.set_yscale("log")
            axes.set_ylim(NEGLIGIBLE * top, 3 * top)

    _save(_curves(tour, draw, "rank", "Spectra: eigenvalues λ from the largest down"), path)


def plot_samples(tour: Tour, path: Path) -> None:
    """Cosine between the Hessian and the empirical Fisher of the first few samples, by layer."""
    figure = new_figure((3.0 + 2.6 * len(tour.stops), 3.4))
    grid = figure.subplots(1, len(tour.stops), squeeze=False, sharey=True)
    powers = [count for count in tour.sample_counts if math.log10(count).is_integer()]
    ticks = powers if len(powers) > 1 else tour.sample_counts
    for axes, stop in zip(grid[0], tour.stops, strict=True):
        regions = (stop.whole, *_largest(stop.layers))
        for region, colour in zip(regions, _LAYER_COLOURS, strict=False):
            values = [math.nan if value is None else value for value in region.by_samples]
            dots = {"linewidth": 1.5, "marker": "o", "markersize": 2.5}
            axes.plot(tour.sample_counts, values, color=colour, label=_short(region.name), **dots)
        axes.set_xscale("log")
        axes.set_xticks(ticks)
        axes.minorticks_off()
        axes.set_title(plain(stop.name), fontsize=10)
        axes.set_ylim(top=1.02)
        axes.set_xlabel("samples", fontsize=9)
        _tidy(axes)
    grid[0][0].set_ylabel(f"cosine with the Hessian\nof {tour.samples:,} samples", fontsize=9)
    figure.legend(
        *grid[0][0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9
    )
    figure.suptitle("The empirical Fisher of few samples", fontsize=12)
    _save(figure, path)


def pooled(M: Tensor, pixels: int = PIXELS) -> Tensor:
    """Shrink a matrix to at most `pixels` a side: each pixel is the entry of largest magnitude under it.

    >>> pooled(torch.tensor([[1.0, -3.0], [2.0, 0.0]]), pixels=1)
    tensor([[-3.]])
    """
    factor = -(-len(M) // pixels)
    if factor == 1:
        return M
    magnitudes = M.abs()[None, None]
    _, index = torch.nn.functional.max_pool2d(magnitudes, factor, ceil_mode=True, return_indices=True)
    return M.flatten()[index[0, 0]]


def ends(eigenvalues: Tensor) -> tuple[float, float]:
    """Smallest and largest eigenvalue, where rounding counts as zero."""
    low, high = float(eigenvalues[0]), float(eigenvalues[-1])
    least = NEGLIGIBLE * max(-low, high)
    return (low if abs(low) > least else 0.0), (high if abs(high) > least else 0.0)


def _norm(tour: Tour) -> Any:
    """The colour scale of a whole tour: steps at 1, 2, 5 times powers of ten on both sides of zero."""
    from matplotlib.colors import BoundaryNorm

    top = max(float(M.abs().max()) for stop in tour.stops for M in stop.matrices.values()) or 1.0
    power = math.floor(math.log10(top))
    steps = [factor * 10.0**p for p in range(power - DECADES - 1, power + 2) for factor in (1, 2, 5)]
    last = next(index for index, step in enumerate(steps) if step >= top)
    steps = steps[last - 3 * DECADES : last + 1]
    return BoundaryNorm([*(-step for step in reversed(steps)), *steps], 256)


def _heat_map(axes: Any, M: Tensor, norm: Any) -> Any:
    image = pooled(M).cpu().numpy()
    return axes.imshow(
        image,
        norm=norm,
        cmap="RdBu_r",
        interpolation="nearest",
        extent=(0, len(M), len(M), 0),
        aspect="equal",
    )


def _draw_layers(axes: Any, layout: Layout, *, named: bool) -> None:
    """Lines between layers, and their names at the left where they have room."""
    axes.set_xticks([])
    axes.set_yticks([])
    for span in list(layout.slices.values())[1:]:
        axes.axhline(span.start, color="#444444", linewidth=0.5)
        axes.axvline(span.start, color="#444444", linewidth=0.5)
    if not named:
        return
    room = layout.size / 22
    names = [
        (name, (span.start + span.stop) / 2)
        for name, span in layout.slices.items()
        if span.stop - span.start >= room
    ]
    axes.set_yticks([middle for _, middle in names], [_short(name) for name, _ in names], fontsize=8)
    axes.tick_params(length=0)


def _caption(axes: Any, region: Region, name: str, *, within_layers: bool) -> None:
    """The numbers under a heat map."""
    mass = region.mass[name]
    diagonal = f"{per_cent(mass[0])} on the diagonal" if mass[0] is not None else "all zero"
    layers = f", {per_cent(mass[-1])} in layers" if within_layers and mass[-1] is not None else ""
    if name == HESSIAN:
        first = "λ from {} to {}".format(*(significant(value, 2) for value in ends(region.eigenvalues[name])))
    else:
        comparison = region.between(name, HESSIAN)
        first = (
            "no cosine"
            if comparison.cosine is None
            else f"cosine {fixed(comparison.cosine)}, best scale {significant(comparison.scale)}"
        )
    axes.set_xlabel(f"{first}\n{diagonal}{layers}", fontsize=8)


def _colour_bar(figure: Any, image: Any, grid: Any) -> None:
    bar = figure.colorbar(image, ax=grid, shrink=min(1.0, 0.9 / len(grid) + 0.1), aspect=30, pad=0.02)
    powers = [float(b) for b in image.norm.boundaries if abs(math.remainder(math.log10(abs(b)), 1)) < 1e-9]
    bar.set_ticks(powers, labels=[f"{power:g}".replace("-", "−", power < 0) for power in powers])
    bar.ax.minorticks_off()
    bar.set_label("entry (of largest magnitude under a pixel)", fontsize=9)
    bar.ax.tick_params(labelsize=8)


def _regions(tour: Tour) -> list[list[Region]]:
    """For each picture row, the region at every point: the whole first, then layers."""
    shown = [None, *(layer.name for layer in _largest(tour.stops[0].layers))]
    return [
        [
            stop.whole if name is None else next(r for r in stop.layers if r.name == name)
            for stop in tour.stops
        ]
        for name in shown
    ]


def _curves(tour: Tour, draw: Callable[[Any, Region, Sequence[Region]], None], label: str, title: str) -> Any:
    """A figure of one small panel a region and point: points side by side, or regions where there is one point."""
    regions = _regions(tour)
    several = len(tour.stops) > 1
    columns = len(tour.stops) if several else 3
    panels = [(region, row) for row in regions for region in row]
    rows = -(-len(panels) // columns)
    width = 1.2 + 2.5 * columns
    figure = new_figure((width, 1.2 + 1.6 * rows))
    grid = figure.subplots(rows, columns, squeeze=False, sharey="row" if several else False)
    for index, axes in enumerate(grid.flat):
        if index >= len(panels):
            axes.set_visible(False)
            continue
        region, peers = panels[index]
        draw(axes, region, peers)
        _tidy(axes)
        heading = f"{_short(region.name)} ({region.size:,})"
        if not several:
            axes.set_title(heading, fontsize=9)
        elif index % columns == 0:
            axes.set_ylabel(heading, fontsize=9)
        if index + columns >= len(panels):
            axes.set_xlabel(label, fontsize=9)
    for axes, stop in zip(grid[0], tour.stops if several else (), strict=False):
        axes.set_title(plain(stop.name), fontsize=10)
    entries: dict[str, Any] = {}
    for axes in grid.flat:
        entries.update((text, handle) for handle, text in zip(*axes.get_legend_handles_labels(), strict=True))
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=int(width / 1.7),
        frameon=False,
        fontsize=9,
    )
    figure.suptitle(title if several else f"{title} ({plain(tour.stops[0].name)})", fontsize=12)
    return figure


def _tidy(axes: Any) -> None:
    axes.xaxis.set_major_formatter("{x:g}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=8)


def _style(matrix: str) -> dict[str, Any]:
    return {"color": _COLOURS[matrix], "linewidth": _WIDTHS[matrix], "label": matrix}


def _percents(shares: Sequence[float | None]) -> list[float]:
    return [math.nan if share is None else 100 * share for share in shares]


def _save(figure: Any, path: Path) -> None:
    """Write with a palette: heat maps take a third of the room."""
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    with Image.open(drawn) as picture:
        picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, format="png", optimize=True)


def _largest(layers: Sequence[Region]) -> list[Region]:
    """The layers that are shown, in their order."""
    names = {layer.name for layer in sorted(layers, key=lambda layer: -layer.size)[:MOST_LAYERS]}
    return [layer for layer in layers if layer.name in names]


def _which(layers: Sequence[Region]) -> str:
    return f" (the {MOST_LAYERS} largest of {len(layers)})" if len(layers) > MOST_LAYERS else ""


def _fan_in(layout: Layout, region: Region) -> int | None:
    """Weights of one output, where they lie side by side in the flat order."""
    shape = layout.shapes.get(region.name, ())
    fan_in = torch.Size(shape[1:]).numel()
    return fan_in if len(shape) > 1 and fan_in > 1 and region.name not in layout.transposed else None


def _short(name: str) -> str:
    """A layer's name without the ending that all have, and no longer than there is room for."""
    return plain(shortened(name.removesuffix(".weight"), LONGEST_NAME))
