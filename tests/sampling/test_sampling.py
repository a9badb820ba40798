"""Image and text loops: against the oracle, and against themselves in other batches, paddings and pieces."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janus_jax.config import PRESETS
from janus_jax.model.janus import Janus
from janus_jax.sampling.cache import cache_sizes, pieces
from janus_jax.sampling.images import continue_image, generate_codes
from janus_jax.sampling.sampler import make_sampler
from janus_jax.sampling.text import continue_text, generate_tokens, stream_tokens
from janus_jax.weights.torch_weights import abstract_params

BOS, PAD = 1, 2


def pairs(case, lengths=(8, 5, 6), padding: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Prompt pairs [B, 2, T] of different lengths, padded on the left; the last id stands for begin_of_image."""
    rng, vocab = np.random.default_rng(3), case.config.language.vocab_size
    total = max(lengths) + padding
    ids, mask = np.zeros((len(lengths), 2, total), np.int32), np.zeros((len(lengths), 2, total), bool)
    for i, length in enumerate(lengths):
        row = np.array([BOS, *rng.integers(5, vocab - 5, length - 2), vocab - 3])
        ids[i, :, total - length :] = row, [BOS, *[PAD] * (length - 2), vocab - 3]
        mask[i, :, total - length :] = True
    return ids, mask


def image_keys(count: int, seed: int = 0):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(count))


# Few kinds of samplers and batches, since each is a program of its own.
GREEDY, TRUNCATED = make_sampler(0), make_sampler(0.8, top_k=20, top_p=0.9)


def draw(case, ids, mask, keys=None, **settings):
    """(codes, logits) of generate_codes as numpy, greedy and with logits unless told otherwise."""
    settings = {"sampler": GREEDY, "keep_logits": True} | settings
    keys = image_keys(len(ids)) if keys is None else keys
    codes, logits = generate_codes(case.model, case.params, ids, mask, keys, **settings)
    return np.asarray(codes), None if logits is None else np.asarray(logits)


@pytest.mark.parametrize("guidance", [5.0, pytest.param(1.5, marks=pytest.mark.slow)])
def test_greedy_codes(case, guidance, oracle, close):
    ids, mask = pairs(case)
    steps = case.config.gen_vision.num_tokens
    codes, logits = oracle.generate_codes(case.torch_model, ids, mask, guidance, steps)
    ours, our_logits = draw(case, ids, mask, guidance=guidance)
    close(our_logits, logits, f"image logits with guidance {guidance}")
    np.testing.assert_array_equal(ours, codes)
    assert len(np.unique(codes)) > 3, "too few codes in use to prove anything"


def test_greedy_codes_unstacked(get_case):
    case = get_case("grouped")
    ids, mask = pairs(case)
    np.testing.assert_array_equal(draw(case.unstacked, ids, mask)[0], draw(case, ids, mask)[0])


def test_codes_of_transformers_own_generate(tiny, oracle):
    """Its rows are [conditional; unconditional] halves of its own making."""
    ids, mask = pairs(tiny)
    model = tiny.torch_model
    model.generation_config.bos_token_id = BOS
    model.generation_config.generation_kwargs = {"boi_token_id": tiny.config.language.vocab_size - 3}
    model.model.vision_model.config.num_image_tokens = tiny.config.gen_vision.num_tokens
    theirs = model.generate(
        inputs=oracle.torch.tensor(ids[:, 0].astype(np.int64)),
        attention_mask=oracle.torch.tensor(mask[:, 0].astype(np.int64)),
        generation_mode="image", do_sample=False, guidance_scale=5, pad_token_id=PAD,
    )  # fmt: skip
    np.testing.assert_array_equal(draw(tiny, ids, mask)[0], theirs.numpy())


