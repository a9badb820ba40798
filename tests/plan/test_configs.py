"""The runs in configs/, their fields from the command line, and what is refused before a run begins."""

import dataclasses
import os
import subprocess
import sys
import typing

import jax
import pytest

from janus_jax.config import PRESETS
from janus_jax.sharding import flatten, make_mesh
from janus_jax.weights.torch_weights import abstract_params
from train import overrides
from train.command_line import help_text, parse_args
from train.config import TRAINED, TrainConfig
from train.overrides import config_names, diff, flat, load_config, override, to_json, value_text
from train.step.state import abstract_state
from train.validate import validate

STAGES = [f"{family}_stage{stage}" for family in ("janus", "1b", "7b") for stage in (1, 2, 3)]

# Report, table 2 and section 3.1; Janus, table 1: learning rate, schedule, warm-up, weight decay, steps, batch, ratio.
REPORT = {
    "janus_stage1": (1e-3, "cosine", 300, 0.0, 10_000, 256, (1, 0, 1)),
    "janus_stage2": (1e-4, "constant", 5000, 0.0, 180_000, 512, (2, 3, 5)),
    "janus_stage3": (2e-5, "constant", 0, 0.1, 24_000, 256, (7, 3, 10)),
    "1b_stage1": (1e-3, "constant", 600, 0.0, 20_000, 256, (1, 0, 3)),
    "1b_stage2": (1e-4, "constant", 5000, 0.0, 270_000, 512, (2, 3, 5)),
    "1b_stage3": (4e-5, "constant", 0, 0.0, 80_000, 128, (5, 1, 4)),
    "7b_stage1": (1e-3, "constant", 600, 0.0, 20_000, 256, (1, 0, 3)),
    "7b_stage2": (1e-4, "constant", 5000, 0.0, 270_000, 512, (2, 3, 5)),
    "7b_stage3": (4e-5, "constant", 0, 0.0, 40_000, 128, (5, 1, 4)),
}
MODELS = {"janus": "janus_1_3b", "1b": "janus_pro_1b", "7b": "janus_pro_7b"}


# ---------------------------------------------------------------- the runs


@pytest.mark.parametrize("name", STAGES)
def test_the_report_s_numbers(name):
    c = load_config(name)
    o, d = c.optimizer, c.data
    assert (
        o.learning_rate, o.schedule, o.warmup_steps, o.weight_decay, c.steps, c.batch_size, d.ratio
    ) == REPORT[name]  # fmt: skip
    assert (o.b1, o.b2, o.clip) == (0.9, 0.95, 1.0)
    assert d.context == 4096
    assert d.guidance_dropout == 0.1
    assert d.text_loss == ("answers" if name.endswith("3") else "all")
    assert d.caption_cut == (0.25 if name == "janus_stage2" else 0.0)
    assert (d.early_steps, len(d.early_generation)) == ((120_000, 1) if name == "janus_stage2" else (0, 0))


@pytest.mark.parametrize("name", STAGES)
def test_stages_follow_one_another(name):
    c = load_config(name)
    family, stage = name.split("_stage")
    assert (c.name, c.stage, c.model) == (name, int(stage), PRESETS[MODELS[family]])
    if c.stage > 1:
        assert c.init_from == load_config(f"{family}_stage{c.stage - 1}").workdir
    assert c.init_from and c.tokenizer and c.workdir != c.init_from


@pytest.mark.parametrize("name", config_names())
def test_every_config_can_run(name):
    """And builds its whole state, at full size, on eight devices."""
    config = load_config(name)
    mesh = make_mesh({"fsdp": 8})
    for c in [config] if isinstance(config, TrainConfig) else config.run_stages:
        assert validate(c) == []
        state, frozen = abstract_state(c, mesh)  # raises where the mesh does not divide the model
        if c.adapter is not None:
            assert {path.rpartition("/")[2] for path in flatten(state.trained)} == {"lora_a", "lora_b"}
            continue
        assert set(state.trained) == set(TRAINED[c.stage]) and not set(frozen) & set(state.trained)
        sizes = {path: x.size for path, x in flatten({**state.trained, **frozen}).items()}
        assert sizes == {path: x.size for path, x in flatten(abstract_params(c.model)).items()}
        moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
        assert moments == 2 * sum(x.size for x in jax.tree.leaves(state.trained))


def test_every_run_is_known_and_helpers_are_not():
    assert {*STAGES, "debug", "lora_1b", "lora_7b"} <= set(config_names())
    assert not [name for name in config_names() if name.startswith("_")]


# ---------------------------------------------------------------- overrides


