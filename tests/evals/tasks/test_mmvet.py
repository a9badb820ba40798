"""MM-Vet in its three formats, its prompts by protocol, what its judges are asked, and what their replies score."""

from __future__ import annotations

import json
import zipfile

import pytest

from evals.evaluate import Evaluation
from evals.reports.results import result, summary, table
from evals.tasks import TASKS
from tests.evals.made import base64_of, picture, stored, write_parquet, write_tsv

MMVET = TASKS["mmvet"]
SETS = ("rec", "ocr", "rec,know,gen", "ocr,spat,math", "know,gen,rec")
# A judge's reply, and the score that MM-Vet's evaluator and VLMEvalKit take it for.
JUDGEMENTS = [
    ("0.0", 0.0, 0.0),
    ("1.0", 1.0, 1.0),
    ("0.5", 0.5, 0.5),
    (" 0.5", None, 0.5),
    ("0.5 ", 0.5, 0.5),
    ("0.5\n", 0.5, 0.5),
    ("1", 1.0, 1.0),
    (".3", 0.3, 0.3),
    ("0.8 since", 0.8, None),
    ("0.8\nsince", None, None),
    ("Score: 0.8", None, None),
    ("1.1", None, None),
    ("-0.1", None, None),
    ("nan", None, None),
    ("0,5", None, None),
    ("", None, None),
    ("1e-1", 0.1, 0.1),
]
SCORES = [0.0, 0.1, 0.5, 1.0, 0.8, 0.3, 0.0]


@pytest.fixture(scope="module")
def rows():
    return [
        {
            "index": n,
            "image": base64_of(n),
            "question": f"What is x in {n}?",
            "answer": "-1<AND>-5",
            "category": SETS[n % 5],
        }
        for n in range(70)
    ]


@pytest.fixture(scope="module")
def data(rows, tmp_path_factory):
    return write_tsv(tmp_path_factory.mktemp("mmvet") / "MMVet.tsv", rows).parent


THINK = (
    "You are a helpful assistant. Please answer truthfully and write out your thinking step by step to be sure you get "
    "the right answer."
)
PROMPTS = {
    "report": f"{THINK}\n\nUser: <image_placeholder>\nWhat is x in 0?\n\nAssistant:",
    "vlmevalkit": f"{THINK}\n\nUser: <image_placeholder>\nWhat is x in 0?\n\nAssistant:",
    "lmms-eval": "User: <image_placeholder>\nFirst please perform reasoning, and think step by step to provide best "
    "answer to the following question: \n\nWhat is x in 0?\n\nAssistant:",
    "official": "User: <image_placeholder>\nWhat is x in 0?\n\nAssistant:",
}


@pytest.mark.parametrize("protocol", MMVET.protocols)
def test_prompts(data, protocol):
    item = MMVET.load(data, protocol).items[0]
    assert item.prompt == PROMPTS[protocol]
    assert item.max_new_tokens == (1024 if protocol == "lmms-eval" else 2048)


# The evaluator's text, whole.
ICELAND = (
    "Can you explain this meme? | This meme is poking fun at the fact that the names of the countries Iceland and "
    "Greenland are misleading. Despite its name, Iceland is known for its beautiful green landscapes, while Greenland "
    "is mostly covered in ice and snow. The meme is saying that the person has trust issues because the names of these "
    "countries do not accurately represent their landscapes. | "
)
JUDGE = (
    "Compare the ground truth and prediction from AI models, to give a correctness score for the prediction. <AND> in "
    "the ground truth means it is totally right only when all elements in the ground truth are present in the "
    "prediction, and <OR> means it is totally right when any one element in the ground truth is present in the "
    "prediction. The correctness score is 0.0 (totally wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, or 1.0 "
    "(totally right). Just complete the last space of the correctness score.\n"
    "\n"
    "Question | Ground truth | Prediction | Correctness\n"
    "--- | --- | --- | ---\n"
    "What is x in the equation? | -1 <AND> -5 | x = 3 | 0.0\n"
    "What is x in the equation? | -1 <AND> -5 | x = -1 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -5 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -5 or 5 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -1 or x = -5 | 1.0\n"
    f"{ICELAND}The meme talks about Iceland and Greenland. It's pointing out that despite their names, Iceland is not "
    "very icy and Greenland isn't very green. | 0.4\n"
    f"{ICELAND}The meme is using humor to point out the misleading nature of Iceland's and Greenland's names. Iceland, "
    "despite its name, has lush green landscapes while Greenland is mostly covered in ice and snow. The text 'This is "
    "why I have trust issues' is a playful way to suggest that these contradictions can lead to distrust or confusion. "
    "The humor in this meme is derived from the unexpected contrast between the names of the countries and their "
    "actual physical characteristics. | 1.0\n"
    "\n"
    "What is x in 0? | -1 <AND> -5 | {x} is 3 | "
)
# The lines of VLMEvalKit's copy.
KIT_LINES = [
    "",
    "Compare the ground truth and prediction from AI models, to give a correctness score for the prediction.",
    "<AND> in the ground truth means it is totally right",
    "only when all elements in the ground truth are present in the prediction,",
    "and <OR> means it is totally right when any one element in the ground truth is present in the prediction.",
    "The correctness score is 0.0 (totally wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, or 1.0 "
    "(totally right).",
    "Just complete the last space of the correctness score.",
    "",
    "Question | Ground truth | Prediction | Correctness",
]


