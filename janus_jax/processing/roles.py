"""Detects the words by which a checkpoint calls the user and the assistant."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Callable, Iterator

from janus_jax.io.files import read_json_object, read_text
from janus_jax.io.messages import one_line
from janus_jax.io.stores import as_path

# (user, assistant): "pro" for the Janus-Pro models, "old" for Janus-1.3B.
ROLES = {"pro": ("<|User|>", "<|Assistant|>"), "old": ("User", "Assistant")}

# Janus-1.3B and Pro-1B have the same sizes, and the files published with 1.3B do not state its roles: only its code
# did. But 1.3B has Pro-7B's tokenizer, whose ids differ from Pro-1B's: (decoder layers, width, id of the pad token).
_PUBLISHED = {
    (24, 2048, 100015): ("old", "Janus-1.3B"),
    (24, 2048, 100002): ("pro", "Janus-Pro-1B"),
    (30, 4096, 100015): ("pro", "Janus-Pro-7B"),
}
_HUB_NAMES = {r"janus-1\.3b": "old", r"janus-pro-\d+b": "pro"}  # how the repository's name begins
_CACHED = re.compile(r"models--[\w.-]+?--([\w.-]+)")  # a repository's folder in the hub's cache


def detect_roles(
    folder: str | os.PathLike,
    size: tuple[int, int],
    pad_id: int,
    is_token: Callable[[str], bool],
    hub_id: str | None = None,
) -> tuple[str, str]:
    """The `ROLES` key of a checkpoint folder, and the evidence for it.

    Checked in this order: `sft_format` deepseek_old; the chat template; the name on the hub (`hub_id` from the caller,
    the folder in the hub's cache, `_name_or_path` in config.json); sizes and tokenizer of a published model; whether
    `<|User|>` is a token. The folder's own name is ignored.

    Args:
      size: layers and width of its decoder.
      pad_id, is_token: the id of its tokenizer's pad token, and whether a string is one token.
      hub_id: the hub id that the caller asked for, if any.
    """
    folder = as_path(folder)
    if read_json_object(folder / "processor_config.json", missing_ok=True).get("sft_format") == "deepseek_old":
        return "old", "sft_format in processor_config.json is deepseek_old"
    for name in ("chat_template.jinja", "chat_template.json"):
        template = _chat_template(folder / name)
        for roles, (user, _) in ROLES.items():
            if re.search(rf"(?<![|<\w]){re.escape(user)}(?![\w|>])", template):
                return roles, f"{name} writes {user}"
    for name, place in _hub_names(folder, hub_id):
        for pattern, roles in _HUB_NAMES.items():
            if re.match(pattern, name.rpartition("/")[2], re.IGNORECASE):
                return roles, f"{place} {one_line(name)}"
    if found := _PUBLISHED.get((*size, pad_id)):
        roles, name = found
        return roles, f"{size[0]} layers of {size[1]} with the pad token at {pad_id} are {name}'s"
    tag = ROLES["pro"][0]
    return ("pro", f"{tag} is a token") if is_token(tag) else ("old", f"{tag} is not a token")


def _chat_template(path: pathlib.Path) -> str:
    if not path.is_file():
        return ""
    template = read_json_object(path).get("chat_template") if path.suffix == ".json" else read_text(path)
    return template if isinstance(template, str) else ""


def _hub_names(folder: pathlib.Path, hub_id: str | None) -> Iterator[tuple[str, str]]:
    """Names of the repository that a checkpoint came from, and where each was found."""
    if hub_id is not None:
        yield hub_id, "the hub id is"
    # models--owner--name/snapshots/<commit>
    if folder.absolute().parent.name == "snapshots" and (cached := _CACHED.fullmatch(folder.absolute().parts[-3])):
        yield cached[1], "the hub's cache calls it"
    name = read_json_object(folder / "config.json", missing_ok=True).get("_name_or_path")
    if isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        yield name, "_name_or_path in config.json is"
