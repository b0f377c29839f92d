"""The sections that go layer by layer: sparsity, FLOPs, and the curvature's spectrum."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from woodfisher.results.numbers import amount, count, per_cent, signed_score, significant
from woodfisher.results.page.charts import Row, bars, key, linear, logarithmic, series_class
from woodfisher.results.page.parts import Figure, Section, Table

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from woodfisher.pruning.report import Layer
    from woodfisher.results.examine import LayerSpectrum
    from woodfisher.results.page.record import TaskReport

ZEROS = (
    "A FLOP counts as removed where one of its factors is a removed weight. A kernel for sparse weights leaves it "
    "out; a dense one still does it."
)

_NO_RECORD = "This report was written by a version that did not look at it."

_ROUNDING = 1e-9
"""Share of a layer's largest eigenvalue below which others are the rounding of float32 gradients."""

_AS_TABLE = "The same as a table"


class MethodLayers(NamedTuple):
    """Layers as a method left them."""

    name: str
    layers: Sequence[Layer]
    colour: int = 0

    @property
    def kept(self) -> dict[str, float]:
        """Layer → share of its weights."""
        return {layer.name: layer.kept / layer.size for layer in self.layers}


def known_flops(report: TaskReport) -> dict[str, int]:
    """Layer → FLOPs of a sample in it when dense; empty where they were not counted."""
    return (report.examined.flops if report.examined is not None else None) or {}


def flops_left(report: TaskReport, layers: Sequence[Layer]) -> tuple[float, int] | None:
    """FLOPs that these layers have left, and all; every weight of a layer has an equal part in its FLOPs."""
    flops = known_flops(report)
    if not flops or any(layer.name not in flops for layer in layers):
        return None
    return (
        sum(flops[layer.name] * layer.kept / layer.size for layer in layers),
        sum(flops[layer.name] for layer in layers),
    )


def missing(report: TaskReport, what: str) -> str:
    """Why a report has no `flops` or `spectrum`."""
    return _NO_RECORD if report.examined is None else report.examined.missing.get(what, _NO_RECORD)


def sparsity_section(methods: Sequence[MethodLayers], note: str = "") -> Section:
    """What each method keeps of every layer, against the same for all; the first method is the one in question."""
    layers = methods[0].layers
    uniform = sum(layer.kept for layer in layers) / sum(layer.size for layer in layers)
    text = (
        f"{note}A uniform sparsity of {per_cent(1 - uniform)} would keep {per_cent(uniform)} of every layer. "
        "Layers that reach beyond the line were found to matter more."
    )
    return Section(
        "sparsity",
        "Sparsity by layer",
        [text],
        figures=[_sparsity_figure(methods, uniform)],
        tables=[_sparsity_table(methods, uniform)],
    )


def _sparsity_figure(methods: Sequence[MethodLayers], uniform: float) -> Figure:
    first, shares = methods[0], [method.kept for method in methods]
    kept = [uniform, *(share for by in shares for share in by.values())]
    scale = linear([100 * share for share in kept], zero=True, unit=" %")
    by_whom = f" by {first.name}" if len(methods) > 2 else ""
    rows = [
        Row(
            layer.name,
            f"{per_cent(layer.sparsity)} removed{by_whom}",
            [
                [(0, scale.place(100 * by.get(layer.name, 0.0)), series_class(method.colour))]
                for method, by in zip(methods, shares, strict=True)
            ],
            [(scale.place(100 * uniform), "rule")],
        )
        for layer in first.layers
    ]
    label = (
        f"Share of the weights kept in each of {len(rows)} layers, against a uniform {per_cent(uniform)}; the "
        "table below holds the values"
    )
    return Figure(
        bars(label, rows, scale),
        x="kept of the layer's weights",
        legend=[
            *((key(series_class(m.colour), "bar"), f"kept by {m.name}") for m in methods),
            (key("rule", "mark"), f"the same for every layer: {per_cent(uniform)}"),
        ],
    )


def _sparsity_table(methods: Sequence[MethodLayers], uniform: float) -> Table:
    shares = [method.kept for method in methods]
    rows = [
        [
            layer.name,
            count(layer.size),
            count(layer.kept),
            *(per_cent(1 - by[layer.name], 2) if layer.name in by else "" for by in shares),
            signed_score(100 * (layer.sparsity - 1 + uniform), "%"),
        ]
        for layer in methods[0].layers
    ]
    columns = ["layer", "weights", "kept", *(method.name for method in methods), "points above uniform"]
    return Table("Sparsity by layer", columns, rows, summary=_AS_TABLE)


def flops_section(report: TaskReport, methods: Sequence[MethodLayers], note: str = "") -> Section:
    """FLOPs of every layer, kept and removed, or why they were not counted."""
    title = "FLOPs by layer"
    sums = [flops_left(report, method.layers) for method in methods]
    if sums[0] is None:
        return Section("flops", title, [f"Not counted. {missing(report, 'flops')}"])
    kept, total = sums[0]
    left = f"Of {amount(total)} FLOPs a sample in the pruned layers, {methods[0].name} leaves {amount(kept)}."
    flops = known_flops(report)
    last = ["all", amount(total), "", *("" if one is None else amount(one[0]) for one in sums)]
    return Section(
        "flops",
        title,
        [f"{note}{left} {ZEROS}"],
        figures=[_flops_figure(flops, methods)],
        tables=[_flops_table(flops, methods, total, last)],
    )


