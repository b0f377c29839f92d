"""The options that commands share; their field docs are the help."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from tyro.conf import arg
from tyro.constructors import PrimitiveConstructorSpec

from woodfisher.checks import check_choice, check_count, check_seed
from woodfisher.cli.example import example_inputs
from woodfisher.curvature import Damping, Relative, WoodFisher
from woodfisher.curvature.planning import Keep  # noqa: TC001  tyro reads the annotations
from woodfisher.errors import WoodfisherError
from woodfisher.files import check_folder
from woodfisher.gradients.base import Labels  # noqa: TC001  tyro reads the annotations
from woodfisher.gradients.batches import Few
from woodfisher.gradients.forward import Precision  # noqa: TC001  tyro reads the annotations
from woodfisher.gradients.objective import Objective, ObjectiveOptions
from woodfisher.gradients.randomness import reseed
from woodfisher.pruning.method import (
    METHODS,
    Method,
    MethodParts,
    Scope,
    Update,
    Use,
    given,
    method_for,
    options_of,
    replaced,
    use_for,
    with_options,
)
from woodfisher.surgeon.patterns import Channels, Pattern, parse_pattern
from woodfisher.tasks import Task, load_task

if TYPE_CHECKING:
    from collections.abc import Callable

Folder = Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="")]
File = Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")]


def _parsed(
    parse: Callable[[str], Any], metavar: str, *, several: bool = False
) -> PrimitiveConstructorSpec[Any]:
    """How an option is read that is None where it is left out: a `parse` alone gives plainer messages than a union."""
    return PrimitiveConstructorSpec(
        nargs="*" if several else 1,
        metavar=metavar,
        instance_from_str=lambda texts: tuple(map(parse, texts)) if several else parse(texts[0]),
        is_instance=lambda _: True,
        str_from_instance=lambda value: [str(value)],
    )


def _count_or(word: str) -> Callable[[str], int | str]:
    return lambda text: text if text == word else int(text)


COUPLED = "coupled-channels"
"""The pattern of all channels that can be cut out of a network."""

_UNSAID = arg(help_behavior_hint="")
Count = Annotated[int | None, _parsed(int, "N"), _UNSAID]
CountOrAll = Annotated[Literal["all"] | int | None, _parsed(_count_or("all"), "N|all"), _UNSAID]
CountOrAuto = Annotated[Literal["auto"] | int | None, _parsed(_count_or("auto"), "N|auto"), _UNSAID]
Number = Annotated[float | None, _parsed(float, "X"), _UNSAID]
Numbers = Annotated[tuple[float, ...] | None, _parsed(float, "X [X ...]", several=True), _UNSAID]
Epochs = Annotated[float | None, _parsed(float, "EPOCHS"), _UNSAID]
Patterns = Annotated[tuple[str, ...], arg(metavar="PATTERN [PATTERN ...]", help_behavior_hint="")]


@dataclass(frozen=True)
class TaskOptions:
    """What is pruned."""

    task: str = "digits"
    """digits, digits-small, mlpnet-mnist, resnet20-cifar10, or module:function of your own that returns a Task."""

    data_root: Folder = None
    """Folder of the task's data files (default: $WOODFISHER_DATA)."""

    weights: File = None
    """File of the trained weights, .pt or .safetensors (default: the task's own)."""

    device: str = "cpu"
    """Where to compute: cpu, cuda or cuda:N."""

    seed: int = 0
    """Which training samples are drawn."""

    train_samples: Count = None
    """Use no more than this many different training samples."""

    params: Patterns = ()
    """Patterns of parameter or module names to prune (default: weights of Linear and convolution layers)."""

    exclude: Patterns = ()
    """Patterns of what to leave dense."""

    precision: Precision = "float32"
    """Of the passes for gradients: bfloat16 is about twice as fast on processors that have it."""

    def load(self) -> Task:
        """Load the task onto the device."""
        check_seed(self.seed)
        reseed([], self.seed)
        task = load_on(self.device, self.task, data_root=self.data_root, weights=self.weights, seed=self.seed)
        reseed([], self.seed)  # since many a task sets a seed of its own
        if self.train_samples is None:
            return task
        check_count("train_samples", self.train_samples)
        return replace(task, train=Few(task.train, self.train_samples, self.seed))

    def folder(self, chosen: Path | None, run: str) -> Path:
        """Where a run's results go: as chosen, or runs/TASK-RUN-seedSEED; raises if that can't be a folder."""
        folder = chosen or Path("runs") / f"{self.task.replace(':', '-')}-{run}-seed{self.seed}"
        check_folder(folder)
        return folder

    @property
    def chosen(self) -> ObjectiveOptions:
        """The options of an objective."""
        return {"params": self.params or None, "exclude": self.exclude, "precision": self.precision}

    def objective(self, task: Task) -> Objective:
        """Objective of the task's model on its training data."""
        return Objective(task.model, task.train, task.loss, **self.chosen)


