"Every notebook runs from top to bottom, one test each."
import subprocess, sys
from pathlib import Path
import pytest

NBS = sorted(p for p in (Path(__file__).parents[1]/'nbs').glob('*.ipynb'))

@pytest.mark.parametrize('nb', NBS, ids=lambda p: p.stem)
def test_notebook(nb):
    r = subprocess.run([str(Path(sys.executable).with_name('nbdev-test')), str(nb)], capture_output=True, text=True, cwd=nb.parents[1], timeout=900)
    assert r.returncode == 0, r.stdout[-6000:] + r.stderr[-6000:]
