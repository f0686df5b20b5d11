"""What a human may set about the training of a draft. Frozen; read once."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

LossName: TypeAlias = Literal["cross_entropy", "kl", "acceptance", "hybrid"]


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ObjectiveConfig(_Config):
    """What is minimised."""

    num_unrolls: int = Field(default=5, ge=1, le=16)
    """Draft steps of a head's training-time test; SpecForge takes 7. A student needs one."""
    unroll_decay: float = Field(default=0.8, gt=0, le=1)
    """Weight of a step against the one before it; EAGLE's value."""
    loss: LossName = "cross_entropy"
    """How the draft's distribution is compared with the target's."""
    hidden_weight: float = Field(default=0.1, ge=0)
    """Weight of the distance between the head's stream and the target's; 0 is EAGLE-3's own."""


class TrainingConfig(_Config):
    """One training run."""

    objective: ObjectiveConfig = ObjectiveConfig()
    """What is minimised."""
    draft_vocab_size: int = Field(default=8192, ge=16)
    """Tokens that can be drafted: the ones that the answers hold most often."""
    start: Literal["target", "random"] = "target"
    """``target`` takes norm and head of the target and solves for the fusion of its features."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """At its highest, after the warm-up; SpecForge's value. Ten times more undoes the start."""
    warmup_share: float = Field(default=0.02, ge=0, lt=1)
    """Of all steps."""
    decay_share: float = Field(default=0.4, ge=0, le=1)
    """Of all steps, at the end, over which the rate falls to a hundredth."""
    max_grad_norm: float = Field(default=0.5, gt=0)
    """Longer gradients are shortened to this."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's."""
    max_length: int = Field(default=1024, ge=16)
    """Tokens of a text; the rest is cut off."""
    batch_tokens: int = Field(default=1024, ge=64)
    """Tokens of one forward, padding included; at least one text."""
    accumulate: int = Field(default=1, ge=1)
    """Forwards of one optimiser step."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the texts, each in another order."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the products; weights and sums stay in float32."""
    seed: int = Field(default=0, ge=0)
    """Of the order of the texts and of random weights."""
    checkpoint_steps: int = Field(default=200, ge=1)
    """Optimiser steps between two checkpoints."""
    evaluate_steps: int = Field(default=200, ge=1)
    """Optimiser steps between two evaluations on held-out texts."""
    patience: int = Field(default=0, ge=0)
    """Evaluations without a better one after which the run ends; 0 goes on to the end."""
    num_draft_tokens: int = Field(default=5, ge=1, le=16)
    """Length of the chains that evaluations draft."""
    tree_widths: tuple[Annotated[int, Field(ge=1, le=16)], ...] = Field(
        default=(2, 2, 1), min_length=1, max_length=8
    )
    """Shape of the tree that evaluations verify beside chains: how many of its likeliest tokens the
    draft puts behind each node, depth by depth. By default 2, 2 and 1, a tree of ten nodes."""


class AnswersConfig(_Config):
    """What the target writes for its draft to learn from."""

    max_tokens: int = Field(default=256, ge=1)
    """Of one answer."""
    per_prompt: int = Field(default=1, ge=1)
    """Answers to each prompt: the first one greedy, all others sampled."""
    temperature: float = Field(default=0.8, gt=0)
    """Of sampled answers."""
    held_out_prompts: int = Field(default=16, ge=1)
    """Prompts that only evaluations see, drawn by ``seed``, with greedy answers; never more than
    half of all."""
    seed: int = Field(default=0, ge=0)
    """Of sampled answers and of the choice of held-out prompts."""


class SelfChatConfig(_Config):
    """Prompts that the target writes itself, with its answers to them."""

    num_texts: int = Field(default=4000, ge=2)
    """Written to train on; ``answers.held_out_prompts`` more are held out."""
    num_together: int = Field(default=128, ge=1)
    """Written side by side. One of them takes as many KV rows as the longest text may have."""
    max_prompt_tokens: int = Field(default=110, ge=16)
    """Of a prompt; a longer one is dropped."""
    max_tokens: int = Field(default=256, ge=1)
    """Of an answer."""
    prompt_temperature: float = Field(default=1.0, gt=0)
    """Of prompts."""
    temperatures: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        default=(0.0, 0.0, 0.8, 1.0), min_length=1
    )
    """Of answers, drawn evenly; 0 is greedy. Held-out ones are greedy."""
    seed: int = Field(default=0, ge=0)
    """Of all that is drawn."""


