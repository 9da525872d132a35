"""How probable each of some texts is as the answer: what ``SamplingParams.score_choices`` asks for.

Nothing is drawn. The tokens of all choices form a tree, and each round computes one of its longest paths behind the
prompt, the first of them together with the prompt itself. A path lies in KV that no committed token owns, as a draft
does, so the next one takes its place.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dspark_batch.core import ChoiceScores, Constraint, SamplingParams
from dspark_batch.engine.text import Codec

_NUM_TREES = 64
"""Sets of choices kept ready; one request may bring others than the next."""


@dataclass(frozen=True, slots=True)
class ChoicePath:
    """One round of a prompt. ``nodes[i]`` is the token ``tokens[i]``, predicted after ``places[i]`` tokens of draft."""

    draft: tuple[int, ...]
    places: tuple[int, ...]
    tokens: tuple[int, ...]
    nodes: tuple[int, ...]


class ChoiceTree:
    """The choices as tokens, and what has to be read to score them.

    A node is a token after those before it, so choices that begin alike share nodes.
    """

    def __init__(self, texts: Sequence[str], token_ids: Sequence[tuple[int, ...]]) -> None:
        self.texts = tuple(texts)
        self.token_ids = tuple(token_ids)
        self._nodes: dict[tuple[int, ...], int] = {}
        for tokens in token_ids:
            for length in range(1, len(tokens) + 1):
                self._nodes.setdefault(tokens[:length], len(self._nodes))
        self.paths = tuple(self._find_paths())
        self._longer = self._find_longer()

    @property
    def num_nodes(self) -> int:
        return len(self._nodes)

    @property
    def max_tokens(self) -> int:
        """Of the longest choice."""
        return max(map(len, self.token_ids))

    def scores(self, logprobs: NDArray[np.float64]) -> ChoiceScores:
        """From the log-probability of every node, [num_nodes], given the tokens before it.

        The events are disjoint: the answer begins with the choice, and with no longer one that continues it.
        """
        begins = np.zeros(self.num_nodes)
        for prefix, node in self._nodes.items():
            begins[node] = logprobs[node] + (begins[self._nodes[prefix[:-1]]] if len(prefix) > 1 else 0.0)
        logs = np.empty(len(self.texts))
        for choice, (tokens, longer) in enumerate(zip(self.token_ids, self._longer, strict=True)):
            begin = begins[self._nodes[tokens]]
            rest = 1.0 - np.exp(begins[longer] - begin).sum()
            logs[choice] = begin + np.log(rest) if rest > 0 else -np.inf
        total = np.logaddexp.reduce(logs)
        probs: list[float] = np.exp(logs - total).tolist()
        return ChoiceScores(dict(zip(self.texts, probs, strict=True)), coverage=min(1.0, float(np.exp(total))))

    def _find_paths(self) -> list[ChoicePath]:
        children: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for prefix, node in self._nodes.items():
            children.setdefault(prefix[:-1], []).append((prefix[-1], node))
        drafts = sorted({tokens[:-1] for tokens in self.token_ids})
        longest = [
            draft
            for draft, following in zip(drafts, [*drafts[1:], ()], strict=True)
            if following[: len(draft)] != draft or not following
        ]
        paths = []
        for draft in longest:
            found = [
                (place, token, node)
                for place in range(len(draft) + 1)
                for token, node in children.pop(draft[:place], ())
            ]
            places, tokens, nodes = zip(*found, strict=True)
            paths.append(ChoicePath(draft, places, tokens, nodes))
        assert not children, "a token of a choice lies on no path"
        return paths

    def _find_longer(self) -> list[list[int]]:
        """Per choice the nodes of those that continue it, without those that continue one of these."""
        choices = set(self.token_ids)
        longer: dict[tuple[int, ...], list[int]] = {tokens: [] for tokens in self.token_ids}
        for tokens in self.token_ids:
            inner = (tokens[:length] for length in range(len(tokens) - 1, 0, -1))
            shorter = next((prefix for prefix in inner if prefix in choices), None)
            if shorter is not None:
                longer[shorter].append(self._nodes[tokens])
        return [longer[tokens] for tokens in self.token_ids]


class ChoiceWalk:
    """How far the scoring of one prompt has come."""

    def __init__(self, tree: ChoiceTree) -> None:
        self.tree = tree
        self.scores: ChoiceScores | None = None
        """Once all is known."""
        self._num_read = 0
        self._logprobs = np.full(tree.num_nodes, np.nan)

    @property
    def path(self) -> ChoicePath:
        """What the next round computes after the prompt, and reads."""
        return self.tree.paths[self._num_read]

    def take(self, logprobs: Sequence[float]) -> bool:
        """Note the log-probabilities of the path's tokens; True when all is known."""
        self._logprobs[list(self.path.nodes)] = logprobs
        self._num_read += 1
        if self._num_read < len(self.tree.paths):
            return False
        self.scores = self.tree.scores(self._logprobs)
        return True

    @property
    def best(self) -> int:
        """The most probable choice; of equal ones the first."""
        assert self.scores is not None, "not all choices are scored"
        probs = list(self.scores.probs.values())
        return probs.index(max(probs))


class ChoiceTrees:
    """Makes the trees for one tokenizer; keeps those used last."""

    def __init__(self, codec: Codec | None, *, max_step_tokens: int) -> None:
        self._codec = codec
        self._max_step_tokens = max_step_tokens
        self._tree = lru_cache(maxsize=_NUM_TREES)(self._make)

    def of(self, sampling: SamplingParams) -> ChoiceTree | None:
        """The choices to score; None where a text is to be generated. Raises ValueError where they cannot be scored."""
        if not sampling.score_choices:
            return None
        assert sampling.constraint is not None, "checked by SamplingParams"
        return self._tree(sampling.constraint)

    def _make(self, constraint: Constraint) -> ChoiceTree:
        if self._codec is None:
            raise ValueError("scoring sampling.choices needs a checkpoint with a tokenizer")
        texts: list[str] = json.loads(constraint.source)
        found: dict[tuple[int, ...], str] = {}
        for text in texts:
            tokens = tuple(self._codec.encode_plain(text))
            if not tokens:
                raise ValueError(f"sampling.choices: {text!r} has no tokens; give another text")
            if len(tokens) > self._max_step_tokens:
                raise ValueError(
                    f"sampling.choices: {text!r} has {len(tokens)} tokens, and a step takes {self._max_step_tokens}; "
                    "shorten it, or raise engine.max_step_tokens"
                )
            if tokens in found:
                raise ValueError(f"sampling.choices: {found[tokens]!r} and {text!r} are the same tokens; drop one")
            found[tokens] = text
        return ChoiceTree(texts, list(found))
