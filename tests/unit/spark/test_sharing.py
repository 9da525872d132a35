from __future__ import annotations

import random

import pytest

from dspark_batch.core import Request, SamplingParams
from dspark_batch.spark.sharing import SharedEngine
from dspark_batch.testing.scripted_engine import ScriptedEngine, scripted_result


def request(name: str, *, n: int = 1) -> Request:
    return Request(id=name, prompt=f"prompt {name}", sampling=SamplingParams(temperature=0.7, n=n, max_new_tokens=6))


@pytest.mark.parametrize("seed", range(5))
def test_every_view_gets_exactly_the_results_of_its_own_requests(seed: int) -> None:
    chance = random.Random(seed)
    shared = SharedEngine(ScriptedEngine(max_concurrency=3, max_steps=5))
    views = [shared.view() for _ in range(3)]
    asked: list[dict[int, Request]] = [{} for _ in views]
    got: list[dict[tuple[int, int], str | None]] = [{} for _ in views]
    for number in range(29):
        place = chance.randrange(3)
        one = request(f"{seed}-{number}", n=chance.choice([1, 1, 3]))
        asked[place][views[place].add(one)] = one
        if chance.random() < 0.6:
            take(views, got, chance.randrange(3))
        shared.check_integrity()
    while any(view.num_unfinished for view in views):
        take(views, got, chance.randrange(3))
    for requests, results in zip(asked, got, strict=True):
        assert results == {
            (ticket, sample): scripted_result(one, sample=sample).text
            for ticket, one in requests.items()
            for sample in range(one.sampling.n)
        }


def take(views, got, place: int) -> None:
    if views[place].num_unfinished:
        for ticket, result in views[place].step():
            assert (ticket, result.sample) not in got[place]
            got[place][(ticket, result.sample)] = result.text


def test_a_round_of_one_view_advances_the_rows_of_all() -> None:
    engine = ScriptedEngine(max_concurrency=8, max_steps=1)
    shared = SharedEngine(engine)
    first, second = shared.view(), shared.view()
    first.add(request("a"))
    second.add(request("b"))
    assert len(first.step()) == 1
    assert engine.counters.num_steps == 1
    assert len(second.step()) == 1
    assert engine.counters.num_steps == 1


def test_closing_a_view_leaves_the_engine_open() -> None:
    engine = ScriptedEngine()
    SharedEngine(engine).view().close()
    assert not engine.is_closed
