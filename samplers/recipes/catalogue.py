"""The list of recipes, with what others call them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..noise import NoiseSchedule
from ..strategy import StepStrategy
from .adams import deis, ipndm, lms, pndm, pndm_macro, sa_solver
from .dpm_v3 import dpm_v3
from .dpmpp import dpmpp
from .first_order import ddim, ddpm, euler, euler_ancestral, lcm, tcd, tcd_expand
from .midpoint import dpmpp_sde, dpmpp_sde_expand, kdpm2, kdpm2_expand, midpoint_per_step
from .restart import restart, restart_expand, restart_macro
from .singlestep import dpm, heun, two_per_step
from .unipc import unipc

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A named solver and the facts other parts ask for.

    Attributes:
        name: canonical name.
        steps: ``steps(TimeGrid, **options)`` gives the strategies.
        spacing: how in-tree schedulers of this kind place their steps: "inclusive" (DDIM, Euler), "exclusive" (DPM-Solver) or
            "distilled" (LCM, TCD).
        final: where the schedule ends when nobody says: "zero" or "sigma_min".
        honours: config keys for processing x0 that the in-tree class obeys.
        order: declared local order given the options, on the grid named by ``order_grid``; None for stochastic rules.
        order_grid: "any", or the only axis on which the order holds ("even-sigma").
        needs_statistics: whether schedules need the model's `samplers.statistics.EmpiricalStatistics`.
        nfe_per_step: network evaluations per step of the grid.
        macro: steps of the grid for an NFE, where that is not one each.
        expand: turns the grid's times into the schedule's, where a rule has times of its own in between.
        known_as: what others call it, by place: "diffusers", "k-diffusion", "ComfyUI", "A1111".
    """

    name: str
    steps: Callable[..., tuple[StepStrategy, ...]]
    spacing: str = "exclusive"
    final: str | None = None
    honours: tuple[str, ...] = ()
    order: Callable[[Options], int | None] = lambda options: int(options["order"])
    order_grid: str = "any"
    needs_statistics: bool = False
    nfe_per_step: int = 1
    macro: Callable[[NoiseSchedule, int, Options], int] = lambda noise, nfe, options: nfe
    expand: Callable[[NoiseSchedule, tuple[float, ...], int, Options], tuple[float, ...]] | None = None
    known_as: Mapping[str, str] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Callable[[str], Recipe], tuple[str]]:
        """Pickled by name, as schedulers between steps are."""
        return _recipe_named, (self.name,)

    @property
    def defaults(self) -> dict[str, Any]:
        """The options that recipe text may set, with their defaults."""
        parameters = inspect.signature(self.steps).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}

    @property
    def summary(self) -> str:
        """First line of the recipe's documentation."""
        return (inspect.getdoc(self.steps) or "").splitlines()[0]


def _recipe_named(name: str) -> Recipe:
    return RECIPES[name]


def _dpmpp_order(options: Options) -> int | None:
    halved = options["method"] == "multistep" and not options.get("taylor", False)
    return None if options["tau"] else min(int(options["order"]), 2 if halved else 3)


def _known(diffusers: str = "", k_diffusion: str = "", comfy: str = "", a1111: str = "") -> dict[str, str]:
    names = {"diffusers": diffusers, "k-diffusion": k_diffusion, "ComfyUI": comfy, "A1111": a1111}
    return {place: name for place, name in names.items() if name}


