"""Our part of SGLang's processes.

SGLang calls ``install`` at the start of each of its processes, because an entry point of the group
``sglang.srt.plugins`` names it. ``announce`` makes that entry point: this package need not be
installed, and a SGLang that somebody else starts in the same environment stays as it is.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

from deployments.engine.sglang_engine.own_params import DRAFT_LINK, SPANS
from deployments.engine.span_export import SpanExport

if TYPE_CHECKING:
    from pathlib import Path

SAMPLING_BACKEND = "pytorch"
"""SGLang's own name: on a CPU it insists on this backend, whatever it is told."""
SPECULATIVE_ALGORITHM = "PACELINE"
_NAME = "paceline"
_ALLOWED = "SGLANG_PLUGINS"


def announce(folder: Path) -> None:
    """Make SGLang find ``install``, in this process and in those that it spawns.

    Args:
        folder: empty; must stay while SGLang runs. Spawned processes inherit ``sys.path``.
    """
    info = folder / "paceline_sglang-1.dist-info"
    info.mkdir()
    metadata = "Metadata-Version: 2.1\nName: paceline-sglang\nVersion: 1\n"
    (info / "METADATA").write_text(metadata, encoding="utf-8")
    entry = f"[sglang.srt.plugins]\n{_NAME} = {install.__module__}:{install.__name__}\n"
    (info / "entry_points.txt").write_text(entry, encoding="utf-8")
    sys.path.append(str(folder))
    if allowed := os.environ.get(_ALLOWED):
        os.environ[_ALLOWED] = f"{allowed},{_NAME}"


def install() -> None:
    """Register what ours is; SGLang applies it."""
    from sglang.srt.layers.sampler import register_sampler_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from deployments.engine.sglang_engine.noise_sampler import NoiseSampler, add_rows

    register_sampler_backend(SAMPLING_BACKEND, NoiseSampler)
    HookRegistry.register(
        "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new",
        add_rows,
        HookType.AFTER,
    )
    if SPANS in os.environ:
        from deployments.engine.sglang_engine.sglang_spans import install_spans

        install_spans(SpanExport(**json.loads(os.environ[SPANS])))
    if DRAFT_LINK in os.environ:
        _install_drafting()


def _install_drafting() -> None:
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    # SGLang's scheduler is not imported yet; the worker needs more of it than the sampler.
    from deployments.engine.sglang_engine.draft_algorithm import RemoteDrafting

    def worker(_: object) -> type:
        from deployments.engine.sglang_engine.draft_worker import RemoteDraftWorker

        return RemoteDraftWorker

    SpeculativeAlgorithm.register(SPECULATIVE_ALGORITHM, spec_class=RemoteDrafting)(worker)
