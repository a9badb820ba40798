"""Steps with guessed codes: images come sooner, and they and the answers beside them are what each is alone."""

# ruff: noqa: F811  (fixtures are imported)

import functools
import queue

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janus_jax import load
from janus_jax.sampling.finite import NotFinite
from janus_jax.sampling.sampler import Options
from janus_jax.serving import programs
from janus_jax.serving.engine import Engine
from janus_jax.serving.jobs import Ended, Job, Prompt, Token, drawings, question
from tests.library.tiny_janus import (  # noqa: F401
    LONG,
    OTHER,
    QUESTION,
    SETTINGS,
    SHORT,
    folder,
    janus,
    raises_one_line,
)
from tests.serving.test_engine import (  # noqa: F401
    GREEDY,
    LIMIT,
    NO_SYSTEM,
    comes_to_rest,
    compilations,
    has_room,
    run,
    said,
)
from tests.weights.adapters.random_adapters import written

WINDOW = 4
# Without guidance, greedy, and with a sampler for itself: (prompt, n, options).
DRAWINGS = [
    (SHORT, 5, {"cfg_weight": 5.0}),
    (OTHER, 2, {"cfg_weight": 1.0, "seed": 7}),
    (LONG, 1, {"cfg_weight": 3.0, "temperature": 0}),
    (SHORT, 2, {"cfg_weight": 2.0, "temperature": 0.7, "top_k": 9, "top_p": 0.9, "seed": 3}),
]


@pytest.fixture(scope="module")
def engine(janus):
    with Engine(janus, slots=5, speculate=WINDOW) as engine:
        engine.warm_up()
        yield engine


@pytest.fixture(scope="module")
def drawn(janus) -> list[np.ndarray]:
    """The codes of DRAWINGS, each drawn by itself, one code after the other."""
    options = [{"temperature": 1.0, **how} for *_, how in DRAWINGS]
    return [
        janus.generate_codes(prompt, n, speculate=False, **how)
        for (prompt, n, _), how in zip(DRAWINGS, options, strict=True)
    ]


def images_of(janus) -> list[list[Job]]:
    return [drawings(janus, prompt, n, Options(**how)) for prompt, n, how in DRAWINGS]


def told(engine: Engine, known: dict[Job, list[int]], right: float):
    """`programs.step` given the codes that will come as guesses, with this chance to be right."""
    real, rng = programs.step, np.random.default_rng(2)

    def step(model, params, cache, tokens, rows, active, window):
        tokens, done = np.array(tokens), np.asarray(rows.drawn)
        for row, job in enumerate(engine._slots.jobs):
            if job in known and window > 1:
                coming = known[job][done[row] :][: window - 1]
                tokens[row, 1 : 1 + len(coming)] = np.where(rng.random(len(coming)) < right, coming, 0)
        # Both rows of a pair are given the same guesses, as those that the step itself makes are.
        for row in np.flatnonzero(np.asarray(rows.image)):
            tokens[row, 1:] = tokens[np.asarray(rows.conditional)[row], 1:]
        return real(model, params, cache, jnp.asarray(tokens), rows, active, window=window)

    return step


@pytest.mark.parametrize("guesses", ["its own", "mostly right"])
def test_a_mix_draws_what_each_draws_alone(janus, engine, drawn, monkeypatch, guesses):
    """Images begin and end while others, and answers, are under way."""
    images = images_of(janus)
    asked = [question(janus, QUESTION * n, (), LIMIT, GREEDY, **NO_SYSTEM) for n in (1, 2, 3)]
    if guesses != "its own":
        flat = zip((job for each in images for job in each), np.concatenate(drawn).tolist(), strict=True)
        monkeypatch.setattr(programs, "step", told(engine, dict(flat), right=0.8))
    jobs = [job for each in images for job in each]
    order = [*jobs[:3], asked[0], *jobs[3:7], asked[1], *jobs[7:], asked[2]]
    before, steps = len(compilations()), engine.counts.steps
    ends = dict(zip(order, run(engine, *order), strict=True))
    assert not compilations()[before:], "requests compiled something"
    for each, expected in zip(images, drawn, strict=True):
        np.testing.assert_array_equal([job.tokens for job in each], expected)
        assert {ends[job] for job in each} == {Ended("stop")}
    for n, job in enumerate(asked):
        assert said(janus, job) == janus.chat(QUESTION * (n + 1), (), **SETTINGS)
    if guesses != "its own":
        assert engine.counts.steps - steps < 70, "86 without guesses, and 54 with these"


