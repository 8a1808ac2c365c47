"""Feed it anything: every loader and command line, with inputs that someone might really have.

    python -m tests.chaos.fuzz --seconds 60 --seed 0

An input may be refused in one line or work. A traceback of another kind, a hang, a crash or half a
file is a finding; it is printed with the number that makes the same input again."""
import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT/'data'
PATIENCE = 20           # seconds for one input ...
AT_WORK = 8             # ... and for a command that may work for hours, then it is stopped
WORKS = ('train', 'distill', 'record', 'build', 'branches', 'walks', 'depths', 'bench', 'evaluate',
         'play', 'compare', 'pilots', 'endure', 'views', 'decoders', 'prompts')

# ---- things that are well

def make_kit(folder):
    "A small one of everything that is read from disk; {name: folder or file}."
    import torch
    from nfd_ref.judge import IDMConfig, InverseDynamics
    from nfd_ref.storage import (
        JudgeInfo, TokenizerInfo, WorldInfo, read_record, save_model, write_json)
    from nfd_ref.tokenizer import Tokenizer, TokenizerConfig
    from nfd_ref.transformer import DiT, DiTConfig
    from nfd_ref.video import VideoFolder, import_clips

    shipped = VideoFolder(DATA/'my_way_home', 'test')
    import_clips(folder/'video', [shipped.clip(0, 0, 40), shipped.clip(1, 0, 30)], test=1)

    torch.manual_seed(0)
    cfg = DiTConfig(d=32, layers=1, heads=2, rope=(4, 6, 6), latents=4, window=4)
    about = read_record(DATA/'world'/'world.json', WorldInfo)
    save_model(folder/'world', DiT(cfg), replace(about, shape=asdict(cfg)))
    small = TokenizerConfig(latents=4, width=8, mults=(1, 1, 1))
    about = read_record(DATA/'world'/'tokenizer.json', TokenizerInfo)
    save_model(folder/'world', Tokenizer(small), replace(about, shape=asdict(small)))
    idm = IDMConfig(width=8)
    about = read_record(DATA/'idm'/'idm.json', JudgeInfo)
    save_model(folder/'judge', InverseDynamics(idm), replace(about, shape=asdict(idm)))

    shutil.copy(DATA/'world'/'report.json', folder/'report.json')
    write_json(folder/'board.json', json.loads((DATA/'leaderboard.json').read_text()))

    little_run(folder/'run')
    return folder

def open_video(kit):
    from nfd_ref.video import VideoFolder
    for split in ('train', 'test'):
        videos = VideoFolder(kit/'video', split)
        for e in range(len(videos)): videos.clip(e)
        videos.clip(0, 3, 9)

def open_world(kit):
    from nfd_ref.streaming import World
    from nfd_ref.video import VideoFolder
    world = World.load(kit/'world', engine='static', device='cpu')
    world.reset(VideoFolder(DATA/'my_way_home', 'test').clip(0, 0, 4), 0)
    world.step(world.space.rest)

def open_judge(kit):
    from nfd_ref.judge import IDMConfig, InverseDynamics, watch
    from nfd_ref.storage import JudgeInfo, load_model
    from nfd_ref.video import VideoFolder
    idm, _ = load_model(kit/'judge', JudgeInfo, InverseDynamics, IDMConfig)
    watch(idm, VideoFolder(DATA/'my_way_home', 'test').clip(0, 0, 12).frames)

def open_report(kit):
    from nfd_ref.evaluation import leaderboard_row, report_page
    from nfd_ref.storage import Report, read_record
    report = read_record(kit/'report.json', Report)
    leaderboard_row(report, 'x', 'y')
    report_page(report)

def open_run(kit):
    from nfd_ref.files import read_log
    little_run(kit/'run', resume=True)
    read_log(kit/'run'/'log.jsonl')

def little_run(folder, **kwargs):
    "Two steps of a training of nearly nothing."
    import torch
    from nfd_ref.loop import TrainConfig, fit

    class Point(torch.nn.Module):
        def __init__(self, cfg=None):
            super().__init__()
            self.cfg = cfg
            self.at = torch.nn.Parameter(torch.ones(3))

    def loss(model, batch, numbers, part, device): return (model.at - batch).pow(2).mean(), {}

    cfg = TrainConfig(steps=2, batch=2, save_every=1, log_every=1)
    return fit(folder, Point(), loss, lambda step: torch.zeros(3), cfg, progress=False, **kwargs)

