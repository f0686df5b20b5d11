"""Pieces of LLVM code for vectors of sixteen floats; narrower machines split them by themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba.core import cgutils

if TYPE_CHECKING:
    from collections.abc import Sequence

LANES = 16

Value: TypeAlias = Any
"""A value of LLVM code; llvmlite comes without types."""

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32 = ir.FloatType()

DENSE_F32, DENSE_BF16, Q4_1, Q8_0 = range(4)
"""How numbers lie in memory; ``packing`` tells the layout of the last two."""
SHORT_FORMS = Q4_1_SHORT, Q8_0_SHORT = 4, 5
"""The same, multiplied with inputs that are rounded to sixteen bits per block."""

BLOCK = 32
"""Columns that share a scale."""
Q4_1_TILE_BYTES = LANES * (2 + 2 + BLOCK // 2)
Q8_0_TILE_BYTES = LANES * (2 + BLOCK)
"""Bytes of one block of sixteen rows."""


_FEATURES = get_host_cpu_features()
_HAS_AVX2 = bool(_FEATURES.get("avx2"))
HAS_AVX512 = all(map(_FEATURES.get, ("avx512f", "avx512bw")))
"""Whether a vector of sixteen floats is one register, of which there are 32."""
_HAS_VNNI = HAS_AVX512 and bool(_FEATURES.get("avx512vnni"))


class Emitter:
    """Writes instructions at a builder's position.

    Attributes:
        lanes: of its vectors.
        floats: the type of a vector.
    """

    def __init__(self, builder: Value, lanes: int = LANES) -> None:
        self.builder = builder
        self.lanes = lanes
        self.floats = ir.VectorType(F32, lanes)
        self._ints = ir.VectorType(I32, lanes)
        signature = ir.FunctionType(self.floats, [self.floats] * 3)
        name = f"llvm.fma.v{lanes}f32"
        self._fma = cgutils.get_or_insert_function(builder.module, signature, name)

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

    def prefetch(self, address: Value) -> None:
        """Bring what lies there nearer; it may lie nowhere."""
        kind = I8.as_pointer()
        signature = ir.FunctionType(ir.VoidType(), [kind, I32, I32, I32])
        function = cgutils.get_or_insert_function(
            self.builder.module, signature, "llvm.prefetch.p0i8"
        )
        read, near, data = (ir.Constant(I32, number) for number in (0, 3, 1))
        self.builder.call(function, [self.builder.inttoptr(address, kind), read, near, data])

    def prefetch_all(self, address: Value, size: int) -> None:
        """The same for so many bytes."""
        for offset in range(0, size, 64):
            self.prefetch(self.at(address, offset))

    def store(self, value: Value, address: Value) -> None:
        """Write floats."""
        self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer())).align = 4

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """``a * b + c``, rounded once."""
        return self.builder.call(self._fma, [a, b, c])

    def splat(self, scalar: Value) -> Value:
        """The same float in every lane."""
        undefined = ir.Constant(self.floats, ir.Undefined)
        one = self.builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
        return self.builder.shuffle_vector(one, undefined, self._every(0))

    def load_splat(self, address: Value) -> Value:
        """One float from memory in every lane."""
        return self.splat(self.load(address, F32, 4))

    def load_floats(self, address: Value, kind: int) -> Value:
        """Neighbours in a dense array, as float32."""
        if kind == DENSE_F32:
            return self.load(address, self.floats, 4)
        bits = self.load(address, ir.VectorType(I16, self.lanes), 2)
        bits = self.builder.shl(self.builder.zext(bits, self._ints), self._every(16))
        return self.builder.bitcast(bits, self.floats)

    def load_halves(self, address: Value) -> Value:
        """Neighbours of float16, as float32."""
        halves = ir.VectorType(ir.HalfType(), self.lanes)
        return self.builder.fpext(self.load(address, halves, 2), self.floats)

    def load_byte_pairs(self, address: Value) -> Value:
        """Two neighbours of int8 per lane, as int16."""
        count = 2 * self.lanes
        numbers = self.load(address, ir.VectorType(I8, count), 1)
        return self.builder.sext(numbers, ir.VectorType(I16, count))

    def split_pairs(self, pairs: Value) -> list[Value]:
        """The first and the second int16 of every lane, as float32."""
        both, half = self.builder.bitcast(pairs, self._ints), self._every(16)
        first = self.builder.ashr(self.builder.shl(both, half), half)
        second = self.builder.ashr(both, half)
        return [self.builder.sitofp(one, self.floats) for one in (first, second)]

    def load_nibbles(self, address: Value) -> list[Value]:
        """The eight nibbles of neighbouring int32, the lowest first, as float32."""
        eight = self.load(address, self._ints, 1)
        nibbles = [self.builder.lshr(eight, self._every(4 * place)) for place in range(8)]
        lowest = [self.builder.and_(shifted, self._every(15)) for shifted in nibbles[:-1]]
        return [self.builder.sitofp(one, self.floats) for one in (*lowest, nibbles[-1])]

    def load_nibble_pairs(self, address: Value) -> list[Value]:
        """Per place in neighbouring int16 the nibble there, as int16; the lowest place first."""
        shorts = ir.VectorType(I16, 2 * self.lanes)
        four = self.load(address, shorts, 1)
        places = [
            self.builder.lshr(four, ir.Constant(shorts, [4 * place] * shorts.count))
            for place in range(4)
        ]
        fifteen = ir.Constant(shorts, [15] * shorts.count)
        return [*(self.builder.and_(place, fifteen) for place in places[:-1]), places[-1]]

    def splat_pair(self, address: Value) -> Value:
        """Two neighbouring int16 from memory in every pair of lanes."""
        pair = self.load(address, I32, 2)
        undefined = ir.Constant(self._ints, ir.Undefined)
        one = self.builder.insert_element(undefined, pair, ir.Constant(I32, 0))
        both = self.builder.shuffle_vector(one, undefined, self._every(0))
        return self.builder.bitcast(both, ir.VectorType(I16, 2 * self.lanes))

    def add_pair_products(self, a: Value, b: Value, c: Value) -> Value:
        """``c + a[2i] * b[2i] + a[2i + 1] * b[2i + 1]`` of int16 in int32."""
        if _HAS_VNNI and self.lanes == 16:
            signature = ir.FunctionType(self._ints, [self._ints, a.type, b.type])
            name = "llvm.x86.avx512.vpdpwssd.512"
            function = cgutils.get_or_insert_function(self.builder.module, signature, name)
            return self.builder.call(function, [c, a, b])
        by_lanes = {8: (_HAS_AVX2, "avx2.pmadd.wd"), 16: (HAS_AVX512, "avx512.pmaddw.d.512")}
        is_there, name = by_lanes.get(self.lanes, (False, ""))
        if is_there:
            signature = ir.FunctionType(self._ints, [a.type] * 2)
            function = cgutils.get_or_insert_function(
                self.builder.module, signature, f"llvm.x86.{name}"
            )
            return self.builder.add(c, self.builder.call(function, [a, b]))
        for lanes in (range(0, 2 * self.lanes, 2), range(1, 2 * self.lanes, 2)):
            factors = [
                self.builder.sext(self.builder.shuffle_vector(x, x, _lanes(lanes)), self._ints)
                for x in (a, b)
            ]
            c = self.builder.add(c, self.builder.mul(*factors))
        return c

    @property
    def int_zero(self) -> Value:
        """A vector of integer zero to start a sum with."""
        return self._every(0)

    def to_floats(self, ints: Value) -> Value:
        """int32 as float32."""
        return self.builder.sitofp(ints, self.floats)

    def nearest(self, floats: Value) -> Value:
        """Rounded to whole numbers, still as floats; halves upwards."""
        half = ir.Constant(self.floats, [0.5] * self.lanes)
        signature = ir.FunctionType(self.floats, [self.floats])
        name = f"llvm.floor.v{self.lanes}f32"
        floor = cgutils.get_or_insert_function(self.builder.module, signature, name)
        return self.builder.call(floor, [self.builder.fadd(floats, half)])

    def store_shorts(self, floats: Value, address: Value) -> None:
        """Write whole numbers as int16."""
        ints = self.builder.fptosi(floats, self._ints)
        shorts = self.builder.trunc(ints, ir.VectorType(I16, self.lanes))
        self.builder.store(
            shorts, self.builder.inttoptr(address, shorts.type.as_pointer())
        ).align = 2

    def largest_size(self, floats: Value) -> Value:
        """The highest absolute value; not a number where a lane is none."""
        # Floats without a sign are in the order of their bits.
        bits = self.builder.bitcast(floats, self._ints)
        bits = self.builder.and_(bits, self._every(0x7FFFFFFF))
        name = f"llvm.vector.reduce.smax.v{self.lanes}i32"
        signature = ir.FunctionType(I32, [self._ints])
        largest = cgutils.get_or_insert_function(self.builder.module, signature, name)
        return self.builder.bitcast(self.builder.call(largest, [bits]), F32)

    def total(self, vector: Value) -> Value:
        """The sum of the lanes, in an order that is always the same."""
        width = self.lanes
        while width > 1:
            width //= 2
            undefined = ir.Constant(vector.type, ir.Undefined)
            halves = [
                self.builder.shuffle_vector(vector, undefined, _lanes(range(start, start + width)))
                for start in (0, width)
            ]
            vector = self.builder.fadd(*halves)
        return self.builder.extract_element(vector, ir.Constant(I32, 0))

    def total_each(self, vectors: Sequence[Value]) -> Value:
        """The sums of four vectors of eight lanes, as one vector of four."""
        while len(vectors) > 1:
            vectors = [
                self._add_neighbours(*pair)
                for pair in zip(vectors[::2], vectors[1::2], strict=True)
            ]
        undefined = ir.Constant(self.floats, ir.Undefined)
        halves = [
            self.builder.shuffle_vector(vectors[0], undefined, _lanes(lanes))
            for lanes in (range(4), range(4, 8))
        ]
        return self.builder.fadd(*halves)

    def _add_neighbours(self, a: Value, b: Value) -> Value:
        """Sums of neighbouring lanes, in the order that stays within halves of a register."""
        even, odd = [0, 2, 8, 10, 4, 6, 12, 14], [1, 3, 9, 11, 5, 7, 13, 15]
        return self.builder.fadd(
            self.builder.shuffle_vector(a, b, _lanes(even)),
            self.builder.shuffle_vector(a, b, _lanes(odd)),
        )

    def zeros(self, count: int) -> list[Value]:
        """Vectors of zero to start sums with."""
        return [ir.Constant(self.floats, [0.0] * self.lanes) for _ in range(count)]

    def _every(self, value: int) -> Value:
        return ir.Constant(self._ints, [value] * self.lanes)


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


def _lanes(indices: Sequence[int]) -> Value:
    return ir.Constant(ir.VectorType(I32, len(indices)), list(indices))
