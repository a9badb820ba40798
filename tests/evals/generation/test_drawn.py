"""GenEval and DPG-Bench in one command: drawn, looked at, scored, gone on with, refused."""

# ruff: noqa: F811  (fixtures are imported)

from __future__ import annotations

import base64
import io
import json
import shutil

import pytest
from PIL import Image

from evals import judging, main
from evals.generation.geneval import Detection
from evals.tasks import TASKS
from evals.tasks.dpg import Dpg
from tests.evals.asking.test_judging import completion, endpoint, text_of  # noqa: F401
from tests.evals.generation.test_dpg import write
from tests.library.tiny_janus import folder  # noqa: F401

PROMPTS = [
    {"tag": "single_object", "include": [{"class": "cup", "count": 1}], "prompt": "a cup"},
    {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}], "prompt": "a red cup"},
]


@pytest.fixture
def data(tmp_path):
    root = tmp_path / "data"
    (root / "geneval" / "prompts").mkdir(parents=True)
    lines = "".join(json.dumps(each) + "\n" for each in PROMPTS)
    (root / "geneval" / "prompts" / "evaluation_metadata.jsonl").write_text(lines)
    (root / "dpg_bench" / "prompts").mkdir(parents=True)
    write(root / "dpg_bench" / "dpg_bench.csv")
    for name, text in (("a", "A red cat on a mat."), ("b", "A photo.")):
        (root / "dpg_bench" / "prompts" / f"{name}.txt").write_text(text)
    return root


class Painter:
    """In the place of the model: pictures whose color is the number of the picture; `calls` may be limited."""

    def __init__(self):
        self.calls, self.asked, self.settings = 100, [], []

    def generate_images(self, prompts, n, **settings):
        if not self.calls:
            raise KeyboardInterrupt
        self.calls -= 1
        self.asked += prompts
        self.settings.append(settings)
        return [Image.new("RGB", (6, 6), (40 * number, len(prompt), 0)) for prompt in prompts for number in range(n)]


@pytest.fixture
def painter(monkeypatch):
    """A painter, and detectors that find a cup in pictures from the second on, which is red from the third on."""
    painter = Painter()
    cup = {"cup": [Detection((0, 0, 4, 4), 0.95)]}

    def number(image):
        return image.getpixel((0, 0))[0] // 40

    monkeypatch.setattr("evals.model.load", lambda *_, **__: painter)
    monkeypatch.setattr("evals.generation.scorers._check", lambda *_: None)
    monkeypatch.setattr(
        "evals.generation.scorers.Detector.load", lambda _: lambda image: cup if number(image) > 0 else {}
    )
    monkeypatch.setattr(
        "evals.generation.scorers.ColorClassifier.load",
        lambda _: lambda image, name, there: ["red" if number(image) > 1 else "blue"] * len(there),
    )
    return painter


DETECTORS = ("--detector", "d", "--clip", "c")


@pytest.fixture
def command(folder, data, tmp_path):
    def run(*more, model=folder, out=tmp_path / "out"):
        given = ["--data", data, "--out", out, *more]
        return main.main([str(each) for each in (["--model", model, *given] if model else given)])

    return run


def results(out, task, protocol):
    return json.loads((out / "results.json").read_text())["tasks"][task][protocol]


