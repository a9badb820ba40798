"""Tables as text: what csv.writer writes comes back, in any encoding; what is no table is refused."""

import csv
import io
import json

import pytest

from tests.raw.test_sources import LLAVA, bad, png
from train.raw.csv_files import CsvFile
from train.raw.sources import open_source

ROWS = [
    ["a.png", 'A "red" circle, small'],
    ["b.png", "Two lines:\nthe second, with a comma\r\nand a third"],
    ["c.png", "  space  "],
    ["d.png", "Ein Bär\u2028läuft \N{CAT FACE}"],
]


def table(rows, **dialect) -> str:
    file = io.StringIO(newline="")
    csv.writer(file, **dialect).writerows(rows)
    return file.getvalue()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize(
    ("name", "dialect"),
    [
        ("a.csv", {}),
        ("a.csv", {"lineterminator": "\n"}),
        ("a.csv", {"delimiter": ";", "quoting": csv.QUOTE_ALL}),
        ("a.csv", {"delimiter": "\t"}),
        ("a.TSV", {"delimiter": "\t"}),
    ],
)
def test_rows_come_back(tmp_path, name, dialect, encoding):
    path = tmp_path / name
    path.write_bytes(table([["image", "caption"], *ROWS], **dialect).encode(encoding))
    source = open_source(path)
    assert source.description["format"] == "csv" and source.description["schema"] == "captions"
    assert [[sample.images[0].name, sample.caption] for sample in (source[i] for i in (0, 1, 2, 3))] == ROWS
    assert source[3].caption == ROWS[3][1]  # any order
    assert source[1].images == (tmp_path / "b.png",)


def test_places_are_lines(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('image,caption\na.png,"one\ntwo"\n\n,,\nb.png,three\nc.png\nd.png,,4\n', newline="")
    reader = CsvFile(path)
    # A row is named by its first line; blank ones do not count, nor rows of nothing but commas.
    assert [reader[i][0] for i in (0, 1)] == [f"{path}:2", f"{path}:6"]
    assert len(reader) == 4
    for index, told in ((2, "7: bad_csv: 1 cells, but the first row names 2"), (3, "8: bad_csv: 3 cells")):
        assert told in str(bad(reader, index))


def test_cells_are_texts_and_lists_are_json(tmp_path):
    turns = LLAVA["conversations"]
    rows = [
        ["", "image", "conversations", "id"],
        ["0", "a.png", json.dumps(turns), "7"],
        ["1", '["a.png"]', json.dumps(turns), ""],
        ["2", "a.png", "[{", ""],
        ["3", "a.png", "hello", ""],
    ]
    (tmp_path / "a.csv").write_text(table(rows))
    source = open_source(tmp_path / "a.csv")
    assert source.description["schema"] == "llava"
    assert source[0].messages == source[1].messages == (
        {"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", "content": "A circle."}
    )  # fmt: skip
    assert source[0].images == source[1].images == (tmp_path / "a.png",)
    assert bad(source, 2).reason == "bad_json" and bad(source, 3).reason == "missing_field"
    # A text that looks like something else stays a text.
    (tmp_path / "b.csv").write_text(table([["text"], ["[1]"], ["007"], ["true"]]))
    assert [sample.text for sample in open_source(tmp_path / "b.csv")] == ["[1]", "007", "true"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('text\n"never closed\nanother\n', r"a.csv:2 is not a row of a table: unexpected end of data"),
        ('text\n"a"b\n', r"a.csv:2 is not a row of a table: ',' expected after '\"'"),
        ("text\na\rb\n", r"a.csv:2 is not a row of a table: new-line character seen in unquoted field"),
        ("text,text\na,b\n", r"a.csv names a column twice in its first row: text, text"),
        ("text\n", r"a.csv is empty: it has no samples"),
        ("", r"a.csv is empty: it has no samples"),
        ("foo\nx\n", r"cannot tell the schema .* has the fields foo\)"),
    ],
)
def test_what_is_no_table_is_one_line(tmp_path, content, told):
    (tmp_path / "a.csv").write_text(content, newline="")
    with pytest.raises(ValueError, match=told) as refused:
        open_source(tmp_path / "a.csv")
    assert "\n" not in str(refused.value)


def test_bytes_that_are_no_text_cost_one_sample(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"text\nfine\ncaf\xe9\nfine too\n")
    source = open_source(tmp_path / "a.csv")
    assert [source[i].text for i in (0, 2)] == ["fine", "fine too"]
    assert bad(source, 1).reason == "bad_csv" and "it may be Windows-1252" in str(bad(source, 1))


def test_endings_decide_the_format_and_unknown_ones_are_refused(tmp_path):
    """Nothing falls through to the JSON reader."""
    for name in ("a.foo", "a.yaml", "a"):
        (tmp_path / name).write_text('{"text": "A"}\n')
        for given in (None, "text", "captions"):
            with pytest.raises(ValueError, match=rf"{name}: cannot tell the format from its name; choose one with"):
                open_source(tmp_path / name, given)
        assert open_source(tmp_path / name, "json")[0].text == "A"
        assert open_source(tmp_path / name, "json", schema="text")[0].text == "A"
    (tmp_path / "a.csv").write_text("text\nA\n")
    for given in (None, "csv", "text"):
        assert open_source(tmp_path / "a.csv", given)[0].text == "A"
    with pytest.raises(ValueError, match="format=text is a schema, and contradicts schema=llava"):
        open_source(tmp_path / "a.csv", "text", schema="llava")
    with pytest.raises(ValueError, match="webdataset has the schema captions, not chat"):
        (tmp_path / "a.tar").write_bytes(bytes(10240))
        open_source(tmp_path / "a.tar", schema="chat")
    with pytest.raises(ValueError, match=r"unknown schema 'chta'; did you mean chat\?"):
        open_source(tmp_path / "a.csv", schema="chta")


def test_folders_of_tables(tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.csv").write_text(f"image,caption\n{number}.png,Number {number}\n")
        (tmp_path / f"{number}.png").write_bytes(png())
    source = open_source(tmp_path)
    assert [sample.caption for sample in source] == ["Number 0", "Number 1"]
    # Beside JSON that is asked for by its schema, a table is about something else.
    (tmp_path / "a.jsonl").write_text('{"image": "0.png", "caption": "A"}\n')
    source = open_source(tmp_path, "captions")
    assert [sample.caption for sample in source] == ["A"] and "ignored: 2 files" in str(source)
