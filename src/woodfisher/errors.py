"""The errors and the one warning of the library."""

from __future__ import annotations


class WoodfisherError(ValueError):
    """Bad input or a numerical failure: what was expected, what came, and what to do.

    The command line prints the message without a traceback and exits with code 2.
    """


class UnknownDistributionError(WoodfisherError):
    """Targets were to come from the model's own distribution, which the loss does not tell."""


class WoodfisherWarning(UserWarning):
    """Something that the user should know: a fallback, data that ended early, a layer removed whole."""


class ElsewhereError(WoodfisherError):
    """Another of several processes failed, or is lost; it says itself why."""
