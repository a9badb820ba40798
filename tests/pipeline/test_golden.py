"""The golden check passes on what it should, and fails on everything else."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from benchmarks import golden
from tests.library.tiny_janus import GOLDEN


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """A copy to spoil."""
    return pathlib.Path(shutil.copytree(GOLDEN, tmp_path / "golden"))


@pytest.fixture
def reference(monkeypatch) -> dict[str, np.ndarray]:
    """The reference's arrays, which stand for ours: the model need not run to see what the check makes of them."""
    arrays = golden.read_npz(GOLDEN / "golden.npz")
    monkeypatch.setattr(golden, "outputs", lambda janus, stored: ((name, arrays[name]) for name in golden.OUTPUTS))
    return arrays


def spoil(folder: pathlib.Path, file: str, name: str, change) -> None:
    """Replaces an array by `change` of it, or drops it where that is None."""
    arrays = golden.read_npz(folder / file)
    changed = change(arrays.pop(name))
    np.savez(folder / file, **arrays, **({} if changed is None else {name: changed}))


def run(folder: pathlib.Path, capfd) -> tuple[int, list[str], list[str]]:
    """Exit code, lines that tell of failures, and all of standard error."""
    code = golden.main([str(folder)])
    shown = capfd.readouterr()
    return code, [line for line in shown.out.splitlines() if " FAIL" in line], shown.err.splitlines()


def test_everything_passes(capfd):
    """With the model itself."""
    assert golden.main([str(GOLDEN)]) == 0
    *rows, summary = capfd.readouterr().out.splitlines()
    assert len(rows) == len(golden.OUTPUTS) + 5 + 16
    assert all(" ok" in row for row in rows) and summary.startswith(f"{len(rows)} of {len(rows)} within tolerance")
    assert {row.split()[0] for row in rows} == {*golden.OUTPUTS, "preprocess", "template"}


def test_the_stand_in_passes(folder, reference, capfd):
    assert run(folder, capfd) == (0, [], [])


@pytest.mark.parametrize("name", [name for name in golden.OUTPUTS if name not in ("vq_ids", "und_text")])
def test_one_percent_off(folder, reference, capfd, name):
    def perturb(array):
        if np.issubdtype(array.dtype, np.integer):
            array.flat[0] += 1
        elif name.startswith("und_"):
            valid = np.argwhere(reference["und_mask"])[0]  # padding is undefined
            array[tuple(valid)] += 0.01 * np.abs(array).max()
        else:
            array.flat[-1] += 0.01 * np.abs(array).max()
        return array

    spoil(folder, "golden.npz", name, perturb)
    code, failures, _ = run(folder, capfd)
    assert code == 1
    assert [line.split()[0] for line in failures] == [name]


@pytest.mark.parametrize("name", ["vq_ids", "und_text", "t2i_tokens_w5"])
def test_one_id_off(folder, reference, capfd, name):
    spoil(folder, "golden.npz", name, lambda array: np.where(np.arange(array.size).reshape(array.shape), array, 0))
    code, failures, _ = run(folder, capfd)
    assert code == 1
    assert len(failures) == 1 and failures[0].split()[0] == name
    assert failures[0].endswith(f"1 of {reference[name].size} differ")


def test_padding_is_undefined(folder, reference, capfd):
    padding = ~golden.read_npz(GOLDEN / "golden.npz")["und_mask"].astype(bool)
    assert padding.any()

    def change(array):
        array[padding] = np.nan
        return array

    spoil(folder, "golden.npz", "und_hidden", change)
    assert run(folder, capfd)[0] == 0


@pytest.mark.parametrize("spoiled", [lambda x: x * np.nan, lambda x: x[:1], lambda x: x[..., None]])
def test_nan_and_other_shapes(folder, reference, capfd, spoiled):
    spoil(folder, "golden.npz", "siglip", spoiled)
    code, failures, _ = run(folder, capfd)
    assert code == 1
    assert len(failures) == 1 and failures[0].split()[:2] == ["siglip", "inf"]


def test_our_nan_fails(folder, reference, capfd):
    reference["siglip"] = np.full_like(reference["siglip"], np.nan)
    code, failures, _ = run(folder, capfd)
    assert code == 1 and len(failures) == 1 and failures[0].startswith("siglip")


