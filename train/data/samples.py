"""A training sample, and its storage in a record of a prepared folder.

A sample is a sequence of text ids, optionally followed by image codes; the model reads all but the last of them and
predicts all but the first. `length` counts what it reads, which is the space that a sample takes in a packed row.
"""

from __future__ import annotations

import dataclasses

import msgpack
import numpy as np


@dataclasses.dataclass(frozen=True)
class Sample:
    """A tokenized sample.

    Attributes:
      kind: 'understanding', 'text', 'generation' or 'preference'.
      ids: int32 [n], starting with BOS; each understanding image is begin_of_image, one placeholder for each patch,
        end_of_image. For a sample of generation or preference, the prompt, ending with begin_of_image.
      answers: bool [n], the tokens that the model learns to produce: answers with their EOS; all but BOS in plain text;
        none in a sample of generation or preference, which learns the codes.
      images: image files as bytes, in order, for understanding.
      codes: int32 [num_tokens], the image of a generation sample, or the chosen one of a preference; else empty.
      rejected: int32 [num_tokens], the other image of a preference; else empty.
      short_ids: a generation sample's prompt with the caption cut to its first sentence; empty if it has only one.
      place: where in the source it was found; empty in folders prepared before places were stored.
    """

    kind: str
    ids: np.ndarray
    answers: np.ndarray
    images: tuple[bytes, ...] = ()
    codes: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    short_ids: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    place: str = ""
    rejected: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))

    @property
    def length(self) -> int:
        """Tokens that the model reads: those of a row that the sample takes, or of both sequences of a preference."""
        return (2 if len(self.rejected) else 1) * (len(self.ids) + len(self.codes) - 1)

    def to_bytes(self) -> bytes:
        """The sample as a record of a shard file."""
        fields = {
            "kind": self.kind,
            "ids": self.ids.astype("<i4").tobytes(),
            "answers": np.packbits(self.answers).tobytes(),
            "images": list(self.images),
            "codes": self.codes.astype("<i4").tobytes(),
            "short_ids": self.short_ids.astype("<i4").tobytes(),
            "place": self.place,
        }
        if len(self.rejected):
            fields["rejected"] = self.rejected.astype("<i4").tobytes()
        return msgpack.packb(fields)

    @classmethod
    def from_bytes(cls, record: bytes) -> Sample:
        """The inverse of `to_bytes`; ValueError if the record is not a sample."""
        try:
            fields = msgpack.unpackb(record)
            ids = np.frombuffer(fields["ids"], "<i4")
            answers = np.unpackbits(np.frombuffer(fields["answers"], np.uint8), count=len(ids)).astype(bool)
            codes, short = (np.frombuffer(fields[name], "<i4") for name in ("codes", "short_ids"))
            rejected = np.frombuffer(fields.get("rejected", b""), "<i4")
            rest = codes, short, fields.get("place", ""), rejected
            return cls(fields["kind"], ids, answers, tuple(fields["images"]), *rest)
        except (ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
            raise ValueError(f"the record is not a prepared sample ({error})") from None
