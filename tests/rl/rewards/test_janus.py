"""Janus as the judge, against transformers' port of it, and what cannot be one."""

# ruff: noqa: F811  (fixtures are imported)

from __future__ import annotations

import numpy as np
import pytest

from janus_jax.weights import conversion
from tests.library.tiny_janus import folder  # noqa: F401
from train.rl.config import RewardConfig
from train.rl.rewards import Rewards
from train.rl.rewards.janus import QUESTION, YesNo, first_tokens

PROMPTS = ["a red circle", "two small dogs on a very long and winding road to the sea", "x", "a cat"]
FUNCTION = "train.rl.rewards.janus:YesNo"


@pytest.mark.slow
def test_against_transformers(folder, pictures, tmp_path):
    """Each picture alone, without padding, by the port's own forward."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    conversion.to_torch(folder, tmp_path / "port", "transformers", note=lambda text: None)
    port = transformers.JanusForConditionalGeneration.from_pretrained(tmp_path / "port", dtype=torch.float32).eval()
    judge = YesNo(str(folder), dtype="float32")
    processor = judge._processor
    yes, no = first_tokens(processor.tokenizer)
    expected = []
    for picture, prompt in zip(pictures, PROMPTS, strict=True):
        asked = QUESTION.replace("{prompt}", prompt)
        ids, _, pixels, mask = processor.understanding_batch([asked], [[picture]], "")
        with torch.no_grad():
            logits = port(
                input_ids=torch.tensor(ids[mask][None], dtype=torch.long),
                pixel_values=torch.tensor(pixels[0].transpose(0, 3, 1, 2)),
            ).logits[0, -1]
        each = np.exp(np.asarray(logits, np.float64))
        expected.append(each[yes].sum() / (each[yes].sum() + each[no].sum()))
    found = judge(pictures, PROMPTS, [{}] * 4)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.ptp(expected) > 1e-4 and found.shape == (4,)  # pictures and prompts matter
    # What a picture is said to be depends on nobody else's.
    np.testing.assert_allclose(judge(pictures[::-1], PROMPTS[::-1], [{}] * 4)[::-1], found, rtol=1e-6)


@pytest.mark.slow
def test_in_a_run(folder, pictures, capsys):
    """A prompt that cannot be asked about loses its call alone."""
    prompts = ["a cat", "<image_placeholder>" * 2, "a dog", "x"]
    made = RewardConfig(FUNCTION, options=(f"model={folder}", "dtype=float32"), workers=0, batch_size=2, tries=1)
    with Rewards([made]) as rewards:
        found = rewards.result(rewards.start(pictures, prompts, [{}] * 4))
    assert np.isnan(found.total[:2]).all() and ((found.total[2:] > 0) & (found.total[2:] < 1)).all()
    assert "reward YesNo: 2 of 4 pictures have no score after 1 try: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("model=/no/such",), "reward YesNo: .*/no/such"),
        (("model=x", "question=Is it good?"), "the question must have {prompt} in it, got 'Is it good"),
        (("model=x", "wights=int8"), "got an unexpected keyword argument 'wights'"),
    ],
)
def test_what_cannot_be_a_judge(options, said):
    with pytest.raises(ValueError, match=said) as error:
        Rewards([RewardConfig(FUNCTION, options=options, workers=0)])
    assert "\n" not in str(error.value)


def test_tokens_that_begin_both_words_are_of_neither():
    class Bytes:
        def encode(self, text, add_bos):
            return list(text.encode())

    assert first_tokens(Bytes()) == ([ord("Y"), ord("y")], [ord("N"), ord("n")])  # not the space

    class Words:
        def encode(self, text, add_bos):
            return [7]

    with pytest.raises(ValueError, match="begins yes and no with the same tokens"):
        first_tokens(Words())