@pytest.mark.parametrize("name", [*golden.INPUTS, "siglip", "und_text", "t2i_pixels_w5"])
def test_missing_array(folder, reference, capfd, name):
    spoil(folder, "golden.npz", name, lambda array: None)
    code, failures, _ = run(folder, capfd)
    assert code == 1
    assert len(failures) == 1 and failures[0].split()[0] == name and "missing from golden.npz" in failures[0]


def test_unknown_array(folder, reference, capfd):
    arrays = golden.read_npz(folder / "golden.npz")
    np.savez(folder / "golden.npz", **arrays, more=np.zeros(1))
    code, failures, _ = run(folder, capfd)
    assert code == 1 and len(failures) == 1 and failures[0].startswith("more ") and "unknown" in failures[0]


def test_one_pixel_off(folder, reference, capfd):
    def change(array):
        array[1, 200, 100] ^= 1
        return array

    spoil(folder, "preprocess.npz", "pixels_2", change)
    code, failures, _ = run(folder, capfd)
    assert code == 1
    assert len(failures) == 1 and failures[0].startswith("preprocess 2 ") and failures[0].endswith("differs")


@pytest.mark.parametrize("name", ["image_3", "pixels_3"])
def test_missing_preprocessing(folder, reference, capfd, name):
    spoil(folder, "preprocess.npz", name, lambda array: None)
    code, failures, _ = run(folder, capfd)
    assert code == 1
    assert len(failures) == 1 and failures[0].startswith("preprocess 3 ") and f"{name} is missing" in failures[0]


def test_nothing_to_check(folder, reference, capfd):
    np.savez(folder / "preprocess.npz", other=np.zeros(1))
    (folder / "templates.json").write_text("{}")
    code, failures, _ = run(folder, capfd)
    assert code == 1 and [line.split()[0] for line in failures] == ["preprocess", "templates"]


@pytest.mark.parametrize("key", ["system", "messages", "text"])
def test_changed_and_missing_template(folder, reference, capfd, key):
    path = folder / "templates.json"
    templates = json.loads(path.read_text(encoding="utf-8"))
    changed, short = list(templates)[1:3]
    templates[changed]["text"] += "\n"
    del templates[short][key]
    path.write_text(json.dumps(templates), encoding="utf-8")
    code, failures, _ = run(folder, capfd)
    assert code == 1
    assert [line.split()[:2] for line in failures] == [["template", changed], ["template", short]]
    assert failures[0].endswith("differs") and f"{key} is missing" in failures[1]


@pytest.mark.parametrize("file", ["golden.npz", "preprocess.npz", "templates.json"])
def test_missing_file(folder, reference, capfd, file):
    (folder / file).unlink()
    code, failures, errors = run(folder, capfd)
    assert (code, failures) == (1, [])
    assert len(errors) == 1 and errors[0].startswith("error: ") and file in errors[0]


@pytest.mark.parametrize("file", ["golden.npz", "preprocess.npz", "templates.json"])
@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut off"])
def test_damaged_file(folder, reference, capfd, file, content):
    (folder / file).write_bytes(content)
    code, failures, errors = run(folder, capfd)
    assert (code, failures) == (2, [])
    assert len(errors) == 1 and errors[0].startswith("error: ") and "Traceback" not in errors[0]


@pytest.mark.parametrize("name", ["absent", "owner/name", "golden/config.json"])
def test_no_folder(folder, capfd, monkeypatch, name):
    """Nor is the hub asked for it."""
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr("janus_jax.hub._download", lambda *args: pytest.fail("the hub was asked"))
    assert run(pathlib.Path(name), capfd) == (2, [], [f"error: {name} is not a folder"])


def test_relative_error():
    assert golden.relative_error(np.array([1.0, 3.0]), np.array([1.0, -4.0])) == 7 / 4
    assert golden.relative_error(np.zeros(2), np.zeros(2)) == 0
    assert golden.relative_error(np.array([np.nan]), np.array([1.0])) == np.inf
    assert golden.relative_error(np.zeros(2), np.zeros(3)) == np.inf
    assert golden.relative_error(np.zeros(1, np.uint8), np.full(1, 255, np.uint8)) == 1
