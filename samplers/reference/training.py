"""Train a small pixel U-Net as a denoising diffusion model: the code behind the reference pipelines.

The objective is the simple loss of DDPM (Ho et al. 2020, arXiv:2006.11239, eq. 14) with an exponential moving
average of the weights; class labels are dropped with probability ``drop`` for classifier-free guidance
(Ho & Salimans 2022, arXiv:2207.12598). Runs are seeded and resume from their checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of one run; ``steps`` counts optimiser updates of ``batch`` images each."""

    steps: int
    batch: int = 128
    lr: float = 1e-3
    warmup: int = 500
    ema: float = 0.999
    drop: float = 0.1
    seed: int = 0
    flip: bool = False
    bf16: bool = False  # autocast; faster only on hardware with bfloat16 matrix units
    save_every: int = 500


def _learning_rate(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, then a cosine to one twentieth of the peak."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.05 + 0.95 * 0.5 * (1 + float(torch.cos(torch.tensor(done * torch.pi)))))


def train_unet(
    unet: UNet2DModel,
    images: Tensor,
    labels: Tensor | None,
    scheduler: DDPMScheduler,
    config: TrainingConfig,
    checkpoint: Path,
    log: Callable[[str], None] = print,
) -> UNet2DModel:
    """Train ``unet`` on ``images`` and return it with its averaged weights.

    Args:
        unet: predicts what ``scheduler.config.prediction_type`` says; class-conditional models have one class
            more than ``labels``, whose last index means "no class".
        images: (N, C, H, W) float in [-1, 1].
        labels: (N,) int64, or None for an unconditional model.
        scheduler: supplies the noise levels.
        config: the run's settings.
        checkpoint: file written every ``save_every`` steps and resumed from when it exists.
        log: receives one line per ``save_every`` steps.
    """
    torch.manual_seed(config.seed)
    device = unet.device
    fast = torch.amp.autocast(device.type, dtype=torch.bfloat16, enabled=config.bf16)
    unet = unet.to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.AdamW(unet.parameters(), lr=config.lr, weight_decay=0.0)
    average = EMAModel(unet.parameters(), decay=config.ema, use_ema_warmup=True, power=0.75)
    start = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        unet.load_state_dict(saved["unet"])
        optimiser.load_state_dict(saved["optimiser"])
        average.load_state_dict(saved["average"])
        torch.set_rng_state(saved["rng"])
        start = int(saved["step"])
    null = None if labels is None else int(unet.config.num_class_embeds) - 1
    total, clock = torch.zeros((), device=device), time.monotonic()
    for step in range(start, config.steps):
        pick = torch.randint(len(images), (config.batch,))
        x0 = images[pick].to(device)
        if config.flip:
            x0 = torch.where(torch.rand(len(x0), 1, 1, 1) < 0.5, x0.flip(-1), x0)
        t = torch.randint(scheduler.config.num_train_timesteps, (config.batch,), device=device)
        noise = torch.randn_like(x0)
        classes = None
        if labels is not None:
            dropped = torch.rand(config.batch) < config.drop
            classes = labels[pick].masked_fill(dropped, null).to(device)
        noisy = scheduler.add_noise(x0, noise, t).to(memory_format=torch.channels_last)
        velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(x0, noise, t) if velocity else noise
        with fast:
            output = unet(noisy, t, class_labels=classes).sample
        loss = F.mse_loss(output.float(), target)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = _learning_rate(step, config)
        optimiser.step()
        average.step(unet.parameters())
        total += loss.detach()
        done = step + 1
        if done % config.save_every == 0 or done == config.steps:
            rate = config.save_every * config.batch / (time.monotonic() - clock)
            log(f"step {done}/{config.steps}  loss {total.item() / config.save_every:.4f}  {rate:.0f} images/s")
            total, clock = torch.zeros((), device=device), time.monotonic()
            state = {
                "unet": unet.state_dict(),
                "optimiser": optimiser.state_dict(),
                "average": average.state_dict(),
                "rng": torch.get_rng_state(),
                "step": done,
            }
            partial = checkpoint.with_suffix(".part")
            torch.save(state, partial)
            partial.replace(checkpoint)
    average.copy_to(unet.parameters())
    return unet.eval()
