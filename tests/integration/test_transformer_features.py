"""DINOv2, CLIP and CLIPScore on tiny random models saved in a folder, as a machine without the hub has them."""

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
)

from samplers.evaluation import MissingModelError, load_extractor
from samplers.evaluation.features.transformer import ClipScore

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    words = ["<pad>", "<eos>", "a", "red", "blue", "square", "cat"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    text = {**TINY, "vocab_size": 7, "max_position_embeddings": 8, "eos_token_id": 1, "bos_token_id": 1}
    config = CLIPConfig(text_config=text, vision_config={**TINY, "image_size": 32, "patch_size": 8}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture
def images():
    return torch.randint(0, 256, (4, 3, 40, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_clip_score(clip, images):
    """Against the similarities that the model itself gives, with its own processor."""
    captions = ["a red cat", "a blue square", "cat", "a a a red"]
    model, tokenizer = CLIPModel.from_pretrained(clip), PreTrainedTokenizerFast.from_pretrained(clip)
    processor = CLIPProcessor(image_processor=CLIPImageProcessor.from_pretrained(clip), tokenizer=tokenizer)
    inputs = processor(text=captions, images=list(images), return_tensors="pt", padding=True)
    with torch.no_grad():
        similarity = model(**inputs).logits_per_image.diagonal() / model.logit_scale.exp()
    expected = (100 * similarity.clamp(min=0)).tolist()
    scores = ClipScore(clip, offline=True)(images, captions)
    assert scores.tolist() == pytest.approx(expected, abs=1e-3)
    assert scores.max() > 0
    with pytest.raises(ValueError, match="4 images"):
        ClipScore(clip)(images, captions[:3])
    ClipScore(clip)(images[:1], ["a red cat " * 20])  # longer than the model reads


def test_clip_features(tmp_path, images):
    torch.manual_seed(0)
    config = CLIPVisionConfig(**TINY, image_size=32, patch_size=8, projection_dim=8)
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path)
    extractor = load_extractor("clip", weights=tmp_path, offline=True)
    features = extractor(images)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(features[:1], extractor(images[:1]), rtol=1e-4, atol=1e-5)
    assert "antialias-32" in extractor.protocol.id


def test_dinov2_features(tmp_path, images):
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**TINY, image_size=224, patch_size=14)).save_pretrained(tmp_path / "a")
    Dinov2Model(Dinov2Config(**TINY, image_size=224, patch_size=14)).save_pretrained(tmp_path / "b")
    first, second = (load_extractor("fd-dinov2", weights=tmp_path / name, offline=True) for name in "ab")
    assert first(images).shape == (4, 16)
    assert first.protocol.id != second.protocol.id
    grey = images[:, :1]
    torch.testing.assert_close(first(grey), first(grey.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize("name", ["fd-dinov2", "clip"])
def test_missing_models_say_what_to_do(name, tmp_path):
    with pytest.raises(MissingModelError, match="nowhere"):
        load_extractor(name, weights=tmp_path / "nowhere", offline=True)
    with pytest.raises(MissingModelError, match="--weights"):
        load_extractor(name, offline=True)
    with pytest.raises(ValueError, match="unverified"):
        load_extractor(name, unverified=True)
