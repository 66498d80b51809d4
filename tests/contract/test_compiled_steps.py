"""`SolverScheduler.step` under torch.compile: few graphs, no break, the same numbers."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor
from torch._dynamo.utils import counters

from samplers import Engine, NoiseSchedule, Tableau, recipe
from samplers.schedulers import SolverScheduler

VP = DPMSolverMultistepScheduler()
NFE = 10


def network(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x) * 0.8 + 0.001 * t.to(x)


def run(scheduler: SolverScheduler, x: Tensor, step: Callable[..., tuple[Tensor, ...]]) -> Tensor:
    scheduler.set_timesteps(NFE)
    scheduler.set_begin_index(0)
    for t in scheduler.timesteps:
        x = step(network(x, t), t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize(
    ("theirs", "text"),
    [
        pytest.param(VP, "ddim", marks=pytest.mark.slow),
        (VP, "dpmpp:order=2"),
        pytest.param(VP, "dpmpp:order=3", marks=pytest.mark.slow),
        (VP, "unipc:order=3"),
        pytest.param(VP, "deis:order=3", marks=pytest.mark.slow),
        pytest.param(VP, "ipndm", marks=pytest.mark.slow),
        pytest.param(VP, "heun", marks=pytest.mark.slow),
        pytest.param(VP, "dpm:order=3", marks=pytest.mark.slow),
        pytest.param(EDMEulerScheduler(), "dpmpp:order=2", marks=pytest.mark.slow),
        pytest.param(FlowMatchEulerDiscreteScheduler(), "unipc:order=2", marks=pytest.mark.slow),
    ],
)
def test_one_graph_per_row_width(theirs: SchedulerMixin, text: str) -> None:
    scheduler = SolverScheduler.from_config(theirs.config, schedule=text)
    x = torch.randn(2, 3, 4, 4)
    expected = run(scheduler, x, scheduler.step)
    assert scheduler.tableau is not None
    widths = {len(row.terms) for stage in scheduler.tableau.stages for row in stage.rows}
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    counters.clear()
    got = run(scheduler, x, torch.compile(scheduler.step, backend=backend, fullgraph=True))
    assert graphs <= len(widths)
    assert not counters["graph_break"]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["plain", "uniform"])
def test_a_long_run_in_the_middle_is_copied_and_pickled(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = NoiseSchedule.vp_linear()
    if form == "uniform":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    engine = Engine(Tableau.build(recipe("unipc:order=3", noise, 600), noise), torch.randn(2, 3, dtype=torch.float64))
    for _ in range(7):
        engine.tell(torch.tanh(engine.x))
    for other in (copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        assert other.position == 7
        assert other.memory.keys() == engine.memory.keys()
        answer = torch.cos(engine.x)
        twin = copy.deepcopy(engine)
        other.tell(answer)
        twin.tell(answer)
        assert torch.equal(other.x, twin.x)


@pytest.mark.parametrize("text", ["dpmpp:order=3", "unipc:order=3", "deis:order=4", "heun", "dpm:order=3", "ddim:clip=0.5"])
def test_both_forms_of_a_tableau_agree(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = NoiseSchedule.vp_linear()
    tableau = Tableau.build(recipe(text, noise, 9), noise)
    x = torch.randn(3, 2, dtype=torch.float64)
    plain = Engine(tableau, x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    uniform = Engine(tableau, x)
    while plain.query is not None:
        assert uniform.query is plain.query
        torch.testing.assert_close(uniform.x, plain.x, rtol=1e-12, atol=1e-13)
        assert plain.memory.keys() == uniform.memory.keys()
        for engine in (plain, uniform):
            engine.tell(torch.sin(2 * engine.x))
    assert uniform.query is None
    torch.testing.assert_close(uniform.x, plain.x, rtol=1e-12, atol=1e-13)
