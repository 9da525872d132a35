"""The user's job config, as it stands in YAML. Pydantic only: validating a config loads no torch, Ray or Spark."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from dspark_batch.core import SamplingParams
from dspark_batch.engine.config import (
    Auto,
    Device,
    DrafterName,
    DType,
    EngineConfig,
    ScheduleName,
    VerificationMode,
)
from dspark_batch.sampling.config import SamplingSection
from dspark_batch.spark.config import SparkSection

Task = Literal["generate", "classify", "extract"]
OutputMode = Literal["resume", "overwrite", "error"]
OutputFormat = Literal["parquet", "delta", "iceberg"]
OnConflict = Literal["fail", "wait", "take_over"]
InputFormat = Literal["parquet", "jsonl", "csv", "arrow", "huggingface", "delta", "iceberg"]
Incremental = Literal["files", "rows"]

_RENDERING_ARGUMENTS = frozenset(
    [
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "conversations",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "self",
        "tokenize",
        "tokenizer_kwargs",
        "truncation",
    ]
)
"""What the engine and the tokenizer decide themselves when they render a chat."""

AUTO_ROWS_IN_FLIGHT = 256
"""Rows that one engine should have at hand, so that small shards do not leave its batch half empty."""


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values cannot be changed after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    target: str = Field(default="smollm2-135m", description="embedded name, local path or hub id")
    revision: str | None = Field(default=None, description="hub revision; only for hub ids")
    dtype: DType = Field(default="auto", description="auto: bfloat16 where the device computes in it, else float32")


class SpeculationSection(Section):
    drafter: DrafterName = "auto"
    path: str | None = Field(default=None, description="checkpoint of dspark or draft_model; null: the embedded one")
    verification: VerificationMode = "coupled"
    schedule: ScheduleName = "auto"
    max_draft_tokens: int | None = Field(default=None, ge=1, le=64, description="γ; null: the drafter's own")


class InputSection(Section):
    path: str | list[str] = Field(description="file, folder, glob, or a list of them; a table's folder or name")
    format: InputFormat | None = Field(default=None, description="null: from the file names")
    id: str | None = Field(default=None, description="column that identifies a row; null: file and row index")
    columns: list[str] | None = Field(default=None, description="columns to carry over; null: all")
    filter: str | None = Field(default=None, description="which rows to take: comparisons in Python syntax")
    limit: int | None = Field(default=None, ge=1, description="only the first rows, so many, before the filter")
    version: int | None = Field(default=None, description="Delta version or Iceberg snapshot; null: the newest")
    catalog: dict[str, str] | None = Field(default=None, description="properties of the Iceberg catalog; null: its own")
    delimiter: str = Field(default=",", min_length=1, max_length=1, description="between CSV fields; a tab in .tsv")
    incremental: Incremental | None = Field(
        default=None, description="files: only files that no run into this output had before; rows: only ids"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> InputSection:
        if self.incremental == "rows" and self.id is None:
            raise ValueError("input.incremental rows needs input.id, the column that says which rows are new")
        if self.incremental is not None and self.limit is not None:
            raise ValueError("input.limit cannot be set with input.incremental, which takes all rows that are new")
        if self.version is not None and self.format not in ("delta", "iceberg"):
            raise ValueError("input.version needs input.format delta or iceberg")
        if self.format in ("delta", "iceberg", "huggingface") and not isinstance(self.path, str):
            raise ValueError(f"input.path must be one table for input.format {self.format}")
        return self

    @model_serializer(mode="wrap")
    def _without_unset_limit(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A section without a limit reads as it did before there was one: runs and trainings that exist can go on."""
        values: dict[str, Any] = dump(self)
        return {name: value for name, value in values.items() if name != "limit" or value is not None}


