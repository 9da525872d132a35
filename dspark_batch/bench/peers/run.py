"""Interleaved comparison of our engine with transformers ``generate`` and vLLM on the CPU.

    python -m dspark_batch.bench.peers.run --prompts FILE.jsonl --environments DIR [--report docs/benchmarks/NAME.md]

All engines are loaded once, each in its own process, and take turns on exactly the same token ids: a repeat runs every
engine once at every concurrency, so drift of a shared machine hits all of them alike. Tokens per second are emitted
tokens over the whole call, prompts included; the ratio column is the median of the per-repeat ratios.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from dspark_batch.bench.command import parse_concurrencies
from dspark_batch.bench.options import (
    DEFAULT_TARGET,
    AsJson,
    Concurrency,
    Dtype,
    MaxNewTokens,
    Repeats,
    Target,
    Threads,
    names,
    run_module,
    write_json,
)
from dspark_batch.bench.peers import environments
from dspark_batch.provenance import versions

HERE = Path(__file__).parent
_BASELINES = ("vllm", "transformers")
"""Ratios are to the first of these that runs."""

_SETUPS: dict[str, tuple[str, dict[str, Any]]] = {
    "transformers": ("transformers", {}),
    "transformers+lookup": ("transformers", {"prompt_lookup_tokens": 10}),
    "vllm": ("vllm", {}),
    "vllm+ngram": ("vllm", {"ngram_tokens": 4}),
    "ours plain": ("ours", {"engine": {"drafter": "none"}}),
    "ours+ngram": ("ours", {"engine": {"drafter": "ngram"}}),
    "ours+suffix": ("ours", {"engine": {"drafter": "suffix"}}),
    "ours default": ("ours", {"engine": {}}),
}


@dataclass(frozen=True, slots=True)
class Workload:
    """Token-id prompts, the stop tokens, and how many tokens each row may add."""

    prompts: Sequence[Sequence[int]]
    eos_token_ids: Sequence[int]
    max_new_tokens: int

    def job(self, first: int, count: int) -> dict[str, Any]:
        """The ``count`` prompts from ``first`` on."""
        rows = [list(ids) for ids in self.prompts[first : first + count]]
        return {"prompts": rows, "eos_token_ids": list(self.eos_token_ids), "max_new_tokens": self.max_new_tokens}


@dataclass(slots=True)
class Peer:
    """A running child process."""

    name: str
    process: subprocess.Popen[str]
    version: str = ""
    rates: dict[int, list[float]] = field(default_factory=dict)
    accepted: dict[int, list[float]] = field(default_factory=dict)

    @classmethod
    def start(cls, name: str, setup: dict[str, Any], root: Path) -> Peer:
        kind, options = _SETUPS[name]
        process = subprocess.Popen(
            [str(environments.python_of(root, kind)), str(HERE / f"{kind}_peer.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        peer = cls(name, process)
        peer.version = str(peer.ask({**setup, **options})["version"])
        return peer

    def ask(self, value: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(value) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"peer {self.name} ended without an answer; run its script by hand to see why")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def measure(self, workload: Workload, concurrency: int, *, first: int, count: bool) -> None:
        answer = self.ask(workload.job(first, concurrency))
        if count:
            self.rates.setdefault(concurrency, []).append(answer["num_tokens"] / answer["seconds"])
            if "accepted_length" in answer:
                self.accepted.setdefault(concurrency, []).append(answer["accepted_length"])

    def as_dict(self) -> dict[str, Any]:
        """Tokens per second and accepted lengths of every repeat, by concurrency; plain JSON values."""
        return {
            "name": self.name,
            "version": self.version,
            "tokens_per_s": {str(concurrency): rates for concurrency, rates in self.rates.items()},
            "accepted_length": {str(concurrency): lengths for concurrency, lengths in self.accepted.items()},
        }

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()


def load_workload(model: Path, prompts: Path, max_new_tokens: int) -> Workload:
    """Prompts (``turns[0]`` or ``prompt`` of each JSON line) through the checkpoint's own chat template."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line) for line in prompts.read_text().splitlines() if line.strip()]
    texts = [row["turns"][0] if "turns" in row else row["prompt"] for row in rows]
    ids = [
        tokenizer.apply_chat_template([{"role": "user", "content": t}], add_generation_prompt=True)["input_ids"]
        for t in texts
    ]
    eos = AutoConfig.from_pretrained(model).eos_token_id
    return Workload(ids, eos if isinstance(eos, list) else [eos], max_new_tokens)


