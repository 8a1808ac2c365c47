"""The notebooks as people open them: `nfd-ref lab` shows the index and its pictures, saves only
when told to, leaves no trace in git, and ends at Ctrl-C; nbdev makes documentation of each."""
import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
import urllib.request
from importlib.metadata import packages_distributions, requires
from importlib.util import find_spec
from pathlib import Path

import pytest

from nfd_ref import cli
from own_jupyter import TOKEN, free_port, own_folders, wait_for

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
INDEX = ROOT/'nbs'/'index.ipynb'

def code_cells(notebook):
    "Sources of the code cells, without lines that only IPython reads."
    for cell in json.loads(notebook.read_text())['cells']:
        if cell['cell_type'] == 'code':
            yield re.sub(r'^[%!].*$', '', ''.join(cell['source']), flags=re.M)

# ---- the environment that README gives

def needed(name, found):
    "A distribution and all that it needs, normalised names into `found`."
    name = re.split(r'[^\w.-]', name)[0].lower().replace('_', '-')
    if name in found: return found
    found.add(name)
    try:
        wanted = requires(name) or []
    except ModuleNotFoundError:
        return found
    for one in wanted:
        if 'extra ==' not in one: needed(one, found)
    return found

def test_readme_s_environment_has_what_the_notebooks_import():
    project = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']
    assert 'pip install -c constraints.txt -e ".[lab]"' in INDEX.read_text().replace('\\"', '"')
    given = set()
    for name in [*project['dependencies'], *project['optional-dependencies']['lab']]:
        needed(name, given)
    makers = packages_distributions()
    wanted = {}
    for notebook in NOTEBOOKS:
        for source in code_cells(notebook):
            for node in ast.parse(source).body:     # what a function imports, it does without
                names = []
                if isinstance(node, ast.Import): names = [alias.name for alias in node.names]
                if isinstance(node, ast.ImportFrom) and not node.level: names = [node.module]
                wanted |= {name.split('.')[0]: notebook.stem for name in names}
    for name, where in wanted.items():
        if name in sys.stdlib_module_names or name == 'nfd_ref': continue
        made_by = {maker.lower().replace('_', '-') for maker in makers.get(name, [])}
        assert made_by & given, f'{where} imports {name}'

def test_lab_names_what_is_not_installed(capsys, monkeypatch):
    monkeypatch.setattr(cli.cli_lab, 'find_spec', lambda name: None)
    assert cli.main(['lab']) == 2
    assert 'the notebooks want jupyterlab and nbdev: pip install' in capsys.readouterr().err

# ---- git

def as_jupyter_saves(notebook):
    "What JupyterLab would write after running everything: counters, times, its own names."
    content = json.loads(notebook.read_text())
    for number, cell in enumerate(content['cells']):
        cell['metadata'] |= dict(trusted=True, execution={'iopub.execute_input': '2026-11-26'})
        if cell['cell_type'] == 'code': cell['execution_count'] = number
    content['metadata']['kernelspec']['display_name'] = 'Python 3 (ipykernel)'
    content['metadata']['language_info'] = dict(name='python', version='3.11.2')
    return dict(type='notebook', format='json', content=content)

@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.stem)
def test_saving_leaves_no_trace(notebook):
    pytest.importorskip('nbdev')
    model = as_jupyter_saves(notebook)
    cli.cli_lab.clean_saved(model, path=notebook.name)
    assert model['content'] == json.loads(notebook.read_text())

def test_nbdev_s_hooks_leave_the_clone_clean(tmp_path):
    pytest.importorskip('nbdev')
    for name in ('.gitattributes', '.gitignore', 'pyproject.toml'): shutil.copy(ROOT/name, tmp_path)
    who = ('-c', 'user.name=a', '-c', 'user.email=a@b')
    for words in (('init', '-q'), ('add', '.'), (*who, 'commit', '-qm', 'all')):
        subprocess.run(['git', *words], cwd=tmp_path, check=True)
    hooks = Path(sys.executable).with_name('nbdev-install-hooks')
    home = tmp_path/'runs'                          # it writes to ~/.jupyter, too
    home.mkdir()
    subprocess.run([hooks], cwd=tmp_path, env=os.environ | dict(HOME=str(home)), check=True)
    r = subprocess.run(['git', 'status', '--short'], cwd=tmp_path, capture_output=True, text=True)
    assert r.stdout == ''

