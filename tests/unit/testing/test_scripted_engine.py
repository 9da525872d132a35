from __future__ import annotations

import subprocess
import sys

import pytest

from dspark_batch.core import ErrorCode, Message, Request, SamplingParams
from dspark_batch.errors import EngineError
from dspark_batch.testing.scripted_engine import ScriptedEngine, scripted_result


def drain(engine: ScriptedEngine) -> list:
    out = []
    while engine.num_unfinished:
        out += engine.step()
    return out


def test_greedy_text_depends_on_the_prompt_and_sampled_text_also_on_the_id():
    hot = SamplingParams(temperature=1.0)
    assert scripted_result(Request(id="1", prompt="a")).text == scripted_result(Request(id="2", prompt="a")).text
    assert len({scripted_result(Request(id=str(i), prompt="a", sampling=hot)).text for i in range(9)}) > 1
    chats = [Request(id="1", messages=(Message("system", s), Message("user", "a"))) for s in "xy"]
    assert scripted_result(chats[0]).text != scripted_result(chats[1]).text


@pytest.mark.parametrize("concurrency", [1, 5])
def test_every_sample_comes_out_once_under_its_ticket(concurrency):
    engine = ScriptedEngine(max_concurrency=concurrency, max_steps=4)
    params = SamplingParams(temperature=1.0, n=3)
    requests = {engine.add(r): r for r in [Request(id=str(i), prompt=f"p{i}", sampling=params) for i in range(11)]}
    got = drain(engine)
    assert sorted((t, r.sample) for t, r in got) == [(t, s) for t in requests for s in range(3)]
    assert all(r == scripted_result(requests[t], sample=r.sample) for t, r in got)
    assert engine.counters.max_running == concurrency


def test_chosen_prompts_fail_and_the_engine_breaks_where_told():
    engine = ScriptedEngine(failures={"bad": ErrorCode.PROMPT_TOO_LONG}, fault_after_rows=1, max_steps=1)
    engine.add(Request(id="1", prompt="bad"))
    ((_, failed),) = drain(engine)
    assert failed.error.code is ErrorCode.PROMPT_TOO_LONG
    engine.add(Request(id="2", prompt="good"))
    with pytest.raises(EngineError, match="after 1 samples"):
        engine.step()


def test_the_whole_batch_layer_loads_without_torch_ray_or_spark():
    code = (
        "import sys; import dspark_batch.testing.scripted_engine, dspark_batch.batch.service,"
        "dspark_batch.batch.commit, dspark_batch.batch.reader, dspark_batch.batch.fingerprint;"
        "assert not {'torch', 'ray', 'pyspark', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
