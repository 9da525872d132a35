from __future__ import annotations

import random
from dataclasses import replace

from dspark_batch.batch.dedupe import Deduper
from dspark_batch.core import Message, Request, Result, SamplingParams
from dspark_batch.testing.scripted_engine import scripted_result


def request(row_id: str, prompt: str, *, temperature: float = 0.0) -> Request:
    return Request(id=row_id, prompt=prompt, sampling=SamplingParams(temperature=temperature))


def claim(deduper: Deduper, asked: Request, *, shard: str, row: int):
    return deduper.claim(deduper.key(asked), shard=shard, row=row, row_id=asked.id)


def finish(deduper: Deduper, done: Request, results: tuple[Result, ...]):
    return deduper.finish(deduper.key(done), results)


def test_the_first_computes_the_next_waits_and_a_later_one_is_served():
    deduper = Deduper()
    first = request("1", "a")
    assert claim(deduper, first, shard="s", row=0) is True
    assert claim(deduper, request("2", "a"), shard="t", row=5) is False
    results = (scripted_result(first),)
    ((shard, row, copied),) = finish(deduper, first, results)
    assert (shard, row, copied[0].id, copied[0].text) == ("t", 5, "2", results[0].text)
    served = claim(deduper, request("3", "a"), shard="t", row=6)
    assert isinstance(served, tuple)
    assert served[0].id == "3"
    assert deduper.num_copied_rows == 2


def test_a_closed_shard_is_forgotten():
    deduper = Deduper()
    first = request("1", "a")
    claim(deduper, first, shard="s", row=0)
    finish(deduper, first, (scripted_result(first),))
    deduper.forget("s")
    deduper.check_integrity()
    assert claim(deduper, request("2", "a"), shard="t", row=0) is True


def test_sampling_and_kind_of_prompt_keep_requests_apart():
    deduper = Deduper()
    assert deduper.key(request("1", "a", temperature=0.5)) is None
    same = [
        Request(id="1", prompt="a", sampling=SamplingParams(max_new_tokens=3)),
        Request(id="2", prompt="a", sampling=SamplingParams(max_new_tokens=4)),
        Request(id="3", prompt_token_ids=(97,)),
    ]
    assert len({deduper.key(one) for one in same}) == 3


def test_random_claims_give_every_place_exactly_one_result():
    rng = random.Random(5)
    deduper = Deduper()
    running: list[tuple[str, int, Request]] = []
    served: dict[tuple[str, int], str] = {}
    places = [(f"s{number % 3}", number) for number in range(200)]
    for shard, row in places:
        asked = request(str(row), rng.choice("abcdefg"))
        claimed = claim(deduper, asked, shard=shard, row=row)
        if claimed is True:
            running.append((shard, row, asked))
        elif claimed is not False:
            served[shard, row] = claimed[0].id
        deduper.check_integrity()
        if running and rng.random() < 0.3:
            owner, own_row, done = running.pop(rng.randrange(len(running)))
            served[owner, own_row] = done.id
            for other, other_row, copied in finish(deduper, done, (scripted_result(done),)):
                assert (other, other_row) not in served
                served[other, other_row] = copied[0].id
    for owner, own_row, done in running:
        served[owner, own_row] = done.id
        served.update({(s, r): c[0].id for s, r, c in finish(deduper, done, (scripted_result(done),))})
    assert served == {place: str(place[1]) for place in places}


def test_equal_conversations_share_a_result_and_other_turns_roles_or_arguments_keep_them_apart():
    deduper = Deduper()
    turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    asked = Request(id="1", messages=turns, chat_template_arguments={"x": [1]})
    assert claim(deduper, asked, shard="s", row=0) is True
    assert claim(deduper, replace(asked, id="2"), shard="s", row=1) is False
    others = [
        replace(asked, messages=turns[2:]),
        replace(asked, messages=(*turns[:1], Message("system", "b"), *turns[2:])),
        replace(asked, chat_template_arguments={"x": [2]}),
        replace(asked, chat_template_arguments={}),
    ]
    assert len({deduper.key(one) for one in (asked, *others)}) == 5
