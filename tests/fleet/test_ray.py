"""Ray as the engine of a preparation: what its tasks take, what they are, and what becomes of errors."""

import pytest

from tests.several import free_port
from train.fleet.job import Job
from train.fleet.ray_engine import reach, resources
from train.prepare import main

JOB = Job("data/c.jsonl", "out", "generation", "org/model")
GPU, TPU, CPU = {"CPU": 16.0, "GPU": 4.0}, {"CPU": 208.0, "TPU": 4.0}, {"CPU": 8.0}


@pytest.mark.parametrize(
    ("kind", "nodes", "expected"),
    [
        ("generation", [CPU, GPU, {"CPU": 12.0, "GPU": 4.0}], {"num_cpus": 3, "num_gpus": 1}),
        ("generation", [CPU, TPU, TPU], {"num_cpus": 208, "resources": {"TPU": 4}}),
        ("generation", [CPU, {"memory": 1.0}], {"num_cpus": 4}),
        # No codes to compute.
        ("text", [GPU, TPU], {"num_cpus": 4}),
        ("text", [{"CPU": 2.0}], {"num_cpus": 2}),
        ("text", [], {"num_cpus": 1}),
    ],
)
def test_what_a_task_takes(kind, nodes, expected):
    job = Job("data/c.jsonl", "out", kind, "org/model")
    assert resources(nodes, job) == expected


def test_paths_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = JOB.anywhere()
    assert (found.source, found.out) == (str(tmp_path / "data/c.jsonl"), str(tmp_path / "out"))
    assert (found.model, found.images) == ("org/model", None)
    (tmp_path / "org/model").mkdir(parents=True)
    assert JOB.anywhere().model == str(tmp_path / "org/model")
    assert Job("gs://b/*.tar", "s3://b/out", "text", "gs://b/m").anywhere() == Job(
        "gs://b/*.tar", "s3://b/out", "text", "gs://b/m"
    )


def test_options_that_contradict(capsys):
    given = ["--kind", "text", "--source", "a.jsonl", "--model", "m", "--out", "o"]
    assert main([*given, "--engine", "ray", "--part", "0/2"]) == 2
    assert main([*given, "--address", "auto"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "error: --part is for processes without an engine; Ray shares the work by itself",
        "error: --address is that of a Ray cluster; add --engine ray",
    ]


def test_without_ray(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    given = ["--kind", "text", "--source", "a.jsonl", "--model", "m", "--out", "o", "--engine", "ray"]
    assert main(given) == 2
    assert capsys.readouterr().err == "error: --engine ray needs Ray; pip install -e '.[ray]'\n"


def test_a_cluster_that_does_not_answer():
    port = free_port()
    for address in (f"localhost:{port}", f"ray://localhost:{port}", "localhost:99999999"):
        with pytest.raises(OSError, match=f"no Ray cluster answers at {address} "):
            reach(address)
    reach("auto")
    reach(None)


@pytest.mark.slow
def test_errors_of_tasks_are_one_line(tmp_path, capsys):
    pytest.importorskip("ray")
    given = ["--kind", "text", "--source", str(tmp_path / "nothing.jsonl"), "--model", "m", "--out", "o"]
    assert main([*given, "--engine", "ray"]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: ") and told.endswith("nothing.jsonl: no such file or folder")
