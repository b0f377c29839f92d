"""What a report tells of a network beside what pruning did to it: FLOPs and curvature, layer by layer."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from woodfisher.curvature import WoodFisher
from woodfisher.errors import WoodfisherError, WoodfisherWarning

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from woodfisher.curvature import Estimator
    from woodfisher.gradients.objective import Objective

ROWS = 128
"""Most gradient rows that a spectrum is made of."""

LEAST_SPECTRUM_ROWS = 8
"""Rows below which one says nothing."""

ROW_MEMORY = 256 * 2**20
"""Bytes of rows that are held at a time, but for those of a single layer."""

QUANTILES = 33


@dataclass(frozen=True)
class LayerSpectrum:
    """Eigenvalues of one layer's diagonal block of the empirical Fisher, without damping, that can be above zero.

    Attributes
    ----------
    name, weights:
        Of the layer; weights that it has left, which take part.
    mean:
        Mean diagonal entry, the trace divided by `weights`.
    rank:
        Effective rank (Σe)² / Σe², the number of equal eigenvalues that would spread as much.
    eigenvalues:
        The 33 at evenly spaced ranks from the largest to the smallest, or all where there are fewer.
    """

    name: str
    weights: int
    mean: float
    rank: float
    eigenvalues: list[float]


@dataclass(frozen=True)
class Spectrum:
    """The curvature's spectrum by layer, estimated from `rows` gradients of single samples."""

    rows: int
    labels: str
    layers: list[LayerSpectrum]


@dataclass(frozen=True)
class Examination:
    """What was found of a network, and why the rest was not.

    Attributes
    ----------
    flops:
        Name → FLOPs of a sample in that layer with all of its weights, of which every weight has an equal part.
    spectrum:
        Of the curvature at the weights as they are.
    missing:
        `flops` or `spectrum` → why it is None.
    """

    flops: dict[str, int] | None
    spectrum: Spectrum | None
    missing: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


def examine(objective: Objective, curvature: Estimator) -> Examination:
    """Look at the network of an objective, at its weights; what can't be found is no failure.

    Only a `WoodFisher` has a spectrum here. It is taken from at most 128 gradients of single samples, whatever the
    estimator's own number.
    """
    flops = spectrum = None
    missing = {}
    try:
        flops = flops_by_layer(objective)
    except WoodfisherError as error:
        missing["flops"] = str(error)
    try:
        if not isinstance(curvature, WoodFisher):
            raise WoodfisherError(
                f"{type(curvature).__name__} is no Fisher made of gradient rows, and its spectrum is not looked at."
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", WoodfisherWarning)
            spectrum = spectrum_by_layer(objective, curvature.labels)
    except WoodfisherError as error:
        missing["spectrum"] = str(error)
    return Examination(flops, spectrum, missing)


def flops_by_layer(objective: Objective) -> dict[str, int]:
    """Name → FLOPs of a sample that all weights of that name take part in; raises where they can't be counted."""
    return {name: int(part.sum()) for name, part in objective.layout.split(objective.flops()).items()}


def spectrum_by_layer(objective: Objective, labels: Literal["data", "model"] = "data") -> Spectrum:
    """Eigenvalues of each layer's (1/N) GᵀG from those of its Gram matrix GGᵀ/N, float64 `N × N` (docs/method.md §3).

    Layers are taken together as far as `ROW_MEMORY` holds their rows; each such part takes a pass over the samples,
    and N is less than `ROWS` where a single layer would not fit.

    Raises
    ------
    WoodfisherError
        Where rows can't be taken, or a layer is so large that fewer than `LEAST_SPECTRUM_ROWS` fit.
    """
    layout = objective.layout
    fit = ROW_MEMORY // (max(layout.sizes) * objective.weights.element_size())
    known = objective.known_samples()
    samples = min(ROWS, fit, ROWS if known is None else known)
    if samples < LEAST_SPECTRUM_ROWS:
        raise WoodfisherError(
            f"a spectrum takes {LEAST_SPECTRUM_ROWS} gradient rows at least; for the largest layer {fit} fit into "
            f"{ROW_MEMORY / 2**20:.0f} MiB"
            + ("." if known is None else f", and the data has {known} samples.")
        )
    found, rows = [], 0
    for names in _parts(objective, samples):
        columns = torch.arange(
            layout.slices[names[0]].start, layout.slices[names[-1]].stop, device=objective.device
        )
        G = objective.rows(samples, labels=labels, columns=columns)
        rows = len(G)
        for name in names:
            where = layout.slices[name]
            weights = int(objective.kept[where].sum())
            block = G[:, where.start - int(columns[0]) : where.stop - int(columns[0])].double()
            found.append(_layer_spectrum(name, weights, block @ block.mT / rows))
    return Spectrum(rows, labels, found)


def _parts(objective: Objective, samples: int) -> Iterator[list[str]]:
    """Neighbouring layers whose rows fit together, each part in turn."""
    row = objective.weights.element_size()
    part: list[str] = []
    held = 0
    for name, size in zip(objective.layout.shapes, objective.layout.sizes, strict=True):
        if part and held + samples * size * row > ROW_MEMORY:
            yield part
            part, held = [], 0
        part.append(name)
        held += samples * size * row
    yield part


def _layer_spectrum(name: str, weights: int, gram: Tensor) -> LayerSpectrum:
    e = torch.linalg.eigvalsh(gram).clamp(min=0).flip(0)[: max(weights, 1)]
    ranks = torch.linspace(0, len(e) - 1, min(QUANTILES, len(e)), dtype=torch.float64).round().long()
    total, squares = float(e.sum()), float(e.square().sum())
    return LayerSpectrum(
        name,
        weights,
        mean=total / max(weights, 1),
        rank=total**2 / squares if squares else 0.0,
        eigenvalues=e[ranks].tolist(),
    )
