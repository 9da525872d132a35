import itertools
import json
import random

import numpy as np
import pytest
from numpy.typing import NDArray

from dspark_batch.core import Constraint
from dspark_batch.sampling.constraints import Constraints, Matcher, problem_of
from dspark_batch.testing.scripted_target import LetterCodec

CODEC = LetterCodec()
VOCAB = len(CODEC.alphabet)
EOS = CODEC.alphabet.index("f")
WORDS = ["no", "not", "nothing", "yes", "yesterday, 12!"]


@pytest.fixture(scope="module")
def constraints() -> Constraints:
    return Constraints(CODEC, vocab_size=VOCAB, eos_token_ids=[EOS])


def choices(words: list[str]) -> Constraint:
    return Constraint("choices", json.dumps(words))


def allowed(mask: NDArray[np.int32]) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def expected(words: list[str], text: str) -> set[int]:
    """What may come after a text, by trying every letter."""
    letters = {i for i, c in enumerate(CODEC.alphabet) if any(word.startswith(text + c) for word in words)}
    return letters | ({EOS} if text in words else set())


def walked(matcher: Matcher, text: str) -> Matcher:
    for token_id in CODEC.encode(text):
        matcher.commit(token_id)
    return matcher


def test_masks_along_any_draft_are_those_of_every_prefix_and_move_nothing(constraints: Constraints) -> None:
    chance = random.Random(3)
    for _ in range(200):
        word = chance.choice(WORDS)
        at = chance.randrange(len(word))
        matcher = walked(constraints.begin(choices(WORDS)), word[:at])
        draft = CODEC.encode(word[at : at + chance.randrange(6)])
        if chance.random() < 0.5:
            draft.insert(chance.randint(0, len(draft)), chance.choice(sorted({*range(VOCAB)} - {EOS})))
        masks = matcher.masks(draft)
        assert masks.shape[0] == len(draft) + 1
        text, num_allowed = word[:at], 0
        for token_id, mask in itertools.zip_longest(draft, masks):
            assert allowed(mask) == expected(WORDS, text)
            if token_id is None or token_id not in expected(WORDS, text):
                break
            text, num_allowed = text + CODEC.alphabet[token_id], num_allowed + 1
        assert matcher.num_allowed(draft) == num_allowed
        assert (masks[num_allowed + 1 :] == -1).all()
        assert allowed(matcher.masks([])[0]) == expected(WORDS, word[:at])


def test_what_has_to_come_is_known_as_far_as_there_is_no_choice(constraints: Constraints) -> None:
    matcher = walked(constraints.begin(choices(WORDS)), "y")
    assert CODEC.decode(matcher.forced(9)) == "es"
    assert CODEC.decode(matcher.forced(1)) == "e"
    assert matcher.ending(9) == []  # `yes` may end or go on
    walked(matcher, "est")
    assert matcher.ending(9) == []
    assert CODEC.decode(matcher.ending(10)) == "erday, 12!"
    assert CODEC.decode(matcher.forced(99)) == "erday, 12!"


def test_a_text_is_complete_where_nothing_may_follow(constraints: Constraints) -> None:
    matcher = constraints.begin(choices(["no", "not"]))
    assert [matcher.commit(token_id) for token_id in CODEC.encode("not")] == [False, False, True]


def test_samples_of_one_constraint_do_not_share_their_place(constraints: Constraints) -> None:
    first, second = (constraints.begin(choices(WORDS)) for _ in range(2))
    walked(first, "noth")
    assert allowed(second.masks([])[0]) == expected(WORDS, "")


def test_a_schema_gives_json_without_optional_blanks(constraints: Constraints) -> None:

    # The alphabet has no braces, so only a number can be written with it.
    matcher = constraints.begin(Constraint("json_schema", json.dumps({"enum": [1, 23]})))
    assert allowed(matcher.masks([])[0]) == set(CODEC.encode("12"))


@pytest.mark.parametrize(
    ("constraint", "said"),
    [
        (Constraint("regex", "(a"), "unclosed group"),
        (Constraint("grammar", "start: word"), "unknown name"),
        (Constraint("json_schema", '{"type": "nonsense"}'), "Invalid type: nonsense"),
        (Constraint("json_schema", "{"), "EOF while parsing"),
    ],
)
def test_a_constraint_that_cannot_be_followed_is_named(constraint: Constraint, said: str) -> None:
    problem = problem_of(constraint)
    assert problem is not None
    assert said in problem
    with pytest.raises(ValueError, match=f"sampling.{constraint.kind}"):
        Constraints(CODEC, vocab_size=VOCAB, eos_token_ids=[EOS]).begin(constraint)


def test_a_target_without_tokenizer_or_end_says_so() -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Constraints(None, vocab_size=VOCAB, eos_token_ids=[EOS]).begin(choices(["a"]))
    with pytest.raises(ValueError, match="end-of-sequence"):
        Constraints(CODEC, vocab_size=VOCAB, eos_token_ids=[]).begin(choices(["a"]))


def test_a_constraint_that_grows_too_complex_ends_in_an_error_not_an_exception(constraints: Constraints) -> None:
    matcher = constraints.begin(choices(WORDS))
    matcher.commit(CODEC.encode("z")[0])
    assert matcher.error is not None
    assert matcher.masks(CODEC.encode("no")).shape[0] == 3
    assert matcher.forced(3) == []
    assert matcher.ending(3) == []
    assert matcher.num_allowed(CODEC.encode("no")) == 0
