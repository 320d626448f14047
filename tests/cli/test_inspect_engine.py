"""`tokenmill inspect ENGINE --profile --picture`: times of operations, and the picture of an engine drawn anew."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.cli.conftest import Program
from tokenmill import LLM, Engine
from tokenmill.builder.build import build
from tokenmill.builder.engine_picture import engine_picture
from tokenmill.errors import EngineFileError
from tokenmill.program.package import EnginePackage

pytestmark = pytest.mark.spec("D5")

SIZES = {"max_seq_len": 256, "max_batch_size": 4, "max_num_tokens": 48, "capture": "dispatch"}


@pytest.fixture(scope="module")
def engine_dir(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    engine = build(tiny_model, device="cpu", quantization="int8", opt_level=1, **SIZES)
    return engine.save(tmp_path_factory.mktemp("built") / "engine")


def test_operations_are_measured(program: Program, engine_dir: Path) -> None:
    """A step behind a prefix that is longer than one step can be."""
    arguments = ("inspect", str(engine_dir), "--profile", "--step-tokens", "3", "--context", "120")
    done = program(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    operations = json.loads(done.stdout)["operations"]
    assert [one["name"] for one in operations] == [one.name for one in Engine.load(engine_dir).program.operations]
    assert all(one["microseconds"] > 0 for one in operations)
    table = program(*arguments)
    assert "A step of 3 tokens, 120 cached at its end" in table.stdout
    for text in ("Time", "GB/s", "Gop/s", "100.0 %", "layers.*.mlp.down_proj"):
        assert text in table.stdout, text
    plain = program("inspect", str(engine_dir))
    assert "A step of 1 token, 256 cached" in plain.stdout  # as many as the engine has room for
    assert "GB/s" not in plain.stdout
    assert "microseconds" not in program("inspect", str(engine_dir), "--json").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--context", "257"), "context is 257, but the engine was built for 256 at most"),
        (("--step-tokens", "49", "--context", "60"), "step_tokens is 49, but the engine was built for 48 at most"),
    ],
)
def test_steps_that_the_engine_cannot_run_are_not_measured(
    program: Program, engine_dir: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = program("inspect", str(engine_dir), "--profile", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert program("inspect", str(engine_dir), *arguments).returncode == 0  # costs are arithmetic


@pytest.mark.spec("C3")
def test_memory_is_planned_as_for_a_start(program: Program, engine_dir: Path) -> None:
    sizes = ("--max-batch-size", "3", "--kv-cache-tokens", "640", "--max-seq-len", "100")
    with LLM(engine_dir, max_batch_size=3, max_seq_len=100, kv_cache_config={"max_tokens": 640}) as llm:
        expected = asdict(llm.description.memory)
    report = json.loads(program("inspect", str(engine_dir), "--json", *sizes).stdout)
    assert {**expected, "free": None} == {**{name: report["memory"][name] for name in expected}, "free": None}
    assert (report["max_batch_size"], report["limits"]["max_batch_size"]) == (3, 4)
    table = program("inspect", str(engine_dir), *sizes).stdout
    assert "Memory on cpu in int8_group32" in table
    for text in ("640 tokens in 21 blocks, bfloat16", "of 100 tokens; 6 of them fit", "a step of 48 tokens", "Total"):
        assert text in table, text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-batch-size", "5"), "max_batch_size is 5, but the engine was built for 4 at most"),
        (("--backend", "torch"), "A built engine cannot run on the torch backend"),
        (("--quantization", "q4_0"), "The engine's weights are int8_group32, and 'q4_0' is asked for"),
        (("--kernels",), "is a built engine, which has its kernels already"),
    ],
)
def test_what_an_engine_cannot_start_with_is_refused(
    program: Program, engine_dir: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = program("inspect", str(engine_dir), *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_memory_that_is_not_there_is_a_warning(program: Program, engine_dir: Path) -> None:
    done = program("inspect", str(engine_dir), "--kv-cache-tokens", str(10**12))
    assert done.returncode == 0
    assert "does not fit this machine" in done.stderr


@pytest.mark.parametrize("option", ["--profile", "--picture=a.html", "--step-tokens=2", "--context=9", "--every-layer"])
def test_a_checkpoint_has_no_operations_to_show(program: Program, tiny_model: Path, option: str) -> None:
    done = program("inspect", str(tiny_model), option)
    assert done.returncode == 2
    assert "is no built engine. Build one first: tokenmill build" in done.stderr


def test_the_picture_is_that_of_the_build(tiny_model: Path) -> None:
    for options in ({}, {"quantization": "int8"}, {"disabled_passes": ["merge_qkv"], "opt_level": 1}):
        engine = build(tiny_model, device="cpu", **{"opt_level": 1, **SIZES, **options})
        drawn = engine_picture(EnginePackage.from_buffer(engine.to_buffer()))
        assert drawn.encode() == engine.files["graph.html"]


def test_the_picture_counts_the_bytes_of_the_engines_cache(tiny_model: Path) -> None:
    """Half of them in bfloat16: attention reads keys and values of 512 tokens, 2 heads of 8 columns."""
    page = {}
    for dtype, nbytes in (("float32", 4), ("bfloat16", 2)):
        engine = build(tiny_model, device="cpu", kv_cache_dtype=dtype, opt_level=1, **SIZES)
        content = engine.files["graph.html"]
        assert isinstance(content, bytes)
        rows = re.findall(r"title='model.layers.0.self_attn.attention'>.*?<i class='s0'>([^<]*)<", content.decode())
        page[dtype] = (rows[-1], 2 * 512 * 2 * 8 * nbytes + 2 * 4 * 8 * 4)  # query and result are float32
    assert page["float32"][0] == f"{page['float32'][1] / 1000:.3g} KB"
    assert page["bfloat16"][0] == f"{page['bfloat16'][1] / 1000:.3g} KB"


def test_a_program_of_another_version_is_not_drawn(tiny_model: Path) -> None:
    engine = build(tiny_model, device="cpu", opt_level=1, **SIZES)
    engine.config.build_config["disabled_passes"] = ["merge_qkv"]
    with pytest.raises(EngineFileError, match="compiled the model in another way"):
        engine_picture(engine)


def test_the_picture_shows_times_in_a_browser(program: Program, engine_dir: Path, tmp_path: Path) -> None:
    done = program("inspect", str(engine_dir), "--profile", "--picture", "page.html")
    assert done.returncode == 0, done.stderr
    assert "The network is drawn in page.html." in done.stderr
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("&#181;s</span>") >= len(Engine.load(engine_dir).program.operations)
    assert "Time of a step, measured: 1 token, 256 cached" in page
    assert "value='0' checked> measured: 1 token, 256 cached" in page  # its bytes and operations are shown at first
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser is installed")
    probe = page.replace(
        "</body>",
        "<script>const rows = [...document.querySelectorAll('.panel.after .op')];"
        "document.querySelector('#expand').click();"
        "const shown = rows.filter(row => row.getBoundingClientRect().height > 0).length;"
        "const timed = document.querySelectorAll('.panel.after .bar').length;"
        "const wide = document.documentElement.scrollWidth <= window.innerWidth;"
        "document.title = JSON.stringify([rows.length, shown, timed, wide]);</script></body>",
    )
    (tmp_path / "probe.html").write_text(probe, encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,900", "--dump-dom"]
    found = subprocess.run(
        [*command, f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "probe.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    num_rows, num_shown, num_timed, fits = json.loads(found.partition("<title>")[2].partition("</title>")[0])
    assert num_rows == num_shown > 0
    assert num_timed >= len(Engine.load(engine_dir).program.operations)
    assert fits


def test_a_picture_that_cannot_be_written_is_one_line(program: Program, engine_dir: Path) -> None:
    done = program("inspect", str(engine_dir), "--picture", "nowhere/page.html")
    assert done.returncode == 2
    assert done.stderr == "error: nowhere/page.html cannot be written: No such file or directory.\n"
