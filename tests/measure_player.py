"""How quick the player is in a real browser: `python tests/measure_player.py OUT.json`. In a page
of its own and in JupyterLab, at several rates, server and kernel on the same machine."""

import platform
import sys
import tempfile
from pathlib import Path

import torch
from playwright.sync_api import sync_playwright
from test_browser import BROWSER, FLAGS, NOTEBOOK, ROOT, Face, lab, measured, open_and_run, served
from test_browser import write_notebook

from nfd_ref.storage import provenance, write_json

RATES = (20, 60)        # frames a second that are asked for
SECONDS = 10                # of play for each

def at_rates(face):
    "What was measured at each rate."
    rows = []
    for rate in RATES:
        face.choose('rate', rate)
        rows.append(dict(asked=rate) | measured(face, SECONDS))
        print(rows[-1], flush=True)
    return rows

def in_a_page(browser, folder):
    with served(folder) as (address, _):
        page = browser.new_page()
        page.goto(address)
        rows = at_rates(Face(page))
        page.close()
        return rows

def in_jupyterlab(browser, folder):
    write_notebook(folder/'play.ipynb', NOTEBOOK.format(root=ROOT, out=folder/'played'))
    with lab(folder) as address:
        page = browser.new_page(viewport=dict(width=1280, height=900))
        rows = at_rates(open_and_run(page, address))
        page.close()
        return rows

def main(out):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        folders = [Path(tempfile.mkdtemp()) for _ in range(2)]
        page = in_a_page(browser, folders[0])
        notebook = in_jupyterlab(browser, folders[1])
        card = dict(
            command='python tests/measure_player.py data/records/player.json',
            world='data/distilled, 2 consistency steps, native',
            seconds=SECONDS,
            threads=torch.get_num_threads(),
            browser=f'Chromium {browser.version}, headless, no GPU',
            processor=platform.processor() or platform.machine(),
            **provenance())
        browser.close()
    write_json(out, dict(format=1, card=card, page=page, jupyterlab=notebook))

if __name__ == '__main__': main(sys.argv[1])
