"""What callers of discrete samplers and of their fitting may rely on."""

import json
from dataclasses import replace

import pytest
import torch

from distill import DiscreteTable, FitSettings, Teacher, fit_discrete_sampler, teacher_samples
from samplers.discrete import (
    DiscreteRun,
    MaskedProcess,
    SupportModel,
    TabularModel,
    UniformProcess,
    exact_law,
    random_chain,
    sample_discrete,
)

TINY = FitSettings(budget=28, samples=200, judged=400, teacher=Teacher(nfe=32, samples=600))


def _fit(**changes):
    # small fits may or may not hold up: what is tested here does not depend on it
    process = UniformProcess(4)
    chain = random_chain(process)
    arguments = {"seq_len": 10, "nfe": 3, "settings": TINY} | changes
    return fit_discrete_sampler(chain, process, **arguments)


@pytest.mark.parametrize(
    "name", ["theta_trapezoidal", "fixed_count", "confidence:noise=2", "first_hitting", "remdm", "tweedie"]
)
def test_given_tokens_stay(name, generator):
    process = MaskedProcess(4)
    prompt = torch.full((5, 8), -1)
    prompt[:, 2:4] = torch.tensor([3, 1])
    prompt[0] = 2  # nothing to do for this row
    x = sample_discrete(random_chain(process), process, (5, 8), 8, name, prompt=prompt, generator=generator())
    assert torch.equal(x[prompt >= 0], prompt[prompt >= 0])
    assert int(x.min()) >= 0
    assert int(x.max()) < 4


def test_prompts_hold_under_uniform_noise(generator):
    process = UniformProcess(4)
    prompt = torch.tensor([-1, 3, -1, -1, 0, -1])
    x = sample_discrete(random_chain(process), process, (50, 6), 4, prompt=prompt, generator=generator())
    assert (x[:, 1] == 3).all()
    assert (x[:, 4] == 0).all()
    assert len(torch.unique(x[:, 0])) > 1


@pytest.mark.parametrize("name", ["theta_trapezoidal", "first_hitting", "fixed_count", "euler"])
def test_select_moves_everything_a_run_remembers(name, generator):
    process = MaskedProcess(3)
    model, table = random_chain(process), DiscreteTable.plain("masked", name, 5)
    index = torch.tensor([2, 0, 0])
    runs = [DiscreteRun(table, process, process.prior((4, 5)), generator=generator(3)) for _ in range(2)]
    for run in runs:
        for _ in range(3):
            run.tell(model(run.x, run.query))
    whole, part = runs
    part.select(index)
    assert torch.equal(part.x, whole.x[index])
    assert torch.equal(part.frozen, whole.frozen[index])
    query = whole.query if whole.query.ndim == 0 else whole.query[index]
    assert torch.equal(part.query, query)
    while part.query is not None:
        part.tell(model(part.x, part.query))
    assert part.x.shape == (3, 5)
    assert int(part.x.max()) < 3


def test_same_seed_same_tokens(generator):
    process = UniformProcess(3)
    model = random_chain(process)
    draws = [sample_discrete(model, process, (20, 6), 4, generator=generator(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_half_precision_models_sample(generator):
    process = MaskedProcess(3)
    model = random_chain(process)
    x = sample_discrete(lambda x, t: model(x, t).bfloat16(), process, (20, 6), 4, generator=generator())
    assert int(x.max()) < 3


def test_tables_survive_json(tmp_path):
    table = DiscreteTable(
        "masked",
        "fixed_count",
        (1.0, 0.7, 0.2, 0.0),
        temp=(0.5, 1.1, 2.0),
        count=(1, 2.25, 3),
        remask=(0.1, 0.0, 0.0),
        provenance={"a": 1},
    )
    path = table.save(tmp_path / "sub" / "table.json")
    assert DiscreteTable.load(path) == table.load(json.loads(path.read_text()))
    assert DiscreteTable.load(path).to_dict() == table.to_dict()
    assert path.stat().st_size < 10_000
    with pytest.warns(UserWarning, match="fitted to model"):
        DiscreteTable.load(table.to_dict() | {"provenance": {"model_digest": "abc"}}, model_digest="def")
    with pytest.raises(FileNotFoundError, match="no discrete table"):
        DiscreteTable.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"times": (1.0, 0.5)}, "from 1 to 0"),
        ({"times": (1.0, 0.2, 0.5, 0.0)}, "decrease"),
        ({"temp": (1.0, 1.0)}, "one number per step, 3"),
        ({"rate": (1.0, 1.0, 1.0)}, "no rate knob"),
        ({"unmask": (0.1, 0.2, 0.9)}, "end with 1"),
        ({"remask": (0.1, 0.2, 0.9)}, "end with 0"),
        ({"unmask": (0.1, 1.2, 1.0)}, r"\[0, 1\]"),
        ({"transition": "jump"}, "known: euler"),
        ({"transition": "tweedie:theta=1"}, "no parameter 'theta'"),
        ({"process": "gaussian"}, "not on gaussian"),
        ({"what": 1}, "unknown keys"),
        ({"format": 9}, "format 1"),
    ],
)
def test_bad_tables_are_refused(change, message):
    good = {"process": "masked", "transition": "tweedie", "times": (1.0, 0.5, 0.25, 0.0)}
    DiscreteTable.from_dict(good)
    with pytest.raises(ValueError, match=message):
        DiscreteTable.from_dict(good | change)


