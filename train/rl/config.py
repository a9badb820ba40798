"""The sections of a run's config for reinforcement learning (GRPO) and for preferences (DPO)."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """What judges drawn pictures, see `train.rl.rewards`.

    Attributes:
      function: `package.module:name` of a function (pictures uint8 [N, h, w, 3], prompts, metadata) -> N numbers, or of
        a class whose objects are called so; the class is made once, with the options.
      weight: the rewards of a run are summed with these.
      name: of its metrics; empty for its function's.
      options: further arguments of the function, or the class's, as key=value; a value is JSON, or else text.
      workers: processes in which it is called, on a CPU as far as JAX is concerned; 0 calls it in a thread of the run.
      batch_size: pictures in one call. What a call does not score is lost together: a group's size is a good choice.
      tries: calls for the same pictures before they go without a score.
      timeout: seconds after which a worker process that has not answered is ended and started again.
    """

    function: str
    weight: float = 1.0
    name: str = ""
    options: tuple[str, ...] = ()
    workers: int = 1
    batch_size: int = 8
    tries: int = 3
    timeout: float = 600.0
