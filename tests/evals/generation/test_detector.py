"""Small random Mask2Former and CLIP in GenEval's pipeline: the arithmetic against oracles, and the command."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from evals import main
from evals.generation import detector, geneval, layouts
from evals.generation.detector import ColorClassifier, Detector
from evals.generation.geneval import CLASSES, Detection
from evals.tasks.geneval import GenEval, seen

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")

PROMPTS = [
    {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}], "prompt": "a photo of a red cat"},
    {"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}]}
    | {"prompt": "a photo of two dogs"},
]


@pytest.fixture(scope="module")
def mask2former():
    backbone = transformers.SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        dim_feedforward=16, encoder_layers=1, decoder_layers=1, num_attention_heads=2, num_queries=5, num_labels=80,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Mask2FormerForUniversalSegmentation(config)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder with a small CLIP and a tokenizer whose words are those of the colors' texts."""
    folder = tmp_path_factory.mktemp("clip")
    words = sorted({word for name in CLASSES for texts in geneval.color_texts(name) for text in texts for word in text})
    vocabulary = {word: number for number, word in enumerate([*words, "[UNK]", "[PAD]", "<start>", "<end>"])}
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[(each, vocabulary[each]) for each in ("<start>", "<end>")]
    )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {
        "bos_token_id": vocabulary["<start>"],
        "eos_token_id": vocabulary["<end>"],
        "pad_token_id": vocabulary["[PAD]"],
    }
    config = transformers.CLIPConfig(
        text_config={**sizes, **ids, "vocab_size": len(vocabulary), "max_position_embeddings": 77},
        vision_config={**sizes, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    torch.manual_seed(1)
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def small(monkeypatch):
    """A short side of 96 instead of 800 pixels."""
    monkeypatch.setattr(detector, "_SHORT", 96)


def test_classes():
    assert len(set(CLASSES)) == 80
    assert [CLASSES[n] for n in (0, 15, 64, 65, 66, 79)] == [
        *("person", "cat", "computer mouse", "tv remote", "computer keyboard", "toothbrush"),
    ]


@pytest.mark.parametrize(
    ("size", "expected"), [((384, 384), (800, 800)), ((384, 192), (1333, 667)), ((768, 1024), (800, 1067))]
)
def test_sizes_of_the_detector(size, expected):
    pixels = detector.detector_pixels(Image.new("RGB", size, (124, 116, 104)))
    assert pixels.shape == (expected[1], expected[0], 3)
    assert np.allclose(pixels, [(124 - 123.675) / 58.395, (116 - 116.28) / 57.12, (104 - 103.53) / 57.375])


def test_masks_become_detections():
    masks = torch.full((2, 4, 6), -2.0)
    masks[0, 1:3, 2:5] = 3.0
    masks[0, 2, 2] = 1.0
    classes = torch.zeros(2, 81)
    classes[0, 15], classes[1, 16] = 5.0, 4.0
    found = detector.detections(classes, masks)
    (best,) = [each for each in found["cat"] if each.score > 0.1]
    assert best.box == (2, 1, 5, 3) and best.mask.sum() == 6
    probability = np.exp(5) / (np.exp(5) + 80)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    assert best.score == pytest.approx(probability * (5 * sigmoid(3.0) + sigmoid(1.0)) / 6, rel=1e-5)
    # The second mask is empty: a box of zeros and no score, however sure its class is.
    empty = max(found["dog"], key=lambda each: each.mask.sum() == 0)
    assert (empty.box, empty.score) == ((0, 0, 0, 0), 0)
    assert sum(map(len, found.values())) == 100


@pytest.mark.slow
def test_the_detector_is_its_parts_in_order(mask2former, small):
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (40, 60, 3), np.uint8))
    found = Detector(mask2former)(image)
    pixels = detector.detector_pixels(image)
    assert pixels.shape == (96, 144, 3)
    padded = np.zeros((96, 160, 3), np.float32)
    padded[:, :144] = pixels
    with torch.no_grad():
        out = mask2former(pixel_values=torch.from_numpy(padded.transpose(2, 0, 1)[None]))
        resize = torch.nn.functional.interpolate
        masks = resize(out.masks_queries_logits, size=(96, 160), mode="bilinear")[..., :144]
        masks = resize(masks, size=(40, 60), mode="bilinear")[0].numpy()
        classes = out.class_queries_logits[0].softmax(-1)[:, :80].numpy()
    # Written out: the best hundred of the 400 pairs.
    pairs = sorted(((classes[q, c], q, c) for q in range(5) for c in range(80)), reverse=True)[:100]
    expected = {}
    for probability, query, label in pairs:
        mask = masks[query] > 0
        inside = (1 / (1 + np.exp(-masks[query])))[mask]
        value = probability * inside.sum() / (mask.sum() + 1e-6)
        expected.setdefault(CLASSES[label], []).append((value, mask.sum(), geneval.box_of(mask)))
    assert expected.keys() == found.keys()
    for name, objects in found.items():
        assert [each.score for each in objects] == pytest.approx([value for value, *_ in expected[name]], rel=1e-4)
        assert [(each.mask.sum(), each.box) for each in objects] == [tuple(rest) for _, *rest in expected[name]]


