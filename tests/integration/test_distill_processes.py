"""Several processes share a fit: the table is the one a single process finds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys, warnings
from pathlib import Path
from accelerate import PartialState
from distill import FitSettings, KnobSpace, Teacher, fit_discrete_sampler
from samplers.discrete import UniformProcess, random_chain

warnings.simplefilter("ignore")
process, out = UniformProcess(4), Path(sys.argv[1])
settings = FitSettings(28, 100, 200, teacher=Teacher(nfe=8, samples=1100), folder=out)
table = fit_discrete_sampler(random_chain(process), process, 8, 3, ("t", "temp"), "ngram_kl", settings=settings)
numbers = table.temp or table.provenance["rejected"]["temp"]
state = PartialState()
(out / f"found-{state.process_index}.json").write_text(json.dumps([state.num_processes, list(numbers)]))
"""


@pytest.mark.slow
def test_two_processes_find_the_table_of_one(tmp_path):
    root = Path(__file__).parents[2]
    script = tmp_path / "fit.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    many = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for name, command in (("one", [sys.executable]), ("two", many)):
        (tmp_path / name).mkdir()
        subprocess.run([*command, script, tmp_path / name], env=environment, check=True, timeout=300, capture_output=True)
    (alone,) = [json.loads(path.read_text()) for path in (tmp_path / "one").glob("found-*.json")]
    shared = [json.loads(path.read_text()) for path in sorted((tmp_path / "two").glob("found-*.json"))]
    assert alone[0] == 1
    assert [count for count, _ in shared] == [2, 2]
    assert shared[0][1] == shared[1][1] == alone[1]
    (journal,) = (tmp_path / "two").glob("tweedie-*.json")
    assert len(json.loads(journal.read_text())["values"]) == 2
