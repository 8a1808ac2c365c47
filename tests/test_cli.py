"""The command as a new user meets it: it plays, and every mistake is one line that says what to do,
leaving nothing half-written."""

import inspect
import io
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
import av
import numpy as np
import pytest
import torch
from tqdm import tqdm
from nfd_ref import cli, evaluation
from nfd_ref.command import Lines, engine_kwargs
from nfd_ref.consistency import CONSISTENCY_RECIPE
from nfd_ref.decoder import DECODER_RECIPE
from nfd_ref.distribution_matching import MATCHING_RECIPE
from nfd_ref.judge import IDM_RECIPE, IDMConfig, InverseDynamics
from nfd_ref.storage import JudgeInfo, WorldInfo, load_model, read_record, save_model, write_json
from nfd_ref.terminal import KEYS, LEAVE
from nfd_ref.training import RECIPES, TOKENIZER_RECIPE, WORLD_RECIPE
from nfd_ref.trajectories import ODE_RECIPE
from nfd_ref.video import (
    ActionSpace, VideoFolder, import_clips, read_frames, save_episode, video_info)

ROOT = Path(__file__).parents[1]
WORLD = ROOT/'data'/'world'
STUDENT = ROOT/'data'/'distilled'
DATA = ROOT/'data'/'my_way_home'
BRANCHES = ROOT/'data'/'branches'
JUDGE = ROOT/'data'/'idm'
COMMAND = Path(sys.executable).with_name('nfd-ref')
WORDS = (
    'play', 'translate', 'record', 'import', 'join', 'branches', 'walks', 'depths',
    'train tokenizer', 'train decoder', 'train world', 'train teacher', 'train idm',
    'distill consistency', 'distill trajectories', 'distill ode', 'distill distribution',
    'distill compare', 'release', 'evaluate', 'bench', 'compare', 'pilots', 'endure', 'views',
    'decoders', 'prompts', 'build', 'lab')

needs_vizdoom = pytest.mark.skipif(not find_spec('vizdoom'), reason='needs ViZDoom')

# ---- what the tests say

def run(capsys, *args):
    "(exit code, stdout, stderr) of `nfd-ref ARGS`."
    code = cli.main([str(arg) for arg in args])
    said = capsys.readouterr()
    return code, said.out, said.err

def works(capsys, *args):
    "The command does what it is told; gives its stdout."
    code, out, err = run(capsys, *args)
    assert code == 0, err
    return out

def files(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob('*'))

def fails(capsys, folder, *args, says):
    "The command fails with one line that says `says`, and leaves `folder` as it was."
    before = files(folder)
    code, _, err = run(capsys, *args)
    lines = [line for line in err.splitlines() if line.startswith('nfd-ref ')]
    assert code == 2
    assert len(lines) == 1, err
    assert lines[0].startswith(f'nfd-ref {args[0]}: ')
    assert says in lines[0]
    assert 'Traceback' not in err
    assert files(folder) == before