_BOTH = ("clip_sample", "thresholding")
RECIPES = {
    r.name: r
    for r in (
        Recipe(
            "ddim",
            ddim,
            "inclusive",
            honours=_BOTH,
            order=lambda o: None if o["eta"] else 1,
            known_as=_known("DDIMScheduler", "", "ddim", "DDIM"),
        ),
        Recipe(
            "euler",
            euler,
            "inclusive",
            order=lambda o: 1,
            known_as=_known("EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler", "sample_euler", "euler", "Euler"),
        ),
        Recipe(
            "euler_ancestral",
            euler_ancestral,
            "inclusive",
            order=lambda o: None if o["eta"] else 1,
            known_as=_known("EulerAncestralDiscreteScheduler", "sample_euler_ancestral", "euler_ancestral", "Euler a"),
        ),
        Recipe("ddpm", ddpm, "inclusive", honours=_BOTH, order=lambda o: None, known_as=_known("DDPMScheduler", "", "ddpm")),
        Recipe(
            "heun",
            heun,
            "inclusive",
            order=lambda o: 2,
            nfe_per_step=2,
            macro=two_per_step,
            known_as=_known("HeunDiscreteScheduler, FlowMatchHeunDiscreteScheduler", "sample_heun", "heun", "Heun"),
        ),
        Recipe(
            "kdpm2",
            kdpm2,
            "inclusive",
            order=lambda o: None if o["eta"] else 2,
            nfe_per_step=2,
            macro=midpoint_per_step,
            expand=kdpm2_expand,
            known_as=_known("KDPM2DiscreteScheduler, KDPM2AncestralDiscreteScheduler", "sample_dpm_2", "dpm_2", "DPM2"),
        ),
        Recipe(
            "dpmpp_sde",
            dpmpp_sde,
            "inclusive",
            order=lambda o: None,
            nfe_per_step=2,
            macro=midpoint_per_step,
            expand=dpmpp_sde_expand,
            known_as=_known("DPMSolverSDEScheduler", "sample_dpmpp_sde", "dpmpp_sde", "DPM++ SDE"),
        ),
        Recipe(
            "dpm",
            dpm,
            honours=("thresholding",),
            order=_dpmpp_order,
            known_as=_known("DPMSolverSinglestepScheduler (algorithm_type dpmsolver)"),
        ),
        Recipe(
            "dpmpp",
            dpmpp,
            honours=("thresholding",),
            order=_dpmpp_order,
            known_as=_known(
                "DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler", "sample_dpmpp_2m", "dpmpp_2m", "DPM++ 2M"
            ),
        ),
        Recipe(
            "dpm_v3",
            dpm_v3,
            final="sigma_min",
            honours=("thresholding",),
            order=lambda o: min(int(o["order"]), 2) if o["pseudo"] else int(o["order"]),
            needs_statistics=True,
        ),
        Recipe("unipc", unipc, honours=("thresholding",), known_as=_known("UniPCMultistepScheduler", "", "uni_pc", "UniPC")),
        Recipe("deis", deis, honours=("thresholding",), known_as=_known("DEISMultistepScheduler", "", "deis")),
        Recipe("ipndm", ipndm, "inclusive", order_grid="even-sigma", known_as=_known("IPNDMScheduler", "", "ipndm")),
        Recipe(
            "pndm",
            pndm,
            "inclusive",
            order_grid="even-sigma",
            macro=pndm_macro,
            known_as=_known("PNDMScheduler", "", "", "PLMS"),
        ),
        Recipe("lms", lms, "inclusive", known_as=_known("LMSDiscreteScheduler", "sample_lms", "lms", "LMS")),
        Recipe(
            "sa_solver",
            sa_solver,
            final="sigma_min",
            honours=("thresholding",),
            order=lambda o: None if o["tau"] else int(o["order"]),
            known_as=_known("SASolverScheduler", "", "sa_solver"),
        ),
        Recipe(
            "restart",
            restart,
            order=lambda o: None,
            macro=restart_macro,
            expand=restart_expand,
            known_as=_known(a1111="Restart"),
        ),
        Recipe("lcm", lcm, "distilled", honours=_BOTH, order=lambda o: None, known_as=_known("LCMScheduler", "", "lcm", "LCM")),
        Recipe(
            "tcd",
            tcd,
            "distilled",
            "sigma_min",
            _BOTH,
            order=lambda o: None,
            expand=tcd_expand,
            known_as=_known("TCDScheduler"),
        ),
    )
}
# Other people's names; compared without case, spaces and punctuation.
ALIASES: dict[str, str] = {
    "dpmpp_2m": "dpmpp:order=2",
    "dpmpp_3m": "dpmpp:order=3",
    "dpmpp_2s": "dpmpp:order=2,method=singlestep",
    "dpmpp_3s": "dpmpp:order=3,method=singlestep",
    "dpmpp_2m_sde": "dpmpp:order=2,tau=1",
    "dpmpp_3m_sde": "dpmpp:order=3,tau=1",
    "res_multistep": "dpmpp:order=2,solver_type=heun",
    "dpm_solver": "dpm:order=2",
    "dpm_solver_2": "dpm:order=2",
    "dpm_solver_3": "dpm:order=3",
    "dpm_solver_v3": "dpm_v3",
    "uni_pc": "unipc:order=3,variant=bh1",
    "uni_pc_bh2": "unipc:order=3,variant=bh2",
    "ipndm_v": "lms:order=4",
    "euler_a": "euler_ancestral",
    "dpm_2": "kdpm2",
    "dpm_2_ancestral": "kdpm2:eta=1",
    "dpm_2_a": "kdpm2:eta=1",
    "dpmpp_2s_ancestral": "kdpm2:pred=x0,eta=1",
    "dpmpp_2s_a": "kdpm2:pred=x0,eta=1",
    "plms": "pndm",
    "PNDMScheduler": "pndm",
    "sample_euler": "euler",
    "sample_euler_ancestral": "euler_ancestral",
    "sample_heun": "heun",
    "sample_dpm_2": "kdpm2",
    "sample_dpm_2_ancestral": "kdpm2:eta=1",
    "sample_dpmpp_2s_ancestral": "kdpm2:pred=x0,eta=1",
    "sample_dpmpp_sde": "dpmpp_sde",
    "sample_lms": "lms",
    "sample_dpmpp_2m": "dpmpp:order=2",
    "sample_dpmpp_2m_sde": "dpmpp:order=2,tau=1",
    "sample_dpmpp_3m_sde": "dpmpp:order=3,tau=1",
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "HeunDiscreteScheduler": "heun",
    "FlowMatchHeunDiscreteScheduler": "heun",
    "KDPM2DiscreteScheduler": "kdpm2",
    "KDPM2AncestralDiscreteScheduler": "kdpm2:eta=1",
    "DPMSolverSDEScheduler": "dpmpp_sde",
    "DPMSolverMultistepScheduler": "dpmpp:order=2",
    "DPMSolverSinglestepScheduler": "dpmpp:order=2,method=singlestep",
    "UniPCMultistepScheduler": "unipc:order=2",
    "DEISMultistepScheduler": "deis:order=2",
    "IPNDMScheduler": "ipndm",
    "LMSDiscreteScheduler": "lms",
    "SASolverScheduler": "sa_solver",
    "LCMScheduler": "lcm",
    "TCDScheduler": "tcd",
}
_GRID_SUFFIXES = ("karras", "exponential", "beta", "sgm_uniform")


def _plain(name: str) -> str:
    return "".join(c for c in name.lower().replace("++", "pp") if c.isalnum())


# Spelt as they are, ours win: "unipc" is our recipe, "uni_pc" ComfyUI's name for another order and variant of it.
_EXACT = {**ALIASES, **{name: name for name in RECIPES}}
_NAMES = {_plain(name): text for name, text in _EXACT.items()}


def canonical(text: str) -> str | None:
    """The recipe text that the name part of ``text`` stands for, in anybody's spelling; None when nobody's.

    "DPM++ 2M Karras", "dpmpp_2m_karras" and "dpmpp:order=2,grid=karras" are the same.
    """
    name = text.partition(":")[0].strip()
    if known := _lookup(name):
        return known
    for suffix in _GRID_SUFFIXES:
        exact, plain = name.removesuffix(f"_{suffix}"), _plain(name).removesuffix(_plain(suffix))
        known = (_lookup(exact) if exact != name else None) or (_NAMES.get(plain) if plain != _plain(name) else None)
        if known:
            return f"{known}{',' if ':' in known else ':'}grid={suffix}"
    return None


def _lookup(name: str) -> str | None:
    return _EXACT.get(name) or _NAMES.get(_plain(name))
