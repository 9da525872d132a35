"""A quick look at the device before the job: seconds of a step for a few numbers of flat tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

PROFILED_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
NUM_PASSES = 2


def profile_steps(
    run: Callable[[int], float | None], *, token_counts: Sequence[int] = PROFILED_TOKENS, num_passes: int = NUM_PASSES
) -> dict[int, float]:
    """The least of a few times for each size; the sizes take turns, so that a busy moment hits no size alone.

    run: performs a step of so many flat tokens and gives its seconds, or None where it does not fit. It is called once
    more at first, to warm up.
    """
    run(token_counts[0])
    found: dict[int, float] = {}
    for _ in range(num_passes):
        for count in token_counts:
            seconds = run(count)
            if seconds is not None:
                found[count] = min(seconds, found.get(count, seconds))
    return found
