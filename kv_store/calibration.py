"""What each codec costs on one model: measured once, kept, and held against the configured gate.

A record belongs to a page layout, so to one model, dtype and engine. It is looked for in the cache
folder, where ``paceline kv calibrate`` puts it, and then among those that come with the package.
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from kv_store.codecs.registry import load_codec
from kv_store.errors import CodecLossError

if TYPE_CHECKING:
    from pathlib import Path

    from kv_store.config import KVStoreConfig
    from kv_store.layout import PageLayout

_FOLDER = "kv-calibration"


class CodecMeasurement(BaseModel):
    """One codec on one model; the worst text's loss, and the mean of all texts' speeds."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    codec: str
    """As a configuration names it."""
    ratio: float
    """Times smaller than raw pages of the model's dtype, headers counted."""
    encode_gb_per_cpu_s: float
    """Raw bytes packed, by one core."""
    decode_gb_per_cpu_s: float
    """Raw bytes unpacked, by one core."""
    kl: float
    """Nats a token: of the distributions over pages that went through, from untouched ones."""
    top1: float
    """Share of tokens whose likeliest successor is the same."""
    perplexity: float
    """Of the text behind pages that went through."""
    perplexity_untouched: float
    """Of the same text behind untouched pages."""


class Calibration(BaseModel):
    """A model's record."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    fingerprint: str
    """Of the page layout, hex."""
    model: str
    """As the configuration named it; for readers only."""
    dtype: str
    """Of raw pages."""
    num_tokens: int
    """Tokens whose distributions were compared, of all texts."""
    codecs: tuple[CodecMeasurement, ...]
    """In the order measured."""


def save_calibration(calibration: Calibration, cache_dir: Path) -> Path:
    """Keep a record; an older one of the same layout goes."""
    path = _path(calibration.fingerprint, cache_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    waiting = path.with_suffix(".new")
    waiting.write_text(calibration.model_dump_json(indent=2) + "\n", encoding="utf-8")
    waiting.replace(path)
    return path


def find_calibration(layout: PageLayout, cache_dir: Path) -> Calibration | None:
    """The record of a layout; None if there is none, or only a damaged one."""
    fingerprint = layout.fingerprint.hex()
    for place in (_path(fingerprint, cache_dir), files("kv_store") / "data" / _name(fingerprint)):
        try:
            calibration = Calibration.model_validate_json(place.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValidationError):
            continue
        if calibration.fingerprint == fingerprint:
            return calibration
    return None


def check_codec_loss(config: KVStoreConfig, layout: PageLayout, cache_dir: Path) -> None:
    """Refuse a codec that loses more than the gate allows, or nobody knows how much.

    Args:
        config: its codec and ``max_kl``.
        layout: of the model's pages.
        cache_dir: where records are kept.

    Raises:
        CodecLossError: a lossy codec is over the gate, or was never measured on this model.
        ValueError: the configured codec does not exist.
    """
    if config.max_kl is None or load_codec(config.codec).is_lossless:
        return
    calibration = find_calibration(layout, cache_dir)
    measured = {row.codec: row for row in calibration.codecs} if calibration else {}
    row = measured.get(config.codec)
    if row is None:
        raise CodecLossError(
            f"kv.codec {config.codec} loses information, and nobody has measured how much on this "
            "model: run paceline kv calibrate with this configuration, or set kv.max_kl to null"
        )
    if row.kl > config.max_kl:
        raise CodecLossError(
            f"kv.codec {config.codec} loses {row.kl:.2g} nats a token on this model, and kv.max_kl "
            f"allows {config.max_kl:.2g}: choose another codec, or raise the gate"
        )


def _path(fingerprint: str, cache_dir: Path) -> Path:
    return cache_dir / _FOLDER / _name(fingerprint)


def _name(fingerprint: str) -> str:
    return f"{fingerprint[:32]}.json"
