"""What decides the output of a run, so that two runs with one fingerprint may share an output folder."""

from __future__ import annotations

import json

from dspark_batch.batch.schema import ROW_CONTRACT_VERSION
from dspark_batch.job.config import JobConfig
from dspark_batch.provenance import fingerprint


def fingerprint_fields(
    config: JobConfig, *, weights_fingerprint: str, input_digest: str | None = None
) -> dict[str, object]:
    """The fields that a run's fingerprint covers, by dotted config name.

    Coupled verification makes the output independent of drafter, schedule, batch, backend and shard size, so none of
    them is covered; in the token and block modes the draft takes part in the draw, and the speculation section is.
    What ``model.dtype: auto`` comes to is settled by the run's first engine (``agreement.py``).

    Args:
        weights_fingerprint: identity of the target's weights; its name and path do not count.
        input_digest: identity of the input's content (``Plan.digest``).
    """
    fields: dict[str, object] = {
        "row_contract": ROW_CONTRACT_VERSION,
        "task": config.task,
        "model.weights": weights_fingerprint,
        "model.dtype": config.model.dtype,
        "engine.max_context": config.engine.max_context,
        "speculation.verification": "coupled",
        "input.content": input_digest,
        "output.column": config.output.column,
        "output.token_ids": config.output.token_ids,
        "output.format": config.output.format,
        "output.table": config.output.table,
    }
    if config.output.prefix:
        fields["output.prefix"] = config.output.prefix
    section = config.input.model_dump(mode="json", exclude={"catalog", "version"})
    fields |= {f"input.{name}": value for name, value in section.items()}
    fields |= {f"prompt.{name}": value for name, value in config.prompt.model_dump(mode="json").items()}
    fields |= {f"sampling.{name}": value for name, value in config.sampling.model_dump(mode="json").items()}
    if config.task == "extract":
        # As text, since the order of its properties is that of the column's fields.
        fields["sampling.json_schema"] = json.dumps(config.sampling.json_schema)
    if config.speculation.verification != "coupled":
        fields |= {f"speculation.{name}": value for name, value in config.speculation.model_dump(mode="json").items()}
    return fields


def run_fingerprint(config: JobConfig, *, weights_fingerprint: str, input_digest: str | None = None) -> str:
    """SHA-256 (hex) of ``fingerprint_fields``."""
    return fingerprint(fingerprint_fields(config, weights_fingerprint=weights_fingerprint, input_digest=input_digest))
