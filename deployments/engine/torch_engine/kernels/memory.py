"""Addresses, bits and threads: what compiled code needs and numba has no word for."""

from __future__ import annotations

import platform
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from deployments.engine.torch_engine.kernels.compiling import kernel
from deployments.engine.torch_engine.kernels.vectors import F32, I32, I64, Value

if TYPE_CHECKING:
    from collections.abc import Sequence

_IS_LINUX = sys.platform == "linux"
_SPINS = 20_000
"""Looks at the barrier before a thread sleeps: some ten microseconds. Most phases differ by less,
and a sleep costs more."""

SLEEPERS = 64
"""Bytes from a barrier's counter to the number of threads that sleep there, another cache line."""
ITEMS = 128
"""Bytes from a barrier's counter to its first phase's counter of items."""
LINE = 64
"""Bytes of a cache line: so far from there is the next phase's."""

_FUTEX_CALL = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), 0) if _IS_LINUX else 0
_WAIT, _WAKE, _ALL = 128, 129, 1 << 30  # both of them private to the process


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


@kernel
def address(array):
    """Where an array's numbers begin."""
    return np.int64(array.ctypes.data)


@intrinsic
def _add(typing_context, address, number):
    """Count up and return the sum; what was written before is visible to whoever sees it."""

    def generate(_context: Any, builder: Value, _signature: Any, args: Sequence[Value]) -> Value:
        counter = builder.inttoptr(args[0], I64.as_pointer())
        return builder.add(builder.atomic_rmw("add", counter, args[1], "seq_cst"), args[1])

    return types.int64(types.int64, types.int64), generate


@intrinsic
def _read(typing_context, address):
    """Look at a counter that other threads change."""

    def generate(_context: Any, builder: Value, _signature: Any, args: Sequence[Value]) -> Value:
        return builder.load_atomic(builder.inttoptr(args[0], I64.as_pointer()), "seq_cst", 8)

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


@intrinsic
def _futex(typing_context, address, operation, value):
    """Linux' call to sleep while the number at an address is ``value``, or to wake ``value``."""

    def generate(_context: Any, builder: Value, _signature: Any, args: Sequence[Value]) -> Value:
        signature = ir.FunctionType(I64, [I64], var_arg=True)
        function = cgutils.get_or_insert_function(builder.module, signature, "syscall")
        no_deadline = ir.Constant(I64, 0)
        return builder.call(function, [ir.Constant(I64, _FUTEX_CALL), *args, no_deadline])

    return types.int64(types.int64, types.int64, types.int64), generate


@kernel
def _sleep_until_changed(counter, seen):
    """Return once the counter may no longer be ``seen``."""
    if not _FUTEX_CALL:
        _give_way()
        return
    _add(counter + SLEEPERS, 1)
    _futex(counter, _WAIT, seen)
    _add(counter + SLEEPERS, -1)


@kernel
def next_item(counter):
    """A number that no other thread gets, counting up from what the counter holds.

    Whoever is done early takes more: processors that other programs use too are not equally fast.
    """
    return _add(counter, 1) - 1


@kernel
def wait_for_all(counter, num_parts, phase):
    """Meet the other threads at the end of a phase.

    Threads that find no processor of their own must not keep one busy by waiting: whoever has
    waited for long sleeps, and the last to come wakes all.

    Args:
        counter: address of an int64 that was 0 before the first phase, with another one that is 0
            ``SLEEPERS`` bytes behind it.
        num_parts: threads that meet.
        phase: 1 at the first meeting, then one more each time.
    """
    if num_parts == 1:
        return
    goal = num_parts * phase
    seen = _add(counter, 1)
    if seen == goal:
        if _FUTEX_CALL and _read(counter + SLEEPERS):
            _futex(counter, _WAKE, _ALL)
        return
    spins = 0
    while seen < goal:
        spins += 1
        if spins > _SPINS:
            _sleep_until_changed(counter, seen)
        seen = _read(counter)
