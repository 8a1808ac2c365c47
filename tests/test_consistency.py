"Consistency distillation from the outside: the exact answer, the cache as oracle, refused, spoilt and resumed. Tiny models on the shipped video."
import json, math, shutil
from dataclasses import replace
from pathlib import Path
import pytest, torch
from torch import nn
from nfd_ref.cli import main
from nfd_ref.consistency import ConsistencyConfig, distill_consistency, look_back, normalised, present, slow_time, tangent
from nfd_ref.diffusion import add_noise, per_frame, to_x0
from nfd_ref.streaming import World
from nfd_ref.tokenizer import load_tensors, save_model
from nfd_ref.training import TrainConfig
from nfd_ref.transformer import DiT, DiTConfig
from nfd_ref.video import VideoFolder, read_json, save_episode

DATA = Path(__file__).parents[1]/'data'
TINY = DiTConfig(d=32, layers=2, heads=2, rope=(4, 6, 6), window=4)
QUICK, WAY = TrainConfig(steps=4, batch=2, lr=1e-3, warmup=1, weight_decay=0., log_every=1, save_every=2), ConsistencyConfig(blocks=(0, 1), warmup=2)

def noisy_dit(cfg=TINY, seed=0):
    torch.manual_seed(seed); m = DiT(cfg)
    for p in m.parameters(): nn.init.normal_(p, std=.1)
    return m

@pytest.fixture(scope='module')
def videos(tmp_path_factory):
    d = tmp_path_factory.mktemp('video'); v = VideoFolder(DATA/'my_way_home', 'train')
    for i in range(2): save_episode(d, f'ep_{i}', v.clip(i, 0, 60))
    (d/'dataset.json').write_text(json.dumps(dict(v.meta, test=['ep_1'])))
    return VideoFolder(d, 'train')

def teacher(folder, cfg=TINY):
    about = read_json(DATA/'world'/'world.json')
    save_model(folder, 'world', noisy_dit(cfg), {k: about[k] for k in ('action_space', 'fps', 'size')})
    for f in ('tokenizer.json', 'tokenizer.safetensors'): shutil.copy(DATA/'world'/f, folder/f)
    return folder

@pytest.mark.parametrize('seed', [1, 2])
def test_cold_start_reaches_the_exact_map(seed):
    "Anisotropic Gaussian in three dimensions; the student never sees the answer."
    w = torch.tensor([.2, .7, 2.]).view(3, 1, 1); spread = lambda t: ((1 - per_frame(t))**2 * w**2 + per_frame(t)**2).sqrt()
    class Gain(nn.Module):
        def __init__(self): super().__init__(); self.net = nn.Sequential(nn.Linear(9, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 9))
        def forward(self, x, t):
            k = math.pi * t[..., None] * torch.arange(1, 5)
            return (self.net(torch.cat([t[..., None], k.cos(), k.sin()], -1)).unflatten(-1, (3, 3)) @ x.flatten(2)[..., None]).view_as(x)
    torch.manual_seed(seed); net, g = Gain(), torch.Generator().manual_seed(seed); opt = torch.optim.Adam(net.parameters(), 3e-3)
    def draw(b, t): return add_noise(w * torch.randn(b, 1, 3, 1, 1, generator=g), torch.randn(b, 1, 3, 1, 1, generator=g), t)
    def error(t):
        x = draw(2000, t); exact = w / spread(t) * x
        with torch.no_grad(): return ((to_x0(x, net(x, t), t) - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()).item()
    levels = [torch.full((2000, 1), l) for l in (.1, .5, .9, .99)]
    assert max(map(error, levels)) > .3
    for i in range(1500):
        opt.param_groups[0]['lr'] = 3e-3 * (1 - i / 1500)
        t = torch.sigmoid(1.6 * torch.randn(512, 1, generator=g)); x = draw(512, t); V = (per_frame(t) - (1 - per_frame(t)) * w**2) / spread(t)**2 * x
        with torch.no_grad(): move = normalised(tangent(net, x, t, V)[1], .1)[0]
        v = net(x, t); opt.zero_grad(); (v - v.detach() - move).pow(2).mean().backward(); opt.step()
    assert max(map(error, levels)) < .02

def test_present_equals_the_rolling_cache():
    m, g = noisy_dit(), torch.Generator().manual_seed(0)
    z, x = torch.randn(2, 2, 9, 8, 6, 10, generator=g); t, a = torch.rand(2, 9, generator=g), torch.randint(-1, 9, (2, 9, 1), generator=g); tc = .3 * torch.rand(2, 9, generator=g)
    with torch.no_grad():
        fast, cache = present(m, x, t, a, look_back(m, z, tc, a)), m.new_cache()
        for i in range(9):
            k = slice(i, i + 1); assert torch.allclose(m(x[:, k], t[:, k], a[:, k], cache), fast[:, k], atol=1e-4), i
            m(z[:, k], tc[:, k], a[:, k], cache, write=1)

def test_slow_time_keeps_the_network():
    m = noisy_dit(); s = slow_time(m); g = torch.Generator().manual_seed(0)
    x, t, a = torch.randn(2, 4, 8, 6, 10, generator=g), torch.rand(2, 4, generator=g), torch.zeros(2, 4, 1, dtype=torch.long)
    assert (s.time[0].weight[:, 0] == 0).all() and all(torch.equal(p, q) for (n, p), q in zip(m.named_parameters(), s.parameters()) if not n.startswith('time'))
    assert m.time[0].weight[:, 0].abs().min() > 0        # the teacher itself is not touched

def test_stopped_and_resumed_is_bit_equal(tmp_path, videos):
    at = teacher(tmp_path/'teacher'); run = lambda name, **kw: distill_consistency(tmp_path/name, at, videos, QUICK, WAY, length=6, progress=False, **kw)
    whole = run('whole')
    def stop(model, step):
        if step == 4: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): run('stopped', on_save=stop)
    assert [d.name for d in (tmp_path/'stopped').glob('step_*')] == ['step_000002']
    again = run('stopped', resume=True)
    assert all(torch.equal(p, q) for p, q in zip(whole.state_dict().values(), again.state_dict().values()))
    log = [json.loads(l) for l in (tmp_path/'stopped'/'log.jsonl').read_text().splitlines()]
    assert [l['step'] for l in log] == [1, 2, 3, 4] and {'tangent', 'grad_norm', 'D', 'G'} <= log[0].keys()

