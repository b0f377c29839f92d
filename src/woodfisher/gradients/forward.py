"""A model and its loss as functions of named weights: batch → outputs → loss → gradients of samples."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from woodfisher.errors import WoodfisherError, told
from woodfisher.gradients.batches import describe, map_tensors, samples_in, tensors_of
from woodfisher.gradients.isolation import without_traces
from woodfisher.gradients.likelihood import every_target, kept_ignored, target_sampler
from woodfisher.gradients.losses import IGNORED, OF_ENTRIES, KnownLoss
from woodfisher.gradients.parameters import EMBEDDINGS, full_name, module_of
from woodfisher.gradients.plain import in_plain_products
from woodfisher.watch import warn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from woodfisher.gradients.batches import Batch

    Tensors = dict[str, Tensor]

Precision = Literal["float32", "bfloat16"]

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
"""Of forward and backward passes: as the weights are, or in bfloat16 where torch's autocast takes it."""

T = TypeVar("T")

_WIDE_ROW, _WIDE_STATE = 8, 64

_VMAP_ERRORS = (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError)


@dataclass(frozen=True)
class State:
    """What a model is run on: weights and buffers, by name; those that are not named are the model's own."""

    weights: Tensors
    buffers: Tensors

    def differentiable(self, names: Iterable[str]) -> State:
        """The weights cut off from what they came from; those in `names` to take gradients by."""
        cut = {name: weight.detach() for name, weight in self.weights.items()}
        for name in names:
            cut[name].requires_grad_()
        return replace(self, weights=cut)

    def copied(self) -> State:
        """With copies of the buffers, which running a model may change."""
        return replace(self, buffers={name: buffer.clone() for name, buffer in self.buffers.items()})


