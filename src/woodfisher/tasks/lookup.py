"""Tasks by name: the built-in ones, and any `module:function`."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from woodfisher.errors import WoodfisherError, told
from woodfisher.gradients.randomness import generators
from woodfisher.tasks.base import Task
from woodfisher.tasks.weights import load_into
from woodfisher.watch import warn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BUILT_IN = {
    "digits": "woodfisher.tasks.digits:digits",
    "digits-small": "woodfisher.tasks.digits:digits_small",
    "mlpnet-mnist": "woodfisher.tasks.mnist:mlpnet_mnist",
    "resnet20-cifar10": "woodfisher.tasks.cifar:resnet20_cifar10",
}
"""Name → `module:function`, imported when the task is asked for."""


def task_names() -> list[str]:
    """Names of the built-in tasks."""
    return list(BUILT_IN)


def load_task(
    name: str, *, data_root: Path | None = None, weights: Path | None = None, seed: int = 0
) -> Task:
    """Build a task: load or train its model, and open its data.

    Parameters
    ----------
    name:
        A built-in task (see `task_names`), or `module:function`. The function is called with those of
        `data_root`, `weights` and `seed` that it declares, and returns a `Task`; its module may lie in the
        working directory.
    data_root:
        Folder of the data files; a function that does not declare it is warned of. Default: the environment variable
        WOODFISHER_DATA.
    weights:
        `.pt` or `.safetensors` file of the model's weights, which are put into the task's model where the function
        does not declare `weights` itself. Default: the task's own choice.
    seed:
        Of the order of the training batches. Two tasks loaded with one seed give the same batches. Generators that the
        training data has of its own are set to it where the function does not declare `seed` itself.
    """
    where = BUILT_IN.get(name, name)
    root = data_root or os.environ.get("WOODFISHER_DATA") or None
    options = {
        "data_root": None if root is None else Path(root),
        "weights": None if weights is None else Path(weights),
        "seed": seed,
    }
    with _working_directory_importable():
        build = _function(where)
        arguments = _declared(build, options, where)
        if data_root is not None and "data_root" not in arguments:
            warn(
                f"the task {name} reads no data files of a folder, so data_root={str(data_root)!r} changes nothing."
            )
        try:
            task = build(**arguments)
        except WoodfisherError:
            raise
        except Exception as error:
            raise WoodfisherError(f"{where} failed while it made its task: {told(error)}") from error
    if not isinstance(task, Task):
        raise WoodfisherError(f"{where} must return a woodfisher.tasks.Task; a {type(task).__name__} came.")
    if "seed" not in arguments:
        for generator in generators(task.train):
            generator.manual_seed(seed)
    if weights is not None and "weights" not in arguments:
        load_into(task.model, Path(weights))
    return task


def _function(where: str) -> Callable[..., Any]:
    module_name, _, function_name = where.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), function_name]):
        raise WoodfisherError(
            f"there is no task {where!r}. Built in are {', '.join(BUILT_IN)}; for a task of your own write "
            "module:function, as in my_project.tasks:resnet."
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise WoodfisherError(
            f"the module of the task {where!r} cannot be imported: {told(error)}. Write module:function with "
            f"a module that is installed or lies in the working directory, or one of {', '.join(BUILT_IN)}."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        found = "has no such name" if function is None else f"has a {type(function).__name__} there"
        raise WoodfisherError(
            f"the task {where!r} must name a function that returns a Task; {module_name} {found}."
        )
    return function


def _declared(build: Callable[..., Any], options: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        signature = inspect.signature(build)
        kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
        if inspect.Parameter.VAR_KEYWORD not in kinds.values():
            options = {name: value for name, value in options.items() if name in kinds}
        signature.bind(**options)
    except (TypeError, ValueError) as error:
        raise WoodfisherError(
            f"{where} cannot be called as a task: {error}. It may declare data_root, weights and seed; "
            "anything else needs a default."
        ) from error
    return options


@contextmanager
def _working_directory_importable() -> Iterator[None]:
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove(folder)
