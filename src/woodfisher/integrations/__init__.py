"""Pruning inside other libraries' training loops: each module needs that library, and has a `Pruner` step in it."""
