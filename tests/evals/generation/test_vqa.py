"""Small random models of transformers that answer questions about pictures, against the plain use of each."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from evals.generation.vqa import Answerer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "<image>", "yes", "no", "is", "there", "a", "cat", "?"]
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> "
    "{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
)
QUESTIONS = ["is there a cat ?", "is there a dog in this picture ?", "cat ?"]


@pytest.fixture(scope="module")
def pictures():
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)) for _ in QUESTIONS]


def tokenizer():
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: n for n, word in enumerate(WORDS)}, "[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<image>"])
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special, bos_token="[DEC]", eos_token="[SEP]")


def loud(model):
    """Larger weights, so that replies depend on pictures and questions."""
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 10 if weight.ndim > 1 else 1
    return model


SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blip")
    text = {**SIZES, "encoder_hidden_size": 16, "vocab_size": len(WORDS), "max_position_embeddings": 64}
    text |= {"bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    config = transformers.BlipConfig(
        text_config=text, vision_config={**SIZES, "image_size": 32, "patch_size": 16}, image_text_hidden_size=16
    )
    torch.manual_seed(0)
    loud(transformers.BlipForQuestionAnswering(config)).save_pretrained(folder)
    images = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
    transformers.BlipProcessor(images, tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**SIZES, image_size=32, patch_size=16),
        text_config=transformers.LlamaConfig(**SIZES, vocab_size=len(WORDS), num_key_value_heads=2, eos_token_id=3),
        image_token_index=WORDS.index("<image>"), vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(0)
    loud(transformers.LlavaForConditionalGeneration(config)).save_pretrained(folder)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.LlavaProcessor(
        images, tokenizer(), patch_size=16, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.mark.slow
def test_a_model_for_visual_question_answering(blip, pictures):
    said = Answerer.load(str(blip))(pictures, QUESTIONS)
    model = transformers.BlipForQuestionAnswering.from_pretrained(blip).eval()
    processor = transformers.AutoProcessor.from_pretrained(blip)
    for picture, question, reply in zip(pictures, QUESTIONS, said, strict=True):
        inputs = processor(picture, question, return_tensors="pt")
        alone = model.generate(**inputs, max_new_tokens=10)
        assert reply == processor.decode(alone[0], skip_special_tokens=True).strip()
    assert len(set(said)) > 1


@pytest.mark.slow
def test_a_model_that_chats(llava, pictures):
    """A batch of questions of several lengths has the replies of each alone, without what was asked."""
    said = Answerer.load(str(llava))(pictures, QUESTIONS)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(llava).eval()
    processor = transformers.AutoProcessor.from_pretrained(llava)
    for picture, question, reply in zip(pictures, QUESTIONS, said, strict=True):
        inputs = processor(images=picture, text=f"<image> {question} Please answer yes or no. ", return_tensors="pt")
        alone = model.generate(**inputs, max_new_tokens=10, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert reply == processor.decode(alone, skip_special_tokens=True).strip()
    assert len(set(said)) > 1


@pytest.mark.slow
def test_what_answers_no_questions_is_refused(tmp_path, blip):
    with pytest.raises(ValueError, match="cannot be loaded"):
        Answerer.load(str(tmp_path))
    transformers.CLIPConfig().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no processor of pictures and text|cannot be loaded"):
        Answerer.load(str(tmp_path))


@pytest.mark.slow
def test_a_classifier_of_answers(pictures, tmp_path):
    config = transformers.ViltConfig(
        **SIZES, vocab_size=len(WORDS), image_size=32, patch_size=16, max_position_embeddings=40,
        id2label={0: "yes", 1: "no", 2: "cat"}, label2id={"yes": 0, "no": 1, "cat": 2},
    )  # fmt: skip
    torch.manual_seed(2)
    model = loud(transformers.ViltForQuestionAnswering(config)).eval()
    model.save_pretrained(tmp_path)
    images = transformers.ViltImageProcessor(size={"shortest_edge": 32}, size_divisor=32)
    processor = transformers.ViltProcessor(images, tokenizer())
    processor.save_pretrained(tmp_path)
    expected = []
    for picture, question in zip(pictures, QUESTIONS, strict=True):
        logits = model(**processor(picture, question, return_tensors="pt")).logits
        expected.append(config.id2label[int(logits.argmax())])
    assert Answerer.load(str(tmp_path))(pictures, QUESTIONS) == expected
