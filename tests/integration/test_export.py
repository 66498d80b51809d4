"""A pipeline exported from ours loads where fewstep is not installed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DPMSolverMultistepScheduler

from samplers.evaluation import load_pipeline
from samplers.schedulers import SolverScheduler, export

SCHEDULE = "unipc:order=3,grid=lambda"


def ours() -> DDPMPipeline:
    pipe = load_pipeline("digits")
    pipe.scheduler = SolverScheduler.from_config(pipe.scheduler.config, schedule=SCHEDULE)
    return pipe


def test_the_folder_names_only_diffusers_and_keeps_ours_beside_it(tmp_path: Path) -> None:
    pipe = ours()
    folder = export(pipe, tmp_path / "exported")
    assert isinstance(pipe.scheduler, SolverScheduler)
    assert json.loads((folder / "model_index.json").read_text())["scheduler"] == ["diffusers", "DPMSolverMultistepScheduler"]
    again = DDPMPipeline.from_pretrained(folder)
    assert again.scheduler.config.beta_end == pipe.scheduler.config.beta_end
    assert isinstance(DPMSolverMultistepScheduler.from_pretrained(folder, subfolder="scheduler"), DPMSolverMultistepScheduler)
    mine = SolverScheduler.from_pretrained(folder, subfolder="fewstep_scheduler")
    again.scheduler = mine
    again.set_progress_bar_config(disable=True)
    images = [
        p(generator=torch.Generator().manual_seed(1), num_inference_steps=4, output_type="np").images for p in (pipe, again)
    ]
    assert abs(images[0] - images[1]).max() < 1e-6


@pytest.mark.slow
def test_another_process_loads_it_without_fewstep(tmp_path: Path) -> None:
    folder = export(ours(), tmp_path / "exported")
    code = (
        "import sys; sys.modules['samplers'] = None\n"
        "from diffusers import DDPMPipeline\n"
        f"pipe = DDPMPipeline.from_pretrained({str(folder)!r})\n"
        "print(type(pipe.scheduler).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "DPMSolverMultistepScheduler"


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    pipe = load_pipeline("digits")
    with pytest.raises(ValueError, match="this one has DDPMScheduler: use save_pretrained"):
        export(pipe, tmp_path / "exported")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; export writes a folder"):
        export(ours(), tmp_path / "file")
    assert not (tmp_path / "exported").exists()
