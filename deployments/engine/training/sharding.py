"""Spreads a training over several processes: a mesh of data times tensor.

FSDP2 spreads weights, gradients and optimiser state over the data side, and each of its processes
takes a share of every batch. Processes along the tensor side take the same texts and hold parts of
every matrix.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.parallel import parallelize_module
from torch.distributed.tensor.parallel.style import ParallelStyle

from deployments.engine.training.plan import share

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed.device_mesh import DeviceMesh

    from deployments.engine.training.objective import DraftObjective

_T = TypeVar("_T")


class ProcessMesh:
    """The processes that train together, as one of them sees them. There may be no others."""

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        """Stand in a mesh with the sides ``data`` and ``tensor``, or alone."""
        self._mesh = mesh

    @classmethod
    def of_default_group(cls, tensor_parallel: int, device_type: str) -> ProcessMesh:
        """All processes of torch's default group; this one alone where there is no group.

        Args:
            tensor_parallel: processes that hold one matrix together. A group whose size it does not
                divide, because some of its processes were lost, cuts matrices less often.
            device_type: of the training.
        """
        if not distributed.is_initialized():
            return cls()
        count = distributed.get_world_size()
        tensor = math.gcd(count, tensor_parallel)
        return cls(
            init_device_mesh(
                device_type, (count // tensor, tensor), mesh_dim_names=("data", "tensor")
            )
        )

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files."""
        return self._mesh is None or distributed.get_rank() == 0

    @property
    def num_shares(self) -> int:
        """Shares into which every batch is divided."""
        return 1 if self._mesh is None else self._mesh["data"].size()

    def share(self, batch: Sequence[int]) -> list[int]:
        """The texts of a batch that this process takes."""
        rank = 0 if self._mesh is None else self._mesh["data"].get_local_rank()
        return share(batch, rank, self.num_shares)

    def sum(self, tensor: Tensor) -> None:
        """Add up what the shares gave, in place."""
        if self._mesh is not None:
            distributed.all_reduce(tensor, group=self._mesh["data"].get_group())

    def total(self, number: int) -> int:
        """The sum of a number over the shares."""
        if self._mesh is None:
            return number
        tensor = torch.tensor(number, device=self._mesh.device_type)
        self.sum(tensor)
        return int(tensor)

    def tell(self, value: _T | None) -> _T:
        """What the first process says, for all of them; what the others bring is not read."""
        told = [value]
        if self._mesh is not None:
            distributed.broadcast_object_list(told)
        return cast("_T", told[0])

    def shard(self, objective: DraftObjective) -> None:
        """Leave this process its part of weights, gradients and optimiser state.

        All processes must hold the same weights. The draft is one unit: its weights are together
        for the whole of a forward and a backward, and apart between steps.

        Args:
            objective: on the device of the training; changed in place, before an optimiser is made.
        """
        if self._mesh is None:
            return
        if self._mesh["tensor"].size() > 1:
            _cut_matrices(objective, self._mesh["tensor"])
        fully_shard(objective, mesh=self._mesh["data"])


ALONE = ProcessMesh()


class _Replicated(ParallelStyle):
    """All of a module in every process. Only that all weights lie in one mesh, as norms want it."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        # What the hooks give back is used, whatever their annotation says.
        hooks = (self._spread, self._own)
        return distribute_module(module, device_mesh, None, *hooks)  # type: ignore[arg-type]

    @staticmethod
    def _spread(_: nn.Module, inputs: tuple[Tensor, ...], mesh: DeviceMesh) -> tuple[DTensor, ...]:
        return tuple(DTensor.from_local(x, mesh, (Replicate(),), run_check=False) for x in inputs)

    @staticmethod
    def _own(_: nn.Module, output: DTensor, __: DeviceMesh) -> Tensor:
        return output.to_local()


def _cut_matrices(objective: DraftObjective, mesh: DeviceMesh) -> None:
    plan = objective.draft.tensor_plan()
    for name, module in objective.draft.named_modules():
        if name not in plan and any(True for _ in module.parameters(recurse=False)):
            plan[name] = _Replicated()
    parallelize_module(objective.draft, mesh, plan)
