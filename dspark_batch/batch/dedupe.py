"""Equal prompts at temperature 0 are computed once and written to every row that asked for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dspark_batch.core import Request, Result, SamplingParams

PromptKey = tuple[object, ...]


@dataclass(slots=True)
class _Computation:
    owner: str
    waiting: list[tuple[str, int, str]] | None = None
    results: tuple[Result, ...] | None = None


class Deduper:
    """Remembers which prompts are being computed or were computed by a shard that is still open.

    A *place* is (shard key, row). ``owner`` is the shard whose row is computed; when that shard closes, its
    computations are forgotten, so memory is bounded by the open shards. Greedy requests only: at higher temperatures
    the row's id is part of what decides its tokens. Copied rows carry the counts of the computed row, also
    ``num_rounds``, ``num_drafted_tokens`` and ``num_accepted_tokens``, although no work was done for them.
    """

    def __init__(self) -> None:
        self._computations: dict[PromptKey, _Computation] = {}
        self._keys_by_owner: dict[str, list[PromptKey]] = {}
        self._numbers: dict[SamplingParams, int] = {}
        self._last: tuple[SamplingParams | None, int] = (None, 0)
        self.num_copied_rows = 0

    def key(self, request: Request) -> PromptKey | None:
        """What two requests must share to share a result; None where results must not be shared."""
        if request.sampling.temperature != 0.0:
            return None
        messages = request.messages
        turns = None if messages is None else tuple([text for turn in messages for text in (turn.role, turn.content)])
        arguments = json.dumps(request.chat_template_arguments) if request.chat_template_arguments else None
        return (request.prompt, turns, arguments, request.prompt_token_ids, self._number(request.sampling))

    def _number(self, sampling: SamplingParams) -> int:
        """A number for the settings, since hashing all of them for every row would cost more than the row."""
        if sampling is not self._last[0]:
            self._last = (sampling, self._numbers.setdefault(sampling, len(self._numbers)))
        return self._last[1]

    def claim(self, key: PromptKey, *, shard: str, row: int, row_id: str) -> tuple[Result, ...] | bool:
        """Ask for the results of a prompt by its ``key``.

        True: nobody has them, compute them and call ``finish``. False: they are being computed; ``finish`` will name
        this place. Else the results, under this row's id.
        """
        known = self._computations.get(key)
        if known is None:
            self._computations[key] = _Computation(owner=shard)
            self._keys_by_owner.setdefault(shard, []).append(key)
            return True
        self.num_copied_rows += 1
        if known.results is None:
            if known.waiting is None:
                known.waiting = []
            known.waiting.append((shard, row, row_id))
            return False
        return _renamed(known.results, row_id)

    def finish(self, key: PromptKey, results: tuple[Result, ...]) -> Sequence[tuple[str, int, tuple[Result, ...]]]:
        """Give in the results of a claimed prompt; (shard, row, results) of every place that waited for them."""
        known = self._computations[key]
        known.results = results
        waiting, known.waiting = known.waiting, None
        if waiting is None:
            return ()
        return [(shard, row, _renamed(results, row_id)) for shard, row, row_id in waiting]

    def forget(self, shard: str) -> None:
        """Drop what a closed shard computed."""
        for key in self._keys_by_owner.pop(shard, ()):
            computation = self._computations.pop(key)
            assert not computation.waiting, f"shard {shard} closed while rows wait for its results"

    def check_integrity(self) -> None:
        """Every computation belongs to exactly one open owner."""
        owned = [key for keys in self._keys_by_owner.values() for key in keys]
        assert len(owned) == len(set(owned)) == len(self._computations)
        assert all(key in self._keys_by_owner[c.owner] for key, c in self._computations.items())


def _renamed(results: tuple[Result, ...], row_id: str) -> tuple[Result, ...]:
    return tuple(replace(result, id=row_id) for result in results)
