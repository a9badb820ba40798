"""The engine: what many jobs draw together is what each draws alone, and rows are free again afterwards."""

# ruff: noqa: F811  (fixtures are imported)

import functools
import queue
import random
import time

import jax
import numpy as np
import pytest

from janus_jax import load
from janus_jax.sampling.finite import NotFinite
from janus_jax.sampling.memory import OutOfMemory
from janus_jax.sampling.sampler import Options
from janus_jax.serving import programs
from janus_jax.serving.engine import Engine, Full, Stopped
from janus_jax.serving.jobs import PIECES, Ended, Failed, Job, Picture, Prompt, Token, drawings, question
from tests.library.tiny_janus import (  # noqa: F401
    LONG,
    OTHER,
    QUESTION,
    SETTINGS,
    SHORT,
    codes,
    folder,
    janus,
    raises_one_line,
)
from tests.weights.adapters.random_adapters import written

LIMIT, NO_SYSTEM = SETTINGS["max_new_tokens"], {"system_prompt": ""}
GREEDY, DRAWN = Options(temperature=0.0), {"temperature": 0.8, "top_p": 0.9}


def run(engine: Engine, *jobs: Job) -> list[Ended | Failed]:
    """Submits jobs; returns the last event of each when all are over."""
    over = queue.SimpleQueue()
    for job in jobs:
        job.notify = lambda event, job=job: None if isinstance(event, Token) else over.put((job, event))
    engine.submit(*jobs)
    ends = dict(over.get(timeout=300) for _ in jobs)
    return [ends[job] for job in jobs]


def is_free(engine: Engine) -> bool:
    """Whether the engine comes to rest, with all rows free."""
    deadline = time.monotonic() + 30
    while not engine.idle and time.monotonic() < deadline:
        time.sleep(0.005)
    return engine.idle and engine.running == engine.waiting == 0 and not engine._slots.active.any()


@pytest.fixture(scope="module")
def engine(janus):
    with Engine(janus, slots=5) as engine:
        yield engine


@functools.cache
def compilations() -> list[str]:
    """Collects the programs that are compiled, from the first call on: not every JAX can forget a listener."""
    seen: list[str] = []

    def listen(event: str, _: float, **__):
        if "backend_compile" in event:
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    # The engine's programs may have been compiled by another file's tests: this shows that the listener hears.
    jax.jit(lambda: jax.numpy.zeros(3))()
    assert seen
    return seen


@pytest.fixture(autouse=True)
def has_room(monkeypatch):
    """Every step writes behind the lengths of all rows, and within the cache: XLA would write over what is before."""
    real = programs.step

    def step(model, params, cache, tokens, rows, active, window):
        assert np.asarray(rows.lengths).max() + window <= cache.slots
        return real(model, params, cache, tokens, rows, active, window=window)

    monkeypatch.setattr(programs, "step", step)


@pytest.fixture(autouse=True)
def comes_to_rest(request):
    yield
    if "engine" in request.fixturenames:
        assert is_free(request.getfixturevalue("engine"))


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(4)
    return [rng.integers(low, low + 100, (40, 60, 3), np.uint8) for low in (0, 80, 155)]


@pytest.fixture(scope="module")
def answers(janus, pictures) -> dict:
    """What `chat` says alone, by the seed (None: greedy) and the picture."""
    # The likeliest token of one is greedy, and is drawn by the others' program.
    draws = {None: {"top_k": 1}} | {seed: {"seed": seed} for seed in (3, 2**32 - 1)}
    asked = [(seed, which) for seed in draws for which in (0, 2)]
    return {
        (seed, which): janus.chat(QUESTION, pictures[which], **SETTINGS, **DRAWN, **draws[seed])
        for seed, which in asked
    }


def asking(janus, pictures, seed, which) -> Job:
    options = GREEDY if seed is None else Options(**DRAWN, seed=seed)
    return question(janus, QUESTION, pictures[which], LIMIT, options, **NO_SYSTEM)


