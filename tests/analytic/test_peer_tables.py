"""Learned tables against loops written from their papers' formulas, on an exact mixture."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from samplers import NoiseSchedule, SolverSchedule, Tableau, recipe, sample
from samplers.denoisers import GaussianMixture
from samplers.peers import (
    Midpoint,
    compensated,
    cumulative_softmax,
    decoupled,
    fit_compensation,
    fit_evaluation_times,
    from_adasde,
    from_bns,
    from_dyweight,
    from_epd,
    from_gs,
    from_ld3,
    from_midpoints,
    from_s4s,
    stick_breaking,
)

EDM, VP, FLOW = NoiseSchedule.edm(), NoiseSchedule.vp_linear(), NoiseSchedule.flow()


@pytest.fixture(scope="module")
def law() -> GaussianMixture:
    g = torch.Generator().manual_seed(3)
    return GaussianMixture(torch.randn(4, 3, generator=g), torch.tensor([0.2, 0.3, 0.15, 0.5]), torch.tensor([1.0, 2, 3, 1]))


def noise_for(noise: NoiseSchedule, n: int = 6) -> torch.Tensor:
    g = torch.Generator().manual_seed(5)
    return torch.randn(n, 3, generator=g, dtype=torch.float64) * noise.sigma(noise.t_max)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-11) -> None:
    assert (a - b).abs().max() < tolerance * b.abs().max()


def t64(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def rho_grid(n: int) -> list[float]:
    return [(80 ** (1 / 7) + k / n * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for k in range(n + 1)]


@pytest.mark.parametrize("afs", [False, True])
def test_dyweight(law: GaussianMixture, afs: bool) -> None:
    g = torch.Generator().manual_seed(1)
    w = (torch.eye(5) + 0.03 * torch.randn(5, 5, generator=g)).double()
    mask = torch.ones(5, 5).tril() - torch.ones(5, 5).tril(-3)
    scale = (1 + 0.1 * torch.randn(5 - afs, generator=g)).double()
    table = {"hybrid_weights": w, "mask": mask, "t_scale": scale, "afs": afs}
    schedule = from_dyweight(table, EDM)
    denoiser, x = law.denoiser(EDM), noise_for(EDM)
    nominal, slopes = rho_grid(5), []
    y, level = x, nominal[0]
    for i in range(5):
        if afs and i == 0:
            slopes.append(y / math.sqrt(1 + level**2))
        else:
            slopes.append((y - denoiser(y, (scale[i - afs] * level).abs())) / level)
        weights = (w * mask)[i, : i + 1]
        y = y + (nominal[i + 1] - level) * sum(a * d for a, d in zip(weights, slopes, strict=True))
        level += float(weights.sum()) * (nominal[i + 1] - level)
    close(sample(denoiser, x, schedule, EDM), y)
    assert schedule.nfe == 5 - afs
    assert schedule.times[-1] == pytest.approx(level)
    again = SolverSchedule.from_dict(schedule.to_dict())
    assert torch.equal(sample(denoiser, x, again, EDM), sample(denoiser, x, schedule, EDM))


def test_dyweight_on_a_variance_preserving_model(law: GaussianMixture) -> None:
    """The same table, told in x / alpha: EDM and VP runs agree where no time is scaled."""
    levels = [20.0, 5.0, 1.2, 0.3, 0.05]
    table = {"hybrid_weights": torch.tensor([[1.0, 0, 0, 0], [-0.5, 1.5, 0, 0], [0.1, -0.6, 1.4, 0], [0, 0, -0.4, 1.4]])}
    own, other = from_dyweight(table, VP, levels=levels), from_dyweight(table, EDM, levels=levels)
    y = noise_for(EDM) / 4
    x = y * VP.alpha(own.times[0])
    close(sample(law.denoiser(VP), x, own, VP) / VP.alpha(own.times[-1]), sample(law.denoiser(EDM), y, other, EDM), 1e-9)
    with pytest.raises(ValueError, match="needs an EDM model"):
        from_dyweight({**table, "t_scale": [1.1, 1, 1, 1]}, VP, levels=levels)


def epd_table(kind: str) -> dict:
    g = torch.Generator().manual_seed(2)
    names = ("r_params", "weight_s", "scale_dir_params", "scale_time_params", "gamma_params")
    table = {name: torch.randn(3, 2, generator=g, dtype=torch.float64) for name in names}
    return {**table, "scale_dir": 0.05, "scale_time": 0.2, "fcn": True, "afs": True, "gamma": 0.02 if kind == "adasde" else 0}


@pytest.mark.parametrize("kind", ["epd", "adasde"])
def test_parallel_midpoints(law: GaussianMixture, kind: str) -> None:
    table, denoiser, x = epd_table(kind), law.denoiser(EDM), noise_for(EDM)
    levels = [80.0, 4.0, 0.5, 0.01]
    schedule = {"epd": from_epd, "adasde": from_adasde}[kind](table, EDM, levels=levels)
    draws = torch.Generator().manual_seed(9)
    y = x
    for i in range(3):
        r, w = torch.sigmoid(table["r_params"][i]), torch.softmax(table["weight_s"][i], -1)
        if kind == "epd":
            c, a = (
                (2 * torch.sigmoid(0.5 * table[f"scale_{k}_params"][i]) * s + 1 - s) for k, s in (("dir", 0.05), ("time", 0.2))
            )
            gamma = 0.0
        else:
            c, a = ((1 + s * torch.tanh(table[f"scale_{k}_params"][i] / 2)) for k, s in (("dir", 0.05), ("time", 0.2)))
            own = 2e-4 + (0.02 - 2e-4) * torch.sigmoid((table["gamma_params"][i] + 2 * math.log(0.6 / 0.4)) / 2)
            gamma = float((own * w).sum()) if i else 0.0
        if i == 2:
            c = torch.ones(2)
        level, end = levels[i] * (1 + gamma), levels[i + 1]
        if gamma:
            noise = torch.randn(y.shape, generator=draws, dtype=torch.float64)
            y = y + math.sqrt(level**2 - levels[i] ** 2) * noise
        d = y / math.sqrt(1 + level**2) if i == 0 else (y - denoiser(y, t64(level))) / level
        new = y
        for k in range(2):
            s = level ** (1 - r[k]) * end ** r[k]
            mid = y + (s - level) * d
            new = new + w[k] * c[k] * (end - level) * (mid - denoiser(mid, a[k] * s)) / s
        y = new
    out = sample(denoiser, x, schedule, EDM, generator=torch.Generator().manual_seed(9))
    close(out, y, 1e-10)
    tableau = Tableau.build(schedule, EDM)
    assert (schedule.nfe, tableau.depth) == (3 * 2 + 2, 5)  # AFS saves one; two midpoints of a step run together
    assert schedule.stochastic == (kind == "adasde")


def test_depth_of_ordinary_solvers_is_their_nfe() -> None:
    for text in ("ddim", "unipc:order=3", "heun", "dpm:order=3", "kdpm2"):
        schedule = recipe(text, VP, 7)
        assert Tableau.build(schedule, VP).depth == schedule.nfe == 7


def test_midpoints_must_lie_in_their_step() -> None:
    with pytest.raises(ValueError, match="lie apart"):
        from_midpoints(EDM, [80.0, 1.0], [[Midpoint(0.5), Midpoint(0.5)]])
    with pytest.raises(ValueError, match="lie apart"):
        from_midpoints(EDM, [80.0, 1.0], [[Midpoint(1.0)]])
    with pytest.raises(ValueError, match="first step"):
        from_midpoints(EDM, [80.0, 1.0], [[Midpoint(0.5)]], gammas=[0.1])


def gs_table(order: int, steps: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(order)
    table = {"mu_logit": 1.5 + 0.3 * torch.randn(steps - 1, generator=g), "t_couple": 0.004 * torch.randn(steps, generator=g)}
    table["t_couple"][0] = -0.002  # the network cannot be told a time above 1
    for k in range(1, order + 1):
        for kind in "ca":
            table[f"{kind}{k}_diff"] = 0.05 * torch.randn(steps, generator=g)
    return {name: value.double() for name, value in table.items()}


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_generalised_solver(law: GaussianMixture, order: int) -> None:
    steps, table = 6, gs_table(order, 6)
    denoiser, x = law.denoiser(VP), noise_for(VP)
    schedule = from_gs(table, VP)
    times = [t64(t) for t in stick_breaking(table["mu_logit"], VP.t_min)]

    def x0(y: torch.Tensor, i: int) -> torch.Tensor:
        told = times[i] + table["t_couple"][i]
        eps = (y - VP.alpha(told) * denoiser(y, told)) / VP.sigma(told)
        return (y - VP.sigma(times[i]) * eps) / VP.alpha(times[i])

    xs, ms = [x], [x0(x, 0)]
    for i in range(steps):
        p = min(order, i + 1)
        a = [table[f"a{k}_diff"][i] for k in range(1, p + 1)]
        c = [table[f"c{k}_diff"][i] for k in range(1, p + 1)]
        lam = [VP.lam(t) for t in times]
        h, alpha = lam[i + 1] - lam[i], VP.alpha(times[i + 1])
        phi1 = torch.expm1(-h)
        y = (VP.sigma(times[i + 1]) / VP.sigma(times[i]) + a[0]) * xs[-1] - (alpha * phi1 + c[0]) * ms[-1]
        if p >= 2:
            r0 = (lam[i] - lam[i - 1]) / h
            d10 = (ms[-1] - ms[-2]) / r0
        if p == 2:
            y = y - (0.5 * alpha * phi1 + c[1]) * d10 + a[1] * xs[-2]
        if p >= 3:
            r1 = (lam[i - 1] - lam[i - 2]) / h
            d11 = (ms[-2] - ms[-3]) / r1
            phi2 = phi1 / h + 1
            phi3 = phi2 / h - 0.5
            d1, d2 = d10 + r0 / (r0 + r1) * (d10 - d11), (d10 - d11) / (r0 + r1)
            y = y + (alpha * phi2 + c[1]) * d1 - (alpha * phi3 + c[2]) * d2
            for k in range(4, p + 1):
                y = y + c[k - 1] * ms[-k]
            for k in range(2, p + 1):
                y = y + a[k - 1] * xs[-k]
        xs.append(y)
        if i < steps - 1:
            ms.append(x0(y, i + 1))
    close(sample(denoiser, x, schedule, VP), xs[-1], 1e-9)
    shadow = [table["mu_logit"], table["t_couple"], *(table[f"{kind}{k}_diff"] for k in range(1, order + 1) for kind in "ca")]
    assert from_gs({"ema": {"shadow_params": shadow, "decay": 0.999}}, VP).digest == schedule.digest


def test_generalised_solver_without_learning_is_dpmpp() -> None:
    table = {name: torch.zeros_like(value) for name, value in gs_table(3, 6).items()}
    learned, times = from_gs(table, VP), stick_breaking(torch.zeros(5), VP.t_min)
    theory = [recipe("dpmpp:order=3,lower_order_final=false,final=sigma_min", VP, 6).steps]
    same = SolverSchedule(times=times, steps=theory[0])
    rows = Tableau.build(learned, VP), Tableau.build(same, VP)
    for a, b in zip(*(tableau.stages for tableau in rows), strict=True):
        wanted = dict(b.rows[-1].terms)
        for name, value in a.rows[-1].terms:
            assert value == pytest.approx(wanted.get(name, 0.0), abs=1e-12)


def test_s4s_rows_and_evaluation_times(law: GaussianMixture) -> None:
    times, told = (1.0, 0.7, 0.4, 0.1, 0.001), (1.0, 0.68, 0.43, 0.12)
    b = [[1.0], [1.4, -0.45], [1.6, -0.8, 0.25], [1.2, -0.2]]
    schedule = decoupled(from_s4s(times, b, VP), told)
    denoiser, x = law.denoiser(VP), noise_for(VP)
    y, ms = x, []
    for i in range(4):
        t, u, v = t64(times[i]), t64(told[i]), t64(times[i + 1])
        eps = (y - VP.alpha(u) * denoiser(y, u)) / VP.sigma(u)
        ms.insert(0, (y - VP.sigma(t) * eps) / VP.alpha(t))
        h = VP.lam(v) - VP.lam(t)
        y = VP.sigma(v) / VP.sigma(t) * y - VP.alpha(v) * torch.expm1(-h) * sum(w * m for w, m in zip(b[i], ms, strict=False))
    close(sample(denoiser, x, schedule, VP), y, 1e-10)
    with pytest.raises(ValueError, match="weighs 2 predictions"):
        from_s4s((1.0, 0.5), [[1.0, 0.5]], VP)


def test_bespoke_rows(law: GaussianMixture) -> None:
    times, a = (1.0, 0.8, 0.45, 0.0), (0.99, 1.02, 0.97)
    b = [[-0.2], [-0.25, -0.31], [-0.2, -0.4, -0.38]]
    denoiser, x = law.denoiser(FLOW), noise_for(FLOW)
    y, velocities = x, []
    for i in range(3):
        velocities.append((y - denoiser(y, t64(times[i]))) / times[i])
        y = a[i] * x + sum(w * u for w, u in zip(b[i], velocities, strict=True))
    close(sample(denoiser, x, from_bns(times, a, b, FLOW), FLOW), y)
    with pytest.raises(ValueError, match="flow model"):
        from_bns(times, a, b, VP)


def test_ld3_times(law: GaussianMixture) -> None:
    logits = torch.randn(5, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 0.3
    times = cumulative_softmax(logits, 1.0, 1e-3)
    assert (float(times[0]), float(times[-1])) == pytest.approx((1.0, 1e-3))
    assert bool((times.diff() < 0).all())
    shares = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum()
    np.testing.assert_allclose(times.numpy(), 1 - 0.999 * np.concatenate([[0], shares.cumsum()]), atol=1e-14)
    told = (times + torch.tensor([-0.003, 0.01, -0.01, 0.004, -0.002, 0.0])).clamp(max=1.0)
    schedule = from_ld3({"best_t_steps": torch.cat([times, told])}, "dpmpp:order=2,lower_order_final=false,final=sigma_min", VP)
    denoiser, x = law.denoiser(VP), noise_for(VP)
    y, ms = x, []
    for i in range(5):
        t, u, v = times[i], told[i], times[i + 1]
        eps = (y - VP.alpha(u) * denoiser(y, u)) / VP.sigma(u)
        ms.append((y - VP.sigma(t) * eps) / VP.alpha(t))
        h = VP.lam(v) - VP.lam(t)
        m = ms[-1]
        if i:
            m = m + 0.5 * h / (VP.lam(t) - VP.lam(times[i - 1])) * (m - ms[-2])
        y = VP.sigma(v) / VP.sigma(t) * y - VP.alpha(v) * torch.expm1(-h) * m
    close(sample(denoiser, x, schedule, VP), y, 1e-10)


def unipc_with_compensation(  # noqa: C901  # one loop, as the paper states it
    denoiser, x, schedule: SolverSchedule, ratios: list[float], predict_x0: bool
) -> torch.Tensor:
    """UniPC-bh2 by its paper's linear systems, replacing the newest output before each predictor."""
    t = [t64(v) for v in schedule.times]
    outputs: list[torch.Tensor] = []

    def model(y: torch.Tensor, i: int) -> torch.Tensor:
        m = denoiser(y, t[i])
        return m if predict_x0 else (y - VP.alpha(t[i]) * m) / VP.sigma(t[i])

    def advance(y: torch.Tensor, i: int, order: int, new: torch.Tensor | None) -> torch.Tensor:
        lam = [float(VP.lam(v)) for v in t]
        h = lam[i + 1] - lam[i]
        z = -h if predict_x0 else h
        bh = math.expm1(z)
        ratios_ = [(lam[i - k] - lam[i]) / h for k in range(1, order)]
        d = [(outputs[-1 - k] - outputs[-1]) / r for k, r in enumerate(ratios_, start=1)]
        if new is not None:
            ratios_, d = [*ratios_, 1.0], [*d, new - outputs[-1]]
        n = len(d)
        if n == 1:
            rho = [0.5]
        elif n:
            right, phi, factorial = [], bh / z - 1, 1
            for k in range(1, n + 1):
                right.append(phi * factorial / bh)
                factorial *= k + 1
                phi = phi / z - 1 / factorial
            rho = list(np.linalg.solve(np.array([[r ** (k - 1) for r in ratios_] for k in range(1, n + 1)]), right))
        else:
            rho = []
        s, e = t[i], t[i + 1]
        base = VP.sigma(e) / VP.sigma(s) * y - VP.alpha(e) * bh * outputs[-1]
        scale = VP.alpha(e)
        if not predict_x0:
            base, scale = VP.alpha(e) / VP.alpha(s) * y - VP.sigma(e) * bh * outputs[-1], VP.sigma(e)
        return base - scale * bh * sum((float(r) * v for r, v in zip(rho, d, strict=True)), torch.zeros_like(y))

    y = x
    outputs.append(model(y, 0))
    for i, step in enumerate(schedule.steps):
        if ratios[i] != 1:
            at = t[i - 1] + ratios[i] * (t[i] - t[i - 1])
            own = (i, i - 1, i - 2)
            weights = [math.prod(float((at - t[b]) / (t[a] - t[b])) for b in own if b != a) for a in own]
            outputs[-1] = sum(w * outputs[-1 - k] for k, w in enumerate(weights))
        predicted = advance(y, i, step.order, None)
        if i == len(schedule.steps) - 1:
            return predicted
        answer = model(predicted, i + 1)
        y = advance(y, i, step.order, answer) if step.corr is not None else predicted
        outputs.append(answer)
    raise AssertionError


