"""What a run reports, what resuming cuts off, and the pictures of it."""

import json
import sys
import types

import pytest
from PIL import Image

from train.run.figures import benchmark_curves, loss_curves, smooth
from train.run.metrics import Metrics, duration, read_metrics


def test_lines_are_written_and_read(tmp_path, capsys):
    with Metrics(tmp_path / "run", total_steps=10) as metrics:
        metrics.write(1, {"loss": 2.5, "loss_text": 3, "learning_rate": 1e-4, "tokens": 77})
        metrics.write(2, {"loss": float("nan")})
        metrics.write(2, {"loss": 2.0, "accuracy": 0.5}, prefix="eval")
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "run" / "metrics.jsonl") == [
        {"step": 1, "train/loss": 2.5, "train/loss_text": 3.0, "train/learning_rate": 1e-4, "train/tokens": 77.0},
        {"step": 2, "train/loss": None},
        {"step": 2, "eval/loss": 2.0, "eval/accuracy": 0.5},
    ]  # fmt: skip
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("step 1/10  ") and "steps/s" in first and " left  loss 2.5  loss_text 3  " in first
    assert "tokens" not in first and "loss nan" in second
    assert third == "step 2/10  eval  loss 2  accuracy 0.5"
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_time_left(tmp_path, capsys, monkeypatch):
    clock = iter([0.0, 40.0, 60.0, 70.0])
    monkeypatch.setattr("train.run.metrics.time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    with Metrics(tmp_path, total_steps=100, start_step=20) as metrics:
        metrics.write(30, {})  # compiles: 4 s a step
        metrics.write(40, {})  # and then 2 s a step
        metrics.write(50, {})  # and then 1 s: 0.65 steps/s on average
    assert capsys.readouterr().out.splitlines() == [
        "step 30/100  0.25 steps/s  4m40s left",
        "step 40/100  0.5 steps/s  2m00s left",
        "step 50/100  1 steps/s  1m17s left",
    ]
    assert [duration(s) for s in (0.4, 59.6, 3599, 3600, 90061)] == ["0s", "1m00s", "59m59s", "1h00m", "1d01h"]


def test_resuming_cuts_off_what_is_no_more(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "train/loss": 1.0}) for step in (1, 2, 3, 4)]
    path.write_text("\n".join(lines) + '\n{"step": 5, "tr')  # torn where the run was killed
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4]
    with Metrics(tmp_path, total_steps=5, start_step=2) as metrics:
        assert path.read_text() == "\n".join(lines[:2]) + "\n"
        metrics.write(3, {"loss": 9.0})
    assert read_metrics(path) == [
        {"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 1.0}, {"step": 3, "train/loss": 9.0}
    ]  # fmt: skip
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []
    Metrics(tmp_path, total_steps=5).close()  # a run from the start has no past
    assert read_metrics(path) == []


def test_a_host_that_reports_nothing(tmp_path, capsys):
    with Metrics(tmp_path / "run", total_steps=1, enabled=False) as metrics:
        metrics.write(1, {"loss": 1.0})
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_without_tensorboard(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with Metrics(tmp_path, total_steps=2) as metrics:
        metrics.write(1, {"loss": 1.0})
        metrics.write(2, {"loss": 1.0})
    assert capsys.readouterr().err.count("hint: pip install tensorboardX") == 1
    assert len(read_metrics(tmp_path)) == 2


@pytest.mark.parametrize("bad", ["nonsense", "[1]", '{"loss": 1}', '{"step": "2"}', '{"step": true}'])
def test_a_bad_line_is_named(tmp_path, bad):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not a line of metrics with a step$"):
        read_metrics(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    # A run goes on without the line, and the file as it was is kept.
    with Metrics(tmp_path, total_steps=5, start_step=1) as metrics:
        metrics.write(2, {"loss": 1.0})
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2, "train/loss": 1.0}]
    (aside,) = tmp_path.glob("metrics-damaged-*.jsonl")
    assert aside.read_bytes() == before


def test_no_metrics_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl does not exist"):
        read_metrics(tmp_path)


# ---------------------------------------------------------------- pictures


def write_run(folder, steps, names, scale=5.0):
    folder.mkdir()
    lines = [
        {"step": step} | {f"{name}": scale / (1 + step / 20) for name in names} for step in range(1, steps + 1)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_curves_of_one_run_and_of_three_stages(tmp_path):
    kinds = ("understanding", "text", "generation")
    one = write_run(tmp_path / "one", 40, [f"train/loss_{kind}" for kind in kinds])
    two = write_run(tmp_path / "two", 80, ["train/loss_text", "eval/loss_text"])
    for name, runs in {"single": one, "staged": [one, two / "metrics.jsonl", one]}.items():
        out = loss_curves(runs, tmp_path / "pictures" / f"{name}.png", title="a title")
        image = Image.open(out)
        assert image.size[0] > 800
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 24)}
        for color in ((0x25, 0x63, 0xEB), (0x05, 0x96, 0x69), (0xDC, 0x26, 0x26)):
            assert color in colors  # each task's curve is there


def test_nothing_to_draw(tmp_path):
    empty = write_run(tmp_path / "empty", 3, ["train/grad_norm"])
    with pytest.raises(ValueError, match=r"no train/loss_\{understanding,text,generation\} to draw$"):
        loss_curves(empty, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_curves_of_benchmarks(tmp_path):
    """One for each benchmark, over consecutive runs, with its interval; only the main figure has one."""
    runs = []
    for number in range(2):
        values = {"pope/f1_random": 80.0 + number, "pope/f1_random_low": 75.0, "pope/f1_random_high": 85.0}
        values |= {"mme/perception": 900.0, "mme/perception_low": 850.0, "mme/perception_high": 990.0, "mme/ocr": 60.0}
        runs.append(tmp_path / str(number))
        with Metrics(runs[-1], 4, writers=()) as metrics:
            for step in (2, 4):
                metrics.write(step, values, "evals", shown=("pope/f1_random",))
    out = benchmark_curves(runs, tmp_path / "evals.png", "a title", {"mme": "MME"})
    with Image.open(out) as image:
        assert image.size == (1200, 510), "two panels"
        assert len(image.convert("RGB").getcolors(1 << 20)) > 20
    with pytest.raises(ValueError, match="no benchmarks"):
        with Metrics(tmp_path / "none", 4, writers=()) as metrics:
            metrics.write(1, {"loss": 1.0})
        benchmark_curves(tmp_path / "none", tmp_path / "x.png")


def test_smoothing_is_unbiased():
    assert smooth([2.0] * 300) == pytest.approx([2.0] * 300)
    assert smooth([1.0, 5.0]) == [1.0, 5.0]  # too few to smooth
    noisy = smooth([1.0, 3.0] * 200)
    assert max(abs(value - 2) for value in noisy[100:]) < 0.1
