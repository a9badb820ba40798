"""Tokenizer and streaming: special tokens by name, one BOS, whole characters, and what damaged files get."""

import json
import os
import pathlib
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.tiny.tokenizer import BOS, PAD, edit_json, write_tokenizer
from janus_jax.config import read_config
from janus_jax.processing.chat import EOS, StreamDecoder, Tokenizer

MODEL_VOCAB_SIZE = read_config(pathlib.Path(__file__).parents[1] / "golden" / "janus_tiny").language.vocab_size


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("pro"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_folder(folder)


@pytest.fixture
def own_folder(folder, tmp_path):
    """A copy of the tokenizer folder that a test may spoil."""
    return pathlib.Path(shutil.copytree(folder, tmp_path / "copy"))


def one_line(error):
    return "\n" not in str(error.value)


# ---------------------------------------------------------------- tokenizer


def test_special_ids_come_from_the_files(tokenizer):
    assert tokenizer.vocab_size == 400 <= MODEL_VOCAB_SIZE
    for name, token_id in [
        (BOS, tokenizer.bos_id),
        (EOS, tokenizer.eos_id),
        (PAD, tokenizer.pad_id),
        ("<begin_of_image>", tokenizer.begin_of_image_id),
        ("<end_of_image>", tokenizer.end_of_image_id),
        ("<image_placeholder>", tokenizer.image_placeholder_id),
    ]:
        assert tokenizer.encode(name, add_bos=False) == [token_id]
        assert tokenizer.decode([token_id], skip_special_tokens=False) == name
        assert tokenizer.decode([token_id]) == ""
    assert len({tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}) == 3


def test_ids_of_another_size_are_not_hard_coded(tmp_path, tokenizer):
    other = Tokenizer.from_folder(write_tokenizer(tmp_path, vocab_size=300))
    assert other.vocab_size == 300
    assert other.pad_id != tokenizer.pad_id


def test_pad_token_of_the_config_does_not_displace_deepseeks_pad(folder, tokenizer):
    # The reference looks its pad_tag up in the vocabulary and ignores pad_token, which is EOS here.
    assert json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["pad_token"] == EOS
    assert tokenizer.decode([tokenizer.pad_id], skip_special_tokens=False) == PAD


def test_pad_token_stands_in_where_deepseeks_pad_is_unknown(tmp_path):
    tokenizer = Tokenizer.from_folder(write_tokenizer(tmp_path, without=(PAD,)))
    assert tokenizer.pad_id == tokenizer.eos_id


def test_encode_and_decode_are_inverse(tokenizer):
    for text in ("Hello there.", "  two  spaces\n\nand lines ", "你好，世界", "🙂🎨 café", ""):
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos_id
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text, add_bos=False) == ids[1:]


def test_special_tokens_in_a_text_are_parsed(tokenizer):
    ids = tokenizer.encode(f"a{EOS}b<image_placeholder>c", add_bos=False)
    assert ids.count(tokenizer.eos_id) == 1
    assert ids.count(tokenizer.image_placeholder_id) == 1


def test_one_bos_whatever_the_post_processor_adds(tmp_path, tokenizer):
    eager = Tokenizer.from_folder(write_tokenizer(tmp_path, post_processor_bos=True))
    raw = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert raw["post_processor"]["type"] == "TemplateProcessing"
    for text in ("Hello", BOS + "Hello"):
        assert eager.encode(text).count(eager.bos_id) == 1
        assert eager.encode(text) == tokenizer.encode("Hello")
    assert eager.bos_id not in eager.encode("Hello", add_bos=False)


def test_truncation_and_padding_of_the_file_are_off(own_folder):
    path = own_folder / "tokenizer.json"
    whole = Tokenizer.from_folder(own_folder).encode("a picture of a house " * 20)
    truncation = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 500},
        "direction": "Right",
        "pad_to_multiple_of": 0,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": EOS,
    }
    edit_json(path, truncation=truncation, padding=padding)
    assert Tokenizer.from_folder(own_folder).encode("a picture of a house " * 20) == whole


def test_special_token_names_may_be_overridden(own_folder, tokenizer):
    edit_json(
        own_folder / "processor_config.json",
        image_tag="<|User|>",
        image_start_tag="<|Assistant|>",
        image_end_tag=EOS,
        pad_tag=BOS,
    )
    edit_json(own_folder / "tokenizer_config.json", bos_token=None, eos_token={"content": PAD})
    edit_json(own_folder / "special_tokens_map.json", bos_token={"content": "<end_of_image>"})
    other = Tokenizer.from_folder(own_folder)
    assert [other.image_placeholder_id, other.begin_of_image_id] == tokenizer.encode("<|User|><|Assistant|>", False)
    assert (other.end_of_image_id, other.pad_id) == (tokenizer.eos_id, tokenizer.bos_id)
    assert (other.bos_id, other.eos_id, other.eos) == (tokenizer.end_of_image_id, tokenizer.pad_id, PAD)


def test_tokenizer_json_alone_is_enough(own_folder, tokenizer):
    for path in own_folder.iterdir():
        if path.name != "tokenizer.json":
            path.unlink()
    alone = Tokenizer.from_folder(own_folder)
    assert (alone.bos_id, alone.eos_id, alone.pad_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)


def test_missing_tokenizer_json(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing; copy it") as error:
        Tokenizer.from_folder(tmp_path)
    assert one_line(error)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"version": "1.0"}', b"version https://git-lfs"])
