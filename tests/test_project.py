"The project tells one truth: settings agree, rooms stand on floors below them, lines are clean."
import ast
import configparser
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import nfd_ref

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent

# What each room stands on. It may import from these, and from what they stand on.
ROOMS = {
    'storage': [],
    'exercise': [],
    'attention': [],
    'diffusion': [],
    'mp4': ['storage'],
    'video': ['mp4'],
    'doom': ['video'],
    'vpt': ['video'],
    'tokenizer': ['video'],
    'transformer': ['attention'],
    'loop': ['diffusion', 'storage'],
    'training': ['loop', 'tokenizer', 'transformer'],
    'panels': [],
    'kernel': ['panels', 'transformer'],
    'engines': ['kernel'],
    'streaming': ['engines', 'tokenizer', 'diffusion'],
    'judge': ['loop', 'tokenizer'],
    'measures': ['streaming', 'judge'],
    'stuck': ['measures', 'doom'],
    'trials': ['measures'],
    'evaluation': ['trials', 'stuck'],
    'release': ['measures'],
    'speed': ['streaming'],
    'growth': ['speed'],
    'consistency': ['streaming', 'training'],
    'codes': ['training', 'measures'],
    'autoregression': ['codes'],
    'token_world': ['autoregression', 'release'],
    'rivals': ['token_world', 'evaluation'],
    'comparison': ['rivals'],
    'play': ['streaming']}
LINES = 450     # a module that is longer holds two ideas

def run(*command, **kwargs):
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, **kwargs)

def modules():
    "The package's modules but `command` and `cli...`, the face over all rooms."
    return [f for f in written() if f.stem != 'command' and not f.stem.startswith('cli')]

def written():
    "The package's modules that someone wrote, the face too."
    files = sorted((ROOT/'nfd_ref').glob('*.py'))
    return [f for f in files if f.stem not in ('__init__', '_modidx')]

def below(room):
    "All rooms that `room` stands on, directly or not."
    found = set()
    for floor in ROOMS[room]: found |= {floor} | below(floor)
    return found

def imported(source):
    "The rooms that a module's source imports, anywhere in it."
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ''
            if node.level == 1 or module.startswith('nfd_ref'):
                found |= {module.removeprefix('nfd_ref').strip('.')}
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix('nfd_ref.') for a in node.names
                      if a.name.startswith('nfd_ref')}
    return found

def wrong_arrows(sources):
    "Imports {room: source} that do not lead down, as (room, imported)."
    return [(room, other) for room, source in sources.items()
            for other in imported(source) if other not in below(room)]

def test_rooms_stand_on_the_floors_below_them():
    sources = {f.stem: f.read_text() for f in modules()}
    assert sources.keys() == ROOMS.keys(), 'a module without a room in the table, or the reverse'
    assert wrong_arrows(sources) == []

def test_an_arrow_up_would_be_seen():
    up = 'from .play import stroll'
    aside = 'def f():\n    import nfd_ref.vpt\n'
    down = 'from .attention import rope'
    assert wrong_arrows({'video': up, 'doom': aside, 'transformer': down}) == [
        ('video', 'play'), ('doom', 'vpt')]

def test_no_room_holds_two_ideas():
    lengths = {f.stem: len(f.read_text().splitlines()) for f in written()}
    assert max(lengths.values()) <= LINES, lengths

def test_lines_are_clean():
    r = run(BIN/'ruff', 'check', ROOT/'nfd_ref', ROOT/'nbs', ROOT/'tests')
    assert r.returncode == 0, r.stdout[-3000:]

def test_settings_ini_agrees_with_pyproject():
    ini = configparser.ConfigParser()
    ini.read(ROOT/'settings.ini')
    ini = ini['DEFAULT']
    toml = tomllib.loads((ROOT/'pyproject.toml').read_text())
    nbdev, project = toml['tool']['nbdev'], toml['project']

    for key in ('lib_path', 'nbs_path', 'doc_path', 'tst_flags'): assert ini[key] == nbdev[key], key
    assert ini['version'] == nfd_ref.__version__
    assert ini['lib_name'] == ini['repo'] == project['name']
    assert ini['description'] == project['description']
    assert f'>={ini["min_python"]}' == project['requires-python']
    assert ini['license'] == 'apache2'
    assert project['license'] == 'Apache-2.0'
    assert ini['console_scripts'] == f'nfd-ref={project["scripts"]["nfd-ref"]}'
    names = [re.split('[><=]', r)[0] for r in project['dependencies']]
    assert ini['requirements'].split() == names

@pytest.mark.slow
def test_modules_are_what_the_notebooks_export(tmp_path):
    ignore = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints')
    for d in ('nbs', 'nfd_ref'): shutil.copytree(ROOT/d, tmp_path/d, ignore=ignore)
    shutil.copy(ROOT/'pyproject.toml', tmp_path)
    r = run(BIN/'nbdev-export', cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    for f in sorted((ROOT/'nfd_ref').glob('*.py')):
        same = (tmp_path/'nfd_ref'/f.name).read_text() == f.read_text()
        assert same, f'{f.name} is not what its notebook exports: run nbdev-export'

def test_small_enough_to_clone():
    r = run('git', 'ls-files', '-z', cwd=ROOT)
    if r.returncode: pytest.skip('not a git checkout')
    files = [ROOT/f for f in r.stdout.split('\0') if f]
    sizes = [f.stat().st_size for f in files if f.exists()]
    assert sum(sizes) < 60e6
    assert max(sizes) < 15e6

def test_nothing_below_play_needs_widgets_or_gymnasium():
    above = ('play', 'measures', 'stuck', 'trials', 'evaluation', 'release', 'consistency', 'judge',
             'codes', 'autoregression', 'token_world', 'rivals', 'comparison')
    rooms = [r for r in ROOMS if r not in above]
    imports = ', '.join(f'nfd_ref.{r}' for r in rooms)
    heavy = {'ipywidgets', 'anywidget', 'gymnasium', 'vizdoom', 'matplotlib'}
    code = f'import sys, {imports}\nassert not {heavy!r} & set(sys.modules), sorted(sys.modules)'
    r = run(sys.executable, '-c', code)
    assert r.returncode == 0, r.stderr[-500:]

def test_the_name_readers_type_works():
    r = run(BIN/'nbdev_test', '--help')
    assert r.returncode == 0
    assert '--flags' in r.stdout
