"""The kernels of other packages are right before they are counted, and what is counted of them and of ours."""

from __future__ import annotations

import pytest
import torch
from exact import differences
from triton.runtime.interpreter import TensorHandle

from benchmarks import measure, others, packages
from benchmarks.counting import Traffic
from benchmarks.harness import run_part
from benchmarks.packages import INF_CL, MEMEFF, SIGLIP_KERNEL
from tracer.kernels._triton import tl


@pytest.fixture(scope="module")
def results() -> dict:
    """The part in its quick form, in processes of its own: this one interprets."""
    return run_part("others", quick=True)["results"]


@pytest.fixture(scope="module")
def counted(results) -> dict[str, dict]:
    return {row["who"]: row for row in results["work"]}


def test_counts_are_as_committed(results):
    assert {row["who"] for row in results["kernels"]} == {INF_CL, MEMEFF, SIGLIP_KERNEL}
    assert differences("others", results) == []


def total(row: dict, what: str) -> float:
    return sum(row[what].values())


def test_memeff_takes_a_product_more_than_ours_and_atomics(counted):
    """It recomputes the logits for each tower's gradient."""
    ours, theirs = counted[others.OURS], counted[MEMEFF]
    assert total(ours, "units") == 4
    assert total(theirs, "units") == 5
    assert total(ours, "atomics") == 0
    assert total(theirs, "atomics") == 2 * ours["rows"] * (ours["rows"] // 128)  # its tiles are 128 wide
    assert total(ours, "bytes") < total(theirs, "bytes")
    assert total(ours, "torch_bytes") < total(theirs, "torch_bytes")


@pytest.mark.parametrize(
    ("architecture", "width", "products"),
    [("sm_90", 1024, 5), ("sm_100", 512, 5), ("sm_100", 1024, 4)],
)
def test_memeff_takes_four_products_where_features_are_wide(architecture, width, products):
    """Then it adds all gradients with atomics. The page states up to which width it takes five."""
    with packages.as_if_on(architecture, others.PLACES):
        row = others._count(MEMEFF, architecture, 128, width)
    assert total(row, "units") == products
    gradients = 2 * 128 * width
    assert (total(row, "atomics") > gradients) == (products == 4)


def test_inf_cl_takes_ten_products(counted):
    """Each direction has a walk of its own, and each gradient of it recomputes the logits."""
    theirs = counted[INF_CL]
    assert theirs["units"]["forward"] == pytest.approx(2, rel=0.01)  # and N·D for the positives
    assert theirs["units"]["backward"] == pytest.approx(8, rel=0.01)
    assert total(theirs, "atomics") == 0
    assert total(theirs, "bytes") > 5 * total(counted[others.OURS], "bytes")  # float32, tiles read again


@pytest.mark.parametrize("size", [(256, 64), (128, 512)], ids=str)
def test_the_formula_of_inf_cls_work_gives_what_is_counted(counted, size):
    """With one and with two parts of the width. The page has its numbers where the interpreter takes too long."""
    theirs = counted[INF_CL]
    if size != (theirs["rows"], theirs["width"]):
        with packages.as_if_on("sm_90", others.PLACES):
            theirs = others._count(INF_CL, "sm_90", *size)
    by_formula = packages.inf_cl_work(*size)
    assert theirs["units"] == by_formula.units
    assert theirs["bytes"] == by_formula.bytes


def test_the_interpreter_rounds_as_inf_cls_instruction_does():
    x = torch.tensor([1.0, 1 + 2**-11, 1 + 2**-12, -(1 + 3 * 2**-11), 3e38], dtype=torch.float32)
    want = [1.0, 1 + 2**-10, 1.0, -(1 + 2**-9), 3e38]
    handle = TensorHandle(x.numpy(), tl.float32)
    rounded = packages._round_to_tf32(None, "cvt.rna.tf32.f32 $0, $1;", "=r, r", [handle]).get_result(0)
    assert rounded.data.tolist() == pytest.approx(want, rel=2**-12)
    assert rounded.data[:4].tolist() == want[:4]
    with pytest.raises(NotImplementedError, match="knows no instruction 'ex2"):
        packages._round_to_tf32(None, "ex2.approx.f32 $0, $1;", "=r, r", [handle])


def test_siglip_kernel_takes_three_products_of_another_loss(counted):
    assert total(counted[SIGLIP_KERNEL], "units") == 3
    assert counted[SIGLIP_KERNEL]["launches"]["backward"] == 0


def test_our_forward_pass_copies_no_tower(results):
    memory = {row["who"]: row for row in results["memory"]}
    tower = 2 * memory[others.OURS]["rows"] * memory[others.OURS]["width"]
    assert memory[others.OURS]["forward"] < 0.55 * tower  # partial statistics
    assert memory[MEMEFF]["forward"] > 3 * tower


def test_what_is_published_stands_beside_estimates(results):
    rows = {row["who"]: row for row in results["estimates"]}
    a100 = rows[MEMEFF]
    assert (a100["pairs"], a100["width"], a100["seconds"]) == (65536, 512, 0.201)
    assert 4 / 5 * a100["estimate_their_products"] <= a100["estimate_ours"] < a100["estimate_their_products"]
    assert a100["ours"] == others.OURS
    sigmoid = rows[SIGLIP_KERNEL]  # three products of both, not the CLIP loss's four and its exponentials
    assert sigmoid["ours"] == others.OUR_SIGMOID
    assert (
        sigmoid["estimate_their_products"]
        <= sigmoid["estimate_ours"]
        < 2 * sigmoid["estimate_their_products"]
    )
    page = others.report(results)
    for words in (
        "**Counted**",
        "**Compiled**",
        "**Published**",
        "**estimates**",
        " 5.00 ",
        "2.00 + 8.00 products",
    ):
        assert words in page
    assert others.highlights(results)[0][1:] == ("4.00 N²D", "5.00 N²D (memeff 0.3.1)", "1.25×")


def test_every_count_has_a_name_of_its_own(results):
    rows = 5 * 2 * len(results["work"]) + 2 * len(results["memory"]) + 3 * len(results["kernels"])
    assert len(others.exact(results)) == rows
    twice = results | {"kernels": results["kernels"] * 2}
    assert len(others.exact(twice)) == rows + 3 * len(results["kernels"])


def test_a_wrong_package_ends_the_count():
    image, text = others._features(16, 8)
    grads = (image, text, None)
    with pytest.raises(measure.WrongResult, match="loss of memeff is off"):
        others.require_agreement(MEMEFF, torch.tensor(1.0), grads)


def test_torchs_traffic_is_what_operations_read_and_write():
    x, out = torch.ones(8, 16), torch.empty(8, 8)
    with Traffic() as moved:
        x.T.reshape(4, 32)  # a copy: 128 numbers read and 128 written
        assert moved.bytes == 4 * 256
        torch.empty(100)
        x.view(2, 64)
        torch.mm(x, x.T, out=out)  # twice 128 read and 64 written
        torch.zeros_like(x)
    assert moved.bytes == 4 * (256 + 320 + 128)


def test_the_part_compiles_and_does_not_interpret(monkeypatch):
    monkeypatch.setattr(others.triton.knobs.runtime, "interpret", True)
    with pytest.raises(SystemExit, match="TRITON_INTERPRET is set: unset it"):
        others.measure(quick=True)
