"""Tensors that do not fit, told by pattern."""

from janus_jax.weights.mismatch import Problem, summary


def test_numbers_become_ranges():
    names = [f"model.layers.{i}.self_attn.{x}_proj.weight" for i in range(30) for x in "qk"]
    told = summary([Problem("missing", name, "[4, 4]") for name in names])
    assert told == (
        "missing: model.layers.{0..29}.self_attn.q_proj.weight [4, 4] (30); "
        "missing: model.layers.{0..29}.self_attn.k_proj.weight [4, 4] (30)"
    )


def test_kinds_shapes_and_gaps_stay_apart():
    problems = [Problem("missing", f"a.{i}", "[1]") for i in (1, 3, 5)] + [Problem("missing", "a.2", "[2]")]
    problems += [
        Problem("unexpected", "a.7"),
        Problem("missing", "vq.layers_1.k1"),
        Problem("missing", "vq.layers_2.k1"),
    ]
    assert summary(problems) == (
        "missing: a.{1,3,5} [1] (3); missing: a.2 [2]; unexpected: a.7; missing: vq.layers_{1..2}.k1 (2)"
    )


def test_many_patterns_are_counted_and_names_escaped():
    told = summary([Problem("unexpected", "x" * n + "\n\x1b[0m") for n in range(1, 40)])
    assert told.endswith("; and 27 more") and told.isprintable() and told.count("unexpected") == 12
    assert len(summary([Problem("missing", "9" * 10**6), Problem("missing", "a" * 10**6)])) < 1000
