"""What is read from compiled programs, against programs whose collectives are known."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from janus_jax.sharding import make_mesh
from train.plan import hlo
from train.plan.moved import loop_bytes, program_bytes

LENGTH, TURNS = 256, 5


@pytest.fixture(scope="module")
def program() -> str:
    """Five turns of an all-gather and a reduce-scatter over four of eight devices, then one sum over all."""
    mesh = make_mesh({"data": 2, "fsdp": 4})

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("fsdp"), out_specs=P(), check_vma=False)
    def run(x):
        def turn(x, _):
            whole = jax.lax.all_gather(x, "fsdp", tiled=True)
            return jax.lax.psum_scatter(jnp.sin(whole), "fsdp", tiled=True), None

        x, _ = jax.lax.scan(turn, x, length=TURNS)
        return jax.lax.psum(x.sum(), ("data", "fsdp"))

    return jax.jit(run).lower(jax.ShapeDtypeStruct((LENGTH,), jnp.float32)).compile().as_text()


def test_collectives_are_counted_through_loops(program):
    found = hlo.collectives(program)
    assert found == {
        "all-gather": hlo.Traffic(TURNS, TURNS * LENGTH * 4, LENGTH * 4),
        "all-reduce": hlo.Traffic(1, 4, 4),
        "reduce-scatter": hlo.Traffic(TURNS, TURNS * LENGTH * 4, LENGTH * 4),
    }


# As TPU's compiler writes loops and reduce-scatters, shortened.
TPU = """HloModule jit_step, is_scheduled=true

%all-reduce-scatter (input: bf16[64,128]) -> bf16[16,128] {
  %input = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[64,128]{1,0:T(8,128)(2,1)} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %dynamic-slice.1 = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} dynamic-slice(%all-reduce.1, %i), dynamic_slice_sizes={16,128}
}

%body (p: (s32[], bf16[64,128], bf16[32,128])) -> (s32[], bf16[64,128], bf16[32,128]) {
  %p = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}, bf16[32,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %weights = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %cache = bf16[32,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=2
  %copy-start.1 = (bf16[64,128]{1,0:T(8,128)(2,1)S(1)}, bf16[64,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%weights)
  %copy-done.1 = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start.1)
  %updated = bf16[32,128]{1,0:T(8,128)(2,1)} fusion(%cache, %row), kind=kLoop, calls=%update
  %scattered = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} fusion(%copy-done.1), kind=kCustom, calls=%all-reduce-scatter
  %read = f32[128]{0:T(128)S(1)} fusion(%updated, %scattered), kind=kLoop, calls=%attend
  %copy.1 = bf16[32,128]{1,0:T(8,128)(2,1)} copy(%updated)
  %gathered = (bf16[16,128]{1,0:T(8,128)(2,1)S(1)}, bf16[64,128]{1,0:T(8,128)(2,1)}) all-gather-start(%scattered), replica_groups=[2,4]<=[8]
  %ready = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather-done(%gathered)
  ROOT %t = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}, bf16[32,128]{1,0:T(8,128)(2,1)}) tuple(%i, %ready, %copy.1)
}

%condition (p: (s32[], bf16[64,128], bf16[32,128])) -> pred[] {
  %turns = s32[]{:T(128)} constant(7)
  ROOT %lt = pred[]{:T(512)} compare(%i, %turns), direction=LT
}

ENTRY %main (a: bf16[64,128]) -> bf16[64,128] {
  %while.1 = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}, bf16[32,128]{1,0:T(8,128)(2,1)}) while(%start), condition=%condition, body=%body
}
"""  # noqa: E501


def test_tpu_programs():
    large, small = 64 * 128 * 2, 32 * 128 * 2
    assert hlo.collectives(TPU) == {
        "all-gather": hlo.Traffic(7, 7 * large, large),  # at once waited for
        "reduce-scatter": hlo.Traffic(7, 7 * large, large),
    }
    assert [one.line.split(" ")[0] for one in hlo.copies(TPU, small)] == ["%copy.1"]
    assert hlo.copies(TPU, small + 1) == []
    # The weights come over once, the cache is read, then copied: read and written. Its update in place is free.
    assert loop_bytes(TPU) == large + small + 2 * small + large


# On a SparseCore, as TPU's compiler writes it, and on a GPU.
SPARSE_CORE = """HloModule jit_step, is_scheduled=true

