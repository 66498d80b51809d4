"""The token models that ship: small, loadable, better than guessing; and how they are trained."""

from pathlib import Path

import pytest
import torch

import samplers.reference
from samplers.discrete import MaskedProcess, optimal_counts, reveal_losses, sample_discrete
from samplers.reference import binary_digits, load_tokens
from samplers.reference.token_training import TokenTraining, train_tokens
from samplers.reference.tokens import TokenMLP, TokenTransformer, load_network, save_network

NAMES = ["binary-digits-masked", "binary-digits-uniform"]


@pytest.mark.parametrize("name", NAMES)
def test_shipped_models_know_their_data(name, generator):
    model = load_tokens(name)
    test = binary_digits("test")
    noisy = model.process.corrupt(test, 0.5, generator())
    probs = model(noisy, torch.tensor(0.5, dtype=torch.float64))
    torch.testing.assert_close(probs.sum(-1), torch.ones(test.shape))
    hidden = noisy == model.process.mask_id if name.endswith("masked") else torch.ones_like(test, dtype=torch.bool)
    loss = -probs.gather(-1, test[..., None])[..., 0].log()[hidden].mean()
    ink = binary_digits("train").double().mean(0)
    blind = -torch.where(test == 1, ink, 1 - ink).clamp(min=1e-3).log()[hidden].mean()  # every pixel's own frequency
    assert float(loss) < 0.75 * float(blind)
    x = sample_discrete(model, model.process, (3, model.seq_len), 4, generator=generator())
    assert len(model.decode(x)[0]) == 64


def test_shipped_weights_are_small():
    folder = Path(samplers.reference.__file__).parent / "models"
    files = [path for name in NAMES for path in (folder / name).glob("*.safetensors")]
    assert len(files) == 2
    assert sum(path.stat().st_size for path in files) < 4_000_000


def test_unknown_models_are_named(tmp_path):
    with pytest.raises(ValueError, match="binary-digits-masked, binary-digits-uniform"):
        load_tokens("letters")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_tokens(tmp_path)
    with pytest.raises(ValueError, match="unknown split"):
        binary_digits("dev")


@pytest.mark.parametrize("time", [False, True])
def test_networks_survive_their_folder(tmp_path, time):
    for network in (TokenMLP(3, 6, 32, 1, time), TokenTransformer(3, 6, 32, 1, time)):
        save_network(network.half().float(), tmp_path / "net", process="masked")
        loaded, config = load_network(tmp_path / "net")
        x, level = torch.randint(4, (5, 6)), torch.rand(5)
        torch.testing.assert_close(loaded(x, level), network.eval()(x, level), atol=2e-3, rtol=1e-2)
        assert config == {"process": "masked"}
        if time:
            with pytest.raises(ValueError, match="noise level"):
                network(x)


def test_interrupted_training_ends_the_same(tmp_path):
    def draw(batch, generator):
        return torch.randint(2, (batch, 1), generator=generator).expand(batch, 4)

    def network():
        torch.manual_seed(0)
        return TokenMLP(2, 4, 16, 1)

    config = TokenTraining(steps=30, batch=16, save_every=10, warmup=5)
    whole = train_tokens(network(), draw, config, tmp_path / "a", log=lambda _: None)

    def stop(line):
        if line.startswith("step 20"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_tokens(network(), draw, config, tmp_path / "b", log=stop)
    resumed = train_tokens(network(), draw, config, tmp_path / "b", log=lambda _: None)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
    with pytest.raises(ValueError, match="known: masked, uniform"):
        train_tokens(network(), draw, TokenTraining(process="other"), tmp_path / "c")


def test_optimal_counts_by_hand():
    losses = torch.tensor([2.0, 1.0, 0.0, 0.0]).double()
    assert optimal_counts(losses, 2) == [2, 2]  # 2 * 2 + 2 * 0 = 4; [1, 3] costs 2 + 3 * 1 = 5
    assert optimal_counts(losses, 3) == [1, 1, 2]


def test_reveal_losses_of_copies():
    """All tokens of a sequence are equal: one known token tells all."""

    def model(x, t):
        known = (x != 2).any(-1)
        token = torch.where(x == 2, 0, x).amax(-1)
        sure = torch.nn.functional.one_hot(token, 2).double()
        return torch.where(known[:, None], sure, 0.5)[:, None].expand(*x.shape, 2)

    ids = torch.tensor([[0] * 5, [1] * 5] * 20)
    losses = reveal_losses(model, MaskedProcess(2), ids, torch.Generator().manual_seed(0))
    assert losses.tolist() == pytest.approx([0.6931, 0, 0, 0, 0], abs=1e-3)
