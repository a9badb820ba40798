"""Pairs of pictures of which one is preferred: read, prepared like all data, dropped by name, and looked at."""

from __future__ import annotations

import base64
import io
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from examples.tiny.run import random_params, write_checkpoint
from examples.tiny.tokenizer import write_tokenizer
from janus_jax.model.janus import Janus
from janus_jax.processing.images import generation_pixels
from janus_jax.sampling.images import decode_images
from tests.data.test_prepare import CODES, CONFIG, SIDE, content, encode
from tests.raw.test_sources import bad, lines, png
from train import inspect
from train.config import DataConfig
from train.data.fingerprints import VQ
from train.data.mixture import open_kind
from train.data.prepared import open_prepared
from train.data.samples import Sample
from train.fleet.shares import Part
from train.prepare import main, prepare
from train.raw.sources import RawSample, open_source

OPTIONS = {"batch_size": 4, "context": 100, "progress": False, "encode": encode}


def color(i):
    return (i * 12, 255 - i * 12, 90)


def prompt(i):
    return f"Cat {i}. Tall."


@pytest.fixture
def pairs(tmp_path):
    """Twenty pairs of pictures, of which the fourth lacks one file, and the tenth one name; the last is not decided."""
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.png").write_bytes(png(color(i), (20 + i, 30)))
        (folder / f"{i}b.png").write_bytes(png(color(19 - i), (30, 20 + i)))
    (folder / "3b.png").unlink()
    records = [{"prompt": prompt(i), "chosen": f"{i}.png", "rejected": f"{i}b.png"} for i in range(20)]
    records[9]["chosen"] = None
    return lines(folder / "pairs.jsonl", *records)


def run(source, out, processor, **options):
    return prepare(open_source(source), out, "preference", processor, **(OPTIONS | {"max_bad_share": 0.1} | options))


def test_prepared(pairs, processor, tmp_path):
    report = run(pairs, tmp_path / "out", processor)
    assert (report.read, report.kept, report.pictures, report.dropped) == (20, 18, 36, {"missing_image": 2})
    assert str(open_source(pairs)).endswith(
        "is read as pairs in json (by its ending .jsonl, and it has the fields prompt, chosen, rejected): 20 samples"
    )
    data = open_prepared(tmp_path / "out")
    assert (data.kind, len(data), data.meta["settings"]["image_size"]) == ("preference", 18, SIDE)
    kept = [i for i in range(20) if i not in (3, 9)]
    for sample, i in zip((data[index] for index in range(18)), kept, strict=True):
        for codes, name in ((sample.codes, f"{i}.png"), (sample.rejected, f"{i}b.png")):
            np.testing.assert_array_equal(codes, encode(generation_pixels(pairs.parent / name, SIDE)[None])[0])
        assert sample.ids.tolist() == processor.text_to_image_prompt(prompt(i))
        assert sample.kind == "preference" and not len(sample.short_ids) and not sample.answers.any()
        assert sample.length == 2 * (len(sample.ids) + CODES - 1)
    assert data.lengths.tolist() == [data[index].length for index in range(18)]
    dropped = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert [one["place"] for one in dropped] == [f"{pairs}:4", f"{pairs}:10"]
    assert dropped[0]["detail"] == f"rejected: {pairs.parent}/3b.png: no such image file"
    assert dropped[1]["detail"] == "chosen: an image must be a path or bytes, got None"
    assert run(pairs, tmp_path / "out", processor) == report


def test_bytes_depend_neither_on_batches_nor_on_workers_nor_on_parts(pairs, processor, tmp_path):
    run(pairs, tmp_path / "whole", processor, shard_size=6)
    whole = content(tmp_path / "whole")
    for size in (1, 2, 3, 7):
        run(pairs, tmp_path / str(size), processor, shard_size=6, batch_size=size, workers=size)
        assert content(tmp_path / str(size)) == whole
    for index in (1, 0):
        report = run(pairs, tmp_path / "parts", processor, shard_size=6, part=Part(index, 2), max_bad_share=0.3)
    assert content(tmp_path / "parts") == whole and report.pictures == 36


