"""What can go wrong between two sessions of one training.

EngineError
└── RunMismatchError    a folder keeps the work of another target, prompt set or setting
"""

from __future__ import annotations

from deployments.engine.errors import EngineError


class RunMismatchError(EngineError):
    """A folder keeps the work of something else, or a damaged file; the message names it."""