def said(capsys, code):
    assert code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_geneval_in_one_command(command, painter, tmp_path, capsys):
    out = tmp_path / "out"
    assert command("--tasks", "geneval", *DETECTORS, "--temperature", 0.5) == 0
    assert painter.asked == ["a cup", "a red cup"]
    assert painter.settings == [
        {"seed": 42, "cfg_weight": 5.0, "temperature": 0.5, "batch_size": None, "progress": False}
    ]
    found = results(out, "geneval", "transformers")
    assert (found["items"], found["answered"], found["headline"]) == (8, 8, "overall")
    values = {name: number["value"] for name, number in found["numbers"].items()}
    assert values == {"overall": 62.5, "single_object": 75, "colors": 50} | {
        **{"correct pictures": 62.5, "prompts with a correct picture": 100}
    }
    assert found["source"].endswith("8 pictures of 2 prompts; drawn with seed 42, cfg_weight 5.0, temperature 0.5")
    assert found["judge"] == "transformers' Mask2Former and CLIP, not GenEval's mmdet and open_clip"
    pictures = out / "geneval" / "pictures"
    assert len(list(pictures.glob("0000?/samples/0000?.png"))) == 8
    page = (out / "report.html").read_text()
    assert page.count("data:image/jpeg") == 8 and "expected red cup" in page
    assert "| GenEval, by transformers' models | transformers | overall | 62.5" in (out / "report.md").read_text()
    # Once more: nothing is drawn, and nothing is looked at.
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    assert command("--tasks", "geneval", *DETECTORS, "--temperature", 0.5) == 0
    assert len(painter.asked) == 2 and before == {path: path.read_bytes() for path in out.rglob("*.*")}
    # Without the model, by what was seen, and then by detectors on pictures that are there.
    assert command("--tasks", "geneval", "--rescore", model=None) == 0
    assert before == {path: path.read_bytes() for path in out.rglob("*.*")}
    (out / "geneval" / "predictions-transformers.jsonl").unlink()
    capsys.readouterr()
    assert "leave out --rescore" in said(capsys, command("--tasks", "geneval", "--rescore", model=None))
    shutil.rmtree(pictures / "00001")
    assert command("--tasks", "geneval", "--rescore", *DETECTORS, model=None) == 0
    assert results(out, "geneval", "transformers")["numbers"]["overall"]["value"] == 75
    assert "4 of 8 (" not in (out / "report.md").read_text() and "(partial)" in (out / "report.md").read_text()
    assert len(painter.asked) == 2


def test_what_was_drawn_or_seen_otherwise_is_refused(command, painter, capsys):
    assert command("--tasks", "geneval", *DETECTORS) == 0
    capsys.readouterr()
    for more, message in (
        (("--seed", 1), "holds pictures that were drawn otherwise: seed 42, not 1"),
        (("--cfg-weight", 3), "cfg_weight 5.0, not 3.0"),
        (("--temperature", 0.9, "--rescore"), "temperature 1.0, not 0.9"),
        (("--detector", "e"), "holds replies of another evaluation: detector d, not e"),
    ):
        assert message in said(capsys, command("--tasks", "geneval", *DETECTORS, *more))


def test_drawing_goes_on_where_it_was(command, painter, tmp_path, monkeypatch):
    monkeypatch.setattr("evals.generation.drawing._PER_CALL", 4)
    painter.calls = 1
    with pytest.raises(KeyboardInterrupt):
        command("--tasks", "geneval", *DETECTORS)
    assert painter.asked == ["a cup"]
    painter.calls = 1
    assert command("--tasks", "geneval", *DETECTORS) == 0
    assert painter.asked == ["a cup", "a red cup"]
    assert results(tmp_path / "out", "geneval", "transformers")["answered"] == 8


def test_a_limit_draws_whole_prompts(command, painter, tmp_path):
    assert command("--tasks", "geneval", *DETECTORS, "--limit", 7) == 0
    assert painter.asked == ["a cup"] and results(tmp_path / "out", "geneval", "transformers")["answered"] == 4


def test_pictures_that_cannot_be_read(command, painter, tmp_path):
    out = tmp_path / "out"
    assert command("--tasks", "geneval", *DETECTORS) == 0
    (out / "geneval" / "predictions-transformers.jsonl").unlink()
    (out / "geneval" / "pictures" / "00001" / "samples" / "00003.png").write_bytes(b"no picture")
    for more, value in (((), (75 + 100 / 3) / 2), (("--unreadable", "wrong"), (75 + 25) / 2)):
        assert command("--tasks", "geneval", *DETECTORS, *more) == 0
        found = results(out, "geneval", "transformers")
        assert found["problems"] == 1 and "00003.png" in found["first_problems"][0]["reason"]
        assert found["numbers"]["overall"]["value"] == pytest.approx(value)


