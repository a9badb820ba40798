"""Settings shared by several runs: row length, data folders, held-out losses, sample prompts, layouts."""

from __future__ import annotations

from train.config import EvalConfig, Layout, MeshConfig, SampleConfig
from train.plan.topologies import COMPILER_OPTIONS, topology

CONTEXT = 4096

# Janus-Pro leaves ImageNet to stage 1; Janus begins stage 2 with it.
IMAGENET = ("data/prepared/stage1_imagenet",)
CAPTIONS = ("data/prepared/stage1_captions",)

STAGE2_UNDERSTANDING = (
    "data/prepared/stage2_captions",
    "data/prepared/stage2_tables",
    "data/prepared/stage2_charts",
    "data/prepared/stage2_documents",
)
STAGE2_TEXT = ("data/prepared/stage2_text",)
# Real and synthetic images 1 : 1, from which Janus-Pro trains text to image (report, section 2.3).
STAGE2_GENERATION = ("data/prepared/stage2_images_real", "data/prepared/stage2_images_synthetic")

STAGE3_UNDERSTANDING = ("data/prepared/stage3_understanding",)
STAGE3_TEXT = ("data/prepared/stage3_dialogue",)
STAGE3_GENERATION = ("data/prepared/stage3_images",)

HELD_OUT = EvalConfig(
    understanding=("data/prepared/held_out_understanding",),
    text=("data/prepared/held_out_text",),
    generation=("data/prepared/held_out_generation",),
    every=1000,
    batches=8,
)

SAMPLES = SampleConfig(
    every=2000,
    prompts=(
        "a red bicycle leaning against a white wall",
        "a lighthouse on a cliff at dusk",
        "a bowl of ripe oranges on a wooden table",
        "an astronaut riding a horse in a snowy forest",
    ),
    images=4,
)
# Stage 1 has seen category names and no long prompts.
CATEGORY_SAMPLES = SampleConfig(every=2000, prompts=("goldfish", "golden retriever", "lighthouse", "volcano"), images=4)


def layouts(
    accumulate: dict[str, int], fsdp: int, tensor: dict[str, int] | None = None, remat: dict[str, str] | None = None
) -> tuple[Layout, ...]:
    """A layout for each topology of TPUs; parameters are split within a slice, and slices have copies.

    Args:
      accumulate: micro-batches of a step, by topology.
      fsdp: number of chips over which parameters are split; the width divided by it is a multiple of a TPU's 128 lanes.
      tensor: number of chips over which heads are split, by topology, for those with more chips than rows.
      remat: what is recomputed, by topology, where the memory has no room for all products of a micro-batch.
    """
    tensor, remat = tensor or {}, remat or {}

    def mesh(name: str) -> MeshConfig:
        slices = int(name.split("x")[0]) if name[0].isdigit() else 1  # 2xv5e-256
        return MeshConfig(slices=slices, data=-1, fsdp=fsdp, tensor=tensor.get(name, 1))

    return tuple(
        Layout(
            name, mesh(name), count, remat=remat.get(name, "dots"),
            compiler_options=COMPILER_OPTIONS.get(topology(name).generation, ()),
        )
        for name, count in accumulate.items()
    )  # fmt: skip


# One image at a time: every chip holds a shard of each layer.
DRAWING = tuple(Layout(name, MeshConfig(fsdp=1, tensor=-1)) for name in ("v5e-8", "v6e-1", "v5p-8"))
