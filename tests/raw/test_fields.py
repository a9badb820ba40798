"""What the fields of a record mean: taken, or refused with the reason, never read past."""

import base64
import json
import os

import pytest

from tests.raw.test_sources import bad, lines, png
from train.raw.media import is_media_field
from train.raw.sources import open_source

ASK, ANSWER = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "Arr."}
TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Arr."}]


def only(tmp_path, record, **options):
    return open_source(lines(tmp_path / "x.jsonl", record), **options)


def reason(tmp_path, record, **options) -> str:
    return bad(only(tmp_path, record, **options), 0).reason


def turns(**fields):
    """A chat whose answer has these fields too."""
    return {"messages": [ASK, ANSWER | fields, ASK, ANSWER]}


# ---------------------------------------------------------------- system prompts


@pytest.mark.parametrize("field", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize("record", [{"conversations": TURNS}, {"messages": [ASK, ANSWER]}])
def test_a_system_prompt_beside_the_turns(tmp_path, field, record):
    sample = only(tmp_path, {field: "Be a pirate."} | record)[0]
    assert sample.messages[0] == {"role": "system", "content": "Be a pirate."} and len(sample.messages) == 3


def test_two_system_prompts(tmp_path):
    first = {"role": "system", "content": "Be kind."}
    record = {"system": "Be kind.", "messages": [first, ASK, ANSWER]}
    assert len(only(tmp_path, record)[0].messages) == 3
    assert reason(tmp_path, record | {"system": "Be rude."}) == "ambiguous_sample"
    assert reason(tmp_path, {"system": "A", "system_prompt": "B", "messages": [ASK, ANSWER]}) == "ambiguous_sample"
    assert reason(tmp_path, {"system": ["A"], "messages": [ASK, ANSWER]}) == "bad_turns"
    assert len(only(tmp_path, {"system": None, "messages": [ASK, ANSWER]})[0].messages) == 2
    assert only(tmp_path, {"system": "", "messages": [ASK, ANSWER]})[0].messages[0]["content"] == ""


# ---------------------------------------------------------------- what is trained on


@pytest.mark.parametrize("field", ["loss", "weight", "train", "training", "trainable", "loss_weight"])
@pytest.mark.parametrize("no", [False, 0, 0.0])
def test_answers_that_are_not_trained_on(tmp_path, field, no):
    sample = only(tmp_path, {"system": "Hm."} | turns(**{field: no}))[0]
    assert sample.untrained == (2,) and sample.messages[2]["content"] == "Arr."
    assert only(tmp_path, turns(**{field: not no}))[0].untrained == ()
    assert only(tmp_path, turns(**{field: None}))[0].untrained == ()
    assert reason(tmp_path, {field: no} | turns()) == "not_trained"


@pytest.mark.parametrize("fields", [
    {"weight": 0.5}, {"weight": -1}, {"weight": 2}, {"loss": "false"}, {"loss": float("nan")}, {"loss": [0]},
    {"loss": True, "weight": 0}, {"mask": True}, {"loss_mask": 1}, {"train_detail": [{"begin": 0}]},
])  # fmt: skip
def test_weights_that_cannot_be_kept(tmp_path, fields):
    assert reason(tmp_path, turns(**fields)) == "unsupported_weight"


def test_questions_are_never_trained_on(tmp_path):
    assert only(tmp_path, {"messages": [ASK | {"loss": False}, ANSWER]})[0].untrained == ()
    assert reason(tmp_path, {"messages": [ASK | {"train": True}, ANSWER]}) == "unsupported_weight"


def test_tools_have_no_place_in_the_template(tmp_path):
    assert reason(tmp_path, {"tools": [{"name": "search"}], "messages": [ASK, ANSWER]}) == "unsupported_field"
    assert len(only(tmp_path, {"tools": "[]", "functions": [], "messages": [ASK, ANSWER]})[0].messages) == 2


# ---------------------------------------------------------------- media

TAGS = (
    "<video> <audio> <img> <bbox> <Video> <IMG> <image_1> <image1> <image-1> <img_start> <im_start> <video_0> <speech>"
    " <vid> <image_placeholder_2> <region_fea> <region1> <mask_3> <image_pad> <video_token> <picture> <bboxes>"
    " <|image_1|> <|vision_start|> <|image_pad|> <|video_pad|> <|AUDIO|> <|audio_bos|> <|box_start|> <|ref|> <|/det|>"
    " <|object_ref_start|> <loc0123> <seg012> <images/> <video/> <Image>"
)


@pytest.mark.parametrize("tag", [*TAGS.split(), "<image 1>", "<box>(1,2),(3,4)</box>", "<quad> [1, 2]"])
def test_tags_of_media_that_is_not_read(tmp_path, tag):
    records = [
        {"conversations": [{"from": "human", "value": f"{tag}\nWhat?"}, TURNS[1]]},
        {"conversations": [TURNS[0], {"from": "gpt", "value": f"It is {tag}."}]},
        {"image": "a.png", "caption": f"A cat {tag}"},
        {"text": f"{tag}\nA video of a cat."},
        {"messages": [ASK, {"role": "assistant", "content": tag}]},
        {"system": tag, "messages": [ASK, ANSWER]},
    ]
    for record in records:
        assert reason(tmp_path, record) == "media_tag", record


@pytest.mark.parametrize("text", [
    "<b>bold</b> and a < b > c, <br/>, <p>, <i>, <s>, <u>",
    "Write `<video>` for a film and `<img>` for a picture.",
    "```html\n<video>\n<img>\n```\nThat is all.",
    "~~~\n<audio>\n~~~",
    '<video controls src="a.mp4"></video> <img src="a.png" alt="A"/> <audio src="x"></audio>',
    "<video>\n  <source src='a.mp4'>\n</video>",
    "git checkout <ref> -- <file>, aws --region <region>, <object>.<method>(<box>), std::vector<point>",
    "Replace <mask> with a word. Map<String, Video> videos; List<Image> images = new ArrayList<>();",
    "x <video y> z; <imagery> <audience> <imgx> <videography>",
    "<|system|> is what others write",
])  # fmt: skip
def test_ordinary_text_is_kept(tmp_path, text):
    assert only(tmp_path, {"text": text})[0].text == text
    chat = {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}
    assert only(tmp_path, chat)[0].messages[1]["content"] == text


@pytest.mark.parametrize("field", [
    "video", "videos", "audio", "audios", "video_path", "audio_file", "video_url", "mp4", "wav", "Video", "speech_path",
])  # fmt: skip
def test_fields_of_media_that_is_not_read(tmp_path, field):
    for value in ("a.mp4", ["a.mp4"], {"path": "a.mp4"}):
        for record in (
            {"conversations": TURNS},
            {"messages": [ASK, ANSWER]},
            {"text": "A film."},
            {"image": "a.png", "caption": "A"},
            {"messages": [ASK | {field: value}, ANSWER]},
        ):
            given = record if field in json.dumps(record) else {field: value} | record
            assert reason(tmp_path, given) == "unsupported_media", given
    assert only(tmp_path, {field: None, "text": "A"})[0].text == "A"
    assert only(tmp_path, {field: 3, "text": "A"})[0].text == "A"


@pytest.mark.parametrize("field", [
    "image_path", "image_list", "image_url", "img", "pictures", "image_file", "image_paths", "image_1", "input_image",
    "photo_url", "Image", "img_path", "frames", "file_names", "image_base64", "media",
])  # fmt: skip
def test_pictures_under_another_name(tmp_path, field):
    for record in ({"conversations": TURNS}, {"messages": [ASK, ANSWER]}, {"text": "A film."}):
        assert reason(tmp_path, {field: "a.png"} | record) == "unknown_image_field"
    assert reason(tmp_path, {"messages": [ASK | {field: ["a.png"]}, ANSWER]}) == "unknown_image_field"
    # A scalar beside a picture is taken for its address or name, a list is not.
    (tmp_path / "a.png").write_bytes(png())
    assert only(tmp_path, {field: "x", "image": "a.png", "caption": "A"})[0].caption == "A"
    assert reason(tmp_path, {field: ["x", "y"], "image": "a.png", "caption": "A"}) == "unknown_image_field"


def test_metadata_is_no_media():
    names = "id image_id image_width image_hash url caption video_id clip similarity weight source language"
    assert not [name for name in names.split() if is_media_field(name)]


# ---------------------------------------------------------------- pictures and where they belong


def test_pictures_of_turns_stand_where_their_tags_stand(tmp_path):
    def chat(first, second, **fields):
        one = {"role": "user", "content": "<image>"} | first
        two = {"role": "user", "content": "<image>"} | second
        return {"messages": [one, ANSWER, two, ANSWER]} | fields

    def names(record):
        return [image.name for image in only(tmp_path, record)[0].images]

    assert names(chat({}, {}, images=["a", "b"])) == ["a", "b"]
    assert names(chat({"images": ["a"]}, {"image": "b"})) == ["a", "b"]
    # Beside the turns and within: the one within belongs to its own turn, whichever it is.
    assert names(chat({}, {"images": ["b"]}, images=["a"])) == ["a", "b"]
    assert names(chat({"images": ["b"]}, {}, images=["a"])) == ["b", "a"]
    assert names(chat({"images": ["b"], "content": "<image_placeholder>"}, {}, images=["a"])) == ["b", "a"]
    # Two pictures in the first turn, which has one tag, and none in the second.
    assert reason(tmp_path, chat({"images": ["a", "b"]}, {})) == "placeholder_mismatch"
    system = {"role": "system", "content": "<image>"}
    assert reason(tmp_path, {"messages": [system, ASK, ANSWER], "images": ["a"]}) == "placeholder_mismatch"
    llava = {"conversations": [TURNS[0] | {"value": "<image>", "image": "a"}, TURNS[1]]}
    assert names(llava) == ["a"]


def test_image_and_images_at_once(tmp_path):
    record = {"image": "a.png", "caption": "A"}
    assert len(only(tmp_path, record | {"images": ["a.png"]})[0].images) == 1
    assert reason(tmp_path, record | {"images": ["b.png"]}) == "ambiguous_sample"


def test_lists_of_parts(tmp_path):
    uri = "data:image/png;base64," + base64.b64encode(png()).decode()

    def chat(*parts, **fields):
        return {"messages": [{"role": "user", "content": list(parts)}, ANSWER]} | fields

    text, url = {"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": uri, "detail": "low"}}
    for picture in (
        url,
        {"type": "image_url", "image_url": uri},
        {"type": "input_image", "image_url": uri},
        {"type": "image", "image": uri},
        {"type": "image", "url": uri, "text": None, "index": None},
    ):
        sample = only(tmp_path, chat(picture, text))[0]
        assert sample.messages[0]["content"] == "<image>\nWhat?" and sample.images == (uri,)
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(png()).decode()}
    assert only(tmp_path, chat(text, {"type": "image", "source": source}))[0].images == (uri,)
    sample = only(tmp_path, chat(text, {"type": "image"}, images=["a.png"]))[0]
    assert sample.messages[0]["content"] == "What?\n<image>" and sample.images == (tmp_path / "a.png",)
    two = {"role": "user", "content": [{"type": "image", "index": 1}]}
    sample = only(
        tmp_path, {"messages": [*chat({"type": "image", "index": 0})["messages"], two, ANSWER], "images": list("ab")}
    )[0]
    assert [image.name for image in sample.images] == ["a", "b"]

    remote = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    assert "not fetched" in bad(only(tmp_path, chat(remote)), 0).detail
    assert reason(tmp_path, chat({"type": "image", "index": 1}, images=["a"])) == "ambiguous_sample"
    assert reason(tmp_path, chat(url, {"type": "image"}, images=["a"])) == "ambiguous_sample"
    assert reason(tmp_path, chat({"type": "video", "video": "a.mp4"})) == "unsupported_media"
    assert reason(tmp_path, chat({"type": "video_url", "video_url": {"url": "a"}})) == "unsupported_media"
    assert reason(tmp_path, chat({"type": "input_audio", "input_audio": {"data": "a"}})) == "unsupported_media"
    for part in ("What?", {"text": "What?"}, {"type": "text"}, {"type": "tool_result"}, {"type": ["text"]}, None):
        assert reason(tmp_path, chat(part)) == "bad_turns"