def help_of(*words):
    shown = subprocess.run([COMMAND, *words, '--help'], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    return ' '.join(shown.stdout.split())

# ---- help

def test_help_lists_every_command():
    shown = subprocess.run([COMMAND, '--help'], capture_output=True, text=True)
    assert shown.returncode == 0
    for words in WORDS: assert re.search(rf'^    {words.split()[0]}\b', shown.stdout, re.M)
    assert {' '.join(words) for words in cli.COMMANDS} == set(WORDS)

def test_without_a_command_it_is_the_help(capsys):
    assert 'COMMAND' in works(capsys)

@pytest.mark.parametrize('words', WORDS)
def test_every_argument_has_a_text(words):
    func, positional = cli.COMMANDS[tuple(words.split())]
    shown = argparse_actions(words)
    assert set(inspect.signature(func).parameters) == set(shown)
    for name, action in shown.items(): assert action.help.strip(), name

def argparse_actions(words):
    "{name: action} of one command, --help left out."
    found = cli.parser()
    for word in words.split(): found = found._subparsers._group_actions[0].choices[word]
    return {action.dest: action for action in found._actions if action.dest != 'help'}

def test_help_names_defaults_as_one_would_type_them():
    shown = help_of('play')
    for text in ('(default: data/distilled)', '(default: play.mp4)', '(default: 0)'):
        assert text in shown
    assert '(default: False)' not in shown

@pytest.mark.parametrize('words, recipe', [
    ('train tokenizer', TOKENIZER_RECIPE),
    ('train decoder', DECODER_RECIPE),
    ('train world', WORLD_RECIPE),
    ('train idm', IDM_RECIPE),
    ('distill consistency', CONSISTENCY_RECIPE),
    ('train teacher', WORLD_RECIPE),
    ('distill ode', ODE_RECIPE),
    ('distill distribution', MATCHING_RECIPE)])
def test_help_of_a_training_has_the_numbers_of_its_recipe(words, recipe):
    shown = help_of(*words.split())
    for text in (
        f'{recipe.steps} steps of {recipe.batch} ',
        f'learning rate {recipe.lr:.6f}'.rstrip('0'),
        f'a checkpoint every {recipe.save_every}'): assert text in shown
    assert ('in bf16' in shown) == recipe.bf16

def test_help_is_quick_because_it_loads_no_torch():
    code = 'import sys; from nfd_ref import cli; cli.parser(); assert "torch" not in sys.modules'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0

def test_a_training_flag_stands_in_the_recipe_s_place():
    cfg = cli.cli_train.train_config(CONSISTENCY_RECIPE, steps=7, seed=0, compile=True)
    assert cfg == replace(CONSISTENCY_RECIPE, steps=7, seed=0, compile=True)
    assert cfg.bf16

def test_help_of_play_names_the_keys():
    shown = help_of('play')
    for text in ('W A S D walk', 'Q E turn', 'R T walk in a curve', 'space stands', 'x leaves'):
        assert text in shown
    assert set('wasdqert ') == set(KEYS)
    assert 'x' in LEAVE

# ---- what is written to a log

def test_a_log_gets_lines_and_no_carriage_returns():
    log = io.StringIO()
    lines = Lines(log, every=1000)
    for _ in tqdm(range(50), 'train', file=lines, mininterval=0): pass
    print('a warning', file=lines)
    for _ in tqdm(range(3), 'again', file=lines, mininterval=0): pass
    written = log.getvalue()
    assert '\r' not in written and '\n\n' not in written
    first, last, warning, *_, end = written.splitlines()
    assert 'train:   0%' in first
    assert 'train: 100%' in last and '50/50' in last
    assert warning == 'a warning'
    assert 'again: 100%' in end

def test_a_log_gets_a_line_now_and_then():
    log = io.StringIO()
    lines = Lines(log, every=0)
    for _ in tqdm(range(5), file=lines, mininterval=0, miniters=1): pass
    assert [line.split('/5')[0][-1] for line in log.getvalue().splitlines()[:6]] == list('012345')

def test_a_command_logs_in_lines(monkeypatch, capsys):
    def cmd_count():
        "Count to four."
        for _ in tqdm(range(4), 'count', mininterval=0): pass
    monkeypatch.setitem(cli.COMMANDS, ('count',), (cmd_count, []))
    code, _, err = run(capsys, 'count')
    assert code == 0 and '4/4' in err and '\r' not in err

# ---- play

@pytest.mark.slow
@pytest.mark.parametrize('world, how', [
    (WORLD, '4 euler steps'),
    (STUDENT, '2 consistency steps')])
def test_play_writes_what_it_made_and_says_how_fast(tmp_path, capsys, world, how):
    mp4 = tmp_path/'a.mp4'
    out = works(capsys, 'play', world, '--frames', 30, '--out', mp4, '--gif', tmp_path/'a.gif')
    assert files(tmp_path) == ['a.gif', 'a.mp4']
    assert video_info(mp4)[0] == 30
    assert re.search(r'30 frames at \d+\.\d FPS', out)
    assert f'80x48 pixels, {how}, engine native, CPU' in out
    assert read_frames(mp4).std(0).mean() > 5           # it moves

@pytest.mark.slow
def test_play_is_reproducible(tmp_path, capsys):
    trace = ('--actions', 'forward*6, turn left*6')
    for name, seed in dict(a=0, b=0, c=1).items():
        works(capsys, 'play', *trace, '--seed', seed, '--out', tmp_path/f'{name}.mp4')
    first, second, other = ((tmp_path/f'{name}.mp4').read_bytes() for name in 'abc')
    assert first == second
    assert first != other

def test_play_says_in_which_precision(tmp_path, capsys):
    half = ('--engine', 'static+bf16')
    out = works(capsys, 'play', '--frames', 2, *half, '--out', tmp_path/'a.mp4')
    assert 'engine static, bfloat16, CPU' in out

class Terminal:
    "`nfd-ref ARGS` behind a pseudo-terminal."
    def __init__(self, *args):
        self.pid, self.fd = pty.fork()
        if self.pid == 0: os.execv(sys.executable, [sys.executable, '-m', 'nfd_ref.cli', *args])
        self.ends = time.time() + 90

    def read(self, until):
        "What it writes, until `until` stands in it."
        seen = ''
        while until not in seen and time.time() < self.ends:
            if not select.select([self.fd], [], [], .2)[0]: continue
            try:
                seen += os.read(self.fd, 65536).decode(errors='replace')
            except OSError:                             # it has ended
                break
        assert until in seen, seen[-300:]
        return seen

    def press(self, keys): os.write(self.fd, keys.encode())

@pytest.mark.slow
def test_keys_in_a_real_terminal(tmp_path, capsys):
    "Walk, turn, leave; and the walk again, from its record."
    mp4 = tmp_path/'k.mp4'
    terminal = Terminal('play', '--keys', '--out', str(mp4))
    assert '▀' in terminal.read('frames/s')
    terminal.press('w')
    terminal.read('\nforward ')
    terminal.press('qe')                                # two keys at once: the last one counts
    terminal.read('\nturn right ')
    terminal.press('+')                                 # two frames at once, from the beginning
    terminal.read('frame 4; drafts: ')
    terminal.read('\nturn right ')
    terminal.press('x')
    assert re.search(r'\d+ frames -> ', terminal.read('k.json'))
    assert os.waitpid(terminal.pid, 0)[1] == 0
    assert video_info(mp4)[0] > 2

    again = tmp_path/'again.mp4'
    said = works(capsys, 'play', '--replay', tmp_path/'k.json', '--out', again)
    assert 'the same frames, to the bit' in said
    assert again.read_bytes() == mp4.read_bytes()

@pytest.mark.slow
def test_ctrl_c_in_a_terminal_keeps_the_walk(tmp_path):
    terminal = Terminal('play', '--keys', '--out', str(tmp_path/'k.mp4'))
    terminal.read('frames/s')
    terminal.press('\x03')
    terminal.read('k.json')
    assert os.waitpid(terminal.pid, 0)[1] == 0
    assert files(tmp_path) == ['k.json', 'k.mp4']

# ---- mistakes in the arguments

@pytest.mark.parametrize('args, says', [
    (['nowhere'], 'no such folder'),
    ([WORLD/'world.json'], 'no such folder'),
    (['--data', 'nowhere'], 'no such folder of video'),
    (['--steps', 0], '--steps 0: at least 1'),
    (['--engine', 'warp'], 'no engine "warp"'),
    (['--engine', 'static+fp4'], 'after + comes bf16'),
    (['--frames', -5], 'at least 1'),
    (['--frames', 0], 'at least 1'),
    (['--clip', 99], 'held-out episodes, 0..'),
    (['--start', 100000], 'wanted, it has'),
    (['--actions', 'fly*3'], 'no choice "fly"'),
    (['--actions', 'forward*0'], '1 or more'),
    (['--keys'], 'needs a terminal'),
    (['--replay', 'nowhere.json'], 'no such file'),
    (['--replay', WORLD/'world.json'], "but PlayRecord is kind 'play'")])
def test_mistakes_in_playing(tmp_path, capsys, args, says):
    fails(capsys, tmp_path, 'play', *args, '--out', tmp_path/'o.mp4', says=says)

@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_cuda_where_there_is_none(tmp_path, capsys):
    cuda = ('--device', 'cuda')
    fails(capsys, tmp_path, 'play', *cuda, '--out', tmp_path/'o.mp4', says='no CUDA GPU')

def test_a_film_of_another_type(tmp_path, capsys):
    avi = tmp_path/'film.avi'
    fails(capsys, tmp_path, 'play', '--out', avi, '--frames', 2, says='can write .mp4 and .gif')

def test_mistakes_in_recording(tmp_path, capsys):
    out = tmp_path/'r'
    fails(capsys, tmp_path, 'record', out, '--size', '80by48', says='wanted WIDTHxHEIGHT')

@needs_vizdoom
def test_mistakes_in_the_scenario(tmp_path, capsys):
    out = tmp_path/'r'
    fails(capsys, tmp_path, 'record', out, '--scenario', 'nowhere', says='no ViZDoom scenario')

def test_mistakes_in_training(tmp_path, capsys):
    run_in = ('--data', DATA, '--out', tmp_path/'t')
    no_tokenizer = ('--tokenizer', tmp_path)
    fails(capsys, tmp_path, 'train', 'world', *run_in, *no_tokenizer, says='no such file')
    fails(capsys, tmp_path, 'train', 'world', *run_in, *no_tokenizer, '--preset', 'huge',
          says='no preset "huge"')
    no_steps = ('train', 'tokenizer', *run_in, '--steps', 0)
    fails(capsys, tmp_path, *no_steps, says='--steps 0: at least 1')

def test_mistakes_in_distilling(tmp_path, capsys):
    distill = ('distill', 'consistency', '--data', DATA, '--out', tmp_path/'d')
    fails(capsys, tmp_path, *distill, '--compile', says='leave it out')
    fails(capsys, tmp_path, *distill, '--solver-step', 1, says='a step in [0, 1)')

def test_what_must_be_given(capsys):
    for words in (['train', 'world'], ['evaluate'], ['record'], ['train']):
        with pytest.raises(SystemExit) as left: cli.main(words)
        assert left.value.code == 2
    assert 'required' in capsys.readouterr().err

# ---- spoilt files

@pytest.fixture
def world(tmp_path):
    shutil.copytree(WORLD, tmp_path/'w')
    return tmp_path/'w'

def test_spoilt_weights(tmp_path, world, capsys):
    weights = world/'world.safetensors'
    whole = weights.read_bytes()
    def refused(says):
        fails(capsys, tmp_path, 'play', world, '--out', tmp_path/'o.mp4', says=says)

    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:size])
        refused('not a whole safetensors file')
    weights.write_bytes((world/'tokenizer.safetensors').read_bytes())
    refused('model of another shape')
    weights.unlink()
    refused('no such weights')

