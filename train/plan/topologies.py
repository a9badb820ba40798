"""TPU slices and GPU hosts by name, and a run's layout on those that its config names."""

from __future__ import annotations

import dataclasses
import math
import re

import jax

from janus_jax.io.messages import did_you_mean, one_line, print_line
from janus_jax.sharding import count_slices
from train.config import Layout, MeshConfig, TrainConfig, options_of, refused_options
from train.plan.flops import peak_flops

GIB = 2**30
# Generation -> (bytes of a chip's memory that programs may use, `jax.Device.device_kind`).
GENERATIONS: dict[str, tuple[float, str]] = {
    "v4": (30.75 * GIB, "TPU v4"),
    "v5e": (15.75 * GIB, "TPU v5 lite"),
    "v5p": (95.74 * GIB, "TPU v5"),
    "v6e": (31.25 * GIB, "TPU v6 lite"),
}
# Bytes/s of a chip's links to its neighbors, all together (Cloud TPU's pages on system architecture).
LINKS = {"v4": 300e9, "v5e": 200e9, "v5p": 600e9, "v6e": 448e9}
# Bytes/s of a chip's main memory (the same pages).
_BANDWIDTHS = {"v4": 1228e9, "v5e": 819e9, "v5p": 2765e9, "v6e": 1640e9}
# Options with which collectives run on a chip's SparseCores while its TensorCores compute, instead of before and after;
# v5e, which has none, overlaps gathers by itself. So says libtpu 0.0.52, which refuses v5e's way on v5p.
_SPARSE_CORE = tuple(
    f"xla_tpu_enable_sparse_core_collective_offload_{kind}=true"
    for kind in ("all_gather", "reduce_scatter", "all_reduce")
)
_IN_A_TORUS = tuple(
    f"xla_tpu_enable_sparse_core_collective_offload_{kind}=true"
    for kind in ("2d_all_gather", "3d_all_gather", "nd_reduce_scatter")
)
COMPILER_OPTIONS = {"v5p": (*_SPARSE_CORE, *_IN_A_TORUS), "v6e": _SPARSE_CORE}
SHARE = 0.75  # of a GPU's memory is XLA's, unless XLA_PYTHON_CLIENT_MEM_FRACTION is set
_MOST_SLICES = 256
_HOST = 8  # GPUs
_HOSTS = (1, 2, 4, 8, 16, 32)
_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA needs to know of a GPU to compile for it (NVIDIA's data sheets, and CUDA's programming guide).

    Attributes:
      device_kind: `jax.Device.device_kind`.
      memory, cache: bytes of its memory, of which programs may use `SHARE`, and of its L2 cache.
      bandwidth, links: bytes/s of HBM, and of what connects it with the other GPUs of a host, in one direction.
      cores, clock: streaming multiprocessors, and their GHz.
      units: float32 units per multiprocessor.
      capability: the compute capability, 7.5 for instance.
      shared, shared_by_block: bytes of shared memory per multiprocessor, and of those what a block may use.
    """

    device_kind: str
    memory: int
    bandwidth: float
    links: float
    cores: int
    clock: float
    units: int
    cache: int
    capability: float
    shared: int
    shared_by_block: int

    def target(self) -> str:
        """XLA's GpuTargetConfigProto, as text."""
        limits = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "shared_memory_per_block": 48 << 10,
            "shared_memory_per_core": self.shared,
            "shared_memory_per_block_optin": self.shared_by_block,
            "threads_per_core_limit": 2048,
            "core_count": self.cores,
            "fpus_per_core": self.units,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 2**16 - 1,
            "block_dim_limit_z": 2**16 - 1,
            "memory_bandwidth": int(self.bandwidth),
            "l2_cache_size": self.cache,
            "clock_rate_ghz": self.clock,
            "device_memory_size": self.memory,
            "registers_per_core_limit": 2**16,
            "registers_per_block_limit": 2**16,
        }
        fields = " ".join(f"{name}: {value}" for name, value in limits.items())
        extension = " feature_extension: ACCELERATED_FEATURES" * (self.capability >= 9)
        major, minor = str(float(self.capability)).split(".")
        return (
            f"gpu_device_info {{ {fields} cuda_compute_capability {{ major: {major} minor: {minor}{extension} }} }} "
            'platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 12 minor: 9 } '
            f'device_description_str: "{self.device_kind}"'
        )


