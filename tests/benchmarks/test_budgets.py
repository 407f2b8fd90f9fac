"""Counts of machine code: read from a listing, compared, kept and shown."""

import pytest

from benchmarks import budgets, kernels, sass

# A loop of two copies, two tests and four products, one of them in a loop that runs
# three times; a block of one warp; and behind it two slices of eight results each, of
# which a thread has one.
LISTING = """
.text.f:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_main:
        /*0010*/                   LDS.64 R2, [R9] ;
        /*0020*/                   LOP3.LUT P1, RZ, R3, R8, RZ, 0x30, !PT ;
        /*0030*/                   LDGSTS.E [R4], desc[UR4][R6.64], !P1 ;
        /*0040*/                   LOP3.LUT P1, RZ, R5, R8, RZ, 0x30, !PT ;
        /*0050*/                   LDGSTS.E [R4+0x10], desc[UR4][R6.64], !P1 ;
        /*0060*/                   FFMA.FTZ R10, R11, R12, R10 ;
        /*0070*/                   MOV R20, RZ ;
.L_inner:
        /*0080*/                   IADD3 R20, R20, 0x1, RZ ;
        /*0090*/                   FFMA.FTZ R13, R11, R12, R13 ;
        /*00a0*/                   ISETP.GE.U32.AND P2, PT, R20, 0x3, PT ;
        /*00b0*/              @!P2 BRA `(.L_inner) ;
        /*00c0*/               @P0 BRA `(.L_others) ;
        /*00d0*/                   STS [R14], R15 ;
        /*00e0*/                   STS [R14], R16 ;
        /*00f0*/                   STS [R14], R17 ;
.L_others:
        /*0100*/               @P3 BRA `(.L_main) ;
        /*0110*/                   MOV R30, RZ ;
.L_slices:
        /*0120*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0130*/               @P4 BRA `(.L_gathered) ;
        /*0140*/                   STS [R14], R15 ;
        /*0150*/                   STS [R14], R16 ;
.L_gathered:
        /*0160*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0170*/                   MOV R31, RZ ;
.L_stores:
        /*0180*/                   LDS.128 R40, [R14] ;
        /*0190*/                   STG.E.128 desc[UR4][R6.64], R40 ;
        /*01a0*/                   IADD3 R31, R31, 0x1, RZ ;
        /*01b0*/                   ISETP.GE.U32.AND P2, PT, R31, 0x2, PT ;
        /*01c0*/              @!P2 BRA `(.L_stores) ;
        /*01d0*/                   IADD3 R30, R30, 0x20, RZ ;
        /*01e0*/                   ISETP.GE.U32.AND P5, PT, R30, 0x40, PT ;
        /*01f0*/              @!P5 BRA `(.L_slices) ;
        /*0200*/                   EXIT ;
"""


def test_a_listing_is_counted():
    found = sass.counts(LISTING, sass.Results(16, 4))
    assert (found.math, found.slots, found.alone) == (4, 21, 3)
    assert found.share(threads=256) == 4 / (21 + 3 / 8)
    assert found.copies == (sass.Copies(4, 2, 2),)
    # Stores: 4 × 5.  Per slice: 2 barriers, 2 moves and tests, and 3 at its end; its
    # two writes once, their jump each time.  Before all: one, and one to end.
    assert found.epilogue == ((16, (4 * 5 + 2 * 7 + 2 + 1 + 1) / 16),)


def test_a_kernel_without_products_has_no_main_loop():
    with pytest.raises(ValueError, match="no loop multiplies"):
        sass.counts(LISTING.replace("FFMA.FTZ", "FADD.FTZ"), sass.Results(16, 4))


def test_a_missing_disassembler_names_its_wheel(monkeypatch):
    monkeypatch.setattr(sass.shutil, "which", lambda name: None)
    monkeypatch.setattr(sass.sysconfig, "get_path", lambda name: "nowhere")
    with pytest.raises(FileNotFoundError, match="nvidia-cuda-nvdisasm"):
        sass.disassembler()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({}, None),
        ({"share": 0.5}, "share 0.5, kept"),
        ({"warps": 4}, "warps 4, kept"),
        ({"registers": 200}, "registers 200, kept"),
        ({"packed": 15.0}, r"packed 15.0, kept"),
        ({"single": 48.0}, "single 48.0, kept"),
        ({"copies": {"4": 33.0}}, "copy of 4 bytes 33.0, kept"),
        ({"spills": 8}, "8 bytes of spills"),
        ({"tile": "8×8×8"}, "was never kept"),
    ],
)
def test_a_worse_figure_is_a_complaint(change, complaint):
    kept = budgets.read()["kernels"][0]
    found = budgets.compared([{**kept, **change}])
    assert (found == []) if complaint is None else (len(found) == 1)
    if complaint:
        with pytest.raises(ValueError, match=complaint):
            raise ValueError(found[0])


def test_occupancy_is_bounded_by_registers_and_by_shared_memory():
    assert budgets.warps(128, 1024, 256, 90) == 16
    assert budgets.warps(129, 1024, 256, 90) == 8
    assert budgets.warps(32, 60 * 1024, 256, 120) == 8
    assert budgets.warps(32, 1024, 256, 120) == 48


def test_the_documentation_shows_what_is_kept():
    assert budgets.DOCS.read_text("utf-8") == budgets.page()
    assert len(budgets.read()["kernels"]) == len(budgets.KERNELS) + 2 * len(
        budgets.ON_ALL
    )


def test_targets_are_kept():
    """Of the loop that gathers channels first, and of what follows it."""
    rows = [row for row in budgets.read()["kernels"] if row["sm"] == 90]
    shares = {row["kernel"]: [] for row in rows}
    for row in rows:
        shares[row["kernel"]].append(row["share"])
        assert row["spills"] == 0
        assert row["packed"] <= 7
        assert row["single"] <= 14
        if row["kernel"].startswith("TF32, channels first"):
            assert row["slots"] <= 250
    assert shares["float32, channels first"][0] >= 0.8
    assert shares["float32, channels first"][1] >= 0.75
    assert shares["float32, channels first, gradient of weights"][0] >= 0.7


def test_budgets_are_saved_and_compared_by_the_command(monkeypatch, tmp_path, capsys):
    rows = budgets.read()["kernels"][:2]
    monkeypatch.setattr(budgets, "all_measured", lambda: iter(rows))
    monkeypatch.setattr(budgets, "KEPT", tmp_path / "budgets.json")
    page = tmp_path / "gpu.md"
    page.write_text(budgets.DOCS.read_text("utf-8"), encoding="utf-8")
    monkeypatch.setattr(budgets, "DOCS", page)
    kernels.main(["--budgets", "--save"])
    assert budgets.read()["kernels"] == rows
    assert page.read_text("utf-8").count("float32, channels first |") == 2
    kernels.main(["--budgets"])
    rows[0] = {**rows[0], "share": 0.1}
    with pytest.raises(SystemExit, match=r"share 0\.1, kept"):
        kernels.main(["--budgets"])
    assert "slots of a copy" in capsys.readouterr().out


@pytest.mark.slow
def test_no_kernel_issues_more_than_its_budget():
    rows = list(budgets.all_measured())
    assert len(rows) == len(budgets.read()["kernels"])
    assert budgets.compared(rows) == []
