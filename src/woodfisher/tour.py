"""A tour of a small model's curvature: Hessian, Fisher and empirical Fisher, side by side (docs/tour.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import combinations, count, takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from woodfisher._version import __version__
from woodfisher.checks import check_count
from woodfisher.curvature.hessian import exact_hessian
from woodfisher.errors import UnknownDistributionError, WoodfisherError
from woodfisher.gradients.batches import check_data, samples_in, take
from woodfisher.gradients.layout import Layout
from woodfisher.gradients.objective import Objective
from woodfisher.memory import Budget
from woodfisher.watch import phase, report_progress, warn, watching

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from woodfisher.gradients.batches import Batch
    from woodfisher.watch import Progress

HESSIAN, FISHER, EMPIRICAL = "Hessian", "Fisher", "empirical Fisher"

NEGLIGIBLE = 1e-6
"""Share of the largest eigenvalue below which one is rounding (of float32 models)."""


@dataclass(frozen=True)
class Comparison:
    """How well one matrix F stands for another, H.

    Attributes
    ----------
    matrix, target:
        Names of F and of H.
    cosine:
        ⟨F, H⟩ / (‖F‖ ‖H‖) over their entries; √(1 − cosine²) is the relative error at the best scale. None where one
        of them is zero.
    scale:
        The s that minimises ‖H − sF‖, which is ⟨F, H⟩ / ‖F‖²; None where F is zero.
    """

    matrix: str
    target: str
    cosine: float | None
    scale: float | None


@dataclass(frozen=True)
class Region:
    """Numbers of the matrices over all weights, or of their diagonal blocks of one layer.

    Attributes
    ----------
    name, size:
        Of the layer; "whole" for all weights.
    comparisons:
        Each Fisher with the Hessian, and the two with each other.
    block_sizes:
        Growing sizes of blocks, cut in flat order and within layers, as the paper's are; the last is the largest layer.
    mass:
        Matrix → share of ‖·‖² (squared Frobenius norm) in the diagonal blocks of each size; None where it is zero.
    by_chance:
        The same, expected if the weights stood in random order.
    eigenvalues:
        Matrix → its spectrum, ascending, float64 `(size,)`.
    by_samples:
        Cosine between the Hessian of all samples and the empirical Fisher of the first few, as in
        `Tour.sample_counts`.
    """

    name: str
    size: int
    comparisons: tuple[Comparison, ...]
    block_sizes: tuple[int, ...]
    mass: Mapping[str, tuple[float | None, ...]]
    by_chance: Mapping[str, tuple[float | None, ...]]
    eigenvalues: Mapping[str, Tensor] = field(repr=False)
    by_samples: tuple[float | None, ...]

    def between(self, matrix: str, target: str) -> Comparison:
        """The comparison of `matrix` with `target`."""
        return next(c for c in self.comparisons if (c.matrix, c.target) == (matrix, target))

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it, with the spectrum in a few numbers."""
        return {
            "name": self.name,
            "size": self.size,
            "comparisons": [asdict(comparison) for comparison in self.comparisons],
            "block_sizes": list(self.block_sizes),
            "mass": {name: list(shares) for name, shares in self.mass.items()},
            "by_chance": {name: list(shares) for name, shares in self.by_chance.items()},
            "spectrum": {name: spectrum_summary(values) for name, values in self.eigenvalues.items()},
            "by_samples": list(self.by_samples),
        }


