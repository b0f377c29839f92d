"""How a metric is written, wherever a person reads it."""

from __future__ import annotations


def score(value: float, metric: str) -> str:
    """The value of a metric of that name: to two decimals in per cent, and to four otherwise.

    >>> score(98.881, "accuracy, %"), score(-0.05, "R²")
    ('98.88', '−0.0500')
    """
    return f"{value:.{decimals(metric)}f}".replace("-", "−")


def decimals(metric: str) -> int:
    """How many decimals a metric of that name has."""
    return 2 if "%" in metric else 4
