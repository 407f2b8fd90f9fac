"""`python -m cuconv`: what it prints, and how it refuses."""

import doctest
import json
import re
import shlex
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import ROOT

import cuconv
from cuconv import __main__ as command
from cuconv.demo import DemoError, load_photo
from cuconv.options import Options

PAGE = ROOT / "docs" / "cli.md"
SHAPES = ("2x4x9x8", "6x4x3x2")


@pytest.fixture(autouse=True)
def in_a_file(monkeypatch):
    """Rich sees no terminal, whatever the environment says."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def examples() -> list[tuple[str, str]]:
    """Every command of the page that shows what it prints, and what that is."""
    blocks = re.findall(r"```console\n(.*?)```", PAGE.read_text(), re.DOTALL)
    shown = (re.split(r"^\$ ", block, flags=re.MULTILINE)[1:] for block in blocks)
    return [tuple(one.split("\n", 1)) for block in shown for one in block]


@pytest.mark.parametrize("example", examples(), ids=lambda example: example[0])
def test_the_page_shows_what_is_printed(example, capsys):
    asked, wanted = example
    python, flag, package, *arguments = shlex.split(asked)
    assert (python, flag, package) == ("python", "-m", "cuconv")
    status = command.main(arguments)
    assert status == (2 if wanted.startswith("error: ") else 0)
    out, err = capsys.readouterr()
    checker = doctest.OutputChecker()
    assert checker.check_output(wanted, out + err, doctest.ELLIPSIS), out + err


def test_the_page_has_examples():
    assert len(examples()) == 6


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("", {}),
        ("--stride 2,1 --padding 1:0,2:2", {"stride": (2, 1), "padding": ((1, 0), 2)}),
        ("--padding=-1,1 --dilation 2", {"padding": (-1, 1), "dilation": 2}),
        (
            "--padding same --precision strict",
            {"padding": "same", "precision": "strict"},
        ),
        ("--padding full", {"padding": "full"}),
        (
            "--padding 2 --padding-mode symmetric",
            {"padding": 2, "padding_mode": "symmetric"},
        ),
        (
            "--flip-kernel true --cover-all true --stride 2 --padding SAME_UPPER",
            {"flip_kernel": True, "cover_all": True, "stride": 2, "padding": "same"},
        ),
        ("--op weight_grad --dtype float16", {"op": "weight_grad", "dtype": "float16"}),
        ("--bias --deterministic False", {"bias": True, "deterministic": False}),
        (
            "--strategy im2col --memory-limit 192KiB",
            {"strategy": "im2col", "memory_limit": 196608},
        ),
    ],
)
def test_options_mean_what_they_mean_in_a_call(words, options, capsys):
    assert command.main(["plan", *SHAPES, *words.split(), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    plan = cuconv.plan_conv((2, 4, 9, 8), (6, 4, 3, 2), **options)
    assert said == json.loads(json.dumps(plan.as_dict()))


def test_groups_layouts_and_transposed_convolutions(capsys):
    words = "plan 2×9×8×6 3×2×3×6 --layout NHWC --groups 2 --op transpose --stride 3"
    assert command.main([*words.split(), "--output-padding", "1,2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["y_shape"] == [2, 28, 25, 6]
    assert (said["groups"], said["layout"]) == (2, "channels_last")


def test_every_option_of_a_convolution_can_be_given():
    for name in Options._fields:
        flag = f"--{name.replace('_', '-')}=1:2,3:4"
        chosen = command._parser().parse_args(["plan", "1x1x5", "1x1x3", flag])
        assert getattr(chosen, name) == ((1, 2), (3, 4))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("plan 1x1xy 1x1x3", "a shape is numbers with x between them"),
        ("plan 1x1x5", "required: w_shape"),
        ("plan 1x1x5 1x1x3 --op sideways", "invalid choice: 'sideways'"),
        ("plan 1x1x5 1x1x3 --strid 2", "unrecognized arguments: --strid 2"),
        ("plan 1x1x5 1x1x3 --dtype float31", "float31"),
        ("plan 1x1x5 1x1x3 --stride 0", "stride of spatial axis 0 is 0"),
        ("plan 1x1x5 1x1x3 --output-size 9", "are for op='transpose'"),
        ("plan 1x1x5 1x1x3 --strategy pointwise", "cannot run the forward pass"),
        ("plan 1x1x5 1x1x3 --device tpu", "device must be 'cpu'"),
        ("precompile --ranks 2,4", "ranks are 1, 2 and 3; got '2,4'"),
        ("precompile --dtypes object", "object"),
        ("nothing", "invalid choice: 'nothing'"),
    ],
)
@pytest.mark.parametrize("xp", ["cupy"], indirect=True)
def test_a_mistake_is_told_in_one_line(words, reason, xp, capsys):
    del xp  # so that precompile has a GPU to speak of
    try:
        status = command.main(words.split())
    except SystemExit as stopped:
        status = stopped.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert reason in err


def test_without_a_gpu_the_reason_is_told(monkeypatch, capsys):
    monkeypatch.setattr(command, "default_array_module", lambda: np)
    monkeypatch.setattr(command, "why_not", lambda: "no driver")
    assert command.main(["precompile"]) == 2
    assert capsys.readouterr().err == "error: no GPU works: no driver\n"


@pytest.mark.parametrize("xp", ["cupy"], indirect=True)
def test_precompile_counts_the_kernels(xp, monkeypatch, capsys):
    del xp
    assert command.main(["precompile", "--dtypes", "int8,float32", "--ranks", "1"]) == 0
    ready = cuconv.precompile(("int8", "float32"), (1,))
    out = capsys.readouterr().out
    assert out.startswith(f"{ready} kernels are ready on ")
    assert out.count("\n") == 1
    on_a_terminal(monkeypatch)
    assert command.main(["precompile", "--dtypes", "int8", "--ranks", "1"]) == 0
    ready = cuconv.precompile(("int8",), (1,))
    assert f"{ready}/{ready}" in capsys.readouterr().out


def test_progress_comes_after_each_kernel():
    seen: list[Any] = []
    ready = cuconv.precompile(("int8",), (1,), progress=lambda *now: seen.append(now))
    assert seen == [(done, ready) for done in range(1, ready + 1)]


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit, match="0"):
        command.main(["--version"])
    assert capsys.readouterr().out == f"{cuconv.__version__}\n"


def test_an_interrupted_command_ends_in_one_line(monkeypatch, capsys):
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "information", interrupted)
    assert command.main(["info"]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *(("png", dtype) for dtype in ("uint8", "uint16")),
        *(("tif", dtype) for dtype in ("uint8", "uint16", "int32", "float32")),
    ],
)
def test_pictures_of_any_depth_are_taken(kind, dtype, tmp_path):
    top = 255 if dtype == "uint8" else 4000
    pixels = np.linspace(0, top, 6 * 5).reshape(6, 5).astype(dtype)
    picture = tmp_path / f"picture.{kind}"
    Image.fromarray(pixels).save(picture)
    photo = load_photo(picture)
    assert photo.shape == (1, 3, 6, 5)
    for plane in photo[0]:
        np.testing.assert_array_equal(plane, pixels.astype("f4") / np.float32(top))


def test_a_picture_that_is_not_finite_is_refused(tmp_path):
    picture = tmp_path / "picture.tif"
    Image.fromarray(np.full((6, 5), np.nan, dtype="f4")).save(picture)
    with pytest.raises(DemoError, match="not finite"):
        load_photo(picture)


def on_a_terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")


def test_on_a_terminal_a_plan_is_a_table(monkeypatch, capsys):
    on_a_terminal(monkeypatch)
    assert command.main(["plan", *SHAPES]) == 0
    shown = capsys.readouterr().out
    assert "│" in shown
    for name, said in cuconv.plan_conv((2, 4, 9, 8), (6, 4, 3, 2)).rows():
        assert name in shown
        assert said in shown


def test_without_rich_a_plan_is_text(monkeypatch, capsys):
    on_a_terminal(monkeypatch)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert command.main(["plan", *SHAPES]) == 0
    plan = cuconv.plan_conv((2, 4, 9, 8), (6, 4, 3, 2))
    assert capsys.readouterr().out == f"{plan}\n"
