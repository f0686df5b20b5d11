"""Measures a configuration's codecs on its model, keeps the record, and draws it."""

from __future__ import annotations

import os
from importlib.resources import files
from typing import TYPE_CHECKING

from cluster.errors import ConfigError
from kv_store.calibration import save_calibration
from kv_store.codecs.registry import BUILTIN_CODECS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from cluster.config import ClusterConfig
    from deployments.tokenizer import Tokenizer
    from kv_store.calibration import Calibration

_NUM_PROMPT = 1024
_NUM_CONTINUED = 256


def calibrate(
    config: ClusterConfig, text_files: Sequence[Path], on_progress: Callable[[str], None]
) -> tuple[Calibration, Path]:
    """Measure every built-in codec, and the configured one.

    Args:
        config: engine, cache folder and codec.
        text_files: UTF-8 texts as the model will see; the package's own where there are none. Of
            each, the first 1280 tokens are used.
        on_progress: told what happens, a short line at a time.

    Returns:
        The record, and the file in the cache folder that holds it.

    Raises:
        WeightsMissingError: the model is not here.
        ConfigError: a text is too short, or the configured codec does not exist.
    """
    import torch

    from deployments.engine.torch_engine.codec_calibration import calibrate_codecs
    from deployments.engine.torch_engine.weights.loader import load_model
    from deployments.tokenizer import Tokenizer

    engine = config.engine
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    on_progress(f"loading {engine.model}")
    loaded = load_model(
        engine.model,
        dtype=engine.dtype,
        device=engine.device,
        cache_dir=config.cache_dir,
        weights=engine.weights,
    )
    tokenizer = Tokenizer.load(loaded.folder)
    names: list[str] = list(BUILTIN_CODECS)
    if config.kv is not None and config.kv.codec not in names:
        names.append(config.kv.codec)
    try:
        calibration = calibrate_codecs(
            loaded,
            engine.model,
            {
                name: ids[: _NUM_PROMPT + _NUM_CONTINUED]
                for name, ids in _texts(tokenizer, text_files).items()
            },
            names,
            num_continued=_NUM_CONTINUED,
            progress=on_progress,
        )
    except ValueError as error:
        raise ConfigError((str(error),)) from error
    return calibration, save_calibration(calibration, config.cache_dir)


def draw(calibration: Calibration, path: Path) -> bool:
    """Write a picture of loss and speed against size; False where matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (loss, speed) = plt.subplots(1, 2, figsize=(11, 4.5))
    lossy = [row for row in calibration.codecs if row.kl > 0]
    for row in lossy:
        loss.scatter(row.ratio, row.kl)
        loss.annotate(row.codec, (row.ratio, row.kl))
    if lossy:
        loss.set_yscale("log")
    loss.set_xlabel("times smaller")
    loss.set_ylabel("KL, nats a token")
    loss.set_title(f"loss on {calibration.model}, {calibration.dtype}")
    places = range(len(calibration.codecs))
    for shift, kind in ((-0.2, "encode"), (0.2, "decode")):
        heights = [getattr(row, f"{kind}_gb_per_cpu_s") for row in calibration.codecs]
        speed.bar([place + shift for place in places], heights, 0.4, label=kind)
    speed.set_xticks(places, [row.codec for row in calibration.codecs])
    speed.set_yscale("log")
    speed.set_ylabel("raw GB a CPU second")
    speed.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _texts(tokenizer: Tokenizer, text_files: Sequence[Path]) -> dict[str, list[int]]:
    """Token ids by name; the package's own text in two halves."""
    if text_files:
        try:
            return {
                path.name: tokenizer.encode(path.read_text(encoding="utf-8")) for path in text_files
            }
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError((f"--text: {error}",)) from error
    source = files("deployments.engine.torch_engine") / "data" / "student_prompts.txt"
    ids = tokenizer.encode(source.read_text(encoding="utf-8"))
    return {"first half": ids[: len(ids) // 2], "second half": ids[len(ids) // 2 :]}
