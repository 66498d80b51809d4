"""The report as a browser shows it: everything present, nothing wider than the window, nothing loaded, no error."""

import shutil

import pytest

from samplers.evaluation import FixedNfeRun, Model, load_extractor, load_pipeline, reference_features
from samplers.evaluation.fixed_nfe import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed (Debian: apt-get install chromium)"),
]
SAMPLERS = [
    "ddim",
    "diffusers:DPMSolverMultistepScheduler:algorithm_type=dpmsolver++,solver_order=2",
    "unipc:order=3,grid=karras",
]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out, extractor = tmp_path_factory.mktemp("run"), load_extractor()
    run = FixedNfeRun(
        out, [Model("digits", load_pipeline("digits"))], SAMPLERS, [2, 3, 4, 5, 6], extractor,
        reference_features("digits", extractor), num=24, batch_size=24,
    )  # fmt: skip
    run.sample()
    return write_report(out, run.score())


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("width", [1280, 400])
def test_report(report, browser, width):
    page = browser.new_page(viewport={"width": width, "height": 900})
    errors, requests = [], []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(report.as_uri())
    assert errors == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []

    sizes = page.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width, i.alt])")
    assert len(sizes) == 2 + 5 * 3  # a figure for each metric, a grid for each sampler and NFE
    assert all(complete and natural > 50 and shown > 50 and alt for complete, natural, shown, alt in sizes)

    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wide = page.evaluate(
        "w => [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > w + 1"
        " && !e.closest('.scroll')).map(e => e.tagName)",
        width,
    )
    assert wide == []
    assert page.locator("table").count() == 2
    cut = page.evaluate("[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1).length")
    assert cut == 0 or width < 1000  # a phone may scroll a table, a desktop shows all of it
    text = page.inner_text("body")
    assert all(sampler in text for sampler in SAMPLERS)
    assert "not FID" in text
    assert "Floor, real against real" in text
    page.close()