def test_what_a_judge_is_asked(data):
    items = MMVET.load(data, "report").items[:1]
    predictions = {"0": "{x} is 3"}
    (request,) = MMVET.judge_requests(items, predictions, "report")
    texts = [attempt.messages[0]["content"] for attempt in request.attempts]
    assert texts == [JUDGE, *[JUDGE + "\nPredict the correctness of the answer (digit): "] * 4]
    assert [(attempt.temperature, attempt.max_tokens) for attempt in request.attempts] == [
        *((0.0, 3), (0.0, 3), (0.5, 3), (1.0, 3), (1.5, 3))
    ]
    assert request.fallback == 0.0
    (request,) = MMVET.judge_requests(items, predictions, "vlmevalkit")
    text = request.attempts[0].messages[0]["content"]
    assert text.split("\n")[: len(KIT_LINES)] == KIT_LINES and " ".join(text.split()) == " ".join(JUDGE.split())
    assert len(text.split("\n")) == 33
    assert [attempt.temperature for attempt in request.attempts] == [0.0, 0.5, 1.0, 1.5, 2.0]
    (request,) = MMVET.judge_requests(items, predictions, "lmms-eval")
    of_lmms = JUDGE.replace("score.\n\nQuestion |", "score.\ngpt_query_prompt |").removesuffix(" ")
    assert request.attempts[0].messages[0]["content"] == of_lmms
    requests = MMVET.judge_requests(items, predictions, "official")
    assert [request.id for request in requests] == ["0", *(f"0 run {run}" for run in (2, 3, 4, 5))]
    assert MMVET.judge_requests(items, {"0": None}, "report") == []


@pytest.mark.parametrize(("reply", "official", "kit"), JUDGEMENTS)
def test_what_a_judge_says(data, reply, official, kit):
    items = MMVET.load(data, "report").items[:1]
    for protocol, expected in (
        ("report", official),
        ("official", official),
        ("lmms-eval", official),
        ("vlmevalkit", kit),
    ):
        request = MMVET.judge_requests(items, {"0": "x"}, protocol)[0]
        assert MMVET.parse_judgement(request, reply) == expected


def test_figures(data):
    items = MMVET.load(data, "report").items
    predictions = {item.id: f"x = {item.id}" for item in items}
    judged = {item.id: SCORES[n % 7] for n, item in enumerate(items)}
    scores = MMVET.score(items, predictions, "report", judged)
    # Seventy questions: each score meets each set of capabilities twice, so that all have the mean of the scores.
    mean = 100 * 2.7 / 7
    counts = {"total": 70, "rec": 42, "ocr": 28, "know": 28, "gen": 28, "spat": 14, "math": 14}
    counts |= {"only rec_know_gen": 28, "only ocr": 14, "only ocr_spat_math": 14, "only rec": 14}
    assert {name: number.count for name, number in scores.numbers.items()} == counts
    assert list(scores.numbers) == list(counts)
    assert [number.value for number in scores.numbers.values()] == pytest.approx([mean] * len(counts))
    assert [scores.verdicts[item.id].score for item in items] == SCORES * 10
    assert scores.verdicts["1"].outcome == "scored" and scores.verdicts["1"].extracted == "0.1"
    # Scores that follow the capabilities.
    judged = {item.id: 0.5 if "ocr" in item.fields["capabilities"] else 0.2 for item in items}
    numbers = MMVET.score(items, predictions, "report", judged).numbers
    assert numbers["total"].value == pytest.approx(100 * (28 * 0.5 + 42 * 0.2) / 70)
    values = [numbers[name].value for name in ("rec", "ocr", "spat", "only rec_know_gen", "only ocr")]
    assert values == pytest.approx([20, 50, 50, 20, 50])


