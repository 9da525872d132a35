"""Is speculation lossless here? Token ids of many settings, compared with each other and with transformers.

``python -m dspark_batch.bench.lossless PROMPTS.jsonl --rows 100`` checks, in float32 unless told otherwise:

- greedy: every drafter and concurrency against ``transformers`` generate;
- temperature 0.8 with top-p 0.95: every drafter and concurrency against plain decoding at concurrency 1.

A difference is allowed only where the two tokens are the two best of a one-pass forward (their logits, with the noise
of the draw where there is one) and lie within the margin. Every difference is listed. Exit status 1 if one is not
allowed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dspark_batch.bench.command import parse_concurrencies
from dspark_batch.bench.options import (
    DEFAULT_TARGET,
    AsJson,
    Concurrency,
    Drafters,
    Dtype,
    MaxDraftTokens,
    MaxNewTokens,
    Rows,
    Target,
    engine_config,
    names,
    run_module,
    write_json,
)
from dspark_batch.core import Message, Request, SamplingParams
from dspark_batch.engine.config import EngineConfig

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dspark_batch.models.loader import LoadedTarget

TokenIds = tuple[int, ...]

MARGIN = 1e-4
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95, seed=11)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Two runs part at output position ``position``. margin: gap of the two best scores of a one-pass forward there."""

    request_id: str
    position: int
    expected_token: int | None
    found_token: int | None
    margin: float
    is_allowed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One setting against its reference."""

    setting: str
    reference: str
    num_rows: int
    num_tokens: int
    accepted_length: float
    differences: tuple[Difference, ...]

    @property
    def is_lossless(self) -> bool:
        return all(difference.is_allowed for difference in self.differences)

    def line(self) -> str:
        verdict = "lossless" if self.is_lossless else "NOT LOSSLESS"
        return (
            f"{self.setting:<40} vs {self.reference:<28} rows {self.num_rows}  tokens {self.num_tokens}  "
            f"accepted length {self.accepted_length:.2f}  differences {len(self.differences)}  {verdict}"
        )


def read_requests(path: Path, *, num_prompts: int, sampling: SamplingParams) -> list[Request]:
    """The first prompts of a JSONL file whose lines hold ``turns`` (the first is used as a chat) or ``prompt``.

    Raises:
        ValueError: a line holds neither.
    """
    requests: list[Request] = []
    with path.open() as lines:
        for number, line in enumerate(lines, start=1):
            if len(requests) == num_prompts:
                break
            row = json.loads(line)
            if row.get("turns"):
                messages = (Message("user", row["turns"][0]),)
                requests.append(Request(id=f"{number}", messages=messages, sampling=sampling))
            elif row.get("prompt"):
                requests.append(Request(id=f"{number}", prompt=row["prompt"], sampling=sampling))
            else:
                raise ValueError(f"{path}, line {number}: neither 'turns' nor 'prompt'")
    return requests


def find_differences(
    expected: Mapping[str, TokenIds],
    found: Mapping[str, TokenIds],
    *,
    scores: Any,
    margin: float = MARGIN,
) -> tuple[Difference, ...]:
    """Where two runs part. ``scores(request_id, output_prefix)`` gives the [V] scores whose argmax is emitted next."""
    out: list[Difference] = []
    for request_id, want in expected.items():
        got = found[request_id]
        if want == got:
            continue
        shared = min(len(want), len(got))
        position = next((i for i in range(shared) if want[i] != got[i]), shared)
        here: NDArray[np.float64] = scores(request_id, want[:position])
        order = here.argsort()[::-1]
        gap = float(here[order[0]] - here[order[1]])
        tokens = tuple(ids[position] if position < len(ids) else None for ids in (want, got))
        allowed = gap <= margin and set(tokens) == {int(order[0]), int(order[1])}
        out.append(
            Difference(
                request_id=request_id,
                position=position,
                expected_token=tokens[0],
                found_token=tokens[1],
                margin=gap,
                is_allowed=allowed,
            )
        )
    return tuple(out)


class Checkpoint:
    """The checkpoint under transformers: the independent decoder, and the judge of near ties."""

    def __init__(self, config: EngineConfig) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from dspark_batch.models.convert import materialise
        from dspark_batch.models.loader import eos_token_ids, read_json
        from dspark_batch.models.sources import resolve_source
        from dspark_batch.models.text import TextCodec

        folder = materialise(resolve_source(config.target, revision=config.revision))
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        if config.device != "cpu" and torch.cuda.is_available():
            self._model.to("cuda")
        self.codec = TextCodec.from_folder(folder)
        self.eos_token_ids = eos_token_ids(folder, read_json(folder / "config.json"))

    def prompt_ids(self, request: Request) -> list[int]:
        from dspark_batch.engine.text import prompt_tokens

        tokens = prompt_tokens(request, self.codec)
        if not isinstance(tokens, list):
            raise ValueError(tokens.message)
        return tokens

    def generate(self, requests: Sequence[Request], *, batch_size: int) -> dict[str, TokenIds]:
        """Greedy outputs by ``generate``, left-padded in batches of prompts of similar length."""
        import torch

        prompts = sorted(((r, self.prompt_ids(r)) for r in requests), key=lambda pair: len(pair[1]))
        out: dict[str, TokenIds] = {}
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            width = max(len(ids) for _, ids in batch)
            ids = torch.tensor([[0] * (width - len(p)) + p for _, p in batch], device=self._model.device)
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for _, p in batch], device=self._model.device)
            texts = self._model.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=batch[0][0].sampling.max_new_tokens,
                eos_token_id=list(self.eos_token_ids) or None,
                pad_token_id=0,
            )
            for (request, _), text in zip(batch, texts[:, width:].tolist(), strict=True):
                out[request.id] = self._until_stop(text)
        return out

    def scores(self, requests: Mapping[str, Request], request_id: str, prefix: TokenIds) -> NDArray[np.float64]:
        """[V] float64: next-token logits of a one-pass forward; with noise, after cuts, at a temperature above 0."""
        import numpy as np
        import torch

        from dspark_batch.sampling import reference
        from dspark_batch.sampling.noise import noise_key

        request = requests[request_id]
        tokens = [*self.prompt_ids(request), *prefix]
        with torch.inference_mode():
            logits = self._model(torch.tensor([tokens], device=self._model.device)).logits[0, -1].double().cpu().numpy()
        if request.sampling.is_greedy:
            return np.asarray(logits, dtype=np.float64)
        scores = reference.log_probs(logits.tolist(), request.sampling)
        key = noise_key(request.sampling.seed, request.id, 0)
        for token in np.flatnonzero(np.isfinite(scores)).tolist():
            scores[token] += reference.gumbel(key, len(tokens), token)
        return scores

    def _until_stop(self, text: Sequence[int]) -> TokenIds:
        for i, token in enumerate(text):
            if token in self.eos_token_ids:
                return tuple(text[: i + 1])
        return tuple(text)


def run_setting(
    loaded: LoadedTarget, config: EngineConfig, requests: Sequence[Request]
) -> tuple[dict[str, TokenIds], float]:
    """Token ids by request id, and the accepted length."""
    from dspark_batch.engine.engine import BatchEngine

    with BatchEngine(loaded, config) as engine:
        results = list(engine.generate(requests))
        accepted_length = engine.stats.accepted_length or 1.0
    failed = [r for r in results if r.error is not None]
    if failed:
        raise ValueError(f"request {failed[0].id!r} failed: {failed[0].error}")
    return {r.id: r.token_ids for r in results}, accepted_length


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to compare: every drafter at every concurrency, otherwise set as ``base`` is."""

    prompts: Path
    base: EngineConfig
    drafters: tuple[str, ...]
    concurrencies: tuple[int, ...]
    num_prompts: int
    max_new_tokens: int
    peer_batch_size: int