def test_bad_calls_are_refused():
    with pytest.raises(ValueError, match=r"got DiscreteTable; of a table take \.to_dict\(\)"):
        DiscreteTable.from_dict(DiscreteTable.plain("masked", "fixed_count", 2))
    process = MaskedProcess(3)
    model = TabularModel(random_chain(process).law(3), process)
    table = DiscreteTable.plain("uniform", "euler", 3)
    with pytest.raises(ValueError, match="for the uniform process"):
        sample_discrete(model, process, (2, 3), table=table)
    with pytest.raises(ValueError, match="makes 3 network evaluations"):
        sample_discrete(model, UniformProcess(3), (2, 3), 4, table=table)
    with pytest.raises(ValueError, match="give nfe"):
        sample_discrete(model, process, (2, 3))
    with pytest.raises(ValueError, match="works on masked"):
        sample_discrete(model, UniformProcess(3), (2, 3), 3, "fixed_count")
    with pytest.raises(ValueError, match="cannot be enumerated"):
        exact_law(model, process, 12, 3)
    with pytest.raises(ValueError, match="expected probabilities of shape"):
        sample_discrete(lambda x, t: torch.ones(2, 3, 4), process, (2, 3), 3)
    with pytest.raises(ValueError, match="sums to"):
        TabularModel(torch.ones(3, 3), process)
    with pytest.raises(ValueError, match=r"whole number of at least 1, got 2\.5"):
        sample_discrete(model, process, (2, 3), 2.5)
    with pytest.raises(ValueError, match=r"sequences of 2 tokens: ids must be \(B, 2\), got \(4, 3\)"):
        sample_discrete(TabularModel(torch.full((3, 3), 1 / 9), process), process, (4, 3), 2)


@pytest.mark.parametrize("target", ["teacher", pytest.param("ids", marks=pytest.mark.slow)])
def test_fitting_from_samples_runs_from_the_model_alone(target):
    chain = random_chain(UniformProcess(4))
    generator = torch.Generator().manual_seed(0)
    given = "teacher" if target == "teacher" else chain.sample(900, 10, generator)
    settings = FitSettings(budget=84, samples=300, judged=1500, teacher=TINY.teacher, holdout=("4gram",))
    table = _fit(target=given, knobs=("t", "temp"), objective="ngram_kl", settings=settings)
    notes = table.provenance
    assert notes["target"] == ("teacher" if target == "teacher" else "data")
    assert notes["improves"]
    assert notes["scores"]["learned"]["objective"] < 0.7 * notes["scores"]["plain"]["objective"]
    assert set(notes["scores"]["learned"]) == {"objective", "4gram_kl", "entropy_gap"}
    assert table.nfe == 3


@pytest.mark.slow
def test_every_sample_objective_improves_its_own_kind_of_law():
    generator = torch.Generator().manual_seed(0)
    settings = FitSettings(budget=70, samples=300, judged=900, teacher=TINY.teacher, holdout=("2gram",))
    process = UniformProcess(4)
    points = torch.randint(4, (6, 8), generator=generator)
    model = SupportModel(points, process)
    ids = model.sample(900, generator)
    for objective in ("tv_support", "mmd", "auto"):
        table = fit_discrete_sampler(model, process, 8, 3, ("t", "temp"), objective, ids, settings=settings)
        scores = table.provenance["scores"]
        assert table.provenance["objective"] == ("tv_support" if objective == "auto" else objective)
        assert scores["learned"]["objective"] < 0.8 * scores["plain"]["objective"]
    with pytest.raises(ValueError, match="use ngram_kl or mmd"):
        _fit(objective="tv_support", target=random_chain(process).sample(900, 10, generator))


@pytest.mark.slow
def test_score_objectives_run_where_nothing_can_be_enumerated():
    with pytest.warns(UserWarning, match="no improvement"):
        table = _fit(objective="score_l2", settings=replace(TINY, relax=0.1))
    assert table.rate[1] < 0.95
    assert table.provenance["target"] == "teacher"


