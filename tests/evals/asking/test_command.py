"""`python -m evals.main` with a benchmark made here: replies as by the pipeline, resumed, refused, scored."""

# ruff: noqa: F811  (fixtures are imported)

import dataclasses
import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys

import pytest

from evals import main
from evals.asking.answers import Respondent
from evals.asking.plan import questions
from evals.asking.store import Lines, read_lines
from evals.evaluate import Settings
from evals.evaluate import evaluate as run_task
from evals.items import Item
from evals.tasks import TASKS
from tests.evals.asking.toy import Toy, without_model, write_data
from tests.library.tiny_janus import folder, janus, raises_one_line  # noqa: F401
from tests.several import environment, free_port, ours, outcome


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(TASKS, "toy", Toy())


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    return write_data(tmp_path_factory.mktemp("data") / "toy")


def run(*arguments: object) -> int:
    return main.main([str(argument) for argument in arguments])


def evaluate(folder, data, out, *more: object) -> int:
    return run("--model", folder, "--tasks", "toy", "--data", data, "--out", out, *more)


def replies(out: pathlib.Path, protocol: str = "report") -> dict[str, str]:
    lines = (out / "toy" / f"predictions-{protocol}.jsonl").read_text().splitlines()
    return {line["id"]: line["reply"] for line in map(json.loads, lines[1:])}


@pytest.fixture(scope="module")
def real(folder, data, tmp_path_factory) -> pathlib.Path:
    """The output of an evaluation that nothing disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "toy", Toy())
        out = tmp_path_factory.mktemp("real") / "out"
        assert evaluate(folder, data, out) == 0
    return out


@pytest.fixture
def quick(janus, monkeypatch):
    """Replies that a function makes of what the model would be given; the model is loaded once."""
    without_model(monkeypatch)
    monkeypatch.setattr("evals.model.load", lambda *_, **__: janus)


@pytest.fixture
def whole(quick, folder, data, tmp_path_factory) -> pathlib.Path:
    """As `real`, quickly."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert evaluate(folder, data, out) == 0
    return out


def by_pipeline(janus, items: list[Item]) -> dict[str, str]:
    """The replies to the exact same texts by `chat_batch`, which shares nothing between them."""
    prompts = iter([item.prompt for item in items])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(janus.processor, "format", lambda *_: next(prompts))
        asked = ["<image_placeholder>" * len(item.images) + "x" for item in items]
        found = janus.chat_batch(asked, [[image.path for image in item.images] for item in items], 12)
    return {item.id: reply for item, reply in zip(items, found, strict=True)}


def test_replies_are_those_of_the_pipeline(janus, data, real):
    """Without anything shared, in another batch."""
    items, found = Toy().load(data, "report").items, replies(real)
    assert len(found) == len(items) == 20 and len(set(found.values())) > 5
    picked = [items[i] for i in (0, 5, 7, 17)]
    assert {item.id: found[item.id] for item in picked} == by_pipeline(janus, picked)


def test_what_is_written(data, whole):
    results = json.loads((whole / "results.json").read_text())
    toy = results["tasks"]["toy"]["report"]
    assert toy["items"] == toy["answered"] == 20 and toy["problems"] == toy["unjudged"] == 0
    assert toy["numbers"]["accuracy"]["count"] == 20 and toy["published"] == {"Janus-Pro-1B": 86.2}
    assert results["model"] == json.loads((whole / "model.json").read_text())
    report = (whole / "report.md").read_text()
    assert "| benchmark | protocol | figure | here | items | Janus-Pro-1B |" in report
    assert "| Toy | report | accuracy | 0 (0 to 5) | 20 | 86.2 |" in report
    assert "- a \\| toy" in report
    assert (whole / "toy" / "export-report" / "answers.txt").read_text().count("\n") == 20


def ask(respondent: Respondent, items: list[Item]) -> dict[str, str]:
    return {name: text for replies in respondent.ask(items) for name, text in replies.texts.items()}


def test_pictures_are_encoded_once(janus, data, real):
    items = Toy().load(data, "report").items
    respondent, forgetful = Respondent(janus), Respondent(janus, kept_bytes=0)
    for encoded in (3, 3):
        assert ask(respondent, items) == replies(real)
        assert respondent.encoded == encoded
    for encoded in (3, 6):
        ask(forgetful, items)
        assert forgetful.encoded == encoded


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3, 4, 10])
def test_batches_do_not_matter(janus, tmp_path, size):
    """Also beside a question about two pictures, and questions about none."""
    items = Toy().load(write_data(tmp_path, two=True), "report").items
    respondent = Respondent(janus, batch_size=size)
    found = ask(respondent, items)
    assert respondent.encoded == 3 and len(found) == 21
    for part in (items[:18], items[18:19], items[19:]):
        assert {item.id: found[item.id] for item in part} == by_pipeline(janus, part)


