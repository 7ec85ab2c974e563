"""Open the notebooks as a reader does: in JupyterLab with its token, in Chromium, which moves the slider.

browser_check.py FOLDER writes a screenshot of each notebook there; exit status 0 means that no cell failed
and that the slider changed the picture. Needs playwright and an installed Chromium or Chrome, whose path
CHROMIUM may give.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
from playwright.sync_api import Page, sync_playwright

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
SHORT = {"epochs": 2, "milestones": [1], "batch_size": 256, "seed": 7}  # parameters of 01_cifar10
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # cells out of sight are on the page, too
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
MINUTES = 60_000  # in the milliseconds that playwright counts


def chromium() -> str | None:
    """Return the path of an installed Chromium or Chrome, or None."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


@contextmanager
def jupyterlab(folder: Path) -> Iterator[tuple[str, str]]:
    """Serve a folder on loopback; yield the address and the token, without which it answers nothing."""
    place, token = folder / ".jupyter", secrets.token_urlsafe()
    for name, setting in SETTINGS.items():
        file = place / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(setting))
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1"]
    command.append(f"--ServerApp.root_dir={folder}")
    if os.name == "posix" and os.geteuid() == 0:
        command.append("--allow-root")
    environment = {
        **os.environ,
        "JUPYTER_TOKEN": token,
        "JUPYTER_RUNTIME_DIR": str(place),
        "JUPYTER_CONFIG_DIR": str(place),
        "JUPYTER_DATA_DIR": str(place),
        "JUPYTERLAB_SETTINGS_DIR": str(place / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(place),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(NOTEBOOKS.parent), os.environ.get("PYTHONPATH")])),
    }
    with open(place / "log", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        while not (files := list(place.glob("jpserver-*.json"))) or not files[0].stat().st_size:
            if server.poll() is not None:
                raise SystemExit(f"JupyterLab did not start: {(place / 'log').read_text()[-2000:]}")
            time.sleep(0.1)
        where = json.loads(files[0].read_text())
        if where["hostname"] != "127.0.0.1":
            raise SystemExit(f"JupyterLab listens on {where['hostname']}, not on loopback alone")
        if _status(f"{where['url']}api/contents") != 403:
            raise SystemExit("JupyterLab answers without its token")
        yield where["url"], token
    finally:
        server.terminate()
        server.wait()


def _status(url: str) -> int:
    """Return the status of a page, once its server answers."""
    for _ in range(600):
        try:
            return urllib.request.urlopen(url).status
        except urllib.error.HTTPError as error:
            return error.code
        except urllib.error.URLError:  # the file that names the address is there before the server is
            time.sleep(0.1)
    raise SystemExit(f"nothing answers at {url}")


def run_all_cells(page: Page, url: str, token: str, notebook: Path) -> None:
    """Open a notebook, run all cells, and raise where one has failed."""
    page.goto(f"{url}lab/tree/{notebook.name}?token={token}&reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=2 * MINUTES)
    kernels = f"(await (await fetch('{url}api/kernels')).json())"
    idle = f"{kernels}.every(kernel => kernel.execution_state === 'idle' && kernel.connections)"
    ready = f"async () => document.querySelector('[data-status=idle]') && {idle}"
    page.wait_for_function(ready, timeout=2 * MINUTES)
    page.wait_for_timeout(3000)  # the menu is there before it acts on the notebook
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.wait_for_timeout(1000)
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_timeout(1000)
    if page.locator("dialog.jp-Dialog").count():
        raise SystemExit(f"JupyterLab asks: {page.locator('dialog.jp-Dialog').inner_text()}")
    found = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')]"
    prompts = f"{found}.map(prompt => prompt.innerText.trim())"
    stream = ".jp-CodeCell [data-mime-type='application/vnd.jupyter"  # a traceback is in red, on stderr
    error = page.locator(f"{stream}.stderr']:has(.ansi-red-fg), {stream}.error']")
    number = re.compile(r"\[\d+\]:")
    while not error.count() and not all(number.fullmatch(prompt) for prompt in page.evaluate(prompts)):
        page.wait_for_timeout(200)
    if error.count():
        raise SystemExit(f"a cell of {notebook.name} failed: {error.first.inner_text()[-500:]}")
    seen = page.evaluate(prompts)
    if seen != [f"[{i + 1}]:" for i in range(len(seen))]:
        raise SystemExit(f"{notebook.name} did not run to its end, in order: {seen}")
    print(f"{notebook.name}: {len(seen)} cells, none failed")


def move_slider(page: Page) -> None:
    """Move the slider, then switch energy transfer; raise if text or picture stay as they were."""
    look = """() => {
        const view = document.querySelector('.widget-vbox .widget-html-content');
        return [view.innerText, view.querySelector('svg').outerHTML];
    }"""
    handle, box = page.locator(".widget-vbox .noUi-handle"), page.locator(".widget-vbox input[type=checkbox]")
    handle.scroll_into_view_if_needed()
    for name, act in {"slider": lambda: handle.press("ArrowRight"), "energy transfer": box.click}.items():
        before = page.evaluate(look)
        act()
        page.wait_for_function(f"before => ({look})()[0] !== before", arg=before[0], timeout=MINUTES)
        after = page.evaluate(look)
        if after[1] == before[1]:
            raise SystemExit(f"{name}: the text changed and the picture stayed as it was")
        print(f"{name}: {before[0][:45]!r} became {after[0][:45]!r}, and the picture another one")


def main(folder: Path) -> None:
    """Check both notebooks; leave them and their screenshots in a folder."""
    path = chromium()
    if path is None:
        raise SystemExit("no Chromium or Chrome found; install one, or set CHROMIUM to its path")
    folder.mkdir(parents=True, exist_ok=True)
    method = nbformat.read(NOTEBOOKS / "00_method.ipynb", as_version=4)
    for cell in method.cells:
        if cell.cell_type == "code":
            cell.execution_count, cell.outputs = None, []
    nbformat.write(method, folder / "00_method.ipynb")
    parameters = [text for name, value in SHORT.items() for text in ("-y", f"{name}: {value}")]
    papermill = [sys.executable, "-m", "papermill", "--prepare-only"]
    notebooks = [NOTEBOOKS / "01_cifar10.ipynb", folder / "01_cifar10.ipynb"]
    subprocess.run([*papermill, *notebooks, *parameters], check=True, capture_output=True)
    with jupyterlab(folder) as (url, token), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        page = browser.new_page(viewport={"width": 1400, "height": 1200})
        try:
            run_all_cells(page, url, token, folder / "00_method.ipynb")
            move_slider(page)
            page.screenshot(path=folder / "00_method.png")
            run_all_cells(page, url, token, folder / "01_cifar10.ipynb")
        finally:
            page.screenshot(path=folder / "last.png")  # of 01_cifar10, or of where it failed
            browser.close()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]).absolute())
