"""Codec names to codecs. A custom codec needs no registration call: its import path is its name.

A configuration says a built-in name, such as ``codec: int8``, or an import path, such as
``codec: my_package.my_module:MyCodec``. The path is resolved in every process that reads the
configuration, so that each replica of a pool has the codec without code of its own. A store reads
pages of all built-in codecs and of the one it writes with, as long as the fidelity is the same.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Final, Literal

from kv_store.codecs.base import FIRST_CUSTOM_CODEC_ID, Codec
from kv_store.codecs.int8 import Int8Codec
from kv_store.codecs.kivi import Int4Codec, K8V4Codec
from kv_store.codecs.lossless import LosslessCodec
from kv_store.codecs.raw import RawCodec

BuiltinCodecName = Literal["raw", "lossless", "int8", "k8v4", "int4"]

BUILTIN_CODECS: Final[dict[BuiltinCodecName, type[Codec]]] = {
    "raw": RawCodec,
    "lossless": LosslessCodec,
    "int8": Int8Codec,
    "k8v4": K8V4Codec,
    "int4": Int4Codec,
}


def load_codec(spec: str) -> Codec:
    """The codec a configuration names.

    Args:
        spec: a built-in name or ``package.module:ClassName``.

    Raises:
        ValueError: no such codec, or one that breaks the rules for names and ids.
    """
    for name, codec_class in BUILTIN_CODECS.items():
        if spec == name:
            return codec_class()
    module_name, separator, class_name = spec.partition(":")
    if not separator:
        known = ", ".join(BUILTIN_CODECS)
        raise ValueError(f"unknown codec {spec!r}: one of {known}, or package.module:ClassName")
    try:
        loaded = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as exc:
        raise ValueError(f"cannot import codec {spec!r}: {exc}") from exc
    if not (isinstance(loaded, type) and issubclass(loaded, Codec)) or inspect.isabstract(loaded):
        raise ValueError(f"codec {spec!r} is not a concrete subclass of Codec")
    codec = loaded()
    if codec.name in BUILTIN_CODECS:
        raise ValueError(f"codec {spec!r} takes the built-in name {codec.name!r}")
    if not FIRST_CUSTOM_CODEC_ID <= codec.codec_id < 2**32:
        raise ValueError(f"codec {spec!r}: codec_id must be {FIRST_CUSTOM_CODEC_ID} to 2**32 - 1")
    return codec


def readable_codecs(writer: Codec) -> dict[int, Codec]:
    """Codecs by id whose pages a store that writes with ``writer`` may serve."""
    candidates = [*(codec_class() for codec_class in BUILTIN_CODECS.values()), writer]
    return {codec.codec_id: codec for codec in candidates if codec.fidelity == writer.fidelity}
