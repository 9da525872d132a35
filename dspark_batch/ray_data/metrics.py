"""What an actor tells Ray's Prometheus endpoint. Every few seconds and at every commit; nothing is done per token."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from ray.util.metrics import Counter, Gauge

from dspark_batch.batch.live import EngineLoad, LiveCounts
from dspark_batch.batch.results import ShardStats

METRICS_INTERVAL_S = 2.0
TAGS = ("run", "model", "actor")

COMMIT_COUNTERS = {
    "dspark_batch_shard_commits": "Shards committed.",
    "dspark_batch_rows": "Rows committed, failed rows included.",
    "dspark_batch_failed_rows": "Rows committed with an error.",
}
TOKEN_COUNTERS = {
    "dspark_batch_generated_tokens": "Tokens generated.",
    "dspark_batch_drafted_tokens": "Tokens that the drafter proposed.",
    "dspark_batch_accepted_tokens": "Drafted tokens that the target accepted.",
}
GAUGES = {
    "dspark_batch_tokens_per_s": "Tokens generated per second, over the last interval.",
    "dspark_batch_accepted_length": "Tokens generated per row and round, over the last interval.",
    "dspark_batch_running_rows": "Samples that decode together now.",
    "dspark_batch_queued_rows": "Samples in the engine that wait for a place in the batch.",
}
"""Names and descriptions. On the endpoint all names begin with ``ray_``, and those of counters end in ``_total``."""


class ActorMetrics:
    """The metrics of one actor, with its tags. Thread-safe."""

    def __init__(self, *, run: str, model: str, actor: str, clock: Callable[[], float] = time.monotonic) -> None:
        tags = {"run": run, "model": model, "actor": actor}
        counters = COMMIT_COUNTERS | TOKEN_COUNTERS
        self._counters = {name: Counter(name, text, tag_keys=TAGS) for name, text in counters.items()}
        self._gauges = {name: Gauge(name, text, tag_keys=TAGS) for name, text in GAUGES.items()}
        for metric in (*self._counters.values(), *self._gauges.values()):
            metric.set_default_tags(tags)
        self._clock = clock
        self._lock = threading.Lock()
        self._told = LiveCounts()
        self._told_s = clock()

    def note_commit(self, stats: ShardStats) -> None:
        """Count one committed shard."""
        self._count("dspark_batch_shard_commits", 1)
        self._count("dspark_batch_rows", stats.num_rows)
        self._count("dspark_batch_failed_rows", stats.num_failed_rows)

    def update(self, counts: LiveCounts, load: EngineLoad) -> None:
        """Tell what the engine has produced since the last call, and how full it is."""
        with self._lock:
            now_s = self._clock()
            new, elapsed_s = counts - self._told, now_s - self._told_s
            self._told, self._told_s = counts, now_s
        self._count("dspark_batch_generated_tokens", new.num_generated_tokens)
        self._count("dspark_batch_drafted_tokens", new.num_drafted_tokens)
        self._count("dspark_batch_accepted_tokens", new.num_accepted_tokens)
        if elapsed_s > 0:
            self._gauges["dspark_batch_tokens_per_s"].set(new.num_generated_tokens / elapsed_s)
        if new.num_rounds:
            self._gauges["dspark_batch_accepted_length"].set(new.num_generated_tokens / new.num_rounds)
        self._gauges["dspark_batch_running_rows"].set(load.num_running)
        self._gauges["dspark_batch_queued_rows"].set(load.num_queued)

    def _count(self, name: str, value: int) -> None:
        if value > 0:
            self._counters[name].inc(value)