@pytest.mark.slow
def test_another_number_of_classes_is_refused():
    config = transformers.Mask2FormerConfig(num_labels=3)
    model = type("Model", (), {"config": config})()
    with pytest.raises(ValueError, match="the detector knows 3 classes, GenEval's are COCO's 80"):
        Detector(model)


@pytest.mark.slow
def test_missing_weights_are_refused(mask2former, tmp_path):
    """transformers would draw them at random, and figures would be of nothing."""
    mask2former.save_pretrained(tmp_path)
    weights = safetensors.load_file(tmp_path / "model.safetensors")
    weights.pop("class_predictor.bias")
    safetensors.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights, such as class_predictor.bias"):
        Detector.load(str(tmp_path))


@pytest.mark.slow
def test_pixels_of_clip_are_those_of_its_processor():
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (50, 75, 3), np.uint8)).resize((300, 200))
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    expected = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    difference = np.abs(detector.clip_pixels(image, 32) - expected)
    assert difference.max() < 0.05 and difference.mean() < 0.01
    assert detector.clip_pixels(image.crop((0, 0, 1, 40)), 32).shape == (32, 32, 3)


@pytest.mark.slow
def test_colors_are_those_of_transformers(clip):
    classifier = ColorClassifier.load(str(clip))
    random = np.random.default_rng(2)
    image = Image.fromarray(random.integers(0, 256, (40, 40, 3), np.uint8))
    objects = [Detection((x, x, x + 20, x + 12), 0.9) for x in (0, 5, 10, 15)]
    said = classifier(image, "cat", objects)
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip)
    pixels = np.stack([detector.clip_pixels(image.crop(each.box), 32).transpose(2, 0, 1) for each in objects])
    scores = np.zeros((4, 10))
    with torch.no_grad():
        for number, texts in enumerate(geneval.color_texts("cat")):
            units = []
            for text in texts:
                tokens = tokenizer([text], return_tensors="pt")
                out = model(input_ids=tokens["input_ids"], pixel_values=torch.from_numpy(pixels))
                units.append(out.text_embeds[0])
            mean = torch.stack(units).mean(0)
            scores[:, number] = (out.image_embeds @ (mean / mean.norm())).numpy()
    assert said == [geneval.COLORS[index] for index in scores.argmax(1)]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("drawn")
    random = np.random.default_rng(3)
    for number, prompt in enumerate(PROMPTS):
        pictures = [Image.fromarray(random.integers(0, 256, (24, 24, 3), np.uint8)) for _ in range(2)]
        layouts.write_geneval(root, number, prompt, pictures)
    return root


def score(out, pictures, *more):
    """The command on pictures that are there."""
    given = ["--tasks", "geneval", "--pictures", pictures, "--data", pictures, "--out", out, *more]
    return main.main([str(each) for each in given])


