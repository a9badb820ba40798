"""A preparation as it is asked for on the command line: enough for a process on any host to take part in it."""

from __future__ import annotations

import dataclasses
import os

import jax

from janus_jax.config import read_config
from janus_jax.hub import resolve
from janus_jax.io.store_access import is_store
from janus_jax.processing.chat import SYSTEM_PROMPT, Processor
from train.fleet.encoder import vq_encoder
from train.fleet.preparation import Preparation
from train.fleet.shares import ALL, Part
from train.raw.sources import Source, open_source


@dataclasses.dataclass(frozen=True)
class Job:
    """The arguments of `open_source` and `train.prepare.prepare`, with a checkpoint instead of what is read from it.

    Attributes:
      batch_size: images encoded at a time by each device.
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
    context: int = 4096
    shard_size: int | None = None
    batch_size: int = 32
    max_bad_share: float = 0.01
    system_prompt: str = SYSTEM_PROMPT
    store: str = "original"
    workers: int | None = None

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
        encode, fingerprint = vq_encoder(folder) if self.kind == "generation" else (None, "")
        return Preparation(
            source,
            self.out,
            self.kind,
            processor,
            encode=encode,
            vq_fingerprint=fingerprint,
            context=self.context,
            shard_size=self.shard_size,
            batch_size=self.batch_size * (len(jax.local_devices()) if encode else 1),
            max_bad_share=self.max_bad_share,
            system_prompt=self.system_prompt,
            store=self.store,
            workers=self.workers,
            progress=progress,
        )

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