def test_a_right_guess_is_taken(janus, engine, drawn, monkeypatch):
    """An image alone: a step for its first code, one for each window, and one given before the end was known."""
    (job,) = drawings(janus, *DRAWINGS[2][:2], Options(**DRAWINGS[2][2]))
    known = {job: drawn[2][0].tolist()}
    monkeypatch.setattr(programs, "step", told(engine, known, right=1.0))
    steps = engine.counts.steps
    run(engine, job)
    assert job.tokens == known[job]
    assert 5 <= engine.counts.steps - steps <= 6


def test_where_logits_are_not_finite(janus, engine, monkeypatch):
    """The error of the plain loop, for this image alone; the other one is never given the damaged code as a guess."""
    prompt, n, how = DRAWINGS[1]
    codes = janus.generate_codes(prompt, n, speculate=False, temperature=1.0, **how).tolist()
    bad = next(code for i, code in enumerate(codes[0][:-1]) if i > 2 and code not in codes[1])
    embedding = janus.params["gen_embed"]["embedding"].at[bad].set(np.nan)
    monkeypatch.setitem(engine._device.params, None, {**janus.params, "gen_embed": {"embedding": embedding}})
    failed, fine = run(engine, *(jobs := drawings(janus, prompt, n, Options(**how))))
    assert isinstance(failed.error, NotFinite)
    assert f"after code {codes[0].index(bad)}" in str(failed.error)
    assert fine == Ended("stop") and jobs[1].tokens == codes[1]


def keys(engine: Engine, size: int) -> np.ndarray:
    """Of the fullest row, in its first slots."""
    cached = engine._device._cache.keys[0]
    return np.array(cached.reshape(-1, *cached.shape[-4:])[0, engine._slots.rows.lengths.argmax(), :, :size])