@pytest.mark.parametrize("pred", ["x0", "eps"])
def test_dynamic_compensation(law: GaussianMixture, pred: str) -> None:
    import msgspec

    base = recipe("unipc:order=2,variant=bh2,grid=lambda,final=sigma_min", VP, 6)
    base = msgspec.structs.replace(base, steps=tuple(msgspec.structs.replace(s, pred=pred) for s in base.steps))
    ratios = [1.0, 1.0, 0.8, 1.15, 0.93, 1.05]
    denoiser, x = law.denoiser(VP), noise_for(VP)
    plain = sample(denoiser, x, base, VP)
    close(plain, unipc_with_compensation(denoiser, x, base, [1.0] * 6, pred == "x0"), 1e-10)
    wanted = unipc_with_compensation(denoiser, x, base, ratios, pred == "x0")
    close(sample(denoiser, x, compensated(base, ratios), VP), wanted, 1e-10)
    assert (plain - wanted).abs().max() > 1e-3


def test_compensation_is_refused_where_there_is_no_history() -> None:
    base = recipe("unipc:order=2", VP, 5)
    with pytest.raises(ValueError, match=r"steps\[1\]: hist_shift needs network evaluations"):
        compensated(base, [1, 0.9, 1, 1, 1])
    with pytest.raises(ValueError, match="5 steps need as many ratios"):
        compensated(base, [1.0])


