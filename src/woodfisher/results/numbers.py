"""Numbers, metrics and names as a person reads them."""

from __future__ import annotations

import math

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_MINUS = "−"


def power_of_ten(exponent: int) -> str:
    """10ⁿ.

    >>> power_of_ten(-4), power_of_ten(0)
    ('10⁻⁴', '1')
    """
    return "1" if exponent == 0 else f"10{str(exponent).translate(_RAISED)}"


def significant(value: float | None, digits: int = 3) -> str:
    """A number to that many digits, with a power of ten where it is very large or small; nothing for None.

    >>> significant(0.00015), significant(0.25), significant(-1234.5), significant(0)
    ('1.5 × 10⁻⁴', '0.25', '−1230', '0')
    """
    if value is None:
        return ""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    mantissa, _, exponent = f"{abs(value):.{digits - 1}e}".partition("e")
    power = int(exponent)
    if -3 <= power <= 4:
        text = f"{float(f'{mantissa}e{power}'):.{max(digits - 1 - power, 0)}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    else:
        text = f"{mantissa.rstrip('0').rstrip('.')} × {power_of_ten(power)}"
    return (_MINUS if value < 0 else "") + text


def change(value: float) -> str:
    """A number with its sign, to three digits.

    >>> change(0.004), change(-0.02), change(0)
    ('+0.004', '−0.02', '0')
    """
    return ("+" if value > 0 else "") + significant(value)


def fixed(value: float | None) -> str:
    """A number in [−1, 1] to three decimals; nothing for None.

    >>> fixed(-0.5)
    '−0.500'
    """
    return "" if value is None else f"{value:.3f}".replace("-", _MINUS)


def per_cent(share: float | None, decimals: int = 1) -> str:
    """A share in per cent; nothing for None.

    >>> per_cent(0.954), per_cent(0.95, 2), per_cent(0.0002)
    ('95.4 %', '95.00 %', '<0.1 %')
    """
    if share is None:
        return ""
    text = f"{100 * share:.{decimals}f}"
    return f"<{10**-decimals:g} %" if share > 0 and float(text) == 0 else f"{text} %"


def count(number: int) -> str:
    """A whole number, its thousands apart.

    >>> count(21456)
    '21,456'
    """
    return f"{number:,}"


def amount(number: float) -> str:
    """A large number in thousands, millions and so on.

    >>> amount(589824), amount(40_813_184), amount(12)
    ('590 k', '40.8 M', '12')
    """
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= unit:
            return f"{significant(number / unit)} {name}"
    return significant(number)


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    >>> duration(0.04), duration(32.04), duration(192), duration(4000)
    ('0.04 s', '32.0 s', '3 min 12 s', '1 h 7 min')
    """
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min"


def fewer(kept: float, size: float) -> str:
    """How many times fewer.

    >>> fewer(1073, 21456), fewer(0, 5), fewer(5, 5)
    ('20.0× fewer', 'none left', 'all of them')
    """
    if kept == size:
        return "all of them"
    return f"{size / kept:.1f}× fewer" if kept else "none left"


def given_name(kept: int, size: int) -> str:
    """What a network that was given to be pruned is called; some of its weights may have been gone.

    >>> given_name(10, 10), given_name(9, 10)
    ('dense', 'as given')
    """
    return "dense" if kept == size else "as given"


def score(value: float, metric: str) -> str:
    """The value of a metric of that name: to two decimals in per cent, and to four digits otherwise.

    >>> score(98.881, "accuracy, %"), score(-0.05, "R²"), score(-0.0001234, "loss")
    ('98.88', '−0.05000', '−0.0001234')
    """
    return _digits(value, metric).replace("-", _MINUS)


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


def signed_score(value: float, metric: str) -> str:
    """A difference between two values of such a metric, with its sign.

    >>> signed_score(-0.9, "%"), signed_score(0.3, "%"), signed_score(0, "%"), signed_score(1e-5, "loss")
    ('−0.90', '+0.30', '±0.00', '+1.000e−05')
    """
    return ("±" if vanishes(value, metric) else _MINUS if value < 0 else "+") + score(abs(value), metric)


def shortened(name: str, most: int) -> str:
    """Of a name that is longer than that the end, which tells layers apart.

    >>> shortened("encoder.layers.0.linear", 12)
    '…rs.0.linear'
    """
    return name if len(name) <= most else f"…{name[1 - most :]}"
