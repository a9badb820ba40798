"""A checkpoint's own tokenizer: text to ids and back, also while streaming."""

from __future__ import annotations

import contextlib
import os
import pathlib
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import tokenizers

from janus_jax.io import files
from janus_jax.io.fields import Fields, shown
from janus_jax.io.messages import one_line
from janus_jax.io.stores import as_path

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
BEGIN_OF_IMAGE, END_OF_IMAGE, IMAGE_PLACEHOLDER = "<begin_of_image>", "<end_of_image>", "<image_placeholder>"

_MAX_TOKENIZER = 64 << 20  # bytes; Janus's has 5 MB
_PROBE = "User: a red boat, été 猫 🙂 12\n\n"
_stderr = threading.Lock()


class Tokenizer:
    """Text to ids and back with a `tokenizers.Tokenizer`; knows Janus's special tokens by name and by id.

    Special tokens written inside a text are parsed as such, as in the reference: a text can end its own turn.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        bos: str = BOS,
        eos: str = EOS,
        pad: str = PAD,
        begin_of_image: str = BEGIN_OF_IMAGE,
        end_of_image: str = END_OF_IMAGE,
        image_placeholder: str = IMAGE_PLACEHOLDER,
    ):
        # A tokenizer.json may have its own length limit, which would silently cut prompts.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.eos, self.begin_of_image, self.image_placeholder = eos, begin_of_image, image_placeholder
        self.bos_id, self.eos_id, self.pad_id = map(self._special_id, (bos, eos, pad))
        self.begin_of_image_id, self.end_of_image_id = map(self._special_id, (begin_of_image, end_of_image))
        self.image_placeholder_id = self._special_id(image_placeholder)
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> Tokenizer:
        """The tokenizer of a checkpoint folder: tokenizer.json, and the names of its special tokens.

        The names of BOS and EOS come from tokenizer_config.json, else special_tokens_map.json; those of the image tags
        and pad from processor_config.json (`image_tag`, `image_start_tag`, `image_end_tag`, `pad_tag`). The defaults
        are DeepSeek's names. `pad_token` is used only if DeepSeek's pad is unknown: the reference ignores it, since it
        may be EOS.

        Raises FileNotFoundError without tokenizer.json, ValueError if a file is damaged or a special token unknown.
        """
        folder = as_path(folder)
        path = folder / "tokenizer.json"
        if not path.exists():
            name = one_line(path)
            raise FileNotFoundError(f"{name} is missing; copy it from the checkpoint's repository into the folder")
        text = files.read_text(path, _MAX_TOKENIZER)
        damaged = f"{one_line(path)} is not a readable tokenizer"
        try:
            with _quietly(), _no_panic(damaged):
                tokenizer = tokenizers.Tokenizer.from_str(text)
        except ValueError:
            raise
        except Exception as error:  # the Rust side raises bare Exception
            raise ValueError(f"{damaged} ({one_line(error)}); copy it again") from None

        named = _token_names(folder)
        known_pad = PAD if tokenizer.token_to_id(PAD) is not None else named("pad_token", PAD)
        path = folder / "processor_config.json"
        processor = Fields(files.read_json_object(path, missing_ok=True))
        with _naming(path):
            tags = {key: processor.text(key, "", null=True) for key in ("image_start_tag", "image_end_tag")}
            tags |= {key: processor.text(key, "", null=True) for key in ("image_tag", "pad_tag")}
        with _naming(folder / "tokenizer.json"):
            made = cls(
                tokenizer,
                bos=named("bos_token", BOS),
                eos=named("eos_token", EOS),
                pad=tags["pad_tag"] or known_pad,
                begin_of_image=tags["image_start_tag"] or BEGIN_OF_IMAGE,
                end_of_image=tags["image_end_tag"] or END_OF_IMAGE,
                image_placeholder=tags["image_tag"] or IMAGE_PLACEHOLDER,
            )
            with _quietly():  # many defects only show when text is encoded
                made.decode(made.encode(_PROBE))
        return made

    def _special_id(self, name: str) -> int:
        token_id = self._tokenizer.token_to_id(name)
        if token_id is None:
            raise ValueError(f"it lacks the special token {shown(name)}; use the tokenizer files of a Janus checkpoint")
        return token_id

    def is_added_token(self, name: str) -> bool:
        """Whether `name` is one added token, which surrounding text cannot split or merge."""
        return any(token.content == name for token in self._tokenizer.get_added_tokens_decoder().values())

    def special_tokens(self) -> list[str]:
        """The tokens that a user's text should not contain: all those marked special, and Janus's own."""
        own = {self.bos_id, self.eos_id, self.pad_id, self.begin_of_image_id, self.end_of_image_id}
        own.add(self.image_placeholder_id)
        added = self._tokenizer.get_added_tokens_decoder()
        return [token.content for token_id, token in added.items() if token.special or token_id in own]

    def state(self) -> str:
        """The full state that determines which ids a text gets, for comparing tokenizers."""
        return self._tokenizer.to_str()

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Ids of `text`, with exactly one BOS in front if `add_bos`, whatever tokenizer.json's post-processor adds."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"the text is not valid Unicode at character {error.start} ({error.reason})") from None
        with _no_panic("the tokenizer fails on a text"):
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if add_bos and ids[:1] != [self.bos_id] else ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, and ids without a token are skipped."""
        with _no_panic("the tokenizer fails to decode"):
            return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def stream(self, skip_special_tokens: bool = True) -> StreamDecoder:
        """A new `StreamDecoder` over this tokenizer."""
        return StreamDecoder(self, skip_special_tokens)

    def answer(self, ids: Sequence[int]) -> str:
        """The text of `ids` in front of EOS, stripped."""
        end = ids.index(self.eos_id) if self.eos_id in ids else len(ids)
        return self.decode(ids[:end]).strip()

    def stream_answer(self, pieces: Iterable[Iterable[int]]) -> Iterator[str]:
        """The text of ids that come in pieces, as it becomes certain; ids behind EOS in a piece are ignored."""
        stream = self.stream()
        for piece in pieces:
            for token in piece:
                if token == self.eos_id:
                    break
                if text := stream.push(int(token)):
                    yield text
        if text := stream.finish():
            yield text


