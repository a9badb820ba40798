"""The configuration of a training run: frozen dataclasses, one for each aspect.

A file in `configs/` returns one `TrainConfig`; `train.overrides` changes single fields from the command line.
Sources: Janus-Pro report (arXiv 2501.17811), table 2 and section 3.1; Janus (arXiv 2410.13848), table 1.
"""

from __future__ import annotations

import dataclasses
import re
from typing import ClassVar, Literal, get_args

from janus_jax.config import JanusConfig
from train.rl.config import DpoConfig, GrpoConfig
from train.rl.config import RewardConfig as RewardConfig

KINDS = ("understanding", "text", "generation")
PREFERENCE = "preference"  # prepared like these, for DPO: a prompt with a chosen and a rejected picture
PREPARED = (*KINDS, PREFERENCE)
ENCODED = ("generation", PREFERENCE)  # the kinds whose pictures are stored as codes
# What a position is trained to predict: nothing (0), or the next token of a sample of that kind.
TASKS = {kind: number for number, kind in enumerate(KINDS, 1)}

# The parts that each stage trains; all others are frozen (report, section 2.2 and figure 3).
ADAPTERS = ("aligner", "gen_aligner", "gen_embed", "gen_head")
TRAINED: dict[int, tuple[str, ...]] = {
    1: ADAPTERS,
    2: (*ADAPTERS, "language_model"),
    3: (*ADAPTERS, "language_model", "vision_model"),
}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The training data, and how it is mixed into rows.

    Attributes:
      understanding, text, generation: prepared folders (see `train.prepare`) of each kind.
      understanding_weights, text_weights, generation_weights: relative weights with which the folders of a kind are
        drawn; empty for equal weights.
      early_generation: folders used instead of `generation` at first (Janus's stage 2 begins with ImageNet).
      early_steps: for how many steps.
      ratio: samples understanding : text : generation, exact in every step.
      context: tokens per row, T.
      images_per_row: the most understanding images in a row; the encoder processes this many for every row.
      guidance_dropout: share of generation samples whose prompt is replaced by padding, for classifier-free guidance.
      caption_cut: share of generation samples whose caption is cut to its first sentence.
      text_loss: train on 'all' tokens of text samples, or only on the 'answers'.
      workers: processes that assemble batches ahead; 0 assembles them in threads of this process.
      max_bad_share: stop if more than this share of the samples read is damaged.
      cache: local folder of each host that keeps samples read from `gs://` or `s3://`; empty for none.
      cache_gb: the most gigabytes (1e9 bytes) kept there.
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
    cache: str = ""
    cache_gb: float = 100.0


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Losses on held-out data.

    Attributes:
      understanding, text, generation: prepared folders; all kinds that have any are evaluated in equal shares.
      every: steps between evaluations, 0 for none.
      batches: number of batches, the same ones each time.
    """

    understanding: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    generation: tuple[str, ...] = ()
    every: int = 0
    batches: int = 8


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """A grid of sample images drawn by the model during training.

    Attributes:
      every: steps between sample grids, 0 for none.
      prompts: one row of the grid for each.
      images: images per prompt.
      guidance, temperature: as in sampling.
    """

    every: int = 0
    prompts: tuple[str, ...] = ()
    images: int = 4
    guidance: float = 5.0
    temperature: float = 1.0


@dataclasses.dataclass(frozen=True)
class EvalsConfig:
    """Benchmarks that the model is asked during training, by `evals`; their replies and figures are in workdir/evals.

    Attributes:
      every: steps between them, 0 for none.
      tasks: names, as for `evals.main --tasks`.
      data: the folder of their data, which every host has.
      protocol: how they are asked and scored; empty for each task's first.
      limit: the most items of each task, in whole groups; 0 for all.
      batch_size: questions at a time on each shard of the mesh; 0 for as many as fit.
    """

    every: int = 0
    tasks: tuple[str, ...] = ()
    data: str = ""
    protocol: str = ""
    limit: int = 0
    batch_size: int = 0


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW.

    Attributes:
      learning_rate: learning rate after the warm-up.
      schedule: 'constant', or 'cosine' decaying to 0 at the last step.
      warmup_steps: steps in which the rate rises linearly from 0.
      b1, b2, eps: parameters of AdamW.
      weight_decay: weight decay of kernels and embeddings; norms and biases have none.
      clip: the largest global norm of the gradients.
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
    """Number of devices on each mesh axis; -1 for all that are left. For what an axis splits see `janus_jax.sharding`.

    Attributes:
      slices: TPU slices (or hosts of GPUs), each with its copies of the parameters, for a share of the batch.
      data: copies of the parameters, each for a share of the batch.
      fsdp: shards of both the parameters and the batch.
      tensor: shards of heads, MLP and vocabulary.
    """

    slices: int = 1
    data: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """A low-rank adapter, trained over a model of which nothing else changes.

    Attributes:
      rank: rank of every change.
      alpha: a change is multiplied by alpha / rank, or by alpha / sqrt(rank) in rsLoRA.
      kind: 'lora', 'rslora' or 'dora'.
      targets: the linear layers that it changes: names of sets (attention, mlp, decoder, aligners, heads, vision, all),
        or regular expressions for the original's module names; see `janus_jax.weights.adapters.adapter.chosen`.
      save: modules that are trained whole instead (PEFT's modules_to_save), by name or the end of it.
      weights: int8 or int4 for the decoder's and the heads' kernels below the adapter (QLoRA); none for frozen_dtype.
    """

    rank: int = 16
    alpha: float = 32.0
    kind: Literal["lora", "rslora", "dora"] = "lora"
    targets: tuple[str, ...] = ("decoder",)
    save: tuple[str, ...] = ()
    weights: Literal["int8", "int4"] | None = None


# What the backward pass computes again: more and more.
Remat = Literal["none", "dots", "attention", "full"]
REMATS: tuple[str, ...] = get_args(Remat)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Devices that a run is meant for, and its settings there.

    Attributes:
      topology: a TPU slice such as v5e-256 or v5p:4x4x4; see `train.plan.topologies`.
      mesh, accumulate, remat, compiler_options: used instead of the run's.
    """

    topology: str
    mesh: MeshConfig
    accumulate: int = 1
    remat: Remat = "full"
    compiler_options: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One run of one stage.

    Attributes:
      name: name of the run, for messages and metrics.
      workdir: folder for everything that the run writes.
      model: sizes; checked against those of `init_from`.
      stage: 1, 2 or 3: which parts are trained, see `TRAINED`.
      adapter: a low-rank adapter that is trained instead of those parts, and exported in PEFT's files.
      grpo, dpo: reinforcement learning, or preferences, instead of the samples of `data`; of that only `context`
        counts, the most tokens of a prompt and a picture or an answer, `workers`, and for answers `images_per_row`, the
        most pictures of a prompt.
      init_from: source of the first parameters: a checkpoint folder that `janus_jax.load` reads or its hub id, or the
        workdir of an earlier run; empty for random parameters.
      language_from: another source for `language_model`: a Janus checkpoint folder, or a LLaMA's own file or folder.
      vision_from: another source for `vision_model`: a Janus checkpoint folder, or timm's SigLIP in its own file.
      vq_from: another source for `gen_vision_model`: a Janus checkpoint folder, or LlamaGen's VQ-16 in its own file.
      tokenizer: folder with tokenizer.json, or hub id; empty for that of `init_from`.
      steps: number of optimizer updates. With grpo, of rounds of drawing, each with its updates.
      batch_size: packed rows per step, over all hosts; pictures or answers with grpo, pairs with dpo.
      accumulate: number of micro-batches into which an update's rows are split.
      seed: seed of initialization, data order and dropout.
      compute_dtype: dtype of activations and of the parameters' copies in products; trained parameters are float32.
        float16 is for adapters on GPUs without bfloat16 units.
      reduce_dtype: dtype in which gradients are summed over devices (in float16 always float32); see
        `train.step.step.gradients`.
      frozen_dtype: dtype of parameters that are not trained.
      remat: what the backward pass recomputes: 'none'; all but matrix products and attention ('dots'); all but
        'attention', so that the MLPs are computed twice; or 'full' layers. See `janus_jax.model.layers.rematerialized`.
      attention: implementation in the decoder: 'xla', 'splash' (TPU), 'cudnn' (GPU), or 'auto' for the best that the
        devices and the sizes allow.
      loss_chunk: tokens of a row whose logits are in memory at a time.
      compiler_options: XLA's options for the training step, name=value; None for those of the layout, and () for none.
      layouts: devices that the run is meant for; on these it uses their mesh, accumulate, remat and compiler_options,
        unless `mesh` is set.
      sampling_layouts: devices for sampling with its model, for `train.compile`.
      writers: where metrics go: jsonl (always among them: it is what a resumed run and figures read), tensorboard, and
        the trackers wandb and trackio, each an extra of the same name.
      log_every, save_every: steps between lines of metrics, and between checkpoints.
      keep: number of newest checkpoints to keep.
      export_every: steps between exports of bfloat16 parameters (0: only at the end).
      max_skipped: stop after this many steps in a row whose loss or gradients were not finite.
      watchdog: end the process after this many seconds without progress; 0 for never.
      profile_start, profile_steps: first step, and number of steps, of a trace written to workdir/profile.
    """

    RUNNER: ClassVar[str] = "train.run.loop:train"  # what `train.main` calls with the config and `steal`
    CHECKER: ClassVar[str] = "train.watch.dry_run:dry_run"  # what it calls instead with --dry-run

    name: str
    workdir: str
    model: JanusConfig
    stage: Literal[1, 2, 3]
    steps: int
    batch_size: int
    data: DataConfig
    optimizer: OptimizerConfig
    adapter: AdapterConfig | None = None
    grpo: GrpoConfig | None = None
    dpo: DpoConfig | None = None
    init_from: str = ""
    language_from: str = ""
    vision_from: str = ""
    vq_from: str = ""
    tokenizer: str = ""
    accumulate: int = 1
    seed: int = 0
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    reduce_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    frozen_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    remat: Remat = "full"
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    loss_chunk: int = 512
    mesh: MeshConfig = MeshConfig()
    compiler_options: tuple[str, ...] | None = None
    layouts: tuple[Layout, ...] = ()
    sampling_layouts: tuple[Layout, ...] = ()
    evaluation: EvalConfig = EvalConfig()
    samples: SampleConfig = SampleConfig()
    evals: EvalsConfig = EvalsConfig()
    writers: tuple[str, ...] = ("jsonl", "tensorboard")
    log_every: int = 10
    save_every: int = 1000
    keep: int = 3
    export_every: int = 0
    max_skipped: int = 10
    watchdog: float = 1800.0
    profile_start: int = 0
    profile_steps: int = 0

    @property
    def updates(self) -> int:
        """Optimizer updates of a step."""
        return self.grpo.epochs * self.grpo.updates if self.grpo else 1

    @property
    def answers(self) -> bool:
        """Whether reinforcement learning is of answers."""
        return self.grpo is not None and self.grpo.rollouts == "answers"

    @property
    def drawn(self) -> int:
        """Tokens that reinforcement learning or preferences are of: a picture's codes, or the most of an answer."""
        return self.grpo.max_new_tokens if self.answers else self.model.gen_vision.num_tokens


def options_of(given: tuple[str, ...] | None) -> dict[str, str | bool]:
    """`compiler_options` as `jax.jit` takes them."""
    named = dict(option.split("=", 1) for option in given or ())
    return {name: {"true": True, "false": False}.get(value.lower(), value) for name, value in named.items()}


def refused_options(error: Exception) -> str:
    """Why a compiler refuses `compiler_options`, in one line; '' if `error` says something else."""
    says = r"No such compile option: .*|While setting option .*|[^:\n]*Please disable it with .*"
    found = re.search(says, str(error))
    return f"compiler_options: {found[0].strip()}" if found else ""
