"""``run_table``: a whole Spark table through a job and back, in three stages that each can be interrupted."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pyspark.sql.types import StructType

from dspark_batch.batch.commit import RunStore
from dspark_batch.batch.fingerprint import fingerprint_fields
from dspark_batch.errors import ConfigError, EngineError, FingerprintMismatchError, OutputError, Problem
from dspark_batch.job.config import ConfigLike, JobConfig
from dspark_batch.provenance import differences
from dspark_batch.spark.jobs import resolve_config
from dspark_batch.spark.staging import (
    Stages,
    StagingFolder,
    check_types,
    microsecond_timestamps,
    without_not_null,
)
from dspark_batch.spark.transform import output_schema

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

INPUT = "input"
OUTPUT = "output"
JOB_FILE = "job.yaml"

TableBackend = Literal["ray", "spark"]
IfExists = Literal["error", "overwrite"]


def run_table(
    spark: SparkSession,
    source: str | DataFrame,
    target: str,
    config: ConfigLike,
    *,
    staging: str,
    backend: TableBackend = "ray",
    prompt: str | None = None,
    id: str | None = None,
    column: str | None = None,
    overrides: Sequence[str] = (),
    if_exists: IfExists = "error",
    ray_job_address: str | None = None,
) -> DataFrame:
    """Generate for every row of a table and save the result as another; for jobs too large for a query's tasks.

    The source is written to ``staging`` as Parquet, a job runs over it there (with shards, manifest and resume), and
    its result becomes the table ``target``. The same call again goes on where it was interrupted: a staged input and
    committed shards are not done again, and a landed target is only read; one that was dropped since is landed again.
    The staged rows are those of the first call.

    Args:
        source: a table's name, or a DataFrame.
        staging: a folder or URI that Spark, this process and the job's workers reach; one per run.
        backend: ray runs the job on the cluster of ``ray.address`` or a local one; spark runs it in this session.
        prompt, id, column, overrides: as in ``generate``. Without an id, a row's place in the staged files keys its
            draws.
        if_exists: what to do when ``target`` exists before the first landing.
        ray_job_address: submit the job there (``ray job submit``) instead of driving it from this process.

    Raises:
        ConfigError: the config or a column's type is wrong, or ``target`` exists.
        OutputError: ``staging`` belongs to another source or target, or was begun with another prompt, model or other
            settings that decide the rows (FingerprintMismatchError), or the result could not be saved.
        EngineError: the job did not finish; its message says why. Calling again resumes.
    """
    frame = spark.table(source) if isinstance(source, str) else source
    check_types(frame.schema)
    job = resolve_config(
        config, prompt=prompt, id=id, column=column, overrides=overrides, columns_at_hand=frame.columns
    )
    declared = output_schema(frame.schema, job)
    folder = StagingFolder(staging)
    staged_job = _staged_job(job, folder=folder, backend=backend)
    stages = _begin(folder, source=source, target=target, schema=frame.schema, job=staged_job)
    if not stages.is_landed and not stages.is_landing and if_exists == "error" and spark.catalog.tableExists(target):
        message = f"{target!r} exists already; use if_exists='overwrite', or another name"
        raise ConfigError([Problem("target", message, "argument")])
    if stages.is_landed and spark.catalog.tableExists(target):
        return spark.table(target)
    if not stages.is_staged:
        stages = _stage(spark, frame, folder=folder, stages=stages)
    _run(staged_job, ray_job_address=ray_job_address)
    _land(spark, folder=folder, stages=stages, declared=declared)
    return spark.table(target)


def _begin(
    folder: StagingFolder, *, source: str | DataFrame, target: str, schema: StructType, job: JobConfig
) -> Stages:
    wanted = Stages(
        source=source if isinstance(source, str) else "DataFrame",
        target=target,
        schema=schema.json(),
        settings=_settings(job),
    )
    known = folder.load()
    if known is None:
        return wanted
    different = [name for name in ("source", "target", "schema") if getattr(known, name) != getattr(wanted, name)]
    if different:
        raise OutputError(
            f"staging folder {folder.root} was begun with another {', '.join(different)} "
            f"(from {known.source} to {known.target}); use another staging folder"
        )
    changed = differences(known.settings, wanted.settings)
    if changed:
        raise FingerprintMismatchError(
            f"staging folder {folder.root} was begun with other settings:\n"
            + "\n".join(changed)
            + "\nuse another staging folder (and if_exists='overwrite' for the same target), or restore these settings"
        )
    return known


def _settings(job: JobConfig) -> dict[str, object]:
    """What decides the rows. A model counts by its name, as its files may lie where only the workers see them."""
    fields = fingerprint_fields(job, weights_fingerprint="")
    del fields["model.weights"]
    return {**fields, "model.target": job.model.target, "model.revision": job.model.revision}


def _stage(spark: SparkSession, frame: DataFrame, *, folder: StagingFolder, stages: Stages) -> Stages:
    with microsecond_timestamps(spark):
        frame.write.mode("overwrite").parquet(folder.for_spark(INPUT))
    staged = replace(stages, is_staged=True)
    folder.save(staged)
    return staged


def _staged_job(job: JobConfig, *, folder: StagingFolder, backend: TableBackend) -> JobConfig:
    """The files in between are always Parquet, whatever the config says of its own input and output.

    A job in which some rows failed ends with 0, as Ray takes any other code for a job that failed.
    """
    source = job.input.model_copy(update={"path": folder.for_arrow(INPUT), "format": "parquet", "catalog": None})
    plain = {"mode": "resume", "format": "parquet", "table": None, "catalog": None}
    output = job.output.model_copy(update={"path": folder.for_arrow(OUTPUT), **plain})
    engine = job.engine.model_copy(update={"backend": backend})
    limits = job.limits.model_copy(update={"exit_code_on_failed_rows": 0})
    return job.model_copy(update={"input": source, "output": output, "engine": engine, "limits": limits})


def _run(job: JobConfig, *, ray_job_address: str | None) -> None:
    from dspark_batch.job.loader import dump_config
    from dspark_batch.job.runner import run_job

    if ray_job_address is not None:
        with tempfile.TemporaryDirectory(prefix="dspark-batch-") as working_dir:
            (Path(working_dir) / JOB_FILE).write_text(dump_config(job), encoding="utf-8")
            submit_ray_job(working_dir, address=ray_job_address)
        return
    outcome = run_job(job)
    if not outcome.is_success:
        raise EngineError(f"the job ended with status {int(outcome.code)}: {outcome.text}")


def submit_ray_job(
    working_dir: str, *, address: str, run: Callable[..., subprocess.CompletedProcess[Any]] = subprocess.run
) -> None:
    """Run the job file in ``working_dir`` on a Ray cluster and wait. Raises EngineError when it fails."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", address]
    command += ["--working-dir", working_dir, "--", "dspark-batch", "run", JOB_FILE]
    done = run(command, check=False)
    if done.returncode != 0:
        raise EngineError(
            f"ray job submit to {address} ended with status {done.returncode}; its output says why. "
            "Run the same call again to resume"
        )


def _land(spark: SparkSession, *, folder: StagingFolder, stages: Stages, declared: StructType) -> None:
    """From here on the target is this run's own, so that an interrupted landing is simply done again.

    The table is made empty and filled then. Made with its rows at once, a landing that dies leaves files that belong to
    no table, and Spark refuses to write over them.
    """
    entries = RunStore(folder.for_arrow(OUTPUT)).committed(verify_checksums=False)
    folder.save(replace(stages, is_landing=True))
    files = [folder.for_spark(f"{OUTPUT}/{entries[name].file}") for name in sorted(entries)]
    rows = spark.read.schema(declared).parquet(*files) if files else spark.createDataFrame([], declared)
    _make_table(spark, stages.target, without_not_null(declared))
    rows.write.insertInto(stages.target, overwrite=True)
    folder.save(replace(stages, is_landing=True, is_landed=True))


def _make_table(spark: SparkSession, target: str, schema: StructType) -> None:
    """A table with these columns, of the session's own format; one that has them already stays as it is."""
    if spark.catalog.tableExists(target):
        if spark.table(target).schema.simpleString() == schema.simpleString():
            return
        spark.sql(f"DROP TABLE {target}")
    spark.catalog.createTable(target, schema=schema)
