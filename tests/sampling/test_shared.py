"""Questions about the same pictures, answered together: as each one alone, whatever is beside it."""

# ruff: noqa: F811  (fixtures are imported)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janus_jax import load
from janus_jax.model.janus import Janus
from janus_jax.model.kv_cache import pick
from janus_jax.sampling import shared
from janus_jax.sampling.cache import empty_cache
from janus_jax.sampling.shared import Grouped, answer, cache_slots, embed_pictures
from tests.library.tiny_janus import folder, janus  # noqa: F401

QUESTIONS = ("What is it?", "Which of the two is brighter? Draw it.", "Is there a cat on the wall?", "Why?")
TOKENS = 20


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(4)
    return [rng.integers(low, low + 100, (40, 60, 3), np.uint8) for low in (0, 80, 155)]


@pytest.fixture(scope="module")
def alone(janus, pictures) -> list[str]:
    """Each question about each picture, by the pipeline."""
    asked = [(question, [picture]) for picture in pictures for question in QUESTIONS]
    return janus.chat_batch(*zip(*asked, strict=True), max_new_tokens=TOKENS, system_prompt="")


def grouped(janus, pictures, order: list[list[tuple[int, int]]]) -> Grouped:
    """The questions of `order` (picture, question), by shard; a shard has two groups, padded with its first."""
    processor, tokenizer = janus.processor, janus.processor.tokenizer
    features = np.asarray(embed_pictures(janus.model, janus.params, processor.understanding_pixels(pictures)))
    prefixes, groups, tails, picks = [], [], [], []
    for rows in order:
        own = list(dict.fromkeys(picture for picture, _ in rows))
        groups += (own * 2)[:2]
        picks.append([own.index(picture) for picture, _ in rows])
        for _, question in rows:
            turns = [("user", f"<image_placeholder>\n{QUESTIONS[question]}"), ("assistant", "")]
            ids = processor.understanding_prompt(turns, 1, "")
            cut = ids.index(tokenizer.end_of_image_id) + 1
            tails.append(ids[cut:])
            prefixes.append(ids[:cut])
    assert len(set(map(tuple, prefixes))) == 1
    head, head_mask = processor.left_pad([prefixes[0]] * len(groups), len(prefixes[0]) + 3)
    ids, mask = processor.left_pad(tails, 48)  # the same for all, so that tests share programs
    where = head == tokenizer.image_placeholder_id
    picked, real = np.array(picks, np.int32), np.ones(len(ids), bool)
    return Grouped(head, head_mask.astype(bool), where, features[groups], ids, mask.astype(bool), picked, real)


def answers(janus, asked: Grouped, most: int = TOKENS) -> list[str]:
    tokenizer = janus.processor.tokenizer
    ids = answer(janus.model, janus.params, asked, eos_id=tokenizer.eos_id, max_new_tokens=most, mesh=janus.mesh)
    return [tokenizer.answer(row) for row in ids.tolist()]


@pytest.mark.slow
def test_answers_are_those_of_each_question_alone(janus, pictures, alone):
    order = [(0, 1), (2, 0), (0, 0), (2, 2), (0, 2), (2, 3)]
    found = answers(janus, grouped(janus, pictures, [order]))
    assert found == [alone[picture * len(QUESTIONS) + question] for picture, question in order]
    assert len(set(found)) > 3


@pytest.mark.slow
def test_a_single_row(janus, pictures, alone):
    assert answers(janus, grouped(janus, pictures, [[(1, 2)]])) == [alone[1 * len(QUESTIONS) + 2]]


def test_rows_that_are_done_are_dropped(janus, pictures, monkeypatch):
    """Whichever rows end when, and however the cache grows, the tokens are the same."""
    asked = grouped(janus, pictures, [[(0, 0)] * 4 + [(0, 1), (2, 2)]])
    whole = answer(janus.model, janus.params, asked, eos_id=-1, max_new_tokens=TOKENS)
    assert whole.shape == (6, TOKENS)
    # A token that ends the first four rows early, and another late or never.
    late = {int(t): [list(row).index(t) if t in row else TOKENS for row in whole] for t in whole[0, :6]}
    eos = next(t for t, at in late.items() if max(at) > 9)
    kept = []
    monkeypatch.setattr(shared, "FIRST_ROOM", 6)
    monkeypatch.setattr(shared, "_GROWTH", 4)
    real = shared.keep_rows
    monkeypatch.setattr(shared, "keep_rows", lambda *args: kept.append(args[2].size) or real(*args))
    cut = answer(janus.model, janus.params, asked, eos_id=eos, max_new_tokens=TOKENS)
    for row, full, end in zip(cut.tolist(), whole.tolist(), late[eos], strict=True):
        assert row[: end + 1] == full[: end + 1][: len(row)]
        assert set(row[end:]) <= {eos}
    assert kept and kept[0] <= 2 and cut.shape[1] >= max(min(end + 1, TOKENS) for end in late[eos])


@pytest.mark.slow
@pytest.mark.parametrize("scan_layers", [False, True])
def test_layouts_agree(folder, pictures, alone, scan_layers):
    other = load(folder, scan_layers=scan_layers, mesh={"data": 2, "tensor": 4})
    order = [[(0, 1), (2, 0), (0, 0)], [(1, 1), (1, 3), (1, 1)]]
    found = answers(other, grouped(other, pictures, order))
    assert found == [alone[p * len(QUESTIONS) + q] for rows in order for p, q in rows]


def test_picks_are_within_a_shard():
    x = jnp.arange(12).reshape(2, 6)
    picks = jnp.array([[2, 0], [1, 1]])
    assert pick(x, picks, axis=1).tolist() == [[2, 0, 4, 4], [8, 6, 10, 10]]
    assert pick(x.T, picks).tolist() == [[2, 8], [0, 6], [4, 10], [4, 10]]


def test_keys_and_values_stay_on_their_device(janus):
    """Repeating the prefixes moves nothing between the shards of a mesh."""
    mesh = jax.make_mesh((8, 1, 1), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    model = Janus(janus.config, scan_layers=False)

    def repeat(cache, picks):
        return shared.pick_rows(cache, empty_cache(model, picks.size, 40), picks)

    with jax.set_mesh(mesh):
        cache = jax.jit(lambda: empty_cache(model, 16, 24))()
        text = jax.jit(repeat).lower(cache, jnp.zeros((8, 3), jnp.int32)).compile().as_text()
    assert not [word for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute") if word in text]


def test_the_cache_grows_by_factors():
    assert cache_slots(10, 2048) == [41, 137, 521, 2057]
    assert cache_slots(10, 20) == [29]
