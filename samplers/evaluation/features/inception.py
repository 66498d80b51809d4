"""The Inception network of FID: TensorFlow's 2015-12-05 graph up to its last pooling, with three ways of resizing."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.inception import BasicConv2d, InceptionA, InceptionB, InceptionC, InceptionD, InceptionE

from .protocol import FeatureProtocol, check_pixels, rgb
from .resizing import resize_clean, resize_tf1, resize_torch
from .weights import INCEPTION, find_weights, load_tensors, sha256

PRESETS = {
    "fid-tf": ("tf1-bilinear", resize_tf1, 128.0, 128.0),
    "fid-ptfid": ("torch-bilinear", resize_torch, 127.5, 127.5),
    "fid-clean": ("pil-bicubic", resize_clean, 128.0, 128.0),
}


class InceptionFeatures:
    """The 2048 features of FID.

    Presets differ in how images are resized and scaled: "fid-tf" as TTUR, ADM, EDM and torch-fidelity; "fid-ptfid" as
    pytorch-fid; "fid-clean" as clean-fid. Numbers of different presets are not comparable.

    Args:
        preset: one of `PRESETS`.
        weights: path of the weights; see `find_weights`.
        device: where the network runs.
        offline: never download.
        unverified: accept weights other than the published ones; the distance is then not named FID.

    Raises:
        MissingModelError: no weights.
        ValueError: unknown preset, weights that are not the published ones, or not of this network.
    """

    def __init__(
        self,
        preset: str = "fid-tf",
        *,
        weights: str | Path | None = None,
        device: str | torch.device = "cpu",
        offline: bool = False,
        unverified: bool = False,
    ) -> None:
        """Find, check and load the weights."""
        if preset not in PRESETS:
            raise ValueError(f"unknown Inception preset {preset!r}; known: {', '.join(PRESETS)}")
        path = find_weights(INCEPTION, weights, offline=offline)
        digest = sha256(path)
        published = digest == INCEPTION.sha256
        if not (published or unverified):
            raise ValueError(
                f"{path} does not hold the published Inception weights: its SHA-256 is {digest[:16]}..., theirs is "
                f"{INCEPTION.sha256[:16]}...; with --unverified-weights it can be used, and the result is not called FID"
            )
        resize, self._resize, self._centre, self._spread = PRESETS[preset]
        if published:
            self._protocol = FeatureProtocol(preset, digest, resize, title=f"FID ({preset.removeprefix('fid-')})")
        else:
            name = preset.replace("fid-", "fd-inception-")
            title = "FD (Inception with unverified weights, not FID)"
            self._protocol = FeatureProtocol(name, digest, resize, title=title)
        self._device = torch.device(device)
        self._network = FidInception()
        self._network.load(load_tensors(path), path)
        self._network.to(self._device, memory_format=torch.channels_last).eval().requires_grad_(False)

    @property
    def protocol(self) -> FeatureProtocol:
        """The preset with the hash of the weights; the name says fid only for the published ones."""
        return self._protocol

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, 2048) of uint8 images (B, 1 or 3, H, W)."""
        x = self._resize(rgb(check_pixels(images)).to(self._device).float())
        x = (x - self._centre) / self._spread
        return self._network(x.contiguous(memory_format=torch.channels_last))


class FidInception(nn.Module):
    """Inception v3 as in TensorFlow's 2015 graph: torchvision's layers with other pooling.

    Average pools leave the padding out of the mean, and the very last block pools its maximum. Names of the weights are
    those of the published files.
    """

    def __init__(self) -> None:
        """Build the layers without weights."""
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, kernel_size=3, padding=1)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, kernel_size=3)
        self.Mixed_5b = _BlockA(192, pool_features=32)
        self.Mixed_5c = _BlockA(256, pool_features=64)
        self.Mixed_5d = _BlockA(288, pool_features=64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = _BlockC(768, channels_7x7=128)
        self.Mixed_6c = _BlockC(768, channels_7x7=160)
        self.Mixed_6d = _BlockC(768, channels_7x7=160)
        self.Mixed_6e = _BlockC(768, channels_7x7=192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = _BlockE(1280)
        self.Mixed_7c = _LastBlock(2048)

    def load(self, state: dict[str, Tensor], path: Path) -> None:
        """Load weights; the classifier ``fc`` of the published files is not needed.

        Raises:
            ValueError: they do not fit.
        """
        wanted = {name: value for name, value in state.items() if not name.startswith("fc.")}
        try:
            self.load_state_dict(wanted)
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise ValueError(f"{path} does not fit the Inception network of FID: {reason}") from error

    def forward(self, x: Tensor) -> Tensor:
        """Pooled features (B, 2048) of (B, 3, 299, 299) in about [-1, 1]."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean((2, 3))


def _mean_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _max_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


def _chain(x: Tensor, *layers: nn.Module) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


class _BlockA(InceptionA):
    def forward(self, x: Tensor) -> Tensor:
        five = _chain(x, self.branch5x5_1, self.branch5x5_2)
        three = _chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3)
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_mean_pool(x))], 1)


class _BlockC(InceptionC):
    def forward(self, x: Tensor) -> Tensor:
        seven = _chain(x, self.branch7x7_1, self.branch7x7_2, self.branch7x7_3)
        double = _chain(
            x, self.branch7x7dbl_1, self.branch7x7dbl_2, self.branch7x7dbl_3, self.branch7x7dbl_4, self.branch7x7dbl_5
        )
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_mean_pool(x))], 1)


class _BlockE(InceptionE):
    def pool(self, x: Tensor) -> Tensor:
        return _mean_pool(x)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = _chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2)
        wide = [self.branch3x3_2a(three), self.branch3x3_2b(three), self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *wide, self.branch_pool(self.pool(x))], 1)


class _LastBlock(_BlockE):
    def pool(self, x: Tensor) -> Tensor:
        return _max_pool(x)
