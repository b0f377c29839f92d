"""Pruning inside other libraries' training loops: each module needs that library, and only calls `Pruner`."""
