"""Preparing and reading prepared folders."""

import dataclasses
import errno
import json
import os
import threading

import jax
import numpy as np
import pytest
from PIL import Image

from examples.tiny.tokenizer import write_tokenizer
from janus_jax.config import get_preset
from janus_jax.model.janus import Janus
from janus_jax.processing.images import generation_pixels, open_image, understanding_pixels_uint8
from janus_jax.weights import checkpoint
from janus_jax.weights.torch_weights import abstract_params
from tests.handles import needs_sys
from tests.raw.test_sources import lines, png
from train import prepare as prepare_module
from train.data import shards
from train.data.fingerprints import params_fingerprint
from train.data.prepared import open_prepared
from train.prepare import main, prepare, vq_encoder
from train.raw.sources import RawSample, open_source

CONFIG = get_preset("janus_tiny")
CODES, SLOTS, SIDE = CONFIG.gen_vision.num_tokens, CONFIG.vision.num_patches, CONFIG.gen_vision.image_size


def encode(images):
    """Codes that depend on each image alone."""
    return (np.abs(images.reshape(len(images), CODES, -1)).sum(-1) * 7).astype(np.int32) % 512


# ---------------------------------------------------------------- preparing


OPTIONS = {"shard_size": 6, "batch_size": 4, "max_bad_share": 0.1, "context": 100, "progress": False}


def run(source, out, processor, kind="generation", **options):
    extra = {"encode": encode} if kind == "generation" else {}
    return prepare(open_source(source), out, kind, processor, **(extra | OPTIONS | options))


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_generation(captions, processor, tmp_path):
    report = run(captions, tmp_path / "out", processor)
    assert (report.read, report.kept) == (20, 18)
    assert report.dropped == {"undecodable_image": 1, "missing_image": 1}
    data = open_prepared(tmp_path / "out")
    kept = [i for i in range(20) if i not in (3, 9)]
    assert len(data) == 18 and data.kind == "generation"
    assert data.lengths.dtype == data.images.dtype == np.int32 and not data.images.any()
    for index, i in enumerate(kept):
        sample = data[index]
        pixels = generation_pixels(captions.parent / f"{i}.png", SIDE)
        np.testing.assert_array_equal(sample.codes, encode(pixels[None])[0])
        assert sample.ids.tolist() == processor.text_to_image_prompt(f"Cat {i}. Tall.")
        assert sample.short_ids.tolist() == processor.text_to_image_prompt(f"Cat {i}.")
        assert sample.length == data.lengths[index]
    assert report.tokens == data.lengths.sum()
    dropped = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert [one["place"] for one in dropped] == [f"{captions}:4", f"{captions}:10"]
    for text in ("read", "undecodable_image", "missing_image", "mean length"):
        assert text in str(report)
    assert sorted(content(tmp_path / "out")) == [
        *(f"data-0000{i}.bag" for i in range(4)), "dropped.jsonl", "ends.npy", "images.npy", "lengths.npy",
        "prepared.json", "tokenizer.json",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["generation", "understanding"])
def test_bytes_do_not_depend_on_workers(captions, processor, tmp_path, kind):
    for workers in (1, 5):
        run(captions, tmp_path / str(workers), processor, kind, workers=workers)
    assert content(tmp_path / "1") == content(tmp_path / "5")
    assert open_prepared(tmp_path / "1").fingerprint == open_prepared(tmp_path / "5").fingerprint


@pytest.mark.parametrize("stop_at", [0, 1, 8, 13, 19])
def test_a_stopped_preparation_goes_on_to_the_same_bytes(captions, processor, tmp_path, monkeypatch, stop_at):
    run(captions, tmp_path / "whole", processor)
    source, reads = open_source(captions), []

    class Stopping:
        description = source.description

        def __len__(self):
            return len(source)

        def __getitem__(self, item):
            if threading.current_thread() is threading.main_thread():
                return source[item]  # a look at a few samples beforehand
            reads.append(item)
            if item == stop_at and len(reads) < 21:
                raise KeyboardInterrupt
            return source[item]

    out, options = tmp_path / "out", OPTIONS | {"encode": encode, "workers": 1}
    with pytest.raises(KeyboardInterrupt):
        prepare(Stopping(), out, "generation", processor, **options)
    with pytest.raises(ValueError, match=r"is unfinished; run the same `python -m train.prepare` again"):
        open_prepared(out)
    whole = stop_at // 6
    assert len(list(out.glob("data-*.json"))) == whole
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.bag")}
    reads[:] = range(100)
    report = prepare(Stopping(), out, "generation", processor, **options)
    assert len(reads) == 100 + 20 - 6 * whole
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert report.read == 20 and report.dropped == {"undecodable_image": 1, "missing_image": 1}
    assert content(out) == content(tmp_path / "whole")

    # A finished folder is left alone, but for what a kill at the very end may have left.
    (out / "data-00000.json").write_text("{}")
    assert prepare(Stopping(), out, "generation", processor, **options) == report
    assert len(reads) == 120 - 6 * whole
    assert content(out) == content(tmp_path / "whole")