def compare_all(plan: Plan) -> list[Comparison]:
    """Every drafter and concurrency, greedy and sampled; writes a line for each as it is known."""
    from dspark_batch.models.loader import load_target

    base = plan.base
    checkpoint, loaded = Checkpoint(base), load_target(base)
    out: list[Comparison] = []
    for sampled in (False, True):
        sampling = SamplingParams(
            max_new_tokens=plan.max_new_tokens,
            temperature=SAMPLED.temperature if sampled else 0.0,
            top_p=SAMPLED.top_p if sampled else 1.0,
            seed=SAMPLED.seed,
        )
        requests = read_requests(plan.prompts, num_prompts=plan.num_prompts, sampling=sampling)
        by_id = {request.id: request for request in requests}
        reference, expected = "transformers generate", None
        if not sampled:
            expected = checkpoint.generate(requests, batch_size=plan.peer_batch_size)
        for drafter in plan.drafters:
            for concurrency in plan.concurrencies:
                config = base.model_copy(update={"drafter": drafter, "max_concurrency": concurrency})
                found, accepted_length = run_setting(loaded, config, requests)
                name = f"T={sampling.temperature:g} {drafter} concurrency={concurrency}"
                if expected is None:
                    reference, expected = name, found
                comparison = Comparison(
                    setting=name,
                    reference=reference,
                    num_rows=len(found),
                    num_tokens=sum(map(len, found.values())),
                    accepted_length=accepted_length,
                    differences=find_differences(expected, found, scores=partial(checkpoint.scores, by_id)),
                )
                out.append(comparison)
                _show(comparison)
    return out


def _show(comparison: Comparison) -> None:
    sys.stdout.write(comparison.line() + "\n")
    for difference in comparison.differences:
        sys.stdout.write(f"    {difference}\n")
    sys.stdout.flush()


def command(
    prompts: Annotated[Path, typer.Argument(help='JSON lines with {"turns": [...]} or {"prompt": ...}.')],
    rows: Rows = 100,
    max_new_tokens: MaxNewTokens = 64,
    concurrency: Concurrency = "1,7,32",
    drafters: Drafters = "none,ngram",
    max_draft_tokens: MaxDraftTokens = None,
    target: Target = DEFAULT_TARGET,
    dtype: Dtype = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    peer_batch_size: Annotated[int, typer.Option(min=1, help="Rows that transformers decodes together.")] = 8,
    as_json: AsJson = False,
) -> None:
    """Token ids of many settings, compared with each other and with transformers; exit code 1 where they differ."""
    values = {"target": target, "dtype": dtype, "device": device, "max_draft_tokens": max_draft_tokens}
    plan = Plan(
        prompts=prompts,
        base=engine_config(values),
        drafters=names(drafters),
        concurrencies=parse_concurrencies(concurrency),
        num_prompts=rows,
        max_new_tokens=max_new_tokens,
        peer_batch_size=peer_batch_size,
    )
    comparisons = compare_all(plan)
    is_lossless = all(comparison.is_lossless for comparison in comparisons)
    sys.stdout.write("lossless\n" if is_lossless else "NOT lossless\n")
    if as_json:
        write_json([asdict(comparison) for comparison in comparisons])
    raise typer.Exit(0 if is_lossless else 1)


if __name__ == "__main__":
    sys.exit(run_module(command))
