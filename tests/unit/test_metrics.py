from dspark_batch.metrics import EngineStats, StepRecord


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
