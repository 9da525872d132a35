"""How tokens are drawn, as it stands in YAML."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from dspark_batch.core import Constraint, SamplingParams

_CONSTRAINTS: tuple[Literal["choices", "json_schema", "regex", "grammar"], ...] = (
    "choices",
    "json_schema",
    "regex",
    "grammar",
)


class SamplingSection(BaseModel):
    """Sampling, under the names of ``SamplingParams``, and at most one constraint. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    n: int = 1
    stop: list[str] = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list)
    ignore_eos: bool = False
    logprobs: int | None = None
    choices: list[str] | None = Field(default=None, description="the text is one of these")
    json_schema: dict[str, Any] | None = Field(default=None, description="the text is JSON of this schema")
    regex: str | None = Field(default=None, description="the whole text matches it")
    grammar: str | None = Field(default=None, description="the text is the `start` of this Lark grammar")

    @model_validator(mode="after")
    def _in_range(self) -> SamplingSection:
        given = [name for name in _CONSTRAINTS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"at most one of {', '.join(f'sampling.{name}' for name in given)} can be set")
        if self.choices is not None and not (self.choices and all(self.choices)):
            raise ValueError(f"sampling.choices must name at least one text, and no empty one, got {self.choices}")
        if self.choices is not None and len(set(self.choices)) < len(self.choices):
            raise ValueError(f"sampling.choices must differ from each other, got {self.choices}")
        for name in ("regex", "grammar"):
            if getattr(self, name) == "":
                raise ValueError(f"sampling.{name} must not be empty; null: the text is free")
        problems = []
        try:
            self.to_params()
        except ValueError as error:
            problems.append(str(error))
        if (constraint := self.constraint()) is not None:
            from dspark_batch.sampling.constraints import problem_of

            if (problem := problem_of(constraint)) is not None:
                problems.append(f"sampling.{constraint.kind} cannot be followed: {problem}")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @model_serializer(mode="wrap")
    def _without_unset_constraints(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A section without a constraint reads as it did before there were any: runs that exist can go on."""
        values: dict[str, Any] = dump(self)
        return {name: value for name, value in values.items() if name not in _CONSTRAINTS or value is not None}

    def constraint(self) -> Constraint | None:
        """What the text has to be, if anything."""
        for kind in _CONSTRAINTS:
            value = getattr(self, kind)
            if value is not None:
                return Constraint(kind, value if isinstance(value, str) else json.dumps(value))
        return None

    def to_fields(self) -> dict[str, Any]:
        """The values by name as ``SamplingParams`` takes them, lists as tuples."""
        values = {name: value for name, value in self.model_dump().items() if name not in _CONSTRAINTS}
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return {**fields, "constraint": self.constraint()}

    def to_params(self) -> SamplingParams:
        """The same values as the engine takes them. Raises ValueError that names the field."""
        return SamplingParams(**self.to_fields())
