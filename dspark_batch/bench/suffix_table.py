"""Does the suffix drafter pay on a labelling table? Its outputs repeat: JSON with fixed keys and few values.

``python -m dspark_batch.bench.suffix_table configs/data/product_reviews.parquet`` labels reviews with the embedded
model (a prompt of worked examples, greedy), plain and with every drafter asked for, in turns. ``--write FILE`` writes
the prompts as JSON lines instead, for ``dspark-batch bench throughput``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from dspark_batch.bench.measure import Measurement, measure
from dspark_batch.core import Request, SamplingParams
from dspark_batch.engine.config import EngineConfig

_EXAMPLES = (
    (
        "The charger died after a week and nobody answers my mails.",
        "electronics",
        "negative",
        "high",
        True,
    ),
    ("Lovely scarf, warm and light. My sister wants one too.", "clothing", "positive", "low", False),
    ("The soup bowls are fine. Nothing special, nothing broken.", "kitchen", "neutral", "low", False),
    ("Two pages were missing and I would like my money back.", "books", "negative", "high", True),
)


def _label_line(category: str, sentiment: str, urgency: str, needs_reply: bool) -> str:
    """The JSON that an example shows; every key in its place, so that only values differ between rows."""
    return json.dumps(
        {
            "category": category,
            "sentiment": sentiment,
            "urgency": urgency,
            "needs_reply": needs_reply,
            "language": "english",
            "contains_personal_data": False,
        }
    )


def labelling_prompt(text: str) -> str:
    """A prompt that asks for the labels of one review, after worked examples; the answer is one line of JSON."""
    shown = "\n\n".join(
        f"Review: {example}\nLabels: {_label_line(category, sentiment, urgency, needs_reply)}"
        for example, category, sentiment, urgency, needs_reply in _EXAMPLES
    )
    return f"Label every review with one line of JSON.\n\n{shown}\n\nReview: {text}\nLabels:"


def labelling_requests(reviews: Path, *, num_rows: int, max_new_tokens: int = 96) -> list[Request]:
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


def compare(args: argparse.Namespace) -> dict[str, list[Measurement]]:
    """Every setting once per repeat, in turns, after a short warm-up of each."""
    from dspark_batch.models.loader import load_target

    base = EngineConfig(
        target=args.target,
        dtype=args.dtype,
        max_concurrency=args.concurrency,
        schedule=args.schedule,
        max_draft_tokens=args.max_draft_tokens,
    )
    configs = {name: base.model_copy(update={"drafter": name}) for name in ("none", *args.drafters)}
    requests = labelling_requests(args.reviews, num_rows=args.num_rows)
    loaded = load_target(base)
    for config in configs.values():
        measure(loaded, config, requests[: args.concurrency])
    found: dict[str, list[Measurement]] = {name: [] for name in configs}
    for _ in range(args.repeats):
        for name, config in configs.items():
            found[name].append(measure(loaded, config, requests))
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dspark_batch.bench.suffix_table", description=__doc__)
    parser.add_argument("reviews", type=Path, help="Parquet file with a `text` column")
    parser.add_argument("--target", default=EngineConfig().target)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--drafters", nargs="+", default=["suffix"])
    parser.add_argument("--schedule", default="auto")
    parser.add_argument("--max-draft-tokens", type=int, default=None)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--num-rows", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", type=Path, default=None, help="write the prompts as JSON lines here, and stop")
    parser.add_argument("--json", action="store_true", help="every measurement as one JSON object, last line")
    args = parser.parse_args(argv)
    if args.write is not None:
        requests = labelling_requests(args.reviews, num_rows=args.num_rows)
        args.write.write_text("".join(json.dumps({"prompt": request.prompt}) + "\n" for request in requests))
        return 0
    found = compare(args)
    sys.stdout.write("\n".join(report(found)) + "\n")
    if args.json:
        sys.stdout.write(json.dumps({name: [run.as_dict() for run in runs] for name, runs in found.items()}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
