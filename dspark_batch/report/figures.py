"""The numbers of a report: totals, cost, and what happened over time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspark_batch.batch.work import EngineWork
    from dspark_batch.job.outcome import Totals
    from dspark_batch.report.records import RunRecords

MILLION = 1_000_000
MAX_BINS = 160
BIN_S = 1.0
"""Shortest bin of a series: engines note what they do once a second at most."""
PAUSE_S = 60.0
"""A time without an engine counts as a pause from here on; pauses are cut out of the time axis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Engine time, and what came out of it. ``price``: of an engine-hour, in whatever currency."""

    engine_s: float
    load_s: float
    num_engines: int
    num_rows: int
    num_tokens: int
    price: float | None = None

    @classmethod
    def of(cls, engines: Sequence[EngineWork], *, num_rows: int, num_tokens: int, price: float | None = None) -> Cost:
        return cls(
            engine_s=sum(engine.engine_s for engine in engines),
            load_s=sum(engine.load_s for engine in engines),
            num_engines=len(engines),
            num_rows=num_rows,
            num_tokens=num_tokens,
            price=price,
        )

    @property
    def engine_hours(self) -> float:
        return self.engine_s / 3600

    def per_million_rows(self, amount: float) -> float | None:
        """What a million rows take of ``amount``; None without rows."""
        return amount * MILLION / self.num_rows if self.num_rows else None

    def per_million_tokens(self, amount: float) -> float | None:
        """What a million generated tokens take of ``amount``; None without tokens."""
        return amount * MILLION / self.num_tokens if self.num_tokens else None


def run_totals(run: RunRecords) -> Totals:
    """Sums over all committed shards."""
    from dspark_batch.job.outcome import Totals

    totals = Totals()
    for entry in run.entries:
        totals.add(entry.stats, shard=entry.shard)
    return totals


@dataclass(frozen=True, slots=True)
class Span:
    """A time without a pause, as UNIX times."""

    begin_s: float
    end_s: float


def spans_of(engines: Sequence[EngineWork], *, pause_s: float = PAUSE_S) -> list[Span]:
    """When engines ran, in order. ``engines``: by the time at which they began."""
    spans: list[Span] = []
    for engine in engines:
        if spans and engine.begin_s < spans[-1].end_s + pause_s:
            spans[-1] = Span(spans[-1].begin_s, max(spans[-1].end_s, engine.end_s))
        else:
            spans.append(Span(engine.begin_s, engine.end_s))
    return spans


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """What all engines did in each of a number of equal bins of the time in which any of them ran.

    Lists have a value for each bin. ``num_engines``: mean number of engines that ran.
    """

    spans: Sequence[Span]
    bin_s: float
    num_engines: list[float]
    num_tokens: list[float]
    num_steps: list[float]
    num_rounds: list[float]
    num_verified_tokens: list[float]
    num_accepted_tokens: list[float]

    @property
    def total_s(self) -> float:
        return self.bin_s * len(self.num_tokens)

    @property
    def tokens_per_s(self) -> list[float | None]:
        return [count / self.bin_s for count in self.num_tokens]

    @property
    def batch_size(self) -> list[float | None]:
        """Samples per step of an engine."""
        return _ratios(self.num_rounds, self.num_steps)

    @property
    def draft_length(self) -> list[float | None]:
        """Drafted tokens that were verified, per sample and round."""
        return _ratios(self.num_verified_tokens, self.num_rounds)

    @property
    def accepted_per_round(self) -> list[float | None]:
        """Drafted tokens that stood, per sample and round."""
        return _ratios(self.num_accepted_tokens, self.num_rounds)

    def cuts(self) -> Iterator[tuple[float, str]]:
        """Where pauses were cut out, in seconds of the axis, and when it went on."""
        passed_s = 0.0
        for span, following in zip(self.spans, self.spans[1:], strict=False):
            passed_s += span.end_s - span.begin_s
            yield passed_s, utc(following.begin_s)


def series_of(engines: Sequence[EngineWork]) -> Series | None:
    """Engines note totals at moments that rise; between two of them they are taken to have worked evenly."""
    import numpy as np

    spans = spans_of(engines)
    total_s = sum(span.end_s - span.begin_s for span in spans)
    if total_s <= 0:
        return None
    num_bins = max(1, min(MAX_BINS, int(total_s / BIN_S)))
    passed = np.cumsum([0.0, *(span.end_s - span.begin_s for span in spans)])
    axis = np.linspace(0.0, total_s, num_bins + 1)
    # A place on the axis lies in the last span that begins at it or before.
    place = np.minimum(np.searchsorted(passed, axis, side="right") - 1, len(spans) - 1)
    moments = np.array([span.begin_s for span in spans])[place] + axis - passed[place]

    def summed(values_of: Any) -> list[float]:
        bins = np.zeros(num_bins)
        for engine in engines:
            times = [time_s for time_s, _ in engine.marks]
            bins += np.diff(np.interp(moments, times, values_of(engine)))
        return [float(value) for value in bins]

    def counted(name: str) -> list[float]:
        return summed(lambda engine: [getattr(counts, name) for _, counts in engine.marks])

    bin_s = total_s / num_bins
    engine_s = summed(lambda engine: [time_s - engine.begin_s for time_s, _ in engine.marks])
    return Series(
        spans=spans,
        bin_s=bin_s,
        num_engines=[seconds / bin_s for seconds in engine_s],
        num_tokens=counted("num_generated_tokens"),
        num_steps=counted("num_steps"),
        num_rounds=counted("num_rounds"),
        num_verified_tokens=counted("num_verified_tokens"),
        num_accepted_tokens=counted("num_accepted_tokens"),
    )


def acceptance(engines: Sequence[EngineWork]) -> list[tuple[int, int]]:
    """Verified and accepted tokens of each draft position, over all engines."""
    longest = max((len(engine.by_position) for engine in engines), default=0)
    padded = [[*engine.by_position, *[(0, 0)] * (longest - len(engine.by_position))] for engine in engines]
    return [(sum(v for v, _ in pairs), sum(a for _, a in pairs)) for pairs in zip(*padded, strict=True)]


def utc(time_s: float) -> str:
    """``2026-11-29 07:10`` in UTC."""
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M")


def _ratios(counts: Sequence[float], per: Sequence[float]) -> list[float | None]:
    return [count / base if base > 1e-9 else None for count, base in zip(counts, per, strict=True)]