def test_objects_that_the_detector_does_not_know_are_refused(command, painter, data, capsys):
    """They would never be found."""
    path = data / "geneval" / "prompts" / "evaluation_metadata.jsonl"
    path.write_text(path.read_text().replace('"cup", "count": 1, "color"', '"wineglass", "count": 1, "color"'))
    line = said(capsys, command("--tasks", "geneval", *DETECTORS))
    assert (
        "the prompt of 00001 asks for 'wineglass', which the detector does not know; did you mean wine glass?" in line
    )
    assert not painter.asked


def test_replies_that_no_detector_has_given_are_refused(command, painter, tmp_path, capsys):
    assert command("--tasks", "geneval", *DETECTORS) == 0
    path = tmp_path / "out" / "geneval" / "predictions-transformers.jsonl"
    head, first, *rest = path.read_text().splitlines()
    for reply in ("a cup", '{"objects": {"cup": [1]}, "colors": {}}', "[]"):
        told = json.dumps({**json.loads(first), "reply": reply})
        path.write_text("\n".join([head, told, *rest]) + "\n")
        capsys.readouterr()
        assert "the reply to 00000/00000 is not" in said(capsys, command("--tasks", "geneval", "--rescore", model=None))


def test_detectors_that_do_not_fit_beside_the_model(command, painter, capsys, monkeypatch):
    def load(_):
        def look(image):
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

        return look

    monkeypatch.setattr("evals.generation.scorers.Detector.load", load)
    assert command("--tasks", "geneval", *DETECTORS) == 2
    assert "start again with --rescore" in capsys.readouterr().err.splitlines()[-1]


def test_dpg_by_an_endpoint_that_is_silent_at_first(command, painter, endpoint, tmp_path, capsys, monkeypatch):
    """Exit code 3 and no figure of the pictures that lack a reply, until all are there; nothing is asked twice."""
    monkeypatch.setattr(judging, "_TRIES", 1)
    out, more = tmp_path / "out", ("--judge", endpoint.url, "--judge-model", "m", "--vqa", "endpoint")
    silent = {"Is the cat red? Please answer yes or no."}

    def reply(body, times):
        if text_of(body) in silent:
            return 403, {}
        return 200, completion("No." if "mat" in text_of(body) else "Yes")

    endpoint.reply = reply
    assert command("--tasks", "dpg", *more) == 3
    assert "dpg: 4 replies are unjudged" in capsys.readouterr().err
    found = results(out, "dpg", "plain")
    assert (found["answered"], found["unjudged"], found["judge"]) == (20, 4, "m at an endpoint")
    assert found["numbers"]["overall"]["value"] == 100 and found["numbers"]["overall"]["count"] == 1
    assert "a is left out: no answer to question 2" in found["notes"]
    report = (out / "report.md").read_text()
    assert "(partial)" in report and "4 questions have no reply of the judge; what they are about is left out" in report
    assert "have not been asked" not in report and "are unjudged" not in report
    silent.clear()
    before = len(endpoint.bodies)
    assert command("--tasks", "dpg", *more) == 0
    assert len(endpoint.bodies) == before + 4 and painter.asked == ["A red cat on a mat.", "A photo."]
    found = results(out, "dpg", "plain")
    # Of picture a: there is a cat, which is red, and no mat, so that the cat cannot be on it.
    assert found["numbers"]["overall"]["value"] == 75 and found["unjudged"] == 0
    assert found["numbers"]["entity"]["value"] == 50
    # The endpoint has got the tile.
    url = endpoint.bodies[0]["messages"][0]["content"][0]["image_url"]["url"]
    with Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))) as tile:
        assert tile.size == (6, 6)
    # Once more without anybody.
    assert command("--tasks", "dpg", "--rescore", model=None) == 0
    assert results(out, "dpg", "plain") == found


