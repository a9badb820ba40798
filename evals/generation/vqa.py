"""Models of transformers that answer a question about a picture: classifiers, and models that chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from evals.generation.detector import loaded, loaded_model
from janus_jax.io.messages import one_line

_TOKENS = 10  # of an answer


class Answerer:
    """A model for visual question answering (BLIP, ViLT), or one that chats about pictures (Qwen-VL and others)."""

    def __init__(self, model: Any, processor: Any, chats: bool):
        """`chats`: whether the processor has a template for conversations, in which the question is put."""
        self._model, self._processor, self._chats = model.eval(), processor, chats
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    @classmethod
    def load(cls, path_or_hub_id: str) -> Answerer:
        """From a folder or the Hub, on the GPU if there is one; ValueError in one line if that is not possible."""
        from transformers import (
            AutoConfig,
            AutoModelForImageTextToText,
            AutoModelForVisualQuestionAnswering,
            AutoProcessor,
        )

        config = loaded(AutoConfig, path_or_hub_id)
        processor = loaded(AutoProcessor, path_or_hub_id)
        if not hasattr(processor, "tokenizer"):
            raise ValueError(f"{one_line(path_or_hub_id)} has no processor of pictures and text")
        chats = getattr(processor, "chat_template", None) is not None
        if not chats and type(config) not in AutoModelForVisualQuestionAnswering._model_mapping:
            raise ValueError(
                f"{one_line(path_or_hub_id)} is neither a model for visual question answering (BLIP, ViLT) nor one "
                "with a chat template"
            )
        kind = AutoModelForImageTextToText if chats else AutoModelForVisualQuestionAnswering
        return cls(loaded_model(kind, path_or_hub_id), processor, chats)

    def __call__(self, pictures: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
        """A reply to each question about its picture."""
        import torch

        with torch.no_grad():
            if self._chats:
                return self._chatted(pictures, questions)
            return [self._answered(*pair) for pair in zip(pictures, questions, strict=True)]

    def _answered(self, picture: Image.Image, question: str) -> str:
        """Each alone: BLIP of transformers takes the padding of a shorter question for a part of it."""
        inputs = self._processor(images=picture, text=question, return_tensors="pt").to(self._model.device)
        if not self._model.can_generate():
            return self._model.config.id2label[int(self._model(**inputs).logits.argmax())]
        return self._texts(self._model.generate(**inputs, max_new_tokens=_TOKENS, do_sample=False))[0]

    def _chatted(self, pictures: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
        asked = [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": picture},
                        {"type": "text", "text": f"{question} Please answer yes or no."},
                    ],
                }
            ]
            for picture, question in zip(pictures, questions, strict=True)
        ]
        inputs = self._processor.apply_chat_template(
            asked,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self._model.device)
        said = self._model.generate(**inputs, max_new_tokens=_TOKENS, do_sample=False)
        return self._texts(said[:, inputs["input_ids"].shape[1] :])

    def _texts(self, ids: Any) -> list[str]:
        return [each.strip() for each in self._processor.tokenizer.batch_decode(ids, skip_special_tokens=True)]
