"""Open the notebooks as a reader does: in JupyterLab with its token, in Chromium, which moves the slider.

browser_check.py FOLDER [NAME…] runs all cells of the notebooks of these names, as 00_method, or of every one,
and writes a screenshot of each to the folder. Those that train do so briefly. Exit status 0 means that no
cell failed, that no table is cut off, and that the slider changed the picture. Needs playwright and an
installed Chromium or Chrome, whose path CHROMIUM may give.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
from playwright.sync_api import Page, sync_playwright

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
SHORT = {  # parameters of the notebooks that train
    "01_cifar10": {"epochs": 2, "milestones": [1], "batch_size": 256, "seed": 7},
    "02_imagenet": {"epochs": 2, "milestones": [1], "seed": 7},
}
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # cells out of sight are on the page, too
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
WIDTH = 1400  # pixels of the window, of which a notebook has some 1000
LONGEST = 1200  # seconds that a notebook may run


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
        "LRPET_FIGURES": os.environ.get("LRPET_FIGURES", str(folder / "figures")),
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
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:  # it waits for a kernel that does not end
            server.kill()
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


def ask(url: str, token: str, method: str = "GET") -> list | None:
    """Ask JupyterLab's server with the token; return what it answers."""
    request = urllib.request.Request(url, headers={"Authorization": f"token {token}"}, method=method)
    with urllib.request.urlopen(request) as answer:
        return json.loads(answer.read() or "null")


def within(seconds: float, happened: Callable[[], object]) -> bool:
    """Wait until something has happened; tell whether it has in time."""
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def run_all_cells(page: Page, url: str, token: str, notebook: Path) -> None:
    """Open a notebook, run all cells, and raise where one has failed."""
    page.goto(f"{url}lab/tree/{notebook.name}?token={token}&reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=120_000)

    def ready() -> bool:
        try:
            kernels = ask(f"{url}api/kernels", token)
        except urllib.error.HTTPError:  # while the last notebook's kernel ends
            return False
        idle = [kernel["execution_state"] == "idle" and kernel["connections"] for kernel in kernels]
        return bool(kernels) and all(idle) and page.locator("[data-status=idle]").count() > 0

    if not within(120, ready):
        raise SystemExit(f"{notebook.name}: the kernel is not ready")

    def prompts() -> list[str]:
        return [text.strip() for text in page.locator(".jp-CodeCell .jp-InputPrompt").all_inner_texts()]

    for _ in range(6):  # the menu is there before it acts on the notebook
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        if page.locator("dialog.jp-Dialog").count():
            raise SystemExit(f"JupyterLab asks: {page.locator('dialog.jp-Dialog').inner_text()}")
        if within(10, lambda: set(prompts()) != {"[ ]:"}):
            break
    stream = ".jp-CodeCell [data-mime-type='application/vnd.jupyter"  # a traceback is in red, on stderr
    error = page.locator(f"{stream}.stderr']:has(.ansi-red-fg), {stream}.error']")
    through = within(LONGEST, lambda: error.count() or all(re.fullmatch(r"\[\d+\]:", p) for p in prompts()))
    if error.count():
        raise SystemExit(f"a cell of {notebook.name} failed: {error.first.inner_text()[-500:]}")
    seen = prompts()
    if not through or seen != [f"[{i + 1}]:" for i in range(len(seen))]:
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
        within(60, lambda before=before: page.evaluate(look)[0] != before[0])
        after = page.evaluate(look)
        if after[0] == before[0] or after[1] == before[1]:
            raise SystemExit(f"{name}: the text or the picture stayed as it was")
        print(f"{name}: {before[0][:45]!r} became {after[0][:45]!r}, and the picture another one")


def refuse_what_is_cut_off(page: Page, name: str) -> None:
    """Raise where a table or a picture is wider than its place on the page."""
    wide = """[...document.querySelectorAll('.jp-OutputArea-output')]
        .filter(output => output.scrollWidth > output.clientWidth + 1).map(output => output.innerText)"""
    if found := page.evaluate(wide):
        raise SystemExit(f"{name}: cut off at {WIDTH} pixels: {found[0][:200]!r}")


def prepare(name: str, folder: Path) -> Path:
    """Copy a notebook into the folder, without outputs and with the parameters of a brief run."""
    path = folder / f"{name}.ipynb"
    parameters = [text for key, value in SHORT.get(name, {}).items() for text in ("-y", f"{key}: {value}")]
    papermill = [sys.executable, "-m", "papermill", "--prepare-only", *parameters]
    subprocess.run([*papermill, NOTEBOOKS / path.name, path], check=True, capture_output=True)
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.execution_count, cell.outputs = None, []
    nbformat.write(notebook, path)
    return path


def main(folder: Path, names: list[str]) -> None:
    """Check notebooks; leave them and their screenshots in a folder."""
    path = chromium()
    if path is None:
        raise SystemExit("no Chromium or Chrome found; install one, or set CHROMIUM to its path")
    folder.mkdir(parents=True, exist_ok=True)
    notebooks = [prepare(name, folder) for name in names]
    with jupyterlab(folder) as (url, token), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        page = browser.new_page(viewport={"width": WIDTH, "height": 1200})
        try:
            for notebook in notebooks:
                run_all_cells(page, url, token, notebook)
                refuse_what_is_cut_off(page, notebook.name)
                if notebook.stem == "00_method":
                    move_slider(page)
                page.screenshot(path=notebook.with_suffix(".png"))
                for kernel in ask(f"{url}api/kernels", token):
                    ask(f"{url}api/kernels/{kernel['id']}", token, "DELETE")
        finally:
            page.screenshot(path=folder / "last.png")  # of the last notebook, or of where it failed
            browser.close()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    every = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    main(Path(sys.argv[1]).absolute(), sys.argv[2:] or every)