INFO = json.loads((WORLD/'world.json').read_text())
TWO_CHOICES = dict(name='x', fields=dict(a=['p', 'q']))

@pytest.mark.parametrize('change, says', [
    (dict(shape=INFO['shape'] | dict(layers=5)), 'another shape'),
    (dict(shape=INFO['shape'] | dict(colour=3)), 'not a valid DiTConfig: unknown field "colour"'),
    (dict(colour=3), 'not a valid WorldInfo: unknown field "colour"'),
    (dict(kind='tokenizer'), "kind 'tokenizer', but WorldInfo is kind 'world'"),
    (dict(format=9), 'format 9, but WorldInfo is format 1'),
    (dict(action_space=TWO_CHOICES), 'action space has'),
    (dict(action_space=dict(name='x')), 'not a valid'),
    (dict(shape=INFO['shape'] | dict(layers='8')), "layers is a whole number, not '8'"),
    (dict(shape=INFO['shape'] | dict(layers=10**9)), 'layers is 1000000000, wanted 1 to'),
    (dict(fps='20'), 'fps is a number'),
    (dict(weights='0' * 16), 'not the weights that world.json tells of'),
    (dict(sampling=dict(colour=3)), 'nfd-ref --debug play ... shows where')])
def test_a_spoilt_world_json(tmp_path, world, capsys, change, says):
    (world/'world.json').write_text(json.dumps(INFO | change))
    fails(capsys, tmp_path, 'play', world, '--out', tmp_path/'o.mp4', says=says)

