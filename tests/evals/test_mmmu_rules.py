"""MMMU's own rules for replies, each branch; and lmms-eval's change of them."""

from __future__ import annotations

import random

import pytest

from evals.rules import mmmu

OPTIONS = {"A": "a cat", "B": "a dog", "C": "a blue bird", "D": "a fish"}


class Last:
    """Chance that always takes the last, so that a test sees that it was asked."""

    def choice(self, letters):
        return letters[-1]


CHANCE = ("D", True)
# Reply, the letter by MMMU, and by lmms-eval.
LETTERS = [
    ("A", "A", "A"),
    ("B.", "B", "B"),
    ("'C'", "C", "C"),
    ("(D)", "D", "D"),
    ("The answer is (B)", "B", "B"),
    ("(A) is wrong, so (B)", "B", "B"),
    ("(B) is right, A is not", "B", "B"),
    ("(C), as opposed to (A)!", "A", "A"),
    ("A or B", "B", "B"),
    ("B rather than A", "A", "A"),
    ("Answer: C", "C", "C"),
    ("I pick B, not C", "C", "C"),
    ("I pick B , not C", "C", "C"),
    ("b", CHANCE, CHANCE),
    ("", CHANCE, CHANCE),
    ("dog", CHANCE, CHANCE),
    ("a dog it is", CHANCE, CHANCE),
    ("I think that it is a dog", "B", "B"),
    ("It may be a cat but more likely a dog", "B", "B"),
    ("A DOG, I am quite sure about it", "A", "A"),
    ("Surely A DOG, as I can see", "A", "A"),
    ("Choose the letter B.", "B", "B"),
    ("The answer is B. It barks all night long", CHANCE, "B"),
    ("The answer is B. It chases a cat all night long", "A", "B"),
    # A letter at the end of a word, which the original does not take.
    ("DNA strands", CHANCE, "A"),
    ("NASA chose a blue bird for this mission", "C", "A"),
    ("ABC", CHANCE, "C"),
    # With several that have no blank on both sides, the first of the letters.
    ("ABC. NBA. They are", CHANCE, "A"),
    ("none of these options is what I see here", CHANCE, CHANCE),
    (";:!?", CHANCE, CHANCE),
]


@pytest.mark.parametrize(("reply", "official", "lmms"), LETTERS)
def test_letters(reply, official, lmms):
    for expected, of_lmms in ((official, False), (lmms, True)):
        expected = expected if isinstance(expected, tuple) else (expected, False)
        assert mmmu.letter(reply, OPTIONS, Last(), of_lmms) == expected


def test_chance_is_the_originals():
    chance, original = random.Random(42), random.Random(42)
    drawn = [mmmu.letter("hm", OPTIONS, chance)[0] for _ in range(20)]
    assert drawn == [original.choice(["A", "B", "C", "D"]) for _ in range(20)]


# Gold, reply, whether it is right.
OPEN = [
    ("24/7", "24/7", True),
    ("24/7", "It is open 24/7 all year", True),
    ("24/7", "24", False),
    (["24/7", "3.429"], "3.43", True),
    (["24/7", "3.429"], "the result is 3.4291", True),
    ("3.429", "3.42", False),
    ("12", "12", True),
    ("12", "12.00", True),
    ("12", "The answer is 12", True),
    ("12", "The answer is 12.", True),
    ("12", "12 m", True),
    ("12", "120", False),
    ("12", "We have 12 of 30, thus 42", False),
    ("42", "We have 12 of 30, thus 42", True),
    ("42", "12 + 30 = 42", True),
    # Only in the last line does a sign of equality announce a result.
    ("30", "x = 30\nso x is 12", False),
    ("12", "x = 30\nso x is 12", True),
    ("30", "it follows x = 30\nthen nothing", True),
    ("1,200", "1200", True),
    ("1200", "about 1,200 people", True),
    ("0.00015", "1.5e-4", True),
    ("-5", "the value is -5", True),
    ("5", "the value is -5", False),
    ("x", "x", True),
    ("x", "it is x", True),
    ("x", "it could be x or y", True),
    ("x", "max", False),
    ("Transformation", "transformation", True),
    ("Transformation", "This is a transformation of the plane", True),
    ("Transformation", "transform", False),
    ("dog", "The final answer: dog", True),
    ("dog", "the dog is red", False),
    ("dog", "is:", False),
    ("dog", "", False),
    ("12 cm", "12 cm.", True),
]


@pytest.mark.parametrize(("gold", "reply", "right"), OPEN)
def test_open_answers(gold, reply, right):
    assert mmmu.open_answer_is_right(reply, gold) is right
