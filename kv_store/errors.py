"""What can go wrong with a page. A miss is a value, never an error.

KVStoreError
├── TierUnavailableError     a tier cannot be reached or refuses work; counted as misses
│   ├── TierBusyError        others took all the time; says nothing of the server
│   └── TierRefusedError     the server answered, and said no
├── PageCorruptError         bytes are not the page that was asked for; deleted and counted
├── PageUnsupportedError     a sound page of a newer format or of a codec this process lacks
├── LayoutMismatchError      a page or a buffer has another layout than the store's
└── CodecLossError           the codec loses more on this model than the configuration allows
"""


class KVStoreError(Exception):
    """Base of every error of this package."""


class TierUnavailableError(KVStoreError):
    """A tier cannot be reached, timed out, or refuses work."""


class TierBusyError(TierUnavailableError):
    """The time was over before the server was asked: others had its connections."""


class TierRefusedError(TierUnavailableError):
    """The server's answer was an error: it is there, and may do what else it is asked."""


class PageCorruptError(KVStoreError):
    """The bytes are not a well-formed page, or not the page that was asked for."""


class PageUnsupportedError(KVStoreError):
    """A sound page that this process cannot read; a miss here, left in place for those who can."""


class LayoutMismatchError(KVStoreError):
    """A page or buffer does not have the store's layout."""


class CodecLossError(KVStoreError):
    """The configured codec loses more on this model than allowed, or nobody knows how much."""