_KIB = 1 << 10
GPUS = {
    "t4": Gpu("Tesla T4", 15843721216, 0.32e12, 16e9, 40, 1.59, 64, 4 << 20, 7.5, 64 * _KIB, 64 * _KIB),
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB", 85100068864, 2.039e12, 300e9, 108, 1.41, 64, 40 << 20, 8, 164 * _KIB, 163 * _KIB
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", 84942979072, 3.352e12, 450e9, 132, 1.98, 128, 50 << 20, 9, 228 * _KIB, 227 * _KIB
    ),
    "h200": Gpu("NVIDIA H200", 151397597184, 4.8e12, 450e9, 132, 1.98, 128, 50 << 20, 9, 228 * _KIB, 227 * _KIB),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or several slices of TPU chips, or GPUs in hosts of at most eight; each is one JAX device.

    Attributes:
      shape: libtpu's name of a slice, such as `v5p:4x4x8`; for GPUs, hosts and GPUs per host, such as `h100:2x8`.
      generation: a key of GENERATIONS or GPUS.
      chips: number of chips of all slices together.
      hbm: bytes of a chip's memory that a program may use.
      slices: number of slices, which reach one another through the data-center network.
    """

    shape: str
    generation: str
    chips: int
    hbm: float
    slices: int = 1

    @property
    def name(self) -> str:
        """`shape`, after their number if there are several slices, such as `2xv5p:4x4x8`."""
        return self.shape if self.slices == 1 else f"{self.slices}x{self.shape}"

    @property
    def device_kind(self) -> str:
        """JAX's name for its devices."""
        return GPUS[self.generation].device_kind if self.generation in GPUS else GENERATIONS[self.generation][1]

    @property
    def bandwidth(self) -> float:
        """Bytes/s of a chip's main memory."""
        gpu = GPUS.get(self.generation)
        return gpu.bandwidth if gpu else _BANDWIDTHS[self.generation]

    @property
    def links(self) -> float:
        """Bytes/s of a chip's links to the others; infinite for GPUs of several hosts, whose network is not known."""
        if gpu := GPUS.get(self.generation):
            return gpu.links if self.chips <= _HOST else math.inf
        return LINKS[self.generation]


def _known() -> dict[str, Topology]:
    known = {}
    for generation, (hbm, _) in GENERATIONS.items():
        flat = generation in ("v5e", "v6e")
        for shape in _SQUARES if flat else _CUBES:
            chips = math.prod(int(n) for n in shape.split("x"))
            # Google's names count chips for v5e and v6e, and TensorCores (two per chip) for the others.
            name = f"{generation}-{chips if flat else 2 * chips}"
            known[name] = Topology(f"{generation}:{shape}", generation, chips, hbm)
    for name, gpu in GPUS.items():
        for hosts, each in (*((1, n) for n in (1, 2, 4)), *((hosts, _HOST) for hosts in _HOSTS)):
            hbm = SHARE * gpu.memory
            known[f"{name}-{hosts * each}"] = Topology(f"{name}:{hosts}x{each}", name, hosts * each, hbm)
    return known


KNOWN = _known()


def topology(name: str) -> Topology:
    """The topology called `name`: Google's name (v5e-256), a shape (v5p:4x4x8), or a number of GPUs (h100-8).

    Several TPU slices have their number before it (2xv5e-256).

    Raises: ValueError in one line, which lists the known ones if it is unknown.
    """
    if several := re.fullmatch(r"([0-9]{1,4})x([a-z].*)", name):
        slices, one = int(several[1]), topology(several[2])
        if one.generation in GPUS or not 1 <= slices <= _MOST_SLICES:
            asked = one_line(repr(name))
            raise ValueError(f"topology {asked} must be 1 to {_MOST_SLICES} slices of TPUs, such as 2xv5e-256")
        return dataclasses.replace(one, chips=slices * one.chips, slices=slices)
    if name in KNOWN:
        return KNOWN[name]
    for found in KNOWN.values():
        if found.name == name:
            return found
    guess = did_you_mean(name, [*KNOWN, *(found.name for found in KNOWN.values())])
    generation = next((g for g in (*GENERATIONS, *GPUS) if re.match(rf"{g}\b", name)), None)
    shown = [f"{key} ({found.name})" for key, found in KNOWN.items() if generation in (None, found.generation)]
    asked = one_line(repr(name))
    raise ValueError(f"unknown topology {asked}{guess or '.'} Known: {', '.join(shown)}")


def laid_out(config: TrainConfig, layout: Layout) -> TrainConfig:
    """`config` with the mesh, accumulation, remat and compiler options of `layout`, but for those it sets itself."""
    usual = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    own = {key for key in ("mesh", "accumulate", "remat", "compiler_options") if getattr(config, key) == usual[key]}
    return dataclasses.replace(config, **{key: getattr(layout, key) for key in own})


def choose_layout(config: TrainConfig, devices: list[jax.Device] | None = None) -> TrainConfig:
    """`config` with its layout for these devices (default: the available ones), if it has one.

    A config with an explicit mesh, or without such a layout, is returned unchanged. Of a layout's compiler options
    those stay that the compiler of the available devices knows; a line says which do not.
    """
    available = devices is None
    devices = jax.devices() if devices is None else devices
    if config.mesh != MeshConfig():
        return config
    for layout in config.layouts:
        place = topology(layout.topology)
        as_many = place.chips == len(devices) and (place.generation in GPUS or place.slices == count_slices(devices))
        if as_many and peak_flops(devices[0].device_kind) == peak_flops(place.device_kind):
            found = laid_out(config, layout)
            return _without_unknown_options(found) if available and config.compiler_options is None else found
    return config


def _without_unknown_options(config: TrainConfig) -> TrainConfig:
    known = []
    for option in config.compiler_options or ():
        try:
            jax.jit(lambda: 0, compiler_options=options_of((option,))).lower().compile()
            known.append(option)
        except jax.errors.JaxRuntimeError as error:
            if not (refused := refused_options(error)):
                raise
            if jax.process_index() == 0:
                print_line(f"note: {refused}; the step is compiled without it")
    return dataclasses.replace(config, compiler_options=tuple(known))
