"""CLIP score, PickScore and HPSv2, on a small random CLIP, against transformers' own cosines and a plain forward."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from train.rl.config import RewardConfig
from train.rl.rewards import Rewards
from train.rl.rewards.clip import ClipScore, HPSv2, PickScore, named_by_transformers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# One is longer than the text model.
PROMPTS = ["a red cat", "two dogs", "x", "a very long prompt of many words"]


def own_cosines(folder, pictures, prompts):
    """By transformers' own forward, a pair at a time, without padding."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    preprocess = transformers.CLIPImageProcessor.from_pretrained(folder)
    found = []
    scale = float(model.logit_scale.detach().exp())
    for picture, prompt in zip(pictures, prompts, strict=True):
        text = tokenizer([prompt], truncation=True, max_length=20, return_tensors="pt")
        pixels = preprocess(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            out = model(input_ids=text["input_ids"], attention_mask=text["attention_mask"], pixel_values=pixels)
        found.append(float(out.logits_per_image) / scale)
    return np.array(found)


@pytest.fixture(scope="module")
def cosines(clip, pictures):
    found = own_cosines(clip, pictures, PROMPTS)
    assert np.ptp(found) > 0.1  # they tell pictures apart
    return found


def test_clip_score(clip, pictures, cosines):
    found = ClipScore(str(clip))(pictures, PROMPTS, [{}] * 4)
    np.testing.assert_allclose(found, cosines, atol=1e-5)
    np.testing.assert_allclose(ClipScore(str(clip))(pictures[::-1], PROMPTS[::-1], [{}] * 4)[::-1], found, atol=1e-6)


def test_pick_score_is_scaled(clip, pictures, cosines):
    found = PickScore(str(clip), str(clip))(pictures, PROMPTS, [{}] * 4)
    np.testing.assert_allclose(found, np.exp(3.0) * cosines, atol=1e-4)


def test_in_a_run(clip, pictures, cosines):
    made = RewardConfig("train.rl.rewards.clip:ClipScore", options=(f"model={clip}",), workers=0, batch_size=3)
    with Rewards([made]) as rewards:
        np.testing.assert_allclose(
            rewards.result(rewards.start(pictures, PROMPTS, [{}] * 4)).columns["ClipScore"], cosines, atol=1e-5
        )
    with pytest.raises(ValueError, match=r"^reward ClipScore: /no/such cannot be loaded: "):
        Rewards([RewardConfig("train.rl.rewards.clip:ClipScore", options=("model=/no/such",), workers=0)])


# ---------------------------------------------------------------- open_clip's weights

WIDTH, PROJECTED = 16, 8


def layers(prefix, count, rng):
    """Weights of a transformer in open_clip's names."""
    shapes = {
        "ln_1.weight": (WIDTH,), "ln_1.bias": (WIDTH,), "ln_2.weight": (WIDTH,), "ln_2.bias": (WIDTH,),
        "attn.in_proj_weight": (3 * WIDTH, WIDTH), "attn.in_proj_bias": (3 * WIDTH,),
        "attn.out_proj.weight": (WIDTH, WIDTH), "attn.out_proj.bias": (WIDTH,),
        "mlp.c_fc.weight": (24, WIDTH), "mlp.c_fc.bias": (24,),
        "mlp.c_proj.weight": (WIDTH, 24), "mlp.c_proj.bias": (WIDTH,),
    }  # fmt: skip
    return {
        f"{prefix}transformer.resblocks.{layer}.{name}": rng.normal(0, 0.3, shape)
        for layer in range(count)
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def open_clip_weights():
    rng = np.random.default_rng(3)
    shapes = {
        "positional_embedding": (20, WIDTH), "text_projection": (WIDTH, PROJECTED),
        "token_embedding.weight": (31, WIDTH), "ln_final.weight": (WIDTH,), "ln_final.bias": (WIDTH,),
        "visual.class_embedding": (WIDTH,),
        "visual.positional_embedding": (5, WIDTH), "visual.proj": (WIDTH, PROJECTED),
        "visual.conv1.weight": (WIDTH, 3, 16, 16), "visual.ln_pre.weight": (WIDTH,), "visual.ln_pre.bias": (WIDTH,),
        "visual.ln_post.weight": (WIDTH,), "visual.ln_post.bias": (WIDTH,), "logit_scale": (),
    }  # fmt: skip
    made = {name: rng.normal(0, 0.3, shape) for name, shape in shapes.items()}
    made |= layers("", 2, rng) | layers("visual.", 3, rng)
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in made.items()}


def norm(weights, name, x):
    return torch.nn.functional.layer_norm(x, (WIDTH,), weights[f"{name}.weight"], weights[f"{name}.bias"])


def transformer(weights, prefix, count, x, mask=None):
    """open_clip's residual blocks, with torch's own attention."""
    for layer in range(count):
        own = {
            n.removeprefix(p): w
            for n, w in weights.items()
            if n.startswith(p := f"{prefix}transformer.resblocks.{layer}.")
        }
        attention = torch.nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        attention.load_state_dict({n.removeprefix("attn."): w for n, w in own.items() if n.startswith("attn.")})
        h = norm(own, "ln_1", x)
        x = x + attention(h, h, h, need_weights=False, attn_mask=mask)[0]
        h = torch.nn.functional.gelu(norm(own, "ln_2", x) @ own["mlp.c_fc.weight"].T + own["mlp.c_fc.bias"])
        x = x + h @ own["mlp.c_proj.weight"].T + own["mlp.c_proj.bias"]
    return x


@torch.no_grad()
def open_clip_cosine(weights, pixels, ids):
    """open_clip's forward of one picture and one text that ends with its end token."""
    x = torch.nn.functional.conv2d(pixels, weights["visual.conv1.weight"], stride=16).flatten(2).transpose(1, 2)
    x = torch.cat([weights["visual.class_embedding"][None, None], x], 1) + weights["visual.positional_embedding"]
    x = transformer(weights, "visual.", 3, norm(weights, "visual.ln_pre", x))
    seen = norm(weights, "visual.ln_post", x[:, 0]) @ weights["visual.proj"]
    x = weights["token_embedding.weight"][ids] + weights["positional_embedding"][: ids.shape[1]]
    mask = torch.full((ids.shape[1], ids.shape[1]), -torch.inf).triu(1)
    x = norm(weights, "ln_final", transformer(weights, "", 2, x, mask))
    said = x[:, -1] @ weights["text_projection"]
    return float(torch.nn.functional.cosine_similarity(seen, said))


def test_hpsv2_reads_open_clips_weights(clip, pictures, open_clip_weights, tmp_path):
    torch.save({"state_dict": open_clip_weights}, tmp_path / "hps.pt")
    found = HPSv2(str(tmp_path / "hps.pt"), str(clip))(pictures, PROMPTS, [{}] * 4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip)
    preprocess = transformers.CLIPImageProcessor.from_pretrained(clip)
    for picture, prompt, value in zip(pictures[:3], PROMPTS, found, strict=False):
        pixels = preprocess(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
        ids = tokenizer([prompt], return_tensors="pt")["input_ids"]
        assert open_clip_cosine(open_clip_weights, pixels, ids) == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weights: weights.pop("visual.ln_pre.bias"), r"does not fit .*: vision_model.pre_layrnorm.bias differs"),
        (lambda weights: weights.update(more=torch.zeros(1)), r"is not a file of CLIP weights \(unknown name more\)"),
        (lambda weights: weights.update(text_projection=torch.zeros(3, 3)), "text_projection.weight differs"),
    ],
)
def test_other_weights_are_refused(clip, open_clip_weights, tmp_path, change, said):
    weights = dict(open_clip_weights)
    change(weights)
    torch.save(weights, tmp_path / "hps.pt")
    with pytest.raises(ValueError, match=said) as error:
        HPSv2(str(tmp_path / "hps.pt"), str(clip))
    assert "\n" not in str(error.value)


def test_files_that_are_no_weights(clip, tmp_path):
    with pytest.raises(ValueError, match=r"nothing.pt does not exist; download it from huggingface.co/xswu/HPSv2"):
        HPSv2(str(tmp_path / "nothing.pt"), str(clip))
    (tmp_path / "bad.pt").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"bad.pt is not a file of CLIP weights"):
        HPSv2(str(tmp_path / "bad.pt"), str(clip))


def test_every_tensor_has_a_place(clip, open_clip_weights):
    model = transformers.CLIPModel.from_pretrained(clip)
    assert {name: x.shape for name, x in named_by_transformers(open_clip_weights).items()} == {
        name: x.shape for name, x in model.state_dict().items() if not name.endswith("position_ids")
    }