LOADERS = dict(video=open_video, world=open_world, judge=open_judge, run=open_run)

# ---- and what may happen to them

NASTY = (None, True, -1, 0, 1, 1.5, 10**9, 2**63, 1e999, -1e308, float('nan'), '', '8', 'none',
         [], [[]], {}, ['a', 1], '../../etc', '\x1b[31mred\x1b[0m', 'x' * 3000,
         '\u202e\U0001f600', '\0')

def places(value, path=()):
    "All paths into a JSON value."
    yield path
    if isinstance(value, dict): items = value.items()
    elif isinstance(value, list): items = enumerate(value[:20])
    else: return
    for key, inner in items: yield from places(inner, (*path, key))

def spoil_json(rng, data):
    "Another value, a key more or less, somewhere."
    value = json.loads(data)
    path = rng.choice(list(places(value)))
    if not path: return json.dumps(rng.choice(NASTY)).encode()
    holder = value
    for key in path[:-1]: holder = holder[key]
    deed = rng.randrange(4)
    if deed == 0: del holder[path[-1]]
    elif deed == 1 and isinstance(holder, dict): holder[rng.choice(('x', '', 'format'))] = 1
    else: holder[path[-1]] = rng.choice(NASTY)
    return json.dumps(value).encode()

def spoil_bytes(rng, data):
    "Cut, flipped, doubled, emptied, or something else altogether."
    deed = rng.randrange(6)
    if deed == 0: return data[:rng.randrange(len(data) + 1)]
    if deed == 1: return b''
    if deed == 2: return data + data
    if deed == 3: return rng.choice((b'\x80\x04.', b'PK\x03\x04', b'{}', b'null', b'\xff' * 99))
    spoilt = bytearray(data)
    first = len(data) if rng.random() < .5 else min(len(data), 200)     # often in the header
    for _ in range(rng.choice((1, 1, 4, 50))):
        if spoilt: spoilt[rng.randrange(first)] ^= 1 << rng.randrange(8)
    return bytes(spoilt)

def spoil(rng, folder):
    "One file of a folder, now and then two; gives what was done, for the report."
    files = sorted(path for path in folder.rglob('*') if path.is_file() and path.name != '.lock')
    done = []
    for path in rng.sample(files, rng.choice((1, 1, 1, 2))):
        done.append(path.name)
        if rng.random() < .05:
            path.unlink()
            continue
        data = path.read_bytes()
        as_json = path.suffix == '.json' and rng.random() < .8
        path.write_bytes((spoil_json if as_json else spoil_bytes)(rng, data))
    return ' and '.join(done)

# ---- command lines

WORTHS = ('-1', '0', '1', '2', '1e9', str(2**31), str(2**63), 'nan', '-inf', '', ' ', 'x', '3x',
          '80x48', '100000x8', '../..', '/dev/null', '/proc/self/mem', '\x1b[31m', 'noop*3',
          'forward*-1', 'forward*99999999999', 'native+fp8', 'x' * 5000, '\udcff')

def odd_command(rng, folder, kit):
    "A command with some flags, each with a value that someone might type."
    from nfd_ref.cli import COMMANDS
    from nfd_ref.command import parser
    words = rng.choice([words for words in COMMANDS if words != ('lab',)])
    found = parser()
    for word in words: found = found._subparsers._group_actions[0].choices[word]
    own = ('video', 'world', 'judge', 'run', 'report.json')
    values = (*WORTHS, *[str(kit/name) for name in own], *[str(folder/name) for name in 'ab'])
    line = list(words)
    for action in found._actions:
        if action.dest == 'help': continue
        wanted = action.required or not action.option_strings
        if not wanted and rng.random() < .75: continue
        if action.option_strings: line.append(action.option_strings[-1])
        if action.nargs != 0: line.append(rng.choice(values))
    return line

def tidy(folder):
    "Half a file is what nobody removed."
    return [path.name for path in folder.rglob('*.part*')]