def test_goes_on_where_it_was(folder, data, whole, tmp_path):
    """Wherever the file of replies was cut off, as by a kill."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    path = out / "toy" / "predictions-report.jsonl"
    header, *lines = path.read_bytes().splitlines(keepends=True)
    some = b"".join(line for line in lines if b'"2-' not in line and b'"none' not in line)
    for left in (header[:9], header + lines[0][:-1], header + some + lines[-1][:5]):
        path.write_bytes(left)
        assert evaluate(folder, data, out) == 0
        assert replies(out) == replies(whole)


def test_nothing_is_asked_twice(data, whole, monkeypatch):
    asked = []
    task = Toy()
    loaded = task.load(data, "report")
    header = json.loads((whole / "model.json").read_text())
    evaluation = run_task(
        task, "report", loaded, Settings(whole, progress=False), header, lambda x: asked.extend(x) or []
    )
    assert not asked and len(evaluation.replies) == 20


def test_every_cut_of_the_file_is_readable(tmp_path):
    path = tmp_path / "lines.jsonl"
    with Lines(path, {"task": "x"}) as lines:
        lines.append({"id": str(i), "reply": "a\nb \ud800 \u00e9"} for i in range(3))
        lines.append([{"id": "last", "reply": ""}])
    raw = path.read_bytes()
    for end in range(len(raw) + 1):
        path.write_bytes(raw[:end])
        with Lines(path, {"task": "x"}) as lines:
            assert len(lines.known) == max(raw[:end].count(b"\n") - 1, 0)
            lines.append([{"id": "new"}])
        assert read_lines(path)[1]["new"] == {"id": "new"}


def test_one_writer_at_a_time(tmp_path):
    with Lines(tmp_path / "x", {}), raises_one_line("being written by another process"):
        Lines(tmp_path / "x", {})


def test_limit_takes_whole_groups(folder, data, whole, tmp_path):
    out = tmp_path / "out"
    assert evaluate(folder, data, out, "--limit", 13) == 0
    kept = {name: reply for name, reply in replies(whole).items() if name[:2] in ("0-", "1-")}
    assert replies(out) == kept and len(kept) == 12
    found = json.loads((out / "results.json").read_text())["tasks"]["toy"]["report"]
    assert (found["answered"], found["items"]) == (12, 20)
    assert "(partial)" in (out / "report.md").read_text()
    # More of them later, with what is there.
    assert evaluate(folder, data, out) == 0
    assert replies(out) == replies(whole)


def test_rescore_needs_no_model(data, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for name in ("results.json", "report.md", "report.html"):
        (out / name).unlink()
    monkeypatch.setattr("evals.model.load", None)
    assert run("--tasks", "toy", "--data", data, "--out", out, "--rescore") == 0
    for name in ("results.json", "report.md", "report.html"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_protocols_side_by_side(folder, data, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    assert evaluate(folder, data, out, "--protocol", "terse", "--limit", 2) == 0
    assert replies(out) == replies(whole) and len(replies(out, "terse")) == 6
    assert set(json.loads((out / "results.json").read_text())["tasks"]["toy"]) == {"report", "terse"}


# ---------------------------------------------------------------- bad input


def said(capsys, *arguments: object, code: int = 2) -> str:
    assert run(*arguments) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_unreadable_pictures(folder, data, whole, tmp_path, capsys):
    """They are named and counted; the figures leave them out, or have them as wrong if asked."""
    bad = tmp_path / "data"
    shutil.copytree(data, bad)
    (bad / "1.png").write_bytes(b"no picture")
    rows = json.loads((bad / "toy.json").read_text())
    rows[0]["problem"] = "it has no answer"
    (bad / "toy.json").write_text(json.dumps(rows))
    out = tmp_path / "out"
    assert evaluate(folder, bad, out) == 0
    found = json.loads((out / "results.json").read_text())["tasks"]["toy"]["report"]
    assert (found["items"], found["answered"], found["problems"]) == (20, 13, 7)
    assert found["first_problems"][0] == {"id": "0-0", "reason": "it has no answer"}
    assert "1.png" in found["first_problems"][1]["reason"]
    assert found["numbers"]["accuracy"]["count"] == 13
    assert "7 items could not be asked and are left out" in (out / "report.md").read_text()
    there = replies(whole)
    assert replies(out) == {name: there[name] for name in replies(out)}
    assert evaluate(folder, bad, out, "--unreadable", "wrong") == 0
    found = json.loads((out / "results.json").read_text())["tasks"]["toy"]["report"]
    assert found["numbers"]["accuracy"]["count"] == 20 and found["problems_are"] == "wrong"
    # What was mended is asked about.
    shutil.copy(data / "1.png", bad / "1.png")
    shutil.copy(data / "toy.json", bad / "toy.json")
    assert evaluate(folder, bad, out) == 0
    assert replies(out) == there


def test_replies_of_others_are_refused(folder, data, whole, tmp_path, capsys):
    other = tmp_path / "model"
    shutil.copytree(folder, other)
    weights = next(other.glob("*.safetensors"))
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    line = said(capsys, "--model", other, "--tasks", "toy", "--data", data, "--out", whole)
    assert "holds replies of another model: model " in line and "choose another --out" in line
    asked = ("--model", folder, "--tasks", "toy", "--data", data, "--out", whole)
    assert "dtype float32, not bfloat16" in said(capsys, *asked, "--dtype", "bfloat16")
    changed = tmp_path / "data"
    shutil.copytree(data, changed)
    text = (changed / "toy.json").read_text()
    (changed / "toy.json").write_text(text.replace("river", "sea"))
    line = said(capsys, "--model", folder, "--tasks", "toy", "--data", changed, "--out", whole)
    assert "holds replies of another evaluation: prompts " in line
    again = said(capsys, "--rescore", "--tasks", "toy", "--data", changed, "--out", whole)
    assert "holds replies of another evaluation: prompts " in again


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (("--tasks", "tyo"), "unknown task tyo; did you mean toy?"),
        (("--tasks", "toy,"), "unknown task (empty)"),
        (("--protocol", "reprot"), "did you mean report?"),
        (("--limit", "0"), "--limit must be an integer of at least 1"),
        (("--judge", "http://x"), "go together"),
        (("--judge", "x", "--judge-model", "m"), "must be a URL"),
        (("--out", "gs://bucket/x"), "local folders only"),
        (("--data", "nowhere"), "nowhere"),
        (("--rescore", "--out", "nowhere"), "nowhere"),
        (("--mesh", "data:2"), "--mesh must look like"),
    ],
)
def test_bad_options(folder, data, tmp_path, capsys, changes, match):
    options = {"--model": folder, "--tasks": "toy", "--data": data, "--out": tmp_path / "out"}
    given = [x for pair in options.items() for x in pair]
    assert match in said(capsys, *given, *changes)


def test_nothing_to_ask_a_model_without_a_tokenizer(folder, data, tmp_path, capsys):
    bare = tmp_path / "model"
    shutil.copytree(folder, bare)
    (bare / "tokenizer.json").unlink()
    line = said(capsys, "--model", bare, "--tasks", "toy", "--data", data, "--out", tmp_path / "out")
    assert "has no tokenizer.json" in line


def test_a_prompt_that_is_too_long(janus, data):
    items = Toy().load(data, "report").items
    long = dataclasses.replace(items[0], id="long", prompt=items[0].prompt + " cat" * 5000)
    none = dataclasses.replace(items[0], id="none", prompt="no picture")
    asked, found = questions([long, none, items[17]], janus.processor)
    problems = {problem.id: problem.reason for problem in found}
    assert set(problems) == {"long", "none"}
    assert "exceeds the model's" in problems["long"] and "0 <image_placeholder>" in problems["none"]
    assert [question.item.id for question in asked] == [items[17].id]


# ---------------------------------------------------------------- killed, several processes


@pytest.mark.slow
def test_killed_at_random(folder, data, real, tmp_path):
    """Killed in the middle of writing, again and again, it ends with the same replies."""
    out, moments = tmp_path / "out", random.Random(1)
    command = [sys.executable, "-m", "tests.evals.asking.toy", "--model", folder, "--tasks", "toy", "--data", data]
    command = [*map(str, command), "--out", str(out), "--batch-size", "3"]
    for _ in range(3):
        killed = subprocess.run(command, env=environment(1, TOY_KILL_AFTER=str(moments.randrange(3))), timeout=300)
        assert killed.returncode == -signal.SIGKILL
    assert subprocess.run(command, env=environment(1), timeout=300).returncode == 0
    assert replies(out) == replies(real)
    assert (out / "results.json").read_bytes() == (real / "results.json").read_bytes()


@pytest.mark.slow
def test_two_processes(folder, data, real, tmp_path):
    """On a mesh over both, they give what one gives; an error of one ends both."""
    out, address = tmp_path / "out", f"localhost:{free_port()}"
    command = [
        sys.executable,
        "-m",
        "tests.evals.asking.toy",
        "--model",
        folder,
        "--tasks",
        "toy",
        "--data",
        data,
        "--out",
        out,
    ]
    command = [
        *map(str, command),
        "--mesh",
        "data=4",
        "--coordinator",
        address,
        "--processes",
        "2",
        "--batch-size",
        "3",
    ]
    env = environment(2, JAX_DEFAULT_MATMUL_PRECISION="float32")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ended = outcome([subprocess.Popen([*command, "--process", str(i)], env=env, **pipes) for i in range(2)])
    assert [code for code, *_ in ended] == [0, 0], ended
    assert replies(out) == replies(real)
    assert not ours(ended[1][1])
