"""Channels that go together, and cutting silent ones out of a network, by torch-pruning's dependency graph."""

from __future__ import annotations

import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from woodfisher.errors import WoodfisherError, extra
from woodfisher.gradients.flops import counting_flops
from woodfisher.gradients.isolation import copied, without_cache
from woodfisher.gradients.outputs import called, difference, outputs_of
from woodfisher.gradients.parameters import full_name, inputs_first, module_of, unwrapped
from woodfisher.surgeon.patterns import part_of
from woodfisher.watch import warn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_SILENCED = (nn.Linear, _ConvNd, _NormBase)
"""Layers whose output channels are silent when their parameters are zero; `_NormBase` are the norms by channel."""

_TURNS = 64
"""How often one dependency is followed for a layer: once for each part of it that is put beside others, say."""


@dataclass(frozen=True)
class Cost:
    """What a network takes.

    Attributes
    ----------
    parameters:
        Numbers in all parameters.
    flops:
        FLOPs of a forward pass, two for each multiplication and addition of matrix products and convolutions.
    """

    parameters: int
    flops: int


def cost_of(model: nn.Module, example_inputs: Any) -> Cost:
    """Count the parameters of a model, and the FLOPs that it takes for these inputs (of one sample, say)."""
    with counting_flops(model) as counter:
        outputs_of(copied(model).eval(), example_inputs)
    return Cost(sum(p.numel() for p in model.parameters()), counter.get_total_flops())


def coupled_channels(model: nn.Module, example_inputs: Any) -> tuple[tuple[str, ...], ...]:
    """For each set of channels that can be cut out of a model, the parameters that make them silent.

    A set counts if the network with only its first channel does what it does with all others of the set at zero,
    which is tried: heads of attention and statistics over channels don't survive it.

    Returns
    -------
    As `Channels.coupled` has it.
    """
    model = unwrapped(model)
    sets = [
        each for each in _Traced(model, example_inputs).sets() if _can_be_cut(model, example_inputs, each)
    ]
    if not sets:
        raise WoodfisherError(
            "no channel of the model can be cut out: each is an output, goes into a layer that torch-pruning can't "
            "follow (as a GRU), still says something when it is zero, or its number is written into the model's code."
        )
    return tuple(each.members for each in sets)


def shrink(model: nn.Module, example_inputs: Any) -> nn.Module:
    """A physically smaller copy of a pruned network, with the same outputs; needs `woodfisher[channels]`.

    Channels are cut out whose parameters are all exactly zero in every layer that they go through, as
    `prune(..., pattern=pattern, params=pattern.params)` with `pattern = Channels.of(model, example_inputs)` leaves
    them. One stays of a layer that has no other. In evaluation mode the outputs on `example_inputs` are as before
    after each cut, up to rounding: their largest difference is at most √ε of the largest output (3e-4 in float32,
    where a few 1e-7 are usual). A cut that changes them is left out, with a warning.

    Parameters
    ----------
    model:
        Any module; it stays as it is.
    example_inputs:
        What the model takes, as in a batch `(inputs, targets)`: a tensor, a tuple, or a dict.

    Raises
    ------
    WoodfisherError
        If the model can't be traced.
    """
    model = unwrapped(model)
    traced = _Traced(model, example_inputs)
    wanted = outputs_of(traced.model, example_inputs)
    small, cut = model, 0
    for each in traced.sets():
        silent = each.silent(model)
        channels = silent.nonzero().flatten().tolist()[int(silent.all()) :]
        if not channels:
            continue
        smaller = _without(small, example_inputs, each.root, channels, wanted)
        if smaller is None:
            warn(f"{len(channels)} channels of {each.root!r} are zero and can't be cut out; they stay.")
        else:
            small, cut = smaller, cut + len(channels)
    if not cut:
        warn(
            "the model has no channels to cut out, so its copy is no smaller: prune it with pattern=pattern and "
            "params=pattern.params, where pattern = wf.Channels.of(model, example_inputs)."
        )
        return copied(model)
    for before, after in zip(model.modules(), small.modules(), strict=True):
        after.training = before.training
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    for name, p in small.named_parameters():
        p.requires_grad_(name not in frozen)
    return small


