"""Has SGLang draft with an exported head, and compares with what our own code makes of it.

Both read the same files in float32. SGLang answers greedily while it drafts chains; its text is
then read by our target and head, and every row of logits that SGLang's head gave for that text is
looked up beside ours.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from deployments.engine.torch_engine.weights.loader import default_cache_dir, load_model
from deployments.engine.training.batches import collate
from deployments.engine.training.capture import AnsweredPrompt, FeatureCapture
from deployments.engine.training.checkpoint import load_head
from deployments.engine.training.training_time_test import unroll

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_SCRIPT = Path(__file__).with_name("eagle_engine.py")
_TIMEOUT_S = 600
_MAX_LENGTH = 1024


@dataclass(slots=True)
class HeadInSGLang:
    """What was found.

    Attributes:
        num_tokens: that SGLang answered.
        num_other_tokens: of those, that are not what our target would have said there.
        num_rows: of logits that were compared, by draft step.
        largest_logit: of ours.
        largest_difference: between both, of one logit.
        num_rounds: in which SGLang verified a chain.
        num_own_rounds: that the same text takes with our head.
    """

    num_steps: int
    num_tokens: int = 0
    num_other_tokens: int = 0
    num_rows: list[int] = field(default_factory=list)
    largest_logit: float = 0.0
    largest_difference: float = 0.0
    num_rounds: int = 0
    num_own_rounds: int = 0

    def __post_init__(self) -> None:
        self.num_rows = [0] * self.num_steps


def head_in_sglang(
    python: str,
    model: Path,
    head: Path,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    num_steps: int,
    scratch: Path,
) -> HeadInSGLang:
    """Run SGLang on prompts, one behind the other.

    Args:
        python: of the environment that ``make test-sglang`` builds.
        model: the target's folder, with ``*.safetensors``.
        head: an export.
        prompts: token ids.
        max_tokens: of an answer.
        num_steps: tokens of a chain.
        scratch: for files; must not hold an earlier run's.

    Raises:
        RuntimeError: SGLang did not answer; what it said is in ``scratch/log``.
    """
    out = scratch / "out"
    out.mkdir(parents=True)
    job = {
        "model": str(model.resolve()),
        "head": str(head.resolve()),
        "out": str(out.resolve()),
        "prompts": [list(prompt) for prompt in prompts],
        "max_tokens": max_tokens,
        "num_steps": num_steps,
    }
    (scratch / "job.json").write_text(json.dumps(job), encoding="utf-8")
    _run(python, scratch)
    answers = json.loads((out / "answers.json").read_text(encoding="utf-8"))
    found = HeadInSGLang(num_steps)
    loaded = load_model(str(model), dtype="float32", cache_dir=default_cache_dir())
    reader = _Reader(loaded, head, num_steps)
    forwards = [load_file(path) for path in sorted(out.glob("*.safetensors"))]
    begins = [at for at, forward in enumerate(forwards) if _is_prompt(forward)]
    for prompt, answer, first, last in zip(
        prompts, answers, begins, [*begins[1:], len(forwards)], strict=True
    ):
        _compare(found, reader, prompt, answer, forwards[first:last])
    return found


def _run(python: str, scratch: Path) -> None:
    environment = os.environ | {
        "SGLANG_USE_CPU_ENGINE": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
    }
    # Its path is that of another environment.
    environment.pop("PYTHONPATH", None)
    with (
        (scratch / "log").open("wb") as log,
        subprocess.Popen(
            [python, str(_SCRIPT), str(scratch / "job.json")],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            # Its processes are one group, so that none is left where it hangs.
            start_new_session=True,
        ) as process,
    ):
        try:
            code = process.wait(_TIMEOUT_S)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if code or not (scratch / "out" / "answers.json").is_file():
        raise RuntimeError(f"SGLang ended with {code}; see {scratch / 'log'}")


class _Reader:
    """Our target and head."""

    def __init__(self, loaded: Any, head: Path, num_steps: int) -> None:
        self._head = load_head(head)
        self._embedding = loaded.model.embed_tokens.weight.detach()
        self._capture = FeatureCapture(
            loaded, self._head.config.aux_layers, max_length=_MAX_LENGTH, dtype=torch.float32
        )
        self._num_steps = num_steps

    @torch.no_grad()
    def read(self, prompt: Sequence[int], answer: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """What our target would say behind each row, and each draft step's logits [T, d]."""
        (text,) = self._capture.texts([AnsweredPrompt((*prompt, *answer), len(prompt))])
        batch = collate([text], torch.device("cpu"), torch.float32)
        steps = unroll(self._head, self._embedding, batch, self._num_steps)
        return text.wanted.long(), [self._head.logits(step.hidden)[0] for step in steps]

    def tokens(self, logits: Tensor) -> Tensor:
        """The target's ids of the likeliest tokens."""
        return self._head.draft_token_ids[logits.argmax(-1)]

    def token(self, logits: Tensor) -> int:
        """The target's id of the likeliest token of one row."""
        return int(self.tokens(logits))


