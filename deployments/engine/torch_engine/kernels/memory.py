"""Addresses, bits and threads: what compiled code needs and numba has no word for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from deployments.engine.torch_engine.kernels.compiling import kernel
from deployments.engine.torch_engine.kernels.vectors import F32, I32, I64, Value

if TYPE_CHECKING:
    from collections.abc import Sequence

_SPINS = 4000
"""Looks at the barrier before the processor is offered to somebody else."""


@intrinsic
def pointer(typing_context, address):
    """The float32 array at an address."""

    def generate(_context: Any, builder: Value, _signature: Any, args: Sequence[Value]) -> Value:
        return builder.inttoptr(args[0], F32.as_pointer())

    return types.CPointer(types.float32)(types.int64), generate


@intrinsic
def float_of_bits(typing_context, bits):
    """The float32 with these 32 bits."""

    def generate(_context: Any, builder: Value, _signature: Any, args: Sequence[Value]) -> Value:
        return builder.bitcast(args[0], F32)

    return types.float32(types.int32), generate


@intrinsic
def bits_of_float(typing_context, number):
    """The 32 bits of a float32."""

    def generate(_context: Any, builder: Value, _signature: Any, args: Sequence[Value]) -> Value:
        return builder.bitcast(args[0], I32)

    return types.int32(types.float32), generate


@intrinsic
def _add_one(typing_context, address):
    """Count an arrival; what this thread wrote before is visible to whoever sees the count."""

    def generate(context: Any, builder: Value, _signature: Any, args: Sequence[Value]) -> Value:
        counter = builder.inttoptr(args[0], I64.as_pointer())
        builder.atomic_rmw("add", counter, ir.Constant(I64, 1), "seq_cst")
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def _read(typing_context, address):
    """Look at a counter that other threads change."""

    def generate(_context: Any, builder: Value, _signature: Any, args: Sequence[Value]) -> Value:
        return builder.load_atomic(builder.inttoptr(args[0], I64.as_pointer()), "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def _give_way(typing_context):
    """Let another thread of the machine run."""

    def generate(_context: Any, builder: Value, _signature: Any, _args: Sequence[Value]) -> Value:
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(I32, []), "sched_yield"
        )
        return builder.call(function, [])

    return types.int32(), generate


@kernel
def wait_for_all(counter, num_parts, phase):
    """Meet the other threads at the end of a phase.

    Args:
        counter: address of an int64 that was 0 before the first phase.
        num_parts: threads that meet.
        phase: 1 at the first meeting, then one more each time.
    """
    if num_parts == 1:
        return
    _add_one(counter)
    spins = 0
    while _read(counter) < num_parts * phase:
        spins += 1
        if spins > _SPINS:
            _give_way()
