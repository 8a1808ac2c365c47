"""Distribution matching from the outside: closed forms, who learns, the cache as oracle, kill and
resume, refusals. Tiny models on the shipped video."""
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from nfd_ref.arms import ArmsProtocol, Watch, arms_of, compare_arms
from nfd_ref.cli import main
from nfd_ref.diffusion import add_noise, generator, time_grid
from nfd_ref.distribution_matching import (
    Matching, MatchingConfig, distill_distribution, pull)
from nfd_ref.loop import TrainConfig
from nfd_ref.storage import (
    WorldInfo, load_model, load_tensors, read_record)
from nfd_ref.streaming import World
from nfd_ref.tokenizer import load_tokenizer
from nfd_ref.trajectories import (
    Calls, ClipLevels, distill_ode, load_trajectories, make_trajectories, regression_loss, start_of,
    train_teacher, trajectories, velocity_of)
from nfd_ref.transformer import DiT, DiTConfig
from nfd_ref.video import VideoFolder
from tiny import noisy_dit, two_episodes, world_folder

DATA = Path(__file__).parents[1]/'data'
TINY = DiTConfig(d=32, layers=2, heads=2, rope=(4, 6, 6), window=6)
BOTH_WAYS = replace(TINY, chunk=6)
QUICK = TrainConfig(
    steps=6, batch=2, lr=1e-3, warmup=1, weight_decay=0., log_every=1, save_every=3)
CALLS = Calls(given=2)
METHOD = MatchingConfig(shape=TINY, scores=BOTH_WAYS, calls=CALLS, ratio=2)

@pytest.fixture(scope='module')
def videos(tmp_path_factory): return two_episodes(tmp_path_factory.mktemp('video'))

@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    return world_folder(tmp_path_factory.mktemp('teacher')/'final', BOTH_WAYS)

def clips(b=2, f=6):
    gen = generator(0, 0)
    return (torch.randn(b, f, 8, 6, 10, generator=gen),
            torch.randint(0, 9, (b, f, 1), generator=gen))

# ---- closed forms

def gaussian_x0(x, t, mean, std):
    "E[x0 | x_t = x] where x0 is N(mean, std^2); t a number."
    return mean + (1 - t) * std**2 / ((1 - t)**2 * std**2 + t**2) * (x - (1 - t) * mean)

@pytest.mark.parametrize('t', [.1, .5, .9])
def test_pull_is_the_gradient_of_the_reverse_kl(t):
    "Of two Gaussians at level t, by autograd of the closed form, in float64."
    mean, std = torch.tensor([.7, 1.3], dtype=torch.float64, requires_grad=True)
    real_mean, real_std = -.4, .6
    variance = (1 - t)**2 * std**2 + t**2
    real_variance = (1 - t)**2 * real_std**2 + t**2
    offset = (1 - t) * (mean - real_mean)
    kl = (.5 * (real_variance / variance).log()
          + (variance + offset**2) / (2 * real_variance) - .5)
    exact = torch.autograd.grad(kl, (mean, std))

    z = torch.randn(400_000, 2, dtype=torch.float64, generator=generator(0, 0))
    made = (mean + std * z[:, 0]).detach()
    x = (1 - t) * made + t * z[:, 1]
    g = pull(made.view(-1, 1, 1, 1, 1),
             gaussian_x0(x, t, mean.detach(), std.detach()).view(-1, 1, 1, 1, 1),
             gaussian_x0(x, t, real_mean, real_std).view(-1, 1, 1, 1, 1), normalise=False).flatten()
    weight = (1 - t)**2 / t**2          # of two scores from two guesses, and dx_t / d made
    assert torch.allclose((weight * g).mean(), exact[0], rtol=.02)
    assert torch.allclose((weight * g * z[:, 0]).mean(), exact[1], rtol=.05)

