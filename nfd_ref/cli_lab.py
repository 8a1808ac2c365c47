"""The command that opens the notebooks: `lab`. Written by hand (see `command`)."""

import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from nfd_ref.command import ROOT, command, within

LAB = dict(                             # how JupyterLab opens these notebooks
    root_dir=('ServerApp', ROOT),       # the tree, so that a notebook shows pictures beside nbs/
    default_url=('LabApp', '/lab/tree/nbs/index.ipynb'),
    pre_save_hook=('ContentsManager', 'nfd_ref.cli_lab.clean_saved'),
    news_url=('LabApp', None),
    check_for_updates_class=('LabApp', 'jupyterlab.NeverCheckForUpdate'))
AUTOSAVE_OFF = {'@jupyterlab/docmanager-extension:plugin': {'autosave': False}}

@command()
def cmd_lab(
    port:int=None,              # of the server (8888, or the next that is free)
    no_browser:bool=False,      # only print the address
    allow_root:bool=False,      # start as root, as in a container
):
    """Open JupyterLab at the notebooks.
    A notebook is saved when you save it and never by itself, so that looking at it and running it
    leave no trace in git. Ctrl-C ends it."""
    if not (ROOT/'nbs').is_dir():
        raise FileNotFoundError('the notebooks are not part of the wheel: run it in a clone')
    wanted = [name for name in ('jupyterlab', 'nbdev') if not find_spec(name)]
    if wanted:
        raise ImportError(f'the notebooks want {" and ".join(wanted)}: '
                          'pip install -c constraints.txt -e ".[lab]"')
    within(1, 65535, port=port)
    words = [f'--{part}.{name}={value}' for name, (part, value) in LAB.items()]
    if port: words.append(f'--port={port}')
    if no_browser: words.append('--no-browser')
    if allow_root: words.append('--allow-root')
    with tempfile.TemporaryDirectory() as settings:
        (Path(settings)/'overrides.json').write_text(json.dumps(AUTOSAVE_OFF))
        words.append(f'--LabApp.app_settings_dir={settings}')
        sys.exit(wait_for([sys.executable, '-m', 'jupyterlab', *words]))

def wait_for(words):
    "Run a program until it ends, in its own time where we are stopped; gives its exit code."
    program = subprocess.Popen(words, start_new_session=True)       # a terminal's Ctrl-C is for us
    try:
        return program.wait()
    except KeyboardInterrupt:
        program.terminate()
        return program.wait()

def clean_saved(model, path, **more):
    "What JupyterLab calls before it saves: without counters and times, as `nbdev-clean` does."
    from nbdev.clean import clean_jupyter
    if model['type'] == 'notebook': clean_jupyter(ROOT/'nbs', model)
