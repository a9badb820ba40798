"""A small random CLIP of transformers, with a tokenizer and preprocessing of its own."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """Its folder."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import tokenizers

    folder = tmp_path_factory.mktemp("clip")
    letters = {letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz ")}
    ids = {"[UNK]": len(letters), "[PAD]": len(letters) + 1, "<start>": len(letters) + 2, "<end>": len(letters) + 3}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters | ids, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[(each, ids[each]) for each in ("<start>", "<end>")]
    )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "hidden_act": "gelu"}
    special = {"bos_token_id": ids["<start>"], "eos_token_id": ids["<end>"], "pad_token_id": ids["[PAD]"]}
    text = {"vocab_size": len(letters) + len(ids), "max_position_embeddings": 20, "num_hidden_layers": 2}
    config = transformers.CLIPConfig(
        text_config={**sizes, **special, **text},
        vision_config={**sizes, "image_size": 32, "patch_size": 16, "num_hidden_layers": 3},
        projection_dim=8,
    )
    torch.manual_seed(1)
    model = transformers.CLIPModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    torch.nn.init.constant_(model.logit_scale, 3.0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pictures():
    """Four pictures of noise, wider than high, uint8."""
    return np.random.default_rng(0).integers(0, 256, (4, 40, 52, 3), np.uint8)
