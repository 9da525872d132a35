"""The one small actor that the driver and the shard actors talk through: stop, faults, and a bound on restarts."""

from __future__ import annotations

from dataclasses import dataclass

from dspark_batch.batch.faults import FaultLog, Trial
from dspark_batch.batch.live import LiveCounts
from dspark_batch.errors import ConfigError, Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What ended the job inside an actor: the exception's class by name, its message, a ConfigError's problems."""

    kind: str
    message: str
    problems: tuple[Problem, ...] = ()

    @classmethod
    def of(cls, error: Exception) -> Failure:
        problems = error.problems if isinstance(error, ConfigError) else ()
        return cls(kind=type(error).__name__, message=str(error), problems=problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The failure that ended the job, if any, whether a shard has begun, what all engines have produced, those that
    ended included, and what they warned of."""

    failure: Failure | None
    has_begun: bool
    live: LiveCounts
    warnings: tuple[str, ...]


class JobControl(FaultLog):
    """State of one run, kept in a Ray actor. It dies with the driver.

    An engine fault ends the actor's process and Ray starts another, without end if need be; ``FaultLog`` says where it
    ends, and the run then counts as failed.
    """

    def __init__(self, *, num_actors: int) -> None:
        super().__init__(num_engines=num_actors)
        self._failure: Failure | None = None
        self._stopping = False
        self._has_begun = False
        self._live: dict[str, LiveCounts] = {}

    def begin_worker(self) -> bool:
        """An actor starts. False: it must not, since the starts before it came to nothing."""
        self.begin_engine()
        return self._goes_on()

    def begin_shard(self, shard: str) -> Trial | None:
        """How an actor tries its next shard; None where it must not begin any."""
        if self._stopping:
            return None
        trial = self.begin(shard)
        self._has_begun = True
        return trial if self._goes_on() else None

    def fail(self, failure: Failure) -> None:
        """The job cannot go on. The first failure is kept."""
        if self._failure is None:
            self._failure = failure

    def stop(self) -> bool:
        """Begin no further shard; whether any has begun."""
        self._stopping = True
        return self._has_begun

    def note_live(self, worker: str, counts: LiveCounts) -> None:
        """What an actor's engine has produced so far; replaces what it told before."""
        self._live[worker] = counts

    def status(self) -> Status:
        """What the driver asks for several times a second."""
        live = sum(self._live.values(), start=LiveCounts())
        return Status(failure=self._failure, has_begun=self._has_begun, live=live, warnings=tuple(self.warnings))

    def _goes_on(self) -> bool:
        if self.end_reason is not None:
            self.fail(Failure(kind="EngineError", message=self.end_reason))
        return self._failure is None
