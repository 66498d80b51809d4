"""Features of DINOv2 and CLIP, through transformers; and CLIPScore."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, CLIPVisionModelWithProjection, Dinov2Model

from ..models import MissingModelError
from .protocol import FeatureProtocol, check_pixels, rgb
from .resizing import bicubic
from .weights import sha256

DINOV2 = "facebook/dinov2-large"
CLIP_336 = "openai/clip-vit-large-patch14-336"
CLIP_SCORE = "openai/clip-vit-large-patch14"
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _load(kind: Any, name: str, offline: bool) -> Any:
    """A model from a local folder or, unless ``offline``, from the hub; safetensors only, no code of others."""
    folder = Path(name)
    local = offline or folder.is_dir()
    if not folder.is_dir() and (name.startswith((".", "/")) or name.count("/") != 1):
        raise MissingModelError(f"no model folder {name!r}; give a folder with config.json and model.safetensors, or a hub id")
    options = {"use_safetensors": True} if kind in (CLIPModel, CLIPVisionModelWithProjection, Dinov2Model) else {}
    try:
        return kind.from_pretrained(name, local_files_only=local, **options)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise MissingModelError(
            f"could not load {name!r} ({reason}); save the model with transformers on a machine that has it, and name that "
            "folder with --weights"
        ) from error


def _digest(model: torch.nn.Module, name: str) -> str:
    """Hash of the weights: of the files in a local folder, else of the loaded tensors."""
    files = sorted(Path(name).glob("*.safetensors"))
    if files:
        return sha256(*files)
    import hashlib

    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode() + value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _normalise(images: Tensor, size: int, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    mean, std = (torch.tensor(values, device=images.device).reshape(1, 3, 1, 1) for values in statistics)
    return (bicubic(images.float() / 255, (size, size)).clamp(0, 1) - mean) / std


class Dinov2Features:
    """Class token of DINOv2 (ViT-L/14: 1024 features), as in FD-DINOv2 (Stein et al. 2023, arXiv:2306.04675).

    Args:
        weights: folder that ``save_pretrained`` made, or a hub id.
        device: where the network runs.
        offline: never reach for the hub.

    Raises:
        MissingModelError: no such model.
    """

    def __init__(self, weights: str | Path | None = None, *, device: str | torch.device = "cpu", offline: bool = False) -> None:
        """Load the model."""
        name = str(weights or DINOV2)
        self._device = torch.device(device)
        self._model = _load(Dinov2Model, name, offline).to(self._device).eval().requires_grad_(False)
        title = "FD-DINOv2" if weights is None or name == DINOV2 else f"FD-DINOv2 ({Path(name).name})"
        self._protocol = FeatureProtocol("fd-dinov2", _digest(self._model, name), "bicubic-antialias-224", title=title)

    @property
    def protocol(self) -> FeatureProtocol:
        """Bicubic to 224 pixels, hash of the weights."""
        return self._protocol

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, D) of uint8 images (B, 1 or 3, H, W)."""
        x = _normalise(rgb(check_pixels(images)).to(self._device), 224, IMAGENET)
        return self._model(pixel_values=x).pooler_output.float()


class ClipFeatures:
    """Unit-length CLIP image embeddings, as in CMMD (Jayasumana et al. 2024, arXiv:2401.09603).

    Args:
        weights: folder that ``save_pretrained`` made, or a hub id.
        device: where the network runs.
        offline: never reach for the hub.

    Raises:
        MissingModelError: no such model.
    """

    def __init__(self, weights: str | Path | None = None, *, device: str | torch.device = "cpu", offline: bool = False) -> None:
        """Load the model."""
        name = str(weights or CLIP_336)
        self._device = torch.device(device)
        self._model = _load(CLIPVisionModelWithProjection, name, offline).to(self._device).eval().requires_grad_(False)
        self._size = self._model.config.image_size
        title = f"FD (CLIP {Path(name).name}, not FID)"
        digest = _digest(self._model, name)
        self._protocol = FeatureProtocol("clip", digest, f"bicubic-antialias-{self._size}", title=title)

    @property
    def protocol(self) -> FeatureProtocol:
        """Bicubic to the model's size, hash of the weights."""
        return self._protocol

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, D) of uint8 images (B, 1 or 3, H, W)."""
        x = _normalise(rgb(check_pixels(images)).to(self._device), self._size, OPENAI)
        embeddings = self._model(pixel_values=x).image_embeds.float()
        return embeddings / embeddings.norm(dim=-1, keepdim=True)


class ClipScore:
    """CLIPScore (Hessel et al. 2021, arXiv:2104.08718): does an image show what its caption says?

    100 max(cos(image, caption), 0), the scale that torchmetrics and most papers use. The model's own image processor
    prepares the images.

    Args:
        weights: folder that ``save_pretrained`` made (model, tokenizer and image processor), or a hub id.
        device: where the network runs.
        offline: never reach for the hub.

    Raises:
        MissingModelError: no such model.
    """

    def __init__(self, weights: str | Path | None = None, *, device: str | torch.device = "cpu", offline: bool = False) -> None:
        """Load model, tokenizer and image processor."""
        name = str(weights or CLIP_SCORE)
        self._device = torch.device(device)
        self._model = _load(CLIPModel, name, offline).to(self._device).eval().requires_grad_(False)
        self._tokenizer = _load(AutoTokenizer, name, offline)
        self._processor = _load(CLIPImageProcessor, name, offline)

    @torch.no_grad()
    def __call__(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Score of each pair.

        Args:
            images: (B, 1 or 3, H, W) uint8.
            captions: B texts; what is longer than the model can read is cut.

        Returns:
            (B,) float32 in [0, 100].

        Raises:
            ValueError: not one caption for each image.
        """
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} images need as many captions, not {len(captions)}")
        pixels = rgb(check_pixels(images)).cpu()
        inputs = self._processor(images=list(pixels), return_tensors="pt")["pixel_values"].to(self._device)
        limit = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(list(captions), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        outputs = self._model(pixel_values=inputs, **tokens.to(self._device))
        cosine = torch.nn.functional.cosine_similarity(outputs.image_embeds.float(), outputs.text_embeds.float())
        return (100 * cosine).clamp(min=0)