def test_damaged_tokenizer_json(own_folder, content):
    (own_folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not (a readable tokenizer|UTF-8)"):
        Tokenizer.from_folder(own_folder)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "processor_config.json"])
@pytest.mark.parametrize("content", ["{", "[1]"])
def test_damaged_side_files(own_folder, name, content):
    (own_folder / name).write_text(content)
    with pytest.raises(ValueError, match=name) as error:
        Tokenizer.from_folder(own_folder)
    assert one_line(error)


@pytest.mark.parametrize("token", [BOS, EOS, "<begin_of_image>", "<end_of_image>", "<image_placeholder>"])
def test_missing_special_token_is_named(tmp_path, token):
    write_tokenizer(tmp_path, without=(token,))
    with pytest.raises(ValueError) as error:
        Tokenizer.from_folder(tmp_path)
    assert token in str(error.value) and "tokenizer.json" in str(error.value) and one_line(error)


def test_special_token_of_a_wrong_type(own_folder):
    edit_json(own_folder / "tokenizer_config.json", bos_token=[5])
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(own_folder)


def test_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(ValueError, match="not valid Unicode at character 2"):
        tokenizer.encode("ab\udcff")


# ---------------------------------------------------------------- streaming


def pieces_of(tokenizer, ids, **options):
    stream = tokenizer.stream(**options)
    return [*(stream.push(token_id) for token_id in ids), stream.finish()]


@given(st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from("🙂🎨👩‍🚀你好é \n�")), max_size=40))
def test_stream_pieces_join_to_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    pieces = pieces_of(tokenizer, ids, skip_special_tokens=False)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=False)
    if "�" not in text:
        assert not any("�" in piece for piece in pieces)


@given(st.lists(st.integers(0, 399), max_size=60), st.booleans())
def test_stream_of_any_ids_joins_to_decode(tokenizer, ids, skip):
    pieces = pieces_of(tokenizer, ids, skip_special_tokens=skip)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


def test_a_character_of_several_tokens_comes_out_whole(tokenizer):
    ids = tokenizer.encode("a🚀b", add_bos=False)
    assert len(ids) > 4
    pieces = pieces_of(tokenizer, ids)
    assert [piece for piece in pieces if piece] == ["a", "🚀", "b"]


def test_a_cut_character_comes_with_finish(tokenizer):
    ids = tokenizer.encode("a🚀", add_bos=False)[:-1]
    *pushed, last = pieces_of(tokenizer, ids)
    assert "".join(pushed) == "a"
    assert last == "�" == tokenizer.decode(ids)[1:]


def test_streams_are_independent(tokenizer):
    first, second = tokenizer.stream(), StreamDecoder(tokenizer)
    token_id = tokenizer.encode("x", add_bos=False)[0]
    assert first.push(token_id) == "x"
    assert second.push(token_id) == "x"
    assert first.finish() == second.finish() == ""


PANICS = {
    "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"},  # while it is read
    "pre_tokenizer": {"type": "FixedLength", "length": 0},  # with the first text
    "decoder": {"type": "Strip", "content": "Ċ", "start": 50, "stop": 50},  # with the first ids
}


@pytest.mark.parametrize("part", PANICS)
def test_panics_of_rust_are_value_errors(tmp_path, part, capfd):
    """They derive from BaseException, and print a backtrace of their own first."""
    folder = write_tokenizer(tmp_path)
    raw = json.loads((folder / "tokenizer.json").read_text()) | {part: PANICS[part]}
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"tokenizer\.json.*copy tokenizer\.json again") as error:
        Tokenizer.from_folder(folder)
    assert "\n" not in str(error.value) and capfd.readouterr().err == ""


def test_what_others_print_meanwhile_is_kept(capfd):
    from janus_jax.processing.tokenizer import _quietly

    with _quietly():
        os.write(2, b"from elsewhere\n")
    assert capfd.readouterr().err == "from elsewhere\n"
    with pytest.raises(ValueError, match="bad"), _quietly():
        os.write(2, b"a backtrace\n")
        raise ValueError("bad")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "raw", "told"),
    [
        ("tokenizer_config.json", '{"bos_token": 3}', "bos_token must be a token, got 3"),
        ("tokenizer_config.json", '{"eos_token": {"content": []}}', r"eos_token must be a token, got \[\]"),
        ("special_tokens_map.json", '{"eos_token": true}', "eos_token must be a token, got True"),
        ("processor_config.json", '{"image_tag": []}', r"image_tag must be a string, got \[\]"),
        ("tokenizer_config.json", "[" * 3000 + "]" * 3000, "nested"),
        ("special_tokens_map.json", '{"a": 1e999}', "too large for float64"),
        ("tokenizer.json", '{"a": ' * 3000, "not a readable tokenizer"),
        ("processor_config.json", "[]", "holds a list, not a JSON object"),
    ],
)
def test_side_files_of_others(tmp_path, name, raw, told):
    folder = write_tokenizer(tmp_path)
    for other in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / other).unlink(missing_ok=True)
    (folder / name).write_text(raw)
    with pytest.raises(ValueError, match=rf"{name}.*{told}") as error:
        Tokenizer.from_folder(folder)
    assert "\n" not in str(error.value)


def test_special_files_are_no_tokenizers(tmp_path):
    folder = write_tokenizer(tmp_path)
    for name in ("processor_config.json", "tokenizer.json"):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        with pytest.raises(ValueError, match=f"{name} is a FIFO"):
            Tokenizer.from_folder(folder)