@dataclasses.dataclass(frozen=True)
class Part:
    """A part.

    Attributes:
      steps: updates,
        on two lines.
      low, high: the bounds.
    """

    steps: int = 3
    low: int = 0
    high: int = 9
    rate: float | None = None

    def __post_init__(self):
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")


@dataclasses.dataclass(frozen=True)
class Whole:
    part: Part = Part()
    stages: tuple[Part, ...] = (Part(), Part(steps=5))
    pair: tuple[int, str] = (1, "a")
    flag: bool = False
    kind: typing.Literal["red", "green", 3] = "red"
    names: tuple[str, ...] = ("x",)
    title: str = ""


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("part.steps=1_000", "part.steps", 1000),
        ("part.steps=1e3", "part.steps", 1000),
        ("part.steps=-2", "part.steps", -2),
        ("part.steps=9007199254740993", "part.steps", 9007199254740993),  # which no float holds
        ("part.rate=2e-5", "part.rate", 2e-5),
        ("part.rate=1", "part.rate", 1.0),
        ("part.rate=none", "part.rate", None),
        ("stages.1.steps=7", "stages.1.steps", 7),
        ("pair=4,b", "pair", (4, "b")),
        ("pair.0=4", "pair", (4, "a")),
        ("flag=true", "flag", True),
        ("flag=0", "flag", False),
        ("kind=green", "kind", "green"),
        ("kind=3", "kind", 3),
        ("names=a, b", "names", ("a", "b")),
        ("names=", "names", ()),
        ('names=["a, b","c"]', "names", ("a, b", "c")),
        ("title=a=b, c", "title", "a=b, c"),
        ("title=", "title", ""),
    ],
)
def test_overrides_are_typed(text, key, value):
    found = flat(override(Whole(), [text]))[key]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps", "an override must be key=value, got 'steps'"),
        ("=3", "an override must be key=value, got '=3'"),
        ("part.stps=3", "unknown key 'part.stps'; did you mean part.steps"),
        ("prt.steps=3", "unknown key 'prt.steps'; did you mean part.steps"),
        ("rate=3", "unknown key 'rate'; did you mean part.rate"),
        ("prt.rte=3", "unknown key 'prt.rte'; did you mean part?"),
        ("high.low=3", "unknown key 'high.low'; did you mean part.low or stages.0.low or stages.1.low?"),
        ("part.zzz=3", "unknown key 'part.zzz'; known in part: steps, low, high, rate"),
        ("qqq=3", "unknown key 'qqq'; known in the config: part, stages, pair, flag, kind, names, title"),
        ("part.steps.more=3", "unknown key 'part.steps.more'"),
        ("stages.2.steps=3", "unknown key 'stages.2.steps'; did you mean stages."),
        ("part.steps=many", "part.steps=many: 'many' is not an integer"),
        ("part.steps=1.5", "part.steps=1.5: '1.5' is not an integer"),
        ("part.steps=", "part.steps=: '' is not an integer"),
        ("part.steps=none", "part.steps=none: 'none' is not an integer"),
        ("part.rate=fast", "part.rate=fast: 'fast' is not a number"),
        ("part.rate=nan", "part.rate=nan: 'nan' is not a number"),
        ("part.rate=inf", "part.rate=inf: 'inf' is not a number"),
        ("flag=maybe", "flag=maybe: 'maybe' is not true or false"),
        ("kind=gren", "kind=gren: 'gren' is not one of red, green, 3; did you mean green?"),
        ("pair=1", "pair=1: needs 2 values (int,str), got 1"),
        ("pair=b,1", "pair=b,1: 'b' is not an integer"),
        ("names=a,,b", "names=a,,b: 'a,,b' has nothing between two commas"),
        ("names=[a", "names=[a: '[a' begins like a JSON list but is not one"),
        ("part=3", "part is not a single value; set its fields: part.steps, part.low"),
        ("stages=", "stages is not a single value; set its fields: stages.0, stages.1"),
        ("part.low=10", "part.low=10: low 10 is above high 9"),
    ],
)
def test_bad_overrides_get_one_line(text, message):
    with pytest.raises(ValueError) as caught:
        override(Whole(), [text])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_overrides_are_put_in_place_together_and_the_last_one_counts():
    part = override(Whole(), ["part.low=10", "part.high=1", "part.high=12"]).part
    assert (part.low, part.high) == (10, 12)
    with pytest.raises(ValueError, match=r"^pair is set both as a whole and by its fields"):
        override(Whole(), ["pair=1,b", "pair.0=2"])


