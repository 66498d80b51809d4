"""What the minority commands share: the images as the model takes them, and the scorer with its conditioning."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import evaluation, guidance
from ..config_reader import read_config
from ..denoisers import from_pipeline, network_of
from ..engine import Denoiser
from ..noise import NoiseSchedule
from ..parametrization import to_x0

if TYPE_CHECKING:
    from ..evaluation import ModelInputs
    from ..guidance import MinorityScorer, Whitening

# Distances as a score file names them.
NAMES = {"squared_error": "l2", "absolute_error": "l1", "feature_distance(NetworkFeatures)": "features"}
_OTHER_IMAGES = "the images of {} are not those that were scored: score them again"
_WHITENING_FILE = "whitening.safetensors"
WHITENING = ("whitening.mean", "whitening.matrix")  # among a classifier's tensors


@dataclass(frozen=True)
class Setup:
    """A model with the images to score.

    Attributes:
        pipe: the pipeline.
        inputs: the images as the model takes them.
        scorer: of that model.
        classes: (N,) the images' classes, where rarity is asked for within classes; else None.
    """

    pipe: Any
    inputs: ModelInputs
    scorer: MinorityScorer
    classes: Tensor | None

    def calibrated(self, seed: int) -> tuple[MinorityScorer, float]:
        """The scorer with its level fixed on up to 2000 of the images, and their top variance."""
        rows = self._some(2000, seed).tolist()
        x0 = torch.cat([self.inputs[rows[i : i + 64]].cpu() for i in range(0, len(rows), 64)])
        return self.scorer.calibrated(x0), guidance.top_eigenvalue(x0)

    def whitening(self, device: str, seed: int, progress: Callable[[int, int], None]) -> Whitening:
        """Fitted to what reconstruction loses of ten times as many images as that has values, or of all there are."""
        first = self.residuals(self._some(64, seed), device, seed)
        rows = self._some(max(2000, 10 * first.shape[1]), seed)
        lost, done = [], 0
        for i, part in enumerate(rows.split(64)):
            lost.append(self.residuals(part, device, seed + i))
            done += len(part)
            progress(done, len(rows))
        return guidance.Whitening.fit(torch.cat(lost))

    def with_scorer(self, scorer: MinorityScorer) -> Setup:
        """The same with another scorer."""
        return replace(self, scorer=scorer)

    def _some(self, count: int, seed: int) -> Tensor:
        return torch.randperm(len(self.inputs), generator=torch.Generator().manual_seed(seed))[:count]

    def residuals(self, rows: Tensor, device: str, seed: int) -> Tensor:
        """What reconstruction loses of these images."""
        classes = None if self.classes is None else self.classes[rows].to(device)
        return self.scorer.residuals(self.inputs[rows.tolist()].to(device), torch.Generator().manual_seed(seed), classes).cpu()

    def scores(self, images: Tensor, seed: int, classes: Tensor | None) -> Tensor:
        """Scores (N,) of images (N, C, H, W) in [0, 1]."""
        encode, parts, device = self.inputs.encode, [], self.pipe.device
        for i, rows in enumerate(torch.arange(len(images)).split(64)):
            x0 = images[rows] * 2 - 1
            x0 = (x0 if encode is None else encode(x0)).to(device)
            known = None if classes is None else classes[rows].to(device)
            parts.append(self.scorer(x0, torch.Generator().manual_seed(seed + i), known).cpu())
        return torch.cat(parts)


def open_setup(
    model: str, data: str, *, level: str | float, target: str | None, draws: int, distance: str, prompt: str | None,
    within_class: bool, device: str, dtype: str, batch_size: int, offline: bool,
) -> Setup:  # fmt: skip
    """Load the model and open the images; nothing is scored yet.

    Raises:
        ValueError: ``within_class`` for a model or for images that know no classes, or other options that do not apply.
    """
    source = evaluation.open_images(data)
    classes = source.classes() if within_class else None
    pipe = evaluation.load_pipeline(model, device=device, dtype=dtype, offline=offline)
    inputs = evaluation.inputs_for(pipe, source)
    noise = NoiseSchedule.from_config(pipe.scheduler.config)
    plain, _, _ = from_pipeline(pipe, chunk=batch_size, **_no_condition(pipe, prompt))
    denoiser: Any = plain
    if classes is not None:
        _check_classes(pipe, model, classes)
        denoiser = _class_denoiser(pipe, noise)
    measure: Any = distance
    if distance == "features":
        measure = guidance.feature_distance(guidance.NetworkFeatures(network_of(pipe), plain, noise))
    clip = 1.0 if inputs.encode is None and pipe.scheduler.config.get("clip_sample") else None
    scorer = guidance.MinorityScorer(denoiser, noise, level, draws, measure, target=target or "mode", clip=clip)
    return Setup(pipe, inputs, scorer, classes)


def setup_of(
    settings: Mapping[str, Any], tensors: Mapping[str, Tensor], *, device: str, dtype: str, batch_size: int, offline: bool
) -> Setup:
    """The setup that a file of scores was made with; ``tensors`` hold the whitening, if there is one.

    Raises:
        ValueError: the images are not those that were scored.
    """
    setup = open_setup(
        settings["model"], settings["data"], level=settings["level"], target=settings["target"], draws=settings["draws"],
        distance=NAMES.get(settings["distance"], "lpips"), prompt=settings["prompt"],
        within_class=settings.get("within_class", False), device=device, dtype=dtype, batch_size=batch_size, offline=offline,
    )  # fmt: skip
    if setup.inputs.source.id != settings["data_id"]:
        raise ValueError(_OTHER_IMAGES.format(settings["data"]))
    if not settings.get("whitened"):
        return setup
    return setup.with_scorer(setup.scorer.whitened(guidance.Whitening(*(tensors[name] for name in WHITENING))))


def inputs_of(settings: Mapping[str, Any], *, offline: bool) -> ModelInputs:
    """The images that a file of scores was made of, as its model takes them.

    Raises:
        ValueError: they are not those that were scored.
    """
    source = evaluation.open_images(settings["data"])
    if source.id != settings["data_id"]:
        raise ValueError(_OTHER_IMAGES.format(settings["data"]))
    return evaluation.inputs_for(evaluation.load_pipeline(settings["model"], device="cpu", offline=offline), source)


def load_whitening(
    folder: Path, setup: Setup, identity: Mapping[str, Any], device: str, seed: int, progress: Callable[[int, int], None]
) -> Whitening:
    """The whitening kept in the folder of a run with the same settings, or a new one, which is kept there."""
    path, wanted = folder / _WHITENING_FILE, json.dumps({**identity, "seed": seed}, sort_keys=True)
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("settings") == wanted:
                return guidance.Whitening(*(file.get_tensor(name) for name in WHITENING))
        raise ValueError(f"{path} belongs to another run; choose another --out")
    found = setup.whitening(device, seed, progress)
    partial = path.with_name(path.name + ".part")
    save_file(
        dict(zip(WHITENING, (found.mean, found.matrix.contiguous()), strict=True)), partial, metadata={"settings": wanted}
    )
    partial.replace(path)
    return found


def read_whitening(folder: Path) -> dict[str, Tensor]:
    """The tensors of the whitening beside a file of scores.

    Raises:
        FileNotFoundError: it is not there.
    """
    path = folder / _WHITENING_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: it was written beside the scores and belongs to them")
    return load_file(path)


def _check_classes(pipe: Any, model: str, classes: Tensor) -> None:
    known = _classes_of(pipe)
    if known is None:
        raise ValueError(
            f"--within-class needs a class-conditional model; {model} ({type(pipe).__name__}) takes no class labels"
        )
    if int(classes.max()) >= known:
        raise ValueError(f"the images have classes up to {int(classes.max())}, {model} knows 0..{known - 1}")


def _classes_of(pipe: Any) -> int | None:
    """Class embeddings of the network, the one for "no class" included; None where the pipeline takes no classes."""
    if "class_labels" not in inspect.signature(pipe.__call__).parameters:
        return None
    config = network_of(pipe).config
    return getattr(config, "num_class_embeds", None) or config.num_embeds_ada_norm + 1


def _no_condition(pipe: Any, prompt: str | None) -> dict[str, Any]:
    """Arguments of an unconditional call: the empty prompt, or the class that means "no class"."""
    accepted = inspect.signature(pipe.__call__).parameters
    if prompt is not None and "prompt" not in accepted:
        raise ValueError(f"--prompt does not apply: {type(pipe).__name__} takes no prompt")
    given: dict[str, Any] = {"guidance_scale": 1.0} if "guidance_scale" in accepted else {}
    if "prompt" in accepted:
        given["prompt"] = [prompt or ""]
    elif "class_labels" in accepted:
        given["class_labels"] = [_classes_of(pipe) - 1]
    return given


def _class_denoiser(pipe: Any, noise: NoiseSchedule) -> Denoiser:
    """The pipeline's network as ``denoiser(x, t, class_labels)``, without guidance."""
    network, model = network_of(pipe), read_config(pipe.scheduler.config)

    def denoiser(x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        alpha, sigma = (value.item() for value in noise.alpha_sigma(t))
        scale = 1.0 if model.sigma_data is None else (sigma**2 + model.sigma_data**2) ** -0.5
        timestep = noise.timestep(t).to(x.device, torch.float32).expand(len(x))
        output = network((x * scale).to(network.dtype), timestep, class_labels=class_labels, return_dict=False)[0]
        prediction = output[:, : x.shape[1]].to(x.dtype)  # learned variances come after
        return to_x0(prediction, x, alpha, sigma, model.prediction_type, model.sigma_data)

    return denoiser
