"""How many tokens a drafter gets accepted, by real decoding of held-out prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dspark_batch.core import Request, SamplingParams
from dspark_batch.drafters.dspark.checkpoint import read_config
from dspark_batch.engine.config import EngineConfig
from dspark_batch.errors import EngineError
from dspark_batch.models.text import TextCodec
from dspark_batch.training.recording import DraftedRound, RecordingDrafter
from dspark_batch.training.sequences import TokenRow

if TYPE_CHECKING:
    from dspark_batch.engine.engine import BatchEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """Of one prompt set at one temperature, full blocks. accepted_length: mean emitted tokens per round, bonus
    included. by_position: share of rounds whose draft stands up to each slot, of those where that is known."""

    name: str
    temperature: float
    num_prompts: int
    num_rounds: int
    num_tokens: int
    accepted_length: float
    by_position: tuple[float, ...]


class Evaluator:
    """Decodes prompts with the DSpark drafter of a folder, every block in full."""

    def __init__(self, engine_config: EngineConfig, drafter: Path, *, max_new_tokens: int) -> None:
        from dspark_batch.models.loader import load_target

        self._config = engine_config.model_copy(update={"drafter": "dspark", "drafter_path": str(drafter)})
        self._loaded = load_target(engine_config)
        self._num_slots = read_config(drafter).num_draft_tokens
        self._max_new_tokens = max_new_tokens

    @property
    def codec(self) -> TextCodec | None:
        return self._loaded.codec

    @property
    def num_slots(self) -> int:
        return self._num_slots

    def acceptance(self, name: str, prompts: Sequence[TokenRow], *, temperature: float) -> Acceptance:
        """Raises ModelError where the drafter does not fit, EngineError where rows fail."""
        with self._engine() as (engine, drafter):
            rounds = tokens = accepted = 0
            for result in engine.stream(self._requests(prompts, temperature)):
                if result.error is not None:
                    raise EngineError(f"evaluation set {name!r}, row {result.id}: {result.error.message}")
                rounds += result.num_rounds
                tokens += result.num_generated_tokens
                accepted += result.num_accepted_tokens
            return Acceptance(
                name=name,
                temperature=temperature,
                num_prompts=len(prompts),
                num_rounds=rounds,
                num_tokens=tokens,
                accepted_length=1.0 + accepted / max(1, rounds),
                by_position=by_position(drafter.rounds, num_slots=drafter.max_draft_tokens),
            )

    def rounds(self, prompts: Sequence[TokenRow], *, temperature: float) -> list[DraftedRound]:
        """What became of every draft. Raises as :meth:`acceptance`."""
        with self._engine() as (engine, drafter):
            for result in engine.stream(self._requests(prompts, temperature)):
                if result.error is not None:
                    raise EngineError(f"calibration, row {result.id}: {result.error.message}")
            return drafter.rounds

    @contextmanager
    def _engine(self) -> Iterator[tuple[BatchEngine, RecordingDrafter]]:
        from dspark_batch.engine.drafter_factory import make_drafter
        from dspark_batch.engine.engine import BatchEngine
        from dspark_batch.scheduling.policies import FixedLength

        config, loaded = self._config.model_copy(update={"schedule": "fixed"}), self._loaded
        drafter = RecordingDrafter(make_drafter(config, loaded.target, target_fingerprint=loaded.fingerprint))
        policy = FixedLength(drafter.max_draft_tokens)
        with BatchEngine(loaded, config, drafter=drafter, policy=policy) as engine:
            yield engine, drafter

    def _requests(self, prompts: Sequence[TokenRow], temperature: float) -> list[Request]:
        sampling = SamplingParams(max_new_tokens=self._max_new_tokens, temperature=temperature)
        return [
            Request(id=row.id, prompt_token_ids=tuple(row.token_ids[: row.prompt_len].tolist()), sampling=sampling)
            for row in prompts
        ]


def by_position(rounds: Sequence[DraftedRound], *, num_slots: int) -> tuple[float, ...]:
    """Per slot, the share of rounds in which it and all before it stand, where that is known."""
    out = []
    for slot in range(num_slots):
        known = [r for r in rounds if r.num_drafted > slot and (r.num_known > slot or r.num_accepted < r.num_known)]
        out.append(sum(r.num_accepted > slot for r in known) / len(known) if known else 0.0)
    return tuple(out)
