"""Tables, parquet files and pictures: every shape, and what is wrong with them."""

from __future__ import annotations

import base64
import zipfile

import pytest

from evals.read.parquet import read_parquet
from evals.read.pictures import Spool, ZipPicture, zip_members
from evals.read.places import folders, parquet_files, plain
from evals.read.tsv import read_tsv
from tests.evals.made import base64_of, picture, stored, write_parquet, write_tsv

COLUMNS = ("question", "answer")


def row(index, image, **cells):
    return {"index": index, "image": image, "question": f"Q{index}", "answer": "A", **cells}


def read(path, **options):
    return read_tsv(path, COLUMNS, "Thing", **options)


def test_pictures_in_their_shapes(tmp_path):
    rows = [
        row(0, base64_of(0)),
        row(1, "0"),
        row(2, str([base64_of(1), base64_of(0)])),
        row(3, "2"),
        row(4, ""),
        row(5, "17"),
        row(6, "1"),
        row(7, "[" + "x" * 80 + "]"),
        row(8, "7"),
    ]
    found = read(write_tsv(tmp_path / "Thing.tsv", rows))
    assert [[image.read() for image in each.images] for each in found[:4]] == [
        [picture(0)],
        [picture(0)],
        [picture(1), picture(0)],
        [picture(1), picture(0)],
    ]
    assert found[1].images[0].key == found[0].images[0].key == found[2].images[1].key != found[2].images[0].key
    problems = [each.problem.split(": ", 1)[-1].partition("Thing.tsv:")[2] or each.problem for each in found[4:]]
    assert problems == [
        "6 has no picture",
        "7 refers to the picture of row 17, which is not there",
        "8 refers to the picture of row 1, which has none of its own",
        found[7].problem,
        "10 refers to the picture of row 7, which has none of its own",
    ]
    assert found[7].problem.endswith("Thing.tsv:9: the list of pictures cannot be read")


def test_files_by_image_path(tmp_path):
    folder = tmp_path / "images" / "Thing"
    folder.mkdir(parents=True)
    for number in (1, 2):
        (folder / f"{number}.png").write_bytes(picture(number))
    (tmp_path / "far.png").write_bytes(picture(3))
    paths = ["1.png", "['1.png', '2.png']", str(tmp_path / "far.png"), "4.png", "", "[oops]"]
    rows = [{"index": n, "image_path": path, "question": "Q", "answer": "A"} for n, path in enumerate(paths)]
    found = read(write_tsv(tmp_path / "Thing_local.tsv", rows))
    expected = [[picture(1)], [picture(1), picture(2)], [picture(3)], [], [], []]
    assert [[image.read() for image in each.images] for each in found] == expected
    assert "images/Thing/4.png is missing" in found[3].problem
    assert found[4].problem.endswith("has no picture")
    assert found[5].problem.endswith("the list in the cell cannot be read")


