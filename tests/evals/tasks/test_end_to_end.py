"""The seven benchmarks through the command with a small model, each in a format of its own, and scored once more."""

# ruff: noqa: F811  (fixtures are imported)

from __future__ import annotations

import json
import zipfile

import pytest

from evals import main
from evals.generation.task import DrawnTask
from evals.tasks import TASKS
from tests.evals.made import OPTIONS, base64_of, picture, stored, write_parquet, write_tsv
from tests.library.tiny_janus import folder  # noqa: F401


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four questions of each benchmark about two pictures."""
    root = tmp_path_factory.mktemp("data")
    pope = root / "POPE"
    (root / "val2014").mkdir()
    for number in (1, 2):
        (root / "val2014" / f"{number}.jpg").write_bytes(picture(number))
    pope.mkdir()
    for split in ("random", "popular", "adversarial"):
        lines = [
            {"image": f"{n // 2 + 1}.jpg", "text": f"Is there a {n}?", "label": ("yes", "no")[n % 2]} for n in range(4)
        ]
        (pope / f"coco_pope_{split}.json").write_text("\n".join(map(json.dumps, lines)))
    mme = root / "MME_Benchmark_release_version" / "color"
    mme.mkdir(parents=True)
    for number in (1, 2):
        (mme / f"{number}.jpg").write_bytes(picture(number))
        (mme / f"{number}.txt").write_text(
            "Is it red? Please answer yes or no.\tYes\nIs it blue? Please answer yes or no.\tNo\n"
        )
    rows = [
        {"index": n % 2 + n // 2 * 1_000_000, "image": str(n % 2) if n > 1 else base64_of(n), "question": "What?"}
        | {**OPTIONS, "answer": "AB"[n // 2], "category": "c", "l2-category": "logic_reasoning", "split": "dev"}
        for n in range(4)
    ]
    write_tsv(root / "MMBench_DEV_EN.tsv", rows)
    (root / "SEED-Bench" / "SEED-Bench-image").mkdir(parents=True)
    (root / "SEED-Bench" / "SEED-Bench-image" / "7").write_bytes(picture(7))
    question = {"answer": "B", "choice_a": "cat", "choice_b": "dog", "choice_c": "bird", "choice_d": "fish"}
    question |= {"data_type": "image", "question": "What is it?", "question_type_id": 1, "data_id": "7"}
    rows = [{**question, "question_id": str(n)} for n in range(4)]
    (root / "SEED-Bench" / "SEED-Bench.json").write_text(json.dumps({"questions": rows}))
    rows = [{"index": n, "image_path": f"{n}.png", "question": "Is it?", "answer": "yes"} for n in range(4)]
    write_tsv(root / "GQA_TestDev_Balanced_local.tsv", rows)
    pictures = root / "images" / "GQA_TestDev_Balanced"
    pictures.mkdir(parents=True)
    for number in range(4):
        (pictures / f"{number}.png").write_bytes(picture(number))
    (pictures / "3.png").write_bytes(b"no picture")
    rows = [
        {
            "id": f"validation_Math_{n}",
            "question": "Which is <image 1>?",
            "options": "['a cat', 'a dog']",
            "answer": "A",
        }
        | {"question_type": "multiple-choice", "image_1": stored(n), "image_2": stored(5) if n else None}
        for n in range(4)
    ]
    write_parquet(root / "MMMU" / "Math" / "validation-00000-of-00001.parquet", rows)
    question = {"imagename": "a.png", "question": "What is x?", "answer": "3", "capability": ["math"]}
    with zipfile.ZipFile(root / "mm-vet.zip", "w") as archive:
        archive.writestr("mm-vet/mm-vet.json", json.dumps({f"v1_{n}": question for n in range(4)}))
        archive.writestr("mm-vet/images/a.png", picture(4))
    return root


# What the small model says is noise, and as long as its context allows.
SHORT = 6


@pytest.fixture
def short(monkeypatch):
    for module in ("evals.prompts", "evals.tasks.pope", "evals.tasks.mme", "evals.tasks.mmbench", "evals.tasks.seed"):
        monkeypatch.setattr(f"{module}.LONGEST_REPLY", SHORT)
    for module in ("evals.tasks.gqa", "evals.tasks.mmmu", "evals.tasks.mmvet"):
        monkeypatch.setattr(f"{module}.LONGEST_REPLY", SHORT)


RIGHT = {
    "pope": {"random-1": "Yes", "random-2": "No", "random-3": "Yes", "random-4": "Yes"},
    "mme": {"color/1/1": "Yes", "color/1/2": "No", "color/2/1": "Yes", "color/2/2": "Yes"},
    "mmbench": {"0": "A", "1000000": "B", "1": "A", "1000001": "A"},
    "seed": {"0": "B", "1": "dog", "2": "C", "3": "A"},
    "gqa": {"0": "Yes", "1": "no", "2": "yes"},
    "mmmu": {
        "validation_Math_0": "A",
        "validation_Math_1": "B",
        "validation_Math_2": "a cat",
        "validation_Math_3": "A",
    },
    "mmvet": {f"v1_{n}": "x is 3" for n in range(4)},
}
FIGURES = {"pope": 80, "mme": 125, "mmbench": 75, "seed": 50, "gqa": 200 / 3, "mmmu": 75}


@pytest.mark.parametrize("name", TASKS)
def test_what_is_missing_is_named_with_where_it_is_published(name, tmp_path):
    task = TASKS[name]
    task = task.at(tmp_path / "pictures") if isinstance(task, DrawnTask) else task
    with pytest.raises(ValueError, match=r"no data in .*; expected .*(\w+\.)+(com|org|edu|space)/") as raised:
        task.load(tmp_path, task.protocols[0])
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_the_seven_benchmarks(folder, data, tmp_path, short):
    names, out = ",".join(RIGHT), tmp_path / "out"
    command = ["--model", str(folder), "--tasks", names, "--data", str(data), "--out", str(out)]
    assert main.main(command) == 0
    asked = json.loads((out / "results.json").read_text())["tasks"]
    assert "3.png" in asked["gqa"]["report"]["first_problems"][0]["reason"]
    for name, right in RIGHT.items():
        path = out / name / "predictions-report.jsonl"
        head, *lines = path.read_text().splitlines()
        replies = {line["id"]: line["reply"] for line in map(json.loads, lines)}
        assert replies.keys() == right.keys() and all(isinstance(reply, str) for reply in replies.values())
        # As if the model had said this.
        told = [json.dumps({"id": each, "reply": reply}) for each, reply in right.items()]
        path.write_text("\n".join([head, *told]) + "\n")
    assert main.main([*command, "--rescore"]) == 0
    results = json.loads((out / "results.json").read_text())
    # Nobody has judged: there is no figure, and the results say why.
    judged = results["tasks"]["mmvet"]["report"]
    assert judged["numbers"] == {}
    assert judged["notes"] == ["4 of 4 replies are not judged, and are left out of the figures"]
    assert "| MM-Vet | report | total | not judged | 4 |" in (out / "report.md").read_text()
    for name, value in FIGURES.items():
        scores = results["tasks"][name]["report"]
        assert scores["numbers"][scores["headline"]]["value"] == pytest.approx(value), name
    exported = {each.name for each in out.rglob("export-report/*")}
    assert exported == {
        *(f"coco_pope_{split}_answers.json" for split in ("random", "popular", "adversarial")),
        *("color.txt", "testdev_balanced_predictions.json", "total_val_output.json", "mm-vet-results.json"),
    }
    assert {*RIGHT, "geneval", "dpg"} == set(TASKS)
