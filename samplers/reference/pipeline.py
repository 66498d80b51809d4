"""A class-conditional pixel pipeline with classifier-free guidance, in the manner of diffusers' own pipelines."""

from __future__ import annotations

import inspect

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor


class ClassConditionalPipeline(DiffusionPipeline):
    """Images of a class, from a `UNet2DModel` whose last class index means "no class".

    Guidance is classifier-free (Ho & Salimans 2022, arXiv:2207.12598): ``uncond + w (cond - uncond)``, both halves in
    one batch, unconditional half first as in Stable Diffusion. Any scheduler of the diffusers interface works.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin) -> None:
        """Keep the parts; ``unet`` must be class-conditional."""
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | list[int],
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Sample one image per entry of ``class_labels``.

        Args:
            class_labels: classes in [0, num_classes); the model's last index draws unconditionally.
            guidance_scale: w; 1 is the plain conditional model and needs no second half.
            num_inference_steps: passed to the scheduler.
            generator: one for the batch or one per image.
            latents: (B, C, H, W) starting noise; drawn when None.
            output_type: "pil", "np" (B, H, W, C in [0, 1]) or "pt" (B, C, H, W in [0, 1]).
            return_dict: an `ImagePipelineOutput`, or a tuple.

        Raises:
            ValueError: a label or the latents' shape does not fit the model.
        """
        labels = [class_labels] if isinstance(class_labels, int) else list(class_labels)
        config = self.unet.config
        null = config.num_class_embeds - 1
        wrong = [label for label in labels if not 0 <= label <= null]
        if wrong:
            raise ValueError(f"class_labels {wrong} are outside 0..{null} ({null} means no class)")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"unknown output_type {output_type!r}; known: pil, np, pt")
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        shape = (len(labels), config.in_channels, height, width)
        device, dtype = self._execution_device, self.unet.dtype
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; these labels need {shape}")
        guided = guidance_scale != 1.0
        classes = torch.tensor(labels, device=device)
        if guided:
            classes = torch.cat([torch.full_like(classes, null), classes])
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = latents.to(device, dtype) * self.scheduler.init_noise_sigma
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        noise = {"generator": generator} if takes_generator else {}  # of stochastic schedulers
        for t in self.progress_bar(self.scheduler.timesteps):
            batch = torch.cat([latents, latents]) if guided else latents
            batch = self.scheduler.scale_model_input(batch, t)
            output = self.unet(batch, t, class_labels=classes, return_dict=False)[0]
            if guided:
                uncond, cond = output.chunk(2)
                output = uncond + guidance_scale * (cond - uncond)
            latents = self.scheduler.step(output, t, latents, **noise, return_dict=False)[0]
        image = (latents.float() / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            image = image.cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            image = self.numpy_to_pil(image)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=image) if return_dict else (image,)
