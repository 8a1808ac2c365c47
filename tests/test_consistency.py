"""Consistency distillation from the outside: the exact answer, the cache as oracle, refused, spoilt
and resumed. Tiny models on the shipped video."""
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from nfd_ref.cli import main
from nfd_ref.consistency import (
    ConsistencyConfig, Distiller, distill_consistency, normalised, slow_time, tangent)
from nfd_ref.diffusion import add_noise, generator, per_frame, to_x0
from nfd_ref.storage import WorldInfo, load_tensors, read_record
from nfd_ref.streaming import World
from nfd_ref.training import TrainConfig
from nfd_ref.transformer import DiT, DiTConfig, look_back, present
from tiny import noisy_dit, two_episodes, world_folder

DATA = Path(__file__).parents[1]/'data'
TINY = DiTConfig(d=32, layers=2, heads=2, rope=(4, 6, 6), window=4)
QUICK = TrainConfig(
    steps=4, batch=2, lr=1e-3, warmup=1, weight_decay=0., log_every=1, save_every=2)
METHOD = ConsistencyConfig(blocks=(0, 1), warmup=2)

@pytest.fixture(scope='module')
def videos(tmp_path_factory): return two_episodes(tmp_path_factory.mktemp('video'))

def teacher(folder, cfg=TINY): return world_folder(folder, cfg)

# ---- the exact answer

WIDTHS = torch.tensor([.2, .7, 2.]).view(3, 1, 1)

def spread(t): return ((1 - per_frame(t))**2 * WIDTHS**2 + per_frame(t)**2).sqrt()

def gaussian(t, gen):
    "Points of the Gaussian, noised to levels t [b, 1]."
    shape = (len(t), 1, 3, 1, 1)
    x0 = WIDTHS * torch.randn(shape, generator=gen)
    return add_noise(x0, torch.randn(shape, generator=gen), t)

class Gain(nn.Module):
    "v = A(t) x, with A [3, 3] from an MLP of t."
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(9, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(),
                                 nn.Linear(64, 9))

    def forward(self, x, t):
        angles = math.pi * t[..., None] * torch.arange(1, 5)
        features = torch.cat([t[..., None], angles.cos(), angles.sin()], -1)
        matrix = self.net(features).unflatten(-1, (3, 3))
        return (matrix @ x.flatten(2)[..., None]).view_as(x)

@torch.no_grad()
def worst_error(net, gen):
    "Largest relative error of x - t v against the exact map, over four levels."
    errors = []
    for level in (.1, .5, .9, .99):
        t = torch.full((2000, 1), level)
        x = gaussian(t, gen)
        exact = WIDTHS / spread(t) * x
        off = to_x0(x, net(x, t), t) - exact
        errors.append((off.pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()).item())
    return max(errors)

@pytest.mark.long                      # 09_consistency reaches such a map in every run
@pytest.mark.parametrize('seed', [1, 2])
def test_cold_start_reaches_the_exact_map(seed):
    "Anisotropic Gaussian in three dimensions; the student never sees the answer."
    torch.manual_seed(seed)
    net = Gain()
    gen = generator(seed, 0)
    assert worst_error(net, gen) > .3

    steps = 1500
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for i in range(steps):
        optimizer.param_groups[0]['lr'] = 3e-3 * (1 - i / steps)
        t = torch.sigmoid(1.6 * torch.randn(512, 1, generator=gen))
        x = gaussian(t, gen)
        teacher_v = (per_frame(t) - (1 - per_frame(t)) * WIDTHS**2) / spread(t)**2 * x
        with torch.no_grad(): pull, _ = normalised(tangent(net, x, t, teacher_v)[1], .1)
        v = net(x, t)
        optimizer.zero_grad()
        (v - v.detach() - pull).pow(2).mean().backward()
        optimizer.step()
    assert worst_error(net, gen) < .02

# ---- the network

def two_copies(seed):
    "Context and its levels, the present and its levels, actions: two clips of nine frames."
    gen = generator(seed, 0)
    context, x = torch.randn(2, 2, 9, 8, 6, 10, generator=gen)
    t = torch.rand(2, 9, generator=gen)
    context_level = .3 * torch.rand(2, 9, generator=gen)
    return context, context_level, x, t, torch.randint(-1, 9, (2, 9, 1), generator=gen)

def test_present_equals_the_rolling_cache():
    dit = noisy_dit(TINY)
    context, context_level, x, t, actions = two_copies(0)
    cache = dit.new_cache()
    with torch.no_grad():
        at_once = present(dit, x, t, actions, look_back(dit, context, context_level, actions))
        for i in range(9):
            now = slice(i, i + 1)
            alone = dit(x[:, now], t[:, now], actions[:, now], cache, write=0)
            assert torch.allclose(alone, at_once[:, now], atol=1e-4), i
            dit(context[:, now], context_level[:, now], actions[:, now], cache, write=1)

@pytest.mark.parametrize('draft', (2, 3, 9))
def test_present_equals_drafts_behind_the_rolling_cache(draft):
    "Frames of one draft see each other's noise, and the context before their draft only."
    dit = noisy_dit(TINY)
    context, context_level, x, t, actions = two_copies(1)
    past = look_back(dit, context, context_level, actions)
    with torch.no_grad():
        at_once = present(dit, x, t, actions, past, draft=draft)
        for first in range(0, 9, draft):
            now = slice(first, first + draft)
            clip = torch.cat([context[:, :first], x[:, now]], 1)
            levels = torch.cat([context_level[:, :first], t[:, now]], 1)
            whole = dit(clip, levels, actions[:, :now.stop])
            assert torch.allclose(whole[:, first:], at_once[:, now], atol=1e-4), first

