from __future__ import annotations

import pytest

from deployments.engine.training.prompt_split import split_prompts

PROMPTS = [(i, i) for i in range(40)]


def split(prompts=PROMPTS, held_out=(), **changes):
    settings = {"num_held_out": 6, "max_prompt_tokens": 4, "seed": 1} | changes
    return split_prompts(prompts, held_out, **settings)


def test_no_prompt_is_on_both_sides():
    drawn = split([*PROMPTS, *PROMPTS[:9]])
    assert len(drawn.held_out) == 6
    assert len(drawn.training) == 34
    assert {*drawn.training, *drawn.held_out} == {*PROMPTS}
    assert drawn.num_dropped == 9


def test_the_draw_follows_the_seed():
    assert split() == split()
    assert split().held_out != split(seed=2).held_out


def test_given_held_out_prompts_are_never_trained_on():
    given = split(held_out=[PROMPTS[3], (90,), (91,) * 5])
    assert given.held_out == [PROMPTS[3], (90,)]
    assert given.training == [*PROMPTS[:3], *PROMPTS[4:]]
    assert given.num_dropped == 2


def test_half_at_most_is_held_out():
    assert len(split(PROMPTS[:5]).held_out) == 2


@pytest.mark.parametrize(
    ("prompts", "held_out"),
    [([], []), (PROMPTS[:1], []), (PROMPTS[:1], PROMPTS[:1]), ([(1,) * 5] * 3, [])],
)
def test_too_few_prompts_are_refused(prompts, held_out):
    with pytest.raises(ValueError, match="at least one prompt"):
        split(prompts, held_out)
