"""Coupled verification: the draft stands while it equals what plain sampling draws from the same noise.

Source: arXiv 2408.07978. The emitted tokens are those of plain sampling whatever the draft, so any drafter, draft
length and schedule gives the same output.
"""

from __future__ import annotations

from collections.abc import Sequence

from dspark_batch.tensors import Verdict
from dspark_batch.verification.base import TargetDraws, VerifyRow


class CoupledVerifier:
    """Draws y at every position; accepts while draft[j] == y[j]; the first unequal y, or the bonus, is emitted."""

    name = "coupled"
    needs_draft_probs = False

    def verify(self, rows: Sequence[VerifyRow], target: TargetDraws) -> Verdict:
        drawn = target.draw()
        num_accepted: list[int] = []
        next_token: list[int] = []
        flat = 0
        for row in rows:
            accepted = 0
            for token in row.draft:
                if token != drawn[flat + accepted]:
                    break
                accepted += 1
            num_accepted.append(accepted)
            next_token.append(drawn[flat + accepted])
            flat += len(row.draft) + 1
        return Verdict(num_accepted=num_accepted, next_token=next_token)
