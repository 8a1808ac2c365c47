"""Does memory stay flat? `python tests/soak_player.py OUT.json MINUTES`: plays in a page of its
own, with keys, and writes down every half minute what program and page hold."""

import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import sync_playwright
from soak_world import megabytes
from test_browser import BROWSER, FLAGS, Face, served

from nfd_ref.storage import provenance, write_json

KEYS = ('KeyQ', 'KeyW', 'KeyE', 'KeyW', 'KeyA', 'KeyS', 'KeyD')
EVERY = 30      # seconds

def main(out, minutes):
    rows = []
    command = f'python tests/soak_player.py data/records/player_soak.json {minutes}'
    card = dict(command=command, **provenance())
    flags = [*FLAGS, '--enable-precise-memory-info', '--js-flags=--expose-gc']
    folder = Path(tempfile.mkdtemp())
    with sync_playwright() as playwright, served(folder) as (address, program):
        browser = playwright.chromium.launch(executable_path=BROWSER, args=flags)
        card |= dict(browser=f'Chromium {browser.version}, headless')
        page = browser.new_page()
        page.goto(address)
        face = Face(page)
        face.start()
        face.screen.click()
        started = time.time()
        while time.time() < started + 60 * minutes + 1:
            ends = time.time() + EVERY
            for i in range(10**6):
                if time.time() > ends: break
                face.hold(KEYS[i % len(KEYS)], seconds=.4)
            heap = page.evaluate('(gc(), performance.memory.usedJSHeapSize)') / 2**20
            stats = face.stats()
            rows.append(dict(
                seconds=round(time.time() - started),
                frame=stats['number'],
                painted=stats['painted'],
                program_mb=round(megabytes(program.pid), 1),
                page_heap_mb=round(heap, 2)))
            print(rows[-1], flush=True)
            write_json(out, dict(format=1, card=card, rows=rows))
        browser.close()

if __name__ == '__main__': main(sys.argv[1], int(sys.argv[2]))