@dataclass(frozen=True)
class _ChannelSet:
    """Channels that go through several layers, the i-th of each together.

    Attributes
    ----------
    root:
        Name of a layer among them that has no other channels.
    width:
        How many.
    members:
        The parameters that make them silent, as in `Channels.coupled`.
    """

    root: str
    width: int
    members: tuple[str, ...]

    def silent(self, model: nn.Module) -> Tensor:
        """Which channels have nothing but zeros, bool `(width,)`."""
        zero = [(rows == 0).reshape(self.width, -1).all(1) for rows in self._rows(model)]
        return torch.stack(zero).all(0)

    def silence(self, model: nn.Module, channels: Sequence[int]) -> None:
        """Set all parameters of these channels to zero."""
        with torch.no_grad():
            for rows in self._rows(model):
                rows[channels] = 0

    def _rows(self, model: nn.Module) -> Iterator[Tensor]:
        """The parameters with their channels first, `(width, …)`: views of the model's own."""
        for member in self.members:
            name, part = part_of(member)
            weight = model.get_parameter(name).detach()
            transposed = weight.ndim > 1 and inputs_first(module_of(model, name))
            yield (weight.transpose(0, 1) if transposed else weight)[part]


class _Traced:
    """A copy of a model with torch-pruning's graph of what depends on what.

    Parameters
    ----------
    model, example_inputs:
        As for `shrink`.

    Attributes
    ----------
    model:
        The copy, in evaluation mode; `cut` makes it smaller.
    """

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        pruning = _torch_pruning()
        self.model = copied(model).eval()
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())  # autograd's graph is what is traced
        self._graph = pruning.DependencyGraph()
        try:
            with warnings.catch_warnings(), torch.enable_grad(), without_cache(self.model):
                warnings.simplefilter("ignore")
                self._graph.build_dependency(self.model, example_inputs, forward_fn=_traceable, verbose=False)
        except WoodfisherError:
            raise
        except Exception as error:
            raise WoodfisherError(
                f"torch-pruning can't trace the model: {type(error).__name__}: {error}\nIt follows autograd from the "
                "outputs back to the inputs."
            ) from error
        self._names = {module: name for name, module in self.model.named_modules()}
        uses = Counter(id(p) for module in self.model.modules() for p in module.parameters(recurse=False))
        self._shared = {each for each, count in uses.items() if count > 1}
        self._order = {name: number for number, (name, _) in enumerate(self.model.named_parameters())}

    def sets(self) -> list[_ChannelSet]:
        """Sets of channels that torch-pruning would cut, in the model's order."""
        sets = [each for group in self._groups() if (each := self._set_of(group)) is not None]
        return sorted(sets, key=lambda each: self._place(each.members[0]))

    def _groups(self) -> list[Any]:
        """Everything that goes with all channels of each layer, but of layers whose channels can't be followed."""
        groups: list[Any] = []
        seen: set[nn.Module] = set()
        for module in self._graph.module2node:
            if not isinstance(module, (_ConvNd, nn.Linear)) or module in seen:
                continue
            group = self._whole_group(module)
            if group is not None:
                seen |= {m for m, _ in self._silenced(group)}
                groups.append(group)
        return groups

    def _whole_group(self, module: nn.Module) -> Any:
        """What goes with all channels of a layer; None where torch-pruning can't follow them."""
        try:
            return self._group(module, range(self._graph.get_out_channels(module)))
        except Exception:
            return None

    def _group(self, module: nn.Module, channels: Sequence[int]) -> Any:
        prune = self._graph.get_pruner_of_module(module).prune_out_channels
        with _bounded():
            return self._graph.get_pruning_group(module, prune, list(channels))

    def _place(self, member: str) -> int:
        return self._order[part_of(member)[0]]

    def cut(self, root: str, channels: Sequence[int]) -> None:
        """Cut channels of the set with this root out of the copy; raises where others would go with them."""
        module = self.model.get_submodule(root)
        group = self._group(module, channels)
        if any(len(item.idxs) != len(channels) for _, item in self._silenced(group)):
            raise WoodfisherError(
                f"more than the channels {channels} of {root!r} would be cut out with them."
            )
        group.prune()

    def _silenced(self, group: Any) -> Iterator[tuple[nn.Module, Any]]:
        """Layers whose own output channels a group of torch-pruning cuts, with its entry for them."""
        for item in group:
            module = item.dep.target.module
            if isinstance(module, _SILENCED) and self._graph.is_out_channel_pruning_fn(item.dep.handler):
                yield module, item

    def _set_of(self, group: Any) -> _ChannelSet | None:
        """A group of torch-pruning as a set; None where channels don't go one by one, or parameters are shared."""
        modules = [item.dep.target.module for item in group if isinstance(item.dep.target.module, nn.Module)]
        if any(
            _is_grouped(m) or self._shared & {id(p) for p in m.parameters(recurse=False)} for m in modules
        ):
            return None
        width, members = len(group[0].idxs), []
        if width < 2:
            return None
        for module, item in self._silenced(group):
            first = item.idxs[0]
            if len(item.idxs) != width or item.idxs != [first + root for root in item.root_idxs]:
                return None
            whole = width == self._graph.get_out_channels(module)
            part = "" if whole else f"[{first}:{first + width}]"
            names = (full_name(self._names[module], name) for name, _ in module.named_parameters())
            members += [name + part for name in names]
        return _ChannelSet(self._names[modules[0]], width, tuple(sorted(members, key=self._place)))