%async_computation (in: bf16[16,128]) -> bf16[64,128] {
  %in = bf16[16,128]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[64,128]{1,0} all-gather(%in), replica_groups={{0,1,2,3}}, dimensions={0}
}, execution_thread="sparsecore"

%product (l: bf16[64,128], r: bf16[128,128]) -> bf16[64,128] {
  %l = bf16[64,128]{1,0} parameter(0)
  %r = bf16[128,128]{1,0} parameter(1)
  ROOT %convolution.1 = bf16[64,128]{1,0} convolution(%l, %r), dim_labels=bf_io->bf
}

%doubled (l: bf16[64,128]) -> bf16[64,128] {
  %l = bf16[64,128]{1,0} parameter(0)
  ROOT %add.1 = bf16[64,128]{1,0} add(%l, %l)
}

ENTRY %main (a: bf16[16,128], x: bf16[64,128], w: bf16[128,128]) -> bf16[64,128] {
  %a = bf16[16,128]{1,0} parameter(0)
  %x = bf16[64,128]{1,0} parameter(1)
  %w = bf16[128,128]{1,0} parameter(2)
  %start = ((), (), (s32[8]{0})) async-start(), async_execution_thread="sparsecore", calls=%async_computation
  BEFORE
  %update = ((bf16[16,128]{1,0}), bf16[64,128]{1,0}, (s32[8]{0})) async-update(%start, %a), async_execution_thread="sparsecore", calls=%async_computation
  MEANWHILE
  %done = bf16[64,128]{1,0} async-done(%update), async_execution_thread="sparsecore", calls=%async_computation
  ROOT %out = bf16[64,128]{1,0} add(%done, %y)
}
"""  # noqa: E501
GPU = SPARSE_CORE.replace(
    '  %start = ((), (), (s32[8]{0})) async-start(), async_execution_thread="sparsecore", calls=%async_computation\n',
    "",
)
GPU = "\n".join(
    "  %update = (bf16[16,128]{1,0}, bf16[64,128]{1,0}) all-gather-start(%a), replica_groups={{0,1,2,3}}"
    if "%update =" in line
    else "  %done = bf16[64,128]{1,0} all-gather-done(%update)"
    if "%done =" in line
    else line
    for line in GPU.splitlines()
)
MULTIPLIES = "%y = bf16[64,128]{1,0} fusion(%x, %w), kind=kOutput, calls=%product"
ADDS = "%y = bf16[64,128]{1,0} fusion(%x), kind=kLoop, calls=%doubled"


@pytest.mark.parametrize("program", [SPARSE_CORE, GPU], ids=["sparse core", "GPU"])
@pytest.mark.parametrize(("before", "meanwhile", "share"), [("", MULTIPLIES, 1), ("", ADDS, 0), (MULTIPLIES, "", 0)])
def test_a_collective_is_overlapped_by_products_between_its_start_and_its_end(program, before, meanwhile, share):
    text = program.replace("BEFORE", before).replace("MEANWHILE", meanwhile)
    size = 64 * 128 * 2
    assert hlo.collectives(text) == {"all-gather": hlo.Traffic(1, size, size, overlapped=share * size)}


def test_what_goes_between_slices():
    """Of a program for all devices by the groups of its collectives; of TPU's, which is for one slice, by its sends."""
    groups = {
        "{{0,1,2,3},{4,5,6,7}}": False, "{{0,4},{1,5},{2,6},{3,7}}": True, "{}": True, "[2,4]<=[8]": False,
        "[4,2]<=[2,4]T(1,0)": True, "[1,8]<=[8]": True, "mesh['slices'=2,'fsdp'=4] {'fsdp'}": False,
        "mesh['slices'=2,'fsdp'=4] {'slices'}": True,
    }  # fmt: skip
    for number, (written, crosses) in enumerate(groups.items()):
        text = (
            "ENTRY %main (a: f32[64]) -> f32[64] {\n  %a = f32[64]{0} parameter(0)\n"
            f"  ROOT %all-reduce.{number} = f32[64]{{0}} all-reduce(%a), replica_groups={written}, to_apply=%add\n}}\n"
        )
        traffic = {"all-reduce": hlo.Traffic(1, 256, 256)}
        assert hlo.between_slices(text, 4) == (traffic if crosses else {}), written
        assert hlo.collectives(text, 4) == ({} if crosses else traffic), written
        assert hlo.between_slices(text, 0) == {}
    moved = "%p = f32[64]{0} collective-permute(%a), source_target_pairs={{0,1},{3,TARGET}}"
    for target, crosses in ((2, False), (4, True)):
        text = f"ENTRY %main (a: f32[64]) -> f32[64] {{\n  {moved.replace('TARGET', str(target))}\n}}\n"
        assert ("collective-permute" in hlo.between_slices(text, 4)) == crosses
    text = TPU.replace(
        "  %ready",
        "  %send.1 = (bf16[12,8,128]{2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}, token[]) send(%b, %t), channel_id=4, "
        'is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}\n'
        "  %send-done.1 = token[] send-done(%send.1), is_host_transfer=true\n  %ready",
    )
    size = 12 * 8 * 128 * 2
    assert hlo.between_slices(text, 4) == {"all-reduce": hlo.Traffic(7, 7 * size, size)}
    assert hlo.collectives(text, 4) == hlo.collectives(TPU)