def test_the_loss_has_the_pull_as_its_gradient(monkeypatch):
    x0, actions = clips()
    matching = Matching(METHOD)
    matching.critic.load_state_dict(noisy_dit(BOTH_WAYS, 1).state_dict())
    made = torch.randn(2, 4, 8, 6, 10, requires_grad=True)
    pulls = []

    def kept(*args):
        pulls.append(pull(*args))
        return pulls[0]

    monkeypatch.setattr('nfd_ref.distribution_matching.pull', kept)
    monkeypatch.setattr(matching, 'from_video', lambda *args: made)
    draws = METHOD.draw(x0, generator(1, 0))
    loss, logs = matching(noisy_dit(BOTH_WAYS, 2), x0, actions, draws, 'student')
    loss.backward()
    assert logs['gap'] > 0
    assert torch.allclose(made.grad, pulls[0] / made.numel(), atol=1e-7)

def test_the_student_learns_alone():
    x0, actions = clips()
    teacher = noisy_dit(BOTH_WAYS, 2)
    for context in ('real', 'rollout'):
        matching = Matching(replace(METHOD, context=context))
        for part, seed in ((matching.student, 0), (matching.critic, 1)):
            part.load_state_dict(noisy_dit(part.cfg, seed).state_dict())
        draws = METHOD.draw(x0, generator(1, 0))
        matching(teacher, x0, actions, draws, 'student')[0].backward()
        for other in (matching.critic, teacher):
            assert all(p.grad is None for p in other.parameters())
        assert matching.student.final.weight.grad.abs().max() > 0

def test_equal_critic_and_teacher_pull_nothing():
    x0, actions = clips()
    matching = Matching(METHOD)
    matching.student.load_state_dict(noisy_dit(TINY).state_dict())
    matching.critic.load_state_dict(noisy_dit(BOTH_WAYS, 2).state_dict())
    for context in ('real', 'rollout'):
        matching.cfg = replace(METHOD, context=context)
        draws = METHOD.draw(x0, generator(1, 0))
        loss, logs = matching(noisy_dit(BOTH_WAYS, 2), x0, actions, draws, 'student')
        assert logs['gap'] == 0 and loss == 0

def test_critic_learns_alone():
    x0, actions = clips()
    for context in ('real', 'rollout'):
        matching = Matching(replace(METHOD, context=context))
        for part, seed in ((matching.student, 0), (matching.critic, 1)):
            part.load_state_dict(noisy_dit(part.cfg, seed).state_dict())
        draws = METHOD.draw(x0, generator(1, 0))
        matching(None, x0, actions, draws, 'critic')[0].backward()
        assert all(p.grad is None for p in matching.student.parameters())
        assert matching.critic.final.weight.grad.abs().max() > 0

# ---- the student's two contexts

@pytest.mark.parametrize('chunk', [1, 2])
def test_rollout_is_what_the_world_plays(chunk):
    "With the world's own noise, to rounding: what is trained is what is played."
    cfg = replace(TINY, chunk=chunk)
    info = read_record(DATA/'world'/'world.json', WorldInfo)
    tok = load_tokenizer(DATA/'world')
    clip = VideoFolder(DATA/'my_way_home', 'train').clip(0, 100, 106)
    world = World(noisy_dit(cfg), tok, clip.space, info.size, device='cpu', engine='rolling',
                  sampler='consistency', **CALLS.sampling)
    world.reset(clip[:2])
    frames = []
    decode = world.decode
    world.decode = lambda latents: frames.append(latents) or decode(latents)
    for i in range(2, 6, chunk):
        if chunk == 1: world.step(clip.actions[i])
        else: world.step_chunk(clip.actions[i:i + chunk])

    matching = Matching(replace(METHOD, shape=cfg, context='rollout'))
    matching.student.load_state_dict(world.model.state_dict())
    x0 = tok.encode(clip.frames)[None].clone()
    actions = torch.from_numpy(clip.actions)[None]
    draws = METHOD.draw(x0, generator(0, 0))
    def noise(kind, first=2): return torch.cat([world.noise(i, kind) for i in range(first, 6)], 1)
    draws.noise = noise(0)
    draws.past_noise = noise(1, first=0)
    draws.fresh = torch.stack([noise(2 + j) for j in range(3)], 1)
    draws.last = torch.tensor([3])
    made = matching.from_rollout(start_of(x0, actions, draws.past_noise, CALLS), draws)
    assert torch.allclose(made, torch.cat(frames, 1), atol=1e-4)

