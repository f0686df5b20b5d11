"""Mistral: Llama, except that early releases see only a window of rows (``sliding_window``).

``ModelConfig.check_context`` refuses texts longer than the window; later releases have none.
"""

from __future__ import annotations

from deployments.engine.torch_engine.models import llama


class Model(llama.Model):
    """The Mistral family."""
