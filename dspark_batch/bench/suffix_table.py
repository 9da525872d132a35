"""Does the suffix drafter pay on a labelling table? Its outputs repeat: JSON with fixed keys and few values.

``python -m dspark_batch.bench.suffix_table configs/data/product_reviews.parquet`` labels reviews with the embedded
model (a prompt of worked examples, greedy), plain and with every drafter asked for, in turns. ``--write FILE`` writes
the prompts as JSON lines instead, for ``dspark-batch bench throughput``.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from dspark_batch.bench.measure import Measurement, Setting, measure_in_turns
from dspark_batch.bench.options import (
    DEFAULT_TARGET,
    AsJson,
    Drafters,
    Dtype,
    MaxDraftTokens,
    Repeats,
    Rows,
    Target,
    engine_config,
    names,
    run_module,
    write_json,
)
from dspark_batch.core import Request, SamplingParams
from dspark_batch.engine.config import EngineConfig

_EXAMPLES: tuple[tuple[str, dict[str, str | bool]], ...] = (
    (
        "The charger died after a week and nobody answers my mails.",
        {"category": "electronics", "sentiment": "negative", "urgency": "high", "needs_reply": True, "defect": True},
    ),
    (
        "Lovely scarf, warm and light. My sister wants one too.",
        {"category": "clothing", "sentiment": "positive"},
    ),
    (
        "The soup bowls are fine. Nothing special, nothing broken.",
        {"category": "kitchen", "sentiment": "neutral"},
    ),
    (
        "Two pages were missing and I would like my money back.",
        {"category": "books", "sentiment": "negative", "urgency": "high", "needs_reply": True, "refund_wanted": True},
    ),
)
_USUAL_LABELS: dict[str, str | bool] = {
    "category": "other",
    "sentiment": "neutral",
    "urgency": "low",
    "needs_reply": False,
    "defect": False,
    "refund_wanted": False,
    "late_delivery": False,
    "language": "english",
    "contains_personal_data": False,
    "contains_insults": False,
}


def _label_line(labels: Mapping[str, str | bool]) -> str:
    """The JSON that an example shows; every key in its place, so that only values differ between rows."""
    return json.dumps({**_USUAL_LABELS, **labels})


def labelling_prompt(text: str) -> str:
    """A prompt that asks for the labels of one review, after worked examples; the answer is one line of JSON."""
    shown = "\n\n".join(f"Review: {example}\nLabels: {_label_line(labels)}" for example, labels in _EXAMPLES)
    return f"Label every review with one line of JSON.\n\n{shown}\n\nReview: {text}\nLabels:"


def labelling_requests(reviews: Path, *, num_rows: int, max_new_tokens: int = 128) -> list[Request]:
    """Requests over the ``text`` column of a Parquet file. More rows than it has: pairs of reviews, all different."""
    import pyarrow.parquet as pq

    texts = [str(text) for text in pq.read_table(reviews, columns=["text"]).column("text").to_pylist()]
    sampling = SamplingParams(max_new_tokens=max_new_tokens, stop=("\n",))
    out = []
    for number in range(num_rows):
        turn, first = divmod(number, len(texts))
        text = texts[first] if turn == 0 else f"{texts[first]} {texts[(first + 7 * turn) % len(texts)]}"
        out.append(Request(id=str(number), prompt=labelling_prompt(text), sampling=sampling))
    return out


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to run. ``base`` is the setting that all share; ``drafters`` are compared with none."""

    reviews: Path
    base: EngineConfig
    drafters: tuple[str, ...]
    concurrency: int
    num_rows: int
    repeats: int


def compare(plan: Plan) -> dict[str, list[Measurement]]:
    """Every setting once per repeat, in turns step by step, after a short warm-up."""
    from dspark_batch.models.loader import load_target

    base = plan.base.model_copy(update={"max_concurrency": plan.concurrency})
    settings = {name: Setting(config=base.model_copy(update={"drafter": name})) for name in ("none", *plan.drafters)}
    requests = labelling_requests(plan.reviews, num_rows=plan.num_rows)
    loaded = load_target(base)
    measure_in_turns(loaded, list(settings.values()), requests[: plan.concurrency])
    found: dict[str, list[Measurement]] = {name: [] for name in settings}
    for _ in range(plan.repeats):
        for name, run in zip(settings, measure_in_turns(loaded, list(settings.values()), requests), strict=True):
            found[name].append(run)
    return found


def report(found: dict[str, list[Measurement]]) -> list[str]:
    """One line a setting: median rate, median of the per-repeat ratios to plain, accepted length, shares of time."""
    plain = found["none"]
    lines = []
    for name, runs in found.items():
        ratio = statistics.median(
            run.tokens_per_s / reference.tokens_per_s for run, reference in zip(runs, plain, strict=True)
        )
        rate = statistics.median(run.tokens_per_s for run in runs)
        last = runs[-1]
        shares = "  ".join(
            f"{part} {getattr(last, part + '_s') / last.wall_s:.0%}" for part in ("draft", "forward", "sample", "host")
        )
        lines.append(
            f"{name:<8} {rate:7.0f} tokens/s  {ratio:.2f}x plain  accepted length {last.accepted_length or 1:.2f}  "
            f"tokens {last.num_emitted_tokens}  drafted {last.num_drafted_tokens}  "
            f"verified {last.num_verified_draft_tokens}  accepted {last.num_accepted_tokens}  {shares}"
        )
    return lines


def command(
    reviews: Annotated[Path, typer.Argument(help="Parquet file with a `text` column.")],
    rows: Rows = 96,
    repeats: Repeats = 5,
    concurrency: Annotated[int, typer.Option(min=1, help="Rows decoded together.")] = 8,
    drafters: Drafters = "suffix",
    schedule: Annotated[str, typer.Option(help="auto, fixed, threshold or off.")] = "auto",
    max_draft_tokens: MaxDraftTokens = None,
    target: Target = DEFAULT_TARGET,
    dtype: Dtype = "bfloat16",
    write: Annotated[Path | None, typer.Option(help="Write the prompts as JSON lines here, and stop.")] = None,
    as_json: AsJson = False,
) -> None:
    """Labelling REVIEWS with one line of JSON each: plain decoding and drafters, in turns."""
    if write is not None:
        requests = labelling_requests(reviews, num_rows=rows)
        write.write_text("".join(json.dumps({"prompt": request.prompt}) + "\n" for request in requests))
        return
    values = {"target": target, "dtype": dtype, "schedule": schedule, "max_draft_tokens": max_draft_tokens}
    plan = Plan(
        reviews=reviews,
        base=engine_config(values),
        drafters=names(drafters),
        concurrency=concurrency,
        num_rows=rows,
        repeats=repeats,
    )
    found = compare(plan)
    sys.stdout.write("\n".join(report(found)) + "\n")
    if as_json:
        write_json({name: [run.as_dict() for run in runs] for name, runs in found.items()})


if __name__ == "__main__":
    sys.exit(run_module(command))
