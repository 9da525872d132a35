from dspark_batch.metrics import EngineStats, PlanReason, StepRecord


def test_totals_add_up_over_steps() -> None:
    stats = EngineStats()
    assert stats.accepted_length is None
    first = StepRecord(num_rows=2, num_accepted_tokens=3, num_emitted_tokens=5, forward_s=0.5)
    second = StepRecord(num_rows=2, num_prefill_tokens=7, num_emitted_tokens=2, host_s=0.25)
    stats.add(first)
    stats.add(second)
    assert (stats.num_steps, stats.num_row_rounds, stats.num_emitted_tokens) == (2, 4, 7)
    assert stats.num_prefill_tokens == 7
    assert stats.accepted_length == 1.75
    assert stats.total_s == 0.75
    assert stats.last is second


def test_the_totals_by_name_are_plain_numbers() -> None:
    totals = EngineStats().as_dict()
    assert totals["num_steps"] == 0
    assert all(isinstance(value, (int, float)) for value in totals.values())


def test_the_totals_of_two_engines_add_up() -> None:
    one, other = EngineStats(), EngineStats()
    one.add(StepRecord(num_verified_draft_tokens=3, draft_lengths=[2, 1], accepted_lengths=[1, 1]))
    other.add(StepRecord(num_verified_draft_tokens=2, draft_lengths=[2, 0], accepted_lengths=[0, 0]))
    assert (one + other).by_position() == [(3, 2), (2, 0)]
    one, other = EngineStats(), EngineStats()
    for stats, reason in ((one, PlanReason.DRAFTED), (one, PlanReason.PAUSED), (other, PlanReason.DRAFTED)):
        stats.add(StepRecord(num_rows=2, num_emitted_tokens=3, forward_s=0.5, reason=reason))
    both = one + other
    assert (both.num_steps, both.num_row_rounds, both.num_emitted_tokens, both.forward_s) == (3, 6, 9, 1.5)
    assert both.num_steps_by_reason == {PlanReason.DRAFTED: 2, PlanReason.PAUSED: 1}
    assert both.last is other.last
    assert (one + EngineStats()).last is one.last


def test_of_each_draft_position_what_was_verified_and_accepted_is_known() -> None:
    stats = EngineStats()
    assert stats.by_position() == []
    stats.add(StepRecord(num_rows=3, num_verified_draft_tokens=5, draft_lengths=[3, 2, 0], accepted_lengths=[3, 0, 0]))
    stats.add(StepRecord(num_rows=1, num_verified_draft_tokens=1, draft_lengths=[1], accepted_lengths=[1]))
    stats.add(StepRecord(num_rows=2, draft_lengths=[0, 0], accepted_lengths=[0, 0]))
    assert stats.by_position() == [(3, 2), (2, 1), (1, 1)]
