"Training from the outside: killed and resumed, in two processes, spoilt. Tiny models, real video."
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nfd_ref.diffusion import generator
from nfd_ref.files import read_log
from nfd_ref.loop import Run, TrainConfig, checkpoints, claim, fit
from nfd_ref.storage import unlock
from nfd_ref.tokenizer import Tokenizer, TokenizerConfig
from nfd_ref.training import train_tokenizer, train_world
from nfd_ref.transformer import DiTConfig
from nfd_ref.video import VideoFolder, save_episode

DATA = Path(__file__).parents[1]/'data'/'my_way_home'
PATIENCE = 300                  # seconds, of a run with nothing else to do
SMALL = TokenizerConfig(latents=2, width=8, mults=(1, 1))
SCRIPT = '''
import sys
import torch
from nfd_ref.diffusion import generator
from nfd_ref.judge import *
from nfd_ref.loop import *
from nfd_ref.tokenizer import *
from nfd_ref.training import *
from nfd_ref.transformer import *
from nfd_ref.video import *

class Grouped(DiT):
    "Blocks learn at the usual rate, the rest three times as fast."
    def parameter_groups(self):
        blocks = list(self.blocks.parameters())
        rest = [p for name, p in self.named_parameters() if not name.startswith('blocks.')]
        return dict(blocks=dict(params=blocks), rest=dict(params=rest, lr=3.))

def turns(step): return ['rest'] if step % 3 == 2 else ['blocks']

kinds, out, data, steps, batch = sys.argv[1:6]
torch.set_num_threads(1)
cfg = TrainConfig(steps=int(steps), batch=int(batch), warmup=2, save_every=5, log_every=1)
videos = VideoFolder(data, 'train')
fitting = dict(resume='resume' in sys.argv, progress=False)
small = TokenizerConfig(latents=4, width=8, mults=(1, 1, 1))

def train(kind):
    folder = f'{out}/{kind}'
    if kind == 'tokenizer': return train_tokenizer(folder, videos, cfg, small, **fitting)
    if kind == 'idm': return train_idm(folder, videos, cfg, **fitting)
    torch.manual_seed(0)
    tok = Tokenizer(small)
    for p in tok.parameters(): torch.nn.init.normal_(p, std=.1)
    shape = DiTConfig(d=32, layers=2, heads=2, rope=(4, 6, 6))
    special = dict(model_cls=Grouped, learners=turns) if kind == 'turns' else {}
    train_world(folder, videos, tok, cfg, shape, length=4, **fitting, **special)

for kind in kinds.split(','): train(kind)
'''

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "Two short episodes cut from the shipped set, in a folder of their own."
    folder = tmp_path_factory.mktemp('video')
    videos = VideoFolder(DATA, 'train')
    for e in range(2): save_episode(folder, f'ep_{e}', videos.clip(e, 0, 60))
    meta = json.loads((DATA/'dataset.json').read_text())
    (folder/'dataset.json').write_text(json.dumps(dict(meta, test=['ep_1'])))
    return folder

def begin(tmp_path, kinds, *args, launcher=()):
    """Start the script with these arguments, in a process of its own. It trains one kind after the
    other, each in a folder of its name: to start a process takes longer than such a training."""
    script = tmp_path/'script.py'
    script.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, *launcher, str(script), ','.join(kinds), *map(str, args)],
        env=dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES=''),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def run(tmp_path, *args, **kwargs):
    "Run it to its end."
    process = begin(tmp_path, *args, **kwargs)
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, out

def losses(folder): return [line['loss'] for line in read_log(folder/'log.jsonl')]

def assert_equal_tensors(one, two):
    a = load_file(one)
    b = load_file(two)
    assert a.keys() == b.keys()
    for name in a: assert torch.equal(a[name], b[name]), f'{one.name}: {name}'

@pytest.mark.slow
def test_killed_and_resumed_is_bit_equal(tmp_path, data):
    kinds = ('world', 'turns', 'idm')       # the judge has dropout
    whole = tmp_path/'whole'
    killed = tmp_path/'killed'
    run(tmp_path, kinds, whole, data, 30, 4)
    for kind in kinds: kill_after_a_checkpoint(tmp_path, kind, killed, data, 30, 4)
    run(tmp_path, kinds, killed, data, 30, 4, 'resume')

    for kind in kinds:
        for name in ('model', 'ema', 'optimizer'):
            file = f'{kind}/step_000030/{name}.safetensors'
            assert_equal_tensors(whole/file, killed/file)
        steps = [line['step'] for line in read_log(killed/kind/'log.jsonl')]
        assert steps == list(range(1, 31)), kind
        assert losses(killed/kind) == losses(whole/kind)

        if kind == 'idm': continue
        moved = load_file(whole/kind/'step_000030'/'optimizer.safetensors')
        times = {name: moved[name].item() for name in moved if name.endswith('|step')}
        in_blocks = {n for name, n in times.items() if name.startswith('blocks.')}
        others = {n for name, n in times.items() if not name.startswith('blocks.')}
        assert (in_blocks, others) == (({20}, {10}) if kind == 'turns' else ({30}, {30}))

