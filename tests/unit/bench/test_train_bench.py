"""The training benchmark's own logic: what it counts, and what it makes of its repetitions."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("matplotlib")

from deployments.engine.training.capture import AnsweredPrompt, FeatureCapture
from tests.bench.train.flops import attention_flops, counted, head_flops, layer_flops, text_flops
from tests.bench.train.machine import PeakMemory, disk_rates, forget, matmul_flops
from tests.bench.train.report import bars_of, draw, mode_rows, show, stage_rows
from tests.bench.train.work import Timed, Trained
from tests.unit.deployments.engine.training.tiny_training import head_config, target, texts

LIMITS = {
    "matmul_flops": 4e9,
    "plain_decode_rate": 400.0,
    "disk_write_rate": 1e5,
    "disk_read_rate": 2e5,
}


def found(*online_bits, most=2.0):
    stages = {name: Timed(100, 0.5, 10**9) for name in ("answers", "features", "training")}
    whole = {"a": torch.zeros(3)}
    repetitions = []
    for bits in online_bits:
        parts = {"disk_bytes": 0, "queue_max_bytes": 4.0, "queue_most_bytes": most}
        offline = Trained(100, 2.0, {"disk_bytes": 9}, 10**7, 10**6, whole)
        online = Trained(100, 1.0, parts, 10**7, 10**5, {"a": torch.full((3,), bits)})
        repetitions.append({"offline": offline, "online": online})
    count = len(online_bits)
    return {"limits": [LIMITS] * count, "stages": [stages] * count, "modes": repetitions}


def test_products_of_a_reading_are_counted_as_torch_counts_them():
    # The last row's logits come with every forward, those of all rows from the capture.
    loaded = target()
    capture = FeatureCapture(loaded, head_config().aux_layers, max_length=64)
    (text,) = texts()[:1]
    prompt = AnsweredPrompt.of(text)
    measured = counted(lambda: list(capture.texts([prompt])))
    length, shape = text.num_tokens, loaded.config
    ours = length * layer_flops(shape) + (length + 1) * head_flops(shape)
    # Torch counts fused attention not at all here, or every row with every other.
    assert ours <= measured <= ours + attention_flops(shape, length) * length
    seen = sum(attention_flops(shape, rows + 1) for rows in range(length))
    assert text_flops(shape, length, length + 1) == ours + seen


def test_a_stage_is_compared_with_its_limits():
    row, *_ = stage_rows(found(0.0, 0.0))
    assert row["stage"] == "answers"
    assert row["tokens_per_s"] == 200
    # 10 million operations a token, of 4 billion a second.
    assert row["arithmetic_limit"] == 400
    assert row["of_arithmetic"] == 0.5
    assert row["of_other"] == 0.5


def test_modes_are_medians_of_their_runs_and_the_most_memory():
    offline, online = mode_rows(found(0.0, 0.0, 0.0))
    assert (offline["tokens_per_s"], online["tokens_per_s"]) == (50, 100)
    assert (offline["grown_mb"], online["grown_mb"]) == (1.0, 0.1)
    assert online["parts"]["queue_most_bytes"] == 2


@pytest.mark.parametrize(
    ("measured", "holds"),
    [(found(0.0), [True, True]), (found(0.0, 1.0), [False, True]), (found(0.0, most=5.0), [1, 0])],
)
def test_bars(measured, holds):
    assert [bar.holds for bar in bars_of(measured)] == holds


def test_everything_is_shown(tmp_path, capsys):
    measured = found(0.0)
    stages, modes = stage_rows(measured), mode_rows(measured)
    show(stages, modes, bars_of(measured))
    printed = capsys.readouterr().out
    assert "plain decoding" in printed
    assert "holds  0.5 (at most 1)  the queue's most bytes, of its bound" in printed
    draw(stages, modes, tmp_path / "train.png")
    assert (tmp_path / "train.png").stat().st_size > 10_000


def test_the_machine_is_measured(tmp_path):
    assert matmul_flops(torch.float32) > 0
    rates = disk_rates(tmp_path / "blocks", 8 << 20)
    assert rates.read > 0
    assert rates.write > 0
    assert not list(tmp_path.iterdir())
    (tmp_path / "some").write_bytes(b"kept")
    forget(tmp_path / "some")
    assert (tmp_path / "some").read_bytes() == b"kept"


def test_the_peak_is_seen_though_it_is_over():
    memory = PeakMemory()
    block = torch.ones(64 << 20, dtype=torch.uint8)
    del block
    peak, grown = memory.grown()
    assert peak > grown > 60 << 20
