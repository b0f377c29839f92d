"""The sections that go layer by layer: sparsity, FLOPs, and the curvature's spectrum."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from woodfisher.results.numbers import amount, count, per_cent, signed_score, significant
from woodfisher.results.page.charts import Row, bars, key, linear, logarithmic, series_class
from woodfisher.results.page.parts import Figure, Section, Table

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from woodfisher.pruning.report import Layer
    from woodfisher.results.page.record import TaskReport

ZEROS = (
    "A FLOP counts as removed where one of its factors is a removed weight. A kernel for sparse weights leaves it "
    "out; a dense one still does it."
)

_NO_RECORD = "This report was written by a version that did not look at it."

_ROUNDING = 1e-9
"""Share of a layer's largest eigenvalue below which others are the rounding of float32 gradients."""


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
    first = methods[0]
    uniform = sum(layer.kept for layer in first.layers) / sum(layer.size for layer in first.layers)
    shares = [method.kept for method in methods]
    scale = linear(
        [100 * v for v in [uniform, *(v for by in shares for v in by.values())]], zero=True, unit=" %"
    )
    rows = [
        Row(
            layer.name,
            f"{per_cent(layer.sparsity)} removed" + (f" by {first.name}" if len(methods) > 2 else ""),
            [
                [(0, scale.place(100 * by.get(layer.name, 0.0)), series_class(method.colour))]
                for method, by in zip(methods, shares, strict=True)
            ],
            [(scale.place(100 * uniform), "rule")],
        )
        for layer in first.layers
    ]
    table = [
        [
            layer.name,
            count(layer.size),
            count(layer.kept),
            *(per_cent(1 - by[layer.name], 2) if layer.name in by else "" for by in shares),
            signed_score(100 * (layer.sparsity - 1 + uniform), "%"),
        ]
        for layer in first.layers
    ]
    label = (
        f"Share of the weights kept in each of {len(rows)} layers, against a uniform {per_cent(uniform)}; the "
        "table below holds the values"
    )
    return Section(
        "sparsity",
        "Sparsity by layer",
        [
            f"{note}A uniform sparsity of {per_cent(1 - uniform)} would keep {per_cent(uniform)} of every layer. "
            "Layers that reach beyond the line were found to matter more."
        ],
        figures=[
            Figure(
                bars(label, rows, scale),
                x="kept of the layer's weights",
                legend=[
                    *((key(series_class(m.colour), "bar"), f"kept by {m.name}") for m in methods),
                    (key("rule", "mark"), f"the same for every layer: {per_cent(uniform)}"),
                ],
            )
        ],
        tables=[
            Table(
                "Sparsity by layer",
                ["layer", "weights", "kept", *(method.name for method in methods), "points above uniform"],
                table,
                summary="The same as a table",
            )
        ],
    )


def flops_section(report: TaskReport, methods: Sequence[MethodLayers], note: str = "") -> Section:
    """FLOPs of every layer, kept and removed, or why they were not counted."""
    title = "FLOPs by layer"
    sums = [flops_left(report, method.layers) for method in methods]
    if sums[0] is None:
        return Section("flops", title, [f"Not counted. {missing(report, 'flops')}"])
    flops = known_flops(report)
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
    table = [
        [
            layer.name,
            amount(flops[layer.name]),
            per_cent(flops[layer.name] / (sums[0][1] or 1)),
            *(amount(flops[layer.name] * by.get(layer.name, 0.0)) for by in shares),
        ]
        for layer in methods[0].layers
    ]
    table.append(["all", amount(sums[0][1]), "", *("" if one is None else amount(one[0]) for one in sums)])
    label = f"FLOPs kept and removed in each of {len(rows)} layers; the table below holds the values"
    kept, total = sums[0]
    left = f"Of {amount(total)} FLOPs a sample in the pruned layers, {methods[0].name} leaves {amount(kept)}."
    return Section(
        "flops",
        title,
        [f"{note}{left} {ZEROS}"],
        figures=[
            Figure(
                bars(label, rows, scale),
                x=f"{prefix} FLOPs a sample".strip(),
                legend=[
                    *(
                        (
                            key(series_class(m.colour), "bar"),
                            "kept" if len(methods) == 1 else f"kept by {m.name}",
                        )
                        for m in methods
                    ),
                    (key("gone", "bar"), "removed"),
                ],
            )
        ],
        tables=[
            Table(
                "FLOPs a sample that are left in each layer",
                ["layer", "dense", "share of all, dense", *(method.name for method in methods)],
                table,
                summary="The same as a table",
            )
        ],
    )


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
    shown = [
        [e for e in layer.eigenvalues if e > _ROUNDING * max(layer.eigenvalues[0], 0)]
        for layer in spectrum.layers
    ]
    scale = logarithmic([*(e for values in shown for e in values), *([damping] if damping else [])])
    rule = [(scale.place(damping), "rule")] if damping else []
    rows, table = [], []
    for layer, values in zip(spectrum.layers, shown, strict=True):
        rows.append(
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
        )
        table.append(
            [
                layer.name,
                count(layer.weights),
                significant(max(values)) if values else "0",
                significant(layer.mean),
                f"{layer.rank:.1f}",
            ]
        )
    labels = "the data's labels" if spectrum.labels == "data" else "labels from the model"
    text = (
        f"Eigenvalues of each layer's block of the Fisher {when}, without damping, from {spectrum.rows} gradients of "
        f"single samples with {labels}. At most {spectrum.rows} of a layer are above zero; they are drawn at evenly "
        "spaced ranks."
    )
    if damping:
        text += " What lies far above λ is known from the data; far below it, λ alone decides."
    label = f"Eigenvalues of the curvature in each of {len(rows)} layers on a logarithmic scale"
    return Section(
        "spectrum",
        title,
        [text],
        figures=[
            Figure(
                bars(f"{label}; the table below holds the largest", rows, scale),
                x="eigenvalue",
                legend=[
                    (key("eigen", "eigen"), "eigenvalues"),
                    (key("other", "mark"), "mean diagonal entry"),
                    *(
                        [(key("rule", "mark"), f"λ of the last stage, {significant(damping)}")]
                        if damping
                        else []
                    ),
                ],
            )
        ],
        tables=[
            Table(
                "Spectrum by layer",
                ["layer", "weights left", "largest eigenvalue", "mean diagonal entry", "effective rank"],
                table,
                summary="The same as a table",
            )
        ],
    )
