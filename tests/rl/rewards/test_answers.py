"""Rewards of answers: what matches, and that pictures' rewards and theirs are not mixed up."""

from __future__ import annotations

import pytest

from tests.rl.rewards.made import answer_lengths
from train.rl.config import RewardConfig
from train.rl.rewards import Rewards
from train.rl.rewards.answers import Match

MATCH = "train.rl.rewards.answers:Match"


@pytest.mark.parametrize(
    ("rule", "answer", "right", "wanted"),
    [
        ("normalized", " It is a  SEVEN. ", "it is a seven", 1),
        ("normalized", '"Seven!"', "seven", 1),
        ("normalized", "It is seven", "seven", 0),
        ("normalized", "-5", "5", 0),
        ("normalized", "7", 7, 1),
        ("normalized", "", "7", 0),
        ("normalized", "the cat", ["a cat", "the cat"], 1),
        ("exact", " 7\n", "7", 1),
        ("exact", "7.", "7", 0),
        ("number", "First 12, so it is 1,234.50 in all.", "1234.5", 1),
        ("number", "It is -3.", -3, 1),
        ("number", "It is -3.", 3, 0),
        ("number", "It is 3, not 4", 3, 0),
        ("number", "none", "0", 0),
        ("number", "1, 2", "12", 0),
        ("number", "10.0", 10, 1),
    ],
)
def test_match(rule, answer, right, wanted):
    assert Match(rule)([answer], ["?"], [{"answer": right}]) == [wanted]


def test_only_what_the_pattern_finds_counts():
    boxed = Match("number", r"<answer>(.*?)</answer>")
    answers = [
        "It is 7.",
        "<answer>6</answer> no, <answer>it is\n7</answer>",
        "<answer>8</answer> 7",
        "<answer></answer>",
    ]
    assert boxed(answers, ["?"] * 4, [{"answer": 7}] * 4).tolist() == [0, 1, 0, 0]
    assert Match("exact", r"\d")(["a 3, 4 b"], ["?"], [{"answer": "4"}]) == [1]


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match=r"^rule must be among exact, normalized, number, got 'exakt'; did you mean"):
        Match("exakt")
    with pytest.raises(ValueError, match="is no regular expression"):
        Match("exact", "(")
    for metadata in ({}, {"answer": None}, {"answer": []}, {"answer": {"a": 1}}):
        with pytest.raises(
            ValueError, match=r"^the line of the prompt 'How many\?' has no answer, a text or a number$"
        ):
            Match()(["7"], ["How many?"], [metadata])


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_answers_are_judged_in_threads_and_processes(workers, capsys):
    """In their order, by several with weights; those that lack a right answer go without a score, and are named."""
    configs = [
        RewardConfig(MATCH, workers=0, batch_size=2, options=("rule=number",)),
        RewardConfig(f"{answer_lengths.__module__}:answer_lengths", weight=0.5, workers=workers, batch_size=2),
    ]
    answers = ["it is 1", "it is 22", "3"]
    with Rewards(configs, "answers") as rewards:
        found = rewards.result(rewards.start(answers, ["?"] * 3, [{"answer": n} for n in (1, 2, 3)]))
        assert found.total.tolist() == [1 + 3.5, 4.0, 1.5]
        found = rewards.result(rewards.start(answers, ["?"] * 3, [{"answer": 1}, {"answer": 2}, {}]))
        assert found.failed == 1 and found.columns["Match"][:2].tolist() == [1, 0]
        assert "reward Match: 1 of 3 answers have no score after 3 tries: the line of" in capsys.readouterr().err
        with pytest.raises(ValueError, match="answers must be a list of texts"):
            rewards.start([1, 2], ["?"] * 2, [{}] * 2)
    with Rewards(configs[:1], "answers") as rewards:
        handle = rewards.start(["1"], ["?"], [{}])
        with pytest.raises(ValueError, match=r"^reward Match has not scored any answer: the line of the prompt"):
            rewards.result(handle)


@pytest.mark.parametrize(
    ("function", "options", "rollouts", "judges"),
    [
        ("train.rl.rewards.brightness:brightness", (), "answers", "pictures"),
        ("train.rl.rewards.janus:YesNo", ("model=x",), "answers", "pictures"),
        (MATCH, (), "pictures", "answers"),
    ],
)
def test_what_judges_something_else_is_refused(function, options, rollouts, judges):
    with pytest.raises(ValueError) as error:
        Rewards([RewardConfig(function, workers=0, options=options)], rollouts)
    said = f"{function} judges {judges}, but grpo.rollouts is {rollouts}; name a reward of {rollouts}"
    assert str(error.value) == f"reward {function.rpartition(':')[2]}: {said}"