def test_replies_that_are_not_judged_are_left_out_and_said(data):
    items = MMVET.load(data, "report").items[:4]
    predictions = {"0": "a", "1": "b", "2": None, "3": "d"}
    scores = MMVET.score(items, predictions, "report", {"0": 1.0, "3": 0.5})
    assert scores.numbers["total"].value == pytest.approx(50) and scores.numbers["total"].count == 3
    assert [scores.verdicts[name].outcome for name in "0123"] == ["scored", "unjudged", "scored", "scored"]
    assert scores.notes == ["1 of 4 replies are not judged, and are left out of the figures"]
    scores = MMVET.score(items[:2], predictions, "report")
    assert scores.numbers == {} and scores.headline == "total"


def test_a_report_without_judgements(data):
    loaded = MMVET.load(data, "report")
    predictions = {item.id: "a" for item in loaded.items}
    scores = MMVET.score(loaded.items, predictions, "report")
    whole = Evaluation(MMVET, "report", loaded, loaded.items, predictions, [], scores, [], None)
    found = result(whole, False)
    assert "| MM-Vet | report | total | not judged | 70 | 34.3 | 39.8 | 50.0 |" in table(
        {}, {"mmvet": {"report": found}}
    )
    assert summary("mmvet", "report", found).startswith("mmvet (report): total not judged over 70 items; published: J")


def test_runs_of_the_official_evaluator(data):
    items = MMVET.load(data, "official").items[:2]
    predictions = {"0": "a", "1": "b"}
    judged = {request.id: 0.0 for request in MMVET.judge_requests(items, predictions, "official")}
    judged |= {"0": 1.0, "0 run 2": 0.5, "1 run 2": 0.5}
    scores = MMVET.score(items, predictions, "official", judged)
    assert scores.numbers["total"].value == pytest.approx(100 * 2.0 / 10)
    assert scores.verdicts["0"].extracted == "1, 0.5, 0, 0, 0"
    # Totals of the runs: 50, 50, 0, 0, 0.
    assert scores.numbers["standard deviation of the total over runs"].value == pytest.approx(600**0.5)
    del judged["1 run 5"]
    assert MMVET.score(items, predictions, "official", judged).verdicts["1"].outcome == "unjudged"


def test_export(data):
    items = MMVET.load(data, "official").items[:2]
    (text,) = MMVET.export(items, {"0": "a “b”", "1": None}, "official").values()
    assert json.loads(text) == {"v1_0": "a “b”", "v1_1": ""}


QUESTION = {"imagename": "v1_0.png", "question": "What is x in 0?", "answer": "3", "imagesource": "web"}
QUESTION |= {"capability": ["ocr", "math"]}


@pytest.mark.parametrize("zipped", [True, False])
def test_the_official_release(tmp_path, zipped):
    rows = {"v1_0": QUESTION, "v1_1": {**QUESTION, "imagename": "v1_1.jpg"}}
    if zipped:
        with zipfile.ZipFile(tmp_path / "mm-vet.zip", "w") as archive:
            archive.writestr("mm-vet/mm-vet.json", json.dumps(rows))
            archive.writestr("mm-vet/images/v1_0.png", picture(4))
    else:
        (tmp_path / "mm-vet" / "images").mkdir(parents=True)
        (tmp_path / "mm-vet" / "mm-vet.json").write_text(json.dumps(rows))
        (tmp_path / "mm-vet" / "images" / "v1_0.png").write_bytes(picture(4))
    loaded = MMVET.load(tmp_path, "official")
    (item,) = loaded.items
    assert item.prompt == PROMPTS["official"] and item.images[0].read() == picture(4)
    assert item.fields["capabilities"] == ("ocr", "math")
    assert "the picture images/v1_1.jpg is missing" in loaded.problems[0].reason
    assert json.loads(MMVET.export([item], {"v1_0": "3"}, "official")["mm-vet-results.json"]) == {"v1_0": "3"}


def test_bad_releases(tmp_path):
    with zipfile.ZipFile(tmp_path / "mm-vet.zip", "w") as archive:
        archive.writestr("readme.txt", "")
    with pytest.raises(ValueError, match=r"mm-vet.zip has no mm-vet.json in it"):
        MMVET.load(tmp_path, "report")
    with zipfile.ZipFile(tmp_path / "mm-vet.zip", "w") as archive:
        archive.writestr("mm-vet.json", '{"v1_0": {"question": "Q"}}')
    with pytest.raises(ValueError, match=r"mm-vet.zip: the question v1_0 has no imagename, answer, capability"):
        MMVET.load(tmp_path, "report")


def test_the_hubs_parquet(tmp_path):
    row = {"question_id": "v1_0", "question": "What is x in 0?", "answer": "3", "capability": "ocr,math"}
    write_parquet(tmp_path / "MMVet" / "data" / "test-00000-of-00001.parquet", [{**row, "image": stored(3)}])
    (item,) = MMVET.load(tmp_path, "lmms-eval").items
    assert item.prompt == PROMPTS["lmms-eval"] and item.fields["capabilities"] == ("ocr", "math")
