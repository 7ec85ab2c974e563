"""A network as an ONNX program whose layers can be swapped for factors, and the runtimes that run it."""

from __future__ import annotations

import ast
import importlib.util
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = [
    "LayeredProgram",
    "layer_in",
    "onnxruntime_session",
    "onnxruntime_task",
    "openvino_program",
    "openvino_task",
    "quantized",
    "require",
]
SWAPPED = ("Conv", "Gemm", "MatMul")
SCOPES = "pkg.torch.onnx.name_scopes"  # where the exporter notes the modules that a node comes from


def require(*packages: str, extra: str) -> None:
    """Raise where a package is missing, with the extra of this project that has it.

    Raises:
        ImportError: names the package, and the command that installs it.

    >>> require("torch", extra="deploy")
    """
    for name in packages:
        if not importlib.util.find_spec(name):
            raise ImportError(
                f"this needs the package {name}, which is not installed: pip install lrpet[{extra}]"
            )


def onnxruntime_session(program: bytes, threads: int, **options: Any):
    """Return an ONNX Runtime session on the CPU whose threads sleep, not spin, while they wait.

    Args:
        program: a serialized ONNX model.
        threads: of one operator.
        options: attributes of ``SessionOptions``.

    Raises:
        ImportError: onnxruntime is missing.
    """
    require("onnxruntime", extra="deploy")
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for name, value in options.items():
        setattr(settings, name, value)
    return onnxruntime.InferenceSession(program, settings, providers=["CPUExecutionProvider"])


def quantized(program: bytes, feeds: Sequence[np.ndarray]) -> bytes:
    """Return a program whose weights and activations are int8, by ONNX Runtime's static quantization.

    Args:
        program: a serialized ONNX model.
        feeds: its inputs, on one run of which the ranges of the activations are read.

    Raises:
        ImportError: onnxruntime is missing.
    """
    require("onnx", "onnxruntime", extra="deploy")
    import onnx
    from onnxruntime import quantization

    model = onnx.load_model_from_string(program)
    names = [value.name for value in model.graph.input]

    class OneRun(quantization.CalibrationDataReader):
        runs = iter([dict(zip(names, feeds, strict=True))])

        def get_next(self):
            return next(self.runs, None)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        quantization.quantize_static(model, path, OneRun(), quant_format=quantization.QuantFormat.QDQ)
        return path.read_bytes()


def openvino_program(program: Any, threads: int, precision: str = "f32", **properties: Any):
    """Return a program compiled by OpenVINO for the CPU.

    Args:
        program: a serialized ONNX model, or an OpenVINO model.
        threads: of one inference.
        precision: "f32" or "bf16", in which it computes.
        properties: further ones of ``compile_model``.

    Raises:
        ImportError: openvino is missing.
    """
    require("openvino", extra="deploy")
    import openvino

    core = openvino.Core()
    model = core.read_model(program) if isinstance(program, bytes) else program
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision, "NUM_STREAMS": 1}
    return core.compile_model(model, "CPU", settings | properties)


def layer_in(text: str, names: Sequence[str]) -> str | None:
    """Return the layer whose mark is in the name of an operator, as runtimes report it; None for no layer.

    >>> layer_in("fused L1@7_nchwc_kernel_time", ["conv1", "conv2"]), layer_in("ReorderInput", [])
    ('conv2', None)
    """
    found = re.search(r"L(\d+)@", text)
    return names[int(found[1])] if found else None


