"""Peer: transformers ``generate`` with a static, left-padded batch. Runs outside this project's environment."""

import json
import sys
import time
from typing import Any


def main() -> None:
    setup = json.loads(sys.stdin.readline())
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(setup["threads"])
    model = AutoModelForCausalLM.from_pretrained(setup["model"], dtype=getattr(torch, setup["dtype"])).eval()
    _answer({"ready": True, "version": _version("transformers")})
    for line in sys.stdin:
        job = json.loads(line)
        started = time.perf_counter()
        outputs = _generate(torch, model, job, setup.get("prompt_lookup_tokens"))
        seconds = time.perf_counter() - started
        _answer({"seconds": seconds, "num_tokens": sum(map(len, outputs)), "outputs": outputs})


def _generate(torch: Any, model: Any, job: dict[str, Any], lookup: int | None) -> list[list[int]]:
    prompts, eos = job["prompts"], set(job["eos_token_ids"])
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    extra = {"prompt_lookup_num_tokens": lookup} if lookup and len(prompts) == 1 else {}
    with torch.inference_mode():
        full = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=job["max_new_tokens"],
            eos_token_id=sorted(eos),
            pad_token_id=0,
            **extra,
        )
    return [_until_stop(row, eos) for row in full[:, width:].tolist()]


def _until_stop(row: list[int], eos: set[int]) -> list[int]:
    for index, token in enumerate(row):
        if token in eos:
            return row[: index + 1]
    return row


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _answer(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
