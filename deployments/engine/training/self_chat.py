"""The target talks to itself: prompts of its own, its answers, and what it computed on the way.

Behind the opening of a chat, a model that was tuned on chats writes what a user might: sampled
prompts like those it was taught on, which no data set has to supply. Many texts are written side by
side, each token in one forward of all, and the features that training needs are those of the very
forwards that wrote the text.

Source: Magpie (arXiv:2406.08464).

B: texts side by side, L: rows a text sees, H: heads, K: key-value heads, D: head dimension,
E: hidden size, V: vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch.nn import functional as F

from deployments.engine.errors import UnsupportedModelError
from deployments.engine.torch_engine.rotary import rotate, rotation_table
from deployments.engine.training.batches import FeatureText

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from deployments.engine.torch_engine.models.llama import Attention, DecoderLayer
    from deployments.engine.torch_engine.weights.loader import LoadedModel
    from deployments.engine.training.config import SelfChatConfig

_ROWS_TOGETHER = 16
"""Texts that are attended together, all as far as the longest of them sees."""
_CANDIDATES = 64
"""Sampled tokens are among so many likeliest ones."""
_MIN_PROMPT_TOKENS = 6


class ChatFrame(NamedTuple):
    """The fixed tokens around a user's words.

    Attributes:
        opening: before them.
        closing: behind them, up to where the answer begins; the first one ends the user's turn.
    """

    opening: tuple[int, ...]
    closing: tuple[int, ...]


def longest_text(frame: ChatFrame, config: SelfChatConfig) -> int:
    """Tokens of a text, at most."""
    return len(frame.opening) + config.max_prompt_tokens + len(frame.closing) + config.max_tokens


@dataclass(slots=True, eq=False)
class _Text:
    """One text being written; two of them may say the same and are still two.

    Attributes:
        temperature: of its answer; 0 is greedy.
        num_read: leading tokens that the model has read.
        answer_start: where the answer begins; 0 while the prompt is being written.
    """

    token_ids: list[int]
    temperature: float
    num_read: int = 0
    answer_start: int = 0
    features: list[Tensor] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)


class SelfChat:
    """Writes texts without end."""

    def __init__(
        self,
        loaded: LoadedModel,
        frame: ChatFrame,
        aux_layers: tuple[int, ...],
        config: SelfChatConfig,
        *,
        seed: str,
        dtype: torch.dtype,
    ) -> None:
        """Allocate rows for all texts that are written side by side.

        Args:
            loaded: the target, dense.
            frame: of its chats.
            aux_layers: layers (counted from 0) whose outputs are kept.
            config: how many at once, how long, how sampled.
            seed: other texts for another one.
            dtype: of what is kept.

        Raises:
            UnsupportedModelError: the target's attention is not plain causal.
        """
        model, shape = loaded.model, loaded.config
        if not all(cast("DecoderLayer", x).attention.is_standard for x in model.layers):
            raise UnsupportedModelError(
                f"{shape.model_type} has an attention of its own: it cannot talk to itself"
            )
        self._model, self._shape, self._config = model, shape, config
        self._frame, self._aux, self._dtype = frame, aux_layers, dtype
        self._ends = frozenset(shape.eos_token_ids)
        self._num_rows = -(-config.num_together // _ROWS_TOGETHER) * _ROWS_TOGETHER
        longest = longest_text(frame, config)
        size = (shape.num_layers, self._num_rows, shape.num_kv_heads, longest, shape.head_dim)
        self._keys = torch.zeros(size, dtype=model.compute_dtype, device=model.device)
        self._values = torch.zeros_like(self._keys)
        self._generator = torch.Generator().manual_seed(_number(seed))
        self._rows = [self._new() for _ in range(self._num_rows)]

    def texts(self, temperatures: Sequence[float] | None = None) -> Iterator[FeatureText]:
        """One text after another, in the order in which their answers end.

        Args:
            temperatures: of the answers, drawn evenly; the configured ones by default.
        """
        if temperatures is not None:
            for text in self._rows:
                text.temperature = self._draw(temperatures)
        while True:
            streams, hidden, logits = self._forward()
            wanted = logits.argmax(1).tolist()
            sampled = self._sample(logits)
            done: list[_Text] = []
            for row, text in enumerate(self._rows):
                text.features.append(streams[row])
                text.hidden.append(hidden[row])
                text.wanted.append(wanted[row])
                text.num_read += 1
                if text.num_read < len(text.token_ids):
                    continue
                token_id = sampled[row]
                if text.answer_start and text.temperature == 0:
                    token_id = wanted[row]
                if self._goes_on(text, token_id):
                    continue
                done.append(text)
                if 0 < text.answer_start < text.num_read:
                    yield self._finished(text)
            for text in done:
                self._replace(text, temperatures)

    def _goes_on(self, text: _Text, token_id: int) -> bool:
        """Take the next token; False if the text ends with it."""
        config, frame = self._config, self._frame
        if text.answer_start:
            text.token_ids.append(token_id)
            num_written = len(text.token_ids) - text.answer_start
            return token_id not in self._ends and num_written < config.max_tokens
        num_written = len(text.token_ids) - len(frame.opening)
        if token_id == frame.closing[0] or token_id in self._ends:
            text.token_ids += frame.closing
            text.answer_start = len(text.token_ids)
            if num_written >= _MIN_PROMPT_TOKENS:
                return True
            text.answer_start = 0
            return False
        text.token_ids.append(token_id)
        return num_written < config.max_prompt_tokens

    def _finished(self, text: _Text) -> FeatureText:
        rows = torch.arange(text.num_read)
        return FeatureText(
            token_ids=torch.tensor(text.token_ids[: text.num_read], dtype=torch.int32),
            features=torch.stack(text.features).to("cpu", self._dtype),
            hidden=torch.stack(text.hidden).to("cpu", self._dtype),
            wanted=torch.tensor(text.wanted, dtype=torch.int32),
            # The last row stands before a token that is not there.
            is_answer=(rows >= text.answer_start - 1) & (rows < text.num_read - 1),
        )

    def _new(self, temperatures: Sequence[float] | None = None) -> _Text:
        drawn = self._draw(temperatures or self._config.temperatures)
        return _Text(list(self._frame.opening), drawn)

    def _draw(self, temperatures: Sequence[float]) -> float:
        at = int(torch.randint(len(temperatures), (1,), generator=self._generator))
        return temperatures[at]

    def _replace(self, text: _Text, temperatures: Sequence[float] | None) -> None:
        """Begin another text in a row among the young ones, so that neighbours see equally far."""
        row = self._rows.index(text)
        for start in range(
            (row // _ROWS_TOGETHER + 1) * _ROWS_TOGETHER, self._num_rows, _ROWS_TOGETHER
        ):
            oldest = max(
                range(start, start + _ROWS_TOGETHER), key=lambda at: self._rows[at].num_read
            )
            self._keys[:, row] = self._keys[:, oldest]
            self._values[:, row] = self._values[:, oldest]
            self._rows[row] = self._rows[oldest]
            row = oldest
        self._rows[row] = self._new(temperatures)

    def _sample(self, logits_BV: Tensor) -> list[int]:
        scores, token_ids = (
            logits_BV.float().cpu().topk(min(_CANDIDATES, logits_BV.shape[1]), dim=1)
        )
        temperatures = [
            text.temperature if text.answer_start else self._config.prompt_temperature
            for text in self._rows
        ]
        cooled = scores / torch.tensor(temperatures).clamp(min=1e-4).unsqueeze(1)
        picked = torch.multinomial(cooled.softmax(1), 1, generator=self._generator)
        chosen: list[int] = token_ids.gather(1, picked).squeeze(1).tolist()
        return chosen

    @torch.inference_mode()
    def _forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Read one token of every text: features [B, nE], what the head reads [B, E], logits."""
        model, device = self._model, self._model.device
        token_ids = torch.tensor([text.token_ids[text.num_read] for text in self._rows])
        positions = torch.tensor([text.num_read for text in self._rows])
        longest = int(positions.max()) + 1
        hidden_BL = torch.arange(longest) > positions.unsqueeze(1)
        mask = torch.zeros(hidden_BL.shape).masked_fill_(hidden_BL, -torch.inf)[:, None, None, :]
        mask = mask.to(device, model.compute_dtype)
        table = rotation_table(
            positions.to(device),
            model.get_buffer("rope_frequencies"),
            self._shape.rope.amplitude,
            model.compute_dtype,
        )
        positions = positions.to(device)
        x_BE = F.embedding(token_ids.to(device), model.embed_tokens.weight)
        x_BE = x_BE.to(model.compute_dtype)
        streams: dict[int, Tensor] = {}
        for index, module in enumerate(model.layers):
            layer = cast("DecoderLayer", module)
            heads_BHD = self._attend(
                index, layer.attention, layer.input_norm(x_BE), positions, mask, table
            )
            x_BE = x_BE + layer.attention.o_proj(heads_BHD.flatten(1))
            x_BE = x_BE + layer.mlp(layer.post_attention_norm(x_BE))
            if index in self._aux:
                streams[index] = x_BE
        normed_BE = model.norm(x_BE)
        features = torch.cat([streams[index] for index in self._aux], dim=1)
        return features, normed_BE, model.lm_head(normed_BE)

    def _attend(
        self,
        index: int,
        attention: Attention,
        x_BE: Tensor,
        positions: Tensor,
        mask: Tensor,
        table: Tensor,
    ) -> Tensor:
        B, D, K = x_BE.shape[0], attention.head_dim, attention.num_kv_heads
        heads = attention.qkv_proj(x_BE).view(B, -1, D)
        q_BHD, k_BKD, v_BKD = torch.split(heads, [attention.num_heads, K, K], dim=1)
        if attention.q_norm is not None and attention.k_norm is not None:
            q_BHD, k_BKD = attention.q_norm(q_BHD), attention.k_norm(k_BKD)
        keys, values = self._keys[index], self._values[index]
        rows = torch.arange(B, device=x_BE.device)
        keys[rows, :, positions] = rotate(k_BKD, table)
        values[rows, :, positions] = v_BKD
        q_BKGD = rotate(q_BHD, table).reshape(B, K, -1, D)
        parts = []
        for start in range(0, B, _ROWS_TOGETHER):
            some = slice(start, start + _ROWS_TOGETHER)
            seen = max(text.num_read for text in self._rows[some]) + 1
            visible = mask[some, :, :, :seen].expand(-1, 1, q_BKGD.shape[2], -1)
            parts.append(
                F.scaled_dot_product_attention(
                    q_BKGD[some], keys[some, :, :seen], values[some, :, :seen], attn_mask=visible
                )
            )
        return torch.cat(parts).reshape(B, -1, D)


def _number(seed: str) -> int:
    from hashlib import blake2b

    return int.from_bytes(blake2b(seed.encode(), digest_size=7).digest())
