"""The contestants, each with the interpreter and the command that start it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import save_file

from deployments.engine.torch_engine.weights.builtin import prepare_builtin
from deployments.engine.torch_engine.weights.loader import (
    default_cache_dir,
    read_tensors,
    weight_files,
)

_FOLDER = Path("build/peers")
_OPENVINO = ("openvino==2026.4.1", "openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0")
_HOME = "tests.bench.engine.contestants"


class Entry(NamedTuple):
    """One contestant.

    Attributes:
        is_ours: the embedded engine in some configuration.
    """

    name: str
    command: list[str]
    is_ours: bool


def entries(num_threads: int) -> list[Entry]:
    """All contestants that can be had; fetches the model and the peers' packages once."""
    folder = prepare_builtin(default_cache_dir(), lambda text: sys.stderr.write(text + "\n"))
    threads = str(num_threads)
    found = [
        Entry(
            f"paceline {dtype}, {weights}",
            [sys.executable, "-m", f"{_HOME}.paceline_engine", dtype, weights, threads],
            is_ours=True,
        )
        for dtype in ("bfloat16", "float32")
        for weights in ("file", "dense")
    ]
    dense = _dense_copy(folder)
    dense = str(_dense_copy(folder))
    found += [
        Entry(
            f"transformers {dtype}, dense",
            [sys.executable, "-m", f"{_HOME}.transformers_peer", dense, dtype, threads],
            is_ours=False,
        )
        for dtype in ("bfloat16", "float32")
    ]
    openvino = _interpreter("openvino", _OPENVINO)
    if openvino is not None:
        [gguf_file] = folder.glob("*.gguf")
        command = [openvino, "-m", f"{_HOME}.openvino_peer", str(gguf_file), threads]
        found.append(Entry("OpenVINO GenAI, file", command, is_ours=False))
    return found


def _dense_copy(folder: Path) -> Path:
    """The model's dense values as a checkpoint that transformers reads."""
    target = _FOLDER / "dense"
    if not (target / "model.safetensors").is_file():
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "config.json", target / "config.json")
        tensors = dict(read_tensors(weight_files(folder)))
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def _interpreter(name: str, requirements: tuple[str, ...]) -> str | None:
    """The Python of an environment that holds just these; None if they cannot be installed."""
    folder = _FOLDER / name
    python = folder / "bin" / "python"
    stamp = folder / "requirements.txt"
    wanted = "\n".join(requirements)
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return str(python)
    sys.stderr.write(f"installing {name}\n")
    venv.create(folder, with_pip=True, clear=True)
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    try:
        subprocess.run([*pip, *requirements], check=True, stdout=sys.stderr)
    except subprocess.CalledProcessError as error:
        sys.stderr.write(f"{name} is not measured: pip ended with {error.returncode}\n")
        return None
    stamp.write_text(wanted, encoding="utf-8")
    return str(python)