def test_an_endpoint_that_never_answers(command, painter, tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "_TRIES", 1)
    more = ("--judge", "http://localhost:9", "--judge-model", "m", "--vqa", "endpoint")
    assert command("--tasks", "dpg", *more) == 3
    found = results(tmp_path / "out", "dpg", "plain")
    assert (found["answered"], found["unjudged"], found["numbers"]) == (0, 24, {})


def test_quirks_ask_nothing_about_the_first_row(command, painter, endpoint, tmp_path):
    endpoint.reply = lambda body, times: (200, completion("yes"))
    more = ("--judge", endpoint.url, "--judge-model", "m", "--vqa", "endpoint", "--protocol", "quirks")
    assert command("--tasks", "dpg", *more) == 0
    assert "Is there a cat? Please answer yes or no." not in endpoint.seen
    found = results(tmp_path / "out", "dpg", "quirks")
    assert found["notes"][1:] == ["a is left out: question 2 depends on question 1, which is not there"]
    assert found["numbers"]["overall"] == {"value": 100, "count": 1, "low": None, "high": None}


def test_prompts_of_geneval_are_not_those_of_dpg(data, tmp_path):
    """Also where both lie in one folder."""
    (data / "geneval" / "prompts" / "generation_prompts.txt").write_text("a cup")
    drawings = Dpg(tmp_path / "pictures").drawings(data)
    assert [(each.key, each.prompt) for each in drawings] == [("a", "A red cat on a mat."), ("b", "A photo.")]
    shutil.rmtree(data / "dpg_bench" / "prompts")
    with pytest.raises(ValueError, match=r"no data in .*; expected prompts/partiprompts0.txt"):
        Dpg(tmp_path / "pictures").drawings(data)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--tasks", "geneval"), "geneval needs --detector"),
        (("--tasks", "geneval", "--detector", "d"), "geneval needs --clip"),
        (("--tasks", "geneval", "--protocol", "report"), "geneval has no protocol report: the report's scorer is"),
        (("--tasks", "genevl", *DETECTORS), "did you mean geneval?"),
        (("--tasks", "dpg"), "dpg needs --vqa"),
        (("--tasks", "dpg", "--vqa", "endpoint"), "--vqa endpoint needs --judge and --judge-model"),
        (("--tasks", "geneval", *DETECTORS, "--cfg-weight", "-1"), "cfg_weight"),
        (("--tasks", "geneval", *DETECTORS, "--pictures-at-a-time", "0"), "pictures at a time must be"),
        (("--tasks", "pope", "--seed", "1"), "--seed is of geneval and dpg, and --tasks has neither"),
        (("--tasks", "pope,dpg", "--vqa", "self", "--pictures", "x"), "evaluate pope without them"),
        (("--tasks", "dpg", "--vqa", "self", "--pictures", "x", "--seed", "1"), "--pictures are drawn already"),
        (("--tasks", "geneval", *DETECTORS, "--pictures", "x"), "--model has nothing to do with --pictures"),
        (("--tasks", "dpg", "--vqa", "self", "--pictures", "nowhere"), "nowhere is not a folder"),
    ],
)
def test_bad_options(command, painter, tmp_path, capsys, more, message):
    assert message in said(capsys, command(*more))
    assert not (tmp_path / "out").exists() and not painter.asked


def test_missing_data(folder, painter, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    given = ["--model", str(folder), "--data", str(tmp_path / "empty"), "--out", str(tmp_path / "out")]
    for more, message in (
        (("--tasks", "geneval", *DETECTORS), "expected evaluation_metadata.jsonl (github.com/djghosh13/geneval"),
        (("--tasks", "dpg", "--vqa", "self"), "expected dpg_bench.csv (github.com/TencentQQGYLab/ELLA"),
    ):
        assert message in said(capsys, main.main([*given, *more]))
    assert {"geneval", "dpg"} <= set(TASKS)
