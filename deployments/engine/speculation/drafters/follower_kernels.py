"""The compiled loops of ``follower_counts``: a hash table of contexts and what followed each.

A table is two arrays that grow by doubling. ``slots`` [capacity, 3] int64 holds the contexts by
open addressing: key (0 is free), the first of its entries, how often any token followed.
``entries`` [capacity, 3] int32 are linked lists of its followers: token, count, next entry (-1
ends). Where a context stands depends on a secret, else a text could be made to crowd one place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kv_store.compiling import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Slots = NDArray[np.int64]
    Entries = NDArray[np.int32]
    Table = tuple[Slots, Entries]

ORDERS = (1, 2, 3, 5)
"""Lengths of the contexts that are counted."""
MAX_CONTEXT_TOKENS = ORDERS[-1]
_MOST_FOLLOWERS = 8
_ESCAPE = 2.0
"""How many times each different follower counts for one that was never seen."""
_LEAST_WEIGHT = 0.03
"""Of the contexts not looked at yet, where looking on would change nothing."""
_FACTOR = -7046029254386353131
"""2**64 over the golden ratio, odd."""
_MOST_CANDIDATES = 256


@compiled
def _key(context: NDArray[np.int64], length: int, order: int, secret: int) -> np.int64:
    """Of the last ``order`` of ``length`` tokens; never 0.

    Contexts that share one are taken for the same: that is rare, and makes a guess worse, no text
    wrong.
    """
    key = secret ^ (np.int64(order) * _FACTOR)
    for place in range(length - order, length):
        key = (key ^ (context[place] + 1)) * _FACTOR
        key ^= (key >> 32) & 0xFFFFFFFF
    return key if key else np.int64(1)


@compiled
def _find(slots: Slots, key: np.int64) -> np.int64:
    """Where a context stands, or would."""
    mask = slots.shape[0] - 1
    at: np.int64 = key & mask
    while slots[at, 0] != 0 and slots[at, 0] != key:
        at = (at + 1) & mask
    return at


@compiled
def move(old: Slots, new: Slots) -> None:
    """Enter all contexts of one array into a larger, empty one."""
    for row in range(old.shape[0]):
        if old[row, 0]:
            at = _find(new, old[row, 0])
            for column in range(3):
                new[at, column] = old[row, column]


@compiled
def _count(
    slots: Slots, entries: Entries, sizes: NDArray[np.int64], key: np.int64, token: np.int64
) -> None:
    at = _find(slots, key)
    if slots[at, 0] == 0:
        slots[at, 0], slots[at, 1], slots[at, 2] = key, -1, 0
        sizes[0] += 1
    slots[at, 2] += 1
    entry, last, number = slots[at, 1], -1, 0
    rarest, before_rarest = -1, -1
    while entry >= 0:
        if entries[entry, 0] == token:
            entries[entry, 1] += 1
            return
        if rarest < 0 or entries[entry, 1] < entries[rarest, 1]:
            rarest, before_rarest = entry, last
        number += 1
        last, entry = entry, entries[entry, 2]
    if number < _MOST_FOLLOWERS:
        new = sizes[1]
        sizes[1] += 1
    else:
        # The oldest of the rarest gives way, and the new one stands last.
        new = rarest
        if before_rarest >= 0:
            entries[before_rarest, 2] = entries[rarest, 2]
        else:
            slots[at, 1] = entries[rarest, 2]
        if last == rarest:
            last = before_rarest
    entries[new, 0], entries[new, 1], entries[new, 2] = token, 1, -1
    if last >= 0:
        entries[last, 2] = new
    else:
        slots[at, 1] = new


@compiled
def learn(
    slots: Slots,
    entries: Entries,
    sizes: NDArray[np.int64],
    context: NDArray[np.int64],
    tokens: NDArray[np.int64],
    secret: int,
) -> None:
    """Count what follows what in ``tokens``; there must be room.

    Args:
        slots: of the table.
        entries: of the table.
        sizes: contexts and entries in use, and tokens in ``context``; kept up to date.
        context: the last tokens before; kept up to date.
        tokens: to learn.
        secret: the same for all that are looked up together.
    """
    for token in tokens:
        length = sizes[2]
        for order in ORDERS:
            if order <= length:
                _count(slots, entries, sizes, _key(context, length, order, secret), token)
        if length == MAX_CONTEXT_TOKENS:
            for place in range(length - 1):
                context[place] = context[place + 1]
            context[length - 1] = token
        else:
            context[length] = token
            sizes[2] = length + 1


@compiled
def _add(
    token: int, chance: float, ids: NDArray[np.int64], sums: NDArray[np.float64], n: int
) -> int:
    for at in range(n):
        if ids[at] == token:
            sums[at] += chance
            return n
    if n < _MOST_CANDIDATES:
        ids[n], sums[n] = token, chance
        return n + 1
    return n


@compiled
def _weigh(
    tables: tuple[Table, ...],
    weights: NDArray[np.float64],
    context: NDArray[np.int64],
    length: int,
    secret: int,
    ids: NDArray[np.int64],
    chances: NDArray[np.float64],
) -> int:
    """Every token that may come next, with its chance: from the longest known contexts down."""
    own_ids, own_counts = np.empty(_MOST_CANDIDATES, np.int64), np.empty(_MOST_CANDIDATES)
    number, weight = 0, 1.0
    for back in range(len(ORDERS)):
        order = ORDERS[len(ORDERS) - 1 - back]
        if order > length:
            continue
        key = _key(context, length, order, secret)
        total, own_number = 0.0, 0
        for place in range(len(tables)):
            slots, entries = tables[place]
            at = _find(slots, key)
            if slots[at, 0] == 0:
                continue
            total += weights[place] * slots[at, 2]
            entry = slots[at, 1]
            while entry >= 0:
                own_number = _add(
                    entries[entry, 0],
                    weights[place] * entries[entry, 1],
                    own_ids,
                    own_counts,
                    own_number,
                )
                entry = entries[entry, 2]
        if own_number == 0:
            continue
        escape = _ESCAPE * own_number
        share = weight / (total + escape)
        for own in range(own_number):
            number = _add(own_ids[own], share * own_counts[own], ids, chances, number)
        weight *= escape / (total + escape)
        if weight < _LEAST_WEIGHT:
            break
    return number


@compiled
def _take_best(ids: NDArray[np.int64], chances: NDArray[np.float64], number: int) -> int:
    """Where the likeliest candidate stands, the first of equals; -1 if none is left."""
    best = -1
    for at in range(number):
        if chances[at] >= 0 and (best < 0 or chances[at] > chances[best]):
            best = at
    return best


@compiled
def chains(
    tables: tuple[Table, ...],
    weights: NDArray[np.float64],
    context: NDArray[np.int64],
    taken: NDArray[np.int64],
    secret: int,
    least_chance: float,
    token_ids: NDArray[np.int64],
    chances: NDArray[np.float64],
) -> int:
    """The likeliest first tokens behind a text, and the likeliest ones behind each.

    Args:
        tables: of the texts to count in.
        weights: how much each of them counts.
        context: the end of the text.
        taken: first tokens that are not wanted.
        secret: that the tables were filled with.
        least_chance: that a token is right with all before it; behind a less likely one nothing is
            looked for.
        token_ids: [firsts, tokens], takes the chains; -1 ends one.
        chances: [firsts, tokens], each token's if all before it are right.

    Returns:
        Chains.
    """
    own_ids, own_chances = np.empty(_MOST_CANDIDATES, np.int64), np.empty(_MOST_CANDIDATES)
    ids, sums = np.empty(_MOST_CANDIDATES, np.int64), np.empty(_MOST_CANDIDATES)
    text = np.empty(MAX_CONTEXT_TOKENS, np.int64)
    most, width = token_ids.shape
    number = _weigh(tables, weights, context, context.shape[0], secret, ids, sums)
    for token in taken:
        for at in range(number):
            if ids[at] == token:
                sums[at] = -1.0
    count = 0
    while count < most:
        best = _take_best(ids, sums, number)
        if best < 0:
            break
        token_ids[count, 0], chances[count, 0] = ids[best], sums[best]
        chance = sums[best]
        sums[best] = -1.0
        length = 0
        for place in range(max(0, context.shape[0] + 1 - MAX_CONTEXT_TOKENS), context.shape[0]):
            text[length] = context[place]
            length += 1
        for depth in range(1, width):
            token_ids[count, depth] = -1
            if chance < least_chance:
                break
            if length == MAX_CONTEXT_TOKENS:
                length -= 1
                for place in range(length):
                    text[place] = text[place + 1]
            text[length] = token_ids[count, depth - 1]
            length += 1
            found = _weigh(tables, weights, text, length, secret, own_ids, own_chances)
            at = _take_best(own_ids, own_chances, found)
            if at < 0:
                break
            token_ids[count, depth], chances[count, depth] = own_ids[at], own_chances[at]
            chance *= own_chances[at]
        count += 1
    return count