def _is_grouped(module: nn.Module) -> bool:
    """Whether channels of a layer go in groups, so that single ones can't be cut; those of depthwise layers can."""
    if not isinstance(module, _ConvNd):
        return False
    return module.groups > 1 and not module.groups == module.in_channels == module.out_channels


def _can_be_cut(model: nn.Module, example_inputs: Any, channels: _ChannelSet) -> bool:
    def silenced(others: Sequence[int]) -> tuple[nn.Module, list[Tensor]]:
        silent = copied(model).eval()
        channels.silence(silent, others)
        return silent, outputs_of(silent, example_inputs)

    _, nothing = silenced(range(channels.width))
    for audible in range(channels.width):
        others = [channel for channel in range(channels.width) if channel != audible]
        silent, wanted = silenced(others)
        if not all(map(_close, wanted, nothing)):
            return _without(silent, example_inputs, channels.root, others, wanted) is not None
    return False


def _without(
    model: nn.Module, example_inputs: Any, root: str, channels: Sequence[int], wanted: list[Tensor]
) -> nn.Module | None:
    """A copy without these channels; None where they can't be cut out, or its outputs are not those wanted."""
    traced = _Traced(model, example_inputs)
    try:
        traced.cut(root, channels)
        outputs = outputs_of(traced.model, example_inputs)
    except Exception:  # whatever torch-pruning or the model raises says that these channels can't go
        return None
    return traced.model if all(map(_close, outputs, wanted)) else None


def _close(output: Tensor, wanted: Tensor) -> bool:
    tolerance = torch.finfo(wanted.dtype).eps ** 0.5 if wanted.is_floating_point() else 0.0
    return difference([output], [wanted]) <= tolerance


def _traceable(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    outputs = [output for output in called(model, example_inputs) if output.requires_grad]
    if not outputs:
        raise WoodfisherError(
            "no output of the model depends on its parameters as autograd sees it: return tensors (in tuples, lists "
            "or dicts) that are not detached."
        )
    return outputs


@contextmanager
def _bounded() -> Iterator[None]:
    """No groups of torch-pruning without end.

    It follows halves that change places, as in rotary embeddings, in circles, to ever larger numbers of channels.
    """
    groups = _torch_pruning().dependency.Group
    add, followed = groups.add_dep, Counter[int]()

    def add_bounded(group: Any, dep: Any, idxs: Any) -> None:
        followed[id(dep)] += 1
        if followed[id(dep)] > _TURNS:
            raise WoodfisherError("torch-pruning follows channels of the layer in circles.")
        add(group, dep, idxs)

    groups.add_dep = add_bounded
    try:
        yield
    finally:
        groups.add_dep = add


def _torch_pruning() -> Any:
    with extra("channels", "cutting out channels needs torch-pruning"):
        import torch_pruning
    return torch_pruning
