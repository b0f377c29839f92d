"""The sections that go stage by stage: predicted and measured change, damping, what was taken back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from woodfisher.results.numbers import change, count, duration, per_cent, significant
from woodfisher.results.page.charts import Series, chart, counting, logarithmic, signed_logarithmic, swatch
from woodfisher.results.page.parts import Figure, Section, Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from woodfisher.pruning.report import Stage
    from woodfisher.results.page.record import Staged, TrainReport

_OPEN_ROWS = 8
"""Most rows of a table that is not folded away."""

_PREDICTED = "Predicted and measured change of the loss"


class Change(NamedTuple):
    """What one stage, or one removal in training, did to the loss; and where it stands among the others."""

    at: int
    label: str
    stage: Stage


class History(NamedTuple):
    """A method's changes, in order."""

    name: str
    method: Mapping[str, Any]
    changes: Sequence[Change]
    colour: int = 0

    @property
    def adapts(self) -> bool:
        """Whether its stages are checked on held-out samples, and may be taken back."""
        return isinstance(self.method.get("stages"), Mapping)

    @property
    def damping(self) -> float | None:
        """λ of its last stage that moved the weights, or the one that was given."""
        chosen = [c.stage.damping for c in self.changes if c.stage.damping and c.stage.accepted]
        asked = _asked(self.method)
        return chosen[-1] if chosen else asked if isinstance(asked, float) and asked > 0 else None


def staged(name: str, run: Staged, colour: int = 0) -> History:
    """A run in stages."""
    changes = [Change(n, f"stage {n}", stage) for n, stage in enumerate(run.stages, 1)]
    return History(name, run.method, changes, colour)


def trained(report: TrainReport) -> History:
    """The removals of a training run."""
    changes = [Change(r.step, f"step {count(r.step)}", r) for r in report.history]
    return History(report.criterion, report.method, changes)


def predictions_section(histories: Sequence[History], step: str = "stage", note: str = "") -> Section:
    """What the quadratic model expected, and what the loss did."""
    histories = [
        history for history in histories if any(c.stage.predicted is not None for c in history.changes)
    ]
    if not histories:
        return Section("stages", _PREDICTED, ["No curvature was estimated, so nothing was predicted."])
    text = (
        f"{note}Predicted is what the quadratic model expects, measured what the loss then did. Where the two part, "
        "the model was trusted further than it holds; more stages, or more damping, bring them together."
    )
    several = len(histories) > 1
    return Section(
        "stages",
        _PREDICTED,
        [text],
        figures=[
            _predictions(history, step, f"{history.name}: " if several else "") for history in histories
        ],
        tables=[_table(history, f"{history.name}: " if several else "", step) for history in histories],
    )


def _predictions(history: History, step: str, prefix: str) -> Figure:
    """Both by stage, on an axis that is logarithmic away from zero."""
    accepted = [c for c in history.changes if c.stage.accepted]
    back = [c for c in history.changes if not c.stage.accepted]
    predicted = [(c, c.stage.predicted) for c in accepted if c.stage.predicted is not None]
    measured = [(c, c.stage.measured) for c in accepted if c.stage.measured is not None]
    undone = [(c, c.stage.measured) for c in back if c.stage.measured is not None]
    number, what = len(history.changes), "stage" if step == "stage" else "removal"
    caption = f"{prefix}{number} {what}{'s' * (number != 1)}"
    values = [value for points in (predicted, measured, undone) for _, value in points]
    x = counting(history.changes[-1].at, first=min(history.changes[0].at, 1))
    series = [
        _series("predicted", predicted, 0, "line", "predicted {}"),
        _series("measured", measured, 1, "dots", "measured {}"),
        _series("taken back", undone, 2, "crosses", "measured {}, taken back"),
    ]
    label = f"{caption}: predicted and measured change of the loss; the table below holds the values"
    where = "held-out samples" if history.adapts else "the samples of the rows"
    return Figure(
        chart(label, series, x, signed_logarithmic(values), height=260),
        f"{caption}. The axis is logarithmic away from zero.",
        y="change of the mean loss",
        x="step of the optimizer" if step != "stage" else step,
        legend=[
            (swatch(0), "predicted"),
            (swatch(1, "dots"), f"measured on {where}"),
            *([(swatch(2, "crosses"), "measured and taken back")] if undone else []),
        ],
    )


def _series(
    name: str,
    known: Sequence[tuple[Change, float]],
    colour: int,
    how: Literal["line", "dots", "crosses"],
    told: str,
) -> Series:
    notes = [f"{c.label}, to {per_cent(c.stage.sparsity)}: {told.format(change(v))}" for c, v in known]
    return Series(name, [(c.at, v) for c, v in known], colour, how, notes=notes)


