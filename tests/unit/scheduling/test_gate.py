"""When drafting stops, when it is tried again, and what trying may cost."""

from __future__ import annotations

import numpy as np

from dspark_batch.scheduling.gate import Gate


def wait(gate: Gate) -> int:
    """Rounds until the next probe is due."""
    rounds = 0
    while not gate.is_probe_due():
        rounds += 1
    return rounds


def test_a_new_gate_probes_at_once_and_opens_after_a_few_promising_probes() -> None:
    gate = Gate()
    assert wait(gate) == 0
    gate.observe_probe(0.4, num_rows=8, cost_share=0.01)
    assert not gate.is_open
    assert wait(gate) == 2
    gate.observe_probe(0.4, num_rows=8, cost_share=0.01)
    assert gate.is_open


def test_pauses_double_while_probes_promise_nothing() -> None:
    gate, pauses = Gate(), []
    for _ in range(8):
        pauses.append(wait(gate))
        gate.observe_probe(-0.01, num_rows=8, cost_share=0.0)
    assert pauses == [0, 2, 4, 8, 16, 32, 64, 64]
    assert gate.is_stale


def test_dear_probes_are_followed_by_long_pauses_once_their_credit_is_spent() -> None:
    gate, pauses = Gate(), []
    for _ in range(6):
        pauses.append(wait(gate))
        gate.observe_probe(0.01, num_rows=1, cost_share=0.125)
    assert pauses == [0, 2, 2, 2, 25, 25]


def test_a_probe_that_tells_nothing_is_repeated_soon() -> None:
    gate = Gate()
    wait(gate)
    gate.observe_probe(None, num_rows=8, cost_share=0.0)
    assert wait(gate) == 1


def test_probes_of_one_row_are_given_more_time_before_pauses_grow() -> None:
    gate, pauses = Gate(), []
    for _ in range(10):
        pauses.append(wait(gate))
        gate.observe_probe(-0.01, num_rows=1, cost_share=0.0)
    assert pauses == [0] + [2] * 9


def test_an_open_gate_is_judged_after_enough_rows_and_closes_where_it_loses() -> None:
    for num_rows, rounds in ((1, 16), (8, 6), (64, 6)):
        gate = Gate(is_open=True)
        for _ in range(rounds - 1):
            gate.observe(-0.1, num_rows=num_rows)
        assert gate.is_open
        gate.observe(-0.1, num_rows=num_rows)
        assert not gate.is_open


def test_a_bad_start_does_not_close_a_gate_whose_drafts_pay_and_a_small_loss_does_in_the_end() -> None:
    gate, rng = Gate(is_open=True), np.random.default_rng(0)
    for saved in (-0.4, 0.6, -0.4, -0.4, 0.6, -0.4, -0.4, 0.6):
        gate.observe(saved, num_rows=4)
    assert gate.saved < 0
    assert gate.is_open
    num_rounds = 0
    while gate.is_open:
        gate.observe(-0.05 + 0.5 * rng.standard_normal(), num_rows=4)
        num_rounds += 1
    assert num_rounds < 400


def test_a_mean_over_many_rounds_weighs_as_many_in_what_was_lost_in_all() -> None:
    for num_rounds in (1, 31):
        gate = Gate(is_open=True)
        for saved in (0.5, -0.6) * 4:
            gate.observe(saved, num_rows=4, num_rounds=num_rounds)
        assert gate.is_open == (num_rounds == 1)


def test_gates_of_drafts_that_pay_a_little_seldom_close() -> None:
    """Rounds of four rows scatter by more than what drafting saves."""
    rng, num_closed = np.random.default_rng(0), 0
    for _ in range(200):
        gate = Gate(is_open=True)
        for _ in range(100):
            gate.observe(0.12 + 0.65 * rng.standard_normal(), num_rows=4)
            if not gate.is_open:
                num_closed += 1
                break
    assert num_closed < 0.2 * 200


def test_each_time_that_it_closes_it_asks_for_more_before_it_opens_again() -> None:
    gate, probes = Gate(), []
    for _ in range(5):
        count = 0
        while not gate.is_open:
            wait(gate)
            gate.observe_probe(0.5, num_rows=8, cost_share=0.0)
            count += 1
        probes.append(count)
        while gate.is_open:
            gate.observe(-0.1, num_rows=64)
    assert probes == [2, 4, 8, 16, 16]


def test_lasting_gains_restore_trust() -> None:
    gate = Gate(is_open=True, probes_needed=16)
    for _ in range(60):
        gate.observe(0.2, num_rows=64)
    assert gate.is_open
    assert gate.probes_needed == 2


def test_a_change_brings_the_next_probe_forward() -> None:
    gate = Gate()
    for _ in range(8):
        wait(gate)
        gate.observe_probe(-0.01, num_rows=8, cost_share=0.0)
    gate.hurry()
    assert wait(gate) == 1
