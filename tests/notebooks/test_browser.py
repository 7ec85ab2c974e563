"""The notebooks in a real browser, where one is installed; scripts/browser_check.py says what it looks at."""

import importlib.util
import subprocess
import sys

import pytest

from lrpet.paths import PROJECT

pytest.importorskip(
    "playwright", reason="playwright is not installed: pip install playwright", exc_type=ImportError
)
SCRIPT = PROJECT / "scripts" / "browser_check.py"
specification = importlib.util.spec_from_file_location("browser_check", SCRIPT)
browser_check = importlib.util.module_from_spec(specification)
specification.loader.exec_module(browser_check)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser_check.chromium() is None, reason="no Chromium or Chrome is installed"),
]


def test_notebooks_run_and_the_slider_moves_the_picture(tmp_path):
    names = ["00_method", "01_cifar10", "08_tables"]  # the script by itself takes all, and minutes
    command = [sys.executable, SCRIPT, tmp_path, *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "00_method.ipynb: 12 cells, none failed" in done.stdout
    for words in (
        "slider: 'R = 27 of 64",
        "became 'R = 28 of 64",
        "energy transfer: 'R = 28 of 64 · energy 100.0 %",
    ):
        assert words in done.stdout
    for name in names:
        assert f"{name}.ipynb: " in done.stdout
        assert (tmp_path / f"{name}.png").stat().st_size > 50_000


def test_a_cell_that_fails_is_seen(tmp_path):
    """The check on a notebook of two cells, of which the second raises."""
    import nbformat
    from playwright.sync_api import sync_playwright

    cells = [nbformat.v4.new_code_cell(source) for source in ("1 + 1", "1 / 0")]
    kernel = {"name": "python3", "display_name": "", "language": "python"}
    nbformat.write(
        nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), tmp_path / "wrong.ipynb"
    )
    with browser_check.jupyterlab(tmp_path) as (url, token), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_check.chromium())
        with pytest.raises(SystemExit, match=r"(?s)a cell of wrong\.ipynb failed: .*ZeroDivisionError"):
            browser_check.run_all_cells(browser.new_page(), url, token, tmp_path / "wrong.ipynb")
        browser.close()