def test_a_later_chunk_does_not_reach_an_earlier_one():
    x0, actions = clips()
    student = noisy_dit(replace(TINY, chunk=2))
    start = start_of(x0, actions, torch.randn_like(x0), CALLS)
    x = torch.randn(2, 4, 8, 6, 10)
    t = torch.tensor([.5, .5, .9, .9]).expand(2, 4)
    other = x.clone()
    other[:, 2:] += 1
    before, after = (velocity_of(student, z, t, start) for z in (x, other))
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.equal(before[:, 2:], after[:, 2:])

def test_cache_equals_the_masked_pass():
    "Past chunks at the context level in one pass: what the cache gives, chunk by chunk."
    x0, actions = clips()
    student = noisy_dit(replace(TINY, chunk=2))
    cache = student.new_cache()
    level = torch.full((2, 6), .1)
    past = add_noise(x0, torch.randn_like(x0), level)
    for i in range(0, 6, 2):
        own = slice(i, i + 2)
        t = level[:, :i + 2].clone()
        t[:, own] = .7
        x = past[:, :i + 2].clone()
        x[:, own] = torch.randn(2, 2, 8, 6, 10)
        whole = student(x, t, actions[:, :i + 2])[:, own]
        alone = student(x[:, own], t[:, own], actions[:, own], cache, write=0)
        assert torch.allclose(whole, alone, atol=1e-4)
        student(past[:, own], level[:, own], actions[:, own], cache, write=2)

# ---- trajectories

def test_trajectories_of_a_gaussian_are_exact():
    "The velocity of N(0, s^2) is known; Euler on a fine grid ends at s times the noise."
    class Exact(nn.Module):
        def forward(self, x, t, actions):
            t = t[..., None, None, None]
            variance = (1 - t)**2 * .25 + t**2
            return (t - (1 - t) * .25) / variance * x
    x0, actions = clips()
    start = start_of(x0, actions, torch.randn_like(x0), CALLS)
    noise = torch.randn(2, 4, 8, 6, 10)
    path = trajectories(Exact(), start, noise, CALLS, steps=800)
    assert torch.equal(path[:, 0], noise)
    assert torch.allclose(path[:, -1], .5 * noise, rtol=.02, atol=1e-3)
    for i, t in enumerate(CALLS.grid.tolist()):
        spread = ((1 - t)**2 * .25 + t**2)**.5
        assert torch.allclose(path[:, i], spread * noise, rtol=.02, atol=1e-3)

def test_grid_of_the_calls_lies_on_the_solver_s():
    fine = time_grid(48, 3.).float()
    assert torch.allclose(fine[::12], CALLS.grid)

def test_regression_ignores_what_is_there_already():
    x0, actions = clips()
    path = torch.randn(2, 5, 4, 8, 6, 10)
    batch = dict(x=path, frames=x0[:, :2], actions=actions)
    student = noisy_dit(TINY)
    end = torch.full((2, 4), 4)
    assert regression_loss(student, batch, end, CALLS) == 0
    end[:, 0] = 0
    assert regression_loss(student, batch, end, CALLS) > 0

def test_clip_levels_are_one_for_a_clip():
    t, weight = ClipLevels()(500, 12, generator(0, 0))
    for row, learnt in zip(t, weight.bool()):
        assert 1 <= (~learnt).sum() <= 6
        assert len(row[learnt].unique()) == 1 and row[~learnt].max() <= .3

# ---- runs

