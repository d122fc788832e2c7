"""Counting what a visit executes: in short listings, and in the committed kernels, whose products are known."""

from __future__ import annotations

import pytest

from benchmarks import roofline, visits
from benchmarks.check import committed_results
from benchmarks.harness import RESULTS
from benchmarks.work import OBJECTIVES, PASSES
from tracer.kernels._tiles import Tile

TILE = Tile(64, 64, 32, 4, 2)
# A walk over rows, columns and D; a merge beside it.
NVIDIA = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   MOV R2, R3 ;
.L_x_1:
        /*0020*/                   LDGSTS.E.BYPASS.LTC128B.128 [R4], desc[UR4][R2.64] ;
.L_x_2:
        /*0030*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0040*/                   LDSM.16.MT88.2 R8, [R2] ;
        /*0050*/                   HMMA.16816.F32.BF16 R12, R4, R8, R12 ;
        /*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0070*/              @!P0 BRA `(.L_x_2) ;
        /*0080*/                   MUFU.EX2 R5, R5 ;
        /*0090*/                   SHFL.BFLY PT, R6, R5, 0x1, 0x1f ;
        /*00a0*/               @P1 BRA `(.L_x_3) ;
        /*00b0*/                   STS.U16 [R7], R8 ;
.L_x_3:
        /*00c0*/                   STG.E.64 desc[UR4][R8.64], R6 ;
        /*00d0*/               @P2 BRA `(.L_x_1) ;
.L_x_4:
        /*00e0*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*00f0*/               @P3 BRA `(.L_x_4) ;
        /*0100*/               @P4 BRA `(.L_x_0) ;
        /*0110*/                   EXIT ;
"""
AMD = """
	.text
.LBB0_1:                                ; =>This Loop Header: Depth=1
	s_mov_b32 s0, s1
.LBB0_2:
	global_load_dwordx4 v[0:3], v4, s[0:1]
.LBB0_3:
	ds_read2_b64 v[0:3], v5 offset1:8       ; a comment
	v_mfma_f32_16x16x16_bf16_1k a[0:3], v[0:1], v[2:3], a[0:3]
	s_barrier
	s_cbranch_scc1 .LBB0_3
	v_exp_f32_e32 v1, v2
	ds_bpermute_b32 v1, v2, v3
	ds_write_b16 v1, v2
	global_store_short v1, v2, s[0:1]
	s_cbranch_scc0 .LBB0_2
	s_branch .LBB0_1
	.vgpr_count:     12
"""


def test_the_loop_over_d_counts_as_often_as_it_runs():
    visit, step = visits.count("sm_80", NVIDIA, TILE, warps=4, width=80)
    threads, steps = 128, 3  # ⌈80 / 32⌉
    assert step == (5, 0, 1, 0, 0, threads * (16 + 8), 4 * 16 * 8 * 16)
    around = (7, 1, 0, 1, threads * 8, threads * 2, 0)
    assert visit == tuple(a + steps * b for a, b in zip(around, step, strict=True))


COPY = "        /*0030*/                   LDGSTS.E.BYPASS.LTC128B.128 [R4], desc[UR4][R2.64] ;\n"
PRODUCT = "        /*0050*/                   HMMA.16816.F32.BF16 R12, R4, R8, R12 ;\n"
BARRIER = "        /*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;\n"


def walk(ahead: str, loop: str, behind: str) -> str:
    """Return the listing of a walk: what stands ahead of the loop over D, in it, and behind it."""
    return f"""
.L_x_1:
{ahead}
.L_x_2:
{loop}
        /*0070*/              @!P0 BRA `(.L_x_2) ;
{behind}
        /*00d0*/               @P2 BRA `(.L_x_1) ;
"""


@pytest.mark.parametrize("unrolled", [1, 4])
@pytest.mark.parametrize("taken_out", [0, 1])
def test_each_block_of_d_counts_once(unrolled, taken_out):
    """Copies run ahead of the products, blocks may stand ahead of the loop, and a pass of it may have several."""
    blocks, threads, stages = 8 + taken_out, 128, TILE.num_stages
    ahead = (stages - 1 + taken_out) * COPY + taken_out * PRODUCT
    left_over = (
        "        /*00a0*/               @P1 BRA `(.L_x_3) ;\n" + COPY + PRODUCT + BARRIER + ".L_x_3:\n"
    )
    text = walk(ahead, unrolled * (COPY + PRODUCT + BARRIER), left_over if unrolled > 1 else "")
    visit, step = visits.count("sm_80", text, TILE, warps=4, width=blocks * TILE.block_d)
    assert visit.multiply_adds == blocks * 4 * 16 * 8 * 16
    assert visit.cache_bytes == visit.shared_bytes == blocks * threads * 16
    assert visit.barriers == 8
    assert step.multiply_adds == 4 * 16 * 8 * 16
    assert step.cache_bytes == threads * 16