def table(peers: Sequence[Peer], concurrencies: Sequence[int]) -> str:
    """Markdown: median tokens per second, and in brackets the median ratio to the baseline."""
    lines = ["| engine | " + " | ".join(str(c) for c in concurrencies) + " |", "|---" * (len(concurrencies) + 1) + "|"]
    baseline = _baseline(peers)
    for peer in peers:
        cells = [_cell(peer, baseline, concurrency) for concurrency in concurrencies]
        lines.append(f"| {peer.name} ({peer.version}) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _baseline(peers: Sequence[Peer]) -> Peer | None:
    by_name = {peer.name: peer for peer in peers}
    return next((by_name[name] for name in _BASELINES if name in by_name), None)


def _cell(peer: Peer, baseline: Peer | None, concurrency: int) -> str:
    rates = peer.rates.get(concurrency)
    if not rates:
        return "–"
    text = f"{statistics.median(rates):.0f}"
    if baseline is not None and baseline is not peer and baseline.rates.get(concurrency):
        ratio = statistics.median(a / b for a, b in zip(rates, baseline.rates[concurrency], strict=True))
        text += f" ({ratio:.2f}×)"
    accepted = peer.accepted.get(concurrency)
    if accepted and statistics.median(accepted) > 1.01:
        text += f", accepted length {statistics.median(accepted):.2f}"
    return text


def command(
    prompts: Annotated[Path, typer.Option(help="JSON lines with `turns` or `prompt`.")],
    environments_dir: Annotated[Path, typer.Option("--environments", help="Folder for the peers' environments.")],
    target: Target = DEFAULT_TARGET,
    engines: Annotated[str, typer.Option(help="Comma-separated, of: " + ", ".join(_SETUPS))] = ",".join(_SETUPS),
    concurrency: Concurrency = "1,8,32,128",
    repeats: Repeats = 5,
    max_new_tokens: MaxNewTokens = 128,
    dtype: Dtype = "bfloat16",
    threads: Threads = None,
    report: Annotated[Path | None, typer.Option(help="Write the table here too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Our engine, transformers and vLLM on the same token ids, in turns."""
    from dspark_batch.models.convert import materialise
    from dspark_batch.models.sources import resolve_source

    chosen = names(engines)
    unknown = [name for name in chosen if name not in _SETUPS]
    if unknown:
        raise typer.BadParameter(f"no engine {', '.join(unknown)}; known are {', '.join(_SETUPS)}")
    num_threads = threads or len(os.sched_getaffinity(0))
    if any(_SETUPS[name][0] == "vllm" for name in chosen):
        environments.install_vllm(environments_dir)
    model = materialise(resolve_source(target))
    workload = load_workload(model, prompts, max_new_tokens)
    concurrencies = parse_concurrencies(concurrency)
    wanted = (repeats + 1) * sum(concurrencies)
    if wanted > len(workload.prompts):
        raise typer.BadParameter(f"{prompts} has {len(workload.prompts)} prompts; these settings need {wanted}")
    setup = {"model": str(model), "dtype": dtype, "threads": num_threads}
    peers: list[Peer] = []
    try:
        for name in chosen:
            peers.append(Peer.start(name, setup, environments_dir))
            sys.stderr.write(f"{name} is ready\n")
        first = 0  # no prompt comes twice: a drafter that remembers finished rows must not meet one again
        for repeat in range(-1, repeats):
            for count in concurrencies:
                for peer in peers:
                    peer.measure(workload, count, first=first, count=repeat >= 0)
                first += count
            sys.stderr.write(f"repeat {repeat + 1} of {repeats}\n{table(peers, concurrencies)}\n")
    finally:
        for peer in peers:
            peer.stop()
    text = _report(peers, concurrencies, workload, repeats, dtype, num_threads)
    sys.stdout.write(text)
    if report is not None:
        report.write_text(text)
    if as_json:
        write_json([peer.as_dict() for peer in peers])


def _report(
    peers: Sequence[Peer], concurrencies: Sequence[int], workload: Workload, repeats: int, dtype: str, threads: int
) -> str:
    used = ", ".join(f"{name} {version}" for name, version in sorted(versions().items()))
    baseline = _baseline(peers)
    ratios = "" if baseline is None else f"; in brackets the median ratio to {baseline.name}"
    return (
        f"{table(peers, concurrencies)}\n\n"
        f"Emitted tokens per second over the whole call, median of {repeats} interleaved repeats{ratios}; "
        f"{workload.max_new_tokens} new tokens at most, greedy, {dtype}, {threads} threads, versions: {used}.\n"
    )


if __name__ == "__main__":
    sys.exit(run_module(command))
