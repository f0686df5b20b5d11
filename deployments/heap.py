"""The garbage collector in a process that serves."""

from __future__ import annotations

import gc


def settle_heap() -> None:
    """Let the collector pass by all that was made until now; called once a replica is ready.

    Models, tokenizers and imported modules are some hundred thousand objects that live as long as
    the process. A full collection would look at each of them, and every stream would wait for it.
    """
    gc.collect()
    gc.freeze()
