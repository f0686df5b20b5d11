"""Spreads a training over several processes: FSDP2 for the head, a share of each batch for each."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, NoReturn

from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

if TYPE_CHECKING:
    from deployments.engine.training.objective import DraftObjective


def shard(objective: DraftObjective) -> None:
    """Leave each process of the default group its share of weights, gradients and optimiser state.

    All processes must hold the same weights. The head is one unit: its weights are together for
    the whole of a forward and a backward, and apart between steps.

    Args:
        objective: on the device of the training; changed in place, before an optimiser is made.
    """
    device_type = objective.get_buffer("embedding").device.type
    fully_shard(objective, mesh=init_device_mesh(device_type, (distributed.get_world_size(),)))


def end_process() -> NoReturn:
    """Leave the default group and end this process well, without the interpreter's own end.

    The group's threads may still let go of Python objects while the interpreter goes down; one that
    asks for its lock then is unwound through C++ and aborts a process whose work is done.
    """
    distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
