"""The user's config, completed for DataFrames: input and output may be missing, the prompt may be an argument."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dspark_batch.errors import ConfigError, Problem
from dspark_batch.job.config import ConfigLike, JobConfig

DATAFRAME = "dataframe:"
"""Stands for ``input.path`` and ``output.path`` where rows come from a DataFrame and stay in one."""

DEFAULT_COLUMN = "text"
PROMPT_ARGUMENT = "prompt"
ARGUMENT = "argument"

_MARKERS = ("{{", "{%")


def resolve_config(
    config: ConfigLike,
    *,
    prompt: str | None = None,
    id: str | None = None,
    column: str | None = None,
    overrides: Sequence[str] = (),
    columns_at_hand: Sequence[str] = (),
) -> JobConfig:
    """The validated job of a DataFrame call; the arguments go before what the config says.

    ``prompt`` is a template, or the name of one of ``columns_at_hand``. ``overrides`` are as on the command line
    (``"sampling.seed=1"``). Local paths in it are absolute.

    Raises:
        ConfigError: with every problem found.
    """
    from dspark_batch.job.loader import absolute_paths
    from dspark_batch.job.rows import job_of_sections, sections_of

    values, source = sections_of(config, path=DATAFRAME)
    if prompt is not None:
        section = values.setdefault("prompt", {}) or {}
        template = prompt_template(prompt, columns_at_hand)
        values["prompt"] = {**section, "template": template, "messages": None, "token_ids": None}
    if id is not None:
        values["input"]["id"] = id
    if column is not None:
        values["output"]["column"] = column
    return absolute_paths(job_of_sections(values, source=source, overrides=overrides))


def resolve_column_config(config: ConfigLike, *, overrides: Sequence[str] = ()) -> JobConfig:
    """The job of a function over a prompt column: one result per prompt, rendered as it stands.

    ``prompt.system`` and ``prompt.chat`` hold; a template may read ``prompt`` and nothing else. With ``prompt.messages:
    prompt`` the prompts are conversations. Raises ConfigError.
    """
    from dspark_batch.batch.prompts import prompt_columns
    from dspark_batch.job.loader import read_values

    values = read_values(config)
    section = values.get("prompt") or {}
    if not isinstance(section, Mapping) or (section.get("template") is None and section.get("messages") is None):
        template = "{{ " + PROMPT_ARGUMENT + " }}"
        values["prompt"] = {**(section if isinstance(section, Mapping) else {}), "template": template}
    job = resolve_config(values, column=DEFAULT_COLUMN, overrides=overrides)
    problems = []
    read = set(prompt_columns(job.prompt)) - {PROMPT_ARGUMENT}
    if read:
        names = ", ".join(sorted(read))
        problems.append(
            Problem("prompt", f"reads {names}, but a function's prompt is its argument; use {{{{ prompt }}}} only")
        )
    if job.sampling.n != 1:
        problems.append(
            Problem("sampling.n", f"must be 1 for a function, got {job.sampling.n}; use generate() for more samples")
        )
    if problems:
        raise ConfigError(problems)
    return job


def prompt_template(prompt: str, columns: Sequence[str]) -> str:
    """A template as it is; the name of a column as the template that shows it. Raises ConfigError for anything else."""
    if any(marker in prompt for marker in _MARKERS):
        return prompt
    if prompt in columns:
        return f"{{{{ row[{prompt!r}] }}}}"
    message = (
        f"{prompt!r} is neither a template (such as 'Summarise: {{{{ text }}}}') nor a column; the columns are: "
        f"{', '.join(columns) or 'none'}"
    )
    raise ConfigError([Problem("prompt", message, ARGUMENT)])


def engine_job(job: JobConfig) -> JobConfig:
    """The job as the engine's process needs it: only added columns come back, and no id column is looked for."""
    source = job.input.model_copy(update={"columns": [], "id": None})
    return job.model_copy(update={"input": source})
