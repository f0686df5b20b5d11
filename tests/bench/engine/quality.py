"""``make bench-quality``: what fast arithmetic costs in meaning.

The text is the first seven chapters of "Alice's Adventures in Wonderland" (Lewis Carroll, 1865, in
the public domain). It is cut into windows of 1024 tokens, and each configuration predicts every
token of them, in each of the two ways the engine computes:

- wide, a window at once, as a prefill is computed;
- narrow, a token of several windows at once, as a batch of decoding sequences is computed.

The reference is float32 arithmetic on the exact values of the GGUF file's weights. Where
compiled code computes every width to the same bits, the second way is left out. The text is read at
one width; that the others compute the same up to rounding is seen on the beginning of a window, in
float32.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from deployments.engine.config import TorchEngineConfig
from deployments.engine.torch_engine.forward_batch import ForwardBatch, SequenceSpan
from deployments.engine.torch_engine.kv_cache import KVCache
from deployments.engine.torch_engine.model_runner import ModelRunner
from deployments.engine.torch_engine.weights.builtin import prepare_builtin
from deployments.engine.torch_engine.weights.loader import default_cache_dir, load_model
from kv_store import PAGE_TOKENS
from tests.bench.engine.report import show_bars

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

_TEXT = Path(__file__).with_name("alice.txt")
_REPORT = Path("build/reports/quality.json")
_WINDOW = 1024
_NUM_WINDOWS = 22
_NARROW_WINDOWS = 11
"""Windows that are read together, at most: a width that decoding has."""
_COMPARED_WIDTHS, _COMPARED_TOKENS = (1, 2, 3, 4, 8, 16, 96), 96
_AGREEMENT_BELOW_BF16 = 0.006
_PERPLEXITY_OFF = 0.005
_WIDTHS_OFF = 0.001
_FOUR_BITS = ("file", "int4")
_REFERENCE = ("float32", "dense", "wide")
_BF16 = ("bfloat16", "dense", "wide")


class Reading(NamedTuple):
    """What a configuration made of the text.

    Attributes:
        chosen: [windows, tokens - 1], the likeliest next token of each place.
        logprobs: [windows, tokens - 1], of the text's own next token.
    """

    chosen: Tensor
    logprobs: Tensor


def main() -> int:
    """Measure, print, write ``build/reports/quality.json``.

    Returns:
        1 if a bar does not hold.
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    folder = prepare_builtin(default_cache_dir(), print)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(_TEXT.read_text(encoding="utf-8")).ids
    windows = torch.tensor(ids[: _NUM_WINDOWS * _WINDOW]).view(_NUM_WINDOWS, _WINDOW)
    readings: dict[tuple[str, str, str], Reading] = {}
    differences: dict[str, float] = {}
    for dtype, weights in _configurations():
        runner = _runner(dtype, weights)
        ways: dict[str, Callable[[ModelRunner, Tensor], Reading]] = {"wide": _read_wide}
        if weights != "dense" and not runner.is_compiled:
            ways["narrow"] = _read_narrow
        if weights != "dense" and dtype == "float32":
            differences[f"{dtype}, {weights}"] = _width_difference(runner, windows[0])
        for way, read in ways.items():
            started = time.perf_counter()
            readings[dtype, weights, way] = read(runner, windows)
            seconds = time.perf_counter() - started
            sys.stderr.write(f"{dtype}, {weights}, {way}: {seconds:.0f} s\n")
    rows = _rows(readings)
    bars = hold_bars(rows, differences)
    report = {"text": _TEXT.name, "tokens": windows.numel(), "bars": bars, "rows": rows}
    _REPORT.parent.mkdir(parents=True, exist_ok=True)
    _REPORT.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    _show(rows, bars, windows.numel())
    return 0 if all(bar["holds"] for bar in bars.values()) else 1


def hold_bars(
    rows: Sequence[dict[str, Any]], differences: dict[str, float]
) -> dict[str, dict[str, Any]]:
    """Each bar's name -> value, bar, holds; for every reading with four bits a weight.

    Args:
        rows: of ``_rows``.
        differences: per configuration the largest difference of logits between widths.
    """
    [bf16] = [row for row in rows if (row["dtype"], row["weights"], row["way"]) == _BF16]
    least = bf16["agreement"] - _AGREEMENT_BELOW_BF16
    bars: dict[str, dict[str, Any]] = {}

    def hold(name: str, value: float, bar: float, *, holds: bool) -> None:
        bars[name] = {"value": value, "bar": bar, "holds": holds}

    for row in rows:
        if row["weights"] not in _FOUR_BITS:
            continue
        name = f"{row['dtype']}, {row['weights']}, {row['way']}"
        agreement, off = row["agreement"], abs(row["perplexity_of_reference"] - 1)
        hold(f"{name}: argmax agreement", agreement, least, holds=agreement >= least)
        hold(f"{name}: perplexity off", off, _PERPLEXITY_OFF, holds=off <= _PERPLEXITY_OFF)
    for name, difference in differences.items():
        hold(
            f"{name}: logits differ between widths",
            difference,
            _WIDTHS_OFF,
            holds=difference <= _WIDTHS_OFF,
        )
    return bars


