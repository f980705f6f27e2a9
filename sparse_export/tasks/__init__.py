"""What a network is for: its samples and its score."""

from sparse_export.tasks.shipped import TASKS, task_named
from sparse_export.tasks.task import Task

__all__ = ["TASKS", "Task", "task_named"]
