"README keeps its word: it is the index notebook, its script runs, its commands exist."
import re
import subprocess
import sys

from make_readme import ROOT, readme

from nfd_ref.cli import parser
from nfd_ref.video import video_info

TEXT = (ROOT/'README.md').read_text()

def test_readme_is_the_index_notebook():
    assert TEXT == readme(), 'run: python tests/make_readme.py'

def test_the_short_script_runs_anywhere(tmp_path):
    script = re.search(r'```python\n(.*?)```', TEXT, re.S)[1]
    r = subprocess.run([sys.executable, '-c', script], cwd=tmp_path, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    assert video_info(tmp_path/'walk.mp4')[0] == 60

def test_links_and_pictures_exist():
    for link in re.findall(r'\]\(([^)#]+)\)', TEXT):
        if not link.startswith('http'): assert (ROOT/link).exists(), link

def test_its_commands_parse():
    commands = re.findall(r'^nfd-ref (.+)$', TEXT.replace('\\\n', ' '), re.M)
    assert len(commands) > 5
    for line in commands: parser().parse_args(line.split())
