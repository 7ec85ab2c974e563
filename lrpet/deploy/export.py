"""A network as a file for other programs, checked against the network it was made from."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map

from lrpet.deploy.programs import openvino_program, require
from lrpet.lowrank.compact_file import save_compact
from lrpet.lowrank.layers import copy_of, unwrap
from lrpet.lowrank.observe import call

__all__ = ["FORMATS", "TOLERANCES", "export"]
FORMATS = ("onnx", "openvino", "pt2", "safetensors")
ENDINGS = {name: f".{name}" for name in FORMATS} | {
    "openvino": ".xml"
}  # of the files; a .bin lies beside .xml
NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
TOLERANCES = {  # largest difference of an output, relative to the largest number in it
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


@torch.no_grad()
def export(
    network: nn.Module,
    path: str | Path,
    to: str | None = None,
    input_shape: Sequence[int] | None = None,
    *,
    example_inputs: Any = None,
    dynamic_batch: bool = True,
) -> float:
    """Write a network, in evaluation mode, to a file, and run what was read back: it must compute the same.

    Args:
        network: any module; it is not changed. Its outputs may be a tensor, a tuple, a dict, or a nest of
            them.
        path: the file to write; it appears only once it has been checked.
        to: "onnx" (by the dynamo exporter; needs ``pip install lrpet[export]``), "openvino" (from that, in
            float32, with a .bin beside the .xml; needs ``lrpet[deploy]``), "pt2" (torch.export) or
            "safetensors" (of a compact network, see :func:`lrpet.save_compact`; needs no inputs); None for
            the one that the ending of ``path`` says.
        input_shape: (C, H, W) of one image.
        example_inputs: in the place of ``input_shape``: a tensor, a tuple or a dict to run the network on.
        dynamic_batch: let the program take batches of any size. The batch is the first dimension of the first
            tensor, and of all others that are as long; False fixes all shapes as they are.

    Returns:
        The largest difference of an output, relative to the largest number in it; 0 for safetensors.

    Raises:
        ValueError: an argument is out of range, the network cannot be exported, or the program differs by
            more than the precision allows: ``TOLERANCES``, of the least precise number in network and inputs.
        ImportError: a package is missing.

    Source: https://docs.pytorch.org/docs/stable/onnx_export.html and https://docs.pytorch.org/docs/stable/export.html.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export(nn.Conv2d(3, 4, 3), folder + "/net.pt2", example_inputs=torch.rand(2, 3, 8, 8)) < 1e-4
    True
    """
    path, network = Path(path), unwrap(network)
    to = _format(path, to)
    if to == "safetensors":
        save_compact(network, path)
        return 0.0
    network = copy_of(network).cpu().eval()
    given, other = _inputs(network, input_shape, example_inputs, dynamic_batch=dynamic_batch)
    part = path.with_name(f"part{os.getpid()}-{path.stem}{ENDINGS[to]}")
    try:
        run = _write(network, part, to, given, dynamic_batch=dynamic_batch)
        differences = [_difference(_tensors(call(network, x)), run(x)) for x in (given, other)]
        difference, tolerance = float(torch.tensor(differences).max()), _tolerance(network, given)
        if not difference <= tolerance:
            raise ValueError(
                f"the {to} program differs from the network by {difference:.1e}, more than {tolerance:.0e}; "
                "nothing was written"
            )
        if to == "openvino":  # the weights first: without the .xml they are no program
            os.replace(part.with_suffix(".bin"), path.with_suffix(".bin"))
        os.replace(part, path)
    finally:
        for left in (part, part.with_suffix(".bin"), part.with_suffix(".onnx")):
            left.unlink(missing_ok=True)
    return difference


def _format(path: Path, to: str | None) -> str:
    if to is None:
        to = next((name for name, ending in ENDINGS.items() if ending == path.suffix), None)
        if to is None:
            endings = ", ".join(ENDINGS.values())
            raise ValueError(f"path must end in one of {endings}, or to= name a format; got '{path}'")
    if to not in FORMATS:
        raise ValueError(f"to must be one of {', '.join(FORMATS)}; got {to!r}")
    if not path.parent.is_dir():
        raise ValueError(f"path must lie in a folder that exists; there is no folder {path.parent}")
    if to == "openvino" and path.suffix != ".xml":
        raise ValueError(f"path must end in .xml for OpenVINO, which looks for the .bin by it; got '{path}'")
    require(*NEEDED.get(to, ()), extra="export" if to == "onnx" else "deploy")
    return to


def _inputs(network: nn.Module, input_shape, example_inputs: Any, *, dynamic_batch: bool) -> tuple[Any, Any]:
    """Return inputs to trace the network with, and others, of another batch size if that is dynamic."""
    if (input_shape is None) == (example_inputs is None):
        raise ValueError("give either input_shape, (C, H, W) of one image, or example_inputs=, any inputs")
    if example_inputs is None:
        draw = torch.Generator().manual_seed(0)
        dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
        example_inputs = torch.randn(2, *input_shape, generator=draw).to(dtype)
    if isinstance(example_inputs, Mapping):  # a tokenizer's BatchEncoding too
        example_inputs = dict(example_inputs)
    given = tree_map(lambda x: x.detach().cpu() if isinstance(x, Tensor) else x, example_inputs)
    if not any(isinstance(x, Tensor) for x in tree_leaves(given)):
        raise ValueError(f"example_inputs must hold a tensor; got {type(example_inputs).__name__}")
    if not dynamic_batch:
        return given, given
    count = batch_size(given)
    if count is None:
        raise ValueError(
            "the first tensor of example_inputs has no dimension to be the batch; dynamic_batch=False"
        )

    def rows(
        x: Any, size: int
    ) -> Any:  # the same ones again and again, because any others might not be allowed
        return x[torch.arange(size) % count] if is_batched(x, count) else x

    # a batch of 1 would be taken for a constant
    return tuple(tree_map(lambda x, n=n: rows(x, n), given) for n in (max(2, count), 2 * count + 1))


def batch_size(inputs: Any) -> int | None:
    first = next(x for x in tree_leaves(inputs) if isinstance(x, Tensor))
    return first.shape[0] if first.ndim and len(first) else None


def is_batched(x: Any, count: int) -> bool:
    return isinstance(x, Tensor) and x.ndim > 0 and len(x) == count


def _tolerance(network: nn.Module, inputs: Any) -> float:
    tensors = [*network.parameters(), *network.buffers(), *tree_leaves(inputs)]
    precisions = [TOLERANCES[x.dtype] for x in tensors if isinstance(x, Tensor) and x.dtype in TOLERANCES]
    return max(precisions, default=TOLERANCES[torch.float32])


def _write(network: nn.Module, part: Path, to: str, given: Any, *, dynamic_batch: bool) -> Callable:
    """Write a program; return the function of inputs that runs what was written."""
    named = isinstance(given, dict)
    args, kwargs = ((), given) if named else (given if isinstance(given, tuple) else (given,), {})
    shapes = None
    if dynamic_batch:
        batch, count = torch.export.Dim("batch"), batch_size(given)
        shapes = tree_map(lambda x: {0: batch} if is_batched(x, count) else None, kwargs if named else args)
    try:
        program = torch.export.export(network, args, kwargs, dynamic_shapes=shapes)
        if to == "pt2":
            torch.export.save(program, part)
            read = torch.export.load(part).module()
            return lambda inputs: _tensors(call(read, inputs))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's own making
            names = _output_names(call(network, given), program.graph_signature.user_inputs)
            written = torch.onnx.export(program, output_names=names, dynamo=True, verbose=False)
            written.save(part.with_suffix(".onnx"), external_data=False)
    except Exception as error:  # whatever the network raises when it is traced
        hint = "; dynamic_batch=False fixes all shapes" if dynamic_batch else ""
        raise ValueError(
            f"{type(network).__name__} cannot be exported to {to}: {type(error).__name__}: "
            f"{str(error).strip().partition(chr(10))[0]}{hint}"
        ) from error
    return _openvino_runner(part) if to == "openvino" else _onnx_runner(part)


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def _output_names(outputs: Any, taken: Collection) -> list[str]:
    """Return a name for each tensor: its key in a dict, "output" or its number elsewhere, joined by "_"."""
    names = []
    for path, x in tree_flatten_with_path(outputs)[0]:
        if isinstance(x, Tensor):
            keys = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]
            name = "_".join(keys if keys and not keys[0].isdigit() else ["output", *keys])
            names.append(f"{name}_output" if name in taken else name)  # an input has that name
    return names


def _onnx_runner(file: Path) -> Callable:
    """Return the function that runs an ONNX program, by onnxruntime if that has all its operators."""
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        names, run = [node.name for node in session.get_inputs()], session.run
    except Exception as error:  # of types that only its own modules know
        import onnx
        from onnx.reference import ReferenceEvaluator

        program = onnx.load(file)
        try:
            onnx.checker.check_model(program, full_check=True)
        except Exception as invalid:
            raise ValueError(
                f"PyTorch's exporter made no valid ONNX program ({invalid}); export a copy in float32, as "
                "network.float() is, or to .pt2"
            ) from error
        evaluator = ReferenceEvaluator(program)
        names, run = evaluator.input_names, evaluator.run
        warnings.warn(
            f"onnxruntime cannot run this program on a CPU ({error}); it was checked by the reference "
            "implementation of the package onnx",
            stacklevel=5,
        )

    def outputs(inputs: Any) -> list[Tensor]:
        tensors = dict(zip(names, map(_to_numpy, _tensors(inputs)), strict=True))
        return [_from_numpy(x) for x in run(None, tensors)]

    return outputs


def _openvino_runner(part: Path) -> Callable:
    """Write an ONNX program as one of OpenVINO; return the function that runs what was written."""
    import openvino

    openvino.save_model(openvino.Core().read_model(part.with_suffix(".onnx")), part, compress_to_fp16=False)
    run = openvino_program(openvino.Core().read_model(part), torch.get_num_threads())

    def outputs(inputs: Any) -> list[Tensor]:
        found = run([_to_numpy(x) for x in _tensors(inputs)])
        return [_from_numpy(found[i].copy()) for i in range(len(found))]

    return outputs


def _to_numpy(x: Tensor):
    if x.dtype != torch.bfloat16:
        return x.numpy()
    import ml_dtypes  # comes with onnx

    return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def _from_numpy(x) -> Tensor:
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(x)


def _difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """Return the largest difference of an output, relative to the largest finite number in it."""
    shapes = [[tuple(x.shape) for x in outputs] for outputs in (expected, found)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the program returns tensors of shapes {shapes[1]}, the network {shapes[0]}")
    worst = torch.zeros((), dtype=torch.float64)
    for a, b in zip(expected, found, strict=True):
        a, b = (x.to(torch.complex128 if x.is_complex() else torch.float64) for x in (a, b))
        apart = (a - b).abs().where(a != b, 0.0)  # of two infinities none
        size = a.abs()[a.isfinite()]
        if apart.any():
            worst = torch.maximum(worst, apart.max() / (size.max() if size.any() else 1.0))
    return float(worst)
