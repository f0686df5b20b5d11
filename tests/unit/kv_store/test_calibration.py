from pathlib import Path

import pytest

import kv_store
from kv_store import CodecLossError, KVStoreConfig
from kv_store.calibration import (
    Calibration,
    CodecMeasurement,
    check_codec_loss,
    find_calibration,
    save_calibration,
)
from kv_store.codecs.registry import BUILTIN_CODECS, load_codec
from tests.kv_pages import make_layout

LAYOUT = make_layout()


def a_record(layout=LAYOUT, **kl):
    return Calibration(
        fingerprint=layout.fingerprint.hex(),
        model="tiny",
        dtype=layout.dtype,
        num_tokens=255,
        codecs=tuple(
            CodecMeasurement(
                codec=codec,
                ratio=2.0,
                encode_gb_per_cpu_s=1.0,
                decode_gb_per_cpu_s=1.0,
                kl=loss,
                top1=1.0,
                perplexity=9.0,
                perplexity_untouched=9.0,
            )
            for codec, loss in kl.items()
        ),
    )


def test_a_record_is_found_for_its_layout_only_and_replaced(tmp_path):
    assert find_calibration(LAYOUT, tmp_path) is None
    save_calibration(a_record(int8=0.5), tmp_path)
    save_calibration(a_record(int8=0.1), tmp_path)
    assert find_calibration(LAYOUT, tmp_path) == a_record(int8=0.1)
    assert find_calibration(make_layout(model_digest="other"), tmp_path) is None


@pytest.mark.parametrize("text", ["", "{}", "[1", '{"fingerprint": "00"}'])
def test_a_damaged_record_is_none(tmp_path, text):
    save_calibration(a_record(int8=0.1), tmp_path).write_text(text)
    assert find_calibration(LAYOUT, tmp_path) is None


def test_a_record_under_another_layout_s_name_is_none(tmp_path):
    mine = save_calibration(a_record(int8=0.1), tmp_path)
    other = save_calibration(a_record(make_layout(model_digest="other"), int8=0.2), tmp_path)
    other.replace(mine)
    assert find_calibration(LAYOUT, tmp_path) is None


def test_the_gate(tmp_path):
    save_calibration(a_record(int8=0.001, int4=0.02), tmp_path)

    def check(**fields):
        check_codec_loss(KVStoreConfig(**fields), LAYOUT, tmp_path)

    check(codec="raw", max_kl=0)
    check(codec="lossless", max_kl=0)
    check(codec="int8", max_kl=0.001)
    check(codec="int4", max_kl=0.03)
    check(codec="k8v4", max_kl=None)
    with pytest.raises(CodecLossError, match=r"int4 loses 0\.02 .* allows 0\.01"):
        check(codec="int4", max_kl=0.01)
    with pytest.raises(CodecLossError, match="paceline kv calibrate"):
        check(codec="k8v4", max_kl=1)


def test_an_unmeasured_model_takes_lossless_codecs_only(tmp_path):
    check_codec_loss(KVStoreConfig(codec="lossless"), LAYOUT, tmp_path)
    with pytest.raises(CodecLossError, match="nobody has measured"):
        check_codec_loss(KVStoreConfig(codec="int8"), LAYOUT, tmp_path)


def test_records_that_come_with_the_package_are_sound_and_within_the_default_gate():
    folder = Path(kv_store.__file__).parent / "data"
    records = sorted(folder.glob("*.json"))
    assert records
    for path in records:
        record = Calibration.model_validate_json(path.read_text(encoding="utf-8"))
        assert record.fingerprint.startswith(path.stem)
        assert [row.codec for row in record.codecs] == list(BUILTIN_CODECS)
        for row in record.codecs:
            assert row.kl <= KVStoreConfig().max_kl
            assert (row.kl == 0) == load_codec(row.codec).is_lossless