def test_overrides_of_a_run():
    words = "optimizer.learning_rate=2e-5 data.ratio=5,1,4 data.text=a,b model.language.layers=2 mesh.fsdp=8 stage=2"
    c = load_config("7b_stage3", [*words.split(), "data.understanding="])
    assert (c.optimizer.learning_rate, c.data.ratio, c.data.text) == (2e-5, (5, 1, 4), ("a", "b"))
    assert (c.model.language.layers, c.mesh.fsdp, c.stage, c.data.understanding) == (2, 8, 2, ())
    with pytest.raises(ValueError, match=r"^model\.language\.heads=7: 7 attention heads must be a multiple"):
        load_config("7b_stage3", ["model.language.heads=7"])
    with pytest.raises(ValueError, match=r"^unknown key 'learning_rate'; did you mean optimizer\.learning_rate\?$"):
        load_config("7b_stage3", ["learning_rate=1"])
    with pytest.raises(ValueError, match=r"^stage=4: '4' is not one of 1, 2, 3$"):
        load_config("7b_stage3", ["stage=4"])


@pytest.mark.parametrize("name", config_names())
def test_printed_values_are_overrides(name):
    config = load_config(name)
    assert load_config(name, [f"{key}={value_text(value)}" for key, value in flat(config).items()]) == config


def test_texts_with_commas_survive_printing():
    config = Whole(names=("a, b", "[c"), pair=(1, ""))
    assert override(Whole(), [f"{key}={value_text(value)}" for key, value in flat(config).items()]) == config


def test_json_and_diff():
    a, b = load_config("7b_stage3"), load_config("7b_stage3", ["data.ratio=1,0,3", "model.language.layers=2"])
    assert diff(a, b) == ["model.language.layers", "data.ratio"]
    assert diff(a, to_json(a)) == []
    assert diff(to_json(a), b) == ["model.language.layers", "data.ratio"]
    assert diff(Whole(), override(Whole(), ["stages.1.steps=6"])) == ["stages.1.steps"]
    older = to_json(a)
    del older["seed"]
    assert diff(older, a) == ["seed"]


# ---------------------------------------------------------------- names and files


def test_unknown_names_get_the_nearest():
    with pytest.raises(ValueError, match=r"^unknown config '7b_stag3'; did you mean 7b_stage3.*; known: 1b_stage1, "):
        load_config("7b_stag3")
    with pytest.raises(ValueError, match=r"^unknown config '_shared'"):
        load_config("_shared")
    with pytest.raises(FileNotFoundError, match=r"^config file nowhere/x\.py does not exist$"):
        load_config("nowhere/x.py")


def test_a_config_may_be_any_file(tmp_path):
    good = tmp_path / "mine.py"
    good.write_text("from tests.plan.test_configs import Whole\ndef get_config():\n    return Whole()\n")
    assert load_config(str(good), ["part.steps=4"]).part.steps == 4
    for text, message in {
        "x = 1": "it has no function get_config",
        "def get_config():\n    return {}": r"its get_config\(\) returns a dict, not a dataclass",
        "def get_config(:": "SyntaxError: ",
        "import nothing_like_it": "bad.py:1: ModuleNotFoundError: ",
        "def get_config():\n    return nothing": "bad.py:2: NameError: ",
    }.items():
        bad = tmp_path / "bad.py"
        bad.write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            load_config(str(bad))
        assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- command line


def test_help_lists_every_field(capsys):
    lines = help_text(load_config("debug", ["steps=77"])).splitlines()
    assert [line.split()[0] for line in lines] == list(flat(load_config("debug")))
    told = {line.split()[0]: line for line in lines}
    assert "= 77  # number of optimizer updates." in told["steps"]
    assert "constant|cosine" in told["optimizer.schedule"]
    text = help_text(Whole())
    assert "part.steps      int" in text and "# updates, on two lines." in text
    assert text.count("# the bounds.") == 6 and "float or none" in text


def test_command_line(capsys):
    assert parse_args(["steps=5", "--config", "debug", "seed=-1"])[0] == load_config("debug", ["steps=5", "seed=-1"])
    for argv, shown in {
        ("--help",): "configs: 1b_stage1, ",
        ("--config", "debug", "--help"): "optimizer.learning_rate",
        ("--config", "debug", "--print-config", "data.ratio=1,0,1"): "\ndata.ratio = 1,0,1\n",
    }.items():
        with pytest.raises(SystemExit) as caught:
            parse_args(argv)
        assert caught.value.code == 0
        assert shown in capsys.readouterr().out.replace("\n  ", " ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "error: --config NAME is missing; known: "),
        (["--config"], "error: argument --config: expected one argument"),
        (["--config", "debgu"], "error: unknown config 'debgu'; did you mean debug?"),
        (["--config", "debug", "stps=1"], "error: unknown key 'stps'; did you mean steps"),
        (["--config", "debug", "--steps", "5"], "error: unrecognized arguments: --steps"),
    ],
)
def test_bad_command_lines_get_one_line_and_exit_2(capsys, argv, message):
    with pytest.raises(SystemExit) as caught:
        parse_args(argv)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(message) and captured.err.count("\n") == 1 and not captured.out


