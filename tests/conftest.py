"""Tests run on the CPU: `pytest` one at a time on two threads, `pytest -n 3` three at a time on one
each, the long ones first so that none is left over. Three, for two cores: some only wait, for a
browser or for a clock."""
import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

# The longest; a name that is missing here costs only time.
LONGEST = (
    'test_in_jupyterlab',
    'test_a_page_of_its_own',
    'test_compare_goes_from_nothing_to_a_table_and_measures_nothing_twice',
    'test_two_views_an_interrupt_and_a_failure',
    'test_runs[09b_workshop]',
    'test_runs[06b_engines]',
    'test_build_goes_from_nothing_to_a_world_that_plays',
    'test_runs[08_speed]',
    'test_evaluate_measures_and_keeps_a_row',
    'test_runs[07f_guidance]',
    'test_runs[07c_evaluation]',
    'test_runs[07_measures]',
    'test_runs[06_streaming]',
    'test_killed_and_resumed_is_bit_equal',
    'test_arms_are_measured_and_kept',
    'test_runs[13d_inside]',
    'test_runs[07b_trials]',
    'test_runs[06d_kernel]')

# In the place of the compiler: for kernels it asks `kept_compiler.py`, else it is the compiler.
BY_WAY_OF_FOLDER = '''#!/bin/sh
for source; do :; done
case $source in */kernel.cpp) exec {command} {compiler} "$@";; esac
exec {compiler} "$@"
'''

def pytest_configure(config):
    "What the workers and the notebooks' processes inherit."
    workers = config.getoption('numprocesses', None) or 1
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, 2 // workers)))
    os.environ.setdefault('GOMP_SPINCOUNT', '0')    # who waits leaves the core to the other test
    if 'KEPT_LIBRARIES' in os.environ: return       # we are a worker
    folder = os.environ['KEPT_LIBRARIES'] = tempfile.mkdtemp(prefix='kept_')
    kept_compiler = Path(__file__).with_name('kept_compiler.py')
    command = shlex.join([sys.executable, str(kept_compiler), folder])
    compiler = os.environ.get('CXX') or ('g++' if shutil.which('g++') else 'c++')
    program = Path(folder)/Path(shlex.split(compiler)[0]).name      # torch knows gcc by its name
    program.write_text(BY_WAY_OF_FOLDER.format(command=command, compiler=compiler))
    program.chmod(0o755)
    os.environ['CXX'] = str(program)

def pytest_unconfigure(config):
    "What the workers shared goes with the first process, which waits for them."
    folder = os.environ.get('KEPT_LIBRARIES')
    if folder and not hasattr(config, 'workerinput'): shutil.rmtree(folder, ignore_errors=True)

@pytest.hookimpl(tryfirst=True)         # before `-m` chooses
def pytest_collection_modifyitems(items):
    "Longest first, then the other slow ones; a long one is slow, too."
    for item in items:
        if item.get_closest_marker('long'): item.add_marker('slow')

    def place(item):
        long = LONGEST.index(item.name) if item.name in LONGEST else len(LONGEST)
        return long, not item.get_closest_marker('slow')

    items.sort(key=place)
