"""Checks of single options, so that every wrong value gets the same kind of message."""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from woodfisher.errors import WoodfisherError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import TypeGuard


def _is_number(value: object) -> TypeGuard[numbers.Real]:
    """Whether `value` is a real number: True and False are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_count(name: str, value: object, *, least: int = 1, or_none: str = "") -> None:
    """Raise unless `value` is a whole number of at least `least` (or None, where `or_none` says what it means)."""
    if value is None and or_none:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        allowed = f", or None for {or_none}" if or_none else ""
        raise WoodfisherError(f"{name} must be a whole number of at least {least}{allowed}; {value!r} came.")


def check_seed(value: object) -> None:
    """Raise unless `value` is a whole number that random generators take."""
    check_count("seed", value, least=0)
    if isinstance(value, numbers.Integral) and int(value) >= 2**63:
        raise WoodfisherError(f"seed must be a whole number below 2^63; {value} came.")


def check_positive(name: str, value: object, why: str) -> None:
    """Raise unless `value` is a finite number above zero."""
    if not _is_number(value) or not math.isfinite(value) or value <= 0:
        raise WoodfisherError(f"{name} must be a finite number above 0, {why}; {value!r} came.")


def check_not_negative(name: str, value: object) -> None:
    """Raise unless `value` is a finite number of at least zero."""
    if not _is_number(value) or not 0 <= float(value) < math.inf:
        raise WoodfisherError(f"{name} must be a finite number of at least 0; {value!r} came.")


def check_fraction(name: str, value: object) -> None:
    """Raise unless `value` is a number in [0, 1)."""
    if not _is_fraction(value):
        raise WoodfisherError(f"{name} must be a number in [0, 1); {value!r} came.")


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise unless `value` is one of `choices`."""
    choices = list(choices)
    if value not in choices:
        raise WoodfisherError(f"{name} must be one of {', '.join(choices)}; {value!r} came.")


def described(value: object) -> str:
    """What came, for a message: dtype and shape of a tensor, or what else it is."""
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def check_vector(name: str, value: object, size: int) -> None:
    """Raise unless `value` is a floating-point tensor `(size,)`."""
    if not isinstance(value, Tensor) or value.shape != (size,) or not value.is_floating_point():
        raise WoodfisherError(
            f"{name} must be a floating-point tensor of shape ({size},); {described(value)} came."
        )


def check_mask(name: str, value: object, size: int) -> None:
    """Raise unless `value` is a bool tensor `(size,)`."""
    if not isinstance(value, Tensor) or value.shape != (size,) or value.dtype != torch.bool:
        raise WoodfisherError(f"{name} must be a bool tensor of shape ({size},); {described(value)} came.")


def finite_number(value: object, message: str) -> float:
    """`value` as a float; raises with `message` unless it is a finite real number."""
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise WoodfisherError(message)
    return float(value)


def metric_value(value: object, message: str) -> float:
    """What a metric returned as a float, which a tensor may hold; raises with `message` unless it is finite."""
    return finite_number(value.item() if isinstance(value, Tensor) and value.numel() == 1 else value, message)


def check_sparsity(value: object) -> None:
    """Raise unless `value` is a fraction in [0, 1)."""
    if not _is_fraction(value):
        raise WoodfisherError(
            f"sparsity is the fraction of weights to remove, in [0, 1): 0.9 for 90 %; {value!r} came."
        )


def _is_fraction(value: object) -> bool:
    return _is_number(value) and 0 <= float(value) < 1