@dataclass(frozen=True)
class MethodOptions:
    """How it is pruned; what is left out is as the method measures best."""

    preset: Annotated[Literal["paper"] | None, arg(metavar="paper", help_behavior_hint="")] = None
    """The paper's protocol: 100 samples, damping 1e-5, blocks within layers, independent update, one shot."""

    samples: Count = None
    """Training samples to take gradients of: at each stage, or in all where stages adapt."""

    group: Count = None
    """Samples whose gradients are averaged into one row."""

    block_size: CountOrAll = None
    """Most weights in a block of the Fisher; all for one block over all weights."""

    damping: Annotated[str | None, arg(metavar="X|Xx|auto", help_behavior_hint="")] = None
    """λ, added to the curvature's diagonal: 1e-4 in the units of a squared gradient, 0.5x for half of the mean
    curvature (full and block WoodFisher), auto to choose it on held-out rows."""

    memory: Annotated[str | None, arg(metavar="SIZE", help_behavior_hint="")] = None
    """Memory that the process may have at its peak, as in 4GiB (default: what is free)."""

    keep: Annotated[Keep | None, arg(metavar="WHERE", help_behavior_hint="")] = None
    """Where gradient rows are kept: memory, factors (inputs and output gradients of layers), host (main memory, for a
    GPU), disk, again (nowhere: taken again for each window of weights) or half (bfloat16); default: the cheapest of all
    but the last that fits."""

    labels: Annotated[Labels | None, arg(metavar="data|model", help_behavior_hint="")] = None
    """data: the empirical Fisher; model: targets drawn from the model's own predictions."""

    update: Annotated[Update | None, arg(metavar="independent|joint|none", help_behavior_hint="")] = None
    """How kept weights move: sum of single-weight updates, minimiser for the whole removed set, or not."""

    scope: Annotated[Scope | None, arg(metavar="global|layer|flops", help_behavior_hint="")] = None
    """Rank weights across all layers, give each layer the same sparsity, or rank by the rise of the loss for each
    FLOP saved, where --sparsity is the fraction of FLOPs removed."""

    pattern: Annotated[str | None, arg(metavar="PATTERN", help_behavior_hint="")] = None
    """What is removed together: unstructured, 2:4 (any N:M along the inputs, at the sparsity 1 − N/M), 1x4 or 4x4
    (blocks of outputs × inputs), channels (whole outputs), coupled-channels (those that `woodfisher export --to
    channels` can cut out, with biases and normalisation), or 12heads."""

    floor: Number = None
    """Fraction of every layer's weights that stays at least."""

    stages: CountOrAuto = None
    """Rounds of gradients, curvature and removal on the way to the sparsity; auto for many small ones that are
    checked on held-out samples."""

    refine: Count = None
    """Rounds of swaps that improve the kept set against the joint objective, where stages are a number."""

    recalibrate: Count = None
    """Samples to take the statistics of batch normalisation from, after pruning; 0 leaves them."""

    @property
    def _pattern(self) -> Pattern | None:
        """The pattern that was named; of coupled channels, a network says which they are: see `settled`."""
        if self.pattern is None:
            return None
        return Channels() if self.pattern == COUPLED else parse_pattern(self.pattern)

    def settled(self, model: TaskOptions, task: Task, *methods: Method) -> tuple[TaskOptions, list[Method]]:
        """These with what the network says of the pattern: which channels are coupled, and by which parameters.

        Channels stay that a weight which was not chosen is part of; biases and normalisation go with the weights.
        """
        if self.pattern != COUPLED:
            return model, list(methods)
        chosen = model.objective(task).parameters
        every = Channels.of(task.model, example_inputs(task, 2))
        coupled = replace(model, params=every.params, exclude=()).objective(task).parameters
        pattern = every.without({name for name, p in coupled.items() if p.ndim > 1} - chosen.keys())
        if not pattern.coupled:
            raise WoodfisherError(
                f"{COUPLED} removes channels with all weights that they go through, and the chosen weights are "
                f"all of none: choose, with --params or without --exclude, the weights among "
                f"{' or '.join(', '.join(members) for members in every.coupled[:3])}"
                f"{', or others' * (len(every.coupled) > 3)}."
            )
        settled = [replace(method, pattern=pattern) for method in methods]
        return replace(model, params=pattern.params, exclude=()), settled

    def method(self, criterion: str, *, strict: bool, training: bool = False) -> Method:
        """Build the method of that name with these options.

        Options that its curvature doesn't have raise if `strict`, and are passed over otherwise, as are update
        and stages for methods that take no samples, and stages that adapt for methods that have none.
        """
        parts: MethodParts = {
            "update": self.update,
            "stages": self.stages,
            "scope": self.scope,
            "pattern": self._pattern,
            "floor": self.floor,
            "refine": self.refine,
            "recalibrate": self.recalibrate,
        }
        # Stages that adapt have one block.
        fixed = isinstance(self.block_size, int) and not training
        use: Use = "fixed" if fixed else use_for(parts, training=training)
        method = method_for(criterion, self.preset, use=use)
        asked = given(
            samples=self.samples,
            group=self.group,
            damping=_damping(self.damping),
            labels=self.labels,
            memory=self.memory,
            keep=self.keep,
            block_size=self.block_size,
        )
        if self.block_size == "all":
            asked["block_size"] = None
        known = options_of(method.curvature)
        foreign = asked.keys() - known
        if self.refine and not method.curvature.samples:
            foreign |= {"refine"}
        if foreign and strict:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(foreign))
            raise WoodfisherError(f"{names} does not apply to the criterion {criterion}.")
        relative = not isinstance(asked.get("damping", 0.0), float)
        if relative and "damping" in known and not isinstance(method.curvature, WoodFisher):
            if strict:
                raise WoodfisherError(
                    f"--damping {self.damping} is for a full or block WoodFisher; the criterion {criterion} takes a "
                    "number."
                )
            del asked["damping"]
        curvature = with_options(method.curvature, {k: v for k, v in asked.items() if k in known})
        if not method.curvature.samples:
            parts["refine"] = None
            if not strict:
                parts["update"] = parts["stages"] = None
        if self.stages == "auto" and not strict and METHODS[criterion].stages != "auto":
            parts["stages"] = None
        return replaced(replace(method, curvature=curvature), parts)


def usable_device(name: str) -> torch.device:
    """The device of that name; raises where nothing can be put on it."""
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no values")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise WoodfisherError(f"the device {name!r} can't be used here: {error}") from error
    return device


def load_on(device_name: str, name: str, **options: Any) -> Task:
    """Load a task with its model on a device."""
    device = usable_device(device_name)
    task = load_task(name, **options)
    task.model.to(device)
    return task


def parse_methods(text: str) -> list[str]:
    """Names from a comma-separated list, each checked."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise WoodfisherError(f"name at least one method: {', '.join(METHODS)}.")
    for name in names:
        check_choice("each method", name, METHODS)
    return list(dict.fromkeys(names))


def _damping(text: str | None) -> Damping | None:
    if text is None:
        return None
    if text == "auto":
        return "auto"
    try:
        number = float(text.removesuffix("x"))
    except ValueError:
        raise WoodfisherError(
            f"--damping takes a number, a number and x for a multiple of the mean curvature, or auto; "
            f"{text!r} came."
        ) from None
    return Relative(number) if text.endswith("x") else number
