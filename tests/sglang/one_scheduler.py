"""SGLang's scheduler alone, in this process, with a draft server that dies; with SGLang's Python.

Then the same requests once more, with drafts that hide the known text in branches. Prints what it
generated. Without SGLang's other processes this takes a third of an engine's time.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from array import array
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from deployments.engine.config import EngineConfig, SpeculationConfig
from deployments.engine.sglang_engine import plugin
from deployments.engine.sglang_engine.draft_link import DraftLink, DraftSettings
from deployments.engine.sglang_engine.draft_rounds import DraftRounds
from deployments.engine.sglang_engine.own_params import CUSTOM_PARAMS_KEY, DRAFT_LINK
from deployments.engine.sglang_engine.requests import generation_arguments
from deployments.engine.sglang_engine.server_args import environment, server_args
from deployments.engine.speculation.draft_server import DraftServer
from deployments.engine.speculation.drafters.suffix import SuffixDrafter
from deployments.engine.speculation.handshake import Identity
from deployments.engine.speculation.types import DraftOrigin, DraftTree
from deployments.engine.types import GenerationRequest, SamplingParams
from deployments.engine.validation import ModelLimits
from tests.fakes_engine import CheckedSpeculator

MAX_MODEL_LEN = 512
LOSS_TIMEOUT_S = 60.0
LIMITS = ModelLimits(vocab_size=49152, max_model_len=400, eos_token_ids=frozenset({2}))


class BranchingSpeculator(CheckedSpeculator):
    """Hides known text behind wrong guesses, so that accepted rows must be moved."""

    def __init__(self, texts: dict[str, list[int]]) -> None:
        """Of every request, prompt and output."""
        super().__init__()
        self.num_moved = 0
        self._texts = texts
        self._request_of: dict[int, str] = {}
        self._rng = random.Random(11)  # noqa: S311

    def open(self, session: Any) -> None:
        super().open(session)
        self._request_of[session.session_id] = session.request_id

    def draft(self, session_id: int, token_ids: list[int], max_draft_tokens: int) -> DraftTree:
        tokens: list[int] = []
        parents: list[int] = []
        right = -1
        for token in self._texts[self._request_of[session_id]][len(token_ids) :]:
            for is_right in (False, True) if self._rng.random() < 0.5 else (True,):
                if len(tokens) < max_draft_tokens:
                    tokens.append(token if is_right else (token + 1) % LIMITS.vocab_size)
                    parents.append(right)
            right = len(tokens) - 1
        return DraftTree(tuple(tokens), tuple(parents), (DraftOrigin.POOL,) * len(tokens))

    def verified(self, results: Any) -> None:
        super().verified(results)
        for result in results:
            self.num_moved += sum(node != place for place, node in enumerate(result.nodes))


def start_scheduler(folder: Path, address: str) -> Any:
    """A scheduler that nobody sends requests to."""
    config = EngineConfig(
        kind="sglang",
        model=str(folder),
        max_model_len=MAX_MODEL_LEN,
        num_pages=32,
        max_num_seqs=4,
        num_threads=1,
        speculation=SpeculationConfig(num_draft_tokens=6),
        sglang={"attention_backend": "torch_native", "draft_trees": True},
    )
    os.environ.update(environment(config, 1) | {DRAFT_LINK: address})
    plugin.announce(Path(tempfile.mkdtemp()))
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.entrypoints.engine import _set_envs_and_config
    from sglang.srt.managers import scheduler
    from sglang.srt.server_args import PortArgs, ServerArgs

    known = ServerArgs.__struct_fields__
    arguments = server_args(
        config, folder, max_model_len=MAX_MODEL_LEN, known=known, is_drafted=True
    )
    resolved = ServerArgs(**arguments)
    resolved.resolve_once()
    _set_envs_and_config(resolved)
    ports = PortArgs.init_new(resolved)
    ranks = scheduler.SpawnRanks(world_rank=0, gpu_id=0)
    scheduler.publish(resolved, role="scheduler", ranks=ranks)
    return scheduler.Scheduler(resolved, ports)


def submit(scheduler: Any, request: GenerationRequest) -> Any:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams as Parameters

    rid = request.request_id
    parameters = Parameters(**generation_arguments(request, LIMITS, rid)["sampling_params"])
    parameters.normalize(None)
    scheduler.handle_generate_request(
        TokenizedGenerateReqInput(
            rid=rid,
            input_text=None,
            input_ids=array("q", request.prompt_token_ids),
            input_embeds=None,
            mm_inputs=None,
            token_type_ids=None,
            sampling_params=parameters,
            return_logprob=False,
            logprob_start_len=-1,
            top_logprobs_num=0,
            token_ids_logprob=None,
            stream=True,
        )
    )
    return scheduler.waiting_queue[-1]


def step(scheduler: Any) -> None:
    plan = scheduler.get_next_batch_to_run(
        running_batch=scheduler.running_batch, last_batch=scheduler.last_batch
    )
    scheduler.running_batch, batch = plan.running_batch, plan.batch_to_run
    if batch:
        scheduler.process_batch_result(batch, scheduler.run_batch(batch))
    scheduler.last_batch = batch


def counts_of(req: Any) -> list[list[int]]:
    entries = (req.customized_info or {}).get(CUSTOM_PARAMS_KEY, ())
    return [entry for entry in entries if entry is not None]


def main(folder: Path, requests: list[GenerationRequest]) -> None:
    """Generate; the draft server goes once it was of use."""
    import torch

    identity = Identity(model="m", vocab_size=LIMITS.vocab_size, vocab_digest="")
    secret = SecretStr("a shared secret")
    server = DraftServer(SuffixDrafter(), identity, secret)
    endpoint = f"127.0.0.1:{server.start()}"
    lost: list[str] = []
    speculation = SpeculationConfig(local_drafter="none")
    link = DraftLink(DraftSettings(speculation, identity, "r", secret), lost.append)
    scheduler = start_scheduler(folder, link.address)
    running = [submit(scheduler, request) for request in requests]
    for request in requests:
        link.attach(request.request_id, endpoint)
    is_closed = False
    with torch.inference_mode():
        while not all(req.finished() for req in running):
            step(scheduler)
            if not is_closed and any(sum(c[2] for c in counts_of(req)) > 8 for req in running):
                server.close()
                is_closed = True
    gives_up_at = time.monotonic() + LOSS_TIMEOUT_S
    while not (lost and link.stats().stall_p50_s) and time.monotonic() < gives_up_at:
        time.sleep(0.05)
    texts = {req.rid: list(req.output_ids)[: req.finished_len] for req in running}
    branching = BranchingSpeculator(
        {r.request_id: [*r.prompt_token_ids, *texts[r.request_id]] for r in requests}
    )
    scheduler.draft_worker._rounds = DraftRounds(branching, LIMITS.vocab_size, takes_trees=True)
    again = [submit(scheduler, request) for request in requests]
    num_steps = 0
    with torch.inference_mode():
        while not all(req.finished() for req in again):
            step(scheduler)
            num_steps += 1
    found = {
        "tokens": texts,
        "branching": {
            "tokens": {req.rid: list(req.output_ids)[: req.finished_len] for req in again},
            "num_steps": num_steps,
            "num_moved": branching.num_moved,
        },
        "counts": {req.rid: {"pool": sum(c[2] for c in counts_of(req))} for req in running},
        "num_links_lost": len(lost),
        "stall_p50_s": link.stats().stall_p50_s,
    }
    print(json.dumps(found), flush=True)  # noqa: T201 - read by the test
    # SGLang's threads would keep the process.
    os._exit(0)


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    main(
        Path(sys.argv[1]),
        [
            GenerationRequest(
                request_id=one["request_id"],
                prompt_token_ids=tuple(one["prompt_token_ids"]),
                sampling=SamplingParams(**one["sampling"]),
            )
            for one in asked
        ],
    )