def test_slow_time_keeps_the_network():
    dit = noisy_dit(TINY)
    smooth = slow_time(dit)
    assert (smooth.time[0].weight[:, 0] == 0).all()
    assert dit.time[0].weight[:, 0].abs().min() > 0     # the teacher itself is not touched
    kept = dict(smooth.named_parameters())
    for name, p in dit.named_parameters():
        if not name.startswith('time'): assert torch.equal(p, kept[name]), name

def test_heads_learn_faster_than_the_student():
    groups = Distiller(replace(METHOD, shape=TINY)).parameter_groups()
    assert {name: group['lr'] for name, group in groups.items()} == {'student': 1., 'heads': 10.}
    alone = Distiller(replace(METHOD, shape=TINY, adversarial=0.)).parameter_groups()
    assert list(alone) == ['student']

# ---- a run

def test_stopped_and_resumed_is_bit_equal(tmp_path, videos):
    folder = teacher(tmp_path/'teacher')
    def run(name, **kwargs):
        return distill_consistency(
            tmp_path/name, folder, videos, QUICK, METHOD, length=6, progress=False, **kwargs)
    def stop(model, step):
        if step == 4: raise KeyboardInterrupt

    whole = run('whole')
    with pytest.raises(KeyboardInterrupt): run('stopped', on_save=stop)
    assert [d.name for d in (tmp_path/'stopped').glob('step_*')] == ['step_000002']
    again = run('stopped', resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name

    lines = (tmp_path/'stopped'/'log.jsonl').read_text().splitlines()
    log = [json.loads(line) for line in lines]
    assert [row['step'] for row in log] == [1, 2, 3, 4]
    assert {'tangent', 'grad_norm', 'D', 'G'} <= log[0].keys()

def test_nan_stops_and_keeps_the_checkpoint(tmp_path, videos, monkeypatch):
    folder = teacher(tmp_path/'teacher')
    healthy = DiT.latents
    saved = []      # from the first checkpoint on, the network's output is spoilt
    def poisoned(self, y): return healthy(self, y) * (float('nan') if saved else 1)

    monkeypatch.setattr(DiT, 'latents', poisoned)
    with pytest.raises(FloatingPointError, match='step_000002'):
        distill_consistency(tmp_path/'run', folder, videos, QUICK, METHOD, length=6,
                            progress=False, on_save=lambda model, step: saved.append(step))
    files = list((tmp_path/'run'/'step_000002').glob('*.safetensors'))
    assert files
    for file in files:
        for tensor in load_tensors(file).values(): assert torch.isfinite(tensor).all(), file

# ---- the command

def command(tmp_path, videos, teacher='teacher', out='run', *flags):
    return main([
        'distill', 'consistency', '--teacher', str(tmp_path/teacher),
        '--data', str(videos.folder), '--out', str(tmp_path/out),
        '--steps', '2', '--batch', '2', '--clips', '1', '--float32', *flags])

@pytest.mark.slow
def test_command_distils_a_playable_world(tmp_path, videos):
    teacher(tmp_path/'teacher', replace(TINY, layers=8))
    assert command(tmp_path, videos) == 0

    info = read_record(tmp_path/'run'/'final'/'world.json', WorldInfo)
    world = World.load(tmp_path/'run'/'final', device='cpu')
    assert world.sampler == 'consistency'
    assert world.steps == info.sampling['steps']
    assert {tried['steps'] for tried in info.sampling_trial} == {4, 2, 1}

    noise = info.sampling['context_noise']      # the best of what was tried with this noise
    same_noise = [tried for tried in info.sampling_trial if tried['context_noise'] == noise]
    best = max(tried['psnr'] for tried in same_noise)
    assert any(t['psnr'] == best and t['steps'] == world.steps for t in same_noise)

    world.reset(videos.clip(0, 0, 8))
    assert world.step(1).shape == (48, 80, 3)

    first = str(tmp_path/'run'/'final')
    assert command(tmp_path, videos, 'teacher', 'more', '--init', first, '--draft', '4') == 0
    more = read_record(tmp_path/'more'/'final'/'world.json', WorldInfo)
    assert more.init == info.weights
    assert (info.method['draft'], more.method['draft']) == (1, 4)

def test_command_refuses(tmp_path, videos, capsys):
    teacher(tmp_path/'teacher')
    teacher(tmp_path/'thin', replace(TINY, latents=4, layers=8))
    (tmp_path/'taken').mkdir()
    (tmp_path/'taken'/'config.json').write_text('{"train": {}, "info": {}}')

    assert command(tmp_path, videos, 'teacher', 'new', '--compile') == 2
    assert 'leave it out' in capsys.readouterr().err
    assert command(tmp_path, videos, 'teacher', 'new', '--draft', '0') == 2
    assert 'draft' in capsys.readouterr().err
    assert command(tmp_path, videos, 'thin', 'new') == 2
    assert 'the teacher has latents 4' in capsys.readouterr().err
    assert command(tmp_path, videos, 'teacher', 'new') == 2     # of two layers only
    assert 'the teacher has blocks 0..1' in capsys.readouterr().err
    assert not (tmp_path/'new').exists()
    teacher(tmp_path/'deep', replace(TINY, layers=8))
    assert command(tmp_path, videos, 'deep', 'taken') == 2
    assert 'already holds a run' in capsys.readouterr().err
    assert [path.name for path in (tmp_path/'taken').iterdir()] == ['config.json']
