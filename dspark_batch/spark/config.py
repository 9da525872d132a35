"""How the engine lives inside Spark executors, as it stands in YAML. None of it changes any generated token."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

EngineProcess = Literal["auto", "worker", "sidecar"]


class SparkSection(BaseModel):
    """Settings of the Spark connector. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    engine_process: EngineProcess = Field(
        default="auto",
        description="worker: one engine per Python worker; sidecar: one per executor, in a process of its own; "
        "auto: sidecar where tasks are given GPUs, else worker",
    )
    rows_per_chunk: int = Field(default=64, ge=1, description="most rows that go to the engine, and come out, as one")
    tasks: int | Literal["auto"] = Field(
        default="auto", description="engine.backend spark: tasks among which the shards are dealt; auto: one per engine"
    )
    on_speculation: Literal["warn", "refuse", "ignore"] = Field(
        default="warn", description="what to do under spark.speculation=true, which generates rows of slow tasks twice"
    )
    load_timeout_s: float = Field(default=1800.0, gt=0, description="longest time that a sidecar may take to load")
    sidecar_idle_s: float | None = Field(
        default=1800.0, gt=0, description="a sidecar without a task for this long ends; null: only with its executor"
    )
    sidecar_restarts: int = Field(default=2, ge=0, description="times that one task replaces a sidecar that died")