def test_code_with_a_barrier_that_a_program_jumps_over_does_not_count():
    """As the sums over positives, which without labels tiles on the diagonal alone have."""
    shuffle = "        /*0090*/                   SHFL.BFLY PT, R6, R5, 0x1, 0x1f ;\n"
    jump, label = "        /*00a0*/               @P1 BRA `(.L_x_3) ;\n", ".L_x_3:\n"
    loop = PRODUCT + BARRIER
    shared = walk(BARRIER, loop, jump + shuffle + BARRIER + label + shuffle)
    alone = walk(BARRIER, loop, jump + shuffle + label + shuffle)
    assert [visits.count("sm_80", text, TILE, 4, 32)[0].shuffles for text in (shared, alone)] == [1, 2]


def test_vector_instructions_alone_count_where_the_others_are_not_scarce():
    visit, step = visits.count("gfx942", AMD, TILE, warps=2, width=32)
    assert step == (0, 0, 1, 0, 0, 128 * 16, 2 * 16**3)
    assert visit == (1, 1, 1, 1, 128 * (16 + 2), 128 * (16 + 2), 2 * 16**3)


@pytest.mark.parametrize(
    ("arch", "line", "shared", "multiplied"),
    [
        ("sm_90", "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0", (64 + 128) * 32, 64 * 128 * 16),
        ("sm_90", "HGMMA.64x64x8.F32.TF32 R24, R8, gdesc[UR4], R24, !UPT", 64 * 32, 64 * 64 * 8),
        ("sm_100", "UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR12], tmem[UR14], idesc[UR15]", 128 * 32, 64 * 64 * 16),
        ("sm_100", "UTCHMMA tmem[UR8], gdesc[UR10], tmem[UR12], idesc[UR15]", 64 * 32, 64 * 64 * 16),
        ("sm_80", "HMMA.1688.F32.TF32 R4, R8, R10, R4", 0, 4 * 16 * 8 * 8),
        ("gfx942", "v_mfma_f32_32x32x4_xf32", 0, 4 * 32 * 32 * 4),
    ],
)  # fmt: skip
def test_operands_that_tensor_cores_read_from_shared_memory(arch, line, shared, multiplied):
    opcode, _, operands = line.partition(" ")
    assert visits._product(arch, visits._Instruction(opcode, f" {operands}"), TILE, 4) == (shared, multiplied)


def test_a_kernel_without_products_in_a_loop_has_no_visit():
    assert visits.count("sm_80", NVIDIA.replace("HMMA", "IMMA"), TILE, 4, 64) is None
    assert visits.count("sm_80", "", TILE, 4, 64) is None


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """The kernels of the committed results."""
    return committed_results(RESULTS, same_machine=False)["parts"]["machine_code"]["results"]["kernels"]


def test_the_products_of_a_visit_are_those_of_its_tile(rows):
    """So both loops are found, and the inner one counts as often as it runs. Warps may repeat products."""
    walks = [row for row in rows if row["visit"] and row["tensor_core"]]
    assert {row["architecture"] for row in walks} == set(roofline.CARDS)
    for row in walks:
        n, m, deep = row["tile"]
        products = row["visit"]["multiply_adds"] / (n * m * -(-row["width"] // deep) * deep)
        several = (
            (3, 4) if "one direction" in row["kernel"] else (2, 4) if "sigmoid" in row["kernel"] else (4,)
        )
        needed = (1,) if row["products"] == "one" else several
        assert products in needed or products / 2 in needed or products / 4 in needed, row


def test_large_batches_multiply_no_tile_twice(rows):
    """Of several products warps lie along the rows, of which a tile needs 16 for each."""
    for architecture in roofline.CARDS:
        for objective in OBJECTIVES:
            for row in roofline.code_of(rows, architecture, objective).values():
                n, m, _ = row["tile"]
                products = 4 if row["products"] == "several" else 1
                assert row["visit"]["multiply_adds"] == products * n * m * row["width"], row


def test_every_walk_has_a_visit_and_the_page_shows_those_of_large_batches(rows):
    for row in rows:
        walks = not row["kernel"].startswith(("combine", "merge", "moving"))
        assert bool(row["visit"]) == bool(row["step"]) == walks, row
    shown = roofline.visits_table(rows).splitlines()[2:]
    assert len(shown) == len(roofline.CARDS) * len(OBJECTIVES) * len(PASSES)


def test_bytes_of_a_visit_are_at_least_its_operands(rows):
    for row in rows:
        if row["visit"] and row["bits"] == 16:
            n, m, _ = row["tile"]
            operands = 1 if row["products"] == "one" else 2
            assert row["visit"]["cache_bytes"] >= operands * (n + m) * row["width"] * 2, row
