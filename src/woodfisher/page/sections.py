"""Report → the parts of its page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from woodfisher.page.charts import (
    COLOURS,
    Rows,
    Series,
    bars,
    chart,
    key,
    linear,
    logarithmic,
    signed_logarithmic,
    swatch,
)
from woodfisher.page.numbers import amount, change, count, duration, fewer, per_cent, points, significant
from woodfisher.page.parts import Card, Figure, Page, Section, Table
from woodfisher.page.record import Comparison, Failure, Gradual, Pruning, Result

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from woodfisher.page.record import AnyReport, Cell, Outcome, Staged, Task
    from woodfisher.report import Layer

_ZEROS = (
    "A FLOP counts as removed where one of its factors is a removed weight. A kernel for sparse weights leaves it "
    "out; a dense one still does it."
)

_NO_RECORD = "This report was written by a version that did not look at it."


def page_of(report: AnyReport) -> Page:
    """What there is to say about a report, the result first."""
    if isinstance(report, Comparison):
        return _comparison(report)
    if isinstance(report, Gradual):
        return _gradual(report)
    return _pruning(report)


def _pruning(report: Pruning) -> Page:
    by_size = report.magnitude if report.criterion != "magnitude" else None
    rows = [
        [
            "dense",
            f"{report.dense.metric:.2f}",
            "",
            *_weights(report.size, report.size),
            *_flops_cells(report, None),
            "",
        ],
        *(
            [_outcome_row("magnitude", by_size.metric, report, by_size.layers)]
            if by_size is not None and by_size.layers is not None
            else []
        ),
        _outcome_row(report.criterion, report.pruned.metric, report, report.layers, report.seconds),
    ]
    against = {"magnitude": by_size.layers} if by_size is not None and by_size.layers is not None else {}
    beside = "" if by_size is None else f"; magnitude {by_size.metric:.2f}"
    verdict = _verdict(report, report.pruned.metric)
    if by_size is not None:
        verdict += f" Removing the smallest weights instead gives {by_size.metric:.2f}."
    if report.max_drop is not None:
        verdict += f" The validation metric was to fall by no more than {per_cent(report.max_drop)}."
    return Page(
        "prune",
        f"{report.task}: {per_cent(report.sparsity, 2)} of the weights removed",
        verdict,
        [
            _metric_card(report, report.pruned.metric, beside),
            _size_card(report),
            _flops_card(report, report),
            Card("Time", duration(_total(report)), _longest(report.seconds)),
        ],
        len(report.warnings),
        [
            Section(
                "result", "Result", tables=[Table(f"On test data, {report.metric}", _columns(report), rows)]
            ),
            _warnings(report.warnings),
            _sparsity(report.layers, report.criterion, against),
            _flops(report, report.layers),
            *_stages([(report.criterion, report)]),
            _damping([(report.criterion, report)]),
            _spectrum(report, _last_damping(report), "after pruning"),
            _taken_back([(report.criterion, report)]),
            _time(report.seconds),
            _method([(report.criterion, report.method)]),
        ],
        report.seed,
        report.origin,
    )


def _gradual(report: Gradual) -> Page:
    best = next((epoch for epoch in report.epochs if epoch.epoch == report.best_epoch), report.epochs[-1])
    rows = [
        [
            "dense",
            f"{report.dense.metric:.2f}",
            f"{report.validation.dense:.2f}",
            *_weights(report.size, report.size),
            *_flops_cells(report, None),
        ],
        [
            f"{report.criterion}, epoch {best.epoch}",
            f"{report.pruned.metric:.2f}",
            f"{report.validation.metric:.2f}",
            *_weights(report.kept, report.size),
            *_flops_cells(report, report.layers),
        ],
    ]
    columns = ["", "test", "validation", "weights kept", "removed", *_flops_columns(report)]
    last = report.history[-1].damping if report.history else None
    return Page(
        "train",
        f"{report.task}: {per_cent(report.sparsity, 2)} of the weights removed in training",
        _verdict(report, report.pruned.metric)
        + f" It is the network of epoch {best.epoch} of {len(report.epochs)}, chosen on validation data.",
        [
            _metric_card(report, report.pruned.metric, ""),
            _size_card(report),
            _flops_card(report, report),
            Card("Time", duration(_total(report)), _longest(report.seconds)),
        ],
        len(report.warnings),
        [
            Section("result", "Result", tables=[Table(report.metric, columns, rows)]),
            _warnings(report.warnings),
            _training(report, best.step),
            _sparsity(report.layers, report.criterion, {}),
            _flops(report, report.layers),
            _removals(report),
            _spectrum(report, last, "at the end"),
            Section(
                "taken-back",
                "Tried and taken back",
                ["Nothing: in training every removal stands, and later steps mend it."],
            ),
            _time(report.seconds),
            _method([(report.criterion, report.method)]),
        ],
        report.seed,
        report.origin,
    )


def _comparison(report: Comparison) -> Page:
    names = list(dict.fromkeys(cell.criterion for cell in report.summary))
    family = sorted({cell.requested_sparsity for cell in report.summary})
    runs = [result for result in report.results if isinstance(result, Result)]
    failures = [result for result in report.results if isinstance(result, Failure)]
    shown = _sparsest(runs)
    warned = list(dict.fromkeys(f"{run.criterion}: {text}" for run in runs for text in run.warnings))
    failed = [
        f"{one.criterion} at {per_cent(one.requested_sparsity)}, seed {one.seed}, failed: {one.error}"
        for one in failures
    ]
    best = max((c for c in report.summary if c.mean is not None), key=_sparsest_best, default=None)
    seeds = "" if report.seeds == 1 else f", mean of {report.seeds} seeds"
    verdict = f"The dense network has {report.dense.metric:.2f}."
    cards = [Card(f"Dense, {report.metric}", f"{report.dense.metric:.2f}", f"on test data{seeds}")]
    if best is not None and best.mean is not None:
        at = per_cent(best.requested_sparsity, 0 if best.requested_sparsity * 100 % 1 < 1e-9 else 1)
        same = [
            c for c in report.summary if c.requested_sparsity == best.requested_sparsity and c is not best
        ]
        verdict = (
            f"At {at} {best.criterion} is best with {best.mean:.2f}{seeds}, {points(best.mean - report.dense.metric)} "
            "against the dense network."
        )
        others = "; ".join(f"{c.criterion} {'failed' if c.mean is None else f'{c.mean:.2f}'}" for c in same)
        cards.append(
            Card(
                f"Best at {at}",
                f"{best.mean:.2f}",
                f"{best.criterion}{_plus_minus(best)}; {others}".rstrip("; "),
            )
        )
        one = next((run for run in shown if run.criterion == best.criterion), None)
        if one is not None:
            cards += [_size_card(one), _flops_card(report, one)]
        slowest = max(
            (c.seconds or 0.0 for c in report.summary if c.criterion == best.criterion), default=0.0
        )
        cards.append(Card("Time", duration(slowest), f"at most for a run of {best.criterion}"))
    labelled: list[tuple[str, Staged]] = [(run.criterion, run) for run in shown]
    with_data = [(name, run) for name, run in labelled if any(s.predicted is not None for s in run.stages)]
    where = f"of the sparsest run of each method, seed {report.seed}"
    return Page(
        "compare",
        f"{report.task}: {len(names)} methods at {len(family)} sparsities",
        verdict,
        cards,
        len(warned) + len(failed),
        [
            _accuracy(report, names, family),
            _warnings([*failed, *warned]),
            *([_sparsity_of_runs(shown)] if shown else []),
            *([_flops_of_runs(report, shown)] if shown else []),
            *_stages(with_data, where),
            *([_damping(with_data, where)] if with_data else []),
            _spectrum(report, None, "of the dense network"),
            *([_taken_back(with_data, where)] if with_data else []),
            _method([(run.criterion, run.method) for run in shown]),
        ],
        report.seed,
        report.origin,
    )


def _sparsest_best(cell: Cell) -> tuple[float, float]:
    return cell.requested_sparsity, cell.mean or 0.0


def _sparsest(runs: Sequence[Result]) -> list[Result]:
    """Of each method the sparsest run, of the first seed that has it."""
    found: dict[str, Result] = {}
    for run in runs:
        if run.criterion not in found or run.requested_sparsity > found[run.criterion].requested_sparsity:
            found[run.criterion] = run
    return list(found.values())


# Results


def _verdict(report: Pruning | Gradual, metric: float) -> str:
    difference = metric - report.dense.metric
    moved = "stays" if round(difference, 2) == 0 else "rises" if difference > 0 else "falls"
    by = "" if moved == "stays" else f" by {abs(difference):.2f} to"
    at = " at" if moved == "stays" else ""
    name = report.metric.partition(",")[0]
    return f"With {count(report.kept)} of {count(report.size)} weights left, {name} on test data {moved}{by}{at} {metric:.2f}."


def _metric_card(report: Task, metric: float, beside: str) -> Card:
    difference = points(metric - report.dense.metric)
    return Card(report.metric, f"{metric:.2f}", f"dense {report.dense.metric:.2f} ({difference}){beside}")


def _size_card(outcome: Outcome) -> Card:
    return Card(
        "Weights",
        f"{count(outcome.kept)}",
        f"of {count(outcome.size)}: {fewer(outcome.kept, outcome.size)}",
    )


def _flops_card(report: Task, outcome: Outcome) -> Card:
    sums = _flops_sums(report, outcome.layers)
    if sums is None:
        return Card("FLOPs", "not counted", "see below")
    kept, total = sums
    return Card(
        "FLOPs a sample",
        amount(kept),
        f"of {amount(total)} in the pruned layers: {fewer(round(kept), total)}",
    )


def _total(outcome: Outcome) -> float:
    return outcome.seconds.get("total", 0.0)


def _longest(seconds: Mapping[str, float]) -> str:
    phases = sorted(((s, name) for name, s in seconds.items() if name != "total"), reverse=True)[:2]
    return ", ".join(f"{name} {duration(s)}" for s, name in phases if s > 0)


def _weights(kept: int, size: int) -> list[str]:
    return [count(kept), per_cent(1 - kept / size, 2)]


def _outcome_row(
    name: str,
    metric: float,
    report: Pruning,
    layers: Sequence[Layer],
    seconds: Mapping[str, float] | None = None,
) -> list[str]:
    kept = sum(layer.kept for layer in layers)
    return [
        name,
        f"{metric:.2f}",
        points(metric - report.dense.metric),
        *_weights(kept, report.size),
        *_flops_cells(report, layers),
        "" if seconds is None else duration(seconds.get("total", 0.0)),
    ]


def _columns(report: Task) -> list[str]:
    return ["", "test", "against dense", "weights kept", "removed", *_flops_columns(report), "time"]


def _flops_columns(report: Task) -> list[str]:
    return ["FLOPs a sample"] if _known_flops(report) else []


def _flops_cells(report: Task, layers: Sequence[Layer] | None) -> list[str]:
    flops = _known_flops(report)
    if not flops:
        return []
    if layers is None:
        return [amount(sum(flops.values()))]
    sums = _flops_sums(report, layers)
    return ["" if sums is None else amount(sums[0])]


def _known_flops(report: Task) -> dict[str, int]:
    return (report.examined.flops if report.examined is not None else None) or {}


def _flops_sums(report: Task, layers: Sequence[Layer]) -> tuple[float, int] | None:
    """FLOPs that these layers have left, and all; every weight of a layer has an equal part in its FLOPs."""
    flops = _known_flops(report)
    if not flops or any(layer.name not in flops for layer in layers):
        return None
    return (
        sum(flops[layer.name] * layer.kept / layer.size for layer in layers),
        sum(flops[layer.name] for layer in layers),
    )


def _accuracy(report: Comparison, names: Sequence[str], family: Sequence[float]) -> Section:
    means = [cell.mean for cell in report.summary if cell.mean is not None]
    sds = [cell.sd or 0.0 for cell in report.summary if cell.mean is not None]
    edges = [mean + side * sd for mean, sd in zip(means, sds, strict=True) for side in (-1, 1)]
    x = linear([100 * sparsity for sparsity in family])
    y = linear([*edges, report.dense.metric])
    series = []
    for index, name in enumerate(names):
        cells = sorted(
            (c for c in report.summary if c.criterion == name and c.mean is not None),
            key=lambda c: c.requested_sparsity,
        )
        series.append(
            Series(
                name,
                [(100 * c.requested_sparsity, c.mean or 0.0) for c in cells],
                index,
                spread=[c.sd for c in cells],
                dashed=index >= COLOURS,
                notes=[
                    f"{name} at {per_cent(c.requested_sparsity)}: {c.mean:.2f}{_plus_minus(c)}" for c in cells
                ],
            )
        )
    spread = ", with the standard deviation over seeds as bars" if report.seeds > 1 else ""
    figure = Figure(
        chart(
            f"{report.metric} against sparsity for {len(names)} methods; the table below holds the values",
            series,
            x,
            y,
            height=300,
            rules=[(report.dense.metric, "rule")],
        ),
        f"Each point was measured once on test data{spread}.",
        y=report.metric,
        x="sparsity, %",
        legend=[
            *((swatch(index, dashed=index >= COLOURS), name) for index, name in enumerate(names)),
            (key("rule level", "rule"), f"dense, {report.dense.metric:.2f}"),
        ],
    )
    rows, best = [], set()
    for name in names:
        cells_at = {c.requested_sparsity: c for c in report.summary if c.criterion == name}
        rows.append([name, *(_cell(cells_at.get(sparsity)) for sparsity in family)])
    for column, sparsity in enumerate(family, 1):
        here = [
            (c.mean, names.index(c.criterion))
            for c in report.summary
            if c.requested_sparsity == sparsity and c.mean is not None
        ]
        best |= {(row, column) for mean, row in here if mean == max(here)[0]}
    mean = "" if report.seeds == 1 else f", mean ± standard deviation of {report.seeds} seeds"
    return Section(
        "accuracy",
        "Metric against sparsity",
        figures=[figure],
        tables=[
            Table(
                f"{report.metric} on test data{mean}; dense {report.dense.metric:.2f}",
                ["method", *(f"{100 * s:g} %" for s in family)],
                rows,
                best=frozenset(best),
            )
        ],
    )


def _plus_minus(cell: Cell) -> str:
    return "" if cell.sd is None else f" ± {cell.sd:.2f}"


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return ""
    return "failed" if cell.mean is None else f"{cell.mean:.2f}{_plus_minus(cell)}"


# Warnings, time, method


def _warnings(messages: Sequence[str]) -> Section:
    none = ["None: no numerical fallback, and nothing to look after."]
    return Section("warnings", "Warnings and fallbacks", none if not messages else [], items=messages)


def _time(seconds: Mapping[str, float]) -> Section:
    total = seconds.get("total") or 1.0
    rows = [
        [name, duration(s), per_cent(s / total)]
        for name, s in sorted(seconds.items(), key=lambda item: -item[1])
        if name != "total" and s > 0
    ]
    rows.append(["total", duration(seconds.get("total", 0.0)), ""])
    return Section(
        "time", "Where the time went", tables=[Table("Wall-clock time by phase", ["", "time", "share"], rows)]
    )


def _method(methods: Sequence[tuple[str, Mapping[str, Any]]]) -> Section:
    options = [_options(method) for _, method in methods]
    names = list(dict.fromkeys(name for one in options for name in one))
    rows = [[name, *(one.get(name, "") for one in options)] for name in names]
    return Section(
        "method",
        "Method",
        tables=[Table("Every option that ran", ["", *(name for name, _ in methods)], rows)],
    )


def _options(method: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Options by name, those of a part as `part.name`."""
    found: dict[str, str] = {}
    for name, value in method.items():
        if isinstance(value, Mapping):
            found |= _options(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = _value(value)
    return found


def _value(value: object) -> str:
    if value is None:
        return "all"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return count(value)
    return significant(value) if isinstance(value, float) else str(value)


# Layers


def _sparsity(layers: Sequence[Layer], criterion: str, against: Mapping[str, Sequence[Layer]]) -> Section:
    uniform = sum(layer.kept for layer in layers) / sum(layer.size for layer in layers)
    others = {name: {layer.name: layer for layer in rows} for name, rows in against.items()}
    shares = [layer.kept / layer.size for rows in (layers, *against.values()) for layer in rows]
    scale = linear([100 * share for share in [*shares, uniform]], zero=True, unit=" %")
    rows, table = [], []
    for layer in layers:
        share = layer.kept / layer.size
        beside = [rows[layer.name] for rows in others.values() if layer.name in rows]
        rows.append(
            Rows(
                layer.name,
                f"{per_cent(layer.sparsity)} removed",
                [(0, scale.place(100 * share), "s0")],
                [(scale.place(100 * other.kept / other.size), "other") for other in beside],
            )
        )
        table.append(
            [
                layer.name,
                count(layer.size),
                count(layer.kept),
                per_cent(layer.sparsity, 2),
                points(100 * (layer.sparsity - 1 + uniform)),
                *(per_cent(other.sparsity, 2) for other in beside),
            ]
        )
    legend = [
        (key("s0", "bar"), f"kept by {criterion}"),
        *((key("other", "mark"), f"kept by {name}") for name in against),
        (key("rule", "rule"), f"the same for every layer: {per_cent(uniform)}"),
    ]
    return Section(
        "sparsity",
        "Sparsity by layer",
        [
            f"A uniform sparsity would keep {per_cent(uniform)} of every layer. Layers that reach beyond the line were "
            "found to matter more."
        ],
        figures=[
            Figure(
                bars(
                    f"Share of the weights kept in each of {len(layers)} layers against a uniform {per_cent(uniform)}; "
                    "the table below holds the values",
                    rows,
                    scale=scale,
                    rule=scale.place(100 * uniform),
                ),
                x="kept of the layer's weights",
                legend=legend,
            )
        ],
        tables=[
            Table(
                "Weights by layer",
                ["layer", "weights", "kept", "sparsity", "points above uniform", *against],
                table,
                summary="The same as a table",
            )
        ],
    )


def _sparsity_of_runs(runs: Sequence[Result]) -> Section:
    names = [layer.name for layer in runs[0].layers]
    kept = {run.criterion: {layer.name: layer.kept / layer.size for layer in run.layers} for run in runs}
    uniform = max(runs, key=lambda run: run.sparsity)
    share = uniform.kept / uniform.size
    scale = linear(
        [100 * value for by in kept.values() for value in by.values()] + [100 * share], zero=True, unit=" %"
    )
    table = [
        [name, count(layer.size), *(per_cent(1 - kept[run.criterion].get(name, 0.0), 2) for run in runs)]
        for name, layer in zip(names, runs[0].layers, strict=True)
    ]
    rows = [
        Rows(
            f"{name} · {run.criterion}" if first else run.criterion,
            f"{per_cent(1 - kept[run.criterion].get(name, 0.0))} removed",
            [(0, scale.place(100 * kept[run.criterion].get(name, 0.0)), f"s{index % COLOURS}")],
        )
        for name in names
        for index, (run, first) in enumerate(zip(runs, [True, *[False] * len(runs)], strict=False))
    ]
    return Section(
        "sparsity",
        "Sparsity by layer",
        [
            f"Of the sparsest run of each method, seed {runs[0].seed}. A uniform sparsity of "
            f"{per_cent(uniform.sparsity)} would keep {per_cent(share)} of every layer."
        ],
        figures=[
            Figure(
                bars(
                    f"Share of the weights kept in each of {len(names)} layers by {len(runs)} methods; the table below "
                    "holds the values",
                    rows,
                    scale=scale,
                    rule=scale.place(100 * share),
                ),
                x="kept of the layer's weights",
                legend=[
                    *((key(f"s{i % COLOURS}", "bar"), run.criterion) for i, run in enumerate(runs)),
                    (key("rule", "rule"), f"the same for every layer: {per_cent(share)}"),
                ],
            )
        ],
        tables=[
            Table(
                "Sparsity by layer",
                [
                    "layer",
                    "weights",
                    *(f"{run.criterion}, {100 * run.requested_sparsity:g} %" for run in runs),
                ],
                table,
                summary="The same as a table",
            )
        ],
    )


def _missing(report: Task, what: str) -> str:
    if report.examined is None:
        return _NO_RECORD
    return report.examined.missing.get(what, _NO_RECORD)


def _flops(report: Task, layers: Sequence[Layer]) -> Section:
    sums = _flops_sums(report, layers)
    if sums is None:
        return Section("flops", "FLOPs by layer", [f"Not counted. {_missing(report, 'flops')}"])
    flops = _known_flops(report)
    scale = linear([flops[layer.name] / _unit(flops.values())[0] for layer in layers], zero=True)
    unit, name = _unit(flops.values())
    rows, table = [], []
    for layer in layers:
        total = flops[layer.name]
        kept = total * layer.kept / layer.size
        stop = scale.place(total / unit)
        rows.append(
            Rows(
                layer.name,
                f"{amount(kept)} of {amount(total)}",
                [(scale.place(kept / unit), stop, "gone"), (0, scale.place(kept / unit), "s0")],
            )
        )
        table.append(
            [layer.name, amount(total), amount(kept), amount(total - kept), per_cent(total / (sums[1] or 1))]
        )
    return Section(
        "flops",
        "FLOPs by layer",
        [f"{amount(sums[0])} of {amount(sums[1])} FLOPs a sample are left in the pruned layers. {_ZEROS}"],
        figures=[
            Figure(
                bars(
                    f"FLOPs kept and removed in each of {len(layers)} layers; the table below holds the values",
                    rows,
                    scale=scale,
                ),
                x=f"{name}FLOPs a sample",
                legend=[(key("s0", "bar"), "kept"), (key("gone", "bar"), "removed")],
            )
        ],
        tables=[
            Table(
                "FLOPs a sample, by layer",
                ["layer", "dense", "kept", "removed", "share of all, dense"],
                table,
                summary="The same as a table",
            )
        ],
    )


def _unit(values: Iterable[float]) -> tuple[float, str]:
    largest = max(values, default=0)
    return next(
        ((u, n) for u, n in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if largest >= u), (1.0, "")
    )


def _flops_of_runs(report: Comparison, runs: Sequence[Result]) -> Section:
    sums = [(run, _flops_sums(report, run.layers)) for run in runs]
    if any(one is None for _, one in sums):
        return Section("flops", "FLOPs by layer", [f"Not counted. {_missing(report, 'flops')}"])
    flops = _known_flops(report)
    kept = {run.criterion: {layer.name: layer.kept / layer.size for layer in run.layers} for run in runs}
    unit, name = _unit(flops.values())
    layers = [layer.name for layer in runs[0].layers]
    scale = linear([flops[layer] / unit for layer in layers], zero=True)
    rows = [
        Rows(
            f"{layer} · {run.criterion}" if index == 0 else run.criterion,
            f"{amount(flops[layer] * share)} of {amount(flops[layer])}",
            [
                (scale.place(flops[layer] * share / unit), scale.place(flops[layer] / unit), "gone"),
                (0, scale.place(flops[layer] * share / unit), f"s{index % COLOURS}"),
            ],
        )
        for layer in layers
        for index, run in enumerate(runs)
        for share in [kept[run.criterion].get(layer, 0.0)]
    ]
    table = [
        [
            layer,
            amount(flops[layer]),
            *(amount(flops[layer] * kept[run.criterion].get(layer, 0.0)) for run in runs),
        ]
        for layer in layers
    ]
    table.append(["all", amount(sum(flops.values())), *(amount(one[0]) if one else "" for _, one in sums)])
    return Section(
        "flops",
        "FLOPs by layer",
        [f"Of the same runs. {_ZEROS}"],
        figures=[
            Figure(
                bars(
                    f"FLOPs kept and removed in each of {len(layers)} layers by {len(runs)} methods; the table below "
                    "holds the values",
                    rows,
                    scale=scale,
                ),
                x=f"{name}FLOPs a sample",
                legend=[
                    *(
                        (key(f"s{i % COLOURS}", "bar"), f"kept by {run.criterion}")
                        for i, run in enumerate(runs)
                    ),
                    (key("gone", "bar"), "removed"),
                ],
            )
        ],
        tables=[
            Table(
                "FLOPs a sample that are left, by layer",
                ["layer", "dense", *(run.criterion for run in runs)],
                table,
                summary="The same as a table",
            )
        ],
    )


# Stages


def _held_out(method: Mapping[str, Any]) -> bool:
    return isinstance(method.get("stages"), Mapping)


def _stages(runs: Sequence[tuple[str, Staged]], where: str = "") -> list[Section]:
    title = "Predicted and measured change of the loss"
    intro = f"Stages {where}. " if where else ""
    runs = [(name, run) for name, run in runs if run.stages]
    if not any(stage.predicted is not None for _, run in runs for stage in run.stages):
        text = "No curvature was estimated, so that nothing was predicted."
        return [Section("stages", title, [text])]
    figures, tables = [], []
    for name, run in runs:
        known = _held_out(run.method)
        measured = "measured on held-out samples" if known else "measured on the samples of the rows"
        label = f"{name}: " if len(runs) > 1 else ""
        figures.append(
            _predictions(
                f"{label}{len(run.stages)} {'stage' if len(run.stages) == 1 else 'stages'}",
                measured,
                "stage",
                [
                    (
                        number,
                        s.predicted,
                        s.measured,
                        s.accepted,
                        f"stage {number}, to {per_cent(s.sparsity)}",
                    )
                    for number, s in enumerate(run.stages, 1)
                ],
            )
        )
        tables.append(
            Table(
                f"{label}change of the mean loss, stage by stage",
                ["stage", "sparsity", "predicted", "measured", "measured / predicted", "λ", "gradient", ""],
                [
                    [
                        str(number),
                        per_cent(s.sparsity, 2),
                        "" if s.predicted is None else change(s.predicted),
                        "" if s.measured is None else change(s.measured),
                        _ratio(s.predicted, s.measured),
                        _lambda(s.damping, known),
                        "used" if s.first_order else "",
                        "" if s.accepted else "taken back",
                    ]
                    for number, s in enumerate(run.stages, 1)
                ],
                summary=f"{label}all {len(run.stages)} stages as a table",
            )
        )
    text = [
        f"{intro}Predicted is what the quadratic model expects of a stage, measured what the loss then did. Where the two "
        "part, the model was trusted further than it holds; more stages, or more damping, bring them together."
    ]
    return [Section("stages", title, text, figures=figures, tables=tables)]


def _ratio(predicted: float | None, measured: float | None) -> str:
    if predicted is None or measured is None or predicted <= 0 or measured <= 0:
        return ""
    return significant(measured / predicted, 2)


def _lambda(damping: float | None, adapts: bool) -> str:
    return significant(damping) if damping else "kept weights stay" if adapts else ""


def _predictions(
    caption: str,
    measured_on: str,
    step: str,
    steps: Sequence[tuple[int, float | None, float | None, bool, str]],
) -> Figure:
    """Predicted and measured change by stage or step, on an axis that bends around zero."""
    predicted = [(float(n), p, note) for n, p, _, accepted, note in steps if p is not None and accepted]
    measured = [(float(n), m, note) for n, _, m, accepted, note in steps if m is not None and accepted]
    back = [(float(n), m, note) for n, _, m, accepted, note in steps if m is not None and not accepted]
    values = [value for series in (predicted, measured, back) for _, value, _ in series]
    few = len(steps) <= 40
    series = [
        Series(
            "predicted",
            [(n, v) for n, v, _ in predicted],
            0,
            markers=few,
            notes=[f"{note}: predicted {change(v)}" for _, v, note in predicted],
        ),
        Series(
            "measured",
            [(n, v) for n, v, _ in measured],
            1,
            "dots",
            notes=[f"{note}: measured {change(v)}" for _, v, note in measured],
        ),
        Series(
            "taken back",
            [(n, v) for n, v, _ in back],
            2,
            "crosses",
            notes=[f"{note}: measured {change(v)}, taken back" for _, v, note in back],
        ),
    ]
    x, y = linear([0.0, *(float(n) for n, *_ in steps)]), signed_logarithmic(values)
    return Figure(
        chart(
            f"{caption}: predicted and measured change of the loss; the table holds the values",
            series,
            x,
            y,
            height=260,
        ),
        f"{caption}; the axis is logarithmic away from zero.",
        y="change of the mean loss",
        x=step,
        legend=[
            (swatch(0), "predicted"),
            (swatch(1, "dots"), measured_on),
            *([(swatch(2, "crosses"), "measured and taken back")] if back else []),
        ],
    )


def _taken_back(runs: Sequence[tuple[str, Staged]], where: str = "") -> Section:
    title = "Tried and taken back"
    rows = []
    adapts = [name for name, run in runs if _held_out(run.method)]
    for name, run in runs:
        for number, stage in enumerate(run.stages, 1):
            if not stage.accepted:
                label = f"{name}, stage {number}" if len(runs) > 1 else f"stage {number}"
                rows.append(
                    [
                        label,
                        per_cent(stage.sparsity, 2),
                        "" if stage.predicted is None else change(stage.predicted),
                        "" if stage.measured is None else change(stage.measured),
                        _lambda(stage.damping, True),
                    ]
                )
    if not adapts:
        return Section(
            title=title, key="taken-back", text=["Nothing: with a fixed number of stages every one stands."]
        )
    if not rows:
        return Section(
            title=title,
            key="taken-back",
            text=["Nothing: no stage raised the loss by far more than predicted."],
        )
    stages = sum(len(run.stages) for name, run in runs if name in adapts)
    text = (
        f"{len(rows)} of {stages} stages{' ' + where if where else ''} raised the held-out loss by far more than predicted. "
        "Each was taken back and tried again with half of the removals."
    )
    table = Table(
        "Stages that were taken back",
        ["", "sparsity tried", "predicted", "measured", "λ"],
        rows,
        summary=f"The {len(rows)} that were taken back" if len(rows) > 8 else "",
    )
    return Section("taken-back", title, [text], tables=[table])


def _last_damping(run: Staged) -> float | None:
    chosen = [stage.damping for stage in run.stages if stage.damping and stage.accepted]
    given = run.method.get("curvature", {}) if isinstance(run.method.get("curvature"), Mapping) else {}
    fixed = given.get("damping")
    return chosen[-1] if chosen else fixed if isinstance(fixed, float) else None


def _damping(runs: Sequence[tuple[str, Staged]], where: str = "") -> Section:
    text = [f"Of the stages {where}." if where else ""]
    series, legend = [], []
    for index, (name, run) in enumerate(runs):
        text.append(f"{name}: {_damping_asked(run.method)}" if len(runs) > 1 else _damping_asked(run.method))
        line = [(float(n), s.damping) for n, s in enumerate(run.stages, 1) if s.damping and s.accepted]
        if len(line) > 1:
            series.append(
                Series(
                    name,
                    line,
                    index,
                    markers=len(line) <= 40,
                    notes=[f"{name}, stage {n:.0f}: λ = {significant(v)}" for n, v in line],
                )
            )
            legend.append((swatch(index), name))
        elif line:
            text.append(f"λ = {significant(line[0][1])}.")
    return Section(
        "damping",
        "Damping",
        [part for part in text if part],
        figures=_damping_figure(series, legend, "stage"),
    )


def _damping_figure(series: Sequence[Series], legend: Sequence[tuple[Any, str]], step: str) -> list[Figure]:
    if not series:
        return []
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points]
    picture = chart(
        f"Damping by {step}, from {significant(min(ys))} to {significant(max(ys))}",
        series,
        linear([0.0, *xs]),
        logarithmic(ys),
        height=200,
    )
    return [Figure(picture, y="λ", x=step, legend=legend if len(series) > 1 else [])]


