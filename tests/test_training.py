"Training from the outside: killed and resumed, in two processes, spoilt. Tiny models on the shipped video."
import json, os, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file
from nfd_ref.tokenizer import TokenizerConfig
from nfd_ref.training import TrainConfig, fit, train_tokenizer
from nfd_ref.tokenizer import Tokenizer
from nfd_ref.video import VideoFolder, save_episode

DATA = Path(__file__).parents[1]/'data'/'my_way_home'
SCRIPT = '''
import sys, torch
from nfd_ref.training import *
from nfd_ref.tokenizer import *
from nfd_ref.video import *
from nfd_ref.transformer import *
kind, out, data, steps, batch, resume = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), len(sys.argv) > 6
torch.set_num_threads(1)
cfg, shape = TrainConfig(steps=steps, batch=batch, warmup=2, save_every=5, log_every=1, lr=1e-3), TokenizerConfig(latents=4, width=8, mults=(1, 1, 1))
videos, kw = VideoFolder(data, 'train'), dict(resume=resume, progress=False)
if kind == 'tokenizer': train_tokenizer(out, videos, cfg, shape, **kw)
else:
    torch.manual_seed(0); tok = Tokenizer(shape)
    for p in tok.parameters(): torch.nn.init.normal_(p, std=.1)
    train_world(out, videos, tok, cfg, DiTConfig(d=32, layers=2, heads=2, rope=(4, 6, 6)), length=4, **kw)
'''

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "Two short episodes cut from the shipped set, in a folder of their own."
    d = tmp_path_factory.mktemp('video'); v = VideoFolder(DATA, 'train')
    for i in range(2): save_episode(d, f'ep_{i}', v.clip(i, 0, 60))
    (d/'dataset.json').write_text(json.dumps(dict(v.meta, test=['ep_1'])))
    return d

def run(tmp_path, *args, launcher=()):
    script = tmp_path/'script.py'; script.write_text(SCRIPT)
    env = dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    return subprocess.Popen([sys.executable, *launcher, str(script), *map(str, args)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def log(folder): return [json.loads(l) for l in (Path(folder)/'log.jsonl').read_text().splitlines()]

def test_killed_and_resumed_is_bit_equal(tmp_path, data):
    p = run(tmp_path, 'world', tmp_path/'whole', data, 30, 4); out, _ = p.communicate(timeout=300); assert p.returncode == 0, out
    p = run(tmp_path, 'world', tmp_path/'killed', data, 30, 4)
    t = time.time()
    while not list((tmp_path/'killed').glob('step_*')) and time.time() - t < 120: time.sleep(.02)
    p.send_signal(signal.SIGKILL); p.communicate()
    done = sorted((tmp_path/'killed').glob('step_*'))[-1].name
    assert done < 'step_000030', 'the run ended before it could be killed: the test proves nothing'
    p = run(tmp_path, 'world', tmp_path/'killed', data, 30, 4, 'resume'); out, _ = p.communicate(timeout=300); assert p.returncode == 0, out
    for f in ('model', 'ema', 'optimizer'):
        a, b = (load_file(tmp_path/r/'step_000030'/f'{f}.safetensors') for r in ('whole', 'killed'))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), f
    assert [l['step'] for l in log(tmp_path/'killed')] == list(range(1, 31))
    assert [l['loss'] for l in log(tmp_path/'killed')] == [l['loss'] for l in log(tmp_path/'whole')]

@pytest.mark.parametrize('kind', ['world', 'tokenizer'])
def test_two_processes_equal_one(tmp_path, data, kind):
    p = run(tmp_path, kind, tmp_path/'one', data, 6, 4); out, _ = p.communicate(timeout=300); assert p.returncode == 0, out
    p = run(tmp_path, kind, tmp_path/'two', data, 6, 4, launcher=('-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_port=29577')); out, _ = p.communicate(timeout=300); assert p.returncode == 0, out
    one, two = ([l['loss'] for l in log(tmp_path/r)] for r in ('one', 'two'))
    assert one == pytest.approx(two, rel=2e-4)
    a, b = (load_file(tmp_path/r/'final'/f'{kind}.safetensors') for r in ('one', 'two'))
    assert all(torch.allclose(a[k].float(), b[k].float(), atol=2e-3) for k in a)

def test_a_run_is_not_overwritten_nor_resumed_as_another(tmp_path, data):
    v, shape, kw = VideoFolder(data, 'train'), TokenizerConfig(latents=2, width=8, mults=(1, 1)), dict(progress=False)
    cfg = TrainConfig(steps=2, batch=2)
    train_tokenizer(tmp_path/'t', v, cfg, shape, limit=20, **kw)
    before = (tmp_path/'t'/'log.jsonl').read_bytes()
    with pytest.raises(FileExistsError, match='already holds a run'): train_tokenizer(tmp_path/'t', v, cfg, shape, limit=20, **kw)
    with pytest.raises(ValueError, match='begun with another lr'): train_tokenizer(tmp_path/'t', v, TrainConfig(steps=2, batch=2, lr=5.), shape, limit=20, resume=True, **kw)
    assert (tmp_path/'t'/'log.jsonl').read_bytes() == before

def test_nan_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    torch.manual_seed(0); m = Tokenizer(TokenizerConfig(latents=2, width=8, mults=(1, 1)))
    def loss(model, batch, gen, part, device):
        y = model.posterior(torch.full((1, 3, 8, 8), batch))[0].mean()
        return y * y, {}
    with pytest.raises(FloatingPointError, match='step_000004'):
        fit(tmp_path/'r', m, loss, lambda step: float('nan') if step == 5 else .5, TrainConfig(steps=10, batch=1, save_every=2), progress=False)
    assert all(t.isfinite().all() for t in load_file(tmp_path/'r'/'step_000004'/'model.safetensors').values())
    assert not list((tmp_path/'r').glob('.*'))
