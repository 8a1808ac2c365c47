"""The player as a person meets it: a headless Chromium, real keys, pictures counted in the page.
In a page of its own (`nfd-ref play --browser`) and in a JupyterLab that the tests start."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from nfd_ref.session import replay
from own_jupyter import TOKEN, free_port, own_folders, wait_for

ROOT = Path(__file__).parents[1]
BROWSERS = ('chromium', 'chromium-browser', 'google-chrome')
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
FLAGS = [
    '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
    '--disable-background-networking', '--disable-component-update', '--disable-sync']
PATIENCE = 120_000      # ms: other programs may have the machine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not find_spec('playwright'), reason='needs Playwright (pip)'),
    pytest.mark.skipif(not BROWSER, reason=f'needs a browser: {", ".join(BROWSERS)}')]

# ---- a page with a player in it

@pytest.fixture(scope='module')
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield started
        started.close()

class Face:
    "The player in a page: what a person sees and does, and what the page counted."
    def __init__(self, page, number=-1):
        self.page = page
        self.root = page.locator('.nfd-player').nth(number)     # -1: the last
        self.screen = self.root.locator('.nfd-screen')
        page.set_default_timeout(PATIENCE)
        self.root.locator('.nfd-setting').first.wait_for()

    def press(self, what): self.root.locator(f'.nfd-{what}').click()

    def said(self): return self.root.locator('.nfd-said').inner_text()

    def stats(self): return self.root.evaluate('root => root.player.stats')

    def has_own_wire(self):
        return self.root.evaluate('root => root.player.transport.address !== undefined')

    def playing(self): return self.root.get_attribute('data-playing') == 'true'

    def pixels(self):
        "uint8 [height, width, 3], as they stand in the canvas."
        size, data = self.screen.evaluate('''canvas => [[canvas.height, canvas.width], Array.from(
            canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data)]''')
        return np.array(data, np.uint8).reshape(*size, 4)[..., :3]

    def until(self, true, limit=PATIENCE / 1000):
        "Wait for something, and fail with what the player says."
        from playwright.sync_api import Error
        def now():
            try:
                return true()
            except Error:       # the page is being loaded, or drawn anew
                return False

        ends = time.time() + limit
        while not now() and time.time() < ends: self.page.wait_for_timeout(50)
        assert now(), (self.said(), self.stats())

    def start(self):
        if not self.playing(): self.press('play')
        self.until(self.playing)

    def pause(self):
        if self.playing(): self.press('play')
        self.until(lambda: not self.playing())

    def choose(self, name, value):
        field = self.root.locator(f'[name="{name}"]')
        if isinstance(value, bool): field.set_checked(value)
        elif field.evaluate('input => input.tagName') == 'SELECT': field.select_option(value)
        else:
            field.fill(str(value))
            field.press('Enter')

    def hold(self, *keys, seconds):
        for key in keys: self.page.keyboard.down(key)
        self.page.wait_for_timeout(1000 * seconds)
        held = self.stats()['label']
        for key in keys: self.page.keyboard.up(key)
        return held

def play_through(face, folder):
    "What a person tries, one thing after the other. Films are in `folder`."
    face.until(lambda: face.pixels().any())                             # an empty canvas is black
    first = face.pixels()
    face.start()
    face.screen.click()
    assert face.hold('KeyQ', seconds=5) == 'turn left'
    assert np.abs(face.pixels().astype(int) - first).mean() > 3         # the picture has changed
    face.until(lambda: face.stats()['label'] == 'noop')                 # and the key was let go
    assert face.hold('KeyW', 'ArrowRight', seconds=1.5) == 'forward+turn right'

    face.page.keyboard.down('KeyW')
    face.until(lambda: face.stats()['label'] == 'forward')
    face.root.locator('[name="seed"]').focus()                          # the keys go elsewhere
    face.until(lambda: face.stats()['label'] == 'noop')
    face.page.keyboard.up('KeyW')

    face.pause()
    number = face.stats()['number']
    face.press('step')
    face.until(lambda: face.stats()['number'] == number + 1)

    face.choose('steps', 1)
    face.until(lambda: face.stats()['number'] == 0)
    assert not face.playing()
    face.choose('lens latents', True)
    face.choose('lens path', True)
    face.until(lambda: face.root.locator('.nfd-start.nfd-lit').count() == 1)
    face.choose('steps', 2)
    face.page.wait_for_timeout(500)

    face.start()
    face.screen.click()
    face.hold('KeyW', seconds=2)
    face.until(lambda: face.root.locator('.nfd-panel').count() == 2)
    face.pause()
    face.press('save')
    face.until(lambda: 'kept' in face.said())
    seen = face.pixels()
    newest = sorted(folder.glob('walk-*.json'))[-1]
    with face.page.expect_download() as download:
        face.root.locator('.nfd-said a', has_text='GIF').click()
    gif = newest.with_suffix('.gif')
    assert download.value.suggested_filename == gif.name
    assert Path(download.value.path()).read_bytes() == gif.read_bytes()
    film = replay(newest)
    assert film.same
    assert len(film.frames) == face.stats()['number']
    np.testing.assert_array_equal(film.frames[-1], seen)                # what the eye saw last

    face.press('reset')
    face.until(lambda: face.stats()['number'] == 0)
    np.testing.assert_array_equal(face.pixels(), first)

def measured(face, seconds=10):
    "Frames painted and made a second, counted in the page; milliseconds from key to picture."
    face.press('reset')
    face.start()
    face.screen.click()
    face.page.wait_for_timeout(2000)
    before = face.stats()
    started = time.perf_counter()
    ends = started + seconds
    pressed = 0
    while time.perf_counter() < ends:
        key = ('KeyQ', 'KeyE', 'KeyW')[pressed % 3]
        face.page.keyboard.down(key)
        face.page.wait_for_timeout(137)
        face.page.keyboard.up(key)
        face.page.wait_for_timeout(93)
        pressed += 1
    after = face.stats()
    span = time.perf_counter() - started
    face.pause()
    latencies = np.array(after['latencies'][-2 * pressed + 2:])
    return dict(
        painted=(after['painted'] - before['painted']) / span,
        made=(after['number'] - before['number']) / span,
        ms_median=float(np.median(latencies)),
        ms_p95=float(np.percentile(latencies, 95)),
        keys=2 * pressed)

# ---- in a page of its own

@contextmanager
def served(folder, *more):
    "`nfd-ref play --browser`; gives the address of its page."
    command = [sys.executable, '-m', 'nfd_ref.cli', 'play', '--browser', '--out', folder/'a.mp4']
    environment = {k: v for k, v in os.environ.items() if k not in ('DISPLAY', 'WAYLAND_DISPLAY')}
    program = subprocess.Popen([*map(str, command), *more], cwd=ROOT, text=True, env=environment,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        line = program.stdout.readline().strip()
        assert re.fullmatch(r'http://127\.0\.0\.1:\d+/[\w-]{20,}/', line), program.stderr.read()
        yield line, program
    finally:
        if program.poll() is None: program.kill()
        program.wait()

def test_a_page_of_its_own(browser, tmp_path):
    "Everything that one can do; reload; two tabs; the end of the program is said; Ctrl-C ends it."
    with served(tmp_path) as (address, program):
        page = browser.new_page()
        page.goto(address)
        face = Face(page)
        play_through(face, tmp_path/'played')

        face.start()
        page.reload()
        again = Face(page)
        again.until(lambda: again.playing() and again.stats()['painted'] > 5)
        other = browser.new_page()
        other.goto(address)
        second = Face(other)
        second.until(lambda: second.stats()['painted'] > 5)
        other.close()

        page.bring_to_front()
        again.until(lambda: again.stats()['painted'] > 20)
        again.screen.click()
        assert again.hold('KeyW', seconds=1.5) == 'forward'
        picture = os.environ.get('NFD_SCREENSHOTS')
        if picture: page.screenshot(path=Path(picture)/'page.png')

        program.send_signal(signal.SIGINT)
        assert program.wait(30) == 0
        again.until(lambda: again.said().startswith('stopped'))
        page.close()

def test_nobody_else_plays(tmp_path):
    "Another token, another host: not here."
    with served(tmp_path) as (address, _):
        base = address.rsplit('/', 2)[0]
        for url, host in ((f'{base}/guess/', None), (address, 'evil.example')):
            request = urllib.request.Request(url, headers={'Host': host} if host else {})
            with pytest.raises(urllib.error.HTTPError, match='404'):
                urllib.request.urlopen(request, timeout=30)

def test_touch(browser, tmp_path):
    "On-screen buttons, by finger: held as long as the finger is down."
    with served(tmp_path) as (address, _):
        context = browser.new_context(has_touch=True, viewport=dict(width=412, height=900))
        page = context.new_page()
        page.goto(address)
        face = Face(page)
        face.start()
        button = face.root.locator('.nfd-key[data-code="KeyQ"]')
        button.dispatch_event('pointerdown')
        face.until(lambda: face.stats()['label'] == 'turn left')
        button.dispatch_event('pointerup')
        face.until(lambda: face.stats()['label'] == 'noop')
        picture = os.environ.get('NFD_SCREENSHOTS')
        if picture: page.screenshot(path=Path(picture)/'touch.png')
        context.close()

# ---- in JupyterLab

NOTEBOOK = '''
from nfd_ref.player import Player
from nfd_ref.session import Start
player = Player(['{root}/data/distilled', '{root}/data/world'], '{root}/data/my_way_home',
                Start('{root}/data/my_way_home', 'ep_00023', 150, 214), out='{out}')
player
'''

@contextmanager
def lab(folder):
    "A JupyterLab server in a folder; gives its address."
    port = free_port()
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ip=127.0.0.1',
               f'--port={port}', '--ServerApp.port_retries=0', f'--IdentityProvider.token={TOKEN}',
               '--LabApp.news_url=None', '--LabApp.check_for_updates_class='
               'jupyterlab.NeverCheckForUpdate', f'--ServerApp.root_dir={folder}']
    with open(folder/'lab.log', 'w') as log:
        server = subprocess.Popen(command, env=os.environ | own_folders(folder), stdout=log,
                                  stderr=log)
        try:
            wait_for(port, server, folder/'lab.log', PATIENCE / 1000)
            yield f'http://127.0.0.1:{port}/lab'
        finally:
            server.send_signal(signal.SIGINT)
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()

def write_notebook(path, *sources):
    cells = [dict(cell_type='code', execution_count=None, id=f'cell-{i}', metadata={}, outputs=[],
                  source=source) for i, source in enumerate(sources)]
    kernel = dict(display_name='python3', language='python', name='python3')
    path.write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4,
                                    nbformat_minor=5)))

def open_and_run(page, address):
    "Open the notebook, run its cell; gives the player's face."
    page.goto(f'{address}/tree/play.ipynb?token={TOKEN}&reset')
    page.locator('.jp-Notebook .jp-Cell').first.wait_for(timeout=PATIENCE)
    page.get_by_text('Python 3 (ipykernel) | Idle').wait_for(timeout=PATIENCE)
    run_cell(page)
    return Face(page)

def run_cell(page, number=0):
    "Shift+Enter in a cell, again if JupyterLab has not taken it."
    prompt = page.locator('.jp-Notebook .jp-Cell .jp-InputPrompt').nth(number)
    before = prompt.inner_text()
    for _ in range(5):
        page.locator('.jp-Notebook .jp-Cell .cm-content').nth(number).click()
        page.keyboard.press('Shift+Enter')
        page.wait_for_timeout(2000)
        if prompt.inner_text() != before: return
    pytest.fail('the cell does not run')

@pytest.mark.skipif(not find_spec('jupyterlab'), reason='needs JupyterLab')
def test_in_jupyterlab(browser, tmp_path):
    "Everything that one can do; no shortcut leaks; reload; the cell again."
    write_notebook(tmp_path/'play.ipynb', NOTEBOOK.format(root=ROOT, out=tmp_path/'played'))
    with lab(tmp_path) as address:
        page = browser.new_page(viewport=dict(width=1280, height=900))
        page.set_default_timeout(PATIENCE)
        face = open_and_run(page, address)
        assert face.has_own_wire()
        play_through(face, tmp_path/'played')

        cells = page.locator('.jp-Notebook .jp-Cell').count()
        face.start()
        face.screen.click()
        for key in 'abdddxzmy1': page.keyboard.press(key)       # JupyterLab's keys for cells
        page.wait_for_timeout(500)
        assert page.locator('.jp-Notebook .jp-Cell').count() == cells
        face.hold('KeyW', seconds=1.5)
        picture = os.environ.get('NFD_SCREENSHOTS')
        if picture: page.screenshot(path=Path(picture)/'lab.png')

        page.locator('.jp-Notebook .jp-Cell .cm-content').first.click()
        page.keyboard.press('Control+s')
        page.keyboard.press('Escape')
        page.wait_for_timeout(1500)
        page.reload()
        again = Face(page)                                      # the world has gone on meanwhile
        again.until(lambda: again.stats()['painted'] > 5)

        run_cell(page)                                          # the cell once more
        rerun = Face(page)
        rerun.until(lambda: rerun.stats()['number'] == 0 and not rerun.playing())
        rerun.start()
        rerun.until(lambda: rerun.stats()['painted'] > 5)
        page.close()

TROUBLE = """
def trouble(made):
    if made.number < stop_at: return
    player.session.watchers.remove(trouble)
    raise ValueError('the roof fell in')