@pytest.mark.parametrize('words', [
    'play --seed -1', 'play --seed 4294967296', 'play --frames 0', 'play --steps 0',
    'play --frames 2147483648', 'record OUT --seed -1', 'record OUT --size 100000x8',
    'record OUT --size 4x8', 'record OUT --workers 2147483648', 'record OUT --workers 0',
    'record OUT --length 0', 'record OUT --episodes 0', 'record OUT --crf 99',
    'branches OUT --states 0', 'bench --frames 0', 'bench --threads 0', 'bench --steps -3',
    'evaluate --out OUT.json --seed -1', 'release A B OUT --clips 0',
    'train tokenizer --data D --out OUT --lr -1', 'train tokenizer --data D --out OUT --lr 1e38',
    'train tokenizer --data D --out OUT --lr nan', 'train world --data D --out OUT --tokenizer T '
    '--seed -1', 'train world --data D --out OUT --tokenizer T --length 0',
    'train idm --data D --out OUT --steps 0', 'distill consistency --data D --out OUT --clips 0'])
def test_numbers_beyond_reason_are_refused_before_work_begins(tmp_path, capsys, words):
    args = [word.replace('OUT', str(tmp_path/'out')) for word in words.split()]
    flag = next(word for word in reversed(args) if word.startswith('--'))
    fails(capsys, tmp_path, *args, says=flag)

