"""Which roles a checkpoint has, by what came with it and never by what its folder happens to be called."""

import json
import pathlib

import pytest

from janus_jax.processing.roles import detect_roles


def roles_of(
    folder: pathlib.Path, size=(3, 96), pad_id=5, tokens=("<|User|>",), hub_id=None, files=None
) -> tuple[str, str]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (files or {}).items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8")
    return detect_roles(folder, size, pad_id, tokens.__contains__, hub_id)


@pytest.mark.parametrize("name", ["janus-1.3b", "Janus-1.3B", "not-janus-1.3b", "models--a--Janus-1.3B"])
def test_a_folders_name_says_nothing(tmp_path, name):
    assert roles_of(tmp_path / name) == ("pro", "<|User|> is a token")
    assert roles_of(tmp_path / name, tokens=()) == ("old", "<|User|> is not a token")


def test_published_models_are_known_by_sizes_and_tokenizer(tmp_path):
    """Janus-1.3B has Pro-1B's sizes and Pro-7B's tokenizer. Whether `<|User|>` is a token does not matter then."""
    for tokens in ((), ("<|User|>",)):
        assert roles_of(tmp_path, (24, 2048), 100015, tokens)[0] == "old"
        assert roles_of(tmp_path, (24, 2048), 100002, tokens)[0] == "pro"
        assert roles_of(tmp_path, (30, 4096), 100015, tokens)[0] == "pro"
    assert (
        roles_of(tmp_path, (24, 2048), 100015)[1] == "24 layers of 2048 with the pad token at 100015 are Janus-1.3B's"
    )


def test_the_hubs_cache_names_the_repository(tmp_path):
    known = {"Janus-1.3B": "old", "Janus-Pro-1B": "pro", "JanusFlow-1.3B": "old", "x--Janus-1.3B": "old"}
    for name, roles in known.items():
        snapshot = tmp_path / f"models--deepseek-ai--{name}" / "snapshots" / "0123"
        found = roles_of(snapshot, tokens=() if name != "Janus-1.3B" else ("<|User|>",))
        assert found[0] == roles
        assert found[1].startswith("the hub's cache calls it") == (name in ("Janus-1.3B", "Janus-Pro-1B"))


@pytest.mark.parametrize(
    ("files", "roles", "why"),
    [
        ({"processor_config.json": {"sft_format": "deepseek_old"}}, "old", "sft_format"),
        ({"processor_config.json": {"sft_format": "deepseek"}}, "pro", "is a token"),
        ({"config.json": {"_name_or_path": "deepseek-ai/Janus-1.3B"}}, "old", "_name_or_path"),
        ({"config.json": {"_name_or_path": "/data/janus-1.3b"}}, "pro", "is a token"),
        ({"config.json": {"_name_or_path": 13}}, "pro", "is a token"),
        ({"chat_template.jinja": "{{ 'User' }}: {{ message }}"}, "old", "chat_template.jinja writes User"),
        ({"chat_template.json": {"chat_template": "<|User|>: {{ m }}"}}, "pro", "chat_template.json writes <|User|>"),
        ({"chat_template.json": {"chat_template": "{{ UserError }}"}}, "pro", "is a token"),
        ({"chat_template.json": {"chat_template": ["User"]}}, "pro", "is a token"),
    ],
)  # fmt: skip
def test_what_files_say(tmp_path, files, roles, why):
    found = roles_of(tmp_path, files=files)
    assert found[0] == roles and why in found[1]


def test_the_caller_knows_better_than_the_sizes(tmp_path):
    assert roles_of(tmp_path, (24, 2048), 100002, hub_id="deepseek-ai/Janus-1.3B") == (
        "old",
        "the hub id is deepseek-ai/Janus-1.3B",
    )
