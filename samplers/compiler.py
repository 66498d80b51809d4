r"""From a solver schedule to rows.

Exact solution of the sampling ODE from node s to t, $h = \lambda_t - \lambda_s$, with the
prediction expanded to order p in the variable g (arXiv:2312.07243; arXiv:2211.01095 eq. 8; arXiv:2206.00927 eq. 3.4):

    x_t = DDIM(x_s, D_s) + sum_{k=1}^{p-1} m_k relax_k D^(k),    m_k = integral of K(lambda) (g - g_s)^k / k!

with K the data- or noise-form kernel and D^(k) the derivatives of the polynomial through the active nodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .noise import NoiseSchedule, as_float64
from .parametrization import Scalar
from .phi import GAUSS_LEGENDRE, derivative_weights, exp, is_zero, log, phi, psi
from .placement import Stencil
from .rows import Query, Row, Stage, Terms, add, fuse, row
from .statistics.reading import Reader
from .step import STATISTICAL, Relax, StepStrategy
from .strategy import SolverSchedule

# Nodes at alpha = 0 enter derivative estimates as if at alpha / sigma = 1e-6, as in-tree flow schedulers place them.
LOG_SNR_FLOOR = math.log(1e-6)


@dataclass
class Node:
    """A time with its levels, and what is known there: the state the network saw and its x0-prediction."""

    t: Scalar
    alpha: Scalar
    sigma: Scalar
    lam: Scalar
    state: str = ""
    x0: Terms | None = None
    raw: Terms | None = None


def _log_ratio(alpha: float, sigma: float) -> float:
    return math.inf if sigma == 0 else max(math.log(alpha / sigma), LOG_SNR_FLOOR) if alpha > 0 else LOG_SNR_FLOOR


class Compiler:
    """Walks the steps once, keeping for every node the expression of its state and prediction."""

    def __init__(self, schedule: SolverSchedule, noise: NoiseSchedule, reader: Reader | None = None) -> None:
        """Look up the levels of every time; ``reader`` is for the steps that use empirical model statistics."""
        self.schedule, self.noise, self.reader = schedule, noise, reader
        symbolic = any(torch.is_tensor(t) for t in schedule.times)
        self.nodes = []
        for t in schedule.times:
            # One time at a time: elementwise kernels may round a batch differently from the single value a denoiser asks for.
            alpha, sigma = noise.alpha_sigma(t)
            if symbolic:
                lam = (torch.log(alpha) - torch.log(sigma)).clamp(min=LOG_SNR_FLOOR)
                self.nodes.append(Node(as_float64(t), alpha, sigma, lam))
            else:
                levels = alpha.item(), sigma.item()
                self.nodes.append(Node(float(t), *levels, _log_ratio(*levels)))
        self.raw_needed = {i for i, step in enumerate(schedule.steps) if step.keep_eps}

    def run(self) -> tuple[tuple[Row, ...], tuple[Stage, ...]]:
        """The rows before the first query, and the queries with the rows that follow each."""
        opening: list[Row] = []
        staged: list[tuple[Query, list[Row]]] = []
        rows = opening
        corrected: dict[int, str] = {}
        increment: Terms = {}
        for i, step in enumerate(self.schedule.steps):
            node = self.nodes[i]
            node.state = corrected[i] = f"x{i}"
            if step.eval.source == "none":
                rows.append(self._renoise(i, step))
                continue
            if step.eval.source == "model":
                node.x0, node.raw = {f"d{i}": 1.0}, {f"r{i}": 1.0} if i in self.raw_needed else None
                rows = []
                staged.append((self._query(i, f"x{i}", f"d{i}"), rows))
                node.x0 = self._kept(i, {f"d{i}": 1.0})
            else:
                node.x0 = node.raw = self._analytic_x0(node, step.eval.source)
            previous = self.schedule.steps[i - 1] if i else None
            if previous is not None and previous.corr is not None:
                # The caller may have edited the predicted state, so the corrected one is that state plus a difference.
                change = self._increment(i - 1, previous, self.schedule.corrector_stencil(i - 1))
                add(change, -1.0, increment)  # of the predictor, from the step before
                corrected[i] = f"c{i}"
                rows.append(row(f"c{i}", {f"x{i}": 1.0}, change))
                if previous.corr.reeval:
                    rows = []
                    staged.append((self._query(i, f"c{i}", f"e{i}"), rows))
                    node.state, node.raw = f"c{i}", None
                    node.x0 = self._kept(i, {f"e{i}": 1.0})
            if step.hist_shift:
                node.x0 = self._shifted(i, step)
            stencil = self.schedule.stencil(i)
            terms = self._first_order(i, step, stencil.start, corrected[stencil.start])
            increment = self._increment(i, step, stencil)
            add(terms, 1.0, increment)
            if step.delta is not None:
                for j, value in enumerate(step.delta.x):
                    add(terms, value, {self.nodes[j].state: 1.0})
                for j, value in enumerate(step.delta.x0):
                    add(terms, value, self.nodes[j].x0 or {})
            rows.append(row(f"x{i + 1}", terms, noise=self._noise_scale(i, step, stencil.start)))
        return tuple(opening), self._stages(staged)

    def _query(self, i: int, state: str, output: str) -> Query:
        node, told = self.nodes[i], self.schedule.steps[i].eval
        if told.t_scale == 1.0 and told.t_shift == 0.0:
            return Query(state, output, as_float64(node.t), node.alpha, node.sigma, i)
        t = as_float64(node.t) * told.t_scale + told.t_shift
        try:
            alpha, sigma = self.noise.alpha_sigma(t)
        except ValueError as error:
            raise ValueError(f"steps[{i}]: evaluation {error}") from None
        if t.requires_grad:
            return Query(state, output, t, alpha, sigma, i)
        return Query(state, output, t, alpha.item(), sigma.item(), i)

    def _stages(self, staged: list[tuple[Query, list[Row]]]) -> tuple[Stage, ...]:
        """Fuse corrected states that nothing later reads, and work out what each stage may forget."""
        later = {f"x{len(self.schedule.steps)}"}
        stages = []
        for query, rows in reversed(staged):
            fused = fuse(rows, later)
            keep = frozenset(later)
            for done in fused:
                later |= {name for name, _ in done.terms}
            raw = f"r{query.node}" if f"r{query.node}" in later else None
            later -= {done.target for done in fused} | {query.output, f"r{query.node}"}
            later |= {query.state}
            stages.append(Stage(query, fused, keep, raw))
        return tuple(reversed(stages))

    def _kept(self, i: int, answer: Terms) -> Terms:
        """The x0-prediction at node i of an answer given for another time, when its noise prediction is what is kept."""
        node, told = self.nodes[i], self.schedule.steps[i].eval
        if told.keep == "x0" or (told.t_scale == 1.0 and told.t_shift == 0.0):
            return answer
        query = self._query(i, node.state, "")
        if is_zero(node.alpha) or is_zero(query.sigma):
            raise ValueError(f"steps[{i}]: keep 'eps' is not possible from alpha = 0 or where the network is told sigma = 0")
        ratio = node.sigma / query.sigma
        terms: Terms = {node.state: (1.0 - ratio) / node.alpha}
        add(terms, ratio * query.alpha / node.alpha, answer)
        return terms

    def _shifted(self, i: int, step: StepStrategy) -> Terms:
        """Node i's x0 when its prediction is read off the quadratic in t through the last three."""
        node, recent = self.nodes[i], (i, i - 1, i - 2)
        at = node.t + step.hist_shift * (node.t - self.nodes[i - 1].t)
        shifted: Terms = {}
        for j in recent:
            weight: Scalar = 1.0
            for other in recent:
                if other != j:
                    weight = weight * (at - self.nodes[other].t) / (self.nodes[j].t - self.nodes[other].t)
            add(shifted, weight, self._prediction(j, i, step))
        if step.pred == "x0":
            return shifted
        if is_zero(node.alpha):
            raise ValueError(f"steps[{i}]: hist_shift of the noise prediction is not possible at alpha = 0")
        terms: Terms = {node.state: 1.0 / node.alpha}
        add(terms, -node.sigma / node.alpha, shifted)
        return terms

    def _analytic_x0(self, node: Node, source: str) -> Terms:
        """x0 of a state that is taken for pure noise (eps = x for VP, x / sigma otherwise), or the data's mean."""
        if source == "average_x0":
            return {"first_x0": 1.0}
        # (1 - sigma) / alpha, written so that it is exact at alpha = 0
        return {node.state: node.alpha / (1 + node.sigma)} if self.noise.family == "vp" else {}

    # ---- one step ------------------------------------------------------------------------------------------------

    def _first_order(self, i: int, step: StepStrategy, start: int, state: str) -> Terms:
        """The order-1 step from node ``start`` (whose corrected state is ``state``) to node i + 1."""
        s, t = self.nodes[start], self.nodes[i + 1]
        if isinstance(step.pred, tuple):
            l, r = step.pred
            h = self._finite_step(i, s, t, step)
            decay = t.alpha * exp(-l * h)
            terms = {state: decay / s.alpha}
            add(terms, decay * h * psi(1, (l + r) * h), self._prediction(start, start, step))
            return terms
        if step.pred in STATISTICAL:
            self._finite_step(i, s, t, step)
            decay, moments, constant = self._integrals(i, step, s, t)
            terms = {state: t.alpha / s.alpha * decay}
            add(terms, -t.alpha * decay * moments[0], self._prediction(start, start, step))
            add(terms, -t.alpha * decay * constant, {"one": 1.0})
            return terms
        if is_zero(s.sigma):
            raise ValueError(f"steps[{i}] starts at sigma = 0, where x0 is already known")
        if step.pred == "eps" and step.noise is not None:
            if is_zero(s.alpha):
                raise ValueError(f"steps[{i}]: noise with pred 'eps' cannot start at alpha = 0; use pred 'x0'")
            terms = {state: t.alpha / s.alpha}
            drift = (1 + step.noise.amount**2) * (t.sigma - t.alpha * s.sigma / s.alpha)
            add(terms, drift, self._prediction(start, start, step))
            return terms
        carry = t.sigma / s.sigma * self._decay(step, s, t)
        if step.pred == "x0" or state == s.state:
            terms = {state: carry}
        else:  # noise or flow form from a corrected state: the prediction is that of the state the network saw
            own = 1.0 if step.pred == "flow" else t.alpha / s.alpha
            terms = {state: own}
            add(terms, carry - own, {s.state: 1.0})
        if step.keep_eps and s.raw is not None:
            add(terms, t.alpha, s.x0 or {})
            add(terms, -s.alpha * carry, s.raw)
        else:
            add(terms, t.alpha - s.alpha * carry, s.x0 or {})
        return terms

    def _decay(self, step: StepStrategy, s: Node, t: Node) -> Scalar:
        r"""The factor that noise takes off the state's own part: $e^{-\tau^2 h}$ for the x0 form; 1 for the ODE."""
        noise = step.noise
        if noise is None or is_zero(t.sigma):
            return 1.0
        if noise.kind == "fresh":
            return 0.0
        if noise.kind == "tau":
            return exp(-(noise.amount**2) * (t.lam - s.lam))
        shrink = (t.sigma * s.alpha / (t.alpha * s.sigma)) ** 2  # exp(-2h), exact from alpha = 0 too
        return (1 - noise.amount**2 * (1 - shrink)) ** 0.5

    def _rate(self, step: StepStrategy, s: Node, t: Node) -> Scalar:
        r"""$1 + \tau^2$: how much faster than the ODE's the kernel of the x0 form decays."""
        if step.noise is None:
            return 1.0
        if step.noise.kind == "tau":
            return 1.0 + step.noise.amount**2
        return 1.0 - log(self._decay(step, s, t)) / (t.lam - s.lam)

    def _noise_scale(self, i: int, step: StepStrategy, start: int) -> Scalar:
        noise, s, t = step.noise, self.nodes[start], self.nodes[i + 1]
        if noise is None or is_zero(t.sigma):
            return 0.0
        if step.pred == "eps":
            return noise.amount * noise.scale * ((t.alpha * s.sigma / s.alpha) ** 2 - t.sigma**2) ** 0.5
        return noise.scale * t.sigma * (1 - self._decay(step, s, t) ** 2) ** 0.5

    def _renoise(self, i: int, step: StepStrategy) -> Row:
        """Back to a noisier time: the forward process from node i to node i + 1."""
        s, t = self.nodes[i], self.nodes[i + 1]
        scale = 1.0 if step.noise is None else step.noise.scale
        ratio = t.alpha / s.alpha
        return Row(f"x{i + 1}", ((f"x{i}", ratio),), scale * (t.sigma**2 - (ratio * s.sigma) ** 2) ** 0.5)

    def _increment(self, i: int, step: StepStrategy, stencil: Stencil) -> Terms:
        """The higher-order terms: sum over k of m_k relax_k D^(k)."""
        terms: Terms = {}
        s, t = self.nodes[stencil.start], self.nodes[i + 1]
        centre = self._prediction(stencil.start, stencil.start, step) if stencil.derivatives else {}
        for k, (nodes, relax) in enumerate(stencil.derivatives, start=1):
            finite = isinstance(step.pred, tuple) or step.pred in STATISTICAL
            if finite and any(is_zero(self.nodes[n].alpha * self.nodes[n].sigma) for n in nodes):
                raise ValueError(f"steps[{i}]: pred {step.pred!r} is not defined at its node with alpha = 0 or sigma = 0")
            position = [self._axis(n, step) - self._axis(stencil.start, step) for n in nodes]
            scale = self._moment(k, i, s, t, step) * self._relaxation(relax, i, s, t, step)
            for n, weight in zip(nodes, derivative_weights(position, k), strict=True):
                add(terms, scale * weight, self._prediction(n, stencil.start, step))
                add(terms, -scale * weight, centre)
        return terms

    def _axis(self, n: int, step: StepStrategy) -> Scalar:
        node = self.nodes[n]
        if step.axis == "lambda":
            return node.lam
        if step.axis == "sigma":
            return exp(-node.lam)
        return node.t if step.axis == "t" else float(n)

    def _prediction(self, n: int, start: int, step: StepStrategy) -> Terms:
        """What the step expands, at node n: x0, eps, or the (l, r) mixture relative to the start."""
        node = self.nodes[n]
        terms: Terms = {}
        if step.pred == "x0":
            return node.x0 or {}
        if step.pred == "flow":
            add(terms, 1.0 / node.sigma, {node.state: 1.0})
            add(terms, -1.0 / node.sigma, node.x0 or {})
            return terms
        if step.pred == "eps":
            add(terms, 1.0 / node.sigma, {node.state: 1.0})
            add(terms, -node.alpha / node.sigma, node.x0 or {})
            return terms
        if isinstance(step.pred, str):  # v3
            assert self.reader is not None
            l, decay, beta = self.reader.node(step.pred, node.lam, self.nodes[start].lam)
            add(terms, decay * (1 - l) / node.alpha, {node.state: 1.0})
            add(terms, -decay, node.x0 or {})
            add(terms, -beta, {"one": 1.0})
            return terms
        l, r = step.pred
        decay = exp(-r * (node.lam - self.nodes[start].lam))
        add(terms, decay, node.x0 or {})
        add(terms, decay * (l - 1) / node.alpha, {node.state: 1.0})
        return terms

    def _moment(self, k: int, i: int, s: Node, t: Node, step: StepStrategy) -> Scalar:
        r"""$m_k$, the exact integral of kernel times $(g - g_s)^k / k!$ over the step; k >= 1."""
        data = step.pred == "x0"
        if step.pred == "flow":
            width = t.t - s.t
            return width / math.factorial(k + 1) if step.axis == "index" else width ** (k + 1) / math.factorial(k + 1)
        if is_zero(t.sigma) and step.pred != "eps":
            raise ValueError(
                f"steps[{i}]: order {step.order} with pred {step.pred!r} cannot end at sigma = 0 (its weights diverge); "
                "use order 1 or pred 'eps' there"
            )
        if step.axis == "index":
            if is_zero(s.alpha) and not data:
                raise ValueError(f"steps[{i}]: pred 'eps' on axis 'index' cannot start at alpha = 0 with order above 1")
            first = t.alpha - s.alpha * t.sigma / s.sigma if data else t.sigma - t.alpha * s.sigma / s.alpha
            return first / math.factorial(k + 1)
        if step.axis == "lambda":
            if isinstance(step.pred, tuple):
                l, r = step.pred
                h = self._finite_step(i, s, t, step)
                return t.alpha * exp(-l * h) * h ** (k + 1) * psi(k + 1, (l + r) * h)
            if step.pred in STATISTICAL:
                decay, moments, _ = self._integrals(i, step, s, t)
                return -t.alpha * decay * moments[k]
            h = t.lam - s.lam
            rate = self._rate(step, s, t)
            if data:
                return rate * t.alpha * h ** (k + 1) * phi(k + 1, -rate * h)
            if is_zero(t.sigma):
                return -rate * t.alpha * exp(-s.lam)
            return -rate * t.sigma * h ** (k + 1) * phi(k + 1, h)
        return self._moment_by_parts(k, s, t, step)

    def _integrals(self, i: int, step: StepStrategy, s: Node, t: Node) -> tuple[Scalar, tuple[Scalar, ...], Scalar]:
        assert self.reader is not None
        try:
            return self.reader.step(str(step.pred), s.lam, t.lam)
        except ValueError as error:
            raise ValueError(f"steps[{i}]: {error}") from None

    def _moment_by_parts(self, k: int, s: Node, t: Node, step: StepStrategy) -> Scalar:
        """The integral in sigma/alpha or in t: [u^k/k! F] - integral of u^(k-1)/(k-1)! F du, F = sigma/alpha or its inverse."""
        data = step.pred == "x0"
        sign = 1.0 if data else -1.0
        scale = t.sigma if data else t.alpha
        end = exp(sign * t.lam)
        if step.axis == "sigma":
            start_at, width = exp(-s.lam), exp(-t.lam) - exp(-s.lam)
            if not data:
                return scale * width ** (k + 1) / math.factorial(k + 1)

            def level(u: Scalar) -> Scalar:
                return 1.0 / (start_at + u)

        else:
            start_at, width = s.t, t.t - s.t

            def level(u: Scalar) -> Scalar:
                lam = self.noise.lam(start_at + u)
                value = torch.exp(sign * lam.clamp(min=LOG_SNR_FLOOR))
                return value if torch.is_tensor(u) else value.item()

        inner = sum(weight * (width * x) ** (k - 1) / math.factorial(k - 1) * level(width * x) for x, weight in GAUSS_LEGENDRE)
        return scale * (width**k / math.factorial(k) * end - width * inner)

    def _relaxation(self, relax: Relax, i: int, s: Node, t: Node, step: StepStrategy) -> Scalar:
        """The factor on one derivative (section 3 of arXiv:2302.04867 for bh1 and bh2)."""
        if relax is None:
            return 1.0
        if relax == "half":
            return 0.5
        if is_zero(t.sigma):
            raise ValueError(f"steps[{i}] ends at sigma = 0, where h is infinite: relaxation {relax!r} depends on h")
        h = t.lam - s.lam
        if not isinstance(relax, str):
            return 1.0 + relax * h
        z = -h * self._rate(step, s, t) if step.pred == "x0" else h
        if relax == "diffusers-3m-sde":
            return 0.5 * (1.0 + 1.0 / (z * phi(3, z)))
        if relax in ("exp+", "exp-"):
            return 1.0 + (0.5 if relax == "exp+" else -0.5) * (exp(h) - 1.0)
        return 0.5 * (phi(1, z) if relax == "bh2" else 1.0) / phi(2, z)

    def _finite_step(self, i: int, s: Node, t: Node, step: StepStrategy) -> Scalar:
        for word, node in (("starts", s), ("ends", t)):
            if is_zero(node.alpha * node.sigma):
                where = "sigma = 0" if is_zero(node.sigma) else "alpha = 0"
                raise ValueError(f"steps[{i}] {word} at {where}, where h is infinite and pred {step.pred!r} is not defined")
        return t.lam - s.lam
