"""Features of small images without labels, network or training: a dictionary of patches (Coates et al. 2011)."""

from __future__ import annotations

import torch
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor
from torch.nn import functional as F

from .features import Whitening
from .fitting import Samples

_FLAT = 0.02  # added to a patch's variance, so that the grain of smooth areas is not blown up
_SHRINK = 0.1  # of the patches' whitening
_IMAGES, _PATCHES = 4000, 100_000  # that the dictionary is made of


class PatchFeatures:
    """How much of every word of a dictionary of patches an image holds (Coates, Lee & Ng 2011, AISTATS, "triangle" k-means).

    Patches are freed of brightness and contrast, whitened and clustered; the cluster centres are the words. An image's feature
    is how much nearer than on average its patches are to each word, averaged over places. In images of 16 to 32 pixels this
    tells kinds of things apart about as well as the blocks of a small diffusion model do, at a small part of the cost.

    Attributes:
        size: side of a patch.
        places: patches are averaged over a grid of places x places.
        words: (K, C * size * size) float32, the dictionary.
    """

    def __init__(self, data: Samples, *, size: int = 5, words: int = 400, places: int = 1, seed: int = 0) -> None:
        """Learn the dictionary.

        Args:
            data: (N, C, H, W) images in the model's units, of which a few thousand are looked at.
            size: side of a patch, 2 to the smaller side of the images.
            words: K.
            places: 1 for what an image holds; 2 also tells roughly where.
            seed: of everything random here.

        Raises:
            ValueError: no images, or a value outside its range, naming it.
        """
        generator = torch.Generator().manual_seed(seed)
        images = data[torch.randperm(len(data), generator=generator)[:_IMAGES].tolist()].float().cpu()
        if images.ndim != 4:
            raise ValueError(f"patches are of images (B, C, H, W), got {tuple(images.shape)}")
        if not 2 <= size <= min(images.shape[-2:]):
            raise ValueError(
                f"size must lie in 2..{min(images.shape[-2:])} for images of {tuple(images.shape[-2:])}, got {size}"
            )
        across = min(images.shape[-2:]) - size + 1
        if not 1 <= places <= across:
            raise ValueError(f"places must lie in 1..{across}, the patches along a side, got {places}")
        self.size, self.places = size, places
        each = max(1, min(_PATCHES // len(images), (images.shape[-2] - size + 1) * (images.shape[-1] - size + 1)))
        found = []
        for part in images.split(256):
            patches = self._patches(part)
            picked = torch.rand(patches.shape[:2], generator=generator).topk(each, dim=1).indices
            found.append(patches.gather(1, picked[..., None].expand(-1, -1, patches.shape[-1])).flatten(0, 1))
        patches = torch.cat(found)
        if not 2 <= words <= len(patches):
            raise ValueError(f"words must lie in 2..{len(patches)}, the patches looked at, got {words}")
        self._whitening = Whitening.fit(patches, _SHRINK)
        self._mean, self._matrix = self._whitening.mean.float(), self._whitening.matrix.float()
        means = MiniBatchKMeans(words, batch_size=4096, n_init=1, max_iter=10, random_state=seed)
        self.words = torch.from_numpy(means.fit(self._whitened(patches).numpy()).cluster_centers_).float()

    @torch.no_grad()
    def __call__(self, x0: Tensor) -> Tensor:
        """(B, C, H, W) in the model's units -> (B, K * places * places) float32."""
        return torch.cat([self._features(part) for part in x0.split(64)])

    def _features(self, x0: Tensor) -> Tensor:
        patches = self._whitened(self._patches(x0.float()))
        words = self.words.to(x0.device)
        distance = torch.cdist(patches, words.expand(len(patches), -1, -1))
        nearer = (distance.mean(-1, keepdim=True) - distance).clamp(min=0).mT
        grid = nearer.unflatten(-1, tuple(side - self.size + 1 for side in x0.shape[-2:]))
        return F.adaptive_avg_pool2d(grid, self.places).flatten(1)

    def _patches(self, x0: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, P, C * size * size), without brightness and contrast."""
        patches = F.unfold(x0, self.size).mT
        patches = patches - patches.mean(-1, keepdim=True)
        return patches / (patches.var(-1, keepdim=True) + _FLAT).sqrt()

    def _whitened(self, patches: Tensor) -> Tensor:
        return (patches - self._mean.to(patches.device)) @ self._matrix.to(patches.device)
