"""The library's own training loop: gradual pruning while a task's model is trained on."""

from woodfisher.training.gradual import Training, train

__all__ = ["Training", "train"]
