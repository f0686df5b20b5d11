"""Turns a step's plan into the tensors of one forward.

A draft's rows lie behind the committed text in the sequence's own pages, in node order: node n of
a text of length L uses row L + n, at position L + depth. Rows of rejected nodes are simply written
over later; an accepted branch that is not the first one is moved into place by ``winner_moves``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from deployments.engine.torch_engine.forward_batch import ForwardBatch, SequenceSpan
from deployments.engine.torch_engine.logprobs import PromptRow
from deployments.engine.torch_engine.sampler import SampleRow

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from torch import Tensor

    from deployments.engine.speculation.types import DraftTree
    from deployments.engine.torch_engine.scheduler import Chunk
    from deployments.engine.torch_engine.sequence import Sequence


class PlannedStep(NamedTuple):
    """One forward and what its logits are for.

    Attributes:
        sample_rows: one per leading logit row; a sampled chunk's rows are those of its last
            committed token and of its draft nodes, in order.
        prompt_rows: one per logit row behind those, for prompt tokens whose log probabilities are
            wanted.
    """

    batch: ForwardBatch
    sample_rows: list[SampleRow]
    prompt_rows: list[PromptRow]


def build_step(chunks: SequenceOf[Chunk], trees: SequenceOf[DraftTree]) -> PlannedStep:
    """Lay out the chunks one behind the other.

    Args:
        chunks: the scheduler's plan.
        trees: the draft behind each chunk; empty for chunks that verify none.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[Tensor] = []
    spans: list[SequenceSpan] = []
    logit_rows: list[int] = []
    sample_rows: list[SampleRow] = []
    scored_rows: list[int] = []
    prompt_rows: list[PromptRow] = []
    for chunk, tree in zip(chunks, trees, strict=True):
        sequence, start = chunk.sequence, chunk.sequence.num_computed_tokens
        end = start + chunk.num_new_tokens
        first_row = len(token_ids)
        depths = _depths(tree)
        token_ids += sequence.token_ids[start:end]
        token_ids += tree.token_ids
        positions += range(start, end)
        positions += [end - 1 + depth for depth in depths]
        num_rows = end + len(tree)
        slots.append(sequence.slots(start, num_rows))
        spans.append(
            SequenceSpan(
                start=first_row,
                length=num_rows - start,
                kv_slots=sequence.slots(0, num_rows),
                tail_mask=None if tree.is_chain else _tail_mask(tree),
            )
        )
        if chunk.is_sampled:
            logit_rows += range(first_row + chunk.num_new_tokens - 1, len(token_ids))
            sample_rows += _sample_rows(sequence, tree)
        for position in sequence.unscored_positions(start, end):
            scored_rows.append(first_row + position - 1 - start)
            prompt_rows.append(PromptRow(sequence, position))
    batch = ForwardBatch(
        token_ids=torch.tensor(token_ids, dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int64),
        slots=torch.cat(slots),
        spans=tuple(spans),
        logit_rows=torch.tensor(logit_rows + scored_rows, dtype=torch.int64),
    )
    return PlannedStep(batch, sample_rows, prompt_rows)


def winner_moves(
    sequence: Sequence, num_committed: int, nodes: SequenceOf[int]
) -> tuple[Tensor, Tensor]:
    """The slots an accepted path's rows lie in, and those they belong in.

    Args:
        sequence: whose draft it was.
        num_committed: committed tokens before this step (L).
        nodes: accepted nodes, from the root's child downwards.

    Returns:
        Source and destination slots, [A] int64 each, without rows that lie right already. All
        sources must be read before any destination is written.
    """
    moved = [(node, depth) for depth, node in enumerate(nodes) if node != depth]
    rows = sequence.slots(num_committed, sequence.num_slots)
    source = torch.tensor([node for node, _ in moved], dtype=torch.int64)
    destination = torch.tensor([depth for _, depth in moved], dtype=torch.int64)
    return rows[source], rows[destination]


def _depths(tree: DraftTree) -> list[int]:
    depths: list[int] = []
    for parent in tree.parents:
        depths.append(1 if parent < 0 else depths[parent] + 1)
    return depths


def _tail_mask(tree: DraftTree) -> Tensor:
    """[1 + nodes, 1 + nodes] bool over the last committed token and the nodes behind it."""
    size = 1 + len(tree)
    mask = torch.eye(size, dtype=torch.bool)
    mask[:, 0] = True
    for node, parent in enumerate(tree.parents):
        if parent >= 0:
            mask[node + 1] |= mask[parent + 1]
    return mask


def _sample_rows(sequence: Sequence, tree: DraftTree) -> list[SampleRow]:
    paths: list[tuple[int, ...]] = []
    for parent, token in zip(tree.parents, tree.token_ids, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return [SampleRow(sequence), *(SampleRow(sequence, path) for path in paths)]