def said(janus, job: Job) -> str:
    return janus.processor.tokenizer.answer(job.tokens)


# ---------------------------------------------------------------- equal to the library


def test_a_mix_draws_what_each_draws_alone(janus, engine, pictures, codes, answers):
    """In both orders, so that rows meet other neighbors, and prompts that the cache holds; some are canceled."""
    assert len(set(answers.values())) > 3, "the answers are alike, which proves nothing"
    for order in (0, 1):
        asked = {asking(janus, pictures, *key): answer for key, answer in answers.items()}
        images = drawings(janus, SHORT, 5)
        others = [*drawings(janus, OTHER, 2), asking(janus, pictures, 7, 1)]
        jobs = [*asked, *images, *others]
        random.Random(order).shuffle(jobs)
        others[0].cancelled = others[-1].cancelled = True
        compiled = len(compilations())
        ends = dict(zip(jobs, run(engine, *jobs), strict=True))
        compiled = compilations()[compiled:]
        assert {job: said(janus, job) for job in asked} == asked
        np.testing.assert_array_equal([job.tokens for job in images], codes)
        assert {ends[job] for job in images} == {Ended("stop")}
        assert [ends[job] for job in (others[0], others[-1])] == [Ended("cancelled")] * 2
        for job in asked:
            assert ends[job] == Ended("length" if len(job.tokens) == LIMIT else "stop")
    assert not compiled, "requests compiled something"
    assert sum(job.reused for job in jobs) > 5 * 16, "nothing of the first round was used again"


@pytest.mark.slow
def test_pictures_are_those_of_the_codes(janus, engine, codes):
    np.testing.assert_array_equal(engine.decode(codes[1]).result(60), janus.decode_codes(codes[1:2])[0])


@pytest.mark.slow
def test_mixes_of_everything_draw_what_each_draws_alone(janus, engine, pictures):
    """And compile nothing, once all is warm."""
    jax.clear_caches()
    engine.warm_up()
    chat = "Tell me about the picture, and then about everything else that you can see there, in a few words"
    rng, made = random.Random(0), []
    while len(made) < 60:
        truncated = {"top_k": rng.choice([None, 5, 40]), "top_p": rng.choice([1.0, 0.9, 0.5])}
        how = {"temperature": rng.choice([0, 0.7, 1.0, 1.3]), "seed": rng.choice([0, 1, 2**32 - 1]), **truncated}
        if rng.random() < 0.4:
            weight, prompt = rng.choice([1.0, 1.0, 3.0, 5.0]), rng.choice([SHORT, OTHER, LONG])
            n = rng.choice([1, 1, 2, 3])
            given = (prompt, n, weight), how
            made += [(job, given) for job in drawings(janus, prompt, n, Options(**how, cfg_weight=weight))]
        else:
            images = rng.sample(pictures, rng.choice([0, 0, 1, 2, 3]))
            given = (rng.choice([QUESTION, chat, chat * 4]), images, rng.choice([1, 5, 20])), how
            made.append((question(janus, *given[0], Options(**how)), given))
    before = len(compilations())
    ends = run(engine, *(job for job, _ in made))
    assert not compilations()[before:], "requests compiled something"
    assert all(isinstance(end, Ended) and end.reason in ("stop", "length") for end in ends)
    for job, (given, how) in made:
        if job.image:
            assert job.tokens == janus.generate_codes(*given, **how)[job.index].tolist(), (given, how)
        else:
            assert said(janus, job) == janus.chat(*given, **how), (given, how)


