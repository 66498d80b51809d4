"""`DiscreteSolverScheduler` in diffusers' token pipelines, and against its in-tree relatives."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from diffusers import AmusedScheduler

from samplers.discrete import DiscreteTable, MaskedProcess, UniformProcess, from_logits, sample_discrete
from samplers.schedulers import DiscreteSolverScheduler

diffusers = pytest.importorskip("diffusers", minversion="0.42")

MASK, CODES = 12, 8


class Logits(torch.nn.Module):
    """A fixed random network of logits over ``columns`` symbols."""

    def __init__(self, columns, embedded=32):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(embedded, columns)
        self.mix = torch.nn.Linear(columns, columns)

    def forward(self, ids, **_):
        h = self.table(ids)
        return SimpleNamespace(logits=self.mix(torch.tanh(h + h.mean(1, keepdim=True))) * 3)


def tiny_amused():
    from diffusers import AmusedPipeline, UVit2DModel, VQModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    transformer = UVit2DModel(
        hidden_size=8,
        use_bias=False,
        hidden_dropout=0.0,
        cond_embed_dim=8,
        micro_cond_encode_dim=2,
        micro_cond_embed_dim=10,
        encoder_hidden_size=8,
        vocab_size=32,
        codebook_size=CODES,
        in_channels=8,
        block_out_channels=8,
        num_res_blocks=1,
        downsample=True,
        upsample=True,
        block_num_heads=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        attention_dropout=0.0,
        intermediate_size=8,
        layer_norm_eps=1e-6,
        ln_elementwise_affine=True,
    )
    vqvae = VQModel(
        act_fn="silu",
        block_out_channels=[8],
        down_block_types=["DownEncoderBlock2D"],
        in_channels=3,
        latent_channels=8,
        layers_per_block=1,
        norm_num_groups=8,
        num_vq_embeddings=CODES,
        out_channels=3,
        sample_size=8,
        up_block_types=["UpDecoderBlock2D"],
        mid_block_add_attention=False,
        lookup_from_codebook=True,
    )
    text = CLIPTextModelWithProjection(
        CLIPTextConfig(
            bos_token_id=0,
            eos_token_id=2,
            hidden_size=8,
            intermediate_size=8,
            num_attention_heads=1,
            num_hidden_layers=1,
            vocab_size=40,
            projection_dim=8,
        )
    )
    scheduler = AmusedScheduler(mask_token_id=MASK)
    pipe = AmusedPipeline(text_encoder=text, tokenizer=None, vqvae=vqvae, transformer=transformer.eval(), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def amused_call(pipe, steps, **extra):
    embeds = {
        "prompt_embeds": torch.zeros(1, 8),
        "encoder_hidden_states": torch.zeros(1, 4, 8),
        "negative_prompt_embeds": torch.zeros(1, 8),
        "negative_encoder_hidden_states": torch.zeros(1, 4, 8),
    }
    generator = torch.Generator().manual_seed(1)
    return pipe(**embeds, num_inference_steps=steps, height=4, width=4, generator=generator, output_type="np", **extra).images


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("options", [{}, {"transition": "confidence:noise=4.5"}, {"transition": "theta_trapezoidal"}])
def test_amused_runs_unchanged(options):
    pipe = tiny_amused()
    pipe.scheduler = DiscreteSolverScheduler.from_config(pipe.scheduler.config, **options)
    calls = []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    images = amused_call(pipe, 5)
    assert images.shape[0] == 1
    assert len(calls) == 5
    assert pipe.scheduler.config.mask_token_id == MASK
    again = amused_call(pipe, 5)
    assert (images == again).all()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_amused_with_a_learned_table_keeps_it_on_disk(tmp_path):
    table = DiscreteTable("masked", "fixed_count", (1.0, 0.6, 0.3, 0.0), count=(3, 5, 8), temp=(0.8, 1.2, 2.0))
    pipe = tiny_amused()
    pipe.scheduler = DiscreteSolverScheduler.from_config(pipe.scheduler.config, tables={"3": table.to_dict()})
    amused_call(pipe, 3)
    with pytest.raises(ValueError, match="for 3 network evaluations"):
        amused_call(pipe, 4)
    pipe.scheduler.save_pretrained(tmp_path)
    loaded = DiscreteSolverScheduler.from_pretrained(tmp_path)
    assert loaded.config.tables == pipe.scheduler.config.tables
    assert DiscreteTable.from_dict(loaded.config.tables["3"]) == table
    back = AmusedScheduler.from_config(loaded.config)
    assert back.config.mask_token_id == MASK
    easy = DiscreteSolverScheduler.from_config(loaded.config, fallback="interpolate")
    easy.set_timesteps(6)
    assert easy.plan("masked").nfe == 6
    assert "interpolated" in easy.plan("masked").provenance


@pytest.mark.parametrize("mask", [MASK, 7], ids=["mask beyond the symbols", "mask among the symbols"])
def test_llada_runs_unchanged(mask):
    from diffusers import BlockRefinementScheduler, LLaDA2Pipeline

    model = Logits(10)
    model.config, model.dtype, model.device = SimpleNamespace(), torch.float32, torch.device("cpu")
    scheduler = DiscreteSolverScheduler.from_config(BlockRefinementScheduler().config)
    pipe = LLaDA2Pipeline(model=model, scheduler=scheduler, tokenizer=None)
    pipe.set_progress_bar_config(disable=True)
    prompt = torch.tensor([[1, 2, 3]])
    out = pipe(
        input_ids=prompt,
        gen_length=13,
        block_length=8,
        num_inference_steps=4,
        mask_token_id=mask,
        eos_token_id=None,
        eos_early_stop=False,
        generator=torch.Generator().manual_seed(0),
        output_type="seq",
    )
    tokens = torch.as_tensor(out.sequences)
    assert tokens.shape == (1, 13)
    assert not (tokens == mask).any()
    assert int(tokens.max()) < 10


def gemma_loop(scheduler, model, x, steps, generator):
    """The way the uniform-state pipeline drives its scheduler: only the arguments that ``step`` names."""
    scheduler.set_timesteps(steps, device=x.device)
    offered = {"mask_token_id": None, "temperature": 0.0, "generator": generator}
    named = {k: v for k, v in offered.items() if k in inspect.signature(scheduler.step).parameters}
    for index in range(steps):
        out = scheduler.step(model(x).logits, index, x, **named)
        assert out.pred_logits.shape == (*x.shape, 6)
        x = out.prev_sample
    return x


def tiny_gemma():
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    text = small | {"vocab_size": 40, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    text |= {"num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 8}
    text |= {"sliding_window": 16, "max_position_embeddings": 64}
    vision = small | {"num_hidden_layers": 1, "position_embedding_size": 4}
    symbols = {"image_token_id": 39, "boi_token_id": 37, "eoi_token_id": 38}
    torch.manual_seed(0)
    return DiffusionGemmaForBlockDiffusion(
        DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=6, **symbols)
    ).eval()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_diffusion_gemma_runs_unchanged():
    from diffusers import DiffusionGemmaPipeline, DiscreteDDIMScheduler

    class Template:
        eos_token_id = None

        def apply_chat_template(self, messages, **_):
            return {"input_ids": torch.tensor([[1, 2, 3]])}

    table = DiscreteTable("uniform", "tweedie", (1.0, 0.7, 0.5, 0.2, 0.0), temp=(0.8, 1.0, 1.4, 1.2))
    model, calls = tiny_gemma(), []
    with pytest.warns(UserWarning, match="corrector_steps=2"):
        scheduler = DiscreteSolverScheduler.from_config(
            DiscreteDDIMScheduler(corrector_steps=2).config, tables={"4": table.to_dict()}
        )
    pipe = DiffusionGemmaPipeline(model=model, scheduler=scheduler, processor=Template())
    pipe.set_progress_bar_config(disable=True)
    model.register_forward_hook(lambda *_: calls.append(1))
    sequences = [
        pipe(
            prompt="x",
            gen_length=12,
            num_inference_steps=4,
            confidence_threshold=None,
            output_type="seq",
            generator=torch.Generator().manual_seed(seed),
        ).sequences
        for seed in (0, 0, 1)
    ]
    assert len(calls) == 3 * 2 * 4  # two canvases a call, each with exactly the evaluations asked for
    assert sequences[0].shape == (1, 12)
    assert torch.equal(sequences[0], sequences[1])
    assert not torch.equal(sequences[0], sequences[2])


def test_uniform_pipelines_keep_the_tables_temperature():
    from diffusers import DiscreteDDIMScheduler

    scheduler = DiscreteSolverScheduler.from_config(DiscreteDDIMScheduler().config)
    assert "temperature" not in inspect.signature(scheduler.step).parameters
    x = torch.randint(6, (2000, 5), generator=torch.Generator().manual_seed(0))
    result = gemma_loop(scheduler, Logits(6), x, 4, torch.Generator().manual_seed(1))
    assert len(torch.unique(result, dim=0)) > 50  # drawn, not the mode


def test_one_uniform_step_has_the_law_of_discrete_ddim():
    from diffusers import DiscreteDDIMScheduler

    ours, theirs = DiscreteSolverScheduler(), DiscreteDDIMScheduler()
    x = torch.randint(4, (1, 2), generator=torch.Generator().manual_seed(0)).expand(60_000, 2)
    logits = torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(1)).expand(60_000, 2, 4)
    laws = []
    for scheduler, extra in ((ours, {}), (theirs, {"temperature": 1.0})):
        scheduler.set_timesteps(3)
        if scheduler is ours:
            scheduler.step(logits, 0, x, generator=torch.Generator().manual_seed(2))
        out = scheduler.step(logits, 1, x, generator=torch.Generator().manual_seed(3), **extra).prev_sample
        laws.append(torch.bincount(out[:, 0] * 4 + out[:, 1], minlength=16).double() / len(x))
    # in-tree survival is exactly 1 - t; ours leaves eps = 1e-3 at t = 1
    torch.testing.assert_close(*laws, atol=0.012, rtol=0)
    assert float((laws[0] - 1 / 16).abs().max()) > 0.05


@pytest.mark.parametrize("name", ["masked", "uniform"])
def test_scheduler_and_loop_are_one_sampler(name, generator):
    process = {"masked": MaskedProcess, "uniform": UniformProcess}[name](6)
    network = Logits(6)
    plain = DiscreteTable.plain(name, "tweedie", 4)
    identity = DiscreteTable(name, "tweedie", plain.times, temp=(1.0,) * 4, remask=(0.0,) * 4 if name == "masked" else None)
    model = from_logits(lambda ids: network(ids).logits, process)
    wanted = sample_discrete(model, process, (50, 7), table=plain, generator=generator(4))
    mask = 6 if name == "masked" else None
    for table in (plain, identity):
        scheduler = DiscreteSolverScheduler(mask_token_id=mask, tables={"4": table.to_dict()})
        scheduler.set_timesteps(4)
        g = generator(4)
        x = process.prior((50, 7), g)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x).logits, t, x, generator=g, return_dict=False)[0]
        assert torch.equal(x, wanted)
        assert torch.equal(sample_discrete(model, process, (50, 7), table=table, generator=generator(4)), wanted)


def test_late_entry_and_noising():
    scheduler = DiscreteSolverScheduler(mask_token_id=MASK)
    scheduler.set_timesteps(5)
    clean = torch.randint(6, (400, 20), generator=torch.Generator().manual_seed(0))
    noisy = scheduler.add_noise(clean, scheduler.timesteps[1], generator=torch.Generator().manual_seed(1))
    assert float((noisy == MASK).float().mean()) == pytest.approx(0.6, abs=0.02)
    assert torch.equal(noisy[noisy != MASK], clean[noisy != MASK])
    x, model = noisy, Logits(6)
    left = []
    for t in scheduler.timesteps[2:]:
        x = scheduler.step(model(x).logits, t, x, generator=torch.Generator().manual_seed(2)).prev_sample
        left.append(float((x == MASK).float().mean()))
    assert left == pytest.approx([0.4, 0.2, 0.0], abs=0.03)
    assert torch.equal(x[noisy != MASK], clean[noisy != MASK])


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("AmusedScheduler", "masked"),
        ("BlockRefinementScheduler", ""),
        ("DiscreteDDIMScheduler", "uniform"),
        ("EntropyBoundScheduler", "uniform"),
    ],
)
def test_configs_make_the_round_trip(source, kind):
    cls = getattr(diffusers, source)
    start = cls(mask_token_id=MASK) if source == "AmusedScheduler" else cls(num_inference_steps=7)
    ours = DiscreteSolverScheduler.from_config(start.config, transition="tweedie")
    back = cls.from_config(ours.config)
    for key in inspect.signature(cls.__init__).parameters:
        if key != "self":
            assert back.config[key] == start.config[key], key
    assert ours.config.transition == "tweedie"
    assert len(ours) == (32 if source == "AmusedScheduler" else 7)


def test_bad_use_is_refused():
    with pytest.raises(ValueError, match="auto, masked or uniform"):
        DiscreteSolverScheduler(process="gaussian")
    with pytest.raises(ValueError, match="has no mask"):
        DiscreteSolverScheduler(process="uniform", mask_token_id=3)
    table = DiscreteTable.plain("masked", "fixed_count", 3).to_dict()
    with pytest.raises(ValueError, match="makes 3"):
        DiscreteSolverScheduler(tables={"4": table})
    scheduler = DiscreteSolverScheduler(tables={"3": table})
    scheduler.set_timesteps(3)
    ids, logits = torch.zeros(2, 4, dtype=torch.long), torch.zeros(2, 4, 5)
    with pytest.raises(ValueError, match="for masked noise"):
        scheduler.step(logits, 0, ids)
    with pytest.raises(ValueError, match=r"one of 0 \.\. 2"):
        scheduler.step(logits, 3, ids, mask_token_id=5)
    with pytest.raises(ValueError, match="does not hold"):
        scheduler.step(logits[:, :3], 0, ids, mask_token_id=5)
    with pytest.warns(UserWarning, match="does not use"):
        scheduler.step(logits, 0, ids, mask_token_id=5, temperature=0.7)