def test_stopped_and_resumed_is_bit_equal(tmp_path, videos, teacher):
    def run(name, context, **kwargs):
        method = MatchingConfig(calls=CALLS, context=context, ratio=2)
        return distill_distribution(
            tmp_path/name, teacher, videos, replace(QUICK, accumulate=2), method, length=6,
            latents=tmp_path/'latents', progress=False, **kwargs)
    def stop(model, step):
        if step == 6: raise KeyboardInterrupt

    for context in ('real', 'rollout'):
        whole = run(f'whole {context}', context)
        with pytest.raises(KeyboardInterrupt): run(f'stopped {context}', context, on_save=stop)
        again = run(f'stopped {context}', context, resume=True)
        for name, value in whole.state_dict().items():
            assert torch.equal(value, again.state_dict()[name]), name
        log = (tmp_path/f'stopped {context}'/'log.jsonl').read_text().splitlines()
        lines = [json.loads(line) for line in log]
        assert [line['step'] for line in lines] == [1, 2, 3, 4, 5, 6]
        assert ['student' in line for line in lines] == [False, False, True] * 2

def test_accumulated_is_the_whole_batch(tmp_path, videos, teacher):
    "Four clips at once or one after another: the same weights, to rounding."
    found = []
    for passes in (1, 4):
        cfg = replace(QUICK, steps=3, batch=4, accumulate=passes)
        found.append(distill_distribution(
            tmp_path/f'{passes}', teacher, videos, cfg, MatchingConfig(calls=CALLS, ratio=2),
            length=6, latents=tmp_path/'latents', progress=False))
    for a, b in zip(*(model.parameters() for model in found)):
        assert torch.allclose(a, b, atol=2e-4)

def test_trajectories_go_on_and_know_their_teacher(tmp_path, videos, teacher):
    def make(folder=teacher, **kwargs):
        return make_trajectories(tmp_path/'paths', folder, videos, 4, CALLS, 6, steps=8, batch=2,
                                 progress=False, **kwargs)
    make()
    whole, info = load_trajectories(tmp_path/'paths')
    (tmp_path/'paths'/'part_00001.safetensors').unlink()
    with pytest.raises(ValueError, match='1 of 2 files are not made yet'):
        load_trajectories(tmp_path/'paths')
    make()
    again, _ = load_trajectories(tmp_path/'paths', info.teacher)
    assert torch.equal(whole['x'], again['x'])

    other = world_folder(tmp_path/'other', BOTH_WAYS, 5)
    with pytest.raises(ValueError, match='trajectories of another teacher'): make(other)
    with pytest.raises(ValueError, match='trajectories of another teacher'):
        distill_ode(tmp_path/'ode', other, tmp_path/'paths', QUICK, progress=False)
    with pytest.raises(ValueError, match='trajectories of another seed'): make(seed=1)
    assert not (tmp_path/'ode').exists()

def test_from_teacher_to_a_student_that_plays(tmp_path, videos):
    home = DATA/'world'
    cfg = replace(QUICK, steps=2)
    teach = train_teacher(tmp_path/'t', videos, home, load_tokenizer(home), cfg, TINY, 6,
                          progress=False)
    assert teach.cfg.chunk == 6
    with pytest.raises(ValueError, match='can teach, not be played'):
        World.load(tmp_path/'t'/'final')
    make_trajectories(tmp_path/'paths', tmp_path/'t'/'final', videos, 4, CALLS, 6, 8, 2,
                      latents=tmp_path/'t'/'latents', progress=False)
    distill_ode(tmp_path/'ode', tmp_path/'t'/'final', tmp_path/'paths', cfg, progress=False)
    distill_distribution(
        tmp_path/'d', tmp_path/'t'/'final', videos, cfg, MatchingConfig(calls=CALLS),
        start=tmp_path/'ode'/'final', length=6, latents=tmp_path/'t'/'latents', progress=False)
    _, info = load_model(tmp_path/'d'/'final', WorldInfo, DiT, DiTConfig)
    assert info.method['context'] == 'real' and 'start' in info.teacher
    world = World.load(tmp_path/'d'/'final', device='cpu')
    assert (world.steps, world.sampler, world.chunk) == (4, 'consistency', 1)
    world.reset(videos.clip(0, 0, 8))
    assert world.step(1).shape == (48, 80, 3)

# ---- refusals

