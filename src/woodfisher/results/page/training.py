"""The section of training curves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from woodfisher.results.numbers import count, per_cent, score, significant
from woodfisher.results.page.charts import Series, chart, counting, key, linear, swatch
from woodfisher.results.page.parts import Figure, Section, Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from markupsafe import Markup

    from woodfisher.results.page.charts import Scale
    from woodfisher.results.page.record import TrainReport

_STEPS = "steps of the optimizer"


def training_section(report: TrainReport) -> Section:
    """Validation, sparsity, loss and learning rate over the steps of the optimizer, and every epoch as a table."""
    end = report.epochs[-1].step
    x = counting(end)
    sparsity = [
        (0.0, 0.0),
        *((float(r.step), 100 * r.sparsity) for r in report.history),
        (float(end), 100 * report.sparsity),
    ]
    rows = [
        [
            str(epoch.epoch),
            count(epoch.step),
            f"{epoch.loss:.4f}",
            score(epoch.validation, report.metric),
            per_cent(epoch.sparsity, 2),
            significant(epoch.rate),
            "chosen" if epoch.epoch == report.best_epoch else "",
        ]
        for epoch in report.epochs
    ]
    losses = [(float(epoch.step), epoch.loss) for epoch in report.epochs]
    rates = [(float(epoch.step), epoch.rate) for epoch in report.epochs]
    staircase = Series("sparsity", sparsity, 4, "step")
    return Section(
        "training",
        "Training",
        [
            f"Weights were removed {len(report.history)} times. The best epoch after the last time was chosen on "
            "validation data, and measured once on test data."
        ],
        figures=[
            _validation(report, x),
            Figure(
                chart("Sparsity by step", [staircase], x, linear([0.0, 100.0], unit=" %"), height=150),
                y="sparsity",
                x=_STEPS,
            ),
            Figure(
                _line("Mean training loss of each epoch by step", losses, 1, x), y="training loss", x=_STEPS
            ),
            Figure(_line("Learning rate by step", rates, 5, x), y="learning rate after the epoch", x=_STEPS),
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


def _validation(report: TrainReport, x: Scale) -> Figure:
    values = [(float(epoch.step), epoch.validation) for epoch in report.epochs]
    chosen = [(float(e.step), e.validation) for e in report.epochs if e.epoch == report.best_epoch]
    notes = [f"epoch {epoch.epoch}: {score(epoch.validation, report.metric)}" for epoch in report.epochs]
    series = [
        Series("validation", values, 0, notes=notes),
        Series("chosen", chosen, 3, "dots", notes=[f"epoch {report.best_epoch}, chosen"] * len(chosen)),
    ]
    y = linear([*(value for _, value in values), report.validation.dense])
    label = f"{report.metric} on validation data by step; the table below holds the values"
    return Figure(
        chart(label, series, x, y, rules=[(report.validation.dense, "rule")]),
        y=f"validation {report.metric}",
        x=_STEPS,
        legend=[
            (swatch(0), "validation"),
            (swatch(3, "dots"), f"chosen: epoch {report.best_epoch}"),
            (key("rule", "level"), f"dense, {score(report.validation.dense, report.metric)}"),
        ],
    )


def _line(label: str, values: Sequence[tuple[float, float]], colour: int, x: Scale) -> Markup:
    notes = [f"step {count(int(step))}: {significant(value)}" for step, value in values]
    series = Series(label, values, colour, notes=notes)
    return chart(label, [series], x, linear([value for _, value in values], zero=True), height=170)
