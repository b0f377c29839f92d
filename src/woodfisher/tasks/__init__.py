"""Tasks: a trained model with its data, loss and metric, found by name."""

from woodfisher.tasks.base import Task, accuracy
from woodfisher.tasks.lookup import load_task, task_names

__all__ = ["Task", "accuracy", "load_task", "task_names"]
