"Every notebook runs from top to bottom, one test each; its exercises are unsolved and solvable."
import json
import os
import re
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import pytest

from nfd_ref.exercise import try_it

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))

def cells(notebook, kind):
    "Source and cell of each cell of a kind."
    found = json.loads(notebook.read_text())['cells']
    return [(''.join(c['source']), c) for c in found if c['cell_type'] == kind]

def printed(cell):
    "What a cell's saved outputs print."
    return ''.join(''.join(o.get('text', '')) for o in cell['outputs'])

# Each notebook's process branches off from one that has imported what they all import (a command
# imports torch when it is called, and torch its compiler when it is asked for).
BRANCHES = get_context('forkserver')
BRANCHES.set_forkserver_preload([
    'nbdev.test', 'matplotlib.pyplot', 'torch._inductor.compile_fx', 'nfd_ref.arms',
    'nfd_ref.comparison', 'nfd_ref.pilots', 'nfd_ref.player'])

def run_notebook(notebook, log):
    "`nbdev-test --flags 'cuda slow' NOTEBOOK`, what it says in a file."
    from nbdev.test import nbdev_test
    with open(log, 'w') as file:
        for stream in (1, 2): os.dup2(file.fileno(), stream)
    nbdev_test(str(notebook), flags='cuda slow')

@pytest.mark.slow
@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.stem)
def test_runs(notebook, tmp_path):
    "As \"Run All\" does: with the cells that want a GPU or hours, which look before they begin."
    log = tmp_path/'log'
    process = BRANCHES.Process(target=run_notebook, args=(notebook, log))
    process.start()
    process.join(900)
    process.kill()
    assert process.exitcode == 0, log.read_text()[-6000:]

@pytest.mark.slow
def test_runs_from_the_root():
    "As some editors do, which start a kernel where the repository is opened."
    command = [sys.executable, '-m', 'IPython', '--quick', 'nbs/13c_terminal.ipynb']
    r = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300,
                       env=dict(os.environ, MPLBACKEND='agg'))
    assert r.returncode == 0, r.stdout[-6000:] + r.stderr[-6000:]

@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.stem)
def test_files_are_named_from_nbs(notebook):
    "Before the first file is named, a notebook stands in nbs/, wherever its kernel began."
    sources = [source for source, _ in cells(notebook, 'code')]
    named = [i for i, source in enumerate(sources) if "'../" in source]
    stands = [i for i, source in enumerate(sources) if 'work_from_nbs()' in source]
    assert not named or stands and stands[0] < named[0]

@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.stem)
def test_exercises_are_unsolved_and_have_folded_solutions(notebook):
    checks, open_, solved = [], [], []
    for source, cell in cells(notebook, 'code'):
        folded = cell['metadata'].get('jupyter', {}).get('source_hidden', False)
        called = re.findall(r'^\s*(check_\w+)\(', source, re.M)
        checks += re.findall(r'^def (check_\w+)\(', source, re.M)
        tried = re.findall(r'^try_it\((check_\w+), ', source, re.M)
        if folded: solved += called         # not by `try_it`, which raises nothing
        elif tried or 'not solved yet' in source:
            open_ += tried or called
            assert printed(cell).startswith('not solved yet'), source
    assert sorted(checks) == sorted(open_), 'a check that no stub is tried on'
    assert set(checks) <= set(solved), 'a check that no folded solution passes'

def test_an_attempt_is_solved_if_its_check_passes(capsys):
    def check_even(attempt): assert attempt % 2 == 0
    try_it(check_even, 2)
    try_it(check_even, 3)
    try_it(check_even, None)
    said = capsys.readouterr().out.splitlines()
    assert said == ['solved', 'not solved yet: AssertionError', 'not solved yet: TypeError']

def anchors(notebook):
    "What a link into a notebook can name: its headings, spaces as hyphens, as JupyterLab has it."
    sources = [source for source, _ in cells(notebook, 'markdown')]
    headings = re.findall(r'^#+ (.+)$', '\n'.join(sources), re.MULTILINE)
    return {heading.strip().replace('`', '').replace(' ', '-') for heading in headings}

@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.stem)
def test_links_lead_somewhere(notebook):
    for source, _ in cells(notebook, 'markdown'):
        for link, anchor in re.findall(r'\]\(([^)#\s]*)(?:#([^)\s]+))?\)', source):
            if link.startswith('http'): continue
            target = notebook.parent/link if link else notebook
            assert target.exists(), link
            if anchor and target.suffix == '.ipynb': assert anchor in anchors(target), anchor

def columns(line): return len(line.strip().strip('|').replace(r'\|', '').split('|'))

@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.stem)
def test_tables_are_tables(notebook):
    "A table whose head has more columns than the line below it is shown as a heap of bars."
    shown = [source for source, _ in cells(notebook, 'markdown')]
    for _, cell in cells(notebook, 'code'):
        shown += [''.join(o.get('data', {}).get('text/markdown', '')) for o in cell['outputs']]
    for text in shown:
        lines = text.splitlines()
        for head, rule in zip(lines, lines[1:]):
            if re.fullmatch(r'\|(\s*:?-{3,}:?\s*\|)+', rule):
                assert columns(head) == columns(rule), head

@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_name_no_machine(notebook):
    "A path of the machine that ran it means nothing to a reader."
    for source, cell in cells(notebook, 'code'):
        assert not re.search(r'site-packages|(?<![\w.])/(root|home|work)/', printed(cell)), source