@pytest.mark.parametrize("start", [0, 1, 40, 300, 570, 599])
def test_pieces_cover_a_prompt_and_stay_in_the_cache(start):
    rng = np.random.default_rng(start)
    ids, pixels = rng.integers(0, 300, 600).astype(np.int32), np.zeros((2, 2, 3), np.float32)
    prompt = Prompt(ids, (Picture(20, pixels), Picture(500, pixels + 1)), 16)
    start = 36 if start == 40 else start  # a picture is held whole or not at all
    slot = start
    for where, piece, count in prompt.pieces(start, 632):
        assert where == slot and count > 0
        if isinstance(piece, Picture):
            assert where == piece.start and count == 16
        else:
            assert piece.shape[1] in PIECES and where + piece.shape[1] <= 632
            np.testing.assert_array_equal(piece[0, :count], ids[where : where + count])
        slot += count
    assert slot == 599, "all but the last token"


@pytest.mark.slow
def test_the_cache_grows_and_long_prompts_come_in_pieces(janus, monkeypatch):
    monkeypatch.setattr("janus_jax.serving.device._SMALLEST_CACHE", 64)
    asked = [("What is it? " * repeated, (), limit) for repeated, limit in ((1, 8), (9, 200), (30, 60), (1, 30))]
    with Engine(janus, slots=2) as engine:
        assert len(engine._device.sizes) > 2
        engine.warm_up()
        jobs = [question(janus, *given, **NO_SYSTEM) for given in asked]
        run(engine, *jobs)
        assert [said(janus, job) for job in jobs] == [janus.chat(*given, **NO_SYSTEM) for given in asked]
        assert max(job.prompt_tokens for job in jobs) > 128


@pytest.mark.slow
def test_adapters_share_the_steps(folder, tmp_path, pictures):
    """A model and two adapters of it, of other layers, each drawing what it draws alone."""
    own = load(folder)
    for seed, name in enumerate(("one", "two")):
        targets = {} if name == "one" else {"targets": ("attention", "heads")}
        own.load_adapter(written(tmp_path / name, own.config, seed=seed, **targets), name=name)
    own.use_adapter("one")
    with Engine(own, slots=5) as engine:
        engine.warm_up()
        made = []
        for name in (None, "one", "two") * 2:
            asked = question(own, QUESTION, pictures[0], LIMIT, Options(**DRAWN), **NO_SYSTEM, adapter=name)
            made += [(name, asked), *((name, job) for job in drawings(own, SHORT, 1, adapter=name))]
        before = len(compilations())
        run(engine, *(job for _, job in made))
        assert not compilations()[before:]
    assert own.adapters.active == "one", "the pipeline is as it was"
    for name in (None, "one", "two"):
        own.use_adapter(name)
        said_alone = own.chat(QUESTION, pictures[0], **SETTINGS, **DRAWN)
        codes_alone = own.generate_codes(SHORT)[0].tolist()
        for job in (job for other, job in made if other == name):
            assert (job.tokens if job.image else own.processor.tokenizer.answer(job.tokens)) == (
                codes_alone if job.image else said_alone
            )
    assert len({tuple(job.tokens) for _, job in made}) == 6, "the adapters do nothing, which proves nothing"


def test_a_conversation_goes_on_from_its_rows(janus, engine):
    asked = QUESTION * 6
    first = question(janus, asked, (), LIMIT, system_prompt="")
    run(engine, first)
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": "A cat."}]
    second = question(janus, [*turns, {"role": "user", "content": OTHER}], (), LIMIT, system_prompt="")
    run(engine, second)
    assert second.reused >= first.prompt_tokens - 1, "the first turn was computed again"


# ---------------------------------------------------------------- ends that are not good


def test_cancelling_frees_the_rows(janus, engine):
    began, over = queue.SimpleQueue(), queue.SimpleQueue()
    job = question(janus, QUESTION, (), 300, **NO_SYSTEM)
    job.notify = lambda event: (began if isinstance(event, Token) else over).put(event)
    engine.submit(job)
    began.get(timeout=60)
    engine.cancel(job)
    assert over.get(timeout=60) == Ended("cancelled")
    assert 0 < len(job.tokens) < 300