def _damping_asked(method: Mapping[str, Any]) -> str:
    curvature = method.get("curvature")
    asked = curvature.get("damping") if isinstance(curvature, Mapping) else None
    if asked is None:
        return "This method has no damping."
    if isinstance(asked, Mapping):
        factor = asked.get("factor")
        return f"λ is {factor} times the mean diagonal entry of the curvature, at every stage anew."
    if asked == "auto":
        return (
            "λ is chosen at every stage among several, by the loss on held-out samples."
            if _held_out(method)
            else "λ is chosen at every stage as the one under which held-out gradient rows are likeliest."
        )
    return f"λ = {significant(asked)} throughout, as given." if isinstance(asked, float) else f"λ: {asked}."


# Spectrum


def _spectrum(report: Task, damping: float | None, when: str) -> Section:
    title = "The curvature's spectrum by layer"
    spectrum = report.examined.spectrum if report.examined is not None else None
    if spectrum is None:
        return Section("spectrum", title, [f"Left out. {_missing(report, 'spectrum')}"])
    shown = [[e for e in layer.eigenvalues if e > 0] for layer in spectrum.layers]
    # What float32 gradients leave below is rounding, and would push the rest to the side.
    shown = [[e for e in values if e > 1e-9 * max(values)] for values in shown]
    everything = [e for values in shown for e in values]
    scale = logarithmic([*everything, *([damping] if damping else [])])
    rows, table = [], []
    for layer, values in zip(spectrum.layers, shown, strict=True):
        value = f"largest {significant(max(values), 2)}" if values else "no curvature"
        ends = [(scale.place(min(values)), scale.place(max(values)), "span")] if values else []
        rows.append(
            Rows(
                layer.name,
                value,
                ends,
                [(scale.place(layer.mean), "other")] if layer.mean > 0 else [],
                ticks=[scale.place(e) for e in values],
            )
        )
        table.append(
            [
                layer.name,
                count(layer.weights),
                significant(max(values)) if values else "0",
                significant(layer.eigenvalues[len(layer.eigenvalues) // 2]) if layer.eigenvalues else "",
                significant(layer.mean),
                f"{layer.rank:.1f}",
            ]
        )
    labels = "the data's labels" if spectrum.labels == "data" else "labels from the model"
    text = [
        f"Eigenvalues of each layer's block of the Fisher {when}, without damping, from {spectrum.rows} gradients of single "
        f"samples with {labels}. That many rows have no more than {spectrum.rows} eigenvalues above zero, which are drawn at "
        "evenly spaced ranks. Directions far above λ are known from the data; in those far below, λ alone decides."
    ]
    legend = [
        (key("eigen", "eigen"), "eigenvalues"),
        (key("other", "mark"), "mean diagonal entry"),
        *([(key("rule", "rule"), f"λ of the last stage: {significant(damping)}")] if damping else []),
    ]
    return Section(
        "spectrum",
        title,
        text,
        figures=[
            Figure(
                bars(
                    f"Eigenvalues of the curvature in each of {len(rows)} layers on a logarithmic scale; the table below "
                    "holds the largest",
                    rows,
                    scale=scale,
                    rule=scale.place(damping) if damping else None,
                ),
                x="eigenvalue",
                legend=legend,
            )
        ],
        tables=[
            Table(
                "Spectrum by layer",
                [
                    "layer",
                    "weights left",
                    "largest",
                    "median of those drawn",
                    "mean diagonal entry",
                    "effective rank",
                ],
                table,
                summary="The same as a table",
            )
        ],
    )


# Training


def _training(report: Gradual, best: int) -> Section:
    steps = [float(epoch.step) for epoch in report.epochs]
    x = linear([0.0, *steps])
    end = steps[-1]
    sparsities = [
        (0.0, 0.0),
        *((float(r.step), 100 * r.sparsity) for r in report.history),
        (end, 100 * report.sparsity),
    ]
    validation = [(float(epoch.step), epoch.validation) for epoch in report.epochs]
    chosen = [point for point in validation if point[0] == best] or validation[-1:]
    many = len(report.epochs) > 40
    metric = chart(
        f"{report.metric} on validation data by step; the table below holds the values",
        [
            Series(
                "validation",
                validation,
                0,
                markers=not many,
                notes=[f"step {s:.0f}: {v:.2f}" for s, v in validation],
            ),
            Series("best", chosen, 3, "dots", notes=["the epoch that was kept"]),
        ],
        x,
        linear([*(v for _, v in validation), report.validation.dense]),
        rules=[(report.validation.dense, "rule")],
    )
    loss = [(float(epoch.step), epoch.loss) for epoch in report.epochs]
    losses = chart(
        "Mean training loss of each epoch by step",
        [
            Series(
                "loss", loss, 1, markers=not many, notes=[f"step {s:.0f}: {significant(v)}" for s, v in loss]
            )
        ],
        x,
        linear([v for _, v in loss], zero=True),
        height=180,
    )
    sparsity = chart(
        "Sparsity by step",
        [Series("sparsity", sparsities, 4, "step")],
        x,
        linear([0.0, 100.0], unit=" %"),
        height=160,
    )
    rates = [(float(epoch.step), epoch.rate) for epoch in report.epochs]
    rate = chart(
        "Learning rate by step",
        [
            Series(
                "rate",
                rates,
                5,
                markers=not many,
                notes=[f"step {s:.0f}: {significant(v)}" for s, v in rates],
            )
        ],
        x,
        linear([v for _, v in rates], zero=True),
        height=140,
    )
    rows = [
        [
            str(epoch.epoch),
            count(epoch.step),
            f"{epoch.loss:.4f}",
            f"{epoch.validation:.2f}",
            per_cent(epoch.sparsity, 2),
            significant(epoch.rate),
            "kept" if epoch.epoch == report.best_epoch else "",
        ]
        for epoch in report.epochs
    ]
    step = "steps of the optimizer"
    return Section(
        "training",
        "Training",
        [
            f"Weights were removed {len(report.history)} times. The best epoch after the last time is kept, and was measured "
            "once on test data."
        ],
        figures=[
            Figure(
                metric,
                y=f"validation, {report.metric}",
                x=step,
                legend=[
                    (swatch(0), "validation"),
                    (swatch(3, "dots"), f"kept: epoch {report.best_epoch}"),
                    (key("rule level", "rule"), f"dense, {report.validation.dense:.2f}"),
                ],
            ),
            Figure(sparsity, y="sparsity", x=step),
            Figure(losses, y="training loss", x=step),
            Figure(rate, y="learning rate after the epoch", x=step),
        ],
        tables=[
            Table(
                "Every epoch",
                ["epoch", "step", "training loss", "validation", "sparsity", "next rate", ""],
                rows,
                summary=f"All {len(rows)} epochs as a table",
            )
        ],
    )


def _removals(report: Gradual) -> Section:
    """Predicted and measured change with the damping, each time that weights were removed."""
    title = "Predicted and measured change of the loss, and damping"
    if not any(removal.predicted is not None for removal in report.history):
        return Section("stages", title, ["No curvature was estimated, so that nothing was predicted."])
    caption = f"{len(report.history)} removals"
    figures = [
        _predictions(
            caption,
            "measured on the samples of the rows",
            "step of the optimizer",
            [
                (r.step, r.predicted, r.measured, True, f"step {r.step}, to {per_cent(r.sparsity)}")
                for r in report.history
            ],
        )
    ]
    line = [(float(r.step), r.damping) for r in report.history if r.damping]
    if len(line) > 1:
        notes = [f"step {s:.0f}: λ = {significant(v)}" for s, v in line]
        figures += _damping_figure([Series("λ", line, 0, notes=notes)], [], "step of the optimizer")
    rows = [
        [
            count(r.step),
            per_cent(r.sparsity, 2),
            "" if r.predicted is None else change(r.predicted),
            "" if r.measured is None else change(r.measured),
            _ratio(r.predicted, r.measured),
            significant(r.damping) if r.damping else "",
            duration(r.seconds),
        ]
        for r in report.history
    ]
    return Section(
        "stages",
        title,
        [
            "Predicted is what the quadratic model expects of a removal, measured what the loss did before training went on. "
            + _damping_asked(report.method)
        ],
        figures=figures,
        tables=[
            Table(
                "Every removal",
                ["step", "sparsity", "predicted", "measured", "measured / predicted", "λ", "time"],
                rows,
                summary=f"All {len(rows)} removals as a table",
            )
        ],
    )
