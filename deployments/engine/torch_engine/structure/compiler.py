"""Compiles grammars on threads of its own, and remembers the last ones."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from deployments.engine.errors import (
    EngineDeadError,
    EngineOverloadedError,
    RequestRejectedError,
)
from deployments.engine.torch_engine.structure.constraint import Constraint
from deployments.engine.torch_engine.structure.grammar import grammar_of, rejected

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from deployments.engine.types import StructuredOutput

_NUM_THREADS = 2
_MAX_PENDING = 64
_MAX_COMPILED = 64
_TIMEOUT_S = 10.0
"""The library bounds what one grammar may cost to well below this; it is the queue that is long."""
_LIMITS = LLParserLimits(verbose_errors=False)


class StructureCompiler:
    """Turns what clients ask for into constraints. Thread-safe.

    Args:
        tokenizer_json: gives the model's tokenizer as a ``tokenizer.json``, or None if there is
            none. Called when the first structure is compiled: half a second goes with it.
        vocab_size: of the logits.
        eos_token_ids: the model's own ends of text.
    """

    def __init__(
        self,
        tokenizer_json: Callable[[], str] | None,
        *,
        vocab_size: int,
        eos_token_ids: Collection[int],
    ) -> None:
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None
        self._tokenizer_lock = threading.Lock()
        self._compiled: OrderedDict[StructuredOutput, LLMatcher] = OrderedDict()
        self._compiled_lock = threading.Lock()
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "structure-compiler")
        self._num_pending = 0

    async def compile(
        self, structure: StructuredOutput, stop_token_ids: Collection[int]
    ) -> Constraint:
        """The constraint of one output; the event loop goes on meanwhile.

        Args:
            structure: what is asked for.
            stop_token_ids: tokens that end the output.

        Raises:
            RequestRejectedError: the structure is wrong, or this engine has no tokenizer.
            EngineOverloadedError: too many others are waiting for theirs.
            EngineDeadError: the compiler was closed before the turn came.
        """
        if self._num_pending >= _MAX_PENDING:
            raise EngineOverloadedError("Too many structured outputs are being prepared.")
        self._num_pending += 1
        try:
            work = asyncio.get_running_loop().run_in_executor(
                self._threads, self.constraint, structure, stop_token_ids
            )
            return await asyncio.wait_for(work, _TIMEOUT_S)
        except TimeoutError as error:
            raise EngineOverloadedError("The structured output was not ready in time.") from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise  # whoever asked has left
            raise EngineDeadError("The engine has been closed.") from None
        finally:
            self._num_pending -= 1

    def constraint(
        self, structure: StructuredOutput, stop_token_ids: Collection[int]
    ) -> Constraint:
        """As ``compile``, on the caller's thread."""
        tokenizer = self._get_tokenizer(structure)
        compiled = self._recall(structure)
        if compiled is None:
            compiled = self._compile(structure, tokenizer)
        # An ordinary token would become part of the text; only one that shows nothing may end it.
        ends = [token for token in stop_token_ids if tokenizer.is_special_token(token)]
        return Constraint(compiled, eos_token_ids=self._eos_token_ids, end_token_ids=ends)

    def close(self) -> None:
        """Stop the threads; what is being compiled is given up."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _get_tokenizer(self, structure: StructuredOutput) -> LLTokenizer:
        with self._tokenizer_lock:
            if self._tokenizer is None:
                if self._tokenizer_json is None:
                    raise RequestRejectedError(
                        "This engine has no tokenizer, so it cannot structure an output.",
                        structure.param,
                    )
                self._tokenizer = LLTokenizer(
                    self._tokenizer_json(),
                    n_vocab=self._vocab_size,
                    eos_token=list(self._eos_token_ids),
                )
            return self._tokenizer

    def _compile(self, structure: StructuredOutput, tokenizer: LLTokenizer) -> LLMatcher:
        compiled = LLMatcher(tokenizer, grammar_of(structure), log_level=0, limits=_LIMITS)
        if compiled.is_error():
            raise rejected(structure, compiled.get_error())
        with self._compiled_lock:
            self._compiled[structure] = compiled
            if len(self._compiled) > _MAX_COMPILED:
                self._compiled.popitem(last=False)
        return compiled

    def _recall(self, structure: StructuredOutput) -> LLMatcher | None:
        with self._compiled_lock:
            compiled = self._compiled.get(structure)
            if compiled is not None:
                self._compiled.move_to_end(structure)
            return compiled