def test_values_that_are_not_finite_fail_one_job(janus, engine, pictures, answers, monkeypatch):
    tokenizer = janus.processor.tokenizer
    bad = question(janus, QUESTION, (), LIMIT, GREEDY, **NO_SYSTEM)
    spoiled = next(i for i in range(5, 300) if i not in bad.prompts[0].ids)
    (prompt,) = bad.prompts
    bad.prompts = (Prompt(np.concatenate([prompt.ids[:5], [spoiled], prompt.ids[5:]]).astype(np.int32)),)
    table = engine._device.params[None]["language_model"]["embed_tokens"]["embedding"]
    own = {**janus.params["language_model"], "embed_tokens": {"embedding": table.at[spoiled].set(np.nan)}}
    monkeypatch.setitem(engine._device.params, None, {**janus.params, "language_model": own})
    for _ in range(3):  # every row comes to be the bad one's
        good = [asking(janus, pictures, seed, 0) for seed in (None, 3)]
        again = Job(bad.prompts, GREEDY, LIMIT, tokenizer.eos_id)
        failed, *ends = run(engine, again, *good)
        assert isinstance(failed.error, NotFinite) and "not finite after the prompt" in str(failed.error)
        assert all(isinstance(end, Ended) for end in ends)
        assert [said(janus, job) for job in good] == [answers[seed, 0] for seed in (None, 3)]


@pytest.mark.parametrize("lost", [False, True], ids=["one prompt", "the cache with it"])
def test_out_of_memory_fails_what_asked_for_it(janus, engine, pictures, answers, monkeypatch, lost):
    """As a device says it, before or after the cache was given up to the program."""
    real, calls = programs.prefill, []

    def prefill(model, params, cache, *args):
        calls.append(args)
        if len(calls) == 1:
            if lost:
                jax.tree.map(lambda x: x.delete(), cache)
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")
        return real(model, params, cache, *args)

    monkeypatch.setattr(programs, "prefill", prefill)
    bad = question(janus, f"{OTHER} {lost}", (), LIMIT, **NO_SYSTEM)  # which no row holds yet
    good = [asking(janus, pictures, seed, 2) for seed in (None, 3)]
    failed, *ends = run(engine, bad, *good)
    assert isinstance(failed.error, OutOfMemory) and "memory" in str(failed.error)
    assert all(isinstance(end, Ended) for end in ends)
    assert [said(janus, job) for job in good] == [answers[seed, 2] for seed in (None, 3)]


def test_what_cannot_be_taken_is_refused(janus, engine):
    with Engine(janus, slots=2, context=96) as own, raises_one_line("the prompt of .* and 90 .* the context of 96"):
        own.submit(question(janus, QUESTION, (), 90, **NO_SYSTEM))
    job = question(janus, QUESTION, (), 4, adapter="mine")
    with raises_one_line("no adapter named"):
        engine.submit(job)
    for given, match in (({"slots": 1}, "at least 2"), ({"context": 20}, "from 48"), ({"context": 9999}, "512")):
        with raises_one_line(match):
            Engine(janus, **given)


def test_the_queue_has_an_end_and_closing_tells_all(janus, engine, answers, pictures):
    """An engine of its own, of the same programs."""
    with Engine(janus, slots=5, max_queue=7) as own:
        long = [question(janus, QUESTION, (), 300, **NO_SYSTEM) for _ in range(8)]
        with pytest.raises(Full):
            own.submit(*long)
        over = queue.SimpleQueue()
        for job in long:
            job.notify = lambda event: None if isinstance(event, Token) else over.put(event)
        own.submit(*long[:7])
        own.close()
        ends = [over.get(timeout=60) for _ in long[:7]]
        assert all(isinstance(end, Failed) and isinstance(end.error, Stopped) for end in ends)
        with pytest.raises(Stopped):
            own.submit(long[7])
    with Engine(janus, slots=5) as own:
        job = asking(janus, pictures, None, 0)
        own.submit(job)
        own.close(patience=60)
        assert said(janus, job) == answers[None, 0], "what is under way is finished"
