"""What a training run is: frozen dataclasses, one for each side of it.

A file in `configs/` returns one `TrainConfig`; `train.overrides` changes single fields from the command line.
Sources: Janus-Pro report (arXiv 2501.17811), table 2 and section 3.1; Janus (arXiv 2410.13848), table 1.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from janus_jax.config import JanusConfig

KINDS = ("understanding", "text", "generation")
# What a position is trained to predict: nothing (0), or the next element of a sample of that kind.
TASKS = {kind: number for number, kind in enumerate(KINDS, 1)}

# The subtrees that each stage trains; every other one is frozen (report, section 2.2 and figure 3).
ADAPTERS = ("aligner", "gen_aligner", "gen_embed", "gen_head")
TRAINED: dict[int, tuple[str, ...]] = {
    1: ADAPTERS,
    2: (*ADAPTERS, "language_model"),
    3: (*ADAPTERS, "language_model", "vision_model"),
}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read, and how it is mixed into rows.

    Attributes:
      understanding, text, generation: prepared folders (see `train.prepare`) of each kind.
      understanding_weights, text_weights, generation_weights: how often each folder of a kind is drawn from, beside
        the others; empty for equally often.
      early_generation: folders that stand in for `generation` at first (Janus's stage 2 begins with ImageNet).
      early_steps: for how many steps they do.
      ratio: samples understanding : text : generation, exact in every step.
      context: tokens a row, T.
      images_per_row: at most so many understanding images in a row: the encoder works on this many for each.
      guidance_dropout: share of generation samples whose prompt becomes pads, for classifier-free guidance.
      caption_cut: share of generation samples whose caption is cut to its first sentence.
      text_loss: 'all' tokens of text samples, or the 'answers' only.
      workers: processes that assemble batches ahead; 0 assembles them in threads of this process.
      max_bad_share: stop when more than this share of the samples read turned out damaged.
    """

    understanding: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    generation: tuple[str, ...] = ()
    understanding_weights: tuple[float, ...] = ()
    text_weights: tuple[float, ...] = ()
    generation_weights: tuple[float, ...] = ()
    early_generation: tuple[str, ...] = ()
    early_steps: int = 0
    ratio: tuple[int, int, int] = (5, 1, 4)
    context: int = 4096
    images_per_row: int = 4
    guidance_dropout: float = 0.1
    caption_cut: float = 0.0
    text_loss: Literal["all", "answers"] = "all"
    workers: int = 4
    max_bad_share: float = 0.001


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Losses on held-out data.

    Attributes:
      understanding, text, generation: prepared folders; all kinds that have any count alike.
      every: steps between evaluations, 0 for none.
      batches: how many batches are looked at, the same ones each time.
    """

    understanding: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    generation: tuple[str, ...] = ()
    every: int = 0
    batches: int = 8


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """A grid of images drawn by the model as it stands.

    Attributes:
      every: steps between grids, 0 for none.
      prompts: a row of the grid each.
      images: a prompt.
      guidance, temperature: as in sampling.
    """

    every: int = 0
    prompts: tuple[str, ...] = ()
    images: int = 4
    guidance: float = 5.0
    temperature: float = 1.0


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW.

    Attributes:
      learning_rate: after the warm-up.
      schedule: 'constant', or 'cosine' down to 0 at the last step.
      warmup_steps: in which the rate rises linearly from 0.
      b1, b2, eps: of AdamW.
      weight_decay: of kernels and embeddings; norms and biases have none.
      clip: the largest norm of all gradients together.
    """

    learning_rate: float = 1e-4
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices on each mesh axis; -1 for all that are left. What an axis splits: see `janus_jax.sharding`.

    Attributes:
      data: copies of the parameters, each with its share of the batch.
      fsdp: shards of parameters and batch alike.
      tensor: shards of heads, MLP and vocabulary.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Layout:
    """Devices that a run is meant for, and how it is laid out there.

    Attributes:
      topology: a TPU slice, as v5e-256 or v5p:4x4x4; see `train.plan.topologies`.
      mesh, accumulate, remat: in place of the run's.
    """

    topology: str
    mesh: MeshConfig
    accumulate: int = 1
    remat: Literal["none", "dots", "full"] = "full"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One run of one stage.

    Attributes:
      name: of the run, for messages and metrics.
      workdir: everything that the run writes goes here.
      model: sizes; checked against those of `init_from`.
      stage: 1, 2 or 3: what is trained, see `TRAINED`.
      init_from: where the parameters start: a checkpoint folder that `janus_jax.load` reads, or the workdir of an
        earlier run; empty for random ones.
      language_from: where `language_model` starts instead: a Janus checkpoint folder, or a LLaMA's own file or folder.
      vision_from: where `vision_model` starts instead: a Janus checkpoint folder, or timm's SigLIP in its own file.
      vq_from: where `gen_vision_model` starts instead: a Janus checkpoint folder, or LlamaGen's VQ-16 in its own file.
      tokenizer: folder with tokenizer.json; empty for that of `init_from`.
      steps: optimizer updates in all.
      batch_size: packed rows a step, over all hosts.
      accumulate: micro-batches of a step, worked off one after the other.
      seed: of initialization, order, dropout.
      compute_dtype: of activations and of the parameters' copies that products use; trained parameters are float32.
      reduce_dtype: in which gradients are summed over devices; see `train.step.step.gradients`.
      frozen_dtype: of parameters that are not trained.
      remat: what the backward pass computes again: 'none', all but matrix products ('dots'), or 'full' layers.
      attention: of the decoder: 'xla', 'splash' (TPU's kernel), 'cudnn' (a GPU's), or 'auto' for the best that the
        devices and the sizes allow.
      loss_chunk: tokens of a row whose logits exist at a time.
      layouts: devices that the run is meant for; it takes their mesh, accumulate and remat where it finds itself on
        them with `mesh` as it is by default.
      sampling_layouts: devices that its model draws on, for `train.compile`.
      log_every, save_every: in steps.
      keep: checkpoints kept, the newest ones.
      export_every: steps between exported bfloat16 parameters (0: at the end only).
      max_skipped: stop after so many steps in a row whose loss or gradients were not finite.
      watchdog: end the process when nothing has got on for so many seconds; 0 for never.
      profile_start, profile_steps: a trace of so many steps from this one on is written to workdir/profile.
    """

    RUNNER: ClassVar[str] = "train.run.loop:train"  # what `train.main` calls with the config and `steal`

    name: str
    workdir: str
    model: JanusConfig
    stage: Literal[1, 2, 3]
    steps: int
    batch_size: int
    data: DataConfig
    optimizer: OptimizerConfig
    init_from: str = ""
    language_from: str = ""
    vision_from: str = ""
    vq_from: str = ""
    tokenizer: str = ""
    accumulate: int = 1
    seed: int = 0
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    reduce_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    frozen_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    remat: Literal["none", "dots", "full"] = "full"
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    loss_chunk: int = 512
    mesh: MeshConfig = MeshConfig()
    layouts: tuple[Layout, ...] = ()
    sampling_layouts: tuple[Layout, ...] = ()
    evaluation: EvalConfig = EvalConfig()
    samples: SampleConfig = SampleConfig()
    log_every: int = 10
    save_every: int = 1000
    keep: int = 3
    export_every: int = 0
    max_skipped: int = 10
    watchdog: float = 1800.0
    profile_start: int = 0
    profile_steps: int = 0