def test_guidance_of_one_is_the_conditional_row(tiny, close):
    ids, mask = pairs(tiny)
    single, single_logits = draw(tiny, ids[:, :1], mask[:, :1])
    pair, pair_logits = draw(tiny, ids, mask, guidance=1.0)
    np.testing.assert_array_equal(pair, single)
    close(pair_logits, single_logits, "logits with guidance 1", 1e-5)
    # Without guidance the weight is not read.
    np.testing.assert_array_equal(draw(tiny, ids[:, :1], mask[:, :1], guidance=7.0)[1], single_logits)


def test_guidance_of_zero_is_the_unconditional_row(tiny, close):
    ids, mask = pairs(tiny)
    alone, alone_logits = draw(tiny, ids[:, 1:], mask[:, 1:])
    codes, logits = draw(tiny, ids, mask, guidance=0.0)
    np.testing.assert_array_equal(codes, alone)
    close(logits, alone_logits, "logits with guidance 0", 1e-5)


def test_batch_equals_its_rows_alone(tiny, close):
    ids, mask = pairs(tiny, (8, 5, 8, 6, 7))
    keys = image_keys(5)
    codes, logits = draw(tiny, ids, mask, keys, sampler=TRUNCATED)
    assert len({tuple(row) for row in codes}) == 5, "the rows are alike, which proves nothing"
    for i in range(5):
        alone, alone_logits = draw(tiny, ids[i : i + 1], mask[i : i + 1], keys[i : i + 1], sampler=TRUNCATED)
        np.testing.assert_array_equal(alone[0], codes[i])
        close(alone_logits[0], logits[i], "logits alone", 1e-5)