class LayeredProgram:
    """A network exported to ONNX once, of which variants come by swapping layers; their weights are random.

    All operators and tensors are named by the layer from which they follow, so that a runtime which fuses
    them, and names the result by any of them, still tells the layer.

    Args:
        network: in evaluation mode, on the CPU, its BatchNorms folded.
        inputs: a tensor or a tuple of tensors to trace it with.
        layers: names of the layers that may be swapped.

    Raises:
        ImportError: a package is missing.

    >>> require("onnx", extra="export")
    >>> program = LayeredProgram(nn.Sequential(nn.Conv2d(3, 8, 3)).eval(), torch.ones(1, 3, 8, 8), ["0"])
    >>> program.layers, len(program.variant({"0": (2, "columns")})) > 0
    (['0'], True)
    """

    def __init__(self, network: nn.Module, inputs: Any, layers: Sequence[str]):
        require("onnx", "onnxscript", extra="export")
        args = inputs if isinstance(inputs, tuple) else (inputs,)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporter's own making
            exported = torch.onnx.export(network, args, dynamo=True, verbose=False, optimize=True)
        self._program = exported.model_proto
        self._weights = {weight.name: weight for weight in self._program.graph.initializer}
        found: dict[str, list[int]] = {}
        for place, node in enumerate(self._program.graph.node):
            if node.op_type in SWAPPED and len(node.input) > 1 and node.input[1] in self._weights:
                found.setdefault(_module_of(node), []).append(place)
        places = {name: found[name][0] for name in layers if len(found.get(name, ())) == 1}
        self._layer_at = {place: name for name, place in places.items()}
        self.layers = list(places)  # those that run once, as one operator: the ones that can be swapped
        self.feeds = [x.detach().numpy() for x in tree_leaves(inputs) if isinstance(x, Tensor)]

    def variant(self, choice: Mapping[str, tuple[int, str]]) -> bytes:
        """Return the program with layers swapped for factors.

        Args:
            choice: layer name → rank and unfolding; the others stay as they are.
        """
        from onnx import ModelProto

        new = ModelProto()
        new.CopyFrom(self._program)
        del new.graph.node[:], new.graph.value_info[:]
        swapped: dict[str, list] = {}  # weight → those that take its place
        owners: dict[str, str] = {}  # tensor → mark of the layer that it follows from
        for place, node in enumerate(self._program.graph.node):
            name = self._layer_at.get(place)
            if name in choice:
                made, weights = self._factors(node, *choice[name])
                swapped |= {node.input[1]: weights}
            else:
                made = [node]
            mark = None if name is None else f"L{self.layers.index(name)}@"
            for one in made:
                follows = mark or next((owners[x] for x in one.input if x in owners), "rest@")
                owners |= dict.fromkeys(one.output, follows)
                new.graph.node.append(one)
        del new.graph.initializer[:]
        for name, weight in self._weights.items():
            new.graph.initializer.extend(swapped.get(name, [weight]))
        _rename(new.graph, owners)
        return new.SerializeToString()

    def _factors(self, node, rank: int, unfolding: str):
        """Return the two nodes and the two weights that take the place of a layer."""
        from onnx import helper

        shape, settings = tuple(self._weights[node.input[1]].dims), {a.name: a for a in node.attribute}
        between, names = f"{node.output[0]}_between", [f"{node.input[1]}_{i}" for i in (0, 1)]
        bias = list(node.input[2:])
        if node.op_type == "Conv":
            N, C, *window = shape
            ones, with_window = [1] * len(window), list(node.attribute)
            if unfolding == "rows":
                shapes, attributes = [(rank, C, *window), (N, rank, *ones)], [with_window, []]
            else:
                shapes, attributes = [(rank, C, *ones), (N, rank, *window)], [[], with_window]
        elif node.op_type == "Gemm" and settings["transB"].i:
            shapes, attributes = [(rank, shape[1]), (shape[0], rank)], [list(node.attribute)] * 2
        else:
            shapes, attributes = [(shape[0], rank), (rank, shape[1])], [list(node.attribute)] * 2
        first = helper.make_node(node.op_type, [node.input[0], names[0]], [between])
        second = helper.make_node(node.op_type, [between, names[1], *bias], list(node.output))
        for made, those in zip((first, second), attributes, strict=True):
            made.attribute.extend(those)
        draw = np.random.default_rng(0)
        weights = []
        for name, size in zip(names, shapes, strict=True):
            fan_in = np.prod(size) / (size[0] if node.op_type != "MatMul" else size[1])
            values = draw.standard_normal(size, np.float32) / np.float32(fan_in**0.5)
            weights.append(_tensor(values, name))
        return [first, second], weights


def _tensor(values: np.ndarray, name: str):
    from onnx import numpy_helper

    return numpy_helper.from_array(values, name)


def _module_of(node) -> str:
    scopes = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "[]")
    return next(reversed(ast.literal_eval(scopes)[:-1]), "")  # the last one is of the operation itself


def _rename(graph, owners: Mapping[str, str]) -> None:
    """Put the mark of its layer into the name of each node and of each tensor that a node makes."""
    new = {tensor: f"{mark}{i}" for i, (tensor, mark) in enumerate(owners.items())}
    for i, node in enumerate(graph.node):
        mark = next((owners[x] for x in node.output if x in owners), "rest@")
        node.name = f"{mark}node{i}"
        for tensors in (node.input, node.output):
            tensors[:] = [new.get(x, x) for x in tensors]
    for value in graph.output:
        value.name = new.get(value.name, value.name)


def onnxruntime_task(session, feeds: Sequence[np.ndarray]) -> Callable:
    """Return the function of no argument that runs a session on these inputs."""
    given = dict(zip([node.name for node in session.get_inputs()], feeds, strict=True))
    return lambda: session.run(None, given)


def openvino_task(compiled, feeds: Sequence[np.ndarray]) -> Callable:
    """Return the function of no argument that runs a compiled program on these inputs."""
    request, given = compiled.create_infer_request(), list(feeds)
    return lambda: request.infer(given, share_inputs=True, share_outputs=True)
