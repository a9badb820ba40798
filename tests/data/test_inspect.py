"""Looking at prepared data: what is printed, as JSON and as a page."""

import html.parser
import json

import numpy as np
import pytest

from examples.tiny.run import MODEL, encode, write_checkpoint
from examples.tiny.tokenizer import write_tokenizer
from janus_jax.processing.chat import Processor
from tests.raw.test_sources import lines, png
from train.inspect import main
from train.prepare import prepare
from train.raw.sources import RawSample, open_source

CONTEXT = 256


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> Processor:
    vision = MODEL.vision
    folder = write_tokenizer(
        tmp_path_factory.mktemp("tokenizer"), image_size=vision.image_size, num_image_tokens=vision.num_patches
    )
    return Processor.from_folder(folder, MODEL)


def prepared(samples, folder, kind, processor, **options):
    extra = {"encode": encode} if kind == "generation" else {}
    prepare(samples, folder, kind, processor, context=CONTEXT, batch_size=2, progress=False, **extra, **options)
    return str(folder)


@pytest.fixture(scope="module")
def understanding(tmp_path_factory, processor) -> str:
    folder = tmp_path_factory.mktemp("und")
    (folder / "a.png").write_bytes(png((200, 0, 0), (20, 30)))
    (folder / "b.png").write_bytes(png((0, 0, 200), (40, 10)))
    turns = [
        {"from": "human", "value": "<image><image>\nWhich is <b>red</b>?\x1b[31m"},
        {"from": "gpt", "value": "The first."},
        {"from": "human", "value": "And 猫?"},
        {"from": "gpt", "value": "</pre><script>alert(1)</script> ünï 🙂"},
    ]
    path = lines(
        folder / "d.jsonl",
        {"image": ["a.png", "b.png"], "conversations": turns},
        {"image": "b.png", "conversations": [turns[0] | {"value": "What is it?\n<image>"}, turns[1]]},
    )
    return prepared(open_source(path), folder / "out", "understanding", processor, system_prompt="Be kind.")


def shown(capsys, *arguments, code: int = 0) -> str:
    assert main([str(argument) for argument in arguments]) == code
    return capsys.readouterr().out


def as_json(capsys, *arguments) -> list[dict]:
    return [json.loads(line) for line in shown(capsys, *arguments, "--json").splitlines()]


def test_json_of_a_conversation(understanding, capsys):
    first, second = as_json(capsys, understanding)
    assert first["text"] == (
        "<｜begin▁of▁sentence｜>Be kind.\n\n<|User|>: <image><image>\nWhich is <b>red</b>?\x1b[31m\n\n<|Assistant|>:"
        " The first.<｜end▁of▁sentence｜><|User|>: And 猫?\n\n<|Assistant|>: </pre><script>alert(1)</script> ünï 🙂"
        "<｜end▁of▁sentence｜>"
    )
    assert first["answers"] == ["The first.", "</pre><script>alert(1)</script> ünï 🙂"]
    assert [first["text"][begin:end] for begin, end in first["spans"]] == [
        " The first.<｜end▁of▁sentence｜>", " </pre><script>alert(1)</script> ünï 🙂<｜end▁of▁sentence｜>"
    ]  # fmt: skip
    assert (first["kind"], first["images"], first["codes"], first["index"]) == ("understanding", 2, 0, 0)
    assert first["place"].endswith("d.jsonl:1") and second["place"].endswith("d.jsonl:2")
    assert second["images"] == 1 and "What is it?\n<image>\n\n<|Assistant|>" in second["text"]
    assert [one["index"] for one in as_json(capsys, understanding, "--n", 1)] == [0]
    assert len(as_json(capsys, understanding, "--random", 3, "--n", 1)) == 1


def test_json_of_the_other_kinds(tmp_path, processor, capsys):
    drawings = [RawSample("tar/a", caption="A cat. It sits.", images=(png(),)), RawSample("b", "x", caption="A dog.")]
    drawings[1] = RawSample("tar/\udcff\nb", caption="A dog.", images=(png(),))
    generation = prepared(drawings, tmp_path / "gen", "generation", processor)
    cat, dog = as_json(capsys, generation)
    assert cat["text"] == "<｜begin▁of▁sentence｜><|User|>: A cat. It sits.\n\n<|Assistant|>:<codes>"
    assert cat["short_text"].startswith("<｜begin▁of▁sentence｜><|User|>: A cat.\n") and dog["short_text"] == ""
    assert (cat["codes"], cat["images"], cat["answers"]) == (MODEL.gen_vision.num_tokens, 0, [])
    assert cat["spans"] == [[len(cat["text"]) - len("<codes>"), len(cat["text"])]]
    assert cat["place"] == "tar/a" and dog["place"] == "tar/?\nb"

    texts = [RawSample("book:1", text="A red circle.")]
    texts.append(
        RawSample("chat:1", messages=[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}])
    )
    text = prepared(texts, tmp_path / "text", "text", processor, system_prompt="")
    book, chat = as_json(capsys, text)
    assert book["text"] == "<｜begin▁of▁sentence｜>A red circle.<｜end▁of▁sentence｜>"
    assert (book["answers"], book["images"], book["codes"]) == (["A red circle."], 0, 0)
    assert chat["answers"] == ["Yes."] and book["trained_tokens"] == book["tokens"]