def test_metadata_of_the_datasets_library(tmp_path):
    (tmp_path / "train").mkdir()
    for name in ("0.png", "1.png"):
        (tmp_path / "train" / name).write_bytes(png())
    lines(tmp_path / "train" / "metadata.jsonl", *({"file_name": f"{i}.png", "text": f"Cat {i}"} for i in range(2)))
    for path in (tmp_path, tmp_path / "train", tmp_path / "train" / "metadata.jsonl"):
        source = open_source(path)
        assert source.description["schema"] == "captions"
        assert [sample.caption for sample in source] == ["Cat 0", "Cat 1"]
        assert source[1].images == (tmp_path / "train" / "1.png",)
    # A document's file is no picture.
    assert only(tmp_path, {"file_name": "a.py", "text": "print()"})[0].text == "print()"
    (tmp_path / "x.jsonl").unlink()
    (tmp_path / "train" / "metadata.jsonl").unlink()
    (tmp_path / "train" / "metadata.csv").write_text("file_name,text\n0.png,Cat 0\n1.png,Cat 1\n")
    for path in (tmp_path, tmp_path / "train", tmp_path / "train" / "metadata.csv"):
        source = open_source(path)
        assert source.description["format"] == "csv" and source.description["schema"] == "captions"
        assert [sample.caption for sample in source] == ["Cat 0", "Cat 1"]
        assert source[1].images == (tmp_path / "train" / "1.png",)