@pytest.mark.slow
@pytest.mark.parametrize("speculate", [False, WINDOW])
def test_what_idle_rows_hold_is_not_written_over(janus, monkeypatch, speculate):
    """Rows write behind their length, also those that are idle: there is room for it if a row is full to the end."""
    monkeypatch.setattr("janus_jax.serving.device._SMALLEST_CACHE", 64)
    with Engine(janus, slots=4, speculate=speculate) as engine:
        size = engine._device.sizes[0]
        first = question(janus, QUESTION * 8, (), 1, **NO_SYSTEM)
        first.limit, first.end_id = size + 1 - first.prompt_tokens, janus.config.language.vocab_size
        run(engine, first)
        assert engine._slots.rows.lengths.max() == size == engine._device.slots
        held = keys(engine, size)
        run(engine, *drawings(janus, SHORT, 1), question(janus, OTHER, (), 9, **NO_SYSTEM))
        np.testing.assert_array_equal(keys(engine, size), held)
        ids = np.array([*first.prompts[0].ids, *first.tokens[:-1], 5, 6], np.int32)
        on = Job((Prompt(ids),), GREEDY, 12, -1)
        run(engine, on)
        assert on.reused == size


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_jobs_that_go_at_any_moment(janus, drawn, monkeypatch, seed):
    """Rows come to be others' while steps of the jobs before are unread, in a cache that grows."""
    monkeypatch.setattr("janus_jax.serving.device._SMALLEST_CACHE", 64)
    rng = np.random.default_rng(seed)
    with Engine(janus, slots=5, speculate=WINDOW) as engine:
        images = [job for each in images_of(janus) + images_of(janus) for job in each]
        codes = np.concatenate(drawn + drawn).tolist()
        asked = [question(janus, QUESTION * n, (), LIMIT, GREEDY, **NO_SYSTEM) for n in (1, 8, 1, 8)]
        jobs = [*images, *asked]
        known = dict(zip(images, codes, strict=True))
        monkeypatch.setattr(programs, "step", told(engine, known, right=0.8))
        ends, over = {}, queue.SimpleQueue()

        def note(job, event):
            if not isinstance(event, Token):
                ends[job] = event
                over.put(job)
            elif rng.random() < 0.03:
                rng.choice(jobs).cancelled = True

        for job in jobs:
            job.notify = functools.partial(note, job)
        engine.submit(*(jobs[i] for i in rng.permutation(len(jobs))))
        for _ in jobs:
            over.get(timeout=300)
    gone = [job for job in jobs if ends[job] == Ended("cancelled")]
    assert 0 < len(gone) < len(jobs) / 2
    for job, expected in known.items():
        assert job.tokens == (expected[: len(job.tokens)] if job in gone else expected)
    for n, job in zip((1, 8, 1, 8), asked, strict=True):
        assert job in gone or said(janus, job) == janus.chat(QUESTION * n, (), **SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize("drawn", ["images", "answers"])
def test_adapters_have_room_for_each_others_steps(folder, tmp_path, monkeypatch, drawn):
    """A step of one adapter's rows writes behind those of the other, which have just gone on; see `has_room`."""
    monkeypatch.setattr("janus_jax.serving.device._SMALLEST_CACHE", 64)
    own = load(folder)
    own.load_adapter(written(tmp_path / "one", own.config, seed=1), name="one")
    own.use_adapter(None)
    (image,) = drawings(own, SHORT, 1, Options(cfg_weight=1.0))
    how = {"images": (image.options, 16, None, 0), "answers": (GREEDY, 40, -1, -1)}[drawn]
    with Engine(own, slots=6, speculate=8) as engine:
        size = engine._device.sizes[0]
        # They come to the end of the smallest cache, or beyond it.
        prompts = [Prompt(np.resize(image.prompts[0].ids, size - length)) for length in (16, 17, 19)]
        jobs = [Job((prompt,), *how, adapter) for prompt in prompts for adapter in (None, "one")]
        alone = [Job((prompt,), *how, adapter) for prompt in prompts for adapter in (None, "one")]
        for job in alone:
            assert run(engine, job) in ([Ended("stop")], [Ended("length")])
        known = {job: other.tokens for job, other in zip(jobs, alone, strict=True)}
        engine._device.renew()
        engine._slots.forget()
        monkeypatch.setattr(programs, "step", told(engine, known, right=0.6))
        run(engine, *jobs)
        assert {job: job.tokens for job in jobs} == known


@pytest.mark.slow
def test_the_cache_grows_under_guesses(janus, monkeypatch):
    monkeypatch.setattr("janus_jax.serving.device._SMALLEST_CACHE", 64)
    with Engine(janus, slots=4, speculate=16) as engine:
        for text in (SHORT, LONG, LONG * 2, SHORT):
            jobs = [*drawings(janus, text, 2), question(janus, "What is it? " * 9, (), 100, **NO_SYSTEM)]
            run(engine, *jobs)
            assert [job.tokens for job in jobs[:2]] == janus.generate_codes(text, 2).tolist()
            assert said(janus, jobs[2]) == janus.chat("What is it? " * 9, (), 100, **NO_SYSTEM)
        assert engine._device.slots > engine._device.sizes[0]


@pytest.mark.parametrize("wrong", [0, 1, 17, True, "on"])
def test_windows_that_are_refused(janus, wrong):
    with raises_one_line("speculate must be 'auto', False or a window from 2 to 16, an image's codes, got"):
        Engine(janus, slots=2, speculate=wrong)


def test_auto(janus, monkeypatch):
    """On where it was measured to pay, by the rows that a step has; images of 16 codes are too short for it."""
    from janus_jax.sampling.speculative import shared_window

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert [shared_window("auto", 576, rows) for rows in (2, 8, 16, 32, 64)] == [16, 16, 8, 4, 1]
    assert shared_window("auto", 16, 2) == shared_window(False, 576, 2) == 1
    monkeypatch.undo()
    assert shared_window("auto", 576, 2) == 1, "not on CPUs"
