"""Two data fields of a step: what is kept of an answer given for another time, and the history shift."""

from __future__ import annotations

import msgspec
import pytest
import torch

from samplers import Evaluation, NoiseSchedule, SolverSchedule, StepStrategy, Tableau, recipe, sample
from samplers.denoisers import GaussianMixture
from samplers.peers import compensated, decoupled

VP = NoiseSchedule.vp_linear()


def shifted(keep: str) -> SolverSchedule:
    base = recipe("dpmpp:order=2,final=sigma_min", VP, 5)
    return decoupled(base, [t * 0.98 for t in base.times[:-1]], keep=keep)


@pytest.mark.parametrize(
    "schedule", [shifted("eps"), shifted("x0"), compensated(recipe("unipc:order=2", VP, 5), [1, 1, 0.9, 1.2, 1])]
)
def test_files_keep_them(schedule: SolverSchedule) -> None:
    again = SolverSchedule.from_dict(msgspec.json.decode(msgspec.json.encode(schedule.to_dict())))
    assert again == schedule
    assert again.digest == schedule.digest


def test_they_change_the_digest_and_the_result() -> None:
    law = GaussianMixture(torch.randn(3, 2), torch.tensor([0.3, 0.2, 0.4]))
    x = torch.randn(4, 2, dtype=torch.float64)
    results = [sample(law.denoiser(VP), x, shifted(keep), VP) for keep in ("eps", "x0")]
    assert shifted("eps").digest != shifted("x0").digest
    assert (results[0] - results[1]).abs().max() > 1e-4


def test_without_another_time_keep_makes_no_difference() -> None:
    plain = recipe("unipc:order=3", VP, 5)
    kept = [msgspec.structs.replace(step, eval=Evaluation(keep="eps")) for step in plain.steps]
    same = msgspec.structs.replace(plain, steps=tuple(kept))
    assert Tableau.build(same, VP).stages == Tableau.build(plain, VP).stages


def test_a_corrector_that_evaluates_again_keeps_the_noise_prediction_too() -> None:
    """Heun told another time: both evaluations count with their noise prediction, as the loop below takes it."""
    schedule = recipe("heun:final=sigma_min,grid=lambda", VP, 3)
    t, u, end = (torch.tensor(v, dtype=torch.float64) for v in schedule.times)
    told = (t * 0.99, u * 1.03)
    schedule = decoupled(schedule, [float(v) for v in told])
    law = GaussianMixture(torch.randn(3, 2), torch.tensor([0.3, 0.2, 0.4]))
    denoiser, x = law.denoiser(VP), torch.randn(4, 2, dtype=torch.float64)

    def eps(state: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return (state - VP.alpha(at) * denoiser(state, at)) / VP.sigma(at)

    s = [VP.sigma(v) / VP.alpha(v) for v in (t, u, end)]
    y = x / VP.alpha(t)
    d = eps(x, told[0])
    guess = y + (s[1] - s[0]) * d
    y = y + (s[1] - s[0]) * (d + eps(guess * VP.alpha(u), told[1])) / 2
    y = y + (s[2] - s[1]) * eps(y * VP.alpha(u), told[1])
    torch.testing.assert_close(sample(denoiser, x, schedule, VP), y * VP.alpha(end), rtol=1e-10, atol=1e-12)


def test_entry_in_the_middle_drops_a_history_that_is_cut_off() -> None:
    schedule = compensated(recipe("unipc:order=2", VP, 6), [1, 1, 0.9, 0.8, 1.1, 1])
    tail = schedule.tail(2)
    assert [step.hist_shift for step in tail.steps[:2]] == [0.0, 0.0]
    assert tail.steps[2].hist_shift == pytest.approx(0.1)
    Tableau.build(tail, VP)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (StepStrategy(eval=Evaluation(keep="v")), "unknown keep 'v'; known: x0, eps"),  # type: ignore[arg-type]
        (StepStrategy(hist_shift=float("nan")), "hist_shift must be finite"),
        (StepStrategy(hist_shift=0.1, pred=(1.0, 0.0)), "needs pred 'x0' or 'eps'"),
    ],
)
def test_wrong_values_are_named(step: StepStrategy, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SolverSchedule(times=(1.0, 0.7, 0.4, 0.1), steps=(StepStrategy(), StepStrategy(), step))


def test_levels_without_noise_or_signal_are_refused() -> None:
    cosine = NoiseSchedule.vp_cosine()
    start = SolverSchedule(times=(1.0, 0.5), steps=(StepStrategy(eval=Evaluation(t_shift=-0.01, keep="eps")),))
    with pytest.raises(ValueError, match=r"steps\[0\]: keep 'eps' is not possible from alpha = 0"):
        Tableau.build(start, cosine)
    end = SolverSchedule(
        times=(1.0, 0.1, 0.05), steps=(StepStrategy(), StepStrategy(eval=Evaluation(t_shift=-0.1, keep="eps")))
    )
    with pytest.raises(ValueError, match="told sigma = 0"):
        Tableau.build(end, VP)