@dataclass(frozen=True)
class Stop:
    """The curvature at one point of training.

    Attributes
    ----------
    name:
        Of the point.
    loss:
        Mean loss over the samples.
    matrices:
        `Hessian`, `Fisher` (where the model's distribution is known) and `empirical Fisher`, float64 `(d, d)`.
    whole, layers:
        Their numbers.
    """

    name: str
    loss: float
    matrices: Mapping[str, Tensor] = field(repr=False)
    whole: Region
    layers: tuple[Region, ...]

    @property
    def regions(self) -> tuple[Region, ...]:
        """The whole, then every layer."""
        return (self.whole, *self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The numbers without the matrices, as JSON takes it."""
        return {
            "name": self.name,
            "loss": self.loss,
            "regions": [region.to_dict() for region in self.regions],
        }


@dataclass(frozen=True)
class Tour:
    """What `tour` saw.

    Attributes
    ----------
    layout:
        The chosen weights, in the order of the matrices' rows.
    samples:
        Samples that the loss is the mean over.
    sample_counts:
        Numbers of samples that `Region.by_samples` is for.
    stops:
        One a point of training, in the order given.
    seconds:
        Wall-clock time in all.
    warnings:
        Every fallback and warning on the way.
    """

    layout: Layout
    samples: int
    sample_counts: tuple[int, ...]
    stops: tuple[Stop, ...]
    seconds: float
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The numbers without the matrices, as JSON takes it."""
        return {
            "woodfisher": __version__,
            "size": self.layout.size,
            "samples": self.samples,
            "sample_counts": list(self.sample_counts),
            "stops": [stop.to_dict() for stop in self.stops],
            "seconds": {"total": self.seconds},
            "warnings": list(self.warnings),
        }


def tour(
    model: nn.Module | Mapping[str, nn.Module],
    data: Iterable[Batch],
    loss: Callable[[Any, Any], Tensor] | None = None,
    *,
    samples: int = 500,
    params: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    sampler: Callable[[Any], Tensor] | None = None,
    progress: Progress | None = None,
) -> Tour:
    """Compare the exact Hessian of a small model with its Fisher and its empirical Fisher, whole and by layer.

    Everything is dense, so this is for some thousand weights; choose them with `params` in a larger model. Nothing
    changes in the model.

    Parameters
    ----------
    model:
        The model; or name → model for several points of its training, all of one architecture.
    data, loss, params, exclude, sampler:
        As for `Objective`. The same samples serve every matrix and every point.
    samples:
        How many, from the beginning of the data.
    progress:
        Called as `progress(phase, done, total)`.

    Raises
    ------
    WoodfisherError
        On bad input, and where the matrices do not fit into memory.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    >>> inputs, targets = torch.randn(50, 3), torch.randint(2, (50,))
    >>> seen = tour(model, [(inputs, targets)], nn.functional.cross_entropy, samples=50)
    >>> [(region.name, region.size) for region in seen.stops[0].regions]
    [('whole', 20), ('0.weight', 12), ('2.weight', 8)]
    >>> seen.stops[0].whole.between("Fisher", "Hessian").cosine > 0.5
    True
    """
    check_count("samples", samples)
    check_data(data)
    models = dict(model) if isinstance(model, Mapping) else {"as given": model}
    if not models:
        raise WoodfisherError("there is no model to tour: give one, or a dict of them by name.")
    with watching(progress) as watch, phase("total"):
        batches = list(take(data, samples))
        taken = sum(map(samples_in, batches))
        if not taken:
            raise WoodfisherError("the data holds no batch; at least one sample is needed.")
        if taken < samples:
            warn(f"{samples} samples were asked for and the data ended after {taken}; those are used.")
        objectives = {
            name: Objective(point, batches, loss, params=params, exclude=exclude, sampler=sampler)
            for name, point in models.items()
        }
        layout = _common_layout(objectives)
        _check_fits(layout.size, len(models), taken, next(iter(objectives.values())).device)
        counts = tuple(_growing(taken))
        stops = []
        for number, (name, objective) in enumerate(objectives.items()):
            report_progress("points", number, len(objectives))
            stops.append(_stop(name, objective, taken, counts))
        report_progress("points", len(stops), len(stops))
        seconds = sum(watch.so_far().values())
    return Tour(layout, taken, counts, tuple(stops), seconds, tuple(watch.warnings))


def compare(F: Tensor, H: Tensor) -> tuple[float | None, float | None]:
    """Cosine similarity of two matrices, and the s that minimises ‖H − sF‖; None where they are undefined.

    >>> F = torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    >>> compare(F, 3 * F)
    (1.0, 3.0)
    """
    inner, f, h = float((F * H).sum()), float(F.norm()), float(H.norm())
    return _ratio(inner, f * h), _ratio(inner, f * f)


def mass_shares(
    M: Tensor, layout: Layout, block_sizes: Sequence[int]
) -> tuple[tuple[float | None, ...], tuple[float | None, ...]]:
    """Share of ‖M‖² in diagonal blocks of each size, and what it would be with the weights in random order.

    In random order the diagonal keeps its share, and every entry beside it is equally likely to lie in a block.
    """
    energy = M.square()
    total, d = float(energy.sum()), len(M)
    diagonal = float(energy.diagonal().sum())
    shares, chances = [], []
    for block_size in block_sizes:
        within, pairs = 0.0, 0
        for run in layout.runs(block_size):
            blocks = energy[run.columns, run.columns].reshape(run.count, run.size, run.count, run.size)
            within += float(blocks.diagonal(dim1=0, dim2=2).sum())
            pairs += run.count * run.size * (run.size - 1)
        shares.append(_ratio(within, total))
        chances.append(_ratio(diagonal + (total - diagonal) * pairs / max(d * (d - 1), 1), total))
    return tuple(shares), tuple(chances)


def spectrum_summary(eigenvalues: Tensor) -> dict[str, Any]:
    """A spectrum in a few numbers: its ends, how many are negative, and how many hold 90 % of ‖·‖² = Σλ².

    Those within a millionth of the largest are rounding and count as zero.
    """
    by_size = eigenvalues.square().sort(descending=True).values
    total = float(by_size.sum())
    held = int((by_size.cumsum(0) < 0.9 * total).sum()) + 1 if total else 0
    return {
        "smallest": float(eigenvalues[0]),
        "largest": float(eigenvalues[-1]),
        "negative": int((eigenvalues < -NEGLIGIBLE * eigenvalues.abs().max()).sum()),
        "trace": float(eigenvalues.sum()),
        "hold_90_percent": held,
        "top": eigenvalues.flip(0)[:10].tolist(),
    }


def _stop(name: str, objective: Objective, samples: int, counts: Sequence[int]) -> Stop:
    layout = objective.layout
    H = exact_hessian(objective, samples)
    matrices = {HESSIAN: H}
    try:
        matrices[FISHER] = _mean_outer_product(objective.iter_fisher_rows(samples), samples, H)
    except UnknownDistributionError as problem:
        warn(f"the Fisher is left out. {problem}")
    places = {
        "whole": (layout, slice(0, layout.size)),
        **{layer: (Layout({layer: layout.shapes[layer]}), span) for layer, span in layout.slices.items()},
    }
    G = objective.rows(samples).double()
    E = torch.zeros_like(H)
    by_samples: dict[str, list[float | None]] = {place: [] for place in places}
    for first, last in zip((0, *counts), counts, strict=False):
        E += G[first:last].mT @ G[first:last]
        for place, (_, span) in places.items():
            by_samples[place].append(compare(E[span, span], H[span, span])[0])
    matrices[EMPIRICAL] = E / samples
    regions = []
    for done, (place, (part, span)) in enumerate(places.items(), 1):
        blocks = {matrix: M[span, span] for matrix, M in matrices.items()}
        regions.append(_region(place, part, blocks, tuple(by_samples[place])))
        report_progress("spectra", done, len(places))
    return Stop(name, objective.mean_loss(), matrices, regions[0], tuple(regions[1:]))


def _mean_outer_product(chunks: Iterable[Tensor], samples: int, like: Tensor) -> Tensor:
    total = torch.zeros_like(like)
    for rows in chunks:
        G = rows.double()
        total += G.mT @ G
    return total / samples


def _region(
    name: str, layout: Layout, matrices: Mapping[str, Tensor], by_samples: tuple[float | None, ...]
) -> Region:
    block_sizes = tuple(_growing(max(layout.sizes)))
    mass = {matrix: mass_shares(M, layout, block_sizes) for matrix, M in matrices.items()}
    return Region(
        name=name,
        size=layout.size,
        comparisons=tuple(
            Comparison(matrix, target, *compare(matrices[matrix], matrices[target]))
            for target, matrix in combinations(matrices, 2)
        ),
        block_sizes=block_sizes,
        mass={matrix: shares for matrix, (shares, _) in mass.items()},
        by_chance={matrix: chances for matrix, (_, chances) in mass.items()},
        eigenvalues={matrix: torch.linalg.eigvalsh(M) for matrix, M in matrices.items()},
        by_samples=by_samples,
    )


def _common_layout(objectives: Mapping[str, Objective]) -> Layout:
    (first, objective), *others = objectives.items()
    for name, other in others:
        if other.layout != objective.layout:
            raise WoodfisherError(
                f"all points of a tour must have the same weights; those of {name!r} differ from those of {first!r} "
                "in name, shape or order."
            )
    return objective.layout


def _check_fits(size: int, points: int, samples: int, device: torch.device) -> None:
    matrix = 8 * size * size
    Budget.of(device).check(
        [
            (f"{3 * points} matrices of {size:,} × {size:,}", 3 * points * matrix),
            ("work on one of them", 4 * matrix),
            ("gradient rows", 12 * size * samples),
        ],
        "a tour is for small models, so choose fewer weights, as in --params conv1 'fc*' (params=), or fewer points",
    )


def _growing(last: int) -> Iterator[int]:
    """1, 2, 5, 10, 20, 50, … below `last`, then `last`.

    >>> list(_growing(54))
    [1, 2, 5, 10, 20, 50, 54]
    """
    steps = (factor * 10**power for power in count() for factor in (1, 2, 5))
    yield from takewhile(lambda step: step < last, steps)
    yield last


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
