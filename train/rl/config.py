"""The sections of a run's config for reinforcement learning (GRPO) and for preferences (DPO)."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

# What is drawn and judged. A reward's first argument has the name of what it judges.
Rollouts = Literal["pictures", "answers"]
ROLLOUTS: tuple[str, ...] = get_args(Rollouts)


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """What judges drawn pictures, or answers, see `train.rl.rewards`.

    Attributes:
      function: `package.module:name` of a function (pictures uint8 [N, h, w, 3], prompts, metadata) -> N numbers, or of
        a class whose objects are called so; the class is made once, with the options. What judges answers takes these,
        a list of N texts, as its first argument, `answers`.
      weight: the rewards of a run are summed with these.
      name: of its metrics; empty for its function's.
      options: further arguments of the function, or the class's, as key=value; a value is JSON, or else text.
      workers: processes in which it is called, on a CPU as far as JAX is concerned; 0 calls it in a thread of the run.
      batch_size: pictures or answers in one call. What a call does not score is lost together: a group's size is a
        good choice.
      tries: calls for the same ones before they go without a score.
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


@dataclasses.dataclass(frozen=True)
class GrpoConfig:
    """Group relative policy optimization (arXiv 2402.03300) of drawing or answering, trained instead of on data.

    In each step the model draws `batch_size` pictures (or as many answers), `group` of each prompt; a picture's
    advantage is its reward compared with its group's. The updates then follow the clipped objective, with the
    log-probabilities of the model that drew as the old ones.

    Attributes:
      prompts: files of prompts: text, one a line, or JSON lines with `prompt` and whatever rewards ask for; those of
        answers may have `images`, paths of pictures that the prompt is about.
      rewards: what judges the pictures, or the answers.
      rollouts: what is drawn: 'pictures' of prompts, or 'answers' to prompts, which may have pictures.
      max_new_tokens: the most tokens of an answer, with its end.
      group: pictures, or answers, of a prompt.
      loss: the distribution whose log-probabilities are trained. 'guided' is the one that is drawn from: guidance,
        temperature, top-k and top-p included. 'conditional' draws with guidance and trains the conditional
        distribution at the same temperature. 'none' draws and trains without guidance. Answers have no guidance: what
        they are drawn from is what is trained, temperature, top-k and top-p included.
      detach: whether the unconditional rows of 'guided' have no gradient.
      guidance, temperature, top_k, top_p: as pictures or answers are drawn; top_k=0 and top_p=1 keep all tokens.
      draw_batch: pictures drawn at a time, while rewards of earlier ones are computed; 0 for as many as fit.
      speculate: codes of a picture that a pass is given, all but one of them guessed, which draws the same pictures in
        fewer passes, see `JanusPipeline.generate_images`; 0 where it pays, 1 for one code after the other.
      epochs: passes of the updates over the pictures of a step.
      updates: optimizer updates of a pass, each on its share of the pictures.
      clip: how far the ratio of new to old probability counts, below and above 1.
      kl: weight of the divergence from the first parameters (k3, arXiv 2402.03300, equation 4); 0 needs no copy of
        them. It is of the distributions before top-k and top-p, which would make it infinite.
      scale: divide advantages by the standard deviation of the group's rewards; otherwise only their mean is taken off.
    """

    prompts: tuple[str, ...] = ()
    rewards: tuple[RewardConfig, ...] = ()
    rollouts: Rollouts = "pictures"
    max_new_tokens: int = 256
    group: int = 8
    loss: Literal["guided", "conditional", "none"] = "guided"
    detach: bool = True
    guidance: float = 5.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    draw_batch: int = 0
    speculate: int = 0
    epochs: int = 1
    updates: int = 1
    clip: float = 0.2
    kl: float = 0.01
    scale: bool = True

    @property
    def guided(self) -> bool:
        """Whether pictures are drawn with an unconditional row."""
        return self.rollouts == "pictures" and self.loss != "none" and self.guidance != 1


@dataclasses.dataclass(frozen=True)
class DpoConfig:
    """Direct preference optimization of drawing (arXiv 2305.18290), trained instead of on data.

    Attributes:
      pairs: prepared folders of the kind preference (see `train.prepare`).
      weights: relative weights with which the folders are drawn; empty for equal weights.
      beta: how far the model may move from the first parameters: the loss is -log sigmoid(beta * margin), the margin
        being how much further the chosen picture's log-probability has risen than the rejected one's.
    """

    pairs: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    beta: float = 0.1