@pytest.mark.parametrize("column", ["jpg", "jpeg", "png", "webp"])
@pytest.mark.parametrize("text", ["caption", "txt"])
def test_parquet_of_img2dataset(tmp_path, column, text):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{column: png(), text: "A cat", "key": "0", "url": "https://x", "status": "success", "width": 20}]
    rows.append({column: None, text: "A dog", "key": "1", "url": "https://y", "status": "failed", "width": None})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "0.parquet")
    source = open_source(tmp_path / "0.parquet")
    assert source[0].caption == "A cat" and source[0].images == (png(),)
    assert bad(source, 1).reason == "missing_image"


def test_parquet_with_media_system_and_other_bytes(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": [ASK, ANSWER], "system": "Hm.", "video": None}, {"messages": [ASK], "video": "a.mp4"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "0.parquet")
    source = open_source(tmp_path / "0.parquet")
    assert source[0].messages[0]["content"] == "Hm." and bad(source, 1).reason == "unsupported_media"
    texts = pa.array([b"good", b"\xff\xfe", b"also"]).view(pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": texts}), tmp_path / "1.parquet")
    source = open_source(tmp_path / "1.parquet")
    assert [source[0].text, source[2].text] == ["good", "also"] and bad(source, 1).reason == "bad_unicode"


# ---------------------------------------------------------------- paths


@pytest.fixture
def data(tmp_path):
    """A folder beside a picture that it should not reach, but by links."""
    (tmp_path / "secret.png").write_bytes(png())
    folder = tmp_path / "data"
    (folder / "pictures").mkdir(parents=True)
    (folder / "pictures" / "a.png").write_bytes(png())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "up").symlink_to(tmp_path)
    (folder / "inner.png").symlink_to(folder / "pictures" / "a.png")
    return folder


@pytest.mark.parametrize("path", ["../secret.png", "pictures/../../secret.png", "{}/secret.png", "link.png",
                                  "up/secret.png", "../data-of-others/a.png", "/etc/passwd"])  # fmt: skip
def test_paths_that_lead_outside(data, path):
    record = {"image": path.format(data.parent), "caption": "A"}
    error = bad(only(data, record), 0)
    assert error.reason == "outside_folder" and "--allow-outside" in error.detail
    assert only(data, record, allow_outside=True)[0].images == (data / record["image"],)
    if "secret" in path or path == "link.png":
        assert only(data, record | {"image": record["image"].removeprefix("../")}, images=data.parent)


def test_paths_within_the_folder_however_they_are_written(data):
    for path in (
        "pictures/a.png",
        "./pictures/a.png",
        "pictures/../pictures/a.png",
        f"{data}/pictures/a.png",
        "inner.png",
    ):
        assert len(only(data, {"image": path, "caption": "A"})[0].images) == 1
    # A folder that is itself reached by a link.
    other = data.parent / "other"
    other.symlink_to(data)
    lines(other / "x.jsonl", {"image": "pictures/a.png", "caption": "A"})
    assert open_source(other / "x.jsonl")[0].images == (other / "pictures" / "a.png",)


def test_links_out_of_folders_of_pictures(data):
    (data / "pictures" / "b.png").symlink_to(data.parent / "secret.png")
    source = open_source(data, "folders")
    assert source[0].caption == "pictures" and bad(source, 1).reason == "outside_folder"
    assert len(open_source(data, "folders", allow_outside=True)[1].images) == 1
    (data / "pictures" / "b.txt").write_text("B")
    assert bad(open_source(data / "pictures", "sidecar"), 1).reason == "outside_folder"


@pytest.mark.parametrize(("value", "told"), [
    ("https://example.org/a.png", "not fetched"),
    ("s3://bucket/a.png", "not fetched"),
    ("file:///etc/passwd", "not fetched"),
    ("a" * 5000, "base64 must be written as data:"),
    ("a\0b", "is not a path"),
    ([["a"]], "a list"),
    ({"path": None}, "must be a path or bytes, got None"),
    (3.5, "3.5"),
])  # fmt: skip
def test_values_that_are_no_pictures(tmp_path, value, told):
    error = bad(only(tmp_path, {"image": value, "caption": "A"}), 0)
    assert error.reason == "missing_image" and told in error.detail


def test_special_files_as_sources(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    for path in (tmp_path / "a.jsonl", tmp_path, tmp_path / "*.jsonl"):
        with pytest.raises(ValueError, match=r"a.jsonl is a FIFO, not a regular file"):
            open_source(path, "text")
    for name in ("a.tar", "a.parquet", "a.txt", "a.json"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} is a FIFO, not a regular file"):
            open_source(tmp_path / name)
    with pytest.raises(ValueError, match="/dev/zero is a device, not a regular file"):
        open_source("/dev/zero", "text")
