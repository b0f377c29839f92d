"""Report → everything that its page says, the result first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from woodfisher.results.numbers import count, duration, mean_score, per_cent, score, signed_score, significant
from woodfisher.results.page.layers import MethodLayers, flops_section, sparsity_section, spectrum_section
from woodfisher.results.page.parts import Card, Page, Section, Table
from woodfisher.results.page.record import CompareReport, PruneReport, Result, TrainReport
from woodfisher.results.page.results import (
    accuracy_section,
    flops_card,
    metric_card,
    result_section,
    size_card,
    time_card,
    trained_section,
    verdict,
)
from woodfisher.results.page.stages import (
    damping_section,
    predictions_section,
    staged,
    taken_back_section,
    time_section,
    trained,
)
from woodfisher.results.page.training import training_section

if TYPE_CHECKING:
    from collections.abc import Sequence

    from woodfisher.results.page.record import AnyReport, Cell


_GREY = 7
"""The colour of what a method is held against."""


def page_of(report: AnyReport) -> Page:
    """The page of a report of any command."""
    if isinstance(report, CompareReport):
        return _comparison(report)
    if isinstance(report, TrainReport):
        return _gradual(report)
    return _pruning(report)


def _pruning(report: PruneReport) -> Page:
    by_size = report.magnitude if report.criterion != "magnitude" else None
    methods = [MethodLayers(report.criterion, report.layers)]
    told, beside = verdict(report), ""
    if by_size is not None:
        if by_size.metric is not None:
            told += f" Removing the smallest weights instead gives {score(by_size.metric, report.metric)}."
        beside = f", magnitude {mean_score(by_size.metric, None, report.metric)}"
        if by_size.layers is not None:
            methods.append(MethodLayers("magnitude", by_size.layers, _GREY))
    if report.max_drop is not None:
        told += f" The validation metric was to fall by no more than {per_cent(report.max_drop)}."
    history = staged(report.criterion, report)
    return Page(
        command="prune",
        title=f"{report.task}: {per_cent(report.sparsity, 2)} of the weights removed",
        verdict=told,
        cards=[
            metric_card(report, report.pruned.metric, beside),
            size_card(report),
            flops_card(report, report),
            time_card(report.seconds),
        ],
        warnings=len(report.warnings),
        sections=[
            result_section(report),
            _warnings(report.warnings),
            sparsity_section(methods),
            flops_section(report, methods),
            predictions_section([history]),
            damping_section([history]),
            spectrum_section(report, history.damping, "after pruning"),
            taken_back_section([history]),
            time_section(report.seconds),
            _method([(report.criterion, report.method)]),
        ],
        seed=report.seed,
        origin=report.origin,
    )


def _gradual(report: TrainReport) -> Page:
    history = trained(report)
    methods = [MethodLayers(report.criterion, report.layers)]
    return Page(
        command="train",
        title=f"{report.task}: {per_cent(report.sparsity, 2)} of the weights removed in training",
        verdict=f"{verdict(report)} That is epoch {report.best_epoch} of {len(report.epochs)}, chosen on "
        "validation data.",
        cards=[
            metric_card(report, report.pruned.metric),
            size_card(report),
            flops_card(report, report),
            time_card(report.seconds),
        ],
        warnings=len(report.warnings),
        sections=[
            trained_section(report),
            _warnings(report.warnings),
            training_section(report),
            sparsity_section(methods),
            flops_section(report, methods),
            predictions_section([history], "step"),
            damping_section([history], "step"),
            spectrum_section(report, history.damping, "at the end"),
            taken_back_section([history]),
            time_section(report.seconds),
            _method([(report.criterion, report.method)]),
        ],
        seed=report.seed,
        origin=report.origin,
    )


def _comparison(report: CompareReport) -> Page:
    names = list(dict.fromkeys(cell.criterion for cell in report.summary))
    family = sorted({cell.requested_sparsity for cell in report.summary})
    results = [result for result in report.results if isinstance(result, Result)]
    leader = _leader(report)
    shown = sorted(_sparsest(results), key=lambda one: leader is None or one.criterion != leader.criterion)
    messages = [
        f"{one.criterion} at {100 * one.requested_sparsity:g} %, seed {one.seed}, failed: {one.error}"
        for one in report.results
        if not isinstance(one, Result)
    ]
    messages += dict.fromkeys(f"{one.criterion}: {text}" for one in results for text in one.warnings)
    told, cards = _led(report, leader, shown)
    histories = [
        staged(one.criterion, one, names.index(one.criterion))
        for one in shown
        if any(stage.predicted is not None for stage in one.stages)
    ]
    methods = [MethodLayers(one.criterion, one.layers, names.index(one.criterion)) for one in shown]
    note = "Of the sparsest run of each method, at its first seed. "
    return Page(
        command="compare",
        title=f"{report.task}: {_number(names, 'method')} at {_number(family, 'sparsity', 'sparsities')}",
        verdict=told,
        cards=cards,
        warnings=len(messages),
        sections=[
            accuracy_section(report, names, family),
            _warnings(messages),
            *([sparsity_section(methods, note), flops_section(report, methods, note)] if methods else []),
            *(
                [predictions_section(histories, note=note), damping_section(histories, note=note)]
                if histories
                else []
            ),
            spectrum_section(report, None, "of the dense network"),
            *([taken_back_section(histories, note)] if histories else []),
            _method([(one.criterion, one.method) for one in shown]),
        ],
        seed=report.seed,
        origin=report.origin,
    )


def _leader(report: CompareReport) -> Cell | None:
    """The best method at the highest sparsity that any reached."""
    measured = [
        (c.requested_sparsity, c.mean, -n) for n, c in enumerate(report.summary) if c.mean is not None
    ]
    return report.summary[-max(measured)[2]] if measured else None


def _led(report: CompareReport, best: Cell | None, shown: Sequence[Result]) -> tuple[str, list[Card]]:
    """How good the leader is, in a sentence and on cards."""
    cards = [Card("Dense network", score(report.dense.metric, report.metric), f"test {report.metric}")]
    if best is None or best.mean is None:
        return "Every run failed.", cards
    at = f"{100 * best.requested_sparsity:g} %"
    others = [c for c in report.summary if c.requested_sparsity == best.requested_sparsity and c is not best]
    second = max((c for c in others if c.mean is not None), key=lambda c: c.mean or 0.0, default=None)
    beside = (
        ""
        if second is None
        else f"; next {second.criterion} {mean_score(second.mean, second.sd, report.metric)}"
    )
    cards.append(Card(f"Best at {at}", score(best.mean, report.metric), f"{best.criterion}{beside}"))
    for one in shown[:1]:
        cards += [size_card(one), flops_card(report, one)]
    slowest = max((c.seconds or 0.0 for c in report.summary if c.criterion == best.criterion), default=0.0)
    cards.append(Card("Time", duration(slowest), f"at most for a run of {best.criterion}"))
    seeds = f", mean of {report.seeds} seeds" if report.seeds > 1 else ""
    change = signed_score(best.mean - report.dense.metric, report.metric)
    return (
        f"At {at} {best.criterion} is best with {score(best.mean, report.metric)}{seeds}, {change} against the "
        "dense network.",
        cards,
    )


def _sparsest(results: Sequence[Result]) -> list[Result]:
    """Of each method the sparsest run, of the first seed that has it."""
    found: dict[str, Result] = {}
    for one in results:
        if one.criterion not in found or one.requested_sparsity > found[one.criterion].requested_sparsity:
            found[one.criterion] = one
    return list(found.values())


def _number(things: Sequence[object], one: str, several: str = "") -> str:
    return f"{len(things)} {one if len(things) == 1 else several or one + 's'}"


def _warnings(messages: Sequence[str]) -> Section:
    none = [] if messages else ["None came up."]
    return Section("warnings", "Warnings and fallbacks", none, items=messages)


def _method(methods: Sequence[tuple[str, Mapping[str, Any]]]) -> Section:
    options = [_options(method) for _, method in methods]
    rows = [
        [name, *(one.get(name, "") for one in options)]
        for name in dict.fromkeys(name for one in options for name in one)
    ]
    columns = ["", *(name for name, _ in methods)]
    table = Table("Every option of the method", columns, rows, summary="Every option that ran")
    return Section("method", "Method", tables=[table])


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
