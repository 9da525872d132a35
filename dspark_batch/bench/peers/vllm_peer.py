"""Peer: vLLM's CPU build, plain or with its n-gram drafter. Runs outside this project's environment."""

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to stdout; keep that away from the answers
    setup = json.loads(sys.stdin.readline())
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "3")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{setup['threads'] - 1}")
    os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    options: dict[str, Any] = {}
    if setup.get("ngram_tokens"):
        options["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": setup["ngram_tokens"],
            "prompt_lookup_max": 4,
            "prompt_lookup_min": 2,
        }
    engine = LLM(
        model=setup["model"],
        dtype=setup["dtype"],
        max_num_seqs=128,
        max_model_len=2048,
        enable_prefix_caching=False,
        disable_log_stats=True,
        **options,
    )
    from importlib.metadata import version

    _answer(answers, {"ready": True, "version": version("vllm-cpu")})
    for line in sys.stdin:
        job = json.loads(line)
        params = SamplingParams(
            temperature=0.0, max_tokens=job["max_new_tokens"], stop_token_ids=job["eos_token_ids"], detokenize=True
        )
        prompts: list[Any] = [{"prompt_token_ids": ids} for ids in job["prompts"]]
        started = time.perf_counter()
        results = engine.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        outputs = [list(result.outputs[0].token_ids) for result in results]
        _answer(answers, {"seconds": seconds, "num_tokens": sum(map(len, outputs)), "outputs": outputs})


def _answer(stream: Any, value: dict[str, Any]) -> None:
    stream.write(json.dumps(value) + "\n")
    stream.flush()


if __name__ == "__main__":
    main()