def test_other_settings_into_the_same_folder_are_refused(captions, processor, tmp_path):
    run(captions, tmp_path / "out", processor)
    with pytest.raises(ValueError, match=r"begun with other settings \(context 100, now 200\); choose another folder"):
        run(captions, tmp_path / "out", processor, context=200)
    with pytest.raises(ValueError, match="vq '', now 'ab'"):
        run(captions, tmp_path / "out", processor, vq_fingerprint="ab")
    with pytest.raises(ValueError, match="kind 'generation', now 'understanding'"):
        run(captions, tmp_path / "out", processor, "understanding")
    lines(captions, {"image": "0.png", "caption": "A"})
    with pytest.raises(ValueError, match=r"source.samples 20, now 1"):
        run(captions, tmp_path / "out", processor)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="mine has other files"):
        run(captions, tmp_path / "mine", processor)
    with pytest.raises(ValueError, match=r"thesis.tex is a file"):
        run(captions, tmp_path / "mine" / "thesis.tex", processor)


def test_folders_of_before_schemas_are_the_same_preparation(captions, processor, tmp_path):
    """They call the schema a format; what is read is what their probe says."""
    report = run(captions, tmp_path / "out", processor)
    path = tmp_path / "out" / "prepared.json"
    meta = json.loads(path.read_text())
    source = meta["settings"]["source"]
    assert (source.pop("schema"), source["format"]) == ("captions", "json")
    source["format"] = "captions"
    path.write_text(json.dumps(meta))
    assert run(captions, tmp_path / "out", processor) == report


def test_the_platform_of_the_codes_is_recorded(captions, processor, tmp_path, capsys):
    """Begun on one platform, gone on with on another: noted, and no error."""
    run(captions, tmp_path / "out", processor)
    path = tmp_path / "out" / "prepared.json"
    meta = json.loads(path.read_text())
    assert meta["settings"]["encoded_on"] == {"platform": "cpu", "precision": "float32"}
    assert "was begun on" not in capsys.readouterr().err
    meta["settings"]["encoded_on"]["platform"], meta["finished"] = "tpu", False
    path.write_text(json.dumps(meta))
    run(captions, tmp_path / "out", processor)
    assert "was begun on tpu; the remaining codes are made on cpu" in capsys.readouterr().err
    meta["settings"]["encoded_on"]["precision"] = "bfloat16"
    path.write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="was begun with codes computed in bfloat16, now float32; codes of one folder"):
        run(captions, tmp_path / "out", processor)


def test_codes_of_damaged_weights_are_refused(captions, processor, tmp_path):
    with pytest.raises(ValueError, match="the VQ encoder's values are not finite"):
        run(captions, tmp_path / "out", processor, encode=lambda images: np.full((len(images), CODES), -1, np.int32))


def test_too_many_bad_samples(captions, processor, tmp_path):
    with pytest.raises(ValueError, match=r"2 of 20 samples are bad, more than max_bad_share 0.05: 1 undecodable_image"):
        run(captions, tmp_path / "out", processor, max_bad_share=0.05)
    # Allowing more is no other setting: it goes on from there.
    assert run(captions, tmp_path / "out", processor, max_bad_share=0.1).kept == 18


def test_what_was_missing_may_come(captions, processor, tmp_path):
    """The complaint was repeated word for word, out of the index of a finished shard."""
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"1 undecodable_image .*1 missing_image"):
        run(captions, out, processor, max_bad_share=0.05)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.bag")}
    assert len(before) == 4
    (captions.parent / "9.png").write_bytes(png())
    # Still damaged, and within what is allowed now: the shard of the damaged one stays as it is.
    report = run(captions, out, processor, max_bad_share=0.05)
    assert (report.kept, report.pictures, report.dropped) == (19, 19, {"undecodable_image": 1}) and not report.changed
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.bag")}
    assert [name for name in sorted(after) if after[name] != before[name]] == ["data-00001.bag"]
    run(captions, tmp_path / "fresh", processor)
    assert content(out) == content(tmp_path / "fresh")
    # A finished folder may be in use: it is left alone, and says that it lacks something.
    (captions.parent / "3.png").write_bytes(png())
    report = run(captions, out, processor)
    assert report.changed == 1 and "1 of the dropped samples would be treated differently now" in str(report)
    assert content(out) == content(tmp_path / "fresh")