# ---- the server

@pytest.fixture
def lab(tmp_path):
    "`nfd-ref lab` in a group of processes of its own: (address, process, its folders)."
    port = free_port()
    own = own_folders(tmp_path) | dict(JUPYTER_TOKEN=TOKEN)
    command = [sys.executable, '-m', 'nfd_ref.cli', 'lab', '--no-browser', '--allow-root',
               '--port', str(port)]
    with open(tmp_path/'log', 'w') as log:
        server = subprocess.Popen(command, env=os.environ | own,
                                  stdout=log, stderr=log, start_new_session=True, cwd=tmp_path)
    try:
        yield f'http://127.0.0.1:{port}', server, tmp_path
    finally:
        server.terminate()
        server.wait(30)

def ask(address, what, body=None):
    "What the server answers."
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f'{address}/{what}', data, {'Authorization': f'token {TOKEN}'},
                                     method='GET' if body is None else 'PUT')
    with urllib.request.urlopen(request, timeout=20) as answer: return answer.read()

@pytest.mark.slow
@pytest.mark.skipif(not find_spec('jupyterlab'), reason='needs JupyterLab')
def test_lab_opens_the_index_saves_clean_and_ends_at_ctrl_c(lab):
    address, server, folder = lab
    wait_for(address.split(':')[-1], server, folder/'log', 90)
    assert '/lab/tree/nbs/index.ipynb' in (folder/'log').read_text()
    assert ask(address, 'files/data/world/play.gif').startswith(b'GIF8')
    settings = json.loads(ask(address, 'lab/api/settings/@jupyterlab/docmanager-extension:plugin'))
    assert settings['schema']['properties']['autosave']['default'] is False

    before = INDEX.read_bytes()
    try:
        ask(address, 'api/contents/nbs/index.ipynb', as_jupyter_saves(INDEX))
        assert INDEX.read_bytes() == before
    finally:
        INDEX.write_bytes(before)

    os.killpg(server.pid, signal.SIGINT)            # as a terminal does
    assert server.wait(30) == 0
    said = (folder/'log').read_text()
    assert 'y/[n]' not in said and 'Traceback' not in said
    assert 'use control-c' in said.lower()
    assert not list((folder/'jupyter_runtime_dir').glob('jpserver-*'))

# ---- nbdev's documentation

def test_imports_stand_in_cells_of_their_own():
    "nbdev runs a cell that imports when it makes documentation, whatever else is in it."
    for notebook in NOTEBOOKS:
        for source in code_cells(notebook):
            if '#| eval: false' in source or 'nbdev_export()' in source: continue
            kinds = {type(node) for node in ast.parse(source).body}
            imports = {ast.Import, ast.ImportFrom}
            assert not kinds & imports or kinds <= imports, f'{notebook.name}: {source}'

@pytest.mark.slow
@pytest.mark.long
def test_documentation_is_made_of_every_notebook_and_keeps_its_opening(tmp_path):
    pytest.importorskip('nbdev')
    script = ('import sys\nfrom pathlib import Path\nfrom nbdev.serve import FilterDefaults\n'
              'from nbdev.serve_drv import exec_nb\n'
              f'for p in sys.argv[1:]: exec_nb(Path(p), Path({str(tmp_path)!r})/Path(p).name, '
              'FilterDefaults)\n')
    r = subprocess.run([sys.executable, '-c', script, *map(str, NOTEBOOKS)], cwd=ROOT,
                       capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
    for notebook in NOTEBOOKS:
        second = ''.join(json.loads(notebook.read_text())['cells'][1]['source'])
        cells = json.loads((tmp_path/notebook.name).read_text())['cells']
        made = [''.join(cell['source']) for cell in cells]
        opening = re.split(r'[`\[(]', second)[0]    # names become links
        assert any(opening in cell for cell in made), notebook.name
