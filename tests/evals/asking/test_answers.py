"""What `Respondent` does when memory runs out or logits are not finite, and what `Progress` says; no model is run."""

# ruff: noqa: F811  (fixtures are imported)

from __future__ import annotations

import jax
import numpy as np
import pytest

from evals.asking import answers
from evals.asking.answers import Respondent
from evals.progress import Progress
from janus_jax.sampling.finite import NotFinite
from janus_jax.sampling.memory import OutOfMemory
from tests.evals.asking.toy import Toy, write_data
from tests.library.tiny_janus import folder, janus, raises_one_line  # noqa: F401


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    return Toy().load(write_data(tmp_path_factory.mktemp("data"), two=True), "report").items


@pytest.fixture
def batches(monkeypatch) -> list[int]:
    """The numbers of rows that are asked together; each row says how many they are."""
    seen = []

    def embed(model, params, pixels):
        return np.zeros((len(pixels), model.config.vision.num_patches, model.config.language.width), np.float32)

    def answer(model, params, asked, eos_id, max_new_tokens, mesh):
        seen.append(len(asked.ids))
        return np.full((len(asked.ids), 2), [len(asked.ids), eos_id], np.int32)

    monkeypatch.setattr(answers, "embed_pictures", embed)
    monkeypatch.setattr(answers, "answer", answer)
    return seen


def failing_above(rows: int, monkeypatch):
    """Memory runs out for more than so many rows."""
    real = answers.answer

    def answer(model, params, asked, **how):
        if len(asked.ids) > rows:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return real(model, params, asked, **how)

    monkeypatch.setattr(answers, "answer", answer)


def texts(replies) -> dict[str, str]:
    return {name: text for batch in replies for name, text in batch.texts.items()}


@pytest.mark.slow
def test_batches_are_halved_when_memory_runs_out(janus, items, batches, monkeypatch):
    failing_above(5, monkeypatch)
    respondent = Respondent(janus, batch_size=16)
    found = texts(respondent.ask(items))
    assert set(found) == {item.id for item in items}
    assert max(batches) == 4 and respondent.encoded == 3
    # Later benchmarks begin with what fits.
    batches.clear()
    texts(respondent.ask(items))
    assert max(batches) == 4 and sum(batches) >= len(items)


def test_not_even_one_question_fits(janus, items, batches, monkeypatch):
    failing_above(0, monkeypatch)
    with raises_one_line("not even one question", OutOfMemory):
        texts(Respondent(janus, batch_size=4).ask(items))


def test_another_error_is_not_memory(janus, items, batches, monkeypatch):
    def answer(*args, **how):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(answers, "answer", answer)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        texts(Respondent(janus).ask(items))


def test_the_question_with_bad_logits_is_named(janus, items, batches, monkeypatch):
    def answer(model, params, asked, **how):
        raise NotFinite("conversation", [1], "the logits are not finite")

    monkeypatch.setattr(answers, "answer", answer)
    with raises_one_line("question none1: the logits are not finite"):
        texts(Respondent(janus).ask(items))


@pytest.mark.parametrize("size", [0, -1, 1.5])
def test_batch_size(janus, size):
    with raises_one_line("batch_size must be an integer of at least 1"):
        Respondent(janus, batch_size=size)


def test_time_left(capsys):
    progress = Progress("pope", 1000, 200, None)
    assert progress.line(0) == "pope: 200 of 1,000"
    progress.add(100)  # with compilation
    began, done = progress._began
    assert done == 300
    progress.add(100)
    assert progress.line(began + 10) == "pope: 400 of 1,000, 10 items/s, 1m00s left"
    assert progress.line(began + 1000) == "pope: 400 of 1,000, 0.1 items/s, 1h40m left"
    assert capsys.readouterr().err == ""  # not yet time for a line
    progress.add(600)
    assert capsys.readouterr().err.startswith("pope: 1,000 of 1,000")