def test_copies_inside_fusions_are_no_traffic():
    """Only what a fusion returns is written: alone, or as one of several results."""
    text = """HloModule jit_step, is_scheduled=true

%inner (a: s8[64,128]) -> s8[64,128] {
  %a = s8[64,128]{1,0:T(32,128)(4,1)} parameter(0)
  ROOT %copy.inner = s8[64,128]{1,0:T(8,128)(4,1)} copy(%a)
}

%product (b: s8[64,128]) -> bf16[64,128] {
  %b = s8[64,128]{1,0:T(32,128)(4,1)} parameter(0)
  %fusion.inner = s8[64,128]{1,0:T(8,128)(4,1)} fusion(%b), kind=kLoop, calls=%inner
  %copy.middle = s8[64,128]{1,0:T(8,128)(4,1)} copy(%fusion.inner)
  ROOT %wide = bf16[64,128]{1,0:T(8,128)(2,1)} convert(%copy.middle)
}

%two (c: s8[64,128]) -> (s8[64,128], bf16[64,128]) {
  %c = s8[64,128]{1,0:T(32,128)(4,1)} parameter(0)
  %copy.stored = s8[64,128]{1,0:T(8,128)(4,1)} copy(%c)
  %also = bf16[64,128]{1,0:T(8,128)(2,1)} convert(%c)
  ROOT %both = (s8[64,128]{1,0:T(8,128)(4,1)}, bf16[64,128]{1,0:T(8,128)(2,1)}) tuple(%copy.stored, %also)
}

%body (p: s8[64,128]) -> s8[64,128] {
  %p = s8[64,128]{1,0:T(32,128)(4,1)} parameter(0)
  %f.1 = bf16[64,128]{1,0:T(8,128)(2,1)} fusion(%p), kind=kOutput, calls=%product
  %f.2 = (s8[64,128]{1,0:T(8,128)(4,1)}, bf16[64,128]{1,0:T(8,128)(2,1)}) fusion(%p), kind=kLoop, calls=%two
  ROOT %f.3 = s8[64,128]{1,0:T(8,128)(4,1)} fusion(%p), kind=kLoop, calls=%inner
}

ENTRY %main (a: s8[64,128]) -> s8[64,128] {
  ROOT %while.1 = s8[64,128]{1,0:T(32,128)(4,1)} while(%a), condition=%condition, body=%body
}
"""
    assert [one.line.split(" = ")[0] for one in hlo.copies(text, 64 * 128)] == ["%copy.stored", "ROOT %copy.inner"]