class PromptSection(Section):
    system: str | None = Field(default=None, description="system message; a Jinja2 template over the row")
    template: str | None = Field(default=None, description="user message; a Jinja2 template over the row")
    messages: str | None = Field(default=None, description="column of conversations, instead of a template")
    token_ids: str | None = Field(default=None, description="column of ready-made token ids, instead of a template")
    nulls: Literal["empty", "error"] = Field(
        default="empty", description="a NULL among others: an empty text, or a row that fails; all NULL always fails"
    )
    chat: Literal["auto", "always", "never"] = Field(
        default="auto", description="auto: the checkpoint's chat template where it has one"
    )
    chat_template_arguments: dict[str, JsonValue] = Field(
        default_factory=dict, description="variables for the chat template, such as {enable_thinking: false}"
    )

    @model_validator(mode="after")
    def _one_source(self) -> PromptSection:
        if [self.template, self.messages, self.token_ids].count(None) != 2:
            raise ValueError("set exactly one of prompt.template, prompt.messages and prompt.token_ids")
        if self.token_ids is not None and self.system is not None:
            raise ValueError("prompt.system needs a template or messages; with prompt.token_ids it must be null")
        if self.messages is not None and self.chat == "never":
            raise ValueError("prompt.messages needs the chat template; prompt.chat must be auto or always, got 'never'")
        return self

    @model_validator(mode="after")
    def _arguments_reach_the_template(self) -> PromptSection:
        if not self.chat_template_arguments:
            return self
        field = "prompt.chat_template_arguments"
        if self.token_ids is not None or self.chat == "never":
            raise ValueError(
                f"{field} need the chat template; with prompt.token_ids or prompt.chat never, leave them out"
            )
        taken = sorted(_RENDERING_ARGUMENTS & self.chat_template_arguments.keys())
        if taken:
            raise ValueError(f"{field} must not hold {', '.join(taken)}: the engine decides that")
        try:
            json.dumps(self.chat_template_arguments, allow_nan=False)
        except ValueError as error:
            raise ValueError(f"{field} must hold JSON values: {error}") from None
        return self

    @model_serializer(mode="wrap")
    def _without_unset_conversations(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A section that uses neither reads as it did before there were any: runs that exist can go on."""
        unset: dict[str, object] = {"messages": None, "chat_template_arguments": {}}
        values: dict[str, Any] = dump(self)
        return {name: value for name, value in values.items() if name not in unset or value != unset[name]}


class OutputSection(Section):
    path: str = Field(description="folder of the run: one Parquet file per shard, manifest and reports in _dspark")
    column: str = Field(default="generated", description="name of the generated column")
    prefix: str = Field(default="", description="before the names of all other added columns")
    mode: OutputMode = "resume"
    token_ids: bool = Field(default=False, description="also write the generated token ids")
    format: OutputFormat = Field(default="parquet", description="delta: a table in path; iceberg: a table over path")
    table: str | None = Field(default=None, description="Iceberg table, namespace.name")
    catalog: dict[str, str] | None = Field(default=None, description="properties of the Iceberg catalog; null: its own")
    on_conflict: OnConflict = Field(default="fail", description="what to do about another live run of this output")

    @model_validator(mode="after")
    def _table_is_named(self) -> OutputSection:
        if (self.format == "iceberg") != (self.table is not None):
            raise ValueError("output.table (namespace.name) belongs to output.format iceberg, and is required there")
        return self

    def name_of(self, added: str) -> str:
        """What an added column other than the generated one is called in the output."""
        return self.prefix + added


class EngineSection(Section):
    backend: Literal["ray", "spark", "local"] = "ray"
    device: Device = "auto"
    max_concurrency: int | Auto = "auto"
    max_step_tokens: int = Field(default=2048, ge=16)
    max_context: int | None = Field(default=None, ge=2)
    kv_cache_gib: float | Auto = "auto"
    threads: int | Auto = "auto"
    share_prefixes: bool = True
    watchdog_s: float | None = Field(
        default=600.0, gt=0, description="an engine without progress for so long counts as hung; null: never"
    )


class ActorRange(Section):
    """How many actors a run has: from ``min`` at its start up to ``max`` while shards wait. Equal: a fixed number."""

    min: int = Field(ge=1)
    max: int = Field(ge=1)

    @model_validator(mode="before")
    @classmethod
    def _of_number(cls, value: Any) -> Any:
        is_number = isinstance(value, int) and not isinstance(value, bool)
        return {"min": value, "max": value} if is_number else value

    @model_validator(mode="after")
    def _is_a_range(self) -> ActorRange:
        if self.min > self.max:
            raise ValueError(f"ray.actors.min must be at most ray.actors.max, got {self.min} and {self.max}")
        return self

    @model_serializer
    def _as_written(self) -> int | dict[str, int]:
        return self.min if self.is_fixed else {"min": self.min, "max": self.max}

    @property
    def is_fixed(self) -> bool:
        return self.min == self.max


class RaySection(Section):
    address: str | None = Field(default=None, description="cluster to join; null: RAY_ADDRESS, else a local one")
    actors: ActorRange = Field(
        default=ActorRange(min=1, max=1), description="engines, a number; or {min, max}, as many as there is work for"
    )
    num_gpus: float | Auto = Field(default="auto", description="per actor; auto: 1 where the cluster has GPUs")
    num_cpus: float | Auto = Field(default="auto", description="per actor; auto: an even share of the cluster")
    shards_in_flight: Annotated[int, Field(ge=1)] | Auto = Field(
        default="auto", description="shards that one actor decodes together; auto: enough to fill its batch, 2 at least"
    )
    load_timeout_s: float = Field(default=1800.0, gt=0, description="longest time to load the model plus one shard")


class ShardSection(Section):
    rows: int = Field(default=1024, ge=1, description="most rows per shard; a shard is committed as one")


class LimitsSection(Section):
    max_failed_fraction: float = Field(default=0.05, ge=0, le=1)
    max_generated_tokens: int | None = Field(default=None, ge=1)
    max_run_s: float | None = Field(default=None, gt=0, description="how long one start of the run begins shards")
    exit_code_on_failed_rows: Literal[3, 0] = Field(
        default=3, description="0: for orchestrators that take every other code for a job to run again"
    )


class JobConfig(Section):
    """One run. ``dspark_batch.job.loader`` reads it from YAML with ``key=value`` overrides."""

    task: Task = Field(
        default="generate", description="classify: how probable the choices are; extract: a typed column out of JSON"
    )
    model: ModelSection = Field(default_factory=ModelSection)
    speculation: SpeculationSection = Field(default_factory=SpeculationSection)
    input: InputSection
    prompt: PromptSection
    sampling: SamplingSection = Field(default_factory=SamplingSection)
    output: OutputSection
    engine: EngineSection = Field(default_factory=EngineSection)
    ray: RaySection = Field(default_factory=RaySection)
    spark: SparkSection = Field(default_factory=SparkSection)
    shards: ShardSection = Field(default_factory=ShardSection)
    limits: LimitsSection = Field(default_factory=LimitsSection)

    @model_validator(mode="after")
    def _task_has_what_it_needs(self) -> JobConfig:
        if self.task == "classify" and self.sampling.choices is None:
            raise ValueError("sampling.choices must name the labels that task classify chooses from, got none")
        if self.task == "extract" and self.sampling.json_schema is None:
            raise ValueError("sampling.json_schema must say what task extract takes out, and of which type; got none")
        self.sampling_params()
        return self

    def sampling_params(self) -> SamplingParams:
        """What each request asks of the engine. Raises ValueError that names the field."""
        return SamplingParams(**self.sampling.to_fields(), score_choices=self.task == "classify")

    @property
    def max_tokens_per_row(self) -> int | None:
        """Most tokens that are generated for a row; None where none are."""
        return None if self.task == "classify" else self.sampling.n * self.sampling.max_new_tokens

    def shards_in_flight(self, *, num_shards: int) -> int:
        """Shards that one engine decodes together, when ``num_shards`` are left for the most ``ray.actors``."""
        enough = max(2, math.ceil(AUTO_ROWS_IN_FLIGHT / self.shards.rows))
        chosen = enough if isinstance(self.ray.shards_in_flight, str) else self.ray.shards_in_flight
        return max(1, min(chosen, math.ceil(num_shards / self.ray.actors.max)))

    def engine_config(self) -> EngineConfig:
        """The engine's settings out of the model, speculation and engine sections."""
        return EngineConfig(
            target=self.model.target,
            revision=self.model.revision,
            dtype=self.model.dtype,
            device=self.engine.device,
            # Scoring draws nothing that a draft could foretell.
            drafter="none" if self.task == "classify" else self.speculation.drafter,
            drafter_path=self.speculation.path,
            verification=self.speculation.verification,
            schedule=self.speculation.schedule,
            max_draft_tokens=self.speculation.max_draft_tokens,
            max_concurrency=self.engine.max_concurrency,
            max_step_tokens=self.engine.max_step_tokens,
            max_context=self.engine.max_context,
            kv_cache_gib=self.engine.kv_cache_gib,
            threads=self.engine.threads,
            share_prefixes=self.engine.share_prefixes,
        )


ConfigLike = JobConfig | Mapping[str, Any] | str | Path
"""A validated config, its sections as nested mappings, or a YAML file's path."""
