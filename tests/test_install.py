"What comes with an installed package: it plays without a clone, and says what a clone has more."
import configparser
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from nfd_ref.cli_nbdev import without_path
from nfd_ref.files import home
from nfd_ref.video import video_info

ROOT = Path(__file__).parents[1]
NEEDED = 'nfd_ref', 'data', 'pyproject.toml', 'README.md', 'LICENSE'     # to build a wheel

def copy(names, target):
    "Some of the project, as it would be in a fresh clone."
    for name in names:
        source = ROOT/name
        ignore = shutil.ignore_patterns('__pycache__')
        if source.is_dir(): shutil.copytree(source, target/name, ignore=ignore)
        else: shutil.copy(source, target/name)

@pytest.mark.slow
def test_a_wheel_plays(tmp_path):
    clone = tmp_path/'clone'
    clone.mkdir()
    copy(NEEDED, clone)
    built = subprocess.run(
        [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w',
         str(tmp_path), str(clone)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    wheel, = tmp_path.glob('*.whl')
    site = tmp_path/'site'
    with zipfile.ZipFile(wheel) as archive: archive.extractall(site)
    assert not (site/'data').exists()
    data, = site.glob('nfd_ref-*.data/data/share')
    data.rename(site/'share')                   # where `pip install --target` would put it
    shutil.rmtree(clone)

    def command(*args):
        code = f'import sys; from nfd_ref.cli import main; sys.exit(main({list(args)!r}))'
        env = os.environ | dict(PYTHONPATH=str(site))
        return subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=env,
                              capture_output=True, text=True)
    played = command('play', '--frames', '5', '--out', 'a.mp4')
    assert played.returncode == 0, played.stderr
    assert video_info(tmp_path/'a.mp4')[0] == 5
    lab = command('lab')
    assert lab.returncode == 2
    assert 'the notebooks are not part of the wheel: run it in a clone' in lab.stderr

def test_what_is_shipped_is_found_in_a_clone_and_beside_a_wheel(tmp_path):
    assert home(ROOT) == ROOT
    beside = tmp_path/'share'/'nfd_ref'
    (beside/'data'/'world').mkdir(parents=True)
    assert home(tmp_path) == beside

def test_every_file_that_ships_is_there():
    toml = tomllib.loads((ROOT/'pyproject.toml').read_text())
    for globs in toml['tool']['setuptools']['data-files'].values():
        for pattern in globs: assert list(ROOT.glob(pattern)), pattern

def test_one_notebook_by_path(tmp_path):
    "As readers of nbdev 2 type it: this notebook runs, and no other."
    cells = [dict(cell_type='code', id='a', metadata={}, execution_count=None, outputs=[],
                  source='open("ran", "w").close()')]
    about = dict(kernelspec=dict(name='python3', display_name='python3', language='python'))
    (tmp_path/'a.ipynb').write_text(json.dumps(
        dict(cells=cells, metadata=about, nbformat=4, nbformat_minor=5)))
    run = subprocess.run([sys.executable, '-m', 'nfd_ref.cli_nbdev', '--path', tmp_path/'a.ipynb'],
                         cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    assert (tmp_path/'ran').exists()

@pytest.mark.parametrize('args, wanted', [
    (['--path', 'nbs/a.ipynb', '--save'], ['nbs/a.ipynb', '--save']),
    (['--path=nbs/a.ipynb'], ['nbs/a.ipynb']),
    (['nbs/a.ipynb'], ['nbs/a.ipynb']),
    ([], [])])
def test_path_as_readers_know_it(args, wanted): assert without_path(args) == wanted

def test_settings_ini_leaves_nothing_to_be_filled_in():
    "nbdev 2 makes what is missing from `user` and others, and stops where one of them is missing."
    ini = configparser.ConfigParser()
    ini.read(ROOT/'settings.ini')
    for key in ('user', 'branch', 'git_url', 'doc_host', 'doc_baseurl', 'copyright', 'title'):
        assert key in ini['DEFAULT'], key
