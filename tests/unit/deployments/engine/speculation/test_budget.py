import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.engine.speculation.budget import (
    INITIAL_ACCEPTANCE,
    Choice,
    choose,
    update_acceptance,
)


def lengths_of(*told) -> list[int]:
    return choose(*told).lengths


@given(st.floats(0, 1), st.booleans(), st.floats(0, 1))
def test_estimate_stays_a_chance(acceptance, was_right, weight):
    updated = update_acceptance(acceptance, was_right, weight)
    assert 0.0 <= updated <= 1.0
    assert updated >= acceptance or not was_right


def test_estimate_converges_to_the_true_chance():
    acceptance = INITIAL_ACCEPTANCE
    values = []
    for turn in range(300):
        acceptance = update_acceptance(acceptance, turn % 2 == 1, 0.1)
        values.append(acceptance)
    assert sum(values[-100:]) / 100 == pytest.approx(0.5, abs=0.01)


def test_no_draft_is_verified_where_every_row_costs_a_step():
    assert lengths_of([[0.9, 0.8], [0.7]], 2, 2, lambda rows: float(rows)) == [0, 0]


def test_all_are_verified_where_rows_are_free():
    assert lengths_of([[0.9, 0.8], [0.1]], 2, 2, lambda rows: 1.0) == [2, 1]


def test_the_likeliest_tokens_of_all_sequences_get_the_rows_that_are_free():
    seconds = lambda rows: 1.0 if rows <= 5 else 10.0  # noqa: E731
    assert lengths_of([[0.9, 0.2], [0.8, 0.7, 0.6]], 2, 2, seconds) == [1, 2]


def test_a_long_prefill_hides_drafts():
    """A row more matters little to a step of hundreds; without them it would not pay."""
    seconds = lambda rows: 0.001 * rows  # noqa: E731
    assert lengths_of([[0.6]], 1, 1, seconds) == [0]
    assert lengths_of([[0.6]], 512, 1, seconds) == [1]


@given(
    st.lists(st.lists(st.floats(0, 1), max_size=6), max_size=5),
    st.lists(st.floats(0.01, 1), min_size=40, max_size=40),
)
def test_no_other_number_of_rows_promises_more(chances, increments):
    chances = [sorted(own, reverse=True) for own in chances]
    times = [sum(increments[: n + 1]) for n in range(40)]
    base = max(1, len(chances))
    lengths = lengths_of(chances, base, base, times.__getitem__)

    def rate(chosen: list[int]) -> float:
        tokens = base + sum(sum(own[:n]) for own, n in zip(chances, chosen, strict=True))
        return tokens / times[base + sum(chosen)]

    best = rate(lengths)
    for index, own in enumerate(chances):
        for length in range(len(own) + 1):
            other = [*lengths[:index], length, *lengths[index + 1 :]]
            if sum(other) == sum(lengths):
                continue
            assert rate(other) <= best * (1 + 1e-9)


def per_row(rows: int) -> float:
    """Ten milliseconds, and one more for each row."""
    return 0.010 + 0.001 * rows


def test_a_step_is_no_wider_than_a_target_allows():
    """Two sequences with good drafts; another one has none, and is to get a token in 15.5 ms."""
    drafts = [[0.9] * 4, [0.9] * 4, []]
    assert choose(drafts, 3, 3, per_row) == Choice([4, 4, 0])
    for targets_s in ({2: 0.0155}, {99: 0.0155}):
        assert choose(drafts, 3, 3, per_row, targets_s) == Choice([2, 0, 0], 6, 1, 0)


def test_who_gets_more_tokens_from_a_step_may_wait_longer_for_it():
    drafts = [[0.9] * 4, [0.9] * 4, [0.8]]
    assert choose(drafts, 3, 3, per_row, {2: 0.0125}) == Choice([4, 4, 1], 0, 1, 0)


def test_a_target_that_plain_decoding_misses_holds_nobody_back():
    assert choose([[0.9] * 4, []], 2, 2, per_row, {1: 0.001}) == Choice([4, 0], 0, 0, 1)


