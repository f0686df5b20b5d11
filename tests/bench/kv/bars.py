"""What the KV tier promises, as ratios within one run, so that a slow machine holds them too."""

from __future__ import annotations

from typing import Any

_CODEC_SPEED = {"int8": (0.4, 0.5), "int4": (0.3, 0.5)}
_CODEC_RATIO = {"int8": 1.93, "int4": 3.5, "k8v4": 2.4, "lossless": 1.45}
_CODEC_KL = {"raw": 0.0, "lossless": 0.0, "int8": 0.0002, "k8v4": 0.0006, "int4": 0.004}
_OURS = "paceline data path"


def hold_bars(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each bar's name -> value, bar, holds; of what was measured."""
    bars: dict[str, dict[str, Any]] = {}

    def at_least(name: str, value: float, bar: float) -> None:
        bars[name] = {"value": value, "bar": bar, "holds": value >= bar}

    def at_most(name: str, value: float, bar: float) -> None:
        bars[name] = {"value": value, "bar": bar, "holds": value <= bar}

    for row in report["codecs"]:
        if row["codec"] in _CODEC_SPEED:
            encode, decode = _CODEC_SPEED[row["codec"]]
            title = f"{row['codec']} {{}} of memcpy per core, pages of {row['page']}"
            at_least(title.format("encode"), row["encode_of_memcpy"], encode)
            at_least(title.format("decode"), row["decode_of_memcpy"], decode)
    for row in report["hot"]:
        if row["client"] == _OURS:
            page = row["page"]
            at_least(f"GET of plain socket, {page}", row["speed_of_socket"], 0.9)
            at_most(f"GET CPU of plain socket's, {page}", row["cpu_of_socket"], 1.3)
            if row["speed_of_lmcache"]:
                at_least(f"GET of LMCache native, {page}", row["speed_of_lmcache"], 1.0)
    exists = report["exists_per_s"]
    at_least("EXISTS of redis-py", exists["paceline"] / exists["redis-py"], 3.0)
    for row in report["ssd"]:
        if row["reader"] == "paceline":
            at_least(f"SSD read of raw O_DIRECT, {row['page']}", row["speed_of_raw"], 0.95)
    for row in report["quality"]:
        title = f"{row['codec']} {{}}, {row['text']}"
        if row["codec"] in _CODEC_RATIO:
            at_least(title.format("ratio"), row["ratio"], _CODEC_RATIO[row["codec"]])
        at_most(title.format("KL"), row["kl"], _CODEC_KL[row["codec"]])
    return bars
