"""A step of DPO: pairs of a chosen and a rejected picture, and how much further the model goes towards the first."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from janus_jax.processing.chat import Processor
from janus_jax.sampling.finite import on_host
from janus_jax.sharding import flatten, unflatten
from train.config import PREFERENCE, TrainConfig
from train.data.batches import load_batches
from train.data.mixture import Stream, cache_settings
from train.data.prepared import Prepared, open_prepared
from train.data.work import Batches, Work
from train.rl.loss import pair_log_probabilities
from train.rl.prompts import padded
from train.rl.reference import params_digest, store_reference, stored_reference
from train.rl.update import make_dpo_step
from train.run.distributed import say, together
from train.step.earlier import REFERENCE
from train.step.leaves import joined
from train.step.state import Params, TrainState
from train.step.step import make_row_values


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Makes batches of pairs, see `train.rl.loss`: step s has s * B to (s + 1) * B of an endless shuffled order.

    Attributes:
      longest: the slots of a prompt.
      codes: the codes of a picture.
    """

    stream: Stream
    processor: Processor
    count: int
    longest: int
    codes: int

    @property
    def folders(self) -> Sequence[Prepared]:
        return self.stream.folders

    def __call__(self, step: int, rows: Sequence[int] | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The arrays of `rows` (default: all) of `step`, with the place of each pair as `pair` [B, 2], and a report."""
        rows = range(self.count) if rows is None else rows
        numbers = {id(folder): number for number, folder in enumerate(self.folders)}
        places = []
        for row in rows:
            folder, index = self.stream[step * self.count + row]
            places.append((numbers[id(folder)], index))
        return self.of(places)

    def of(self, places: Sequence[tuple[int, int]]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The arrays of pairs (folder, index); a damaged one has no tokens that count, and is named in the report."""
        problems: list[str] = []
        shape = (len(places), self.codes)
        prompts = []
        batch = {
            "chosen": np.zeros(shape, np.int32),
            "rejected": np.zeros(shape, np.int32),
            "pair": np.asarray(places, np.int32).reshape(-1, 2),
            "live": np.ones(len(places), np.float32),
            "damaged": np.zeros(len(places), np.int32),
        }
        for row, (number, index) in enumerate(places):
            folder = self.folders[number]
            try:
                sample = folder[index]
                batch["chosen"][row], batch["rejected"][row] = sample.codes, sample.rejected
                prompts.append(sample.ids.tolist())
            except ValueError as error:
                problems.append(f"{folder.folder}, sample {index}: {error}")
                batch["live"][row], batch["damaged"][row] = 0, 1
                prompts.append([self.processor.tokenizer.begin_of_image_id])
        batch |= padded(prompts, self.processor, self.longest, guided=False)
        lengths = batch["mask"].sum((1, 2)) + self.codes
        report = {
            "tokens": int(2 * lengths.sum()), "samples": len(places), "images": 0, "left_out": 0,
            "sample_length": float(lengths.mean()), "problems": problems,
        }  # fmt: skip
        return batch, report


class Dpo(Work):
    """Pairs of prepared folders, and the updates that prefer what was chosen."""

    curves = tuple(f"train/{name}" for name in ("dpo_loss", "preferred", "chosen_reward", "rejected_reward"))

    def __init__(self, config: TrainConfig, mesh: Mesh, processor: Processor):
        super().__init__(config, mesh, processor)
        codes = config.model.gen_vision.num_tokens
        self.folders = [_open(path, config, codes) for path in config.dpo.pairs]
        stream = Stream(self.folders, config.dpo.weights, config.seed)
        self._pairs = Pairs(stream, processor, config.batch_size, config.data.context - codes, codes)
        self._reference: list[np.ndarray] = []

    def about(self, first: int) -> str:
        return f"{self.config.batch_size} of {sum(map(len, self.folders)):,} pairs"

    # ------------------------------------------------------------ the reference

    def first_kept(self, state: TrainState, frozen: Params) -> Params:
        """The log-probabilities of all pairs: those that are stored beside them, or else they are computed now."""
        # Without an adapter's own leaves, which change nothing at first.
        params = flatten(joined(state.trained, frozen))
        digest = params_digest(
            unflatten({path: x for path, x in params.items() if not path.rpartition("/")[2].startswith("lora_")})
        )
        values = make_row_values(self.config, self.mesh, functools.partial(pair_log_probabilities, self.config))
        found = {}
        for number, folder in enumerate(self.folders):
            with together():
                stored = stored_reference(folder, digest)
            if stored is None:
                stored = self._computed(number, state, frozen, values)
                if jax.process_index() == 0:
                    _try_to_store(folder, digest, stored)
            found[str(number)] = stored.astype(np.float32)
        shapes = self.kept_shapes(state)[REFERENCE]
        put = {
            name: jax.make_array_from_callback(x.shape, shapes[name].sharding, x.__getitem__)
            for name, x in found.items()
        }
        return {REFERENCE: put}

    def _computed(self, number: int, state: TrainState, frozen: Params, values: Any) -> np.ndarray:
        """Of all pairs of a folder, float64 [n, 2]; 0 for damaged ones, which no step counts."""
        folder, count, parts = self.folders[number], self.config.batch_size, []
        say(f"  {folder.folder}: computing the reference's log-probabilities of {len(folder):,} pairs")
        for begin in range(0, len(folder), count):
            # The last batch ends with pairs of the beginning, so that all are of one size.
            places = [(number, (begin + row) % len(folder)) for row in range(count)]
            with together():
                batch, _ = self._pairs.of([places[row] for row in self.rows])
            live = batch["live"]
            put = self.put({name: x for name, x in batch.items() if name in ("ids", "mask", "chosen", "rejected")})
            found = jnp.where(self.put({"live": live})["live"][:, None] > 0, values(state.trained, frozen, put), 0)
            parts.append(on_host(found))
        return np.concatenate(parts)[: len(folder)].astype(np.float64)

    def kept_shapes(self, state: TrainState) -> Params:
        whole = NamedSharding(self.mesh, PartitionSpec())
        shapes = {
            str(number): jax.ShapeDtypeStruct((len(folder), 2), jnp.float32, sharding=whole)
            for number, folder in enumerate(self.folders)
        }
        return {REFERENCE: shapes}

    # ------------------------------------------------------------ a step

    def begin(self, kept: Params) -> None:
        own = kept[REFERENCE]
        self._reference = [np.asarray(own[str(number)].addressable_data(0)) for number in range(len(self.folders))]
        self._step = make_dpo_step(self.config, self.mesh)

    def batches(self, first: int) -> Batches:
        return load_batches(self._pairs, self.rows, first, self.config.steps, self.config.data.workers)

    def step(self, state: TrainState, frozen: Params, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        reference = np.stack([self._reference[number][index] for number, index in batch["pair"]])
        arrays = {name: x for name, x in batch.items() if name != "pair"} | {"reference": reference}
        return self._step(state, frozen, self.put(arrays))


def _open(path: str, config: TrainConfig, codes: int) -> Prepared:
    """The prepared folder `path`; ValueError in one line if it has no pairs, or some that do not fit."""
    folder = open_prepared(path, cache_settings(config.data))
    if folder.kind != PREFERENCE:
        raise ValueError(
            f"dpo.pairs: {path} has {folder.kind} samples; prepare pairs with train.prepare --kind {PREFERENCE}"
        )
    sample = folder[0]
    for name, own in (("chosen", sample.codes), ("rejected", sample.rejected)):
        if len(own) != codes:
            raise ValueError(f"{path} has {name} pictures of {len(own)} codes, the model's have {codes}")
    longest = folder.longest() // 2 + 1
    if longest > config.data.context:
        raise ValueError(
            f"{path} has pairs of up to {longest} tokens a picture, more than data.context={config.data.context}; "
            "raise it, or prepare them again with a smaller --context"
        )
    return folder


def _try_to_store(folder: Prepared, digest: str, values: np.ndarray) -> None:
    try:
        store_reference(folder, digest, values)
    except OSError as error:
        # The run keeps them in its workdir; only another run would compute them again.
        say(f"note: the reference's log-probabilities are not kept beside {folder.folder}: {error}")