def test_names_are_found_from_anywhere(tmp_path):
    root = str(overrides.CONFIGS.parent)
    code = "from train.command_line import parse_args; parse_args(['--config', 'debug', '--print-config'])"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    assert "\nsteps = 8\n" in found.stdout


# ---------------------------------------------------------------- what cannot run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("name=", "name is empty"),
        ("workdir=", "workdir is empty"),
        ("tokenizer=", "tokenizer is empty, and there is no init_from"),
        ("steps=0", "steps must be at least 1, got 0"),
        ("accumulate=3", "batch_size=8 must be a multiple of accumulate=3"),
        ("accumulate=0", "accumulate must be at least 1"),
        ("save_every=-1", "save_every must be at least 1"),
        ("log_every=0", "log_every must be at least 1"),
        ("keep=0", "keep must be at least 1"),
        ("export_every=-1", "export_every must be at least 0"),
        ("profile_steps=-1", "profile_steps must be at least 0"),
        ("loss_chunk=100", "loss_chunk=100 does not divide data.context=256"),
        ("attention=splash data.context=256", "attention=splash does not support data.context=256 with 4 heads of 24"),
        ("data.ratio=0,0,0", "data.ratio must be three integers of at least 0"),
        ("data.ratio=1,-1,2", "data.ratio must be three integers of at least 0"),
        ("data.text=", "data.ratio=2,1,2 asks for text samples, but data.text names no folder"),
        ("data.text_weights=1,2", "data.text_weights has 2 weights for the 1 folders of data.text"),
        ("data.text_weights=-1", "data.text_weights must be numbers above 0, got -1.0"),
        ("data.guidance_dropout=1.5", "data.guidance_dropout must be between 0 and 1"),
        ("data.caption_cut=-0.1", "data.caption_cut must be between 0 and 1"),
        ("data.cache_gb=0", "data.cache_gb must be above 0 and at most 1,000,000, got 0.0"),
        ("data.cache=gs://bucket/samples", "data.cache: gs://bucket/samples is in a store"),
        ("data.workers=-1", "data.workers must be at least 0"),
        ("data.early_steps=5", "data.early_steps=5 and data.early_generation=: give both, or neither"),
        ("data.early_generation=a", "data.early_steps=0 and data.early_generation=a: give both, or neither"),
        ("data.context=1024", "data.context must be from 1 to the model's 512 positions, got 1024"),
        ("data.context=16 loss_chunk=16", "data.context must exceed the 16 codes of an image, got 16"),
        ("data.images_per_row=0", "data.images_per_row must be at least 1 for understanding samples"),
        ("optimizer.learning_rate=0", "optimizer.learning_rate must be a number above 0"),
        ("optimizer.warmup_steps=-1", "optimizer.warmup_steps must be at least 0"),
        ("optimizer.b2=1", "optimizer.b2 must be from 0 to below 1, got 1.0"),
        ("optimizer.clip=0", "optimizer.clip must be a number above 0"),
        ("evaluation.every=-1", "evaluation.every must be at least 0"),
        ("evaluation.batches=0", "evaluation.batches must be at least 1"),
        ("evaluation.understanding= evaluation.text= evaluation.generation=", "evaluation.every=4, but evaluation"),
        ("samples.every=-1", "samples.every must be at least 0"),
        ("samples.prompts=", "samples.every=8, but samples.prompts is empty"),
        ("samples.images=0", "samples.images must be at least 1"),
        ("samples.temperature=-1", "samples.temperature must be at least 0"),
    ],
)
def test_validate_refuses(words, message):
    with pytest.raises(ValueError) as caught:
        validate(load_config("debug", words.split()))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_validate_refuses_an_unknown_stage():
    with pytest.raises(ValueError, match=r"^stage must be one of 1, 2, 3, got 4$"):
        validate(dataclasses.replace(load_config("debug"), stage=4))


def test_validate_remarks():
    remarks = validate(load_config("debug", ["data.ratio=1,0,1", "data.images_per_row=20", "steps=2"]))
    assert [remark.split(":")[0] for remark in remarks] == [
        "data.text is not read", "data.images_per_row=20", "optimizer.warmup_steps=2",
    ]  # fmt: skip
    assert validate(load_config("debug", ["data.ratio=0,1,1", "data.images_per_row=0"])) != []
    assert validate(load_config("debug", ["samples.every=0", "samples.prompts=", "evaluation.every=0"])) == []