def test_the_drafts_a_target_needs_go_first():
    """Likelier tokens of others would make the step too long for what this one gets from it."""
    drafts = [[0.9] * 4, [0.5, 0.4]]
    assert choose(drafts, 2, 2, per_row, {1: 0.0085}) == Choice([2, 2], 2, 1, 0)
    assert choose(drafts, 2, 2, per_row, {1: 0.0095}) == Choice([4, 2], 0, 1, 0)


def test_a_target_is_not_met_at_the_cost_of_plain_speed():
    def steep(rows: int) -> float:
        return 0.001 * rows

    drafts = [[0.5], *([[]] * 7)]
    assert choose(drafts, 8, 8, steep, {0: 0.0065}) == Choice([0] * 8, 0, 0, 1)


@st.composite
def steps(draw):
    chances = [sorted(own, reverse=True) for own in draw(st.lists(CHANCES, min_size=1, max_size=4))]
    increments = draw(st.lists(st.floats(0.01, 1), min_size=40, max_size=40))
    times = [sum(increments[: n + 1]) for n in range(40)]
    places = st.sampled_from([*range(len(chances)), 100, 101])
    targets_s = draw(st.dictionaries(places, st.floats(0.01, 5), max_size=4))
    return chances, times, targets_s


CHANCES = st.lists(st.floats(0, 1), max_size=4)


class Judged:
    """Any choice in a step, by what is promised of it."""

    def __init__(self, step, lengths):
        self.chances, self.times, self.targets_s = step
        self.lengths = lengths
        self.base = len(lengths)

    def tokens_of(self, place, length=None):
        if place >= self.base:
            return 1.0
        return 1.0 + sum(self.chances[place][: self.lengths[place] if length is None else length])

    @property
    def seconds(self):
        return self.times[self.base + sum(self.lengths)]

    @property
    def rate(self):
        return sum(self.tokens_of(place) for place in range(self.base)) / self.seconds

    @property
    def met(self):
        return {
            place
            for place, target in self.targets_s.items()
            if self.seconds <= target * self.tokens_of(place)
        }

    @property
    def would_be_met_alone(self):
        """With no more draft tokens of its own, and without anybody else's."""
        return {
            place
            for place, target in self.targets_s.items()
            for length in range(self.lengths[place] + 1 if place < self.base else 1)
            if self.times[self.base + length] <= target * self.tokens_of(place, length)
        }


@given(steps())
def test_nobody_misses_a_target_because_of_others_and_plain_is_never_faster(step):
    chances, times, targets_s = step
    choice = choose(chances, len(chances), len(chances), times.__getitem__, targets_s)
    chosen, plain = Judged(step, choice.lengths), Judged(step, [0] * len(chances))
    assert chosen.met >= chosen.would_be_met_alone >= plain.met
    assert chosen.rate >= plain.rate * (1 - 1e-9)
    assert (choice.num_met, choice.num_missed) == (
        len(chosen.met),
        len(targets_s) - len(chosen.met),
    )


@given(steps())
def test_no_admissible_number_of_the_likeliest_rows_is_better(step):
    chances, times, targets_s = step
    choice = choose(chances, len(chances), len(chances), times.__getitem__, targets_s)
    chosen, plain = Judged(step, choice.lengths), Judged(step, [0] * len(chances))
    order = sorted(
        ((chance, place) for place, own in enumerate(chances) for chance in own),
        key=lambda row: -row[0],
    )
    lengths = [0] * len(chances)
    for _, place in order:
        lengths[place] += 1
        other = Judged(step, lengths)
        if other.met < other.would_be_met_alone or other.rate < plain.rate:
            continue
        assert (len(chosen.met), chosen.rate * (1 + 1e-9)) >= (len(other.met), other.rate)


@given(steps())
def test_targets_that_every_choice_meets_or_none_change_nothing(step):
    chances, times, targets_s = step
    free = choose(chances, len(chances), len(chances), times.__getitem__)
    for target_s in (1e-6, 1e6):
        lax = dict.fromkeys(targets_s, target_s)
        told = choose(chances, len(chances), len(chances), times.__getitem__, lax)
        assert (told.lengths, told.num_yielded) == (free.lengths, 0)
