"""`tilewise demo`: what it measures, what it saves and what it refuses."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from tilewise.bench import textbook
from tilewise.bench.captured import load
from tilewise.cli import demo
from tilewise.data import minilm


@pytest.fixture
def app() -> typer.Typer:
    application = typer.Typer()
    demo.register(application)
    application.command("other")(lambda: None)
    return application


def run(app: typer.Typer, *arguments: object) -> Any:
    return CliRunner().invoke(app, ["demo", *map(str, arguments)])


def arrays(**changed: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    made = {name: rng.standard_normal((1, 2, 11, 5)).astype(np.float32) for name in "qkv"}
    return {**made, **changed}


def file_of(folder: Path, **changed: np.ndarray) -> Path:
    path = folder / "captured.npz"
    np.savez(path, **arrays(**changed))
    return path


def test_shipped_arrays_are_a_real_layer_of_512_tokens() -> None:
    captured = load(minilm())
    assert captured.q.shape == captured.k.shape == captured.v.shape == (1, 12, 512, 32)
    assert captured.q.dtype == np.float32
    assert "MiniLM" in captured.about
    assert minilm().stat().st_size < 3_000_000
    with np.load(minilm(), allow_pickle=False) as file:
        assert file["tokens"].shape == (512,)
        assert file["tokens"][1] == "alice"


def test_figures_for_the_shipped_arrays(app: typer.Typer) -> None:
    result = run(app, "--sizes", "64", "--implementation", "reference", "--json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    (size,) = figures["sizes"]
    assert size["N"] == 64
    assert size["shape"] == [1, 12, 64, 32]
    for contender in ("tilewise", "textbook"):
        row = size[contender]
        assert set(row["errors"]) == {"o", "lse", "dq", "dk", "dv"}
        assert max(row["errors"].values()) < 64 * np.finfo(np.float32).eps
        assert row["forward_s"] > 0
        assert row["extra_bytes"] >= 0
        assert row["output_bytes"] > 4 * 4 * 12 * 64 * 32
    assert figures["threads"] >= 1
    assert figures["machine"]["processor"]


def test_table_names_every_figure(app: typer.Typer) -> None:
    result = run(app, "--sizes", "32", "--implementation", "reference", "--threads", 1)
    assert result.exit_code == 0, result.output
    for word in ("MiniLM", "error of dk", "tokens per second", "peak extra memory", "threads 1"):
        assert word in result.stdout


def test_out_saves_results_that_are_right(app: typer.Typer, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    source = file_of(tmp_path)
    options = ("--input", source, "--sizes", "11,29", "--implementation", "reference")
    result = run(app, *options, "--out", out)
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in out.iterdir()) == [
        "attention_11.npz",
        "attention_29.npz",
        "figures.json",
    ]
    truth = textbook.exact(*load(source).at(29, 2))
    with np.load(out / "attention_29.npz", allow_pickle=False) as saved:
        for name in ("o", "lse", "dq", "dk", "dv"):
            assert textbook.relative_error(saved[name], getattr(truth, name)) < 1e-6
    assert len(json.loads((out / "figures.json").read_text())["sizes"]) == 2


def test_grouped_heads_and_float64_are_read(app: typer.Typer, tmp_path: Path) -> None:
    wide = {name: x.astype(np.float64) for name, x in arrays().items()}
    source = file_of(tmp_path, **{**wide, "k": wide["k"][:, :1], "v": wide["v"][:, :1, :, :3]})
    result = run(app, "--input", source, "--sizes", 7, "--implementation", "reference", "--json")
    assert result.exit_code == 0, result.output
    (size,) = json.loads(result.stdout)["sizes"]
    assert size["dtype"] == "float64"
    assert max(size["tilewise"]["errors"].values()) < 1e-13


def test_repeated_tokens_leave_o_and_raise_lse_by_the_log_of_the_count() -> None:
    captured = load(minilm())
    once = textbook.exact(*captured.at(512, 1))
    twice = textbook.exact(*captured.at(1024, 1))
    np.testing.assert_allclose(twice.o[:, :, 512:], once.o, atol=1e-12)
    np.testing.assert_allclose(twice.lse[:, :, :512], once.lse + np.log(2), atol=1e-12)


BAD: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "integers": ({"k": np.ones((1, 2, 11, 5), np.int64)}, "k must be float32 or float64"),
    "half": ({"q": np.ones((1, 2, 11, 5), np.float16)}, "q must be float32 or float64"),
    "mixed": ({"v": np.ones((1, 2, 11, 5))}, "v must be float32 like q, got float64"),
    "dims": ({"q": np.ones((11, 5), np.float32)}, "q must be a non-empty (B, H, N, D)"),
    "empty": ({"v": np.ones((1, 2, 0, 5), np.float32)}, "v must be a non-empty"),
    "shape": ({"k": np.ones((1, 2, 13, 5), np.float32)}, "k must have shape (1, 2, 11, 5)"),
    "heads": (
        {name: np.ones((1, 3, 11, 5), np.float32) for name in "kv"},
        "k must have a number of heads that divides H=2, got 3",
    ),
    "wide": ({"q": np.ones((1, 1, 2, 513), np.float32)}, "q must have D <= 512"),
    "nan": ({"v": np.full((1, 2, 11, 5), np.nan, np.float32)}, "v must be finite"),
    "infinite": ({"q": np.full((1, 2, 11, 5), np.inf, np.float32)}, "q must be finite"),
    "cotangent": ({"do": np.ones((1, 2, 11, 4), np.float32)}, "do must have shape"),
    "strings": ({"q": np.array(["a", "b"])}, "q must be float32 or float64"),
}


def assert_refused(result: Any, words: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("demo: ")
    assert words in line


@pytest.mark.parametrize("case", BAD)
def test_bad_arrays_are_refused_in_one_line(app: typer.Typer, tmp_path: Path, case: str) -> None:
    changed, words = BAD[case]
    out = tmp_path / "out"
    result = run(app, "--input", file_of(tmp_path, **changed), "--out", out)
    assert_refused(result, words)
    assert not out.exists()


def test_missing_arrays_are_named(app: typer.Typer, tmp_path: Path) -> None:
    path = tmp_path / "partial.npz"
    np.savez(path, q=arrays()["q"])
    assert_refused(run(app, "--input", path), "got no k and no v")


def test_missing_file_is_refused(app: typer.Typer, tmp_path: Path) -> None:
    assert_refused(run(app, "--input", tmp_path / "none.npz"), "no such file")


def test_folder_is_refused(app: typer.Typer, tmp_path: Path) -> None:
    assert_refused(run(app, "--input", tmp_path), "cannot be read")


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04", b"\x93NUMPY\x01\x00"])
def test_other_formats_are_refused(app: typer.Typer, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.npz"
    path.write_bytes(content)
    assert_refused(run(app, "--input", path), "not a readable npz file")


def test_single_array_file_is_refused(app: typer.Typer, tmp_path: Path) -> None:
    path = tmp_path / "single.npy"
    np.save(path, arrays()["q"])
    assert_refused(run(app, "--input", path), "must be an npz file")


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.999])
def test_truncated_file_is_refused(app: typer.Typer, tmp_path: Path, kept: float) -> None:
    whole = minilm().read_bytes()
    path = tmp_path / "cut.npz"
    path.write_bytes(whole[: int(kept * len(whole))])
    assert_refused(run(app, "--input", path), "not a readable npz file")


def test_damaged_member_is_refused(app: typer.Typer, tmp_path: Path) -> None:
    whole = bytearray(minilm().read_bytes())
    whole[50_000:50_200] = bytes(200)
    path = tmp_path / "damaged.npz"
    path.write_bytes(whole)
    assert_refused(run(app, "--input", path), "not a readable npz file")


def test_archive_of_something_else_is_refused(app: typer.Typer, tmp_path: Path) -> None:
    path = tmp_path / "other.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "nothing here")
    assert_refused(run(app, "--input", path), "must hold the arrays q, k and v")
    with zipfile.ZipFile(path, "w") as archive:
        for name in "qkv":
            archive.writestr(f"{name}.npy", "not an array")
    assert run(app, "--input", path).exit_code == 2


class Detonator:
    """An object whose unpickling would be noticed."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was loaded",))


def test_pickled_arrays_are_refused_and_not_loaded(app: typer.Typer, tmp_path: Path) -> None:
    path = file_of(tmp_path, k=np.array([Detonator()], dtype=object))
    assert_refused(run(app, "--input", path), "not a readable npz file")


@pytest.mark.parametrize("sizes", ["", "0", "64,", "-3", "many", "99999999999"])
def test_bad_sizes_are_refused(app: typer.Typer, sizes: str) -> None:
    assert_refused(run(app, f"--sizes={sizes}"), "--sizes must be")


def test_unknown_implementation_is_refused(app: typer.Typer) -> None:
    assert_refused(run(app, "--implementation", "abacus"), "abacus")


def test_unwritable_out_is_refused_before_any_work(app: typer.Typer, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    for out in (blocked, blocked / "inside"):
        result = run(app, "--implementation", "reference", "--out", out)
        assert_refused(result, "cannot be written")
