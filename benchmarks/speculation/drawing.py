"""Passes and seconds of whole images of a trained model, against window, temperature, guidance and top-k.

Wall time is passes times the cost of a pass: the cost is taken from the images of one setting, and predicts the others.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import statistics
from collections.abc import Sequence

import numpy as np

from benchmarks.common import device as _device


@dataclasses.dataclass(frozen=True)
class Setting:
    """How images are drawn; window 0 is the plain loop."""

    window: int = 16
    temperature: float = 1.0
    guidance: float = 3.0
    top_k: int | None = None
    coupling: str = "same"
    fresh: str = "left"


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of images of one setting: codes [B, N], passes [B], seconds of all together, and the share that is as plain."""

    codes: np.ndarray
    passes: np.ndarray
    seconds: float
    same: float


def settings(windows: Sequence[int], short: bool) -> list[Setting]:
    """Windows at each temperature, then guidance, top-k, first guesses and couplings at the default window."""
    middle = Setting().window if Setting().window in windows else windows[-1]
    default = Setting(window=middle)
    made = [Setting(window=window, temperature=t) for window in windows for t in (1.0, 0.8, 0.5)]
    if short:
        return made
    made += [dataclasses.replace(default, guidance=guidance) for guidance in (1.0, 5.0)]
    made += [dataclasses.replace(default, top_k=top_k) for top_k in (32, 8)]
    made += [dataclasses.replace(default, fresh=fresh) for fresh in ("above", "sampled")]
    made += [dataclasses.replace(default, coupling=coupling) for coupling in ("maximal", "gumbel")]
    return made


class Drawing:
    """Draws the same images of a model with any `Setting`."""

    def __init__(self, model: str, images: int, prompts: Sequence[str]):
        import janus_jax

        self.janus = janus_jax.load(model, dtype="float32", progress=False)
        self.prompts = [prompts[i % len(prompts)] for i in range(images)]
        self._plain: dict[Setting, np.ndarray] = {}

    def once(self, how: Setting, first_seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Codes [B, N] and passes [B] of images of seeds from `first_seed` on."""
        import jax
        import jax.numpy as jnp

        from janus_jax.sampling.images import generate_codes, start_image
        from janus_jax.sampling.sampler import Options
        from janus_jax.sampling.speculative import behind_first, draw_windows, slots_of

        janus = self.janus
        tokens = janus.config.gen_vision.num_tokens
        given = {"temperature": how.temperature, "top_k": how.top_k, "cfg_weight": how.guidance}
        options = Options(seed=[first_seed + i for i in range(len(self.prompts))], **given)
        ids, mask, keys = janus._drawing(self.prompts, 1, options)
        if not how.window:
            drawn = generate_codes(
                janus.model, janus.params, ids, mask, keys, guidance=how.guidance, sampler=options.sampler
            )
            return np.asarray(drawn[0]), np.full(len(keys), tokens)
        rest = (keys, jnp.float32(how.guidance), options.sampler)
        slots = slots_of(ids.shape[2], tokens, how.window)
        state = start_image(janus.model, janus.params, ids, mask, *rest, tokens, False, slots)
        first = (state.cache, state.codes[:, 0], state.failed, tokens, how.window, how.coupling)
        images = draw_windows(
            janus.model, janus.params, behind_first(janus.model, *first), *rest, how.window,
            coupling=how.coupling, fresh=how.fresh,
        )  # fmt: skip
        jax.block_until_ready(images)
        return np.asarray(images.codes[:, :tokens]), np.asarray(images.passes)

    def measure(self, how: Setting, repeats: int = 3) -> Measured:
        """The median of several times, after one that compiles."""
        codes, passes = self.once(how)
        seconds = statistics.median(_device.timed(self.once, how)[0] for _ in range(repeats))
        plain = dataclasses.replace(how, window=0, coupling="same", fresh="left")
        if plain not in self._plain:
            self._plain[plain] = codes if how == plain else self.measure(plain, repeats).codes
        return Measured(codes, passes, seconds, float((codes == self._plain[plain]).all(1).mean()))


def table(found: Sequence[tuple[Setting, Measured]]) -> str:
    """Markdown: a row for each setting, beside the plain loop with the same one."""
    plain = {dataclasses.replace(how, window=0): one for how, one in found if not how.window}
    costs: dict[int, float] = {}
    lines = [
        "| window | temperature | guidance | top-k | first guesses | coupling | passes (most) | ms a pass | ms |"
        " predicted | faster | same images |",
        "|---|" + "---|" * 11,
    ]
    for how, one in found:
        base = plain.get(dataclasses.replace(how, window=0, coupling="same", fresh="left"))
        most = int(one.passes.max())
        cost = costs.setdefault(how.window, one.seconds / most)
        cells = [
            how.window or "plain", how.temperature, how.guidance, how.top_k or "all", how.fresh, how.coupling,
            f"{one.passes.mean():.1f} ({most})", f"{1000 * one.seconds / most:.2f}", f"{1000 * one.seconds:.0f}",
            f"{1000 * cost * most:.0f}", f"{base.seconds / one.seconds:.2f}x" if base else "", f"{one.same:.1%}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def plot(found: Sequence[tuple[Setting, Measured]], path: pathlib.Path) -> None:
    """Passes an image against the window, a line for each temperature."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4))
    standard = Setting()
    for temperature in sorted({how.temperature for how, _ in found}):
        fixed = dataclasses.replace(standard, temperature=temperature)
        points = sorted(
            (how.window, float(one.passes.mean()))
            for how, one in found
            if how.window and dataclasses.replace(how, window=fixed.window) == fixed
        )
        axis.plot(*zip(*points, strict=True), marker="o", label=f"temperature {temperature:g}")
    windows = sorted({how.window for how, _ in found if how.window})
    axis.set_xscale("log", base=2)
    axis.set_xticks(windows, [str(window) for window in windows])
    axis.set(xlabel="window", ylabel="passes an image", ylim=(0, None))
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def drawing_table(args: argparse.Namespace) -> str:
    """The table of a trained model, for `args` of `benchmarks.speculation`; writes the plot if it is asked for."""
    from examples.digits.data import captions

    drawing = Drawing(args.model, args.images[0], [captions(label)[0] for label in range(10)])
    wanted = settings(args.windows, args.short)
    plain = dict.fromkeys(dataclasses.replace(how, window=0, coupling="same", fresh="left") for how in wanted)
    found = [(how, drawing.measure(how, args.repeats)) for how in (*plain, *wanted)]
    if args.plot:
        plot(found, args.plot)
    about = f"{args.model}: {args.images[0]} images at a time, {_device.device()}"
    return f"{about}\n\n{table(found)}"