def _token_names(folder: pathlib.Path) -> Callable[[str, str], str]:
    """A function from key and default to a special token's name in tokenizer_config.json or special_tokens_map.json."""
    paths = [folder / "tokenizer_config.json", folder / "special_tokens_map.json"]
    sources = [(path, Fields(files.read_json_object(path, missing_ok=True))) for path in paths]

    def named(key: str, default: str) -> str:
        for path, fields in sources:
            with _naming(path):
                token = fields.get(key, None)
                token = Fields(token, key).get("content", None) if isinstance(token, Mapping) else token
                if token is not None and not isinstance(token, str):
                    raise fields.wrong(key, token, "a token")
            if token:
                return token
        return default

    return named


class StreamDecoder:
    """Decodes ids as they arrive: the pieces from `push` and the last one from `finish` join to `decode` of all ids.

    A character that spans several tokens comes out whole, with its last token.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer, self._skip_special_tokens = tokenizer, skip_special_tokens
        self._ids: list[int] = []
        self._emitted = 0

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes: often one word, sometimes ''."""
        self._ids.append(token_id)
        # Unfinished UTF-8 decodes to U+FFFD at the end; the text before it no longer changes.
        return self._emit(self._decode().rstrip("\ufffd"))

    def finish(self) -> str:
        """The text held back so far: '' unless the ids end within a character."""
        return self._emit(self._decode())

    def _decode(self) -> str:
        # All ids each time: exact for every kind of decoder, and 0.6 ms for 4096 ids is nothing next to a model step.
        return self._tokenizer.decode(self._ids, self._skip_special_tokens)

    def _emit(self, text: str) -> str:
        piece, self._emitted = text[self._emitted :], max(self._emitted, len(text))
        return piece


# ---------------------------------------------------------------- Rust and damaged files


@contextlib.contextmanager
def _no_panic(place: str) -> Iterator[None]:
    """Turns a panic of the tokenizer's Rust code, which is not an Exception, into a ValueError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{place} ({one_line(error)}); copy tokenizer.json again") from None


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Holds back what any thread writes to standard error meanwhile, and drops it if the block fails.

    A panic prints its backtrace there before Python sees it.
    """
    with _stderr, tempfile.TemporaryFile() as kept:
        try:
            real = os.dup(2)
        except OSError:  # there is no standard error
            yield
            return
        try:
            os.dup2(kept.fileno(), 2)
            try:
                yield
            finally:
                os.dup2(real, 2)
            kept.seek(0)
            os.write(2, kept.read())
        finally:
            os.close(real)


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{one_line(path)}: {error}") from None