# Rows of a table are looked up in a branch, and in the other one it is read whole.
LOOKED_UP = """HloModule jit_step, is_scheduled=true

%rows (table: bf16[512,128], ids: s32[16,1]) -> bf16[16,128] {
  %table = bf16[512,128]{1,0} parameter(0)
  %ids = s32[16,1]{1,0} parameter(1)
  ROOT %gather.1 = bf16[16,128]{1,0} gather(%table, %ids), offset_dims={1}, slice_sizes={1,128}
}

%looks (a: bf16[512,128]) -> bf16[16,128] {
  %a = bf16[512,128]{1,0} parameter(0)
  %some = s32[16,1]{1,0:S(1)} constant({...})
  ROOT %found = bf16[16,128]{1,0:S(1)} fusion(%a, %some), kind=kLoop, calls=%rows
}

%reads (b: bf16[512,128]) -> bf16[16,128] {
  %b = bf16[512,128]{1,0} parameter(0)
  ROOT %sums = bf16[16,128]{1,0:S(1)} reduce(%b), dimensions={0}
}

ENTRY %main (c: bf16[512,128], p: s32[]) -> bf16[16,128] {
  %c = bf16[512,128]{1,0} parameter(0)
  %p = s32[] parameter(1)
  ROOT %either = bf16[16,128]{1,0:S(1)} conditional(%p, %c, %c), branch_computations={%looks, %reads}
}
"""


def test_of_a_table_only_what_is_looked_up_counts():
    assert program_bytes(LOOKED_UP) == 16 * 128 * 2 + 512 * 128 * 2
    assert program_bytes(TPU) == 7 * loop_bytes(TPU)
    # As the compiler for GPUs writes a branch; and a layer that is cut out of stacked ones.
    either = LOOKED_UP.replace(
        "branch_computations={%looks, %reads}", "true_computation=%looks, false_computation=%reads"
    )
    assert program_bytes(either) == program_bytes(LOOKED_UP)
    assert [one.opcode for one in hlo.instructions(either)].count("reduce") == 1
    layer = LOOKED_UP.replace("gather(%table, %ids), offset_dims={1}, slice_sizes={1,128}", "dynamic-slice(%table, %i)")
    assert program_bytes(layer) == program_bytes(LOOKED_UP)


@pytest.mark.parametrize(("written", "kind", "size"), [
    ("(f32[64]{0}, f32[32]{0}) all-reduce(%a, %b)", "all-reduce", 4 * 96),
    ("(f32[64]{0}, f32[32]{0}) all-reduce-start(%a, %b)", "all-reduce", 4 * 96),
    ("((f32[64]{0}, f32[32]{0}), (f32[256]{0}, f32[128]{0})) all-gather-start(%a, %b)", "all-gather", 16 * 96),
    ("(f32[16]{0}, f32[8]{0}) reduce-scatter(%a, %b)", "reduce-scatter", 4 * 96),
])  # fmt: skip
def test_a_collective_of_several_arrays_counts_all(written, kind, size):
    text = (
        "ENTRY %main (a: f32[64], b: f32[32]) -> f32[64] {\n  %a = f32[64]{0} parameter(0)\n"
        f"  %b = f32[32]{{0}} parameter(1)\n  %c = {written}, replica_groups={{{{0,1,2,3}}}}, to_apply=%add\n}}\n"
    )
    assert hlo.collectives(text) == {kind: hlo.Traffic(1, size, size)}
