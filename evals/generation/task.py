"""What a benchmark of drawing is to the rest of `evals`."""

from __future__ import annotations

import abc
import pathlib
from typing import ClassVar, Self

from evals.generation.prompts import Drawing
from evals.items import Task


class DrawnTask(Task):
    """A benchmark whose items are about pictures, and whose replies are those of whoever looks at them.

    An item's group is the key of its drawing. `load` needs no pictures: they may be drawn later.

    Args:
      pictures: the folder in which they lie.
      given: whether they were drawn elsewhere, so that the folder says which ones there are, instead of the prompts in
        the data.
    """

    samples: ClassVar[int] = 4  # of a prompt

    def __init__(self, pictures: pathlib.Path | None = None, given: bool = False):
        self._pictures, self.given = pictures, given

    @property
    def pictures(self) -> pathlib.Path:
        """The folder. ValueError if nobody has said which."""
        if self._pictures is None:
            raise ValueError(f"{self.name} scores pictures, and there is no folder of them")
        return self._pictures

    def at(self, pictures: pathlib.Path, given: bool = False) -> Self:
        """The same benchmark of pictures in this folder."""
        return type(self)(pictures, given)

    @abc.abstractmethod
    def drawings(self, data: pathlib.Path) -> list[Drawing]:
        """What is to be drawn, by the prompts in `data`. Raises ValueError or OSError in one line."""
