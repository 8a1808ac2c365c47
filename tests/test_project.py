"The project tells one truth: its settings agree, its modules are what its notebooks export, it stays small."
import configparser, re, subprocess, sys, tomllib
from pathlib import Path
import nfd_ref

ROOT = Path(__file__).parents[1]

def test_settings_ini_agrees_with_pyproject():
    ini = configparser.ConfigParser(); ini.read(ROOT/'settings.ini'); ini = ini['DEFAULT']
    py = tomllib.loads((ROOT/'pyproject.toml').read_text()); nb, proj = py['tool']['nbdev'], py['project']
    for k in ('lib_path', 'nbs_path', 'doc_path', 'tst_flags'): assert ini[k] == nb[k], k
    assert ini['version'] == nfd_ref.__version__ and ini['lib_name'] == ini['repo'] == proj['name'] and ini['description'] == proj['description']
    assert f'>={ini["min_python"]}' == proj['requires-python'] and ini['license'] == 'apache2' and proj['license'] == 'Apache-2.0'
    assert ini['console_scripts'].split() == [f'{k}={v}' for k, v in proj['scripts'].items() if k == 'nfd-ref']
    assert ini['requirements'].split() == [re.split('[><=]', r)[0] for r in proj['dependencies']]

def test_modules_are_what_the_notebooks_export(tmp_path):
    import shutil
    for d in ('nbs', 'nfd_ref'): shutil.copytree(ROOT/d, tmp_path/d, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    shutil.copy(ROOT/'pyproject.toml', tmp_path)
    r = subprocess.run([str(Path(sys.executable).with_name('nbdev-export'))], cwd=tmp_path, capture_output=True, text=True); assert r.returncode == 0, r.stderr
    for f in sorted((ROOT/'nfd_ref').glob('*.py')): assert (tmp_path/'nfd_ref'/f.name).read_text() == f.read_text(), f'{f.name} is not what its notebook exports: run nbdev-export'

def test_small_enough_to_clone():
    r = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True)
    if r.returncode: import pytest; pytest.skip('not a git checkout')
    sizes = {f: (ROOT/f).stat().st_size for f in r.stdout.split('\0') if f and (ROOT/f).exists()}
    assert sum(sizes.values()) < 40e6 and max(sizes.values()) < 15e6

def test_nothing_below_play_needs_widgets_or_gymnasium():
    code = 'import sys; import nfd_ref.video, nfd_ref.tokenizer, nfd_ref.attention, nfd_ref.transformer, nfd_ref.diffusion, nfd_ref.training, nfd_ref.streaming; assert not {"ipywidgets", "anywidget", "gymnasium", "vizdoom", "matplotlib"} & set(sys.modules), sys.modules.keys()'
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True); assert r.returncode == 0, r.stderr[-500:]

def test_the_name_readers_type_works():
    r = subprocess.run([str(Path(sys.executable).with_name('nbdev_test')), '--help'], capture_output=True, text=True)
    assert r.returncode == 0 and '--flags' in r.stdout