def test_nan_stops_and_keeps_the_checkpoint(tmp_path, videos, monkeypatch):
    at, plain, bad = teacher(tmp_path/'teacher'), DiT.latents, []
    monkeypatch.setattr(DiT, 'latents', lambda self, y: plain(self, y) * (float('nan') if bad else 1))
    with pytest.raises(FloatingPointError, match='step_000002'): distill_consistency(tmp_path/'run', at, videos, QUICK, WAY, length=6, progress=False, on_save=lambda m, s: bad.append(s))
    assert all(torch.isfinite(v).all() for f in (tmp_path/'run'/'step_000002').glob('*.safetensors') for v in load_tensors(f).values())

def test_command_distils_a_playable_world_and_refuses_others(tmp_path, videos, capsys):
    teacher(tmp_path/'teacher', replace(TINY, layers=8))
    args = ['distill', 'consistency', '--teacher', str(tmp_path/'teacher'), '--data', str(videos.folder), '--out', str(tmp_path/'run'), '--steps', '2', '--batch', '2', '--clips', '1', '--float32']
    assert main(args) == 0
    info = json.loads((tmp_path/'run'/'final'/'world.json').read_text()); tried, chosen = info['sampling_trial'], info['sampling']
    w = World.load(tmp_path/'run'/'final', device='cpu'); assert w.sampler == 'consistency' and w.steps == chosen['steps'] and {t['steps'] for t in tried} == {4, 2, 1}
    assert any(t['psnr'] == max(x['psnr'] for x in tried if x['context_noise'] == chosen['context_noise']) and t['steps'] == w.steps for t in tried)      # the best of what was tried
    w.reset(videos.clip(0, 0, 8)); assert w.step(1).shape == (48, 80, 3)
    assert main(args) == 2 and 'already holds a run' in capsys.readouterr().err
    assert main(args[:-1] + ['--compile']) == 2 and 'leave it out' in capsys.readouterr().err
    teacher(tmp_path/'other', replace(TINY, latents=4, layers=8)); args[3], args[7] = str(tmp_path/'other'), str(tmp_path/'new')
    assert main(args) == 2 and 'the teacher has latents 4' in capsys.readouterr().err and not (tmp_path/'new').exists()