def test_quotes_newlines_and_missing_values_as_pandas_reads_them(tmp_path):
    question = 'He said "no";\nthen\ttabs, and “more”'
    rows = [row("007", base64_of(0)), row("8", "7", question=question, hint="None"), row("9", "8.0", hint="N/A ")]
    path = write_tsv(tmp_path / "Thing.tsv", rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\r\n")
    found = read(path)
    assert [each.index for each in found] == ["7", "8", "9"]
    assert found[1].cells["question"].replace("\r\n", "\n") == question
    assert "hint" not in found[1].cells and found[2].cells["hint"] == "N/A "
    assert found[1].images[0].read() == picture(0)
    assert found[2].problem.endswith("row 8.0, which has none of its own")


def test_words_as_indices_stay_words(tmp_path):
    found = read(write_tsv(tmp_path / "Thing.tsv", [row("007", base64_of(0)), row("v1", "007")]))
    assert [each.index for each in found] == ["007", "v1"]
    assert found[1].images[0].read() == picture(0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"Thing.tsv is empty"),
        ("index\timage\tquestoin\n", r"no column question, answer; did you mean questoin\?; it has index"),
        ("index\tquestion\tanswer\n", r"has no column image \(or image_path\)"),
        ("index\timage\tquestion\tanswer\tanswer\n", r"names a column twice"),
        ("index\timage\tquestion\tanswer\n1\ta\tq\ta\tb\n", r"Thing.tsv:2 has 5 cells, the first row names 4"),
        ("index\timage\tquestion\tanswer\n\ta\tq\ta\n", r"Thing.tsv:2 has no index"),
        ("index\timage\tquestion\tanswer\n1\ta\tq\ta\n01\ta\tq\ta\n", r"Thing.tsv:3: index 1 is there twice"),
        ('index\timage\tquestion\tanswer\n1\ta\t"q\ta\n2\tb\tq\ta\n', r"Thing.tsv:2 opens a quote that"),
    ],
)
def test_what_is_no_table(tmp_path, text, message):
    (tmp_path / "Thing.tsv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "Thing.tsv")


def test_text_that_is_not_utf_8(tmp_path):
    (tmp_path / "Thing.tsv").write_bytes(b"index\timage\tquestion\tanswer\n1\ta\t\xff\ta\n")
    with pytest.raises(ValueError, match=r"Thing.tsv:2 is not UTF-8"):
        read(tmp_path / "Thing.tsv")


def test_a_picture_that_is_not_base64(tmp_path):
    (found,) = read(write_tsv(tmp_path / "Thing.tsv", [row(1, "A" * 81)]))
    with pytest.raises(ValueError, match=r"the picture of .*Thing.tsv:2 is not base64"):
        found.images[0].read()


def test_parquet(tmp_path):
    rows = [
        {"id": 1, "image": stored(1), "many": [stored(2), stored(1)], "bare": picture(3)},
        {"id": 2, "image": None, "many": [], "bare": None},
        {"id": 3, "image": {"bytes": None, "path": "5.png"}, "many": None, "bare": picture(1)},
    ]
    (tmp_path / "5.png").write_bytes(picture(5))
    found = read_parquet([write_parquet(tmp_path / "a.parquet", rows)], ("id",), ("image", "many", "bare", "image_7"))
    assert [each["id"] for each in found] == [1, 2, 3]
    read = [[[image.read() for image in each[name]] for name in ("image", "many", "bare")] for each in found]
    assert read[0] == [[picture(1)], [picture(2), picture(1)], [picture(3)]]
    assert read[1:] == [[[], [], []], [[picture(5)], [], [picture(1)]]]
    assert found[0]["image"][0].key == found[2]["bare"][0].key


def test_parquet_that_cannot_be_read(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [{"id": 1, "qestion": "a", "image": 3}])
    with pytest.raises(ValueError, match=r"a.parquet has no column question; did you mean qestion\?; it has id, qest"):
        read_parquet([path], ("question",))
    with pytest.raises(ValueError, match=r"a.parquet row 0: a picture is int, not bytes"):
        read_parquet([path], ("id",), ("image",))
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"a.parquet is not a parquet file that can be read"):
        read_parquet([path], ("id",))


def test_zip(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mm-vet/images/v1.png", picture(1))
    assert zip_members(path) == ["mm-vet/images/v1.png"]
    assert ZipPicture(path, "mm-vet/images/v1.png").read() == picture(1)
    with pytest.raises(ValueError, match=r"a.zip has no member b.png"):
        ZipPicture(path, "b.png").read()
    path.write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"a.zip is not a zip archive that can be read"):
        zip_members(path)


def test_the_spool_keeps_one_copy():
    spool = Spool()
    kept = [spool.keep(data, "x") for data in (b"one", b"two", b"one")]
    assert [each.read() for each in kept] == [b"one", b"two", b"one"]
    assert kept[0].key == kept[2].key != kept[1].key and spool._end == 6


def test_places(tmp_path):
    assert plain("lmms-lab___SEED-Bench") == "seedbench" and plain("MME_Benchmark_release_version") == (
        "mmebenchmarkreleaseversion"
    )
    for name in (
        "LMUData",
        "x/POPE",
        "datasets--lmms-lab--POPE/snapshots/b/data",
        "datasets--lmms-lab--POPE/snapshots/a",
    ):
        (tmp_path / name).mkdir(parents=True)
    found = [str(each.relative_to(tmp_path)) for each in folders(tmp_path, ["pope"])]
    assert found == [".", "LMUData", "datasets--lmms-lab--POPE", "x/POPE"]
    for name in ("a/test-0.parquet", "b/data/test-0.parquet", "a/tests.parquet", "a/val/test-1.parquet"):
        file = tmp_path / "datasets--lmms-lab--POPE" / "snapshots" / name
        file.parent.mkdir(exist_ok=True)
        file.touch()
    every = parquet_files(folders(tmp_path, ["pope"]), ["pope"], "test")
    assert [each.name for each in every] == ["test-0.parquet", "test-1.parquet"]
    (one,) = parquet_files(folders(tmp_path, ["pope"]), ["pope"], "test", "val")
    assert one.name == "test-1.parquet"


def test_base64_is_longer_than_a_reference():
    assert len(base64.b64encode(picture(0))) > 64
