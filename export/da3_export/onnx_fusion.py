"""FP16 ONNX -> the graph that ONNX Runtime runs on CUDA: the same weights and fewer kernels.

The exported graph is one operator after another. This one has those of ONNX Runtime that take several
steps at once, and differs from it in three ways:

- The residual stream, its norms and the rotation of queries and keys are FP16 between operators.
  LayerNormalization and SkipLayerNormalization sum in FP32 inside.
- A product's bias, the residual and the norm after it are one SkipLayerNormalization. A bias and its
  GELU are one BiasGelu.
- Attention and the rotation take [B, tokens, heads * head_dim]. ONNX Runtime's flash attention wants the
  channels of a token together: given [B, heads, tokens, head_dim] it transposes queries and outputs
  itself, after the transposes of the graph (its ``llm/attention.cc``).

The weights stay where the exporter put them: the graph refers to the file of the FP16 ONNX. Only the
norms' weights are rounded to FP16, into the graph.

Every pattern is one that :mod:`da3_runtime.network.vit` makes. One that is not found is an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from da3_runtime.errors import BuildError

HALF, SINGLE = TensorProto.FLOAT16, TensorProto.FLOAT
MICROSOFT = "com.microsoft"  # ONNX Runtime's own operators
# Operators that only move numbers: exact in every dtype.
_MOVES = ("Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Gather", "Expand", "Concat", "Split")
# What lies between the norms of the residual stream.
_STREAM = ("Add", "Concat", "Reshape", "Slice", "Transpose")
# What lies between a sum and its norm. Both change places with a norm over the last axis.
_BETWEEN = ("Reshape", "Slice")


def fuse_onnx(source: Path, target: Path) -> None:
    """Write the fused graph of the FP16 ONNX ``source`` to ``target``, for the folder of its weights.

    Raises
    ------
    BuildError
        If the graph lacks a pattern that every network has.
    """
    model = onnx.load(str(source), load_external_data=False)
    _Narrowing(model, source.parent).run()
    _fuse_blocks(model)
    _drop_unused(model)
    model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    target.write_bytes(model.SerializeToString())


class _Narrowing:
    """Turns the residual stream, norms and rotations of a graph to FP16, in place.

    Casts are left out where the other dtype is wanted again: a value that was widened from FP16 and is
    narrowed or only moved afterwards stays FP16.
    """

    def __init__(self, model: ModelProto, folder: Path) -> None:
        graph = shape_inference.infer_shapes(model).graph
        typed = (*graph.value_info, *graph.input, *graph.output)
        self._dtypes = {value.name: value.type.tensor_type.elem_type for value in typed}
        self._dtypes |= {tensor.name: tensor.data_type for tensor in graph.initializer}
        self._graph = model.graph
        self._folder = folder
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._stream = _stream(model.graph.node)
        self._nodes: list[NodeProto] = []
        self._same: dict[str, str] = {}  # FP16 value -> the one that replaces it
        self._exact: dict[str, str] = {}  # FP32 value -> the FP16 value that it is the widening of
        self._rounded: dict[str, str] = {}  # FP32 value -> its rounding to FP16
        self._made: set[str] = set()  # FP32 values of the graph so far that are widenings

    def run(self) -> None:
        """Rewrite the graph."""
        for node in self._graph.node:
            if not self._is_dropped_cast(node):
                self._add(node)
        for output in self._graph.output:
            self._wide(output.name)
        del self._graph.node[:]
        self._graph.node.extend(self._nodes)

    def _is_dropped_cast(self, node: NodeProto) -> bool:
        """Note what a cast between FP16 and FP32 does; it is made where it is needed."""
        if node.op_type != "Cast":
            return False
        (source,), (result,) = node.input, node.output
        source = self._same.get(source, source)
        dtypes = self._dtypes.get(node.input[0]), self._dtypes.get(result)
        if dtypes == (HALF, SINGLE):
            self._exact[result] = source
        elif dtypes == (SINGLE, HALF) and source in self._exact:
            self._same[result] = self._exact[source]
        else:
            return False
        return True

    def _add(self, node: NodeProto) -> None:
        new = NodeProto()
        new.CopyFrom(node)
        is_half = self._becomes_half(node)
        for i, name in enumerate(node.input):
            if self._dtypes.get(name) == HALF:
                new.input[i] = self._same.get(name, name)
            elif is_half and self._dtypes.get(name) == SINGLE:
                new.input[i] = self._half(name)
            else:
                self._wide(name)
        if is_half:
            for i, name in enumerate(node.output):
                new.output[i] = self._exact[name] = f"{name}/half"
        self._nodes.append(new)

    def _becomes_half(self, node: NodeProto) -> bool:
        if self._dtypes.get(node.output[0]) != SINGLE:
            return False
        if node.op_type in ("LayerNormalization", "RotaryEmbedding"):
            return True
        floats = [name for name in node.input if self._dtypes.get(name) == SINGLE]
        exact = [name in self._exact for name in floats]
        if node.op_type in _MOVES and exact and all(exact):
            return True
        return node.op_type in ("Add", "Concat") and any(exact) and node.output[0] in self._stream

    def _half(self, name: str) -> str:
        """An FP32 value in FP16."""
        found = self._exact.get(name) or self._rounded.get(name)
        if found is None:
            found = self._rounded[name] = f"{name}/rounded"
            if name in self._weights:
                values = _values(self._weights[name], self._folder).astype(np.float16)
                self._graph.initializer.append(numpy_helper.from_array(values, found))
            else:
                self._nodes.append(helper.make_node("Cast", [name], [found], found, to=HALF))
        return found

    def _wide(self, name: str) -> None:
        """Make an FP32 value from FP16, if it is one and was not made yet."""
        if name in self._exact and name not in self._made:
            self._made.add(name)
            source = self._exact[name]
            self._nodes.append(helper.make_node("Cast", [source], [name], f"{name}/wide", to=SINGLE))


def _stream(nodes: Iterable[NodeProto]) -> set[str]:
    """Values that additions and moves carry from norm to norm."""
    producers = _producers(nodes)
    left = [node.input[0] for node in nodes if node.op_type == "LayerNormalization"]
    stream: set[str] = set()
    while left:
        name = left.pop()
        node = producers.get(name)
        if name not in stream and node is not None and node.op_type in _STREAM:
            stream.add(name)
            left.extend(node.input)
    return stream


def _values(tensor: TensorProto, folder: Path) -> NDArray[np.float32]:
    """Values of an FP32 weight. onnx would read none from a file with several hard links."""
    if not uses_external_data(tensor):
        return np.asarray(numpy_helper.to_array(tensor), np.float32)
    info = ExternalDataInfo(tensor)
    count = int(np.prod(tensor.dims))
    values = np.fromfile(folder / info.location, "<f4", count, offset=int(info.offset or 0))
    return values.reshape(tensor.dims)


def _fuse_blocks(model: ModelProto) -> None:
    """Fuse attention, feed-forward layers and residual sums of every block, in place."""
    fusion = _Fusion(model)
    attentions = fusion.nodes_of("Attention")
    for attention in attentions:
        fusion.attention(attention)
    for gelu in fusion.nodes_of("Gelu"):
        fusion.bias_gelu(gelu)
    sums = fusion.residual_sums()
    norms = fusion.norms_of_sums(sums)
    for add, path in norms.items():
        fusion.skip_norm(add, path)
    # The camera token replaces a token between one block and the next, so one sum may have no norm.
    blocks = len(attentions)
    if not blocks or len(sums) != 2 * blocks or len(norms) < 2 * blocks - 1:
        raise BuildError(
            f"The fused graph cannot be made: {len(sums)} residual sums, {len(norms)} of them with a "
            f"norm, do not fit {blocks} blocks."
        )
    fusion.apply()


class _Fusion:
    """Replaces patterns of FP16 operators. A pattern's new nodes take the place of its last node."""

    def __init__(self, model: ModelProto) -> None:
        self._graph = model.graph
        self._producers = _producers(model.graph.node)
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._halves = {name for name, tensor in self._weights.items() if tensor.data_type == HALF}
        self._replaced: dict[str, list[NodeProto]] = {}  # first output of a node -> what replaces it

    def nodes_of(self, op_type: str) -> list[NodeProto]:
        """Nodes of a type that compute in FP16."""
        nodes = [node for node in self._graph.node if node.op_type == op_type]
        return [node for node in nodes if op_type != "Gelu" or self._biased(node.input[0])]

    def apply(self) -> None:
        """Write the new nodes into the graph."""
        nodes: list[NodeProto] = []
        for node in self._graph.node:
            nodes.extend(self._replaced.get(node.output[0], [node]))
        del self._graph.node[:]
        self._graph.node.extend(nodes)
        # onnx infers no types of outputs of ONNX Runtime's operators.
        for node in nodes:
            if node.domain == MICROSOFT:
                self._graph.value_info.extend(
                    helper.make_tensor_value_info(name, HALF, None) for name in node.output if name
                )

    def attention(self, node: NodeProto) -> None:
        """Let the attention of a block take [B, tokens, heads * head_dim], without transposes."""
        rotations = [self._rotation(name) for name in node.input]
        values = [
            rotation[1].input[0] if rotation else name
            for name, rotation in zip(node.input, rotations, strict=True)
        ]
        split = self._up(values[0], "Squeeze", "Split")
        if [self._producer(name, "Squeeze").input[0] for name in values] != list(split.output):
            raise BuildError("The fused graph cannot be made: Q, K and V are not parts of one product.")
        reshape = self._up(split.input[0], "Transpose", "Reshape")
        shape = self._producer(reshape.input[1], "Concat")
        heads, head_dim = (numpy_helper.to_array(self._weights[name]).item() for name in shape.input[3:])
        (output,) = (name for name in node.output if name)
        names = [f"{output}/{part}" for part in ("q", "k", "v")]
        new = [helper.make_node("Split", reshape.input[:1], names, names[0], axis=-1, num_outputs=3)]
        for i, rotation in enumerate(rotations):
            if rotation is not None:
                new.extend(self._normed_and_rotated(names[i], *rotation, heads, head_dim))
                names[i] = new[-1].output[0]
        scale = helper.get_node_attr_value(node, "scale")
        counts = {"q_num_heads": heads, "kv_num_heads": heads}
        joined = self._down(output, "Transpose", "Reshape")
        new.append(helper.make_node("Attention", names, joined.output, output, scale=scale, **counts))
        self._replaced[joined.output[0]] = new

    def bias_gelu(self, node: NodeProto) -> None:
        """Join a bias and the GELU after it."""
        product, bias = self._product_and_bias(node.input[0])
        name = node.output[0]
        self._replaced[name] = [
            helper.make_node("BiasGelu", [product, bias], [name], name, domain=MICROSOFT)
        ]

    def residual_sums(self) -> list[NodeProto]:
        """Additions of a product with a bias to the residual stream."""
        return [
            node
            for node in self._graph.node
            if node.op_type == "Add"
            and not set(node.input) & set(self._weights)
            and any(self._biased(name) for name in node.input)
        ]

    def norms_of_sums(self, sums: list[NodeProto]) -> dict[str, list[NodeProto]]:
        """For each sum, by name: the nodes from it to a norm, the norm last.

        Of two norms the one of all tokens is taken, which the next block waits for. The other one is of
        a level that the head reads.
        """
        names = {node.output[0] for node in sums}
        found: dict[str, list[NodeProto]] = {}
        for norm in self._graph.node:
            path = [norm]
            while (node := self._producers.get(path[0].input[0])) and node.op_type in _BETWEEN:
                path.insert(0, node)
            name = path[0].input[0]
            sliced = any(node.op_type == "Slice" for node in path)
            if (
                norm.op_type == "LayerNormalization"
                and name in names
                and (name not in found or not sliced)
            ):
                found[name] = path
        return found

    def skip_norm(self, name: str, path: list[NodeProto]) -> None:
        """Join a bias, the sum ``name`` and the norm after it."""
        add, (*moves, norm) = self._producers[name], path
        inner = next(each for each in add.input if self._biased(each))
        (skip,) = (each for each in add.input if each != inner)
        product, bias = self._product_and_bias(inner)
        outputs = [f"{name}/norm" if moves else norm.output[0], "", "", name]
        epsilon = helper.get_node_attr_value(norm, "epsilon")
        inputs = [product, skip, *norm.input[1:], bias]
        self._replaced[name] = [
            helper.make_node(
                "SkipLayerNormalization", inputs, outputs, name, domain=MICROSOFT, epsilon=epsilon
            )
        ]
        # What stood between sum and norm comes after the norm, for whatever reads the norm.
        moved: list[NodeProto] = []
        for i, node in enumerate(moves):
            new = NodeProto()
            new.CopyFrom(node)
            new.input[0] = moved[-1].output[0] if moved else outputs[0]
            new.output[0] = norm.output[0] if i == len(moves) - 1 else f"{node.output[0]}/norm"
            new.name = new.output[0]
            moved.append(new)
        self._replaced[norm.output[0]] = moved

    def _biased(self, name: str) -> bool:
        """Whether a value is a product plus a bias, in FP16."""
        add = self._producers.get(name)
        if add is None or add.op_type != "Add" or len(set(add.input) & self._halves) != 1:
            return False
        product = self._producers.get(self._product_and_bias(name)[0])
        return product is not None and product.op_type == "MatMul"

    def _product_and_bias(self, name: str) -> tuple[str, str]:
        product, bias = sorted(self._producers[name].input, key=lambda each: each in self._halves)
        return product, bias

    def _rotation(self, name: str) -> tuple[NodeProto, NodeProto] | None:
        """Rotation of an input of an attention and the norm before it, if it has them."""
        node = self._producers.get(name)
        if node is not None and node.op_type == "Squeeze":
            return None
        node = self._producer(name, "RotaryEmbedding")
        return node, self._producer(node.input[0], "LayerNormalization")

    def _normed_and_rotated(
        self, name: str, rotary: NodeProto, norm: NodeProto, heads: int, head_dim: int
    ) -> list[NodeProto]:
        apart, together = self._shape(heads, head_dim), self._shape(heads * head_dim)
        steps = [f"{name}/{step}" for step in ("heads", "norm", "joined", "rotated")]
        made = NodeProto()
        made.CopyFrom(norm)
        made.input[0], made.output[0] = steps[0], steps[1]
        return [
            helper.make_node("Reshape", [name, apart], steps[:1], steps[0]),
            made,
            helper.make_node("Reshape", [steps[1], together], steps[2:3], steps[2]),
            helper.make_node(
                "RotaryEmbedding", [steps[2], *rotary.input[1:]], steps[3:], steps[3], num_heads=heads
            ),
        ]

    def _shape(self, *last: int) -> str:
        """A constant shape: the first two sizes stay."""
        name = "/".join(map(str, ("shape", *last)))
        if name not in self._weights:
            tensor = numpy_helper.from_array(np.array([0, 0, *last], np.int64), name)
            self._weights[name] = tensor
            self._graph.initializer.append(tensor)
        return name

    def _producer(self, name: str, op_type: str) -> NodeProto:
        node: NodeProto | None = self._producers.get(name)
        if node is None or node.op_type != op_type:
            found = "no operator" if node is None else node.op_type
            raise BuildError(f"The fused graph cannot be made: {found} makes {name}, not {op_type}.")
        return node

    def _up(self, name: str, *op_types: str) -> NodeProto:
        """The last of the operators that lie before a value."""
        *others, last = op_types
        for op_type in others:
            name = self._producer(name, op_type).input[0]
        return self._producer(name, last)

    def _down(self, name: str, *op_types: str) -> NodeProto:
        """The last of the operators that lie after a value, each its only reader."""
        made: NodeProto
        for op_type in op_types:
            readers = [node for node in self._graph.node if name in node.input]
            if [node.op_type for node in readers] != [op_type]:
                found = ", ".join(node.op_type for node in readers)
                raise BuildError(f"The fused graph cannot be made: {found} reads {name}, not {op_type}.")
            made = readers[0]
            name = made.output[0]
        return made


def _producers(nodes: Iterable[NodeProto]) -> dict[str, NodeProto]:
    """The node that makes each value."""
    return {name: node for node in nodes for name in node.output if name}


def _drop_unused(model: ModelProto) -> None:
    """Remove nodes and weights that nothing reads."""
    graph = model.graph
    used = {output.name for output in graph.output}
    nodes = []
    for node in reversed(graph.node):
        if used & set(node.output):
            nodes.append(node)
            used.update(node.input)
    weights = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(reversed(nodes))
    graph.initializer.extend(weights)
