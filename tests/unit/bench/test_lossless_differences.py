from pathlib import Path

import numpy as np
import pytest

from dspark_batch.bench.lossless import find_differences, read_requests
from dspark_batch.core import Message, SamplingParams


def scores_of(values: list[float]):  # type: ignore[no-untyped-def]
    return lambda request_id, prefix: np.array(values)


def test_equal_outputs_have_no_difference() -> None:
    assert find_differences({"a": (1, 2)}, {"a": (1, 2)}, scores=scores_of([])) == ()


@pytest.mark.parametrize(
    ("scores", "allowed"),
    [
        ([0.0, 1.0, 1.00005], True),
        ([0.0, 1.0, 1.1], False),
        ([1.00005, 1.0, 0.0], False),
    ],
)
def test_only_a_near_tie_of_the_two_best_is_allowed(scores: list[float], allowed: bool) -> None:
    (found,) = find_differences({"a": (7, 1, 0)}, {"a": (7, 2, 2)}, scores=scores_of(scores))
    assert (found.position, found.expected_token, found.found_token) == (1, 1, 2)
    assert found.is_allowed is allowed


def test_a_shorter_output_is_a_difference_at_its_end() -> None:
    (found,) = find_differences({"a": (7, 1)}, {"a": (7,)}, scores=scores_of([0.0, 1.0]))
    assert (found.position, found.expected_token, found.found_token) == (1, 1, None)
    assert not found.is_allowed


def test_prompt_files_hold_chats_or_raw_prompts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"turns": ["hi", "more"]}\n{"prompt": "raw"}\n{"prompt": "left out"}\n')
    first, second = read_requests(file, num_prompts=2, sampling=SamplingParams())
    assert first.messages == (Message("user", "hi"),)
    assert second.prompt == "raw"
    file.write_text('{"text": "hi"}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_requests(file, num_prompts=2, sampling=SamplingParams())