def test_a_stopped_preparation_goes_on(pairs, processor, tmp_path):
    run(pairs, tmp_path / "whole", processor, shard_size=6)
    count = 0

    def stopping(images):
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt
        return encode(images)

    with pytest.raises(KeyboardInterrupt):
        run(pairs, tmp_path / "out", processor, shard_size=6, encode=stopping)
    assert 1 <= len(list((tmp_path / "out").glob("data-*.json"))) < 4
    run(pairs, tmp_path / "out", processor, shard_size=6)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_pick_a_pic(processor, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    labels = [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.7, 0.3), (None, 1.0)]
    rows = [
        {
            "are_different": True,
            "best_image_uid": "u",
            "caption": f"c{i}",
            "has_label": True,
            "image_0_uid": "u",
            "image_0_url": "https://x/0.png",
            "image_1_uid": "v",
            "image_1_url": "https://x/1.png",
            "jpg_0": png((i, 0, 0)),
            "jpg_1": png((i, 255, 0)),
            "label_0": first,
            "label_1": second,
            "model_0": "a",
            "ranking_id": i,
        }
        for i, (first, second) in enumerate(labels)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet")
    assert source.description["schema"] == "pairs"
    assert source[0].prompt == "c0" and source[0].images == (png((0, 0, 0)), png((0, 255, 0)))
    assert source[1].images == (png((1, 255, 0)), png((1, 0, 0)))
    assert bad(source, 2).reason == "no_preference"
    assert bad(source, 3).detail == "label_0 and label_1 must be 1 and 0, got 0.7, 0.3"
    assert bad(source, 4).detail == "no label_0 and label_1, which say which image is preferred"

    report = run(tmp_path / "a.parquet", tmp_path / "out", processor, max_bad_share=0.6)
    assert (report.kept, report.dropped) == (2, {"no_preference": 1, "ambiguous_sample": 1, "missing_field": 1})
    for sample, pictures in zip(open_prepared(tmp_path / "out"), (source[0].images, source[1].images), strict=False):
        expected = encode(np.stack([generation_pixels(picture, SIDE) for picture in pictures]))
        np.testing.assert_array_equal([sample.codes, sample.rejected], expected)


def test_both_pictures_as_the_datasets_library_has_them(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"prompt": "x", "chosen": {"bytes": png(), "path": "a.png"}, "rejected": {"bytes": None, "path": "b.png"}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert open_source(tmp_path / "a.parquet")[0].images == (png(), tmp_path / "b.png")


PAIR = {"prompt": "x", "chosen": "a.png", "rejected": "b.png"}
BAD = {
    "one picture": (PAIR | {"rejected": ""}, "missing_image", "rejected: an image must be a path or bytes, got ''"),
    "outside": (PAIR | {"rejected": "../b.png"}, "outside_folder", "rejected: ../b.png is outside"),
    "no prompt": ({"chosen": "a.png", "rejected": "b.png"}, "missing_field", "no prompt or caption"),
    "two prompts": (PAIR | {"caption": "y"}, "ambiguous_sample", "the prompt and the caption are different"),
    "an answer": (PAIR | {"images": ["c.png"]}, "ambiguous_sample", "found chosen, rejected, images"),
    "a list": (PAIR | {"chosen": [{"role": "user"}]}, "missing_image", "chosen: an image must be a path or bytes"),
    "two pairs": (PAIR | {"jpg_0": "c.png"}, "ambiguous_sample", "found chosen, rejected, jpg_0, jpg_1"),
    "a film": (PAIR | {"video": "c.mp4"}, "unsupported_media", "the field video"),
    "labels": (
        {"prompt": "x", "jpg_0": "a.png", "jpg_1": "b.png", "label_0": True, "label_1": False},
        "ambiguous_sample",
        "must be 1 and 0, got True, False",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_records_that_are_no_pair(tmp_path, name):
    record, reason, detail = BAD[name]
    error = bad(open_source(lines(tmp_path / "a.jsonl", record), schema="pairs"), 0)
    assert error.reason == reason and detail in error.detail


def test_a_prompt_and_a_caption_that_agree(tmp_path):
    assert open_source(lines(tmp_path / "a.jsonl", PAIR | {"caption": "x"}))[0].prompt == "x"


def test_pairs_that_cannot_be_trained_on(processor, tmp_path):
    red, blue = png((200, 0, 0)), png((0, 0, 200))
    samples = [
        RawSample("good", prompt="x", images=(red, blue)),
        RawSample("empty", prompt=" ", images=(red, blue)),
        RawSample("long", prompt="cat " * 200, images=(red, blue)),
        RawSample("same", prompt="x", images=(red, red)),
        RawSample("damaged", prompt="x", images=(red, blue[:40])),
        RawSample("tag", prompt="x<image_placeholder>", images=(red, blue)),
        RawSample("caption", caption="x", images=(red,)),
    ]
    report = prepare(samples, tmp_path / "out", "preference", processor, **OPTIONS, max_bad_share=1.0)
    dropped = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert {one["place"]: one["reason"] for one in dropped} == {
        "empty": "empty",
        "long": "too_long",
        "same": "same_images",
        "damaged": "undecodable_image",
        "tag": "special_token_in_text",
        "caption": "missing_field",
    }
    details = {one["place"]: one["detail"] for one in dropped}
    assert details["damaged"].startswith("rejected: ")
    assert details["caption"] == "preference needs a prompt with a chosen and a rejected image"
    assert report.kept == 1
    # The other way round: pairs are no pictures to draw.
    with pytest.raises(ValueError, match="good: generation needs a caption with its image"):
        prepare(samples[:1], tmp_path / "gen", "generation", processor, **OPTIONS)


def test_a_run_is_told_where_they_belong(pairs, processor, tmp_path):
    run(pairs, tmp_path / "out", processor)
    with pytest.raises(ValueError, match=r"has preference samples but is listed in data.generation; list it in dpo"):
        open_kind(str(tmp_path / "out"), "generation", DataConfig())


def test_samples_of_other_kinds_are_stored_as_before():
    sample = Sample("generation", np.array([1, 2], np.int32), np.zeros(2, bool), codes=np.arange(3, dtype=np.int32))
    assert b"rejected" not in sample.to_bytes() and not len(Sample.from_bytes(sample.to_bytes()).rejected)


# ---------------------------------------------------------------- the command, and looking at them


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint and two pairs, prepared by the command."""
    folder = tmp_path_factory.mktemp("made")
    model = write_checkpoint(folder / "model", CONFIG)
    write_tokenizer(model, image_size=CONFIG.vision.image_size)
    for i in range(4):
        (folder / f"{i}.png").write_bytes(png(color(5 * i)))
    source = lines(folder / "a.jsonl", *({**PAIR, "chosen": f"{i}.png", "rejected": f"{i + 1}.png"} for i in (0, 2)))
    options = {"--kind": "preference", "--source": source, "--model": model, "--out": folder / "out", "--batch-size": 8}
    assert main([str(word) for option in options.items() for word in option]) == 0
    return folder


def test_the_command_says_what_it_kept(made, capsys):
    assert main(["--merge", "--out", str(made / "out")]) == 0
    said = capsys.readouterr().out
    assert "(preference)" in said and re.search(r"images kept +4\n", said)


def test_inspected(made, capsys):
    assert inspect.main([str(made / "out"), "--json"]) == 0
    first, _ = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (first["kind"], first["codes"], first["trained_tokens"]) == ("preference", 2 * CODES, 2 * CODES)
    assert first["text"].endswith("<|User|>: x\n\n<|Assistant|>:<codes>")
    assert inspect.main([str(made / "out")]) == 0
    said = capsys.readouterr().out
    assert f"  chosen codes: {CODES}, " in said and f"  rejected codes: {CODES}, " in said


@pytest.mark.parametrize("vq", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_page_shows_both_pictures(made, capsys, vq):
    page = made / f"page{vq}.html"
    assert inspect.main([str(made / "out"), "--html", str(page), *(["--vq", str(made / "model")] if vq else [])]) == 0
    text = page.read_text()
    found = re.findall(r"<img ([^>]*)><figcaption>([^<]*)<", text)
    assert [told.split(",")[0] for _, told in found] == [f"{CODES} chosen codes", f"{CODES} rejected codes"] * 2
    assert all(("class='codes'" in about) != vq for about, _ in found)
    assert f"<span class='mark'>{CODES} chosen codes, {CODES} rejected codes</span>" in text
    if vq:
        # The very pictures of the codes.
        data, model = open_prepared(made / "out"), Janus(CONFIG, dtype=jnp.float32)
        codes = jnp.stack([data[0].codes, data[0].rejected])
        expected = decode_images(model, {VQ: random_params(CONFIG)[VQ]}, codes)[0]
        for (about, _), picture in zip(found, expected, strict=False):
            file = base64.b64decode(re.search(r"base64,([^']*)'", about)[1])
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(file))), picture)


def test_pictures_of_another_model_are_not_shown(made, capsys, tmp_path):
    other = write_checkpoint(tmp_path / "other", CONFIG, seed=1)
    page = ["--html", str(tmp_path / "page.html")]
    assert inspect.main([str(made / "out"), *page, "--vq", str(other)]) == 2
    assert "was encoded by another VQ model than that of" in capsys.readouterr().err
    assert inspect.main([str(made / "out"), "--vq", str(other)]) == 2
    assert "--vq shows codes as images on a page; add --html FILE" in capsys.readouterr().err