def test_fitted_compensation_lowers_the_error_on_other_noises(law: GaussianMixture) -> None:
    denoiser = law.denoiser(VP)
    g = torch.Generator().manual_seed(8)
    x = torch.randn(64, 3, generator=g, dtype=torch.float64)
    base = recipe("unipc:order=2,grid=lambda,final=sigma_min", VP, 5)
    fine = recipe("dpmpp:order=3,taylor=true,grid=lambda,final=sigma_min", VP, 200)
    _, path = sample(denoiser, x, fine, VP, trajectory=True)
    targets = [path[40 * (i + 1)] for i in range(5)]
    assert [round(fine.times[40 * i], 9) for i in range(6)] == [round(t, 9) for t in base.times]
    fitted = fit_compensation(base, denoiser, VP, x[:32], [target[:32] for target in targets])
    assert any(step.hist_shift for step in fitted.steps)

    def error(schedule: SolverSchedule) -> float:
        return float((sample(denoiser, x[32:], schedule, VP) - targets[-1][32:]).square().mean().sqrt())

    assert error(fitted) < 0.9 * error(base)


@pytest.mark.parametrize("keep", ["eps", "x0"])
def test_fitted_evaluation_times_lower_the_error_on_other_noises(law: GaussianMixture, keep: str) -> None:
    denoiser = law.denoiser(VP)
    x = torch.randn(96, 3, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    base = recipe("dpmpp:order=2,grid=lambda,final=sigma_min", VP, 4)
    truth = sample(denoiser, x, recipe("dpmpp:order=3,taylor=true,grid=lambda,final=sigma_min", VP, 200), VP)
    with torch.no_grad():  # callers may be under it
        fitted = fit_evaluation_times(base, denoiser, VP, x[:48], truth[:48], steps=25, rate=0.05, keep=keep)
    assert fitted.times == base.times
    assert any(step.eval.t_shift for step in fitted.steps)
    assert SolverSchedule.from_dict(fitted.to_dict()).digest == fitted.digest

    def error(schedule: SolverSchedule) -> float:
        return float((sample(denoiser, x[48:], schedule, VP) - truth[48:]).square().mean().sqrt())

    assert error(fitted) < 0.96 * error(base)
    with pytest.raises(ValueError, match="deterministic"):
        fit_evaluation_times(recipe("ddpm", VP, 4), denoiser, VP, x, truth)
