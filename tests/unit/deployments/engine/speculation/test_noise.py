import math

import pytest
import torch

from deployments.engine.speculation.noise import (
    NOISE_VERSION,
    choice_key,
    gumbel,
    row_key,
    row_keys_at,
)

MASK = 2**64 - 1
G = 0x9E3779B97F4A7C15

GOLDEN_KEYS = {
    (0, 0, 0): 0x238275BC38FCBE91,
    (1, 0, 0): 0xB18A02F46D8D86C3,
    (0, 1, 0): 0x94926C2E801CB6F9,
    (0, 0, 1): 0x421DAF3033E887A3,
    (2**64 - 1, 7, 100_000): 0xDEC640EDBAF1FCE0,
}
GOLDEN_NOISE = {0: 1.2448188168880499, 1: -0.3522259723771795, 49_151: 4.360818077676128}


def splitmix_finalise(x: int) -> int:
    x &= MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def reference_key(seed: int, choice: int, position: int) -> int:
    key = 0
    for part in (seed, choice, position):
        key = splitmix_finalise(key + part + G)
    return key


def reference_gumbel(key: int, token: int) -> float:
    bits = splitmix_finalise(key + (token + 1) * G)
    return -math.log(-math.log(((bits >> 12) + 0.5) / 2**52))


def test_version_of_the_golden_vectors():
    assert NOISE_VERSION == 1


@pytest.mark.parametrize(("place", "key"), GOLDEN_KEYS.items())
def test_golden_keys(place, key):
    assert row_key(*place) == key == reference_key(*place)


def test_golden_noise():
    ids = torch.tensor(list(GOLDEN_NOISE))
    found = gumbel([row_key(1234, 0, 17)], ids)[0].tolist()
    assert found == pytest.approx(list(GOLDEN_NOISE.values()), rel=1e-15)


def test_agrees_with_integers_of_python():
    keys = [reference_key(seed, seed % 3, 10 * seed) for seed in (0, 1, 2**63, 2**64 - 1)]
    ids = torch.tensor([0, 1, 2, 255, 49_151, 2**31])
    found = gumbel(keys, ids)
    assert found.dtype == torch.float64
    for row, key in zip(found.tolist(), keys, strict=True):
        assert row == pytest.approx([reference_gumbel(key, v) for v in ids.tolist()], rel=1e-14)


def test_keys_of_positions_on_a_device_are_the_same():
    places = list(GOLDEN_KEYS)
    positions = torch.tensor([position for _, _, position in places])
    keys = row_keys_at([choice_key(seed, choice) for seed, choice, _ in places], positions)
    assert [key & MASK for key in keys.tolist()] == list(GOLDEN_KEYS.values())
    ids = torch.arange(300)
    assert torch.equal(gumbel(keys, ids), gumbel(list(GOLDEN_KEYS.values()), ids))


def test_rows_may_have_their_own_candidates():
    keys = [row_key(5, 0, 0), row_key(5, 0, 1)]
    ids = torch.tensor([[3, 4], [4, 9]])
    both = gumbel(keys, ids)
    for row in range(2):
        assert torch.equal(both[row], gumbel([keys[row]], ids[row])[0])


def test_choices_follow_the_distribution():
    # Pearson's chi-square with 4 degrees of freedom; 18.5 is the 99.9 % quantile.
    weights = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03], dtype=torch.float64)
    num_draws = 20_000
    keys = [row_key(99, 0, position) for position in range(num_draws)]
    chosen = (weights.log() + gumbel(keys, torch.arange(5))).argmax(dim=1)
    counts = torch.bincount(chosen, minlength=5).to(torch.float64)
    expected = weights * num_draws
    assert float(((counts - expected) ** 2 / expected).sum()) < 18.5


@pytest.mark.parametrize("stream", ["seed", "choice", "position", "token"])
def test_neighbouring_streams_are_uncorrelated(stream):
    num = 20_000
    keys = {
        "seed": [row_key(seed, 0, 0) for seed in range(num)],
        "choice": [row_key(0, choice, 0) for choice in range(num)],
        "position": [row_key(0, 0, position) for position in range(num)],
    }
    values = (
        gumbel([row_key(0, 0, 0)], torch.arange(num))[0]
        if stream == "token"
        else gumbel(keys[stream], torch.tensor([7]))[:, 0]
    )
    centred = (values - values.mean()) / values.std()
    assert abs(float((centred[1:] * centred[:-1]).mean())) < 4 / math.sqrt(num)
    assert float(values.mean()) == pytest.approx(0.5772, abs=0.04)