def _configurations() -> list[tuple[str, str]]:
    """dtype and weights, the reference first; every form of weights that the engine offers."""
    both = [(dtype, form) for form in ("dense", "file") for dtype in ("float32", "bfloat16")]
    return [*both, ("bfloat16", "int8"), ("bfloat16", "int4")]


def _runner(dtype: Any, weights: Any) -> ModelRunner:
    loaded = load_model(
        TorchEngineConfig().model, dtype=dtype, cache_dir=default_cache_dir(), weights=weights
    )
    num_pages = _NARROW_WINDOWS * _WINDOW // PAGE_TOKENS
    memory = KVCache(loaded.config, num_pages, dtype=loaded.model.dtype)
    return ModelRunner(loaded.model, loaded.config, memory)


def _read_wide(runner: ModelRunner, windows: Tensor) -> Reading:
    chosen, logprobs = [], []
    rows = torch.arange(_WINDOW)
    span = SequenceSpan(start=0, length=_WINDOW, kv_slots=rows)
    for window in windows:
        logits = runner.forward(
            ForwardBatch(
                token_ids=window, positions=rows, slots=rows, spans=(span,), logit_rows=rows[:-1]
            )
        )
        chosen.append(logits.argmax(-1))
        logprobs.append(_logprobs(logits, window[1:]))
    return Reading(torch.stack(chosen), torch.stack(logprobs))


def _read_narrow(runner: ModelRunner, windows: Tensor) -> Reading:
    readings = []
    for group in windows.split(_group_size(runner)):
        chosen, logprobs = [], []
        for place in range(_WINDOW - 1):
            logits = _step(runner, group, place)
            chosen.append(logits.argmax(-1))
            logprobs.append(_logprobs(logits, group[:, place + 1]))
        readings.append(Reading(torch.stack(chosen, 1), torch.stack(logprobs, 1)))
    return Reading(*(torch.cat(parts) for parts in zip(*readings, strict=True)))


def _group_size(runner: ModelRunner) -> int:
    narrow = runner._narrow
    if narrow is None:
        raise RuntimeError("this machine computes every width in the wide way")
    return min(narrow.max_tokens, _NARROW_WINDOWS)


def _step(runner: ModelRunner, group: Tensor, place: int) -> Tensor:
    """Logits of one token of each window, behind ``place`` earlier ones."""
    num_windows = group.shape[0]
    starts = torch.arange(num_windows) * _WINDOW
    spans = tuple(
        SequenceSpan(start=n, length=1, kv_slots=torch.arange(start, start + place + 1))
        for n, start in enumerate(starts.tolist())
    )
    return runner.forward(
        ForwardBatch(
            token_ids=group[:, place].contiguous(),
            positions=torch.full((num_windows,), place),
            slots=starts + place,
            spans=spans,
            logit_rows=torch.arange(num_windows),
        )
    )


def _width_difference(runner: ModelRunner, window: Tensor) -> float:
    """The largest difference of logits when a text is read several tokens at a time."""
    found: list[Tensor] = []
    widest = runner._narrow.max_tokens if runner._narrow is not None else 0
    for width in (width for width in _COMPARED_WIDTHS if runner.is_compiled or width <= widest):
        logits = []
        for start in range(0, _COMPARED_TOKENS, width):
            rows = torch.arange(start, min(start + width, _COMPARED_TOKENS))
            seen = torch.arange(start + len(rows))
            span = SequenceSpan(start=0, length=len(rows), kv_slots=seen)
            batch = ForwardBatch(
                token_ids=window[rows],
                positions=rows,
                slots=rows,
                spans=(span,),
                logit_rows=torch.arange(len(rows)),
            )
            logits.append(runner.forward(batch))
        found.append(torch.cat(logits))
    return max(float((each - found[0]).abs().max()) for each in found)


def _logprobs(logits: Tensor, wanted: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, wanted.unsqueeze(-1)).squeeze(-1)


def _rows(readings: dict[tuple[str, str, str], Reading]) -> list[dict[str, Any]]:
    reference = readings[_REFERENCE]
    perplexity = math.exp(-float(reference.logprobs.double().mean()))
    return [
        {
            "dtype": dtype,
            "weights": weights,
            "way": way,
            "agreement": float((reading.chosen == reference.chosen).float().mean()),
            "perplexity": (own := math.exp(-float(reading.logprobs.double().mean()))),
            "perplexity_of_reference": own / perplexity,
        }
        for (dtype, weights, way), reading in readings.items()
    ]


def _show(rows: Sequence[dict[str, Any]], bars: dict[str, dict[str, Any]], tokens: int) -> None:
    table = Table(title=f"{tokens} tokens of {_TEXT.name} in windows of {_WINDOW}")
    for column in ("dtype", "weights", "read", "argmax agreement", "perplexity", "of reference"):
        table.add_column(column)
    for row in rows:
        table.add_row(
            *(row[key] for key in ("dtype", "weights", "way")),
            f"{row['agreement']:.4f}",
            f"{row['perplexity']:.4f}",
            f"{row['perplexity_of_reference']:.5f}",
        )
    console = Console(width=140, highlight=False)
    console.print(table)
    show_bars(bars, console)


if __name__ == "__main__":
    sys.exit(main())
