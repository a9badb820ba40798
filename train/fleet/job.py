"""A preparation as it is asked for on the command line: enough for a process on any host to take part in it."""

from __future__ import annotations

import dataclasses
import os

import jax

from janus_jax.config import read_config
from janus_jax.hub import resolve
from janus_jax.io.store_access import is_store
from janus_jax.processing.chat import Processor
from train.config import ENCODED
from train.fleet.encoder import vq_encoder
from train.fleet.preparation import Preparation, PrepareOptions
from train.fleet.shares import ALL, Part
from train.raw.sources import Source, open_source


@dataclasses.dataclass(frozen=True)
class Job(PrepareOptions):
    """The arguments of `open_source` and `train.prepare.prepare`, with a checkpoint instead of what is read from it.

    Here `batch_size` is for each device.
    """

    source: str
    out: str
    kind: str
    model: str
    format: str | None = None
    schema: str | None = None
    images: str | None = None
    names: str | None = None
    allow_outside: bool = False

    def open_source(self, part: Part = ALL) -> Source:
        """The source, whose indices are kept beside the output; each part begins with other files."""
        return open_source(
            self.source,
            self.format,
            self.images,
            self.names,
            self.allow_outside,
            self.schema,
            index=f"{self.out.rstrip('/')}.index",
            begin=part.index / part.count,
        )

    def join(self, source: Source | None = None, progress: bool | None = None) -> Preparation:
        """Begins the folder, or joins those who prepare it; errors are those of `train.prepare.prepare`."""
        source = self.open_source() if source is None else source
        folder = resolve(self.model)
        processor = Processor.from_folder(folder, read_config(folder))
        encode, fingerprint = vq_encoder(folder) if self.kind in ENCODED else (None, "")
        options = dataclasses.replace(self, batch_size=self.batch_size * (len(jax.local_devices()) if encode else 1))
        given = {"encode": encode, "vq_fingerprint": fingerprint, "progress": progress}
        return Preparation(source, self.out, self.kind, processor, options, **given)

    def anywhere(self) -> Job:
        """The same from any working directory."""
        paths = {name: getattr(self, name) for name in ("source", "out", "images", "names", "model")}
        # A hub id stays one.
        local = {
            name: os.path.abspath(path)
            for name, path in paths.items()
            if path is not None and not is_store(path) and (name != "model" or os.path.exists(path))
        }
        return dataclasses.replace(self, **local)