@pytest.mark.filterwarnings("ignore:no improvement")
def test_an_interrupted_search_continues_to_the_same_table(tmp_path):
    settings = FitSettings(budget=56, samples=100, judged=200, teacher=TINY.teacher, folder=tmp_path / "a")
    arguments = {"knobs": ("t", "temp"), "objective": "ngram_kl"}

    class Stop(Exception):
        pass

    def interrupt(stage, done, total, value):
        if stage.startswith("tweedie") and done == 2:
            raise Stop

    with pytest.raises(Stop):
        _fit(settings=settings, progress=interrupt, **arguments)
    (journal,) = (tmp_path / "a").glob("tweedie-*.json")
    assert len(json.loads(journal.read_text())["values"]) == 2
    calls = []
    resumed = _fit(settings=settings, progress=lambda *note: calls.append(note), **arguments)
    fresh = _fit(settings=FitSettings(budget=56, samples=100, judged=200, teacher=TINY.teacher), **arguments)
    assert resumed.times == fresh.times
    assert resumed.temp == fresh.temp
    journal.write_text(json.dumps({"head": {}, "values": []}))
    with pytest.raises(ValueError, match="another search"):
        _fit(settings=settings, **arguments)


def test_teacher_samples_are_kept(tmp_path):
    process = UniformProcess(3)
    chain, teacher = random_chain(process), Teacher(nfe=4, samples=700)
    calls = []

    def counted(x, t):
        calls.append(1)
        return chain(x, t)

    first = teacher_samples(counted, process, 6, teacher, folder=tmp_path)
    made = len(calls)
    again = teacher_samples(counted, process, 6, teacher, folder=tmp_path)
    assert torch.equal(first, again)
    assert len(calls) == made + 2  # the digest asks twice, nothing is drawn
    assert torch.equal(first, teacher_samples(chain, process, 6, teacher))
    assert len(first) == 700


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "fid"}, "known: auto"),
        ({"objective": "exact_kl"}, "too many"),
        ({"knobs": ("rate", "speed")}, "can learn"),
        ({"knobs": ("count",)}, "masked|can learn"),
        ({"knobs": ("rate", "rate")}, "twice"),
        ({"knobs": ("temp",), "base": "first_hitting"}, "not on uniform"),
        ({"target": torch.zeros(50, 7, dtype=torch.int64)}, r"\(n, 10\)"),
        ({"target": torch.full((50, 10), 9)}, r"0 \.\. 3"),
        ({"target": "data"}, "'teacher'"),
        ({"nfe": 0}, "at least 1"),
        ({"settings": FitSettings(holdout=("5word",))}, "known: <n>gram"),
    ],
)
def test_bad_fits_are_refused_before_any_compute(change, message):
    def never(x, t):
        raise AssertionError("the model was called")

    process = UniformProcess(4)
    arguments = {"seq_len": 10, "nfe": 3} | change
    with pytest.raises(ValueError, match=message):
        fit_discrete_sampler(never, process, **arguments)


@pytest.mark.filterwarnings("ignore:no improvement")
def test_a_journal_belongs_to_its_target(tmp_path, generator):
    settings = FitSettings(budget=14, samples=100, judged=200, folder=tmp_path)
    arguments = {"knobs": ("t", "temp"), "objective": "ngram_kl", "settings": settings}
    chain = random_chain(UniformProcess(4))
    _fit(target=chain.sample(300, 10, generator(0)), **arguments)
    with pytest.raises(ValueError, match="belongs to another search"):
        _fit(target=chain.sample(300, 10, generator(1)), **arguments)


@pytest.mark.filterwarnings("ignore:no improvement")
def test_when_no_family_holds_up_the_best_plain_sampler_is_returned(monkeypatch):
    monkeypatch.setattr("distill.fit.reasons_against", lambda *_: ["for this test"])
    law = random_chain(UniformProcess(3)).law(4)
    process = UniformProcess(3)
    table = fit_discrete_sampler(TabularModel(law, process), process, 4, 4, target=law, settings=FitSettings(budget=2))
    assert table.provenance["reasons"][-1] == "for this test"
    assert not table.learned
    assert table.transition == "tweedie"  # euler is the other family's, and worse


def test_a_table_must_beat_the_plain_samplers_of_every_family():
    # four reveals of three tokens: fixed counts are exact, and a learned Tweedie table beats nothing but plain Tweedie
    process = MaskedProcess(2)
    law = random_chain(process).law(3)
    with pytest.warns(UserWarning, match="no improvement over fixed_count"):
        table = fit_discrete_sampler(TabularModel(law, process), process, 3, 4, target=law, settings=FitSettings(budget=8))
    notes = table.provenance
    assert (table.transition, notes["plain"], notes["improves"]) == ("fixed_count", "fixed_count", False)
    assert notes["scores"]["plain"]["kl"] == pytest.approx(0.0, abs=1e-12)
    assert notes["scores"]["learned"]["kl"] > 1e-7


def test_the_ngram_objective_leaves_something_to_judge_by():
    from distill.judge import default_holdout
    from distill.statistics import objective_windows

    for vocab, length in ((3, 4), (3, 5), (6, 32), (65, 64), (4, 10), (2, 3)):
        judged = default_holdout("ngram_kl", vocab, length, 2000)
        assert judged
        assert not set(judged) & set(objective_windows(vocab, length)) or length <= 3
    assert objective_windows(6, 32) == ["3gram", "lag3", "lag5", "lag8"]
    assert default_holdout("ngram_kl", 65, 64, 2000) == ("lag4", "lag6")