def kill_after_a_checkpoint(tmp_path, kind, out, *args):
    "Begin a run and kill it, after its first checkpoint and before its last."
    process = begin(tmp_path, [kind], out, *args)
    started = time.time()
    while not list((out/kind).glob('step_*')) and time.time() - started < PATIENCE: time.sleep(.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    last = sorted((out/kind).glob('step_*'))[-1].name
    assert last < 'step_000030', 'it ended before it could be killed: the test proves nothing'

@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, data):
    kinds = ('world', 'tokenizer', 'turns')
    two = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2')
    run(tmp_path, kinds, tmp_path/'one', data, 6, 4)
    run(tmp_path, kinds, tmp_path/'two', data, 6, 4, launcher=two)

    for kind in kinds:
        one = tmp_path/'one'/kind
        other = tmp_path/'two'/kind
        assert losses(one) == pytest.approx(losses(other), rel=2e-4), kind
        weights = 'tokenizer.safetensors' if kind == 'tokenizer' else 'world.safetensors'
        a = load_file(one/'final'/weights)
        b = load_file(other/'final'/weights)
        for name in a: assert torch.allclose(a[name].float(), b[name].float(), atol=2e-3), name

def test_a_run_is_not_overwritten_nor_resumed_as_another(tmp_path, data):
    videos = VideoFolder(data, 'train')

    def train(resume=False, **other):
        cfg = TrainConfig(steps=2, batch=2, **other)
        train_tokenizer(tmp_path/'run', videos, cfg, SMALL, 20, resume=resume, progress=False)

    train()
    log = (tmp_path/'run'/'log.jsonl').read_bytes()
    with pytest.raises(FileExistsError, match='already holds a run'): train()
    with pytest.raises(ValueError, match='begun with another lr;'): train(resume=True, lr=5.)
    assert (tmp_path/'run'/'log.jsonl').read_bytes() == log

def test_nan_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    torch.manual_seed(0)

    def loss_fn(model, batch, numbers, part, device):
        y = model.posterior(torch.full((1, 3, 8, 8), batch))[0].mean()
        return y * y, {}

    def batches(step): return float('nan') if step == 5 else .5

    cfg = TrainConfig(steps=10, batch=1, save_every=2)
    with pytest.raises(FloatingPointError, match='step_000004'):
        fit(tmp_path/'run', Tokenizer(SMALL), loss_fn, batches, cfg, progress=False)
    weights = load_file(tmp_path/'run'/'step_000004'/'model.safetensors')
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert not list((tmp_path/'run').glob('.*'))

def world(out, data, seed=0, **kwargs):
    "One step of a tiny world."
    torch.manual_seed(seed)
    tok = Tokenizer(TokenizerConfig(latents=4, width=8, mults=(1, 1, 1)))
    for p in tok.parameters(): torch.nn.init.normal_(p, std=.1)
    shape = DiTConfig(d=32, layers=2, heads=2, rope=(4, 6, 6))
    kwargs = dict(length=4, progress=False) | kwargs
    cfg = TrainConfig(steps=1, batch=2)
    return train_world(out, VideoFolder(data, 'train'), tok, cfg, shape, **kwargs)

def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).rglob('*') if path.is_file()}

def test_a_refused_world_changes_nothing(tmp_path, data):
    world(tmp_path/'run', data)
    before = contents(tmp_path/'run')
    init = tmp_path/'run'/'final'
    with pytest.raises(FileExistsError, match='already holds a run'):
        world(tmp_path/'run', data, seed=1, init=init)
    with pytest.raises(ValueError, match='begun with another tokenizer;'):
        world(tmp_path/'run', data, seed=1, resume=True)
    assert contents(tmp_path/'run') == before

    with pytest.raises(ValueError, match='no episode as long as'):
        world(tmp_path/'new', data, length=10_000)
    assert not (tmp_path/'new').exists()

