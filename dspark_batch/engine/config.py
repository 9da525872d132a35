"""Settings of the engine. Pydantic only: importing this loads neither torch nor a model."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Auto = Literal["auto"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
DrafterName = Literal["auto", "dspark", "draft_model", "hybrid", "suffix", "ngram", "none"]
VerificationMode = Literal["coupled", "token", "block"]
ScheduleName = Literal["auto", "fixed", "threshold", "off"]


class EngineConfig(BaseModel):
    """Everything a ``BatchEngine`` needs to know. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: str = Field(default="smollm2-135m", description="embedded name, local path or hub id of the target model")
    revision: str | None = Field(default=None, description="hub revision; only for hub ids")
    dtype: DType = Field(default="auto", description="auto: bfloat16 where the device computes in it, else float32")
    device: Device = Field(default="auto", description="auto: the first CUDA device where there is one, else the CPU")

    drafter: DrafterName = Field(default="auto", description="who proposes tokens; auto picks the best for the target")
    drafter_path: str | None = Field(default=None, description="checkpoint of a dspark, hybrid or draft_model drafter")
    verification: VerificationMode = Field(default="coupled", description="coupled: output equals plain decoding")
    schedule: ScheduleName = Field(default="auto", description="how draft and verify lengths are chosen")
    max_draft_tokens: int | None = Field(default=None, ge=1, le=64, description="γ; None: the drafter's own")

    max_concurrency: int | Auto = Field(default="auto", description="rows decoded together")
    max_step_tokens: int = Field(default=2048, ge=16, description="flat tokens per forward; bounds prefill chunks")
    max_context: int | None = Field(default=None, ge=2, description="prompt plus output tokens; None: the model's own")
    kv_cache_gib: float | Auto = Field(default="auto", description="memory for keys and values")
    threads: int | Auto = Field(default="auto", description="CPU threads for the model")
    share_prefixes: bool = Field(default=True, description="compute a prompt prefix that rows share once")
    poison_dead_kv: bool = Field(default=False, description="fill dead KV with NaN after every round (tests)")
