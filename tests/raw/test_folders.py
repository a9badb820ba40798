"""Folders of pictures: categories, texts beside pictures, and how one is told from the other."""

import json

import pytest

from tests.raw.test_sources import bad, lines, png
from train.raw.sources import open_source


def fill(folder, **files):
    """Writes files, whose names have underscores for dots."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name.replace("_", ".")).write_bytes(data)
    return folder


def test_img2dataset_files(tmp_path):
    for shard in ("00000", "00001"):
        for i in range(2):
            key = f"{shard}{i}"
            files = {f"{key}_jpg": png(), f"{key}_txt": f"Cat {key}", f"{key}_json": json.dumps({"caption": "other"})}
            fill(tmp_path / shard, **files)
        (tmp_path / f"{shard}.parquet").write_bytes(b"about it")
        (tmp_path / f"{shard}_stats.json").write_text('{"count": 2}')
    source = open_source(tmp_path)
    assert source.description["format"] == "sidecar"
    assert [s.caption for s in source] == ["Cat 000000", "Cat 000001", "Cat 000010", "Cat 000011"]
    assert [s.caption for s in open_source(tmp_path / "00001")] == ["Cat 000010", "Cat 000011"]
    # Without texts, the caption in the JSON.
    for path in tmp_path.glob("*/*.txt"):
        path.unlink()
    assert [s.caption for s in open_source(tmp_path / "00001")] == ["other"] * 2


def test_sidecars_of_every_kind(tmp_path):
    fill(tmp_path, a_jpg=png(), a_txt="\ufeffA\n", b_PNG=png(), b_TXT="B".encode("utf-16"), c_jpg=png(), c_caption="C")
    fill(tmp_path / "more" / "deep", d_webp=png(), d_txt="D", e_jpg=png(), readme_txt="x", f_mp4=b"x", f_txt="F")
    fill(tmp_path / "__MACOSX", a_jpg=png(), a_txt="A")
    fill(tmp_path, **{"._a_jpg": b"x", "._a_txt": b"x", ".DS_Store": b"x"})
    source = open_source(tmp_path)
    assert "is read as captions in sidecar (4 of 5 images have a text file next to them): 5 samples" in str(source)
    assert "ignored: 3 files that belong to no sample, such as more/deep/f.mp4" in str(source)
    assert [source[i].caption.strip() for i in range(4)] == ["A", "B", "C", "D"]
    assert source[3].images == (tmp_path / "more" / "deep" / "d.webp",)
    assert bad(source, 4).reason == "missing_field" and "no .txt file next to it" in bad(source, 4).detail
    (tmp_path / "a.txt").write_bytes("é".encode("latin-1"))
    assert bad(source, 0).reason == "bad_unicode"


def test_what_is_told_and_what_has_to_be_said(tmp_path):
    for i in range(5):
        fill(tmp_path / "cat", **{f"{i}_jpg": png()})
    assert open_source(tmp_path).description["format"] == "folders"
    fill(tmp_path / "cat", notes_txt="not of a picture")
    assert open_source(tmp_path).description["format"] == "folders"
    fill(tmp_path / "cat", **{"0_txt": "of a picture"})
    with pytest.raises(
        ValueError, match="1 of 5 images have a text file next to them; choose --format sidecar or folders"
    ):
        open_source(tmp_path)
    assert [sample.caption for sample in open_source(tmp_path, "folders")] == ["cat"] * 5
    assert open_source(tmp_path, "sidecar")[0].caption == "of a picture"


def test_pictures_without_captions(tmp_path):
    fill(tmp_path, a_jpg=png(), b_jpg=png())
    with pytest.raises(ValueError, match="has images, but neither text files next to them nor a file of captions"):
        open_source(tmp_path)
    # Records about them come first, unless texts beside them say something else.
    lines(tmp_path / "captions.jsonl", {"image": "a.jpg", "caption": "A"})
    assert open_source(tmp_path)[0].caption == "A"
    fill(tmp_path, a_txt="B")
    with pytest.raises(
        ValueError, match=r"both captions.jsonl and text files next to images; choose one with --format"
    ):
        open_source(tmp_path)
    assert open_source(tmp_path, "sidecar")[0].caption == "B"


SUFFIXES = "tif tiff avif heic heif jfif jpe ppm pgm pbm pnm jp2 jxl ico tga svg psd exr dng cr2 TIFF"


@pytest.mark.parametrize("suffix", SUFFIXES.split())
def test_every_picture_is_a_sample_whether_or_not_it_can_be_read(tmp_path, suffix):
    fill(tmp_path / "cat", a_jpg=png(), **{f"b_{suffix}": png()})
    assert [sample.images[0].name for sample in open_source(tmp_path)] == ["a.jpg", f"b.{suffix}"]
    fill(tmp_path / "cat", a_txt="A", b_txt="B")
    assert [sample.caption for sample in open_source(tmp_path)] == ["A", "B"]


def test_files_that_are_no_pictures_are_told(tmp_path):
    fill(tmp_path / "cat", a_jpg=png(), Thumbs_db=b"x", notes_md=b"x")
    fill(tmp_path / "cat" / "nested", b_jpg=png())
    fill(tmp_path, list_csv=b"x")
    fill(tmp_path / "cat", **{"._a_jpg": b"x", ".DS_Store": b"x"})
    source = open_source(tmp_path, "folders")
    assert len(source) == 1
    assert "ignored: 4 files that belong to no sample, such as list.csv" in str(source)


def test_other_files_beside_those_that_are_read_are_told(tmp_path):
    lines(tmp_path / "a.jsonl", {"text": "A"})
    (tmp_path / "b.jsonl.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "c.csv").write_text("x")
    source = open_source(tmp_path)
    assert "a.jsonl" not in str(source) and "ignored: 2 files that belong to no sample, such as b.jsonl.gz" in str(
        source
    )
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "c.csv").unlink()
    with pytest.raises(ValueError, match=r"b.jsonl.gz is compressed"):
        open_source(tmp_path)


def test_images_are_for_records(tmp_path):
    fill(tmp_path / "cat", a_jpg=png())
    with pytest.raises(ValueError, match="folders has no records"):
        open_source(tmp_path, images=tmp_path)