def test_a_cache_whose_making_was_cut_is_made_again(tmp_path, data, monkeypatch):
    world(tmp_path/'run', data)
    good = contents(tmp_path/'run')['latents.npy']
    (tmp_path/'run'/'latents.json').unlink()                # as if killed between the two
    (tmp_path/'run'/'latents.npy').write_bytes(b'of another tokenizer')
    world(tmp_path/'run', data, resume=True)
    assert contents(tmp_path/'run')['latents.npy'] == good

def line_loss(model, batch, numbers, part, device):
    return model(torch.ones(2, 4, device=device)).square().mean(), {}

def test_ctrl_c_keeps_what_was_learnt(tmp_path):
    cfg = TrainConfig(steps=20, batch=2, warmup=1)
    def pressed(step):
        if step == 6: signal.raise_signal(signal.SIGINT)
        return step

    whole = fit(tmp_path/'whole', line(), line_loss, int, cfg, progress=False)
    with pytest.raises(KeyboardInterrupt, match='after step 7, which is kept in'):
        fit(tmp_path/'run', line(), line_loss, pressed, cfg, progress=False)
    assert [path.name for path in checkpoints(tmp_path/'run')] == ['step_000007']
    again = fit(tmp_path/'run', line(), line_loss, int, cfg, resume=True, progress=False)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name

def line():
    torch.manual_seed(0)
    return Line()

def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in (1_000_000, 999_500, 20): (tmp_path/f'step_{step:06d}').mkdir()
    found = [path.name for path in checkpoints(tmp_path)]
    assert found == ['step_000020', 'step_999500', 'step_1000000']

def test_weights_that_are_no_numbers_are_never_kept(tmp_path):
    def spoil(model, batch, numbers, part, device):
        loss, logs = line_loss(model, batch, numbers, part, device)
        with torch.no_grad(): model.weight[0, 0] = torch.inf        # the loss does not know yet
        return loss, logs
    with pytest.raises(FloatingPointError, match='the sum of all weights is'):
        fit(tmp_path/'run', line(), spoil, int, TrainConfig(steps=1), progress=False)
    assert checkpoints(tmp_path/'run') == []

@pytest.mark.parametrize('lr', [0., -1., float('nan'), float('inf')])
def test_a_rate_is_above_zero(lr):
    with pytest.raises(ValueError, match='lr is'): TrainConfig(lr=lr)

class Line(torch.nn.Linear):
    "Small enough that compiling it takes seconds."
    def __init__(self, cfg=None):
        super().__init__(4, 1)
        self.cfg = cfg

@pytest.mark.slow
def test_compiled_learns_the_same(tmp_path):
    "torch.compile may round otherwise; it must not train another model."
    def batches(step): return torch.randn(8, 4, generator=generator(0, step))

    def loss_fn(model, batch, numbers, part, device):
        return (model(batch[part]) - batch[part].sum(1, keepdim=True)).square().mean(), {}

    cfg = TrainConfig(steps=60, batch=8, lr=.05, warmup=1, log_every=1)
    for name, compiled in (('plain', False), ('compiled', True)):
        torch.manual_seed(0)
        fit(tmp_path/name, Line(), loss_fn, batches, replace(cfg, compile=compiled), progress=False)
    plain = losses(tmp_path/'plain')
    assert losses(tmp_path/'compiled') == pytest.approx(plain, rel=1e-4)
    assert plain[-1] < .5 * plain[0]

def learn(out, **kwargs):
    "A run of two steps, in this process."
    def loss(model, batch, numbers, part, device): return model(batch[part]).pow(2).mean(), {}
    def batches(step): return torch.ones(4, 3)
    cfg = TrainConfig(steps=2, batch=4, warmup=1, **kwargs)
    model = torch.nn.Linear(3, 1)
    model.cfg = None
    run = Run(out, model, cfg)
    run.begin({}, False)
    run.advance(loss, batches)
    unlock(out)
    return run

def test_one_process_trains_in_two_precisions(tmp_path):
    assert learn(tmp_path/'half', bf16=True).accelerator.mixed_precision == 'bf16'
    assert learn(tmp_path/'single').accelerator.mixed_precision == 'no'

def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    claim(tmp_path, dict(train={}, info={}), resume=False)
    unlock(tmp_path)
    (tmp_path/'.latents.999999999.part.npy').write_bytes(b'half')
    (tmp_path/'.step_000005.999999999.part').mkdir()
    alive = tmp_path/f'.latents.{os.getpid()}.part.npy'
    alive.write_bytes(b'being written')
    claim(tmp_path, dict(train={}, info={}), resume=True)
    unlock(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [alive.name, 'config.json']