def command(*words):
    return main(['distill', 'distribution', '--steps', '2', '--batch', '2', '--accumulate', '1',
                 '--length', '6', '--given', '2', *map(str, words)])

def test_command_refuses(tmp_path, videos, teacher, capsys):
    data = ('--data', videos.folder)
    def refused(*words, says, out='new'):
        assert command(*data, '--out', tmp_path/out, *words) == 2
        said = capsys.readouterr().err
        assert says in said and said.count('\n') == 1, said
        if out == 'new': assert not (tmp_path/'new').exists()

    keys = world_folder(tmp_path/'keys', replace(BOTH_WAYS, actions=(9, 2)))
    wide = world_folder(tmp_path/'wide', replace(BOTH_WAYS, grid=(6, 12)))
    fat = world_folder(tmp_path/'fat', replace(TINY, d=64, heads=4))
    refused('--teacher', keys, says='the teacher has actions (9, 2)')
    refused('--teacher', wide, says='the teacher has grid (6, 12)')
    refused('--teacher', teacher, '--start', fat, says='the start has d 64, the teacher 32')
    refused('--teacher', teacher, '--context', 'dream', says='one of real, rollout')
    refused('--teacher', teacher, '--chunk', '4', says='chunks of 4')
    refused('--teacher', teacher, '--length', '9', says='this teacher sees 6 frames')
    refused('--teacher', tmp_path/'none', says='no such')
    (tmp_path/'taken').mkdir()
    (tmp_path/'taken'/'config.json').write_text('{"train": {}, "info": {}}')
    refused('--teacher', teacher, says='already holds a run', out='taken')

def test_a_shape_must_hold_whole_chunks():
    with pytest.raises(ValueError, match='whole chunks of 4'): replace(TINY, chunk=4)
    with pytest.raises(ValueError, match='3 given frames are not whole chunks of 2'):
        MatchingConfig(shape=replace(TINY, chunk=2), calls=Calls(given=3))

def test_a_watched_run_keeps_its_best_checkpoint(tmp_path, videos, teacher):
    watch = Watch(tmp_path/'run', videos, DATA/'idm', teacher, CALLS.sampling,
                  ArmsProtocol(clips=1, context=2, length=4))
    distill_distribution(
        tmp_path/'run', teacher, videos, replace(QUICK, steps=2, save_every=1),
        MatchingConfig(calls=CALLS), length=6, progress=False, on_save=watch)
    best = watch.keep_best(tmp_path/'run'/'final')
    _, info = load_model(tmp_path/'run'/'final', WorldInfo, DiT, DiTConfig)
    assert [line['step'] for line in info.metrics['watched']] == [1, 2]
    assert info.metrics['kept'] == best
    kept = load_tensors(tmp_path/'run'/'watched'/f'step_{best:06d}.safetensors')
    final = load_tensors(tmp_path/'run'/'final'/'world.safetensors')
    for name, value in kept.items(): assert torch.equal(value, final[name]), name

# ---- the arms

@pytest.mark.slow
def test_arms_are_measured_and_kept(tmp_path, teacher, monkeypatch):
    (tmp_path/'runs'/'teacher').mkdir(parents=True)
    shutil.copytree(teacher, tmp_path/'runs'/'teacher'/'final')
    protocol = ArmsProtocol(clips=2, length=2, states=1, depths=(1,), starts=1, seeds=2, long=100)
    where = (tmp_path/'runs', DATA/'world', DATA/'distilled', DATA/'my_way_home', DATA/'branches',
             DATA/'idm')
    assert 'teacher, 48 calls' in arms_of(*where[:3])
    record = compare_arms(tmp_path/'a.json', *where, protocol, progress=False)
    assert record.rows.keys() == arms_of(*where[:3]).keys()
    assert 'walks' not in record.rows['teacher, 48 calls']
    written = read_record(tmp_path/'a.json', type(record)).rows
    monkeypatch.setattr('nfd_ref.arms.Bench.measure', None)     # nothing is measured again
    assert compare_arms(tmp_path/'a.json', *where, protocol, progress=False).rows == written