def _flops_figure(flops: Mapping[str, int], methods: Sequence[MethodLayers]) -> Figure:
    unit, prefix = _unit(flops.values())
    scale = linear([total / unit for total in flops.values()], zero=True)
    shares = [method.kept for method in methods]
    rows = [
        Row(
            layer.name,
            f"{amount(total * shares[0][layer.name])} of {amount(total)}",
            [
                [
                    (scale.place(total * by.get(layer.name, 0.0) / unit), scale.place(total / unit), "gone"),
                    (0, scale.place(total * by.get(layer.name, 0.0) / unit), series_class(method.colour)),
                ]
                for method, by in zip(methods, shares, strict=True)
            ],
        )
        for layer in methods[0].layers
        for total in [flops[layer.name]]
    ]
    label = f"FLOPs kept and removed in each of {len(rows)} layers; the table below holds the values"
    names = ["kept"] if len(methods) == 1 else [f"kept by {method.name}" for method in methods]
    return Figure(
        bars(label, rows, scale),
        x=f"{prefix} FLOPs a sample".strip(),
        legend=[
            *((key(series_class(m.colour), "bar"), name) for m, name in zip(methods, names, strict=True)),
            (key("gone", "bar"), "removed"),
        ],
    )


def _flops_table(
    flops: Mapping[str, int], methods: Sequence[MethodLayers], total: int, last: Sequence[str]
) -> Table:
    shares = [method.kept for method in methods]
    rows = [
        [
            layer.name,
            amount(flops[layer.name]),
            per_cent(flops[layer.name] / (total or 1)),
            *(amount(flops[layer.name] * by.get(layer.name, 0.0)) for by in shares),
        ]
        for layer in methods[0].layers
    ]
    columns = ["layer", "dense", "share of all, dense", *(method.name for method in methods)]
    return Table("FLOPs a sample that are left in each layer", columns, [*rows, last], summary=_AS_TABLE)


def _unit(values: Iterable[float]) -> tuple[float, str]:
    largest = max(values, default=0)
    units = ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"), (1e3, "thousand"))
    return next((unit for unit in units if largest >= unit[0]), (1.0, ""))


def spectrum_section(report: TaskReport, damping: float | None, when: str) -> Section:
    """Eigenvalues of every layer's block of the curvature against the damping, or why there are none."""
    title = "The curvature's spectrum by layer"
    spectrum = report.examined.spectrum if report.examined is not None else None
    if spectrum is None:
        return Section("spectrum", title, [f"Left out. {missing(report, 'spectrum')}"])
    labels = "the data's labels" if spectrum.labels == "data" else "labels from the model"
    text = (
        f"Eigenvalues of each layer's block of the Fisher {when}, without damping, from {spectrum.rows} gradients of "
        f"single samples with {labels}. At most {spectrum.rows} of a layer are above zero; they are drawn at evenly "
        "spaced ranks."
    )
    if damping:
        text += " What lies far above λ is known from the data; far below it, λ alone decides."
    return Section(
        "spectrum",
        title,
        [text],
        figures=[_spectrum_figure(spectrum.layers, damping)],
        tables=[_spectrum_table(spectrum.layers)],
    )


def _above_rounding(layer: LayerSpectrum) -> list[float]:
    return [e for e in layer.eigenvalues if e > _ROUNDING * max(layer.eigenvalues[0], 0)]


def _spectrum_figure(layers: Sequence[LayerSpectrum], damping: float | None) -> Figure:
    shown = [_above_rounding(layer) for layer in layers]
    scale = logarithmic([*(e for values in shown for e in values), *([damping] if damping else [])])
    rule = [(scale.place(damping), "rule")] if damping else []
    rows = [
        Row(
            layer.name,
            f"largest {significant(max(values), 2)}" if values else "no curvature",
            [[(scale.place(min(values)), scale.place(max(values)), "span")] if values else []],
            [
                *((scale.place(e), "eigen") for e in values),
                *([(scale.place(layer.mean), "other")] if layer.mean > 0 else []),
                *rule,
            ],
        )
        for layer, values in zip(layers, shown, strict=True)
    ]
    label = (
        f"Eigenvalues of the curvature in each of {len(rows)} layers on a logarithmic scale; the table below holds "
        "the largest"
    )
    return Figure(
        bars(label, rows, scale),
        x="eigenvalue",
        legend=[
            (key("eigen", "eigen"), "eigenvalues"),
            (key("other", "mark"), "mean diagonal entry"),
            *([(key("rule", "mark"), f"λ of the last stage, {significant(damping)}")] if damping else []),
        ],
    )


def _spectrum_table(layers: Sequence[LayerSpectrum]) -> Table:
    rows = [
        [
            layer.name,
            count(layer.weights),
            significant(max(_above_rounding(layer), default=0.0)),
            significant(layer.mean),
            f"{layer.rank:.1f}",
        ]
        for layer in layers
    ]
    columns = ["layer", "weights left", "largest eigenvalue", "mean diagonal entry", "effective rank"]
    return Table("Spectrum by layer", columns, rows, summary=_AS_TABLE)