class FeaturesConfig(_Config):
    """What the target computes on its answers."""

    mode: Literal["offline", "online"] = "offline"
    """``offline`` stores the features of training texts on disk before the training. ``online`` has
    the target compute them beside the training, anew in every epoch, and they never touch a disk.
    Prompts with answers give the same draft to the bit either way. Held-out texts are stored in
    both."""
    queue_bytes: int = Field(default=256 << 20, ge=1 << 20)
    """Of features that wait for the training, with ``online``; a longer text passes alone."""
    group_texts: int = Field(default=0, ge=0)
    """With ``online`` and given prompts: the training begins as soon as so many texts are answered,
    while the target answers the others. Its first epoch goes over groups of as many, and vocabulary
    and start are those of the first. 0 has all answered before."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of what is kept: a text token takes eight (float32: sixteen) bytes per unit of the target's
    hidden size."""
    max_bytes: int = Field(default=8 << 30, ge=1 << 20)
    """Of the training texts' folder, with ``offline``; texts that no longer fit are left out, and
    that is said."""

    @model_validator(mode="after")
    def _group_online_only(self) -> FeaturesConfig:
        if self.group_texts and self.mode != "online":
            raise ValueError("group_texts is for mode: online")
        return self


class CostsConfig(_Config):
    """What steps take where the draft will serve, in seconds, by their rows.

    Between two numbers of rows it is straight, beyond the last it goes on. Where nothing is given,
    the run measures on its own machine.
    """

    target_step_s: dict[Annotated[int, Field(ge=1)], Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict
    )
    """Of the target. One row decodes a token, K + 1 verify K draft tokens."""
    draft_step_s: dict[Annotated[int, Field(ge=1)], Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict
    )
    """Of the draft. One row drafts a chain's next token."""

    @field_validator("target_step_s", "draft_step_s")
    @classmethod
    def _begin_with_one_row(cls, seconds_of: dict[int, float]) -> dict[int, float]:
        if seconds_of and 1 not in seconds_of:
            raise ValueError("the time of a step of 1 row is needed")
        return seconds_of


class StudentConfig(_Config):
    """The shape of a student: which of its target's layers it keeps."""

    first_layers: int = Field(default=3, ge=1)
    """Kept at the beginning."""
    last_layers: int = Field(default=3, ge=1)
    """Kept at the end; one linear map stands for all between."""


class DraftTrainingConfig(_Config):
    """Everything about ``paceline train draft``."""

    method: Literal["eagle3", "student"] = "eagle3"
    """``eagle3`` is a head that reads its target's hidden states. ``student`` is a small language
    model cut out of the target; draft replicas run it."""
    student: StudentConfig = StudentConfig()
    """The shape of a ``student``."""
    answers: AnswersConfig = AnswersConfig()
    """What the target writes for its draft to learn from, where prompts are given."""
    self_chat: SelfChatConfig = SelfChatConfig()
    """What it writes with ``--self-chat``."""
    features: FeaturesConfig = FeaturesConfig()
    """What the target computes on its answers, on disk or beside the training."""
    costs: CostsConfig = CostsConfig()
    """From which evaluations predict a speed-up."""
    run: TrainingConfig = TrainingConfig()
    """The training itself."""
    num_processes: int = Field(default=1, ge=1)
    """That share every step of the training, anywhere on the Ray cluster that ``RAY_ADDRESS``
    names, or on one of the command's own on this machine. With CUDA each takes a GPU. A run may go
    on with another number of them; 1 needs no Ray."""
    min_processes: int = Field(default=1, ge=1)
    """Fewest to train with while the cluster has no room for all, at the start or after a loss."""
    cpus_per_process: int = Field(default=1, ge=1)
    """CPUs that Ray reserves for each of several processes; on a CPU its arithmetic threads."""
    tensor_parallel: int = Field(default=1, ge=1)
    """Processes that hold each matrix of the draft together and take the same texts. Divides
    ``num_processes``, and the target's heads."""
    max_failures: int = Field(default=3, ge=0)
    """Times that a run goes on from its last checkpoint after it lost a process."""
    start_timeout_s: float = Field(default=600.0, gt=0)
    """Seconds that the cluster has to start the processes, at the start and after each loss."""

    @model_validator(mode="after")
    def _processes_fit(self) -> DraftTrainingConfig:
        if self.num_processes % self.tensor_parallel:
            raise ValueError("num_processes must be a multiple of tensor_parallel")
        if self.min_processes > self.num_processes:
            raise ValueError("min_processes must not be above num_processes")
        return self
