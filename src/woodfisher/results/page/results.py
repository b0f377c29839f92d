"""What was achieved: the sentence and the cards at the top, and the tables of results."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from woodfisher.results.numbers import (
    amount,
    count,
    duration,
    fewer,
    given_name,
    mean_score,
    per_cent,
    score,
    signed_score,
    vanishes,
)
from woodfisher.results.page.charts import COLOURS, Series, chart, key, linear, swatch
from woodfisher.results.page.layers import flops_left, known_flops
from woodfisher.results.page.parts import Card, Figure, Section, Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from woodfisher.pruning.report import Layer
    from woodfisher.results.page.record import (
        CompareReport,
        PrunedNetwork,
        PruneReport,
        TaskReport,
        TrainReport,
    )


def verdict(report: PruneReport | TrainReport) -> str:
    """What the metric did, in a sentence."""
    metric, left = report.pruned.metric, f"{count(report.kept)} of {count(report.size)} weights left"
    if metric is None:
        return f"With {left}, the network has no finite test {report.metric.partition(',')[0]}."
    value = score(metric, report.metric)
    change = metric - report.dense.metric
    if vanishes(change, report.metric):
        moved = "stays at"
    else:
        moved = f"{'rises' if change > 0 else 'falls'} by {score(abs(change), report.metric)} to"
    name = report.metric.partition(",")[0]
    return f"With {left}, test {name} {moved} {value}."


def metric_card(report: TaskReport, metric: float | None, beside: str = "") -> Card:
    """The metric against the dense network's."""
    change = "" if metric is None else f" ({signed_score(metric - report.dense.metric, report.metric)})"
    return Card(
        f"Test {report.metric}",
        mean_score(metric, None, report.metric),
        f"dense {score(report.dense.metric, report.metric)}{change}{beside}",
    )


def size_card(pruned: PrunedNetwork) -> Card:
    """Weights left."""
    return Card(
        "Weights left", count(pruned.kept), f"of {count(pruned.size)}: {fewer(pruned.kept, pruned.size)}"
    )


def flops_card(report: TaskReport, pruned: PrunedNetwork) -> Card:
    """FLOPs left, where they were counted."""
    sums = flops_left(report, pruned.layers)
    if sums is None:
        return Card("FLOPs", "not counted", "why: see below")
    kept, total = sums
    return Card(
        "FLOPs a sample left", amount(kept), f"of {amount(total)} in these layers: {fewer(kept, total)}"
    )


def time_card(seconds: Mapping[str, float]) -> Card:
    """Time, and what took most of it."""
    phases = sorted(((s, name) for name, s in seconds.items() if name != "total" and s > 0), reverse=True)[:2]
    return Card(
        "Time", duration(seconds.get("total", 0.0)), ", ".join(f"{name} {duration(s)}" for s, name in phases)
    )


def result_section(report: PruneReport) -> Section:
    """Dense, magnitude and the method side by side."""
    columns = ["", "test", "against dense", "weights left", "removed", *_flops_column(report), "time"]
    name, weights = _given(report)
    rows = [[name, score(report.dense.metric, report.metric), "", *weights, ""]]
    by_size = report.magnitude
    if by_size is not None and by_size.layers is not None and report.criterion != "magnitude":
        rows.append(_row("magnitude", by_size.metric, report, by_size.layers, ""))
    took = duration(report.seconds.get("total", 0.0))
    rows.append(_row(report.criterion, report.pruned.metric, report, report.layers, took))
    return Section("result", "Result", tables=[Table(f"On test data, {report.metric}", columns, rows)])


def trained_section(report: TrainReport) -> Section:
    """Dense and trained side by side, on test and validation data."""
    columns = ["", "test", "validation", "weights left", "removed", *_flops_column(report)]
    name, weights = _given(report)
    rows = [
        [
            name,
            score(report.dense.metric, report.metric),
            score(report.validation.dense, report.metric),
            *weights,
        ],
        [
            f"{report.criterion}, epoch {report.best_epoch}",
            mean_score(report.pruned.metric, None, report.metric),
            score(report.validation.metric, report.metric),
            *_weights(report, report.layers),
        ],
    ]
    return Section("result", "Result", tables=[Table(report.metric, columns, rows)])


