"""How a metric is written, wherever a person reads it."""

from __future__ import annotations


def score(value: float, metric: str) -> str:
    """The value of a metric of that name: to two decimals in per cent, and to four digits otherwise.

    >>> score(98.881, "accuracy, %"), score(-0.05, "R²"), score(-0.0001234, "loss")
    ('98.88', '−0.05000', '−0.0001234')
    """
    return _digits(value, metric).replace("-", "−")


def _digits(value: float, metric: str) -> str:
    return f"{value:.2f}" if "%" in metric else f"{value:#.4g}"


def vanishes(value: float, metric: str) -> bool:
    """Whether that is written as zero.

    >>> vanishes(-0.004, "accuracy, %"), vanishes(1e-5, "loss")
    (True, False)
    """
    return float(_digits(value, metric)) == 0


def mean_score(mean: float | None, sd: float | None, metric: str) -> str:
    """A mean of such a metric, with its standard deviation where there is one; without a mean, that its runs failed.

    >>> mean_score(91, 0.25, "accuracy, %"), mean_score(None, None, "loss")
    ('91.00 ±0.25', 'failed')
    """
    if mean is None:
        return "failed"
    return score(mean, metric) + ("" if sd is None else f" ±{score(sd, metric)}")


def difference(value: float, metric: str) -> str:
    """A difference between two values of such a metric, with its sign.

    >>> difference(-0.9, "%"), difference(0.3, "%"), difference(0, "%"), difference(1e-5, "loss")
    ('−0.90', '+0.30', '±0.00', '+1.000e−05')
    """
    return ("±" if vanishes(value, metric) else "−" if value < 0 else "+") + score(abs(value), metric)