def test_pictures_are_counted(captions, processor, tmp_path):
    assert run(captions, tmp_path / "a", processor, "understanding").pictures == 18
    talk = [{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "Ho"}]
    text = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    records = [{"image": ["0.png", "1.png"], "conversations": talk}, {"conversations": text}]
    records += [{"video": "a.mp4", "conversations": text}, {"image": "../a.png", "conversations": talk}]
    options = {"max_bad_share": 0.5, "context": 200}
    path = lines(captions.parent / "talk.jsonl", *records)
    report = run(path, tmp_path / "b", processor, "understanding", **options)
    assert (report.kept, report.pictures) == (2, 2)
    assert report.dropped == {"unsupported_media": 1, "outside_folder": 1}
    assert "images kept                             2" in str(report)
    assert run(path, tmp_path / "b", processor, "understanding", **options) == report


def test_bad_data_stops_early(processor, tmp_path):
    path = lines(tmp_path / "t.jsonl", *({"text": "Fine."} if i < 50 else {"text": ""} for i in range(1000)))
    with pytest.raises(
        ValueError, match=rf"50 of 100 samples are bad, .*50 empty \(first: {path}:51: there is no text"
    ):
        run(path, tmp_path / "out", processor, "text", max_bad_share=0.4)


def test_text_of_several_samples_an_item(processor, tmp_path):
    path = lines(tmp_path / "t.jsonl", *({"text": "The quick brown fox. " * n} for n in (1, 30, 2)))
    report = run(path, tmp_path / "out", processor, "text", shard_size=2)
    data = open_prepared(tmp_path / "out")
    assert report.read == 3 and report.kept == len(data) > 4
    assert max(data.lengths) <= 100


def test_a_shard_of_bad_samples_only(processor, tmp_path):
    path = lines(tmp_path / "t.jsonl", *({"text": t} for t in ("", "", "One.", "", "", "")))
    run(path, tmp_path / "out", processor, "text", shard_size=2, max_bad_share=0.9)
    assert len(open_prepared(tmp_path / "out")) == 1
    run(path, tmp_path / "none", processor, "text", context=50, shard_size=6, max_bad_share=1)
    lines(path, {"text": ""})
    run(path, tmp_path / "empty", processor, "text", max_bad_share=1)
    with pytest.raises(ValueError, match=r"empty is empty: no sample was kept, see dropped.jsonl"):
        open_prepared(tmp_path / "empty")


def test_a_list_of_samples_is_a_source(processor, tmp_path):
    source = [RawSample(f"digit {i}", caption=str(i), images=(png(),)) for i in range(3)]
    assert prepare(source, tmp_path / "out", "generation", processor, encode=encode, context=100).kept == 3
    other = [dataclasses.replace(raw, images=(png((0, 0, 0)),)) for raw in source]
    with pytest.raises(ValueError, match=r"begun with other settings \(source.probe"):
        prepare(other, tmp_path / "out", "generation", processor, encode=encode, context=100)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"encode": None}, "needs encode"),
        ({"workers": 0}, "must be at least 1"),
        ({"max_bad_share": 5}, "between 0 and 1"),
        (
            {"encode": lambda images: np.zeros((4, 3), np.int32)},
            r"encode gave int32 \[4, 3\], expected integers \[4, 16\]",
        ),
        ({"encode": lambda images: np.zeros((4, CODES), np.float32)}, "encode gave float32"),
    ],
)
def test_bad_arguments(captions, processor, tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        prepare(
            open_source(captions), tmp_path / "out", "generation", processor, **({"encode": encode} | OPTIONS | options)
        )
    with pytest.raises(ValueError, match="the source is empty"):
        prepare([], tmp_path / "out", "text", processor)


def test_a_full_disk_is_noticed(captions, processor, tmp_path, monkeypatch):
    class Full(shards.BagWriter):
        def write(self, record):
            super().write(record)
            if len(self.ends) == 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards, "BagWriter", Full)
    with pytest.raises(OSError, match="No space left"):
        run(captions, tmp_path / "out", processor)
    monkeypatch.undo()
    run(captions, tmp_path / "out", processor)
    run(captions, tmp_path / "whole", processor)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_pictures_stored_as_the_model_sees_them(processor, tmp_path):
    """Bit for bit the pixels of the originals, whatever their size, colors and orientation."""
    folder, rng = tmp_path / "data", np.random.default_rng(0)
    folder.mkdir()
    shapes = {"a.jpg": (300, 200, 3), "b.png": (40, 700, 4), "c.png": (20, 30), "d.webp": (64, 64, 3)}
    for name, shape in shapes.items():
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / name)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(rng.integers(0, 256, (90, 160, 3), dtype=np.uint8)).save(folder / "e.jpg", exif=turned)
    names = [*shapes, "e.jpg"]
    path = lines(folder / "c.jsonl", *({"image": name, "caption": f"Cat {name}."} for name in names))
    run(path, tmp_path / "out", processor, "understanding", store="resized")
    data, settings = open_prepared(tmp_path / "out"), processor.settings
    for index, name in enumerate(names):
        (stored,) = data[index].images
        assert stored.startswith(b"\x89PNG")
        assert open_image(stored).size == (settings.image_size, settings.image_size)
        expected = understanding_pixels_uint8(folder / name, settings)
        np.testing.assert_array_equal(understanding_pixels_uint8(stored, settings), expected)
    assert data.meta["settings"]["resized"] == [settings.image_size, settings.min_size, 127, 127, 127]
    with pytest.raises(ValueError, match=r"begun with other settings \(resized"):
        run(path, tmp_path / "out", processor, "understanding")
    with pytest.raises(ValueError, match="unknown store 'tiny'; known: original, resized"):
        run(path, tmp_path / "new", processor, "understanding", store="tiny")


