"""ONNX files, by torch's exporter, and onnxruntime to run them. Needs the extra `onnx`."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from woodfisher.checks import described
from woodfisher.errors import WoodfisherError, extra
from woodfisher.files import write_whole
from woodfisher.gradients.batches import tensors_of
from woodfisher.gradients.forward import arguments_of
from woodfisher.gradients.isolation import same_flags, without_cache, without_fast_path
from woodfisher.gradients.outputs import difference, outputs_of
from woodfisher.gradients.parameters import unwrapped
from woodfisher.watch import logging_from

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")

TOLERANCE = 1e-5
"""Largest difference to the model's outputs, as a fraction of the largest of them."""


class OnnxModel:
    """An ONNX file as onnxruntime runs it on the CPU, with as many threads as torch has.

    Parameters
    ----------
    path:
        Of the file.

    Notes
    -----
    Called with what the model takes, in the order in which it was given when the file was made, it returns a list of
    tensors.
    """

    def __init__(self, path: str | Path) -> None:
        runtime = _required("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self._session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise WoodfisherError(f"onnxruntime can't read {path}: {error}") from error
        self._inputs = self._session.get_inputs()

    def __call__(self, example_inputs: Any) -> list[Tensor]:
        _, named = arguments_of((example_inputs, ()))
        tensors, names = _tensors(example_inputs), [each.name for each in self._inputs]
        if len(tensors) != len(names):
            raise WoodfisherError(
                f"the file takes {len(names)} tensors ({', '.join(names)}); {len(tensors)} came."
            )
        names = list(named) if named.keys() == set(names) else names
        try:
            values = [tensor.detach().cpu().numpy() for tensor in tensors]
            outputs = self._session.run(None, dict(zip(names, values, strict=True)))
        except Exception as error:  # which type it has depends on what onnxruntime finds wrong
            takes = ", ".join(f"{each.name}: {each.type} of shape {each.shape}" for each in self._inputs)
            came = ", ".join(f"{name}: {described(each)}" for name, each in zip(names, tensors, strict=True))
            raise WoodfisherError(f"onnxruntime takes {takes}; {came} came: {_line(error)}") from error
        return [torch.from_numpy(each) for each in outputs]


def to_onnx(model: nn.Module, example_inputs: Any, path: str | Path, *, tolerance: float = TOLERANCE) -> None:
    """Write a model as an ONNX file that takes batches of any size.

    The file is written only if onnxruntime gives the model's outputs on the example, up to `tolerance` times the
    largest of them. Zeros are stored like any weight: the file is as large as a dense one, and onnxruntime computes
    with all of it.

    Parameters
    ----------
    model:
        Any module that `torch.export` can trace, on the CPU; exported as in evaluation mode, and left as it is.
    example_inputs:
        What the model takes, as in a batch `(inputs, targets)`, of at least two samples.
    path:
        Of the file.
    tolerance:
        As above.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        _required(name)
    if any(tensor.ndim == 0 or len(tensor) < 2 for tensor in _tensors(example_inputs)):
        raise WoodfisherError(
            "an example of at least two samples is needed to see which dimension the samples are."
        )
    model = unwrapped(model)
    arguments, named = arguments_of((example_inputs, ()))
    try:
        with _quiet(), torch.no_grad(), same_flags(model), without_cache(model), without_fast_path():
            model.eval()
            wanted = outputs_of(model, example_inputs)
            program = torch.onnx.export(
                model,
                arguments,
                kwargs=named,
                dynamo=True,
                dynamic_shapes=_any_number(arguments, named),
                verbose=False,
            )
    except WoodfisherError:
        raise
    except Exception as error:  # whatever the exporter raises says that this model can't go
        cause = error.__cause__ or error
        raise WoodfisherError(
            f"torch can't export the model to ONNX with batches of any size: {type(cause).__name__}: {_line(cause)}"
        ) from error
    assert program is not None

    def write(draft: Path) -> None:
        program.save(str(draft), external_data=False)
        try:
            outputs = OnnxModel(draft)(example_inputs)
        except WoodfisherError as error:
            raise WoodfisherError(
                f"onnxruntime can't run the exported model: {_line(error.__cause__ or error)}. If it is in another "
                "dtype than float32, in which there are few operations, convert it with .float()."
            ) from error
        apart = difference(outputs, wanted)
        if not apart <= tolerance:
            raise WoodfisherError(
                f"onnxruntime's outputs are {apart:.1e} of the largest output away from the model's, and at most "
                f"{tolerance:.1e} is allowed: no file was written."
            )

    write_whole(Path(path), write)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of its progress, of packages that it can do without, and of graphs that fail."""
    loggers = logging_from(logging.CRITICAL, "torch.onnx", "torch.fx", "torch.export", "torch._export")
    nowhere = io.StringIO()
    with (
        loggers,
        warnings.catch_warnings(),
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        warnings.simplefilter("ignore")
        yield


def _line(error: BaseException) -> str:
    """The first line of a message, without colours."""
    return _ESCAPES.sub("", str(error)).strip().partition("\n")[0]


def _any_number(arguments: Sequence[Any], named: dict[str, Any]) -> Any:
    """For every tensor, that its first dimension may have any length."""

    def free(part: Any) -> Any:
        if isinstance(part, Tensor):
            return {0: torch.export.Dim.DYNAMIC}
        if isinstance(part, dict):
            return {key: free(value) for key, value in part.items()}
        return type(part)(map(free, part))

    return {name: free(value) for name, value in named.items()} if named else free(tuple(arguments))


def _tensors(example_inputs: Any) -> list[Tensor]:
    arguments, named = arguments_of((example_inputs, ()))
    return tensors_of((*arguments, *named.values()))


def _required(name: str) -> Any:
    with extra("onnx", f"ONNX needs {name}"):
        return importlib.import_module(name)