def _row(
    name: str, metric: float | None, report: PruneReport, layers: Sequence[Layer], took: str
) -> list[str]:
    change = "" if metric is None else signed_score(metric - report.dense.metric, report.metric)
    return [name, mean_score(metric, None, report.metric), change, *_weights(report, layers), took]


def _given(report: PruneReport | TrainReport) -> tuple[str, list[str]]:
    """What the network that was given is called, and its weights; reports of early versions don't have its layers."""
    layers = report.dense.layers or [replace(layer, kept=layer.size) for layer in report.layers]
    return given_name(sum(layer.kept for layer in layers), report.size), _weights(report, layers)


def _weights(report: PruneReport | TrainReport, layers: Sequence[Layer]) -> list[str]:
    """Weights left, their sparsity, and FLOPs left where they are known."""
    kept = sum(layer.kept for layer in layers)
    cells = [count(kept), per_cent(1 - kept / report.size, 2)]
    if known_flops(report):
        left = flops_left(report, layers)
        cells.append("" if left is None else amount(left[0]))
    return cells


def _flops_column(report: TaskReport) -> list[str]:
    return ["FLOPs a sample"] if known_flops(report) else []


def accuracy_section(report: CompareReport, names: Sequence[str], family: Sequence[float]) -> Section:
    """The metric against sparsity, one line a method, with its spread."""
    return Section(
        "accuracy",
        "Metric against sparsity",
        figures=[_accuracy_figure(report, names, family)],
        tables=[_accuracy_table(report, names, family)],
    )


def _accuracy_figure(report: CompareReport, names: Sequence[str], family: Sequence[float]) -> Figure:
    measured = [(cell, cell.mean) for cell in report.summary if cell.mean is not None]
    edges = [mean + side * (cell.sd or 0.0) for cell, mean in measured for side in (-1, 1)]
    series = []
    for index, name in enumerate(names):
        cells = sorted(
            ((c, mean) for c, mean in measured if c.criterion == name),
            key=lambda pair: pair[0].requested_sparsity,
        )
        notes = [
            f"{name} at {100 * c.requested_sparsity:g} %: {mean_score(mean, c.sd, report.metric)}"
            for c, mean in cells
        ]
        points = [(100 * c.requested_sparsity, mean) for c, mean in cells]
        spread = [c.sd for c, _ in cells]
        series.append(Series(name, points, index, spread=spread, dashed=index >= COLOURS, notes=notes))
    x = linear([100 * sparsity for sparsity in family], tight=True, unit=" %")
    y = linear([*edges, report.dense.metric])
    label = f"{report.metric} against sparsity for {len(names)} methods; the table below holds the values"
    means = f" Points are means of {report.seeds} seeds, bars their standard deviation."
    return Figure(
        chart(label, series, x, y, height=300, rules=[(report.dense.metric, "rule")]),
        f"Every network was measured once on test data.{means if report.seeds > 1 else ''}",
        y=f"test {report.metric}",
        x="sparsity",
        legend=[
            *((swatch(one.colour, dashed=one.dashed), one.name) for one in series),
            (key("rule", "level"), f"dense, {score(report.dense.metric, report.metric)}"),
        ],
    )


def _accuracy_table(report: CompareReport, names: Sequence[str], family: Sequence[float]) -> Table:
    spread = f", mean ± standard deviation of {report.seeds} seeds" if report.seeds > 1 else ""
    rows = [[name, *(_cells(report, name, sparsity) for sparsity in family)] for name in names]
    return Table(
        f"Test {report.metric}{spread}; dense {score(report.dense.metric, report.metric)}; the best of each column is "
        "bold",
        ["", *(f"{100 * sparsity:g} %" for sparsity in family)],
        rows,
        best=frozenset(_best(report, names, family)),
    )


def _cells(report: CompareReport, name: str, sparsity: float) -> str:
    return ", ".join(
        mean_score(c.mean, c.sd, report.metric)
        for c in report.summary
        if c.criterion == name and c.requested_sparsity == sparsity
    )


def _best(report: CompareReport, names: Sequence[str], family: Sequence[float]) -> set[tuple[int, int]]:
    best = set()
    for column, sparsity in enumerate(family, 1):
        here = [
            (c.mean, names.index(c.criterion))
            for c in report.summary
            if c.requested_sparsity == sparsity and c.mean is not None
        ]
        best |= {(row, column) for mean, row in here if mean == max(here)[0]}
    return best
