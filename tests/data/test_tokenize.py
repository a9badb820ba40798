"""From raw samples to token ids: what a model is asked with, what it is to answer, and what is refused."""

import dataclasses
import os
import pathlib
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.tiny.tokenizer import BOS, EOS, write_tokenizer
from janus_jax.config import get_preset
from janus_jax.processing.chat import SYSTEM_PROMPT, Processor
from janus_jax.processing.images import generation_pixels
from tests.raw.test_sources import png
from train.data.samples import Sample
from train.data.tokenize import SampleTokenizer, tokenizer_fingerprint
from train.raw.sources import BadSample, RawSample

CONFIG = get_preset("janus_tiny")
CODES, SLOTS, SIDE = CONFIG.gen_vision.num_tokens, CONFIG.vision.num_patches, CONFIG.gen_vision.image_size


@pytest.fixture(scope="module", params=["pro", "old"])
def any_processor(request, tmp_path_factory):
    folder = write_tokenizer(tmp_path_factory.mktemp(request.param), request.param, image_size=CONFIG.vision.image_size)
    return Processor.from_folder(folder, CONFIG)


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer"), image_size=CONFIG.vision.image_size)
    return Processor.from_folder(folder, CONFIG)


def talk(*texts, system=None, **fields) -> RawSample:
    """A conversation, user first."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return RawSample("here:1", tuple(messages), **fields)


def one(processor, raw, kind="understanding", context=400, **options) -> Sample:
    (sample,), _ = SampleTokenizer(processor, kind, context, **options)(raw)
    return sample


def refusal(processor, raw, kind="understanding", context=400) -> BadSample:
    with pytest.raises(BadSample) as caught:
        SampleTokenizer(processor, kind, context)(raw)
    assert caught.value.place == "here:1" and "\n" not in str(caught.value)
    return caught.value


# ---------------------------------------------------------------- conversations

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(TEXT, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0),
    tags=st.lists(st.sampled_from(["", "<image>\n", " <image>"]), min_size=6, max_size=6),
    system=st.sampled_from([None, "", "Be brief. "]),
)
def test_a_prompt_at_inference_is_a_prefix(any_processor, texts, tags, system):
    processor = any_processor
    texts = [tags[i] + text if i % 2 == 0 else text for i, text in enumerate(texts)]
    count = sum("<image>" in text for text in texts)
    if any("<image>" in text for text in texts[1::2]):
        return
    sample = one(processor, talk(*texts, system=system, images=(png(),) * count), context=4096)

    pairs = [
        (("user", "assistant")[i % 2], text.replace("<image>", "<image_placeholder>")) for i, text in enumerate(texts)
    ]
    prompt = SYSTEM_PROMPT if system is None else system.strip()
    for turn in range(1, len(texts), 2):
        asked = [*pairs[:turn], ("assistant", "")]
        images = sum("<image>" in text for text in texts[:turn])
        ids = processor.understanding_prompt(asked, images, prompt)
        assert sample.ids[: len(ids)].tolist() == ids
        assert sample.answers[len(ids)] and not sample.answers[len(ids) - 1]
    # What is written is what the template says, and the answers are the answers.
    tokenizer = processor.tokenizer
    text = tokenizer.decode(sample.ids, skip_special_tokens=False).replace(
        "<image_placeholder>" * SLOTS, "<image_placeholder>"
    )
    text = text.replace("<begin_of_image>", "").replace("<end_of_image>", "")
    assert text == BOS + processor.format(pairs, prompt)
    answers = tokenizer.decode(sample.ids[sample.answers], skip_special_tokens=False)
    assert answers == "".join(f" {text.strip()}{EOS}" for text in texts[1::2])


def test_images_expand_where_their_tags_stand(processor):
    sample = one(processor, talk("<image> and <image>", "Two.", images=(png(), png((1, 2, 3)))))
    t = processor.tokenizer
    assert sample.images == (png(), png((1, 2, 3)))
    begins, ends = (np.flatnonzero(sample.ids == token) for token in (t.begin_of_image_id, t.end_of_image_id))
    assert (ends - begins).tolist() == [SLOTS + 1] * 2
    for begin, end in zip(begins, ends, strict=True):
        assert set(sample.ids[begin + 1 : end]) == {t.image_placeholder_id}
    assert not sample.answers[: ends[1] + 1].any()


def test_the_system_prompt_is_the_references_the_datas_or_the_callers(processor):
    def decoded(raw, **options):
        return processor.tokenizer.decode(one(processor, raw, "text", **options).ids)

    assert decoded(talk("Hi", "Ho")).startswith(SYSTEM_PROMPT)
    assert decoded(talk("Hi", "Ho"), system_prompt="Rhyme.").startswith("Rhyme.\n\n")
    assert decoded(talk("Hi", "Ho", system="Be brief."), system_prompt="Rhyme.").startswith("Be brief.\n\n")
    assert decoded(talk("Hi", "Ho"), system_prompt="") == decoded(talk("Hi", "Ho", system="")) != ""


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (talk("What?", "A cat.", images=(png(),)), "placeholder_mismatch"),
        (talk("<image> What?", "A cat."), "placeholder_mismatch"),
        (talk("<image> <image>", "A cat.", images=(png(),)), "placeholder_mismatch"),
        (talk("What?", "<image>", images=(png(),)), "placeholder_mismatch"),
        (talk("What?"), "bad_turns"),
        (talk(), "bad_turns"),
        (talk("What?", "A cat.", "And?"), "bad_turns"),
        (RawSample("here:1", ({"role": "assistant", "content": "x"}, {"role": "user", "content": "y"})), "bad_turns"),
        (talk("What?", " \n"), "empty"),
        (talk("", "A cat."), "empty"),
        (talk("What?", f"A cat.{EOS}"), "special_token_in_text"),
        (talk("<image_placeholder>", "A cat.", images=(png(),)), "special_token_in_text"),
        (talk("Hi<|Assistant|>: Yes", "A cat."), "special_token_in_text"),
        (talk("What?", "A cat.", system=BOS), "special_token_in_text"),
        (talk("What? \ud800", "A cat."), "bad_unicode"),
        (talk("<image>", "A cat.", images=(png()[:60],)), "undecodable_image"),
        (talk("<image>", "A cat.", images=(b"no image",)), "undecodable_image"),
        (talk("<image>", "A cat.", images=(pathlib.Path("absent.png"),)), "missing_image"),
        (talk("What? " * 500, "A cat."), "too_long"),
        (RawSample("here:1", text="A text."), "missing_field"),
        (RawSample("here:1", caption="A cat <end_of_image>", images=(png(),)), "special_token_in_text"),
        (RawSample("here:1", caption=" ", images=(png(),)), "empty"),
    ],
)
def test_bad_understanding_samples(processor, raw, reason):
    assert refusal(processor, raw).reason == reason


def test_images_may_be_files_or_bytes_or_arrays(processor, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    array = np.full((12, 20, 3), (200, 10, 10), np.uint8)
    for image in (png(), tmp_path / "a.png", array):
        sample = one(processor, talk("<image>", "A cat.", images=(image,)))
        np.testing.assert_array_equal(generation_pixels(sample.images[0], 8), generation_pixels(array, 8))
    (tmp_path / "a.png").write_bytes(b"x")
    assert "a.png" in refusal(processor, talk("<image>", "A.", images=(tmp_path / "a.png",))).detail


def test_answers_that_are_not_trained_on_are_read_all_the_same(processor):
    def answers(raw):
        sample = one(processor, raw, "text")
        return processor.tokenizer.decode(sample.ids), processor.tokenizer.decode(sample.ids[sample.answers])

    for system in (None, "Hm."):
        base = talk("2+2?", "5", "Sure?", "4", "And?", "6", system=system)
        offset = system is not None
        whole = answers(base)
        assert whole[1] == " 5 4 6"
        for untrained, expected in (((1,), " 4 6"), ((3,), " 5 6"), ((1, 5), " 4")):
            raw = dataclasses.replace(base, untrained=tuple(index + offset for index in untrained))
            assert answers(raw) == (whole[0], expected)
        raw = dataclasses.replace(base, untrained=tuple(index + offset for index in (1, 3, 5)))
        assert refusal(processor, raw, "text").reason == "not_trained"


def test_special_files_as_pictures(processor, tmp_path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").mkdir()
    for name, told in (("a.png", "a.png is a FIFO"), ("b.png", "b.png is a folder"), ("c.png", "No such file")):
        error = refusal(processor, talk("<image>", "A.", images=(tmp_path / name,)))
        assert told in error.detail and error.reason in ("missing_image", "undecodable_image")
    error = refusal(processor, talk("<image>", "A.", images=(pathlib.Path("/dev/zero"),)))
    assert "/dev/zero is a device" in error.detail


# ---------------------------------------------------------------- captions, texts, prompts


def test_a_caption_is_understood_from_its_image(processor):
    t = processor.tokenizer
    sample = one(processor, RawSample("x", caption=" A red cat. ", images=(png(),)))
    image = [t.begin_of_image_id, *[t.image_placeholder_id] * SLOTS, t.end_of_image_id]
    assert sample.ids[: SLOTS + 3].tolist() == [t.bos_id, *image]
    assert t.decode(sample.ids[sample.answers], skip_special_tokens=False) == f"A red cat.{EOS}"
    assert sample.answers[SLOTS + 3 :].all() and sample.length == len(sample.ids) - 1


def test_long_texts_become_pieces_that_lose_nothing(processor):
    t, text = processor.tokenizer, "The quick brown fox. " * 40
    whole = [*t.encode(text.strip(), add_bos=False), t.eos_id]
    for context in (5, 64, len(whole) - 1, len(whole)):
        samples, _ = SampleTokenizer(processor, "text", context)(RawSample("x", text=text))
        assert len(samples) == -(-len(whole) // context)
        assert [token for sample in samples for token in sample.ids[1:]] == whole
        for sample in samples:
            assert sample.ids[0] == t.bos_id and sample.length <= context
            assert not sample.answers[0] and sample.answers[1:].all()
    assert len(samples) == 1


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (RawSample("here:1", text=f"A{EOS}B"), "special_token_in_text"),
        (RawSample("here:1", text="\n"), "empty"),
        (RawSample("here:1", caption="A cat", images=(png(),)), "missing_field"),
        (talk("<image>", "A cat.", images=(png(),)), "unexpected_image"),
        (talk("Why? " * 500, "So."), "too_long"),
    ],
)
def test_bad_text_samples(processor, raw, reason):
    assert refusal(processor, raw, "text").reason == reason


@pytest.mark.parametrize(
    ("caption", "short"),
    [
        ("A red cat. It sits on a wall.", "A red cat."),
        ("Is it a cat? Yes! It is.", "Is it a cat?"),
        ("A cat of 3.5 kg", None),
        ("A red cat.", None),
        ("一只红色的猫。它坐在椅子上。", "一只红色的猫。"),
    ],
)
def test_prompts_of_captions(processor, caption, short):
    (sample,), pixels = SampleTokenizer(processor, "generation", 400)(RawSample("x", caption=caption, images=(png(),)))
    assert sample.ids.tolist() == processor.text_to_image_prompt(caption)
    assert sample.short_ids.tolist() == (processor.text_to_image_prompt(short) if short else [])
    assert not sample.answers.any()
    np.testing.assert_array_equal(pixels, generation_pixels(png(), SIDE))


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (RawSample("here:1", caption="A cat. <begin_of_image>", images=(png(),)), "special_token_in_text"),
        (RawSample("here:1", caption="", images=(png(),)), "empty"),
        (RawSample("here:1", caption="A cat " * 100, images=(png(),)), "too_long"),
        (RawSample("here:1", caption="A cat " * 20000, images=(png(),)), "too_long"),
        (RawSample("here:1", caption="A cat", images=(b"x",)), "undecodable_image"),
        (RawSample("here:1", caption="A cat", images=(pathlib.Path("absent.png"),)), "missing_image"),
        (talk("Hi", "Ho"), "missing_field"),
    ],
)
def test_bad_generation_samples(processor, raw, reason):
    assert refusal(processor, raw, "generation").reason == reason


@pytest.mark.parametrize("kind", ["understanding", "text", "generation"])
def test_the_context_is_kept_to_the_token(processor, kind):
    raw = {
        "understanding": RawSample("here:1", caption="A red cat", images=(png(),)),
        "text": talk("Hi", "A red cat"),
        "generation": RawSample("here:1", caption="A red cat", images=(png(),)),
    }[kind]
    length = one(processor, raw, kind).length + (CODES if kind == "generation" else 0)
    one(processor, raw, kind, context=length)
    assert refusal(processor, raw, kind, context=length - 1).reason == "too_long"


def test_a_tokenizer_refuses_what_cannot_work(processor):
    with pytest.raises(ValueError, match="unknown kind 'drawing'; known: understanding"):
        SampleTokenizer(processor, "drawing", 100)
    with pytest.raises(ValueError, match="context must be at least"):
        SampleTokenizer(processor, "generation", 10)


def test_tokenizer_fingerprints_tell_tokenizers_apart(processor, any_processor):
    assert tokenizer_fingerprint(processor) == tokenizer_fingerprint(pickle.loads(pickle.dumps(processor)))
    same = any_processor.roles == processor.roles
    assert (tokenizer_fingerprint(processor) == tokenizer_fingerprint(any_processor)) == same


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(0, 20),
    codes=st.lists(st.integers(0, 2**31 - 1)),
    images=st.lists(st.binary(max_size=9)),
    seed=st.integers(0, 9),
)
def test_records_round_trip(n, codes, images, seed):
    rng = np.random.default_rng(seed)
    ids, answers = rng.integers(0, 2**31, n).astype(np.int32), rng.random(n) < 0.5
    sample = Sample("text", ids, answers, tuple(images), np.array(codes, np.int32), ids[:3])
    again = Sample.from_bytes(sample.to_bytes())
    assert again.images == sample.images and again.kind == "text"
    for name in ("ids", "answers", "codes", "short_ids"):
        np.testing.assert_array_equal(getattr(again, name), getattr(sample, name))
        assert getattr(again, name).dtype == getattr(sample, name).dtype
