"""What benchmarks of yes and no share: verdicts, and VLMEvalKit's judge of replies that say neither."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evals.items import Attempt, Item, JudgeRequest, Task, Verdict
from evals.rules import yes_no as rules

JUDGED = ("report", "vlmevalkit")  # protocols
_JUDGE = (
    "You are an AI assistant who will help me to match an answer with two options of a question. "
    "The options are only Yes / No. You are provided with a question and an answer, and you need to find which option "
    "(Yes / No) is most similar to the answer. If the meaning of all options are significantly different from the "
    "answer, output Unknown. Your should output a single word among the following 3 choices: Yes, No, Unknown.\n"
    "Example 1: \nQuestion: Is the word in this image 'Hello'?\nAnswer: The word in this image is 'Hello'.\n"
    "Your output: Yes\n"
    "Example 2: \nQuestion: Is the word in this image 'Hello'?\nAnswer: The word in this image is not 'Hello'.\n"
    "Your output: No\n"
    "Example 3: \nQuestion: {question}?\nAnswer: {answer}\nYour output: "
)


class YesNo(Task):
    """A benchmark of yes or no, with VLMEvalKit's judge of replies that say neither."""

    protocols = ("report", "vlmevalkit", "lmms-eval", "official")

    def judge_requests(
        self, items: Sequence[Item], predictions: Mapping[str, str | None], protocol: str
    ) -> list[JudgeRequest]:
        if protocol not in JUDGED:
            return []
        wanted = []
        for item in items:
            reply = predictions.get(item.id)
            if reply is None or rules.vlmevalkit(reply):
                continue
            messages = [{"role": "user", "content": _JUDGE.format(question=item.fields["question"], answer=reply)}]
            attempts = [Attempt(messages, 0.5 * number, 128) for number in range(5)]
            wanted.append(JudgeRequest(item.id, item, attempts, "Unknown"))
        return wanted

    def parse_judgement(self, request: JudgeRequest, reply: str) -> Any | None:
        return rules.vlmevalkit(reply) or None


def verdict(item: Item, reply: str | None, rule: Callable[[str], str], judged: Mapping[str, Any] | None) -> Verdict:
    """By the protocol's rule, then by the judge; without a judge, a reply that says neither is wrong."""
    if reply is None:
        return Verdict("", "wrong", 0.0)
    said = rule(reply)
    if not said and judged is not None:
        if item.id not in judged:
            return Verdict("", "unjudged", 0.0)
        said = str(judged[item.id])
    right = said == item.fields["answer"]
    return Verdict(said, "right" if right else "wrong", float(right))


def gold(text: str) -> str:
    """A gold answer as "yes" or "no"; "" for anything else."""
    text = text.strip().lower().rstrip(".")
    return text if text in ("yes", "no") else ""


def no_gold(answer: str) -> str:
    """The problem of an item without a gold answer; "" if `answer` is one."""
    return "" if gold(answer) else f"its answer is {answer!r}, neither yes nor no"
