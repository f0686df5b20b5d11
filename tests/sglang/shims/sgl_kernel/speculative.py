"""The few of SGLang's kernels that its own verification of trees calls on a CPU, in torch.

n: nodes of each sequence's tree, its last committed token among them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def assign_extend_cache_locs_cpu(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    out_cache_loc: Tensor,
    pool_len: int,
) -> None:
    """List the slots of each sequence between two places, one sequence behind the other."""
    del pool_len
    at = 0
    bounds = zip(start_offset.tolist(), end_offset.tolist(), strict=True)
    for row, (start, end) in zip(req_pool_indices.tolist(), bounds, strict=True):
        out_cache_loc[at : at + end - start] = req_to_token[row, start:end]
        at += end - start


def fill_accept_out_cache_loc_cpu(
    accept_index: Tensor, out_cache_loc: Tensor, accept_out_cache_loc: Tensor
) -> None:
    """List the slots of the accepted nodes; places behind them stay as they are."""
    accepted = accept_index.flatten()
    slots = out_cache_loc[accepted[accepted >= 0].long()]
    accept_out_cache_loc[: len(slots)] = slots


def reconstruct_indices_from_tree_mask(
    tree_mask: Tensor,
    verified_seq_len: Tensor,
    positions: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
    batch_size: int,
    draft_token_num: int,
) -> None:
    """From who sees whom to each node's position, first child and next sibling (-1: none).

    Args:
        tree_mask: of each tree's n x n entries, whether a node (row) sees another one.
        verified_seq_len: committed tokens of each sequence.
    """
    n = draft_token_num
    nodes = torch.arange(n)
    seen = tree_mask.view(batch_size, n, n).bool() & (nodes < nodes[:, None])
    positions.view(batch_size, n).copy_(seen.sum(-1) + verified_seq_len[:, None])
    retrieve_index.copy_(torch.arange(batch_size * n).view(batch_size, n))
    retrieve_next_token.fill_(-1)
    retrieve_next_sibling.fill_(-1)
    # The nearest node before it that a node sees is its parent.
    parents = torch.where(seen, nodes, -1).amax(-1).tolist()
    for tree, own in enumerate(parents):
        youngest: dict[int, int] = {}
        for node, parent in enumerate(own):
            if parent < 0:
                continue
            if parent in youngest:
                retrieve_next_sibling[tree, youngest[parent]] = node
            else:
                retrieve_next_token[tree, parent] = node
            youngest[parent] = node


def verify_tree_greedy_cpu(
    *,
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    target_predict: Tensor,
) -> None:
    """Walk down each tree as long as a child is what the target says.

    Args:
        predicts: gets the target's token behind each accepted node, by ``retrive_index``.
        accept_index: gets the accepted nodes, the committed one first, by ``retrive_index``.
        accept_token_num: gets their number without that one.
        candidates: tokens of the nodes, one tree per row.
        target_predict: what the target says behind each of them.
    """
    rows = zip(
        candidates.tolist(),
        retrive_index.tolist(),
        retrive_next_token.tolist(),
        retrive_next_sibling.tolist(),
        target_predict.tolist(),
        strict=True,
    )
    longest = accept_index.shape[1]
    for tree, (tokens, index, children, siblings, said) in enumerate(rows):
        node, path = 0, [0]
        while len(path) < longest:
            child = children[node]
            while child >= 0 and tokens[child] != said[node]:
                child = siblings[child]
            if child < 0:
                break
            node = child
            path.append(node)
        for place, each in enumerate(path):
            accept_index[tree, place] = index[each]
            predicts[index[each]] = said[each]
        accept_token_num[tree] = len(path) - 1
