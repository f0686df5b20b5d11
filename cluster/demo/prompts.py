"""What the demo asks."""

GREETING = "Explain in two sentences what a bicycle chain does."

PAIRED = (
    "List the numbers from one to twenty as words, separated by commas.",
    "Write the days of the week three times, one day per line.",
    "Explain step by step how to make a cup of tea.",
    "What is a library? Answer in a few short sentences.",
)
"""Asked with and without speculation. Lists and plain explanations, as draft models like them."""

DOCUMENT = """\
A paceline is a line of riders who travel close behind one another. The rider at the front cuts
through the air for all of them. The riders behind sit in the slipstream and need much less power
to hold the same speed; at forty kilometres per hour the saving is often given as a quarter or
more. After a while the leader swings to the side, lets the line pass, and joins it again at the
back. The next rider now leads. Because everybody leads for a short time only, the group as a
whole rides faster than any single rider could, and no one is worn out.

A good paceline follows a few rules. The speed stays even: a new leader does not jump ahead, but
keeps the pace that the line already has. Gaps stay small but safe, about half a wheel to one
wheel. Riders look past the wheel in front of them, not at it. They point at holes and stones, so
that those behind, who see little of the road, can steer around them in time. Nobody brakes
hard; a rider who comes too close sits up and lets the wind do the work, or moves a little to the
side. A rider who is tired skips a turn at the front and says so.

There are two common forms. In a single paceline each leader stays in front for some time, from
half a minute to several minutes, and then drifts back along the line. In a rotating paceline two
lines run beside each other: in one of them riders move forward, in the other they move back, and
nobody leads for more than a few seconds. The rotating form is faster, and it needs more skill,
because the two lines must differ in speed by very little. When the wind comes from the side, the
shelter is not straight behind a rider but behind and to the side of him; the line then fans out
over the width of the road and is called an echelon.

The same thought is at home elsewhere. Geese fly in a wedge and take turns at its tip. Runners in
a long race follow a pacemaker who steps aside before the end. Lorries on a motorway can drive in a
platoon, with radios between them that keep the distance short and the braking together. In each
case somebody goes ahead and does a cheap part of the work for many, and in each case the group
must agree quickly when the one in front was wrong and the road goes another way.
"""
"""Between eight and ten pages of 64 tokens, so that its KV is worth sharing."""

DOCUMENT_QUESTION = "In one sentence: why do riders take turns at the front?"
