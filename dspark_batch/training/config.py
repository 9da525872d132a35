"""The config of ``dspark-batch train``, as it stands in YAML or JSON. Pydantic only."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dspark_batch.engine.config import Auto, Device, DType, EngineConfig
from dspark_batch.job.config import InputSection, ModelSection, PromptSection, Section

MarkovName = Literal["vanilla", "gated", "rnn"]


class TableSource(Section):
    """Prompts from a table, as a job reads them."""

    input: InputSection
    prompt: PromptSection
    max_rows: int | None = Field(default=None, ge=1, description="the first rows only; null: all")


class SampledSource(Section):
    """Prompts that the target invents: its chat template up to the user turn, then its own words."""

    num_samples: int = Field(default=4000, ge=1, description="samples drawn; repeats and scraps are dropped")
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(default=160, ge=1, description="longer prompts are dropped")
    min_characters: int = Field(default=12, ge=1)
    openings: list[str] = Field(default_factory=lambda: [""], min_length=1, description="how user turns begin, in turn")
    endings: dict[str, str] = Field(
        default_factory=dict, description="by opening: text put after the turn, such as how to answer"
    )
    seed: int = 1
    samples_per_part: int = Field(default=4096, ge=1, description="a killed stage loses one part")


class PromptsSection(Section):
    """Where prompts come from; several sources add up."""

    sampled: SampledSource | None = None
    table: TableSource | None = None
    job: str | None = Field(default=None, description="config of a finished job: its prompts and its own outputs")

    @model_validator(mode="after")
    def _any(self) -> PromptsSection:
        if self.sampled is None and self.table is None and self.job is None:
            raise ValueError("set at least one of prompts.sampled, prompts.table and prompts.job")
        return self


class ResponsesSection(Section):
    max_new_tokens: int = Field(default=256, ge=1)
    temperatures: list[Annotated[float, Field(ge=0)]] = Field(
        default_factory=lambda: [0.0, 0.7], min_length=1, description="in turn over the prompts"
    )
    samples_per_prompt: int = Field(default=1, ge=1)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int = 2
    rows_per_part: int = Field(default=512, ge=1, description="prompts per saved part; a killed stage loses one part")
    kept_taps: list[int] = Field(
        default_factory=list,
        description="target layers whose outputs are written beside the responses, the last layer always among them: "
        "training then need not run the target; []: none",
    )


class DrafterSection(Section):
    num_layers: int = Field(default=2, ge=1)
    block_size: int = Field(default=5, ge=1, le=64, description="γ, tokens drafted in one block")
    taps: list[int] | None = Field(default=None, description="target layers read as features; null: 3, spread evenly")
    num_kv_heads: int | None = Field(default=None, ge=1, description="a divisor of its heads; null: the target's")
    markov: MarkovName = "vanilla"
    markov_rank: int = Field(default=64, ge=1)
    draft_vocab_size: int | None = Field(default=8192, ge=2, description="most frequent tokens; null: all")
    mask_token_id: int | None = Field(default=None, ge=0, description="null: a token that no response uses")
    init: Literal["fitted", "target", "random"] = Field(
        default="target",
        description="target: its last layers. fitted: a first layer that predicts the target's features by least "
        "squares, and below it the target's last layers",
    )


class OptimizeSection(Section):
    num_steps: int = Field(default=1000, ge=1)
    anchors_per_step: int = Field(default=512, ge=1, description="blocks in one batch")
    anchors_per_sequence: int | None = Field(default=None, ge=1, description="drawn anew each epoch; null: all")
    prompt_anchors: bool = Field(default=False, description="blocks start in prompts too, past what all rows share")
    max_sequence_tokens: int = Field(default=1024, ge=8, description="longer rows are cut")
    learning_rate: float = Field(default=6e-4, gt=0)
    warmup_fraction: float = Field(default=0.04, ge=0, lt=1)
    decay: Literal["cosine", "linear", "late"] = Field(default="cosine", description="late: linear at the end only")
    late_fraction: float = Field(default=0.3, gt=0, le=1, description="last part of the steps, of a late decay")
    final_fraction: float = Field(default=0.0, ge=0, le=1, description="last learning rate, as a part of the highest")
    weight_decay: float = Field(default=0.01, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    ce_weight: float = Field(default=0.1, ge=0)
    soft_ce_weight: float = Field(default=0.0, ge=0, description="of the cross-entropy with all of the target's p")
    distance_weight: float = Field(default=0.9, ge=0)
    confidence_weight: float = Field(default=1.0, ge=0)
    decay_tokens: float | None = Field(default=None, gt=0, description="slot k weighs exp(-(k-1)/this); null: γ")
    reach_weight: float = Field(
        default=0.0, ge=0, le=1, description="part of a slot's weight that goes with its chance to be reached"
    )
    single_slot_fraction: float = Field(
        default=0.0, ge=0, le=1, description="first part of the steps, with blocks of one slot and γ times as many"
    )
    seed: int = 3
    log_every: int = Field(default=10, ge=1, description="steps per line of the loss curve")
    save_every: int = Field(default=100, ge=1, description="steps between saved states; a multiple of log_every")
    feature_cache_gib: float = Field(default=1.0, ge=0, description="target features kept; others are computed again")

    @model_validator(mode="after")
    def _saves_after_a_line(self) -> OptimizeSection:
        if self.save_every % self.log_every:
            raise ValueError(f"optimize.save_every must be a multiple of optimize.log_every ({self.log_every})")
        return self


class EvaluateSection(Section):
    sets: dict[str, TableSource] = Field(default_factory=dict, description="held-out prompts by name")
    temperatures: list[Annotated[float, Field(ge=0)]] = Field(default_factory=lambda: [0.0, 0.7], min_length=1)
    num_prompts: int = Field(default=64, ge=1, description="prompts per set")
    max_new_tokens: int = Field(default=128, ge=1)
    num_heldout_prompts: int = Field(default=64, ge=2, description="prompts kept from training, to calibrate on")


class RunSection(Section):
    """How the engine and the trainer use the machine."""

    device: Device = "auto"
    threads: int | Auto = "auto"
    max_concurrency: int | Auto = "auto"
    max_step_tokens: int = Field(default=2048, ge=16)
    kv_cache_gib: float | Auto = "auto"
    train_dtype: DType = Field(default="auto", description="of the products; weights are kept in float32")


class TrainConfig(Section):
    """One drafter. ``dspark_batch.training.load`` reads it."""

    model: ModelSection = Field(default_factory=ModelSection)
    prompts: PromptsSection
    responses: ResponsesSection = Field(default_factory=ResponsesSection)
    drafter: DrafterSection = Field(default_factory=DrafterSection)
    optimize: OptimizeSection = Field(default_factory=OptimizeSection)
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)
    run: RunSection = Field(default_factory=RunSection)
    start_from: str | None = Field(default=None, description="drafter to go on from, instead of drafter.init")
    output: str = Field(description="folder of the stages, their state and the finished drafter")

    def engine_config(self) -> EngineConfig:
        """The engine that generates and evaluates, without a drafter of its own."""
        return EngineConfig(
            target=self.model.target,
            revision=self.model.revision,
            dtype=self.model.dtype,
            device=self.run.device,
            drafter="none",
            schedule="off",
            max_concurrency=self.run.max_concurrency,
            max_step_tokens=self.run.max_step_tokens,
            kv_cache_gib=self.run.kv_cache_gib,
            threads=self.run.threads,
        )
