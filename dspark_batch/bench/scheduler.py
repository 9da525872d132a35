"""``dspark-batch bench scheduler``: does ``schedule: auto`` reach the best fixed length everywhere?

One loaded model, and settings that take turns step by step: plain decoding, fixed lengths, auto. Three questions:

- points: a constant number of rows that decode together (a run has exactly as many rows as its concurrency, all of the
  same length). Auto's policy lives on between the runs of one concurrency, as it does in a long job, after some seconds
  that are not counted; with ``cold`` every run starts with a new one;
- job: a whole table with rows of different lengths, all there from the start, a new policy for each run: from the first
  prompt through the full batch to the draining tail;
- mixed: such a job whose rows differ: half repeat code of their prompt, half are open chat.

Drafters start empty in every run, and later repeats take further prompts of the file, round and round. Fixed lengths
beyond what the drafter drafts are the same work: they share their runs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark_batch.bench.measure import Measurement, Setting, measure, measure_in_turns
from dspark_batch.bench.prompts import read_prompts, with_sampling
from dspark_batch.bench.throughput import commit_of_checkout
from dspark_batch.core import Request, SamplingParams
from dspark_batch.engine.config import EngineConfig
from dspark_batch.errors import ConfigError, InputError, Problem
from dspark_batch.metrics import PlanReason
from dspark_batch.provenance import device_facts, versions

if TYPE_CHECKING:
    from rich.table import Table

    from dspark_batch.models.loader import LoadedTarget
    from dspark_batch.scheduling.policies import LengthPolicy, RoundLoad, RoundOutcome
    from dspark_batch.tensors import DraftBlock, VerifyPlan

PLAIN = "plain"
AUTO = "auto"
BUILT_IN_PROMPTS = Path(__file__).parents[2] / "configs" / "data" / "schedule_prompts.jsonl"
_NUM_BUILT_IN_CHATS = 32
_CHEAP_CONCURRENCY = 8
_CHEAP_RUNS = 6
_JOB_RUNS = 3
_SHORT = SamplingParams(max_new_tokens=8, ignore_eos=True)
_LENGTH_CYCLE = (0.25, 1.0, 0.5, 1.5, 0.25, 3.0, 0.5, 1.0)
"""Output lengths of a job's rows, as shares of ``max_new_tokens``; their mean is 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to run. prompts: None: the built-in set. Runs of up to 8 rows are short and noisy: six per repeat, of the
    jobs three.

    job_rows: rows of the two jobs, which ``has_jobs`` leaves out; None: twice their concurrency. warm_up_s:
    decoding by which auto learns each concurrency before it is measured. cold: see the module.
    """

    engine: EngineConfig
    prompts: Path | None = None
    concurrencies: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    lengths: tuple[int, ...] = (1, 2, 3, 5, 7)
    repeats: int = 3
    max_new_tokens: int = 32
    job_concurrency: int = 16
    job_rows: int | None = None
    has_jobs: bool = True
    warm_up_s: float = 6.0
    cold: bool = False

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ConfigError([Problem("--lengths", f"must be positive, got {list(self.lengths)}", "command line")])

    @property
    def settings(self) -> tuple[str, ...]:
        return (PLAIN, AUTO, *(str(length) for length in self.lengths))

    @property
    def num_job_rows(self) -> int:
        return self.job_rows or 2 * self.job_concurrency

    def repeats_at(self, concurrency: int) -> int:
        return self.repeats * (_CHEAP_RUNS if concurrency <= _CHEAP_CONCURRENCY else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All settings on the same rows. runs[setting][i]: repeat i; rows of a repeat are the same for all settings."""

    concurrency: int
    num_rows: int
    runs: dict[str, tuple[Measurement, ...]]

    def tokens_per_s(self, setting: str) -> float:
        """Median over the repeats."""
        return statistics.median(run.tokens_per_s for run in self.runs[setting])

    def ratio(self, setting: str, *, to: str) -> float:
        """Median over the repeats of the ratio within a repeat."""
        pairs = zip(self.runs[setting], self.runs[to], strict=True)
        return statistics.median(ours.tokens_per_s / theirs.tokens_per_s for ours, theirs in pairs)

    @property
    def best_fixed(self) -> str:
        """The fastest setting that does not adapt, plain decoding (length 0) included."""
        return max((name for name in self.runs if name != AUTO), key=self.tokens_per_s)

    def as_dict(self) -> dict[str, Any]:
        fixed = {name: self.tokens_per_s(name) for name in self.runs if name not in (PLAIN, AUTO)}
        return {
            "concurrency": self.concurrency,
            "num_rows": self.num_rows,
            "plain": self.tokens_per_s(PLAIN),
            "auto": self.tokens_per_s(AUTO),
            "fixed": fixed,
            "best_fixed": "0" if self.best_fixed == PLAIN else self.best_fixed,
            "auto_to_best_fixed": self.ratio(AUTO, to=self.best_fixed),
            "auto_to_plain": self.ratio(AUTO, to=PLAIN),
            "runs": {name: [_brief(run) for run in runs] for name, runs in self.runs.items()},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """points: by concurrency. job, mixed: None where they were left out."""

    plan: Plan
    points: tuple[Comparison, ...]
    job: Comparison | None
    mixed: Comparison | None

    def as_dict(self) -> dict[str, Any]:
        plan = {f.name: getattr(self.plan, f.name) for f in fields(self.plan)}
        plan |= {"engine": self.plan.engine.model_dump(mode="json")}
        return {
            "points": [point.as_dict() for point in self.points],
            "job": self.job.as_dict() if self.job else None,
            "mixed": self.mixed.as_dict() if self.mixed else None,
            "plan": {**plan, "prompts": str(self.plan.prompts or BUILT_IN_PROMPTS)},
            "versions": versions(),
            "device": asdict(device_facts()),
            "commit": commit_of_checkout(),
        }

    def table(self) -> Table:
        """For a terminal: tokens per second."""
        from rich.table import Table

        table = Table("rows", *self.plan.settings, "auto/best fixed", "auto/plain", title="tokens/s by schedule")
        named = [(str(point.concurrency), point) for point in self.points]
        named += [(name, found) for name, found in (("job", self.job), ("mixed", self.mixed)) if found]
        for name, found in named:
            best = "0" if found.best_fixed == PLAIN else found.best_fixed
            table.add_row(
                name,
                *(f"{found.tokens_per_s(setting):.1f}" for setting in self.plan.settings),
                f"{found.ratio(AUTO, to=found.best_fixed):.3f} ({best})",
                f"{found.ratio(AUTO, to=PLAIN):.3f}",
            )
        return table


def run_scheduler_bench(
    plan: Plan, *, loaded: LoadedTarget | None = None, tell: Callable[[str], None] | None = None
) -> Report:
    """Load the target once and measure. ``tell`` is given a line after every run.

    Raises:
        ConfigError, ModelError, InputError: engine settings, checkpoint or prompt file cannot be used.
        ValueError: a prompt failed.
    """
    import torch

    from dspark_batch.models.loader import load_target

    if isinstance(plan.engine.threads, int):
        torch.set_num_threads(plan.engine.threads)
    bench = _Bench(plan, loaded or load_target(plan.engine), tell=tell or (lambda line: None))
    chats, code = _prompts(plan)
    points = tuple(bench.point(concurrency, chats) for concurrency in plan.concurrencies)
    job = mixed = None
    if plan.has_jobs:
        job = bench.job("job", chats)
        mixed = bench.job("mixed", _in_turns(chats, code), kinds=2) if code else None
    return Report(plan=plan, points=points, job=job, mixed=mixed)


class _Bench:
    def __init__(self, plan: Plan, loaded: LoadedTarget, *, tell: Callable[[str], None]) -> None:
        from dspark_batch.engine.drafter_factory import make_drafter

        self._plan = plan
        self._loaded = loaded
        self._tell = tell
        config = plan.engine.model_copy(update={"schedule": "fixed"})
        drafter = make_drafter(config, loaded.target, target_fingerprint=loaded.fingerprint)
        self._max_draft_tokens = drafter.max_draft_tokens

    def point(self, concurrency: int, requests: list[Request]) -> Comparison:
        """Constant rows. Prompts of one repeat are the same for all settings."""
        plan = self._plan
        sampling = SamplingParams(max_new_tokens=plan.max_new_tokens, ignore_eos=True)
        lasting = None if plan.cold else LastingPolicy(self._policy(AUTO))
        self._warm_up(concurrency, requests, sampling, lasting)
        repeats = [
            with_sampling(requests, sampling, first=(repeat + 1) * concurrency, count=concurrency)
            for repeat in range(plan.repeats_at(concurrency))
        ]
        return self._compare(str(concurrency), concurrency, repeats, lasting)

    def _warm_up(
        self, concurrency: int, requests: list[Request], sampling: SamplingParams, lasting: LastingPolicy | None
    ) -> None:
        """Runs that do not count: a short one of each setting for kernels, more of auto for what it has to learn, on
        prompts from the end of the file; the same ones again would teach it their own chances."""
        short = with_sampling(requests, _SHORT, first=0, count=concurrency)
        for name in self._plan.settings:
            measure(self._loaded, self._setting(name, concurrency, lasting), short)
        spent_s, first = 0.0, len(requests)
        while lasting is not None and spent_s < self._plan.warm_up_s:
            first = (first - concurrency) % len(requests)
            rows = with_sampling(requests, sampling, first=first, count=concurrency)
            spent_s += measure(self._loaded, self._setting(AUTO, concurrency, lasting), rows).wall_s

    def job(self, name: str, requests: list[Request], *, kinds: int = 1) -> Comparison:
        """A whole job of rows of different lengths, with new policies; ``kinds`` of rows take turns in it."""
        plan = self._plan
        repeats = []
        for repeat in range(plan.repeats * _JOB_RUNS):
            rows = with_sampling(requests, SamplingParams(), first=repeat * plan.num_job_rows, count=plan.num_job_rows)
            repeats.append([_with_length(row, plan.max_new_tokens, n // kinds) for n, row in enumerate(rows)])
        return self._compare(name, plan.job_concurrency, repeats, None)

    def _compare(
        self, name: str, concurrency: int, repeats: Sequence[list[Request]], lasting: LastingPolicy | None
    ) -> Comparison:
        settings = self._plan.settings
        works = list(dict.fromkeys(self._work_of(setting) for setting in settings))
        runs: dict[str, list[Measurement]] = {setting: [] for setting in settings}
        for number, requests in enumerate(repeats):
            found = measure_in_turns(
                self._loaded, [self._setting(work, concurrency, lasting) for work in works], requests
            )
            of_work = dict(zip(works, found, strict=True))
            for work, run in of_work.items():
                self._tell(f"{name}, repeat {number + 1}, {work}: {run.tokens_per_s:.1f} tokens/s")
            for setting in settings:
                runs[setting].append(of_work[self._work_of(setting)])
        return Comparison(
            concurrency=concurrency,
            num_rows=len(repeats[0]),
            runs={setting: tuple(found) for setting, found in runs.items()},
        )

    def _work_of(self, setting: str) -> str:
        """The setting that does the same: a fixed length is at most what the drafter drafts."""
        return setting if setting in (PLAIN, AUTO) else str(min(int(setting), self._max_draft_tokens))

    def _setting(self, name: str, concurrency: int, lasting: LastingPolicy | None) -> Setting:
        config = self._plan.engine.model_copy(update={"max_concurrency": concurrency})
        if name == PLAIN:
            return Setting(config=config.model_copy(update={"drafter": "none", "schedule": "off"}))
        if name == AUTO and lasting is not None:
            lasting.begin()
            return Setting(config=config, policy=lasting)
        return Setting(config=config, policy=self._policy(name))

    def _policy(self, setting: str) -> LengthPolicy:
        from dspark_batch.engine.drafter_factory import make_drafter
        from dspark_batch.engine.policy_factory import make_policy
        from dspark_batch.scheduling.policies import FixedLength

        if setting != AUTO:
            return FixedLength(int(setting))
        config = self._plan.engine.model_copy(update={"schedule": "auto"})
        drafter = make_drafter(config, self._loaded.target, target_fingerprint=self._loaded.fingerprint)
        return make_policy(config, drafter, self._loaded.target, target_fingerprint=self._loaded.fingerprint)


class LastingPolicy:
    """A ``LengthPolicy`` for several engines one after the other: gives their rows handles that never come twice."""

    def __init__(self, inner: LengthPolicy) -> None:
        self.inner = inner
        self._first = 0
        self._next = 0

    def begin(self) -> None:
        """Another engine, whose handles start at 0."""
        self._first = self._next

    @property
    def reason(self) -> PlanReason:
        return self.inner.reason

    def draft_lengths(self, load: RoundLoad) -> Sequence[int]:
        return self.inner.draft_lengths(self._renamed(load))

    def verify_plan(self, load: RoundLoad, draft: DraftBlock) -> VerifyPlan:
        return self.inner.verify_plan(self._renamed(load), draft)

    def observe(self, load: RoundLoad, outcome: RoundOutcome) -> None:
        self.inner.observe(self._renamed(load), outcome)

    def _renamed(self, load: RoundLoad) -> RoundLoad:
        handles = [self._first + handle for handle in load.handles]
        self._next = max(self._next, *(handle + 1 for handle in handles)) if handles else self._next
        return replace(load, handles=handles)


def built_in_prompts() -> list[Request]:
    """Open chats and code that is asked for again, in turns; the fewer go round.

    Raises:
        InputError: the file is not there.
    """
    return _in_turns(*_kinds_of_built_in())


def _prompts(plan: Plan) -> tuple[list[Request], list[Request]]:
    """The prompts of points and job, and those whose answers repeat them (none where the built-in file is missing).

    Raises:
        InputError: a file cannot be read.
    """
    if plan.prompts is None:
        return _kinds_of_built_in()
    code = _kinds_of_built_in()[1] if BUILT_IN_PROMPTS.is_file() else []
    return read_prompts(plan.prompts), code


def _kinds_of_built_in() -> tuple[list[Request], list[Request]]:
    if not BUILT_IN_PROMPTS.is_file():
        raise InputError(f"{BUILT_IN_PROMPTS}: is not part of an installed package; give a file with --prompts")
    requests = read_prompts(BUILT_IN_PROMPTS)
    return requests[:_NUM_BUILT_IN_CHATS], requests[_NUM_BUILT_IN_CHATS:]


def _in_turns(first: Sequence[Request], second: Sequence[Request]) -> list[Request]:
    """One of each, until all of both have had their turn; the shorter goes round."""
    count = max(len(first), len(second))
    pairs = ((first[number % len(first)], second[number % len(second)]) for number in range(count))
    return [request for pair in pairs for request in pair]


def _with_length(request: Request, mean: int, number: int) -> Request:
    length = max(1, round(mean * _LENGTH_CYCLE[number % len(_LENGTH_CYCLE)]))
    return replace(request, sampling=SamplingParams(max_new_tokens=length, ignore_eos=True))


def _brief(run: Measurement) -> dict[str, Any]:
    names = ("wall_s", "draft_s", "tail_s", "num_steps", "num_drafted_tokens", "num_verified_draft_tokens")
    found = run.as_dict()
    return {name: found[name] for name in ("tokens_per_s", *names, "num_accepted_tokens")}