class Forward:
    """A model with its loss, run at a `State`.

    Parameters
    ----------
    model, loss, sampler, precision:
        As for `Objective`; the precision is that of gradients, and losses alone are in that of the weights.

    Attributes
    ----------
    weighted:
        Whether batches are `(inputs, (targets, weights))`, in whose mean loss each sample counts by its weight `(n,)`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor] | None,
        sampler: Callable[[Any], Tensor] | None,
        precision: Precision,
    ) -> None:
        self.model, self.precision, self.weighted = model, precision, False
        self._known = KnownLoss.of(loss)
        plain = self._known is not None and not self._known.extended
        self.loss = loss if loss is None or plain else without_traces(loss)
        self._draw = target_sampler(loss) if sampler is None else lambda outputs, _: sampler(outputs)
        self._every = None if sampler else every_target(loss)
        self._vectorised = True
        self._warned: set[str] = set()
        self._around = _Around(model)
        self._tied, self._scaled = other_names(model), _scaled_in_place(model)
        on_cpu = any(p.device.type == "cpu" for p in model.parameters())
        if precision == "bfloat16" and on_cpu and not _multiplies_bfloat16():
            warn(
                "this processor does not multiply in bfloat16, so that passes in it take several times as long: leave "
                "out precision='bfloat16'."
            )

    def at(self, state: State, compute: Callable[[], T]) -> T:
        """What `compute` returns while the model holds the tensors of `state`, whose buffers it may change.

        A backward pass belongs inside too, since activation checkpointing runs parts of the model again in it.
        """
        tensors = {**state.buffers, **state.weights}
        tied = {
            other: tensors[name] for name, others in self._tied.items() if name in tensors for other in others
        }
        tensors |= tied
        for names in self._scaled:
            own = module_of(self.model, names[0])._parameters["weight"]
            assert own is not None
            tensors |= dict.fromkeys(names, tensors.get(names[0], own.detach()).clone())
        inside = {f"model.{name}": tensor for name, tensor in tensors.items()}
        return functional_call(self._around, inside, (compute,), tie_weights=False)

    def outputs(self, state: State, batch: Batch, precision: Precision = "float32") -> Any:
        """What the model returns for a batch; it may change the buffers of `state`."""
        return self.at(state, lambda: self.called(batch, precision))

    def called(self, batch: Batch, precision: Precision = "float32") -> Any:
        """What the model returns for a batch as it is now, of whose tensors it gets copies, to change as it likes."""
        arguments, named = map_tensors(torch.clone, arguments_of(batch))
        lower = precision == "bfloat16"
        device = tensors_of(batch)[0].device.type
        with torch.autocast(device, torch.bfloat16, enabled=lower, cache_enabled=False):
            outputs = self.model(*arguments, **named)
        return full_precision(outputs) if lower else outputs

    def by_weight(self) -> Forward:
        """The same for batches that bring a weight for each sample, whose losses have to add up."""
        other = copy.copy(self)
        other.weighted = True
        return other

    def adds_up(self, state: State, batch: Batch) -> bool:
        """Whether the mean loss of a batch is the mean of what each sample has alone.

        It isn't where labels are ignored, class weights count, or the loss compares samples with each other; and of a
        model's own loss it isn't known.
        """
        self._check_form(batch)
        known = self._known
        cancels = known is not None and known.cancels_weights
        if self.loss is None or cancels or self.counted(batch) < samples_in(batch):
            return False
        if known is not None and known.averages:
            return True
        with torch.no_grad():
            outputs = self.outputs(state.copied(), batch)
            together, alone = mean_loss(self.loss, outputs, batch), self._losses_of_samples(outputs, batch)
        return alone is not None and torch.allclose(together, alone.mean(), rtol=1e-3)

    def _losses_of_samples(self, outputs: Any, batch: Batch) -> Tensor | None:
        """The loss of each sample, `(n,)`; None where it can't be had from the outputs of all."""
        try:
            return self._losses(outputs, batch, 1)
        except (WoodfisherError, *_VMAP_ERRORS):
            return None

    def mean_loss(self, state: State, batch: Batch, precision: Precision = "float32") -> Tensor:
        """Mean loss of the samples of a batch; `state` is left as it is."""
        self._check_form(batch)

        def loss() -> Tensor:
            outputs = self.called(batch, precision)
            if self.weighted:
                return self._losses(outputs, batch, samples_in(batch)).squeeze(0)
            return mean_loss(self.loss, outputs, batch)

        return self.at(state.copied(), loss)

    def counted(self, batch: Batch) -> float:
        """Samples of a batch that its mean loss is of: without the share of labels that the loss ignores."""
        labels = labels_of(batch)
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            return samples_in(batch)
        share = float((labels != self._ignored).float().mean())
        if self.loss is None or (self._known is not None and self._known.ignores):
            return samples_in(batch) * share
        if self._known is None and share < 1:
            self._warn_once(
                f"labels of {IGNORED} came, which losses of torch leave out, and loss= is a function of its own: it is "
                "taken to be a mean over all samples. Give F.cross_entropy, a functools.partial of it, or "
                "nn.CrossEntropyLoss(...), in which those left out are counted."
            )
        return samples_in(batch)

    def _check_form(self, batch: Batch) -> None:
        """As `check_form`, with a warning of class weights that come to nothing."""
        check_form(self.loss, batch)
        cancels = self._known is not None and self._known.cancels_weights
        if cancels and isinstance(labels := labels_of(batch), Tensor) and labels.ndim == 1:
            self._warn_once(
                "class weights cancel in the loss of a single sample, which is divided by its own weight, so that "
                "gradients of samples are as without them: use reduction='none', of which the mean is taken."
            )

    @property
    def _ignored(self) -> int:
        """The label that the loss leaves out, as far as it is known."""
        return IGNORED if self._known is None else self._known.ignored

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warn(message)

    def least_loss(self, state: State, batch: Batch) -> float:
        """The smallest loss of a sample of a batch; the mean of all where samples have none of their own."""
        self._check_form(batch)
        if self.loss is None:
            return float(self.mean_loss(state, batch))
        outputs = self.outputs(state.copied(), batch)
        losses = self._losses_of_samples(outputs, batch)
        if losses is None:
            return float(mean_loss(self.loss, outputs, batch))
        return float(losses.nan_to_num(math.inf).min())

    def sum_of_losses(self, state: State, batch: Batch, group: int = 1) -> Tensor:
        """Sum of the mean losses of rows of `group` samples, from one forward pass of all of them.

        A model that computes its own loss must take its mean over samples, or these must be labelled evenly.
        """
        if self.loss is None:
            return self.mean_loss(state, batch, self.precision) * (samples_in(batch) // group)
        self._check_form(batch)
        return self._losses(self.outputs(state.copied(), batch, self.precision), batch, group).sum()

    def _losses(self, outputs: Any, batch: Batch, group: int) -> Tensor:
        """Mean losses of rows of `group` samples, `(rows,)`."""
        if self.weighted:
            inputs, (targets, weights) = batch
            alone = self._plain_losses(outputs, (inputs, targets), 1)
            return (alone * weights).reshape(-1, group).mean(1)
        return self._plain_losses(outputs, batch, group)

    def _plain_losses(self, outputs: Any, batch: Batch, group: int) -> Tensor:
        samples, targets = samples_in(batch), batch[1]
        if self._has_terms(outputs, targets):
            assert self._known is not None
            terms: Tensor = self._known.terms(outputs, targets)
            return terms.reshape(samples // group, -1).mean(1)
        leaves, form = tree_flatten((outputs, targets))
        by_sample = [isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == samples for leaf in leaves]
        if not any(by_sample[: len(tree_flatten(outputs)[0])]):
            raise WoodfisherError(
                f"the model returned a {type(outputs).__name__}, in which torch finds no tensor of one entry a sample."
            )
        grouped = [leaf.unflatten(0, (-1, group)) for leaf, its in zip(leaves, by_sample, strict=True) if its]

        def one(*row: Tensor) -> Tensor:
            own = iter(row)
            parts = [next(own) if its else leaf for leaf, its in zip(leaves, by_sample, strict=True)]
            output, target = tree_unflatten(parts, form)
            return mean_loss(self.loss, output, (None, target))

        if self._vectorised:
            try:
                with _without_torchs_advice():
                    return vmap(one)(*grouped)
            except _VMAP_ERRORS as error:
                self._give_up_vectorising(error)
        return torch.stack([one(*row) for row in zip(*grouped, strict=True)])

    def _has_terms(self, outputs: Any, targets: Any) -> bool:
        """Whether torch gives the loss of each sample, or of each entry of the outputs, and rows are means of them."""
        known = self._known
        if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
            return False
        if known is None or not known.averages:
            return False
        if known.function in OF_ENTRIES:
            return outputs.shape == targets.shape
        if outputs.ndim != 2:
            return False
        if self.weighted or targets.is_floating_point() or not known.ignores:
            return True
        return bool((targets != known.ignored).all())  # the others are left out of the mean

    def with_sampled_targets(self, state: State, batch: Batch) -> Batch:
        """The batch with targets drawn from the model's own distribution."""
        with torch.no_grad():
            return _with_targets(batch, self._draw(self.outputs(state.copied(), batch), labels_of(batch)))

    def with_every_target(self, state: State, batch: Batch) -> list[tuple[Tensor, Batch]]:
        """The batch with all that the model's distribution may draw, and each sample's weights, as `every_target`.

        Where that is not known, one drawn target a sample stands for it, with weight 1.
        """
        with torch.no_grad():
            outputs = self.outputs(state.copied(), batch)
            every = [] if self._every is None else list(self._every(outputs))
            if not every:
                one = torch.ones(samples_in(batch), device=tensors_of(batch)[0].device)
                every = [(one, self._draw(outputs, labels_of(batch)))]
        return [(weight, _with_targets(batch, self._as_ignored(targets, batch))) for weight, targets in every]

    def _as_ignored(self, labels: Tensor, batch: Batch) -> Tensor:
        """Labels, with those of the batch's own that the loss ignores."""
        if labels.is_floating_point():
            return labels
        return kept_ignored(labels, labels_of(batch), self._ignored)

    @torch.enable_grad()
    def row_gradients(self, state: State, rows: Batch, count: int) -> Tensors:
        """Gradients of `count` rows, a batch with leading dimensions (row, sample): name → `(count, …)`."""

        def loss(weights: Tensors, row: Batch) -> Tensor:
            return self.mean_loss(replace(state, weights=weights), row, self.precision)

        refused = None
        if self._vectorised and not self._faster_one_by_one(rows):
            try:
                with _without_torchs_advice(), in_plain_products(self.model.modules()):
                    return vmap(grad(loss), in_dims=(None, 0))(state.weights, rows)
            except _VMAP_ERRORS as error:
                refused = error
        each = (map_tensors(lambda t, i=i: t[i], rows) for i in range(count))
        one_by_one = [self.gradient(state, row) for row in each]
        if refused is not None:
            self._give_up_vectorising(refused)
        return {name: torch.stack([g[name] for g in one_by_one]) for name in state.weights}

    def _faster_one_by_one(self, rows: Batch) -> bool:
        """Whether rows of this many samples should each have a backward pass of their own.

        A vectorised convolution whose weights differ by row runs as a grouped one, which CPUs do slowly: at 16
        samples a row ResNet-20 takes 2.2 times as long as by one pass a row. In a recurrent layer the gradients of all
        rows are gone through at every step.
        """
        first = tensors_of(rows)[0]
        if first.device.type != "cpu":
            return False
        wide = first.shape[1] >= _WIDE_ROW
        return any(
            (wide and isinstance(module, _ConvNd))
            or (isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and module.hidden_size > _WIDE_STATE)
            for module in self.model.modules()
        )

    @torch.enable_grad()
    def gradient(self, state: State, batch: Batch) -> Tensors:
        """Gradient of the mean loss of a batch, by name; zero for weights that it doesn't depend on."""
        state = state.differentiable(state.weights)

        def gradients_of() -> tuple[Tensor | None, ...]:
            value = self.mean_loss(state, batch, self.precision)
            return torch.autograd.grad(value, list(state.weights.values()), allow_unused=True)

        with explained(batch):
            gradients = self.at(state.copied(), gradients_of)
        return {
            name: torch.zeros_like(weight) if g is None else g
            for (name, weight), g in zip(state.weights.items(), gradients, strict=True)
        }

    def _give_up_vectorising(self, error: Exception) -> None:
        self._vectorised = False
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warn(
            "torch.func can't vectorise this model or its loss, so they are taken sample by sample: the same "
            f"result, more slowly. ({reason})"
        )


@contextmanager
def _without_torchs_advice() -> Iterator[None]:
    """Without torch's warnings of operations that it vectorises slowly, which its makers want to hear of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        yield


class _Around(nn.Module):
    """A model, and whatever is computed while it holds other tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[], Any]) -> Any:
        return compute()


