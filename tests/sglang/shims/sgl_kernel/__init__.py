"""Stands in for SGLang's kernels, which are published for CUDA alone.

On a CPU plain generation calls none of them, they only have to be importable. The op
``torch.ops.sgl_kernel.convert_weight_packed`` must stay undefined: SGLang takes it for a sign that
its kernels for AMX are there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def __getattr__(name: str) -> Callable[..., None]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: object, **__: object) -> None:
        raise NotImplementedError(f"sgl_kernel.{name} has no CPU build")

    return missing