@pytest.mark.slow
def test_the_command(mask2former, clip, drawn, tmp_path, small, capsys):
    mask2former.save_pretrained(tmp_path / "detector")
    out, models = tmp_path / "out", ["--detector", tmp_path / "detector", "--clip", clip]
    assert score(out, drawn, *models) == 0
    exported = out / "geneval" / "export-transformers" / "results.jsonl"
    rows = [json.loads(line) for line in exported.read_text().splitlines()]
    names = [f"{number:05}/samples/{sample:05}.png" for number in (0, 1) for sample in (0, 1)]
    assert [row["filename"] for row in rows] == [str(drawn / name) for name in names]
    assert [json.loads(row["metadata"]) for row in rows] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    # Random weights find nothing that exceeds the thresholds.
    assert rows[0]["reason"] == "expected cat>=1, found 0" and rows[2]["reason"] == "expected dog>=2, found 0"
    found = json.loads((out / "results.json").read_text())["tasks"]["geneval"]["transformers"]
    assert found["judge"].startswith("transformers' Mask2Former and CLIP, not GenEval's")
    assert found["numbers"]["overall"]["value"] == 0 and found["numbers"]["overall"]["count"] == 4
    assert found["published"] == {} and found["notes"] == [
        "published, by GenEval's own scorer: Janus 61, Janus-Pro-1B 73, Janus-Pro-7B 80"
    ]
    assert "geneval (transformers): overall 0" in capsys.readouterr().out
    assert "judged by transformers' Mask2Former and CLIP" in (out / "report.md").read_text()
    # Without any model, by what they have seen.
    before = (out / "results.json").read_bytes()
    assert score(out, drawn, "--rescore") == 0
    assert (out / "results.json").read_bytes() == before
    # Of other models, or other pictures.
    clip_too = tmp_path / "clip"
    shutil.copytree(clip, clip_too)
    (clip_too / "more.json").write_text("{}")
    assert score(out, drawn, *models[:3], clip_too) == 2
    assert "holds replies of another evaluation: clip " in capsys.readouterr().err
    shutil.copytree(drawn, tmp_path / "drawn")
    shutil.copy(drawn / "00000" / "samples" / "00000.png", tmp_path / "drawn" / "00001" / "samples" / "00001.png")
    assert score(out, tmp_path / "drawn", *models) == 2
    assert "holds replies of another model: pictures " in capsys.readouterr().err


@pytest.mark.slow
def test_verdicts_through_the_pipeline(drawn, clip):
    """With a detector that finds what it should, and colors by CLIP on the pictures."""
    classifier = ColorClassifier.load(str(clip))
    task = GenEval(drawn, given=True)
    items = task.load(drawn, "transformers").items
    box = Detection((2, 2, 20, 20), 0.95)
    replies, colors = {}, {}
    for item in items:
        with Image.open(item.fields["path"]) as image:
            (colors[item.id],) = classifier(image, "cat", [box])
            look = lambda name, there, image=image: classifier(image, name, there)  # noqa: E731
            replies[item.id] = seen(item.fields["row"], {"cat": [box], "dog": [box, box]}, look)
    verdicts = task.score(items, replies, "transformers").verdicts
    assert [verdicts[item.id].outcome for item in items[2:]] == ["right", "right"]
    for item in items[:2]:
        said, color = verdicts[item.id], colors[item.id]
        assert (said.outcome == "right") == (color == "red")
        assert color == "red" or said.extracted == f"expected red cat>=1, found 0 red; and 1 {color}"


def test_bad_folders(drawn, tmp_path, capsys):
    out, models = tmp_path / "out", ["--detector", tmp_path, "--clip", tmp_path]

    def said(pictures, *more):
        assert score(out, pictures, *more) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "--pictures names the folder of drawn pictures" in said(tmp_path / "none", *models)
    assert "cannot be loaded" in said(drawn, *models)
    clip = tmp_path / "clip"
    transformers.CLIPConfig().save_pretrained(clip)
    said_of_clip = said(drawn, "--detector", clip, "--clip", clip)
    assert "clip is a clip; geneval needs a mask2former there" in said_of_clip
    assert "geneval needs --detector: a folder or hub id, such as facebook/mask2former" in said(drawn)
    assert "geneval needs --clip: a folder or hub id, such as openai/clip" in said(drawn, *models[:2])

    def read(pictures):
        return GenEval(pictures, given=True).load(pictures, "transformers")

    with pytest.raises(ValueError, match="has no folders such as 00000"):
        read(tmp_path)
    shutil.copytree(drawn, tmp_path / "copy")
    (tmp_path / "copy" / "00001" / "metadata.jsonl").write_text('{"tag": "colors"}')
    with pytest.raises(ValueError, match=r"00001/metadata.jsonl: it has no prompt, include"):
        read(tmp_path / "copy")
    shutil.copy(drawn / "00001" / "metadata.jsonl", tmp_path / "copy" / "00001")
    for each in (tmp_path / "copy" / "00001" / "samples").iterdir():
        each.unlink()
    with pytest.raises(ValueError, match=r"00001/samples has no pictures such as 00000.png"):
        read(tmp_path / "copy")
    assert not out.exists()