# ---- one input after another

class Hang(BaseException):
    "An input that is still being chewed after `PATIENCE` seconds."

def ring(number, frame): raise Hang

def try_loader(rng, kit, folder):
    from nfd_ref.command import EXPECTED
    name = rng.choice(sorted(LOADERS))
    shutil.copytree(kit/name, folder/name)
    what = f'{name}: {spoil(rng, folder/name)}'
    try:
        LOADERS[name](folder)
    except EXPECTED as problem:
        text = str(problem)
        if not text: return what, 'says nothing'
    except Exception as problem:
        return what, f'{type(problem).__name__}: {problem}'
    return what, None

def try_command(rng, kit, folder):
    from nfd_ref.cli import main
    line = odd_command(rng, folder, kit)
    works = line[0] in WORKS
    if works: signal.alarm(AT_WORK)
    said = io.StringIO()
    os.chdir(folder)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = main(line)
    except SystemExit as stop:      # argparse's own refusal
        code = stop.code
    except Hang:
        return line, None if works else f'still going after {PATIENCE} s'
    finally:
        os.chdir(ROOT)
    text = said.getvalue()
    if code not in (0, 2, 130): return line, f'exit code {code}'
    if any(sign in text for sign in ('Traceback', 'nfd-ref --debug', '\x1b[31m')):
        return line, text[-300:]
    if tidy(folder): return line, f'left {tidy(folder)}'
    return line, None

def one(number, seed, kit, cage):
    "Input `number` of a seed; gives what it was and what is wrong, or None."
    rng = random.Random(f'{seed} {number}')
    folder = Path(tempfile.mkdtemp(dir=cage))
    attempt = rng.choice((try_loader, try_loader, try_loader, try_command))
    signal.signal(signal.SIGALRM, ring)
    signal.alarm(PATIENCE)
    try:
        return attempt(rng, kit, folder)
    except Hang:
        return attempt.__name__, f'still going after {PATIENCE} s'
    finally:
        signal.alarm(0)
        shutil.rmtree(folder, ignore_errors=True)

def work(seed, first, seconds, cage):
    "Inputs from `first` on for so many seconds; a line of JSON for each."
    kit = make_kit(Path(cage)/'kit')
    started = time.time()
    number = first
    while time.time() - started < seconds:
        print(json.dumps(dict(begins=number)), flush=True)
        what, wrong = one(number, seed, kit, cage)
        print(json.dumps(dict(number=number, what=str(what)[:200], wrong=wrong)), flush=True)
        number += 1

def fuzz(seconds, seed=0):
    """So many seconds of odd inputs, in a process of its own with a home and a temporary folder of
    its own: a crash ends that process, and the next one goes on behind the input. Gives how many
    inputs there were and the findings."""
    findings = []
    number = 0
    until = time.time() + seconds
    while time.time() < until:
        with tempfile.TemporaryDirectory() as cage:
            env = dict(os.environ, HOME=cage, TMPDIR=cage, CUDA_VISIBLE_DEVICES='')
            command = [sys.executable, '-m', 'tests.chaos.fuzz', '--work', cage, '--seed', seed,
                       '--first', number, '--seconds', max(1., until - time.time())]
            ran = subprocess.run([str(part) for part in command], cwd=ROOT, env=env,
                                 capture_output=True, text=True)
        lines = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith('{')]
        findings += [line for line in lines if line.get('wrong')]
        begun = [line['begins'] for line in lines if 'begins' in line]
        if not begun: raise RuntimeError(ran.stderr[-3000:])
        number = begun[-1] + 1
        if ran.returncode:
            findings.append(dict(number=begun[-1], what='crash', wrong=f'exit {ran.returncode}: '
                                 f'{ran.stderr[-300:]}'))
    return number, findings

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--seconds', type=float, default=60)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--first', type=int, default=0)
    parser.add_argument('--work', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.seed, args.first, args.seconds, args.work)
    else:
        count, found = fuzz(args.seconds, args.seed)
        for finding in found: print(json.dumps(finding))
        print(f'{count} inputs, {len(found)} findings')
        sys.exit(bool(found))
