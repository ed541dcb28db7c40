"""Linear layers whose weights are in blocks of 4 or 8 bits along the inputs, each with a scale, in both forms."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from tango_export.graph import device
from tango_export.graph.builder import Form, GraphBuilder, Linear, Read, Weight
from tango_export.packing import BITS, Array, Packing
from tango_plugins import op
from tango_runtime.bundle import WeightQuantization

#: The domain of the portable form's operator.
CONTRIB = "com.microsoft"

#: MatMulNBits' ``accuracy_level`` 4: activations are rounded to 8 bits before the product, each block with its own
#: scale. That adds 0.7 % of noise where 4-bit weights add 10 %. For one token it is 3 times as fast as the fp32 product
#: with 4-bit weights, and 70 times with 8-bit weights.
ACCURACY_LEVEL = 4


@dataclass(frozen=True)
class Blocks:
    """The weight of a layer in blocks.

    Attributes:
        values: Unsigned elements [out, blocks, block · bits / 8]; two of 4 bits in a byte, the first in the low half.
        scales: Scales [out, blocks].
        zeros: Zero points [out, ⌈blocks · bits / 8⌉], packed likewise; None where each is 2^(bits − 1).
        bits: Bits of an element.
        block: Inputs of a block.
    """

    values: Weight
    scales: Weight
    zeros: Weight | None
    bits: Literal[4, 8]
    block: int

    @property
    def weights(self) -> tuple[Weight, ...]:
        """All that is stored, in the order in which operators take it."""
        return (self.values, self.scales) if self.zeros is None else (self.values, self.scales, self.zeros)


def blocks_of(
    g: GraphBuilder,
    layer: Linear,
    bits: Literal[4, 8],
    block: int,
    values: Callable[[Read], Array],
    scales: Callable[[Read], Array],
    zeros: Callable[[Read], Array] | None = None,
) -> Blocks:
    """Declares what a layer's weight in blocks is made of."""
    name, count = layer.weight, -(-layer.fan_in // block)
    scale, zero = f"{name}.scale", None if zeros is None else f"{name}.zero"
    shape = (layer.fan_out, count, block * bits // 8)
    quantization = WeightQuantization(bits, block, scale, zero)
    return Blocks(
        Weight(f"{name}.int{bits}", shape, "uint8", {}, values, quantization),
        Weight(scale, shape[:2], "float32" if layer.wide else g.dtype, {}, scales),
        Weight(zero, (layer.fan_out, -(-count * bits // 8)), "uint8", {}, zeros) if zero and zeros else None,
        bits,
        block,
    )


def matmul_nbits(g: GraphBuilder, layer: Linear, blocks: Blocks) -> str:
    """The product in the portable form, as ONNX Runtime's MatMulNBits, which TensorRT does not have."""
    sizes = {"K": layer.fan_in, "N": layer.fan_out, "bits": blocks.bits, "block_size": blocks.block}
    sizes["accuracy_level"] = ACCURACY_LEVEL
    return g.node("MatMulNBits", [layer.input, *map(g.weight, blocks.weights)], layer.output, domain=CONTRIB, **sizes)


def blockwise_linear(g: GraphBuilder, layer: Linear, blocks: Blocks) -> str:
    """The product in the device form."""
    kind = "BlockwiseLinear" if blocks.zeros is None else "BlockwiseAffineLinear"
    inputs = [layer.input, *map(g.weight, blocks.weights)]
    return g.node(kind, inputs, layer.output, domain=op.DOMAIN, bits=blocks.bits)


@dataclass(frozen=True)
class PackedLayers:
    """The layers that a checkpoint stores in 4 bits.

    Attributes:
        packing: How they are stored.
        tensors: Their weights, by canonical name.
    """

    packing: Packing
    tensors: Collection[str]

    def form(self, base: Form) -> Form:
        """A form of a graph, with these layers in blocks as the checkpoint has them."""
        is_device = base.opsets.keys() & device.OPSETS.keys() - {""}
        write = blockwise_linear if is_device else matmul_nbits

        def linear(g: GraphBuilder, layer: Linear) -> str:
            return write(g, layer, self._blocks(g, layer)) if self.holds(g, layer) else base.linear(g, layer)

        return replace(base, linear=linear, opsets=dict(base.opsets) if is_device else {**base.opsets, CONTRIB: 1})

    def holds(self, g: GraphBuilder, layer: Linear) -> bool:
        """Whether all that a layer is made of is in 4 bits, without anything to fill it up."""
        tensors = g.weights[layer.weight].tensors
        rows = sum(shape[0] for name, shape in tensors.items() if name in self.tensors and len(shape) == 2)
        return rows == layer.fan_out and all(shape[1] == layer.fan_in for shape in tensors.values())

    def _blocks(self, g: GraphBuilder, layer: Linear) -> Blocks:
        parts = [name.removesuffix(".weight") for name in g.weights[layer.weight].tensors]

        def stacked(make: Callable[[Read, str], Array]) -> Callable[[Read], Array]:
            return lambda read: np.concatenate([make(read, part) for part in parts])

        p = self.packing
        zeros = None if p.symmetric else stacked(p.packed_zeros)
        return blocks_of(g, layer, BITS, p.group, stacked(p.values), stacked(p.scales), zeros)