def test_debug_shows_where(world):
    (world/'world.json').write_text(json.dumps(INFO | dict(sampling=dict(colour=3))))
    with pytest.raises(TypeError, match='colour'): cli.main(['--debug', 'play', str(world)])

def test_half_a_world_json(tmp_path, world, capsys):
    file = world/'world.json'
    without_fps = {key: value for key, value in INFO.items() if key != 'fps'}
    for text, says in (
        (json.dumps(without_fps), 'not a valid WorldInfo: no field "fps"'),
        (json.dumps([INFO]), 'a JSON object is wanted'),
        ('{"format": 1,', 'not readable as JSON')):
        file.write_text(text)
        fails(capsys, tmp_path, 'play', world, '--out', tmp_path/'o.mp4', says=says)

@pytest.fixture
def video(tmp_path):
    shutil.copytree(DATA, tmp_path/'video')
    return tmp_path/'video'

@pytest.mark.slow
def test_spoilt_video(tmp_path, video, capsys):
    name = json.loads((video/'dataset.json').read_text())['test'][0]
    mp4 = video/f'{name}.mp4'
    npz = video/f'{name}.npz'
    whole = mp4.read_bytes()
    frames = video_info(mp4)[0]
    def refused(says):
        fails(capsys, tmp_path, 'play', '--data', video, '--out', tmp_path/'o.mp4', says=says)

    for size in (0, 1000, len(whole) // 2):
        mp4.write_bytes(whole[:size])
        refused(mp4.name)
    mp4.write_text('this is not a video')
    refused('not a readable video')

    mp4.write_bytes(whole)
    npz.write_bytes(b'PK\x03\x04 no')
    refused('not a readable .npz')
    np.savez(npz, actions=np.zeros((7, 1), int))
    refused('7 actions')
    np.savez(npz, actions=np.full((frames, 1), 11))
    refused('out of range')

    (video/'dataset.json').unlink()
    refused('no such file')

def test_another_action_space_is_refused(tmp_path, capsys):
    space = ActionSpace('two', dict(go=('no', 'yes')))
    clip = VideoFolder(DATA, 'test').clip(0, 0, 20)
    other = replace(clip, space=space, actions=np.zeros((20, 1), int))
    folder = tmp_path/'v'
    save_episode(folder, 'a', other)
    write_json(folder/'dataset.json', dict(fps=20, action_space=asdict(space), test=['a']))
    fails(capsys, tmp_path, 'play', '--data', folder, '--out', tmp_path/'o.mp4',
          says='this world of "doom9"')

# ---- a spoilt machine

def test_no_codec(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(av, 'codecs_available', av.codecs_available - {'libx264'})
    fails(capsys, tmp_path, 'play', '--frames', 2, '--out', tmp_path/'o.mp4',
          says='cannot encode H.264')

@pytest.fixture
def small_disk(tmp_path):
    "A folder with room for 24 kB."
    if os.name != 'posix' or os.geteuid() != 0:
        pytest.skip('mounting a small file system needs root')
    disk = tmp_path/'small'
    disk.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=24k', 'tmpfs', str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('cannot mount a tmpfs here')
    yield disk
    subprocess.run(['umount', str(disk)])

@pytest.mark.slow
def test_full_disk(tmp_path, small_disk, capsys):
    full = 'No space left'
    gif = small_disk/'o.gif'
    mp4 = small_disk/'o.mp4'
    fails(capsys, small_disk, 'play', '--frames', 40, '--out', mp4, says=full)
    fails(capsys, small_disk, 'play', '--frames', 4, '--out', tmp_path/'o.mp4', '--gif', gif,
          says=full)
    fails(capsys, small_disk, 'release', WORLD, WORLD, small_disk/'w', '--clips', 4, says=full)

# ---- measure

@pytest.mark.slow
def test_bench(tmp_path, capsys):
    engines = ('--engines', 'rolling,static')
    out = works(capsys, 'bench', *engines, '--frames', 2, '--device', 'cpu',
                '--out', tmp_path/'b.json')
    lines = out.splitlines()
    record = json.loads(lines[-1])
    assert lines[0].startswith('commit')
    assert record == json.loads((tmp_path/'b.json').read_text())
    assert record['card']['timed_frames'] == 2
    assert list(record['ladder']) == ['rolling', 'static']
    for row in record['ladder'].values():
        assert row['step']['median'] >= row['latents']['median'] > row['roofline_ms'] > 0

@pytest.mark.slow
def test_bench_on_busy_cores(tmp_path, capsys):
    out = works(capsys, 'bench', '--busy', '--engines', 'static', '--frames', 3, '--device', 'cpu',
                '--out', tmp_path/'b.json')
    record = json.loads(out.splitlines()[-1])
    assert record == json.loads((tmp_path/'b.json').read_text())
    assert list(record['ladder']) == [f'static, {count} busy' for count in range(3)]
    for row in record['ladder'].values(): assert row['worst'] >= row['step']['median'] > 0
    assert record['ladder']['static, 0 busy']['kept'] == 1

def test_an_engine_may_be_asked_for_in_half_precision():
    assert engine_kwargs('native+bf16') == dict(engine='native', dtype=torch.bfloat16)
    assert engine_kwargs('native') == dict(engine='native')
    assert engine_kwargs(None) == {}

@pytest.mark.parametrize('args, says', [
    (['--engines', 'warp'], 'no engine "warp"'),
    (['--engines', 'static+fp4'], 'after + comes bf16'),
    (['--engines', 'rolling+bf16'], 'bfloat16'),
    (['--preset', 'nfd_1b'], 'no preset'),
    (['--window', 8], 'goes with --preset'),
    (['--quality'], 'goes with --speculate'),
    (['--frames', 0], 'at least 1')])
def test_mistakes_in_bench(tmp_path, capsys, args, says):
    fails(capsys, tmp_path, 'bench', *args, says=says)

@pytest.mark.slow
def test_evaluate_measures_and_keeps_a_row(tmp_path, capsys, monkeypatch):
    quick = evaluation.QUICK
    evaluation.Setting(WORLD, DATA, BRANCHES, JUDGE, quick)     # it fits what ships
    less = replace(quick, clips=2, states=1, depths=(1, 4), long=50, gaps=(2,), walk=20)
    monkeypatch.setattr(evaluation, 'QUICK', less)
    report_file = tmp_path/'r.json'
    board_file = tmp_path/'board.json'
    out = works(capsys, 'evaluate', '--quick', '--engine', 'native', '--out', report_file,
                '--leaderboard', board_file, '--name', 'shipped')
    report = json.loads(report_file.read_text())
    board = json.loads(board_file.read_text())
    assert 'counterfactual' in out
    assert report['protocol'] == json.loads(json.dumps(asdict(less)))
    assert report['metrics']['quality']['recorded']['psnr']['mean'][0] == 60
    assert report['world']['engine'] == 'native'
    assert report['world']['dtype'] == 'float32'
    assert (tmp_path/'r.png').exists()
    assert [row['world'] for row in board] == ['shipped']
    assert board[0]['data'] == VideoFolder(DATA, 'test').hash()
    assert '--engine native' in board[0]['command']
    fails(capsys, tmp_path, 'evaluate', '--out', report_file, says='give another name')

@pytest.mark.slow
def test_evaluate_leaves_out_what_own_video_has_not(tmp_path, capsys, monkeypatch):
    quick = replace(evaluation.QUICK, clips=2, long=100)
    monkeypatch.setattr(evaluation, 'QUICK', quick)
    shipped = VideoFolder(DATA, 'test')
    import_clips(tmp_path/'own', [shipped.clip(e, 0, 70) for e in range(2)])
    evaluate = ('evaluate', STUDENT, '--quick', '--data', tmp_path/'own')      # the faster one
    out = works(capsys, *evaluate, '--out', tmp_path/'r.json')
    found = json.loads((tmp_path/'r.json').read_text())['metrics']
    assert set(found) == {'quality', 'changed', 'texture_distance', 'wrong_action_ratio', 'drift'}
    assert 'PSNR of changed pixels, dB (' in out
    assert found['drift']['world'][0]['obeyed'] == []
    for line in ('left out: idm_distance, actions (give --idm, from nfd-ref train idm)',
                 'left out: counterfactual, memory (give --branches, from nfd-ref branches)',
                 'left out: stuck (give --walks, from nfd-ref walks)',
                 'left out: walled (give --walks and --depth, from nfd-ref depths and train idm)'):
        assert line in out.splitlines()
    monkeypatch.setattr(evaluation, 'QUICK', replace(quick, long=50))
    out = works(capsys, *evaluate, '--idm', spoilt_judge(tmp_path), '--out', tmp_path/'s.json')
    assert 'hardly better than by chance' in out

def spoilt_judge(folder):
    "A judge that was never trained."
    trained, _ = load_model(JUDGE, JudgeInfo, InverseDynamics, IDMConfig)
    torch.manual_seed(0)
    about = read_record(JUDGE/'idm.json', JudgeInfo)
    save_model(folder/'judge', InverseDynamics(trained.cfg), about)
    return folder/'judge'

@pytest.mark.parametrize('args, says', [
    (['--out', 'r.txt'], 'name it .json'),
    (['--branches', DATA], 'not of branches'),
    (['--idm', WORLD], 'no such file'),
    (['--i3d', 'none.pt'], 'i3d_torchscript.pt'),
    (['--vgg', WORLD/'world.json'], 'not a TorchScript file'),
    (['--data', BRANCHES.parent], 'no such file')])
def test_mistakes_in_evaluate(tmp_path, capsys, monkeypatch, args, says):
    monkeypatch.chdir(tmp_path)
    fails(capsys, tmp_path, 'evaluate', '--out', tmp_path/'n.json', *args, says=says)

# ---- from the simulator

@needs_vizdoom
@pytest.mark.slow
def test_branches_repeat_the_shipped_ones(tmp_path, capsys):
    from nfd_ref.doom import load_branches
    works(capsys, 'branches', tmp_path/'b', '--states', 1)
    states, _ = load_branches(tmp_path/'b')
    shipped_states, _ = load_branches(BRANCHES)
    made, turn = states[0]
    shipped, _ = shipped_states[0]
    assert len(turn) == 68
    for one, other in zip(made, shipped):
        for name in ('pose', 'actions', 'frames'):
            assert (getattr(one, name) == getattr(other, name)).all()

@needs_vizdoom
def test_mistakes_in_branches(tmp_path, capsys):
    out = tmp_path/'c'
    fails(capsys, tmp_path, 'branches', out, '--states', 0, says='at least 1')
    fails(capsys, tmp_path, 'branches', out, '--data', BRANCHES, says='no usable test episode')

@needs_vizdoom
@pytest.mark.slow
def test_build_goes_from_nothing_to_a_world_that_plays(tmp_path, capsys, monkeypatch):
    tiny = RECIPES['tiny']
    stage, = tiny.stages
    stage = replace(stage, episodes=2)      # one of them held out
    behind_mistakes = replace(stage, mistakes=.5)
    new_recording = replace(behind_mistakes, seed=2, tours=.2, flattest=.9)
    stages = stage, behind_mistakes, new_recording
    monkeypatch.setitem(RECIPES, 'tiny', replace(tiny, stages=stages, clips=4))
    monkeypatch.setattr('nfd_ref.release.NOISES', (0., .1))
    out = tmp_path/'b'
    build = ('build', out, '--recipe', 'tiny')
    def stop(*args): raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr('nfd_ref.release.release', stop)
        code, _, _ = run(capsys, *build)
    assert code and not (out/'play').exists()

    one, two, three = (read_record(out/f'world_{i}'/'final'/'world.json', WorldInfo)
                       for i in (1, 2, 3))
    assert (one.init, two.init, three.init) == (None, one.weights, two.weights)
    assert one.data == two.data != three.data
    assert three.before == two.history()
    made = VideoFolder(out/'video_2').info.recorder
    assert (made['tours'], made['flattest']) == (.2, .9)

    final = out/'world_3'/'final'
    weights = (final/'world.safetensors').read_bytes()
    shutil.rmtree(final)
    works(capsys, *build)                   # goes on where it was stopped
    assert (final/'world.safetensors').read_bytes() == weights
    assert (out/'play'/'world.safetensors').read_bytes() == weights
    works(capsys, 'play', out/'play', '--frames', 3, '--out', tmp_path/'o.mp4')
    assert video_info(tmp_path/'o.mp4')[0] == 3
    fails(capsys, tmp_path, *build, says='choose a new folder')
