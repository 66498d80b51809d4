"""A saved pipeline in another process: nothing but ``import samplers.schedulers`` before it is loaded."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from samplers.schedulers import SolverScheduler

PIPELINES = ["sd", "sdxl", "dit", "ddpm", "sd3", "flux"]
SCRIPT = """
import json
import sys
from pathlib import Path

import samplers.schedulers
import diffusers
import torch
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
diffusers.utils.logging.disable_progress_bar()
results = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    call = json.loads((folder / "call.json").read_text())
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(call["absent"]))
    pipe.set_progress_bar_config(disable=True)
    inputs = load_file(folder / "inputs.safetensors") if (folder / "inputs.safetensors").exists() else {}
    images = pipe(num_inference_steps=4, generator=torch.Generator().manual_seed(7), **inputs, **call["options"]).images
    results[folder.name] = torch.as_tensor(images).contiguous()
save_file(results, sys.argv[2])
"""


@pytest.mark.slow
def test_every_pipeline_reloads_in_a_fresh_process(build: Callable[[str], Any], tmp_path: Path) -> None:
    expected = {}
    for name in PIPELINES:
        tiny = build(name)
        tiny.pipe.scheduler = SolverScheduler.from_config(tiny.pipe.scheduler.config, schedule="dpmpp:order=2")
        expected[name] = tiny(4)
        folder = tmp_path / "pipelines" / name
        tiny.pipe.save_pretrained(folder)
        tensors = {key: value for key, value in tiny.inputs.items() if isinstance(value, Tensor)}
        if tensors:
            save_file(tensors, folder / "inputs.safetensors")
        options = {key: value for key, value in tiny.inputs.items() if key not in tensors}
        (folder / "call.json").write_text(json.dumps({"options": options, "absent": tiny.absent}))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "pipelines"), str(tmp_path / "results.safetensors")],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    results = load_file(tmp_path / "results.safetensors")
    assert sorted(results) == sorted(expected)
    for name, wanted in expected.items():
        torch.testing.assert_close(results[name], wanted, rtol=1e-5, atol=1e-6, msg=name)