# ---------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("model"), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), abstract_params(CONFIG))
    checkpoint.save(folder, CONFIG, params)
    write_tokenizer(folder, image_size=CONFIG.vision.image_size)
    return folder, params


def test_command_line(captions, model_folder, tmp_path, capsys):
    folder, params = model_folder
    command = ["--kind", "generation", "--source", str(captions), "--model", str(folder), "--batch-size", "8"]
    assert main([*command, "--out", str(tmp_path / "out"), "--max-bad-share", "0.1"]) == 0
    printed = capsys.readouterr()
    assert "kept                                   18" in printed.out and not printed.err
    why = "by its ending .jsonl, and it has the fields image, caption"
    assert f"{captions} is read as captions in json ({why}): 20 samples" in printed.out
    assert "images kept                            18" in printed.out
    data = open_prepared(tmp_path / "out")
    pixels = np.stack([generation_pixels(captions.parent / f"{i}.png", SIDE) for i in range(3)])
    encode_codes = jax.jit(lambda images: Janus(CONFIG).apply({"params": params}, images, method="encode_codes"))
    np.testing.assert_array_equal([data[i].codes for i in range(3)], encode_codes(pixels))
    assert data.meta["settings"]["vq"] == params_fingerprint({"gen_vision_model": params["gen_vision_model"]})
    assert vq_encoder(folder)[1] == data.meta["settings"]["vq"]

    command[1] = "understanding"
    assert main([*command, "--out", str(tmp_path / "strict")]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: 2 of 20 samples are bad") and printed.err.count("\n") == 1


def test_allowing_paths_that_lead_outside(captions, model_folder, tmp_path, capsys):
    (tmp_path / "secret.png").write_bytes(png())
    path = lines(captions.parent / "o.jsonl", {"image": "../secret.png", "caption": "Ä \u0416"})
    command = ["--kind", "understanding", "--source", str(path), "--model", str(model_folder[0])]
    command += ["--out", str(tmp_path / "out")]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert "1 outside_folder" in told and "--allow-outside" in told and told.count("\n") == 1
    assert main([*command, "--allow-outside"]) == 0
    assert "images kept                             1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"--source": "data/cc.jsonl"}, "did you mean data/c.jsonl?"),
        ({"--model": "nowhere"}, "nowhere is neither a folder nor a hub id"),
        ({"--context": "3"}, "context must be at least"),
        ({"--names": "data/c.jsonl"}, "names are for the format folders"),
        pytest.param({"--out": "/sys/out"}, "/sys/out: ", marks=needs_sys),
    ],
)
def test_command_line_errors(captions, model_folder, tmp_path, monkeypatch, capsys, change, match):
    monkeypatch.chdir(tmp_path)
    options = {"--kind": "understanding", "--source": "data/c.jsonl", "--model": str(model_folder[0]), "--out": "out"}
    assert main([word for option in (options | change).items() for word in option]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and match in printed.err and printed.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_interrupting_says_how_to_go_on(captions, model_folder, tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module.Job, "join", interrupted)
    options = ["--source", str(captions), "--model", str(model_folder[0]), "--out", str(tmp_path / "out")]
    assert main(["--kind", "understanding", *options]) == 130
    assert "run the same command to continue from here" in capsys.readouterr().err
