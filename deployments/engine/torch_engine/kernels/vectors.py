"""Pieces of LLVM code for vectors of sixteen floats; narrower machines split them by themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from llvmlite import ir
from numba.core import cgutils

if TYPE_CHECKING:
    from collections.abc import Sequence

LANES = 16

Value: TypeAlias = Any
"""A value of LLVM code; llvmlite comes without types."""

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32 = ir.FloatType()
FLOATS = ir.VectorType(F32, LANES)
HALVES = ir.VectorType(ir.HalfType(), LANES)
INTS = ir.VectorType(I32, LANES)
SHORTS = ir.VectorType(I16, LANES)
BYTES = ir.VectorType(I8, LANES)

DENSE_F32, DENSE_BF16, Q4_1, Q8_0 = range(4)
"""How numbers lie in memory; ``packing`` tells the layout of the last two."""

BLOCK = 32
"""Columns that share a scale."""
Q4_1_TILE_BYTES = LANES * (2 + 2 + BLOCK // 2)
Q8_0_TILE_BYTES = LANES * (2 + BLOCK)
"""Bytes of one block of sixteen rows."""


class Emitter:
    """Writes instructions at a builder's position."""

    def __init__(self, builder: Value) -> None:
        self.builder = builder
        signature = ir.FunctionType(FLOATS, [FLOATS] * 3)
        self._fma = cgutils.get_or_insert_function(builder.module, signature, "llvm.fma.v16f32")

    def at(self, address: Value, offset: int) -> Value:
        """``address + offset`` in bytes."""
        return self.builder.add(address, ir.Constant(I64, offset)) if offset else address

    def step(self, address: Value, stride: Value, count: int) -> Value:
        """``address + count * stride``."""
        return self.builder.add(address, self.builder.mul(stride, ir.Constant(I64, count)))

    def load(self, address: Value, kind: Value, align: int) -> Value:
        """Read one value of any type."""
        value = self.builder.load(self.builder.inttoptr(address, kind.as_pointer()))
        value.align = align
        return value

    def store(self, value: Value, address: Value) -> None:
        """Write floats."""
        self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer())).align = 4

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """``a * b + c``, rounded once."""
        return self.builder.call(self._fma, [a, b, c])

    def splat(self, scalar: Value) -> Value:
        """The same float in every lane."""
        undefined = ir.Constant(FLOATS, ir.Undefined)
        one = self.builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
        return self.builder.shuffle_vector(one, undefined, ir.Constant(INTS, [0] * LANES))

    def load_splat(self, address: Value) -> Value:
        """One float from memory in every lane."""
        return self.splat(self.load(address, F32, 4))

    def load_floats(self, address: Value, kind: int) -> Value:
        """Sixteen neighbours of a dense array, as float32."""
        if kind == DENSE_F32:
            return self.load(address, FLOATS, 4)
        bits = self.builder.zext(self.load(address, SHORTS, 2), INTS)
        return self.builder.bitcast(self.builder.shl(bits, _every(16)), FLOATS)

    def load_halves(self, address: Value) -> Value:
        """Sixteen float16, as float32."""
        return self.builder.fpext(self.load(address, HALVES, 2), FLOATS)

    def load_signed(self, address: Value) -> Value:
        """Sixteen int8, as float32."""
        return self.builder.sitofp(self.builder.sext(self.load(address, BYTES, 1), INTS), FLOATS)

    def load_nibbles(self, address: Value) -> tuple[Value, Value]:
        """The low and the high four bits of sixteen bytes, as float32."""
        both = self.builder.zext(self.load(address, BYTES, 1), INTS)
        low = self.builder.and_(both, _every(15))
        high = self.builder.lshr(both, _every(4))
        return self.builder.uitofp(low, FLOATS), self.builder.uitofp(high, FLOATS)

    def total(self, vector: Value) -> Value:
        """The sum of the lanes, in an order that is always the same."""
        width = LANES
        while width > 1:
            width //= 2
            undefined = ir.Constant(vector.type, ir.Undefined)
            halves = [
                self.builder.shuffle_vector(vector, undefined, _lanes(range(start, start + width)))
                for start in (0, width)
            ]
            vector = self.builder.fadd(*halves)
        return self.builder.extract_element(vector, ir.Constant(I32, 0))


class Loop:
    """A counted loop that carries vectors: ``for index in range(count)``, at least once."""

    def __init__(self, builder: Value, count: Value, carried: Sequence[Value]) -> None:
        self._builder, self._count = builder, count
        entry = builder.basic_block
        self._body = builder.append_basic_block("loop")
        self._end = builder.append_basic_block("end")
        builder.branch(self._body)
        builder.position_at_end(self._body)
        self.index = builder.phi(I64)
        self.index.add_incoming(ir.Constant(I64, 0), entry)
        self.carried = []
        for value in carried:
            phi = builder.phi(value.type)
            phi.add_incoming(value, entry)
            self.carried.append(phi)

    def close(self, values: Sequence[Value]) -> None:
        """End the body; ``values`` go into the next round, or out of the loop."""
        builder = self._builder
        following = builder.add(self.index, ir.Constant(I64, 1))
        latch = builder.basic_block
        self.index.add_incoming(following, latch)
        for phi, value in zip(self.carried, values, strict=True):
            phi.add_incoming(value, latch)
        builder.cbranch(builder.icmp_signed("<", following, self._count), self._body, self._end)
        builder.position_at_end(self._end)


def zeros(count: int) -> list[Value]:
    """Vectors of zero to start sums with."""
    return [ir.Constant(FLOATS, [0.0] * LANES) for _ in range(count)]


def _every(value: int) -> Value:
    return ir.Constant(INTS, [value] * LANES)


def _lanes(indices: Sequence[int]) -> Value:
    return ir.Constant(ir.VectorType(I32, len(indices)), list(indices))