stop_at = player.session.shown.number + 40
player.session.watchers.append(trouble)
"""

def interrupt_kernel(address):
    "What the stop button of JupyterLab does."
    base = address.removesuffix('/lab')
    headers = {'Authorization': f'token {TOKEN}'}
    def ask(path, **more):
        request = urllib.request.Request(f'{base}/api/{path}', headers=headers, **more)
        return urllib.request.urlopen(request, timeout=60).read()
    kernel, = json.loads(ask('kernels'))
    ask(f'kernels/{kernel["id"]}/interrupt', data=b'{}', method='POST')

@pytest.mark.skipif(not find_spec('jupyterlab'), reason='needs JupyterLab')
def test_two_views_an_interrupt_and_a_failure(browser, tmp_path):
    """A key in one view moves both; an interrupt stops neither; what fails is said, and can go on.
    All by the kernel's wire: the player's own is gone, as it is for a kernel elsewhere."""
    notebook = NOTEBOOK.format(root=ROOT, out=tmp_path/'played')
    notebook = notebook.replace('\nplayer\n', '\nplayer.page.stop()\nplayer\n')
    write_notebook(tmp_path/'play.ipynb', notebook, 'player', TROUBLE)
    with lab(tmp_path) as address:
        page = browser.new_page(viewport=dict(width=1280, height=2600))
        page.set_default_timeout(PATIENCE)
        open_and_run(page, address)
        run_cell(page, 1)
        page.locator('.nfd-player').nth(1).wait_for()
        first = Face(page, 0)
        second = Face(page, 1)
        assert not first.has_own_wire() and not second.has_own_wire()
        second.start()
        first.until(first.playing)
        first.screen.click()
        page.keyboard.down('KeyQ')
        for face in (first, second): face.until(lambda f=face: f.stats()['label'] == 'turn left')
        page.keyboard.up('KeyQ')
        for face in (first, second): face.until(lambda f=face: f.stats()['label'] == 'noop')
        first.pause()
        second.until(lambda: second.stats()['number'] == first.stats()['number'])
        np.testing.assert_array_equal(first.pixels(), second.pixels())

        first.start()
        interrupt_kernel(address)
        page.wait_for_timeout(1000)
        painted = second.stats()['painted']
        second.until(lambda: second.stats()['painted'] > painted + 10)
        second.screen.click()
        page.keyboard.down('KeyW')
        first.until(lambda: first.stats()['label'] == 'forward')
        page.keyboard.up('KeyW')

        run_cell(page, 2)
        first.until(lambda: 'the roof fell in' in first.said())
        for face in (first, second):
            face.until(lambda f=face: f.root.locator('.nfd-bad').count() == 1)
            assert not face.playing()
        number = first.stats()['number']
        first.start()
        second.until(lambda: second.stats()['number'] > number + 5)
        assert first.root.locator('.nfd-bad').count() == 0
        page.close()