def _compare(
    found: HeadInSGLang,
    reader: _Reader,
    prompt: Sequence[int],
    answer: dict[str, Any],
    forwards: Sequence[dict[str, Tensor]],
) -> None:
    text = [*prompt, *answer["token_ids"]]
    wanted, ours = reader.read(prompt, answer["token_ids"])
    first, last = len(prompt) - 1, len(text) - 1
    found.num_tokens += last - first
    found.num_other_tokens += sum(int(wanted[row]) != text[row + 1] for row in range(first, last))
    found.num_rounds += answer["num_rounds"]
    found.num_own_rounds += _rounds(text, first, [reader.tokens(each) for each in ours])
    # The row of the text behind which a chain is drafted, and the chain.
    at, chain = first, [-1]
    for forward in forwards:
        logits = forward["logits"]
        if bool(forward["is_draft"]):
            step = len(chain)
            # Behind a wrong token the head is asked about another text than ours was.
            if step < found.num_steps and text[at + 2 : at + 2 + step] == chain:
                _count(found, logits[0], ours[step][at], step)
            chain.append(reader.token(logits[0]))
            continue
        if _is_prompt(forward):
            rows, at = slice(-1, None), int(forward["positions"][-1])
        else:
            accepted = _num_equal(chain[: found.num_steps], text[at + 2 :])
            # The rows of what was not accepted follow; their tokens may be the text's by chance.
            rows, at = slice(accepted + 1), at + accepted + 1
        for row, position in zip(logits[rows], forward["positions"][rows].tolist(), strict=True):
            if position < last:  # the last round may go beyond the answer
                _count(found, row, ours[0][position], 0)
        chain = [reader.token(logits[rows][-1])]


def _num_equal(chain: Sequence[int], text: Sequence[int]) -> int:
    """How many tokens of a chain a text begins with."""
    pairs = zip(chain, text, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chain), len(text)))


def _count(found: HeadInSGLang, theirs: Tensor, own: Tensor, step: int) -> None:
    found.num_rows[step] += 1
    found.largest_logit = max(found.largest_logit, float(own.abs().max()))
    found.largest_difference = max(found.largest_difference, float((theirs - own).abs().max()))


def _rounds(text: Sequence[int], first: int, drafted: Sequence[Tensor]) -> int:
    """Verifications until the text is there; the row's own next token is the bonus of the last."""
    at, num_rounds = first, 0
    while at < len(text) - 2:
        accepted = 0
        while (
            accepted < len(drafted)
            and at + 2 + accepted < len(text)
            and int(drafted[accepted][at]) == text[at + 2 + accepted]
        ):
            accepted += 1
        at += accepted + 1
        num_rounds += 1
    return num_rounds


def _is_prompt(forward: dict[str, Tensor]) -> bool:
    return bool(forward["is_prompt"]) and not bool(forward["is_draft"])
