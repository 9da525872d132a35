"""``BatchEngine``: continuous batching with speculative decoding over one target on one device."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from types import TracebackType
from typing import Protocol, Self

from dspark_batch.core import ErrorCode, Request, Result, RowError
from dspark_batch.drafters.base import Drafter
from dspark_batch.engine.admission import Admission, check_prompt
from dspark_batch.engine.choices import ChoiceTrees
from dspark_batch.engine.config import EngineConfig
from dspark_batch.engine.drafter_factory import make_drafter, make_verifier
from dspark_batch.engine.policy_factory import make_policy
from dspark_batch.engine.prefixes import PrefixPool
from dspark_batch.engine.state import RowState
from dspark_batch.engine.step import StepRunner
from dspark_batch.engine.text import Codec, prompt_tokens
from dspark_batch.errors import ConfigError, EngineError, Problem
from dspark_batch.metrics import EngineStats
from dspark_batch.sampling.constraints import Constraints
from dspark_batch.scheduling.policies import LengthPolicy
from dspark_batch.tensors import Target

AUTO_CONCURRENCY = {"cpu": 64, "cuda": 256}


class ServedTarget(Protocol):
    """What the engine needs of a loaded checkpoint; ``models.loader.LoadedTarget`` fulfils it."""

    @property
    def target(self) -> Target: ...

    @property
    def codec(self) -> Codec | None: ...

    @property
    def eos_token_ids(self) -> Collection[int]: ...

    @property
    def fingerprint(self) -> str: ...


class BatchEngine:
    """Decodes any number of requests, at most ``max_concurrency`` samples at a time. Not thread-safe.

    Either drive it with ``add`` and ``step``, or hand it requests with ``generate`` or ``stream``. A row that cannot be
    generated comes back as a result with an error and never disturbs the others; after an ``EngineError`` the engine is
    dead.

    Raises:
        ConfigError: a setting names a part that this version does not have, or contradicts the model.
    """

    def __init__(
        self,
        loaded: ServedTarget,
        config: EngineConfig,
        *,
        drafter: Drafter | None = None,
        policy: LengthPolicy | None = None,
    ) -> None:
        target = loaded.target
        self._target = target
        self.target_fingerprint = loaded.fingerprint
        self.device = target.device.type
        self._poison_dead_kv = config.poison_dead_kv
        self._codec = loaded.codec
        self._max_context = _max_context(config, target)
        self._drafter = drafter or make_drafter(config, target, target_fingerprint=loaded.fingerprint)
        concurrency = config.max_concurrency
        if concurrency == "auto":
            concurrency = AUTO_CONCURRENCY[target.device.type]
        self._max_concurrency = min(concurrency, config.max_step_tokens)
        self._prefixes = PrefixPool(target.kv) if config.share_prefixes else None
        eos_token_ids = frozenset(loaded.eos_token_ids)
        self._constraints = Constraints(self._codec, vocab_size=target.vocab_size, eos_token_ids=eos_token_ids)
        self._choices = ChoiceTrees(self._codec, max_step_tokens=config.max_step_tokens)
        self._admission = Admission(
            target,
            codec=self._codec,
            eos_token_ids=eos_token_ids,
            constraints=self._constraints,
            choices=self._choices,
            prefixes=self._prefixes,
            max_context=self._max_context,
        )
        self._runner = StepRunner(
            target,
            drafter=self._drafter,
            policy=policy or make_policy(config, self._drafter, target, target_fingerprint=loaded.fingerprint),
            verifier=make_verifier(config),
            max_step_tokens=config.max_step_tokens,
            poison_dead_kv=config.poison_dead_kv,
        )
        self._rows: list[RowState] = []
        self._ready: deque[tuple[int, Result]] = deque()
        self._num_tickets = 0
        self._broken: str | None = None
        self.stats = EngineStats()

    @classmethod
    def from_config(cls, config: EngineConfig) -> Self:
        """Load the target (and the drafter) that ``config`` names.

        Raises:
            ConfigError, ModelError: as the loader and the constructor say.
        """
        import torch

        from dspark_batch.models.loader import load_target

        if isinstance(config.threads, int):
            torch.set_num_threads(config.threads)
        return cls(load_target(config), config)

    @property
    def num_unfinished(self) -> int:
        """Samples that were added and have not come out of ``step`` yet."""
        return len(self._ready) + self._admission.num_queued + len(self._rows)

    @property
    def max_concurrency(self) -> int:
        return self._max_concurrency

    @property
    def has_chat_template(self) -> bool:
        return self._codec is not None and self._codec.has_chat_template

    def add(self, request: Request) -> int:
        """Queue all samples of a request; gives the ticket under which ``step`` returns them.

        Raises:
            EngineError: the engine is closed or broken.
        """
        self._check_alive()
        ticket = self._num_tickets
        self._num_tickets += 1
        tokens = self._tokens(request)
        if isinstance(tokens, RowError):
            self.stats.num_failed += request.sampling.n
            for sample in range(request.sampling.n):
                self._ready.append((ticket, Result.failed(request, tokens, sample=sample)))
        else:
            self._admission.enqueue(ticket, request, tokens)
        return ticket

    def step(self) -> list[tuple[int, Result]]:
        """Run one round; (ticket, result) of every sample that left, failed ones included.

        Raises:
            EngineError: the device or an invariant failed. What was in flight is lost; build a new engine.
        """
        self._check_alive()
        out = list(self._ready)
        self._ready.clear()
        try:
            self._admit()
            if self._rows:
                prefixes = self._prefixes.unfinished() if self._prefixes else []
                record = self._runner.run(self._rows, prefixes, num_queued=self._admission.num_queued)
                self.stats.add(record)
                if record.num_finished:
                    out.extend(self._retire())
        except Exception as error:
            self._broken = f"{type(error).__name__}: {error}"
            raise EngineError(f"the engine failed in step {self.stats.num_steps}: {self._broken}") from error
        return out

    def generate(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Results in the order of the requests (the samples of one request in a row), reading them as places free up.

        A row that takes long holds back those behind it, which are kept in memory meanwhile.
        """
        waiting: dict[int, dict[int, Result]] = {}
        expected: deque[tuple[int, int]] = deque()
        for ticket, result in self._serve(requests, expected):
            waiting.setdefault(ticket, {})[result.sample] = result
            while expected and len(waiting.get(expected[0][0], ())) == expected[0][1]:
                samples = waiting.pop(expected.popleft()[0])
                yield from (samples[i] for i in sorted(samples))

    def stream(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Results as they finish, reading the requests as places free up."""
        for _, result in self._serve(requests, None):
            yield result

    def show_prompt(self, request: Request) -> tuple[str, int] | RowError:
        """The prompt as the model gets it, special tokens included, and its number of tokens; or why it is refused."""
        tokens = self._tokens(request)
        if isinstance(tokens, RowError):
            return tokens
        text = str(tokens) if self._codec is None else self._codec.decode(tokens, skip_special_tokens=False)
        return text, len(tokens)

    def check_integrity(self) -> None:
        """Assert every invariant that must hold between rounds."""
        slots = [row.slot for row in self._rows]
        assert len(set(slots)) == len(slots), "two rows hold the same KV slot"
        assert len(self._rows) <= self._max_concurrency, "more rows than max_concurrency"
        for row in self._rows:
            if row.num_output:
                assert row.kv_len == len(row.token_ids) - 1, "invariant 1: only the anchor's KV is missing"
            assert row.kv_len < len(row.token_ids), "a row has KV for tokens that it does not have"
            assert row.num_output < row.max_new_tokens, "a row went past its length limit"
            assert row.draft_row.token_ids is row.token_ids, "the drafter sees other tokens than the row"
        if self._prefixes is not None:
            self._prefixes.check_integrity()
        self._target.kv.check_integrity()
        self._drafter.check_integrity()

    def close(self) -> None:
        """Drop everything in flight and free the KV memory. Closing twice is fine."""
        if self._broken is None:
            self._abort()
            self._broken = "it was closed"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tokens(self, request: Request) -> list[int] | RowError:
        if request.sampling.stop and self._codec is None:
            return RowError(
                code=ErrorCode.UNDECODABLE_TEXT,
                message=f"request {request.id!r} has stop strings, but the target has no tokenizer; use stop_token_ids",
            )
        try:
            choices = self._choices.of(request.sampling)
            if request.sampling.constraint is not None and choices is None:
                self._constraints.begin(request.sampling.constraint)
        except ValueError as error:
            return RowError(code=ErrorCode.INVALID_SAMPLING, message=f"request {request.id!r}: {error}")
        tokens = prompt_tokens(request, self._codec)
        if isinstance(tokens, RowError):
            return tokens
        problem = check_prompt(request, tokens, self._target, max_context=self._max_context, choices=choices)
        return problem or tokens

    def _admit(self) -> None:
        admitted = self._admission.admit(num_places=self._max_concurrency - len(self._rows))
        for row in admitted:
            if row.choices is None:
                self._drafter.add(row.draft_row)
            if self._poison_dead_kv:
                self._target.kv.poison(row.slot, row.kv_len)
            if row.prefix is not None:
                self.stats.num_shared_prefix_tokens += row.prefix.num_tokens
        self._rows.extend(admitted)
        assert self._rows or not self._admission.num_queued, (
            "an idle engine has no room for a request that was accepted"
        )

    def _retire(self) -> list[tuple[int, Result]]:
        out: list[tuple[int, Result]] = []
        staying: list[RowState] = []
        for row in self._rows:
            if row.finish_reason is None and row.error is None:
                staying.append(row)
                continue
            self._release(row, finished=row.error is None)
            self.stats.num_failed += row.error is not None
            out.append((row.ticket, row.result(self._codec)))
        self._rows = staying
        return out

    def _release(self, row: RowState, *, finished: bool) -> None:
        if row.choices is None:
            self._drafter.remove(row.draft_row, finished=finished)
        self._target.kv.free(row.slot)
        if row.prefix is not None:
            assert self._prefixes is not None, "a row uses a prefix of no pool"
            self._prefixes.release(row.prefix)

    def _serve(
        self, requests: Iterable[Request], expected: deque[tuple[int, int]] | None
    ) -> Iterator[tuple[int, Result]]:
        """(ticket, result) as they finish; notes (ticket, number of samples) of each request in ``expected``."""
        if self.num_unfinished:
            raise RuntimeError("the engine already has requests in flight; finish them first")
        source = iter(requests)
        exhausted = False
        try:
            while True:
                while not exhausted and self.num_unfinished < 2 * self._max_concurrency:
                    request = next(source, None)
                    if request is None:
                        exhausted = True
                        break
                    ticket = self.add(request)
                    if expected is not None:
                        expected.append((ticket, request.sampling.n))
                if exhausted and not self.num_unfinished:
                    return
                yield from self.step()
        finally:
            if self._broken is None:
                self._abort()

    def _abort(self) -> None:
        for row in self._rows:
            self._release(row, finished=False)
        self._rows = []
        self._ready.clear()
        self._admission.drop_all()
        if self._prefixes is not None:
            self._prefixes.clear()

    def _check_alive(self) -> None:
        if self._broken is not None:
            raise EngineError(f"the engine cannot be used any more: {self._broken}")


def _max_context(config: EngineConfig, target: Target) -> int:
    if config.max_context is not None and config.max_context > target.max_context:
        raise ConfigError(
            [Problem("engine.max_context", f"{config.max_context} is more than the model's {target.max_context}")]
        )
    return config.max_context or target.max_context