def _table(history: History, prefix: str, step: str) -> Table:
    rows = [
        [
            count(c.at),
            per_cent(c.stage.sparsity, 2),
            _change(c.stage.predicted),
            _change(c.stage.measured),
            _ratio(c.stage.predicted, c.stage.measured),
            _lambda(c, history.adapts),
            "used" if c.stage.first_order else "",
            "" if c.stage.accepted else "taken back",
        ]
        for c in history.changes
    ]
    columns = [step, "sparsity", "predicted", "measured", "measured / predicted", "λ", "gradient", ""]
    return Table(
        f"{prefix}change of the mean loss, one after another",
        columns,
        rows,
        summary=f"{prefix}All {len(rows)} as a table" if len(rows) > _OPEN_ROWS else "",
    )


def _change(value: float | None) -> str:
    return "" if value is None else change(value)


def _ratio(predicted: float | None, measured: float | None) -> str:
    if predicted is None or measured is None or predicted <= 0 or measured <= 0:
        return ""
    return significant(measured / predicted, 2)


def _lambda(c: Change, adapts: bool) -> str:
    return significant(c.stage.damping) if c.stage.damping else "kept weights stay" if adapts else ""


def damping_section(histories: Sequence[History], step: str = "stage", note: str = "") -> Section:
    """λ as it was asked for, and as it was chosen stage by stage."""
    text = [note.strip()] if note else []
    series, legend = [], []
    for history in histories:
        lines = [(c, c.stage.damping) for c in history.changes if c.stage.damping and c.stage.accepted]
        told = _told(history)
        if len(lines) == 1 and not isinstance(_asked(history.method), float):
            told += f" It is {significant(lines[0][1])}."
        text.append(f"{history.name}: {told}" if len(histories) > 1 else told)
        if len(lines) > 1 and len({value for _, value in lines}) > 1:
            notes = [f"{history.name}, {c.label}: λ = {significant(v)}" for c, v in lines]
            points = [(float(c.at), v) for c, v in lines]
            series.append(Series(history.name, points, history.colour, notes=notes))
            legend.append((swatch(history.colour), history.name))
    if not series:
        return Section("damping", "Damping", text)
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points]
    label = f"Damping by {step}, from {significant(min(ys))} to {significant(max(ys))}"
    picture = chart(label, series, counting(max(xs), first=min(*xs, 1)), logarithmic(ys), height=200)
    figure = Figure(
        picture,
        y="λ",
        x="step of the optimizer" if step != "stage" else step,
        legend=legend if len(series) > 1 else [],
    )
    return Section("damping", "Damping", text, figures=[figure])


def _asked(method: Mapping[str, Any]) -> object:
    curvature = method.get("curvature")
    return curvature.get("damping") if isinstance(curvature, Mapping) else None


def _told(history: History) -> str:
    asked = _asked(history.method)
    if asked is None:
        return "This method has no damping."
    if isinstance(asked, Mapping):
        return (
            f"λ is {asked.get('factor')} times the mean diagonal entry of the curvature, at every stage anew."
        )
    if asked == "auto":
        return (
            "λ is chosen at every stage among several, by the loss on held-out samples."
            if history.adapts
            else "λ is chosen at every stage as the one under which held-out gradient rows are likeliest."
        )
    return f"λ = {significant(asked)} throughout, as given." if isinstance(asked, float) else f"λ: {asked}."


def taken_back_section(histories: Sequence[History], note: str = "") -> Section:
    """Stages that were tried and undone."""
    key, title = "taken-back", "Tried and taken back"
    checked = [history for history in histories if history.adapts]
    if not checked:
        return Section(key, title, ["Nothing: stages that don't adapt all stand."])
    undone = [(history, c) for history in checked for c in history.changes if not c.stage.accepted]
    if not undone:
        return Section(key, title, ["Nothing: no stage raised the loss by far more than predicted."])
    rows = [
        [
            f"{history.name}, {c.label}" if len(checked) > 1 else c.label,
            per_cent(c.stage.sparsity, 2),
            _change(c.stage.predicted),
            _change(c.stage.measured),
            _lambda(c, adapts=True),
        ]
        for history, c in undone
    ]
    tried = sum(len(history.changes) for history in checked)
    text = (
        f"{note}{len(rows)} of {tried} stages raised the held-out loss by far more than predicted. Each was taken back "
        "and tried again with other weights, or with half as many."
    )
    table = Table(
        "Stages that were taken back",
        ["", "sparsity tried", "predicted", "measured", "λ"],
        rows,
        summary=f"All {len(rows)} as a table" if len(rows) > _OPEN_ROWS else "",
    )
    return Section(key, title, [text], tables=[table])


def time_section(seconds: Mapping[str, float]) -> Section:
    """Where the time went."""
    total = seconds.get("total") or sum(seconds.values()) or 1.0
    phases = sorted(((s, name) for name, s in seconds.items() if name != "total" and s > 0), reverse=True)
    rows = [[name, duration(s), per_cent(s / total)] for s, name in phases]
    table = Table("Wall-clock time by phase", ["", "time", "share"], [*rows, ["total", duration(total), ""]])
    return Section("time", "Where the time went", tables=[table])
