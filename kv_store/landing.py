"""Memory that an engine lends to a load: pages are decoded straight into their place."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray


class Landing:
    """Where one page goes. The lender may withdraw it at any time; afterwards nobody writes there.

    Thread-safe. That is why neither a late tier nor a load that nobody waits for any more can spoil
    memory that has got another use meanwhile.
    """

    def __init__(self, rows: NDArray[np.uint8]) -> None:
        """Lend.

        Args:
            rows: [num_layers, 2, bytes of one layer's keys or values] uint8; the last axis lies
                together, the others may be apart.
        """
        self._rows: NDArray[np.uint8] | None = rows
        self._lock = threading.Lock()  # held while somebody writes

    @property
    def is_withdrawn(self) -> bool:
        """Whether it is too late."""
        return self._rows is None

    def fill(self, write: Callable[[NDArray[np.uint8]], None]) -> NDArray[np.uint8] | None:
        """Let ``write`` fill the rows.

        Returns:
            The rows; None if they were withdrawn.
        """
        with self._lock:
            if self._rows is not None:
                write(self._rows)
            return self._rows

    def withdraw(self) -> None:
        """Take the memory back, once a page that is just being written is done."""
        with self._lock:
            self._rows = None
