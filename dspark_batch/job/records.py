"""``_dspark/metrics.jsonl``: one line per process of a run, for reports and for cost accounting."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime

from dspark_batch.job.summary import Finished
from dspark_batch.provenance import DeviceFacts, versions

METRICS_FILE = "metrics.jsonl"


def append_metrics(finished: Finished, *, device: DeviceFacts) -> None:
    """Add the line of this process: its totals and those of the whole run. Raises OutputError."""
    run = finished.run
    record = {
        "kind": "run",
        "run_id": run.store.run_id,
        "fingerprint": run.fingerprint,
        "finished_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "elapsed_s": round(finished.elapsed_s, 3),
        "ending": finished.ending.value,
        "backend": run.config.engine.backend,
        "num_actors": run.config.ray.actors.max,
        "done": asdict(finished.done),
        "whole": asdict(finished.whole),
        "device": asdict(device),
        "versions": versions(),
    }
    before = run.store.read_meta(METRICS_FILE) or ""
    run.store.write_meta(METRICS_FILE, before + json.dumps(record, sort_keys=True) + "\n")