def arguments_of(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with for a batch: positional and named arguments."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    inputs, _ = inputs_and_targets(batch)
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def full_precision(outputs: Any) -> Any:
    """Outputs in bfloat16 as float32, since losses are sums of many small terms; others as they are."""
    return tree_map_only(Tensor, lambda t: t.float() if t.dtype == torch.bfloat16 else t, outputs)


def evenly_labelled(batch: Batch, rows: int) -> bool:
    """Whether a model's own mean over tokens counts as many of them in each row of a batch.

    A model of language leaves out the first token of each sample, whose label it can't predict.
    """
    for labels in tensors_of(batch):
        if labels.ndim < 2 or labels.is_floating_point():
            continue
        counted = labels != IGNORED
        if any(len(part.reshape(rows, -1).sum(1).unique()) > 1 for part in (counted, counted[:, 1:])):
            return False
    return True


def check_form(loss: Callable[[Any, Any], Tensor] | None, batch: Batch) -> None:
    """Raise where a batch brings its own targets and there is a loss as well."""
    if loss is not None and isinstance(batch, Mapping):
        raise WoodfisherError(
            "a dict batch goes to a model that returns .loss, without loss=; for a loss of your own give "
            "batches (inputs, targets), where inputs may be a dict."
        )


def mean_loss(loss: Callable[[Any, Any], Tensor] | None, outputs: Any, batch: Batch) -> Tensor:
    """Mean loss of the samples of a batch, of which the model returned `outputs`."""
    if loss is not None:
        value: object = loss(outputs, batch[1])
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise WoodfisherError(
                f"loss(outputs, targets) must return a real tensor, as torch.nn.functional.cross_entropy does; "
                f"a {kind} came."
            )
        return value.mean()
    own = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if not isinstance(own, Tensor):
        raise WoodfisherError(
            f"without loss= the model must return an object with .loss; it returned a "
            f"{type(outputs).__name__}. Pass loss=, as in torch.nn.functional.cross_entropy."
        )
    return own.mean()


def inputs_and_targets(batch: Batch) -> tuple[Any, Any]:
    """The two parts of a batch that is no dict; raises where it has others."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise WoodfisherError(
            "a batch must be (inputs, targets), or a dict for a model that returns .loss; "
            f"a {type(batch).__name__} of {len(batch)} came."
        )
    return batch[0], batch[1]


def labels_of(batch: Batch) -> Any:
    """The targets of a batch; None where a dict has no labels."""
    return batch.get("labels") if isinstance(batch, Mapping) else inputs_and_targets(batch)[1]


def _with_targets(batch: Batch, targets: Tensor) -> Batch:
    return {**batch, "labels": targets} if isinstance(batch, Mapping) else (batch[0], targets)


def _multiplies_bfloat16() -> bool:
    """Whether the processor multiplies in bfloat16, and torch has what lets it."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _scaled_in_place(model: nn.Module) -> list[list[str]]:
    """All names of each weight that embeddings with `max_norm` scale as they are called."""
    scaled = [
        full_name(name, "weight")
        for name, module in model.named_modules()
        if isinstance(module, EMBEDDINGS) and module.max_norm is not None
    ]
    every = [[first, *others] for first, others in other_names(model).items()] if scaled else []
    return [next((names for names in every if name in names), [name]) for name in scaled]


def other_names(model: nn.Module) -> dict[str, list[str]]:
    """Name → the other names of the same parameter or buffer.

    Torch's own way to tie them leaves a module that goes by two names with the values that it was run on.
    """
    names: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, tensor in chain(
            module.named_parameters(prefix, recurse=False, remove_duplicate=False),
            module.named_buffers(prefix, recurse=False, remove_duplicate=False),
        ):
            names.setdefault(id(tensor), []).append(name)
    return {first: others for first, *others in names.values() if others}


@contextmanager
def explained(batch: Batch) -> Iterator[None]:
    """Turn what a model or a loss raises on a batch into a message that shows the batch."""
    try:
        yield
    except WoodfisherError:
        raise
    except Exception as error:
        raise WoodfisherError(
            f"the model or the loss fails on a batch of {describe(batch)}: {told(error)}\n"
            "Batches are (inputs, targets) with loss(outputs, targets), where a tuple or dict of inputs is unpacked "
            "into the model's arguments, or dicts for a model that returns .loss. Gradients are taken in evaluation "
            "mode, in which some models return other outputs than in training."
        ) from error