@pytest.mark.parametrize("scan_layers", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_one_prompt_for_all_images_is_prefilled_once(tiny, close, scan_layers):
    case = tiny if scan_layers else tiny.unstacked
    ids, mask = pairs(case, (8,))
    keys = image_keys(5)
    codes, logits = draw(case, ids, mask, keys, sampler=TRUNCATED)
    repeated, repeated_logits = draw(case, np.repeat(ids, 5, 0), np.repeat(mask, 5, 0), keys, sampler=TRUNCATED)
    np.testing.assert_array_equal(codes, repeated)
    close(logits, repeated_logits, "logits", 1e-5)
    assert len({tuple(row) for row in codes}) == 5


def test_keys_decide(tiny):
    """The same prompt: another key, another image; the same key, the same image, at any place of the batch."""
    ids, mask = (np.repeat(a, 5, 0) for a in pairs(tiny, (8,)))
    codes, _ = draw(tiny, ids, mask, image_keys(5), sampler=TRUNCATED)
    assert len({tuple(row) for row in codes}) == 5
    again, _ = draw(tiny, ids, mask, image_keys(5)[::-1], sampler=TRUNCATED)
    np.testing.assert_array_equal(again[::-1], codes)
    other, _ = draw(tiny, ids, mask, image_keys(5, seed=1), sampler=TRUNCATED)
    assert (other != codes).any(axis=1).all()


def test_every_step_draws_anew(tiny):
    """At a temperature where all codes are equally likely, 16 draws of 256 seldom meet."""
    ids, mask = pairs(tiny, (8, 5, 8, 6, 7))
    codes, _ = draw(tiny, ids, mask, sampler=make_sampler(1e6, top_k=256))
    assert all(len(np.unique(row)) > 10 for row in codes), codes


def test_longer_left_padding_changes_nothing(tiny, close):
    (ids, mask), (longer, longer_mask) = pairs(tiny), pairs(tiny, padding=9)
    codes, logits = draw(tiny, ids, mask)
    padded, padded_logits = draw(tiny, longer, longer_mask)
    np.testing.assert_array_equal(padded, codes)
    close(padded_logits, logits, "logits", 1e-5)
    # What stands in the padding is not read.
    longer[~longer_mask] = 77
    np.testing.assert_array_equal(draw(tiny, longer, longer_mask)[1], padded_logits)


def test_pads_of_the_unconditional_row_are_attended_to(tiny):
    ids, mask = pairs(tiny)
    _, logits = draw(tiny, ids, mask)
    changed = ids.copy()
    changed[:, 1][ids[:, 1] == PAD] = 77
    _, changed_logits = draw(tiny, changed, mask)
    assert (np.abs(changed_logits - logits)[:, 0].max(axis=-1) > 1e-2).all()


def test_keep_logits(tiny):
    ids, mask = pairs(tiny)
    g = tiny.config.gen_vision
    codes, logits = draw(tiny, ids, mask)
    assert logits.shape == (3, g.num_tokens, g.codebook_size)
    np.testing.assert_array_equal(logits.argmax(-1), codes)
    without, none = draw(tiny, ids, mask, keep_logits=False)
    assert none is None
    np.testing.assert_array_equal(without, codes)


def test_num_tokens(tiny):
    ids, mask = pairs(tiny)
    whole, _ = draw(tiny, ids, mask)
    assert whole.shape[1] == tiny.config.gen_vision.num_tokens
    np.testing.assert_array_equal(draw(tiny, ids, mask, num_tokens=1)[0], whole[:, :1])


def test_progress_in_pieces(tiny):
    """Several pieces (60 codes make pieces of 2) give the codes of one, and add up to all of them."""
    ids, mask = pairs(tiny)
    seen = []
    settings = {"num_tokens": 60, "sampler": make_sampler(1.0), "keep_logits": False}
    pieces, _ = draw(tiny, ids, mask, progress=seen.append, **settings)
    assert sum(seen) == 60 and len(seen) > 20
    np.testing.assert_array_equal(pieces, draw(tiny, ids, mask, **settings)[0])


@contextlib.contextmanager
def growing(loop, grow: bool):
    """Caches grow within, or do not; gives the slots of those that `loop` was run on."""
    seen = []

    def spied(model, params, state, *args):
        seen.append(state.cache.keys[0].shape[-2])
        return loop(model, params, state, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("janus_jax.sampling.cache._is_large", lambda cache, weights: grow)
        patch.setattr(f"{loop.__module__}.{loop.__name__}", spied)
        yield seen


@pytest.mark.slow
@pytest.mark.parametrize("scan_layers", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_growing_cache_changes_nothing(tiny, close, scan_layers):
    case = tiny if scan_layers else tiny.unstacked
    ids, mask = pairs(case)
    settings = {"num_tokens": 15, "sampler": TRUNCATED}
    with growing(continue_image, False) as seen:
        codes, logits = draw(case, ids, mask, **settings)
    assert seen == [22]
    with growing(continue_image, True) as seen:
        grown, grown_logits = draw(case, ids, mask, **settings)
    assert seen == [11, 15, 19, 22]
    np.testing.assert_array_equal(grown, codes)
    close(grown_logits, logits, "logits", 1e-5)


def test_only_a_large_cache_grows():
    config = PRESETS["janus_pro_1b"]
    model, params = Janus(config, dtype=jnp.float32), abstract_params(config, True, "float32")
    sizes = {images: cache_sizes(model, params, 2 * images, 32, 576) for images in (1, 16)}
    assert sizes == {1: [607], 16: [175, 319, 463, 607]}
    tiny, tiny_params = Janus(PRESETS["janus_tiny"]), abstract_params(PRESETS["janus_tiny"])
    assert len(cache_sizes(tiny, tiny_params, 32, 32, 576)) == 1, "not worth the compilation"


# ---------------------------------------------------------------- text

# One program for all of these: the same room, and a sampler of the same structure.
SAMPLER, ROOM = make_sampler(1.0, top_p=0.95), 24


@pytest.fixture(scope="module")
def question(tiny):
    """Embedded prompts of three lengths, and their mask."""
    ids, mask = (a[:, 0] for a in pairs(tiny))
    return tiny.run("embed_text", ids), mask


def tokens_of(case, question, rows=slice(None), **settings) -> np.ndarray:
    x, mask = question
    keys = image_keys(len(x))[rows]
    settings = {"eos_id": -1, "sampler": SAMPLER, "room": ROOM} | settings
    return np.asarray(generate_tokens(case.model, case.params, x[rows], mask[rows], keys, **settings))


def pieces_of(case, question, rows=slice(None), **settings) -> list[np.ndarray]:
    x, mask = question
    keys = image_keys(len(x))[rows]
    settings = {"eos_id": -1, "sampler": SAMPLER, "room": ROOM} | settings
    return [np.asarray(p) for p in stream_tokens(case.model, case.params, x[rows], mask[rows], keys, **settings)]


@pytest.mark.parametrize("piece", [1, 4, 30])
def test_stream_in_pieces(tiny, question, piece):
    whole = tokens_of(tiny, question, max_new_tokens=11)
    assert whole.shape == (3, 11)
    pieces = pieces_of(tiny, question, max_new_tokens=11, piece=piece)
    assert [p.shape[1] for p in pieces[1:-1]] == [piece] * (len(pieces) - 2)
    np.testing.assert_array_equal(np.concatenate(pieces, 1), whole)


def test_every_token_is_drawn_anew(tiny, question):
    tokens = tokens_of(tiny, question, max_new_tokens=20, sampler=make_sampler(1e6, top_k=500))
    assert all(len(np.unique(row)) > 15 for row in tokens), tokens


@pytest.mark.slow
def test_spare_room_changes_nothing(tiny, question):
    exact = tokens_of(tiny, question, max_new_tokens=11, room=None)
    np.testing.assert_array_equal(exact, tokens_of(tiny, question, max_new_tokens=11))


@pytest.mark.slow
@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_growing_cache_changes_no_text(tiny, question, scan_layers):
    case = tiny if scan_layers else tiny.unstacked
    with growing(continue_text, False):
        whole = tokens_of(case, question, max_new_tokens=16)
    with growing(continue_text, True) as seen:
        pieces = pieces_of(case, question, max_new_tokens=16, piece=4)
    np.testing.assert_array_equal(np.concatenate(pieces, 1), whole)
    assert seen == [13, 13, 19, 19, 25], "room for 6, 12 and 18 new tokens"
    assert [p.shape[1] for p in pieces] == [1, 4, 1, 4, 2, 4]


@pytest.mark.parametrize("new_tokens", range(1, 9))
def test_every_token_is_drawn_once(new_tokens):
    """With room for it in the cache, also where there are fewer tokens than sizes."""
    sizes = [8 + new_tokens - 1 - new_tokens * smaller // 4 for smaller in (3, 2, 1, 0)]
    drawn = list(pieces(sizes, 8, 3, new_tokens))
    assert [i for _, start, stop in drawn for i in range(start, stop)] == list(range(1, new_tokens))
    assert all(8 + stop - 1 <= size for size, _, stop in drawn)


def test_stream_ends_when_all_rows_are_done(tiny, question):
    row = slice(0, 1)
    tokens = tokens_of(tiny, question, row, max_new_tokens=12)[0]
    eos = int(tokens[4])
    first = int(np.argmax(tokens == eos))
    streamed = np.concatenate(pieces_of(tiny, question, row, max_new_tokens=12, piece=2, eos_id=eos), 1)[0]
    assert first < len(streamed) <= first + 2
    np.testing.assert_array_equal(streamed[: first + 1], tokens[: first + 1])
    assert (streamed[first:] == eos).all()


def test_one_new_token(tiny, question):
    one, more = (tokens_of(tiny, question, max_new_tokens=n) for n in (1, 3))
    assert one.shape == (3, 1)
    np.testing.assert_array_equal(one[:, 0], more[:, 0])


def test_text_batch_equals_its_rows_alone(tiny, question):
    tokens = tokens_of(tiny, question, max_new_tokens=11)
    assert len({tuple(row) for row in tokens}) == 3, "the rows are alike, which proves nothing"
    for i in range(3):
        alone = tokens_of(tiny, question, slice(i, i + 1), max_new_tokens=11)
        np.testing.assert_array_equal(alone[0], tokens[i])
