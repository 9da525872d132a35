"""Which rounds are learned from, and which rows are asked for drafts."""

import numpy as np

from dspark_batch.scheduling.lengths import AskedRows
from dspark_batch.scheduling.settling import Pace


def test_every_round_is_a_lesson_while_little_is_known_and_one_in_four_later() -> None:
    pace = Pace()
    assert all(pace.is_lesson(is_young=True) for _ in range(10))
    assert sum(pace.is_lesson(is_young=False) for _ in range(400)) == 100


def test_a_choice_of_rows_stands_for_a_few_rounds_of_the_same_batch() -> None:
    rows = AskedRows()
    handles = [100, 101, 102]
    assert rows.chosen_before(handles) is None
    worth = np.array([True, False, True])
    assert rows.choose(handles, worth).tolist() == worth.tolist()
    for _ in range(3):
        found = rows.chosen_before(handles)
        assert found is not None
        assert found.tolist() == worth.tolist()
    assert rows.chosen_before(handles) is None, "thought over after four rounds"
    rows.choose(handles, worth)
    assert rows.chosen_before([100, 101]) is None, "a batch that changed is thought over"


def test_rows_that_are_not_worth_it_are_asked_again_each_in_its_turn() -> None:
    rows = AskedRows()
    handles = list(range(5))
    asked = sum(rows.choose(handles, np.zeros(5, bool)).astype(int) for _ in range(64))
    assert np.asarray(asked).tolist() == [2] * 5
