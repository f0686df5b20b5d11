"""Features on disk, for training without the target: shards of texts in a folder.

Shards are safetensors files; one appears whole or not at all, so a capture that was interrupted
goes on behind the last one.
"""

from __future__ import annotations

import json
import re
import time
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from deployments.engine.training.batches import FeatureText
from deployments.engine.training.errors import RunMismatchError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator
    from pathlib import Path

    from torch import Tensor

_FORMAT = "paceline-features-1"
_SHARD = re.compile(r"features-(\d{6})\.safetensors")
_FIELDS = FeatureText._fields


class FeatureStore:
    """A folder of shards of one capture.

    Attributes:
        seconds: that the capture of what is stored took, in all processes.
    """

    def __init__(self, folder: Path, *, fingerprint: str) -> None:
        """Open a folder, which is made where it is missing.

        Args:
            folder: holds nothing but this store.
            fingerprint: of target, prompts and settings; a folder keeps features of one only.

        Raises:
            RunMismatchError: the folder keeps features of something else, or a damaged shard.
        """
        self._folder = folder
        self._fingerprint = fingerprint
        self.seconds = 0.0
        folder.mkdir(parents=True, exist_ok=True)
        self._lengths = [self._read_lengths(path) for path in self._paths()]
        self._files: dict[int, Any] = {}

    @property
    def num_texts(self) -> int:
        """Texts that are stored."""
        return sum(map(len, self._lengths))

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self._paths())

    def extend(
        self, texts: Iterable[FeatureText], *, texts_per_shard: int, max_bytes: int
    ) -> Iterator[int]:
        """Append texts, a shard at a time, until they end or the folder is full.

        Args:
            texts: those behind the ``num_texts`` first ones.
            texts_per_shard: are held in memory.
            max_bytes: of the folder; the shard that would exceed it is not written.

        Yields:
            The number of stored texts after each shard.
        """
        waiting: list[FeatureText] = []
        started = time.monotonic()
        for text in texts:
            waiting.append(text)
            if len(waiting) == texts_per_shard:
                if not self._write(waiting, max_bytes, time.monotonic() - started):
                    return
                waiting = []
                yield self.num_texts
                started = time.monotonic()
        if waiting and self._write(waiting, max_bytes, time.monotonic() - started):
            yield self.num_texts

    def __iter__(self) -> Iterator[FeatureText]:
        """All texts, in order; one is in memory at a time."""
        return map(self.text, range(self.num_texts))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text, in order."""
        return [length for lengths in self._lengths for length in lengths]

    def text(self, index: int) -> FeatureText:
        """One text; nothing else is read.

        Raises:
            IndexError: there are not so many.
        """
        file, rows = self._locate(index)
        return FeatureText(*(file.get_slice(name)[rows] for name in _FIELDS))

    def stream(self, indices: Iterable[int]) -> Generator[FeatureText, None, None]:
        """Texts by index, each read when it is taken."""
        yield from map(self.text, indices)

    def answers(self) -> Iterator[Tensor]:
        """The tokens of each text's answer; its features are not read."""
        for index in range(self.num_texts):
            file, rows = self._locate(index)
            token_ids: Tensor = file.get_slice("token_ids")[rows]
            yield token_ids[1:][file.get_slice("is_answer")[rows][:-1]]

    def _locate(self, index: int) -> tuple[Any, slice]:
        for shard, lengths in enumerate(self._lengths):
            if index < len(lengths):
                start = sum(lengths[:index])
                return self._open(shard), slice(start, start + lengths[index])
            index -= len(lengths)
        raise IndexError(f"the store has {self.num_texts} texts")

    def _open(self, shard: int) -> Any:  # noqa: ANN401 - the library's class has no types
        """The shard's file, which stays open: training reads texts in random order."""
        if shard not in self._files:
            self._files[shard] = safe_open(self._paths()[shard], framework="pt")
        return self._files[shard]

    def _paths(self) -> list[Path]:
        return sorted(path for path in self._folder.iterdir() if _SHARD.fullmatch(path.name))

    def _read_lengths(self, path: Path) -> list[int]:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                lengths: list[int] = file.get_tensor("lengths").tolist()
            self.seconds += float(metadata.get("seconds", 0.0))
        except (OSError, ValueError, SafetensorError) as error:
            raise RunMismatchError(f"{path} cannot be read: {error}") from error
        if metadata.get("format") != _FORMAT or metadata.get("fingerprint") != self._fingerprint:
            raise RunMismatchError(
                f"{path.parent} keeps features of another target, prompt set or setting; "
                "choose another folder or remove it"
            )
        return lengths

    def _write(self, texts: list[FeatureText], max_bytes: int, seconds: float) -> bool:
        tensors = {name: torch.cat([getattr(text, name) for text in texts]) for name in _FIELDS}
        tensors["lengths"] = torch.tensor([text.num_tokens for text in texts])
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self.num_bytes + size > max_bytes:
            return False
        path = self._folder / f"features-{len(self._lengths):06}.safetensors"
        partial = path.with_suffix(".partial")
        metadata = {
            "format": _FORMAT,
            "fingerprint": self._fingerprint,
            "seconds": f"{seconds:.3f}",
        }
        save_file(tensors, partial, metadata=metadata)
        partial.replace(path)
        self.seconds += seconds
        self._lengths.append([text.num_tokens for text in texts])
        return True


def fingerprint(**parts: object) -> str:
    """One line that differs whenever one of the parts does."""
    return json.dumps(parts, sort_keys=True, default=str)
