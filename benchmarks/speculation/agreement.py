"""Whether a trained model draws the same distribution with guessed codes as one code after the other.

Images of the rule 'same' are compared one by one. The other rules draw others, of seeds of their own, and three
distributions are compared with the plain loop's: codes at each position, pairs of neighbors, and the digit that the
judge recognizes for each that was asked for. A p-value is that of the least likely table, times the number of tables.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import numpy as np

from benchmarks.speculation.drawing import Drawing, Setting

_RARE = 20  # a column with fewer is counted together with others


def p_value(tables: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
    """Of the hypothesis that both columns of integers [B] of each table have one distribution (Bonferroni)."""
    from scipy import stats

    values = []
    for one, other in tables:
        _, index = np.unique(np.concatenate([one, other]), return_inverse=True)
        seen = np.stack([np.bincount(part, minlength=index.max() + 1) for part in np.split(index, [len(one)])])
        rare = seen.sum(0) < _RARE
        seen = np.concatenate([seen[:, ~rare], seen[:, rare].sum(1, keepdims=True)], axis=1)
        seen = seen[:, seen.sum(0) > 0]
        if seen.shape[1] > 1:
            values.append(float(stats.chi2_contingency(seen).pvalue))
    return min(1.0, min(values, default=1.0) * max(len(values), 1))


def compare(drawing: Drawing, images: int, window: int, temperature: float, guidance: float) -> dict[str, float]:
    """Figures by name: the share of equal images, and p-values."""
    from examples.digits.judge import Judge

    size = drawing.janus.config.gen_vision.image_size
    judge, asked = Judge(("train", "validation"), size), np.arange(len(drawing.prompts)) % 10

    def draw(how: Setting, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Codes, and the digit asked for and recognized as one number."""
        codes, digits = [], []
        for start in range(0, images, len(drawing.prompts)):
            codes.append(drawing.once(how, seed + start)[0])
            digits.append(10 * asked + judge.predict(drawing.janus.decode_codes(codes[-1])))
        return np.concatenate(codes), np.concatenate(digits)

    plain, digits = draw(Setting(0, temperature, guidance), 0)
    grid = drawing.janus.config.gen_vision.grid
    found = {"same: equal images": float((draw(Setting(window, temperature, guidance), 0)[0] == plain).all(1).mean())}
    for number, coupling in enumerate(("maximal", "gumbel"), start=1):
        how = Setting(window, temperature, guidance, coupling=coupling)
        codes, others = draw(how, 10_000_000 * number)
        found[f"{coupling}: codes"] = p_value(zip(plain.T, codes.T, strict=True))
        for name, step in (("pairs beside", 1), ("pairs above", grid)):
            pairs = [(x[:, :-step].astype(np.int64) << 32 | x[:, step:]).T for x in (plain, codes)]
            found[f"{coupling}: {name}"] = p_value(zip(*pairs, strict=True))
        found[f"{coupling}: digits"] = p_value([(digits, others)])
    return found


def agreement_table(args: argparse.Namespace) -> str:
    """A line for each figure of `compare`, for `args` of `benchmarks.speculation`."""
    from examples.digits.data import captions

    drawing = Drawing(args.model, args.batch_size, [captions(label)[0] for label in range(10)])
    found = compare(drawing, args.images[0], args.windows[0], args.temperature, args.guidance)
    return "\n".join(f"{name:24} {value:.4f}" for name, value in found.items())