def test_text_for_a_terminal(understanding, capsys):
    out = shown(capsys, understanding, "--n", 1)
    assert "sample 0: understanding" in out and "d.jsonl:1" in out
    assert "image 1: 20 x 30" in out and "image 2: 40 x 10" in out
    assert "[[ The first.<｜end▁of▁sentence｜>]]" in out
    assert "\x1b" not in out and r"\x1b[31m" in out


class Page(html.parser.HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags, self.sources, self.trained, self._within = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self._within.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        while self._within and self._within.pop() != tag:
            pass

    def handle_data(self, data):
        if "mark" in self._within and "pre" in self._within:
            self.trained.append(data)


def test_page(understanding, tmp_path, capsys):
    out = shown(capsys, understanding, "--html", tmp_path / "page.html")
    assert "page.html: 2 of 2 samples" in out
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags and page.tags.count("article") == 2 and page.tags.count("img") == 3
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert page.trained[0] == " The first.<｜end▁of▁sentence｜>"
    assert "</pre><script>alert(1)</script> ünï 🙂" in page.trained[1]
    assert "\x1b" not in text and "d.jsonl:1" in text
    assert not list(tmp_path.glob("*.partial"))
    assert len(as_json(capsys, understanding, "--html", tmp_path / "again.html")) == 2
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == text


def test_page_of_codes(tmp_path, processor, capsys):
    folder = prepared([RawSample("a", caption="A cat.", images=(png(),))], tmp_path / "gen", "generation", processor)
    shown(capsys, folder, "--html", tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.trained == [f"{MODEL.gen_vision.num_tokens} codes"] and page.tags.count("img") == 1


def refused(capsys, *arguments) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    return line


def test_a_folder_without_its_tokenizer_is_read_by_the_model_s(tmp_path, processor, capsys):
    folder = prepared([RawSample("a", text="A red circle.")], tmp_path / "text", "text", processor)
    expected = as_json(capsys, folder)
    (tmp_path / "text" / "tokenizer.json").unlink()
    assert "name the model that it was prepared for with --model" in refused(capsys, folder)
    model = write_checkpoint(tmp_path / "model")
    vision = MODEL.vision
    write_tokenizer(model, image_size=vision.image_size, num_image_tokens=vision.num_patches)
    assert as_json(capsys, folder, "--model", model) == expected
    other = write_checkpoint(tmp_path / "other")
    write_tokenizer(other, image_size=vision.image_size, num_image_tokens=vision.num_patches, vocab_size=390)
    assert "was prepared with another tokenizer than" in refused(capsys, folder, "--model", other)


def test_bad_input(understanding, tmp_path, processor, capsys):
    assert "not a prepared folder" in refused(capsys, tmp_path)
    assert "nowhere" in refused(capsys, tmp_path / "nowhere")
    assert "--n must be at least 1, got 0" in refused(capsys, understanding, "--n", 0)
    assert "No such file or directory" in refused(capsys, understanding, "--html", tmp_path / "no" / "page.html")
    texts = [RawSample(f"{i}", text=f"The quick brown fox {i}.") for i in range(3)]
    folder = prepared(texts, tmp_path / "text", "text", processor, shard_size=1)
    path = tmp_path / "text" / "data-00001.bag"
    raw = path.read_bytes()
    path.write_bytes(raw[:20] + bytes(byte ^ 255 for byte in raw[20:40]) + raw[40:])
    assert main([folder, "--json"]) == 2
    captured = capsys.readouterr()
    assert [json.loads(line)["index"] for line in captured.out.splitlines()] == [0, 2]
    assert "sample 1 is damaged" in captured.err


def test_samples_of_before_places_were_kept(tmp_path, processor, capsys, monkeypatch):
    import msgpack

    from train.data import samples

    whole = samples.msgpack.packb
    monkeypatch.setattr(
        msgpack, "packb", lambda fields: whole({key: value for key, value in fields.items() if key != "place"})
    )
    folder = prepared([RawSample("a", text="A red circle.")], tmp_path / "text", "text", processor)
    meta = json.loads((tmp_path / "text" / "prepared.json").read_text())
    (tmp_path / "text" / "prepared.json").write_text(json.dumps(meta | {"version": 1}))
    assert as_json(capsys, folder)[0]["place"] == ""
    assert "place: not kept" in shown(capsys, folder)
    assert np.load(tmp_path / "text" / "lengths.npy").shape == (1,)
