"""The prompt-token variant on a tiny Stable Diffusion with its own text encoder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from samplers.guidance import PromptSettings, minority_prompt
from samplers.reference import load

WINDOW = (0.0, 0.5)


@pytest.fixture
def pipe(build, tmp_path: Path) -> StableDiffusionPipeline:
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz")]
    words = ["co", "coo", "cool</w>", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate([*letters, *words])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nc o\nco o\ncoo l</w>\n")
    tokenizer = CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=12)
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=12, bos_token_id=vocabulary["<|startoftext|>"], eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
    )  # fmt: skip
    bare = build("sd").pipe
    parts = {key: getattr(bare, key) for key in ("vae", "unet", "scheduler")}
    made = StableDiffusionPipeline(
        **parts, text_encoder=CLIPTextModel(config).eval(), tokenizer=tokenizer, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


def images(pipe: StableDiffusionPipeline, prompt: Any = "a b", steps: int = 4, **more: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    options = {"height": 8, "width": 8, "output_type": "latent", "guidance_scale": 3.0, "generator": generator, **more}
    return pipe(prompt, num_inference_steps=steps, **options).images


def test_acts_and_leaves_no_trace(pipe):
    before = images(pipe)
    weights = [p.clone() for m in (pipe.unet, pipe.text_encoder) for p in m.parameters()]
    settings = PromptSettings(steps=2, window=WINDOW, lr=0.1)
    with minority_prompt(pipe, "a b", settings, generator=torch.Generator().manual_seed(1)) as run:
        rare = images(pipe)
    assert run.evaluations == 4
    assert 1 <= run.guided < 4
    assert run.extra_evaluations == 4 * run.guided
    assert torch.isfinite(rare).all()
    assert not torch.allclose(rare, before, atol=1e-3)
    assert torch.equal(images(pipe), before)
    now = [p for m in (pipe.unet, pipe.text_encoder) for p in m.parameters()]
    assert all(torch.equal(a, b) and b.requires_grad for a, b in zip(weights, now, strict=True))


def test_without_updates_it_is_the_prompt_with_the_word(pipe):
    """Outside the window the token is the initial word's own embedding."""
    expected = images(pipe, "a b cool")
    with minority_prompt(pipe, "a b", PromptSettings(window=(0.9999, 1.0))) as run:
        torch.testing.assert_close(images(pipe), expected)
    assert run.guided == 0


@pytest.mark.slow
def test_updates_climb_the_reconstruction_distance(pipe):
    """Ascent on fixed noise: more updates give a larger |a - b|; judged on the second noise the ascent was not made on."""

    def distance(steps: int, lr: float) -> float:
        from samplers.guidance import prompts

        found: list[float] = []
        original = prompts._optimised

        def watched(pipe: Any, text: Any, v: Tensor, call: Any, settings: Any, generator: Any) -> Tensor:
            v = original(pipe, text, v, call, settings, generator)
            with torch.no_grad():
                t = prompts.time_of_alpha_bar(call.clock.noise, settings.level)
                alpha, sigma = call.clock.levels_at(t)
                a = prompts._rows_of(call, len(v), call.state[-len(v) :], None, text.encode(v))
                noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(9))
                b = prompts._rows_of(call, len(v), alpha * a + sigma * noise, t, text.encode(None, len(v)))
            found.append((a - b).flatten(1).norm(dim=1).mean().item())
            return v

        prompts._optimised = watched
        try:
            settings = PromptSettings(steps=steps, window=WINDOW, lr=lr)
            with minority_prompt(pipe, "a b", settings, generator=torch.Generator().manual_seed(1)):
                images(pipe, steps=2)
        finally:
            prompts._optimised = original
        return found[0]

    assert distance(12, 0.2) > distance(1, 1e-9) + 1e-4


def test_several_prompts_images_and_inference_mode(pipe):
    settings = PromptSettings(steps=1, window=WINDOW)

    def run() -> Tensor:
        with minority_prompt(pipe, ["a b", "c"], settings, generator=torch.Generator().manual_seed(1)):
            return images(pipe, ["a b", "c"], num_images_per_prompt=2)

    out = run()
    assert len(out) == 4
    with torch.inference_mode():
        torch.testing.assert_close(run(), out)


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ("a", {"init_word": "zebra"}, "5 tokens"),
        ("a b c d e f g h i j", {}, "no room for one more"),
        ("a", {"steps": 0}, "steps"),
        ("a", {"level": 1.5}, "level"),
        ("a", {"window": (0.5, 0.5)}, "window"),
    ],
)
def test_bad_requests(pipe, prompt, settings, message):
    with pytest.raises(ValueError, match=message), minority_prompt(pipe, prompt, PromptSettings(**settings)):
        pass


def test_other_pipelines_are_refused():
    with pytest.raises(ValueError, match="DDPMPipeline"), minority_prompt(load("digits"), "a"):
        pass
