"""The token baseline from the outside: orders, cache, bottlenecks, spoilt folders, killed and
resumed. Tiny models on the shipped video."""
import json
import math
import shutil
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from nfd_ref import comparison, evaluation, release, token_world
from nfd_ref.autoregression import (
    ACTION, ORDERS, TokensConfig, TokenTransformer, held_out_nats, make_order, nats, order_mask,
    order_of, train_tokens)
from nfd_ref.cli import main
from nfd_ref.codes import (
    FSQ, Codebook, CodesConfig, CodeTokenizer, load_codes, train_codes, with_trunk)
from nfd_ref.diffusion import generator
from nfd_ref.loop import TrainConfig
from nfd_ref.storage import (
    CodesInfo, ComparisonRecord, Report, TokensInfo, read_record, save_model)
from nfd_ref.streaming import START_NOISE
from nfd_ref.token_world import TokenWorld, choose
from tiny import two_episodes

DATA = Path(__file__).parents[1]/'data'
SMALL = CodesConfig(latents=4, width=8, mults=(1, 1, 1), levels=(5, 4))
TINY = TokensConfig(d=32, layers=2, heads=2, rope=(4, 6, 6), window=4, vocabulary=20)
QUICK = TrainConfig(
    steps=4, batch=2, lr=1e-3, warmup=1, weight_decay=0., log_every=1, save_every=2)


def noisy(cfg=TINY, seed=0):
    "A transformer whose answers depend on all that it sees."
    torch.manual_seed(seed)
    model = TokenTransformer(cfg)
    for p in model.parameters(): nn.init.normal_(p, std=.3)
    return model.eval()


@pytest.fixture(scope='module')
def videos(tmp_path_factory): return two_episodes(tmp_path_factory.mktemp('video'), 40)


@pytest.fixture(scope='module')
def tokenizer(videos, tmp_path_factory):
    "The folder of a tokenizer of codes."
    out = tmp_path_factory.mktemp('codes')/'run'
    train_codes(out, videos, QUICK, SMALL, progress=False)
    return out/'final'


@pytest.fixture
def world_folder(videos, tokenizer, tmp_path):
    "A playable folder with random weights."
    codes = read_record(tokenizer/'codes.json', CodesInfo)
    info = TokensInfo(
        shape=asdict(TINY), train={}, data='', action_space=asdict(videos.space), fps=videos.fps,
        size=videos.size, length=4, order='raster', codes=codes.weights)
    save_model(tmp_path/'world', noisy(), info)
    for suffix in ('json', 'safetensors'):
        shutil.copy(tokenizer/f'codes.{suffix}', tmp_path/'world')
    return tmp_path/'world'


# ---- orders

@pytest.mark.parametrize('name, passes, elements', [
    ('raster', 60, 61), ('diagonal', 15, 66), ('rows', 6, 70)])
def test_an_order_makes_every_code_once(name, passes, elements):
    order = order_of(name, (6, 10))
    assert order.passes == passes
    assert len(order) == elements
    made = [int(order.asks[e]) for i in range(passes) for e in order.elements(i)
            if order.answers[e]]
    assert sorted(made) == list(range(60))
    fed = torch.cat([order.elements(i) for i in range(passes + 1)])
    assert sorted(fed.tolist()) == list(range(elements))        # and all is fed, leftovers last
    assert {int(place) for place in order.source if place != ACTION} == set(range(60))


@pytest.mark.parametrize('name', ORDERS)
def test_no_answer_sees_its_own_code_or_a_later_one(name):
    "Change the code of one place: answers of passes up to its own must not move, others do."
    model = noisy(replace(TINY, order=name))
    order = model.order()
    numbers = torch.Generator().manual_seed(0)
    codes = torch.randint(20, (1, 3, 6, 10), generator=numbers)
    actions = torch.randint(9, (1, 3, 1), generator=numbers)
    made = order.fed[:60]
    for place in (0, 9, 10, 34, 59):
        other = codes.clone()
        other[0, 1].view(-1)[place] = (other[0, 1].view(-1)[place] + 7) % 20
        with torch.no_grad(): moved = (model(other, actions) - model(codes, actions)).abs().amax(-1)
        assert moved[0, 0].max() == 0
        before = made <= made[place]
        assert moved[0, 1][before].max() == 0
        if not before.all(): assert moved[0, 1][~before].max() > 1e-4
        assert moved[0, 2].min() > 0


@pytest.mark.parametrize('name', ORDERS)
def test_an_action_is_seen_by_its_frame_and_those_after(name):
    model = noisy(replace(TINY, order=name))
    codes = torch.zeros(1, 3, 6, 10, dtype=torch.long)
    actions = torch.zeros(1, 3, 1, dtype=torch.long)
    other = actions.clone()
    other[0, 1] = 5
    with torch.no_grad(): moved = (model(codes, other) - model(codes, actions)).abs().amax(-1)
    assert moved[0, 0].max() == 0
    assert moved[0, 1:].min() > 0


def test_raster_is_plain_causality():
    order = order_of('raster', (6, 10))
    assert torch.equal(order_mask(order, 2, 2), torch.ones(122, 122).tril().bool())
    assert not order_mask(order, 3, 2)[-1, :61].any()           # out of the window


def test_an_order_that_asks_too_early_is_refused():
    place = torch.arange(4).view(2, 2)
    with pytest.raises(ValueError, match='before the code that asks is made'):
        make_order('backwards', place, torch.tensor([[1, 2], [3, ACTION]]))


# ---- the cache

def slow_frames(model, order, codes, actions, count, seed):
    "The transformer on the whole history, once for every pass: the oracle."
    oracle = TokenTransformer(replace(model.cfg, order=order))
    oracle.load_state_dict(model.state_dict())
    plan = oracle.order()
    for i in range(codes.shape[1], codes.shape[1] + count):
        luck = torch.rand(60, generator=generator(seed, i, START_NOISE))
        codes = torch.cat([codes, torch.zeros(1, 1, 6, 10, dtype=torch.long)], 1)
        for step in range(plan.passes):
            with torch.no_grad(): logits = oracle(codes, actions[:, :i + 1])[0, -1]
            which = plan.elements(step)
            place = plan.asks[which[plan.answers[which]]]
            codes[0, -1].view(-1)[place] = choose(logits[place], luck[place], 0.)
    return codes[:, -count:]


@pytest.mark.parametrize('name', ORDERS)
def test_the_cache_is_the_uncached_transformer_around_the_window_and_back(name, videos):
    tok = CodeTokenizer(SMALL)
    model = noisy()
    clip = videos.clip(0, 0, 12)
    world = TokenWorld(model, tok, videos.space, videos.size, order=name, temperature=0.,
                       device='cpu')
    world.reset(clip[:2], 5)
    world.append(clip.frames[2], clip.actions[2])
    fast = torch.stack([world.step_codes(action)[0] for action in clip.actions[3:10]])
    with torch.no_grad(): past = tok.codes(clip.frames[:3])[None]
    slow = slow_frames(model, name, past, torch.from_numpy(clip.actions)[None], 7, 5)
    assert torch.equal(fast.view(1, 7, 6, 10), slow)


def test_a_window_of_one_frame_sees_no_past(videos):
    world = TokenWorld(noisy(replace(TINY, window=1)), CodeTokenizer(SMALL), videos.space,
                       videos.size, device='cpu')
    clip = videos.clip(0, 0, 6)
    world.reset(clip[:1])
    a = world.step_codes(3)
    world.reset(clip[4:5])
    assert torch.equal(world.step_codes(3), a)


def test_parallel_begins_as_raster_does(videos):
    "Until something is asked at once: the diagonal's first code has seen what raster's has."
    clip = videos.clip(0, 0, 1)
    first = {}
    for name in ('raster', 'diagonal'):
        world = TokenWorld(noisy(replace(TINY, window=1)), CodeTokenizer(SMALL), videos.space,
                           videos.size, order=name, device='cpu')
        world.reset(clip)
        first[name] = world.step_codes(2)[0]
    assert torch.equal(first['raster'][:1], first['diagonal'][:1])
    assert not torch.equal(first['raster'], first['diagonal'])


# ---- drawing

@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.floats(.05, 1.), st.floats(.2, 2.))
def test_only_the_likeliest_are_drawn(seed, top_p, temperature):
    numbers = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(1, 30, generator=numbers)
    chance, code = (logits / temperature).softmax(-1).sort(descending=True)
    count = int((chance[0].cumsum(0) < top_p - 1e-6).sum()) + 1
    drawn = choose(logits.expand(50, -1), torch.rand(50, generator=numbers), temperature, top_p)
    assert set(drawn.tolist()) <= set(code[0, :count].tolist())


def test_draws_have_the_frequencies_of_the_softmax():
    logits = torch.tensor([[2., 0., 1., -9.]])
    luck = (torch.arange(20000) + .5) / 20000
    drawn = choose(logits.expand(20000, -1), luck)
    found = torch.bincount(drawn, minlength=4) / 20000
    assert torch.allclose(found, logits.softmax(-1)[0], atol=2e-4)
    assert (choose(logits, torch.tensor([.99]), 0.) == 0).all()


# ---- bottlenecks

@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(3, 9), min_size=1, max_size=4))
def test_fsq_says_every_code_and_understands_it(levels):
    if math.prod(levels) > 2048: return     # refused, and tested elsewhere
    cfg = CodesConfig(latents=4, levels=tuple(levels))
    fsq = FSQ(cfg)
    wide = 20 * torch.randn(4000, 4)
    rounded, codes = fsq(wide)
    assert codes.min() >= 0 and codes.max() < cfg.vocabulary
    assert torch.allclose(fsq.vectors(codes), rounded, atol=1e-5)
    digits = codes[:, None] // fsq.place % fsq.levels
    assert digits.amin(0).tolist() == [0] * len(levels)         # both ends are reached
    assert digits.amax(0).tolist() == [level - 1 for level in levels]


def test_both_bottlenecks_let_gradients_through():
    for name in ('fsq', 'ema'):
        tok = CodeTokenizer(replace(SMALL, bottleneck=name))
        y, *_ = tok(torch.rand(2, 3, 48, 80))
        y.mean().backward()
        assert tok.encoder[1].weight.grad.abs().sum() > 0


def test_dead_codes_come_back(monkeypatch):
    "Twenty clusters, far apart; a book whose vectors all begin elsewhere."
    cfg = replace(SMALL, bottleneck='ema', levels=(20,))
    centres = 10 * torch.randn(20, 4, generator=torch.Generator().manual_seed(1))

    def share_found(least):
        monkeypatch.setattr(Codebook, 'least', least)
        book = Codebook(cfg)
        book.book.fill_(50.)
        book.count.fill_(1.)
        book.total.fill_(50.)
        for step in range(200):
            numbers = generator(0, step)
            z = centres[torch.randint(20, (400,), generator=numbers)]
            z = z + .1 * torch.randn(400, 4, generator=numbers)
            _, codes = book(z)
            book.learn(z, codes, numbers)
        return ((book(centres)[0] - centres).norm(dim=1) < .5).float().mean()

    assert share_found(.1) >= .5        # some share a code: k-means has its own poor minima
    assert share_found(0.) <= .05       # without: one vector stands for all


def test_a_trunk_is_taken_over():
    tok, _ = with_trunk(CodesConfig(), DATA/'world')
    weights = load_file(DATA/'world'/'tokenizer.safetensors')
    for name in ('encoder.1.weight', 'decoder.0.weight', 'scale'):
        assert torch.equal(tok.state_dict()[name], weights[name].float())


def test_codes_frames_and_latents_agree(videos, tokenizer):
    tok = load_codes(tokenizer)
    frames = videos.clip(0, 0, 3).frames
    with torch.no_grad():
        codes = tok.codes(frames)
        assert codes.shape == (3, 6, 10)
        assert torch.equal(tok.frames(codes), tok.decode(tok.encode(frames)))


# ---- training

def weights_of(folder, kind): return load_file(folder/'final'/f'{kind}.safetensors')


class Stopped(Exception): pass


def stop_at(step_wanted):
    def on_save(model, step):
        if step == step_wanted: raise Stopped
    return on_save


@pytest.mark.parametrize('bottleneck', ['fsq', 'ema'])
def test_a_tokenizer_that_was_killed_goes_on_to_the_same_bits(videos, tmp_path, bottleneck):
    shape = replace(SMALL, bottleneck=bottleneck)
    train_codes(tmp_path/'whole', videos, QUICK, shape, progress=False)
    with pytest.raises(Stopped):
        train_codes(tmp_path/'cut', videos, QUICK, shape, progress=False, on_save=stop_at(4))
    train_codes(tmp_path/'cut', videos, QUICK, shape, progress=False, resume=True)
    whole, cut = (weights_of(tmp_path/name, 'codes') for name in ('whole', 'cut'))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_transformer_that_was_killed_goes_on_to_the_same_bits(videos, tokenizer, tmp_path):
    common = (videos, tokenizer, QUICK, TINY, 3)
    train_tokens(tmp_path/'whole', *common, progress=False)
    with pytest.raises(Stopped):
        train_tokens(tmp_path/'cut', *common, progress=False, on_save=stop_at(4))
    with pytest.raises(FileExistsError): train_tokens(tmp_path/'cut', *common, progress=False)
    with pytest.raises(ValueError, match='another length'):
        train_tokens(tmp_path/'cut', *common[:-1], 2, progress=False, resume=True)
    train_tokens(tmp_path/'cut', *common, progress=False, resume=True)
    whole, cut = (weights_of(tmp_path/name, 'tokens') for name in ('whole', 'cut'))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert TokenWorld.load(tmp_path/'cut'/'final', device='cpu').model.cfg.vocabulary == 20


def test_tuning_begins_with_what_was_learned(videos, tokenizer, tmp_path):
    train_tokens(tmp_path/'raster', videos, tokenizer, QUICK, TINY, 3, progress=False)
    slow = replace(QUICK, steps=1, lr=1e-9)
    tuned = train_tokens(tmp_path/'rows', videos, tokenizer, slow, replace(TINY, order='rows'), 3,
                         init=tmp_path/'raster'/'final', progress=False)
    learned = weights_of(tmp_path/'raster', 'tokens')
    for name, weight in tuned.state_dict().items():
        assert torch.allclose(weight, learned[name].float(), atol=1e-3)
    info = read_record(tmp_path/'rows'/'final'/'tokens.json', TokensInfo)
    assert info.order == 'rows' and info.init


def test_it_learns_what_can_be_known():
    "Frames that repeat: the loss falls under that of any code by itself."
    torch.manual_seed(0)
    model = TokenTransformer(replace(TINY, grid=(2, 3), d=64, rope=(8, 12, 12)))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    actions = torch.zeros(16, 4, 1, dtype=torch.long)
    def clips(i):
        codes = torch.randint(20, (16, 1, 2, 3), generator=generator(1, i))
        return codes.expand(-1, 4, -1, -1).contiguous(), actions
    for step in range(150):
        loss = nats(model(*clips(step)), clips(step)[0]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = held_out_nats(model.eval(), lambda i: clips(1000 + i))
    assert found['later'] < .3 < np.log(20)
    assert found['ratio'] == pytest.approx(1, abs=.02)          # the action says nothing here


# ---- folders and the command line

def test_a_folder_plays(world_folder, tmp_path, capsys):
    words = ['play', world_folder, '--frames', 3, '--out', tmp_path/'a.mp4', '--device', 'cpu']
    assert main([str(word) for word in words]) == 0
    said = capsys.readouterr().out
    assert '60 passes, raster' in said and 'engine cached' in said


def test_a_folder_is_evaluated(world_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, 'QUICK', evaluation.Protocol(
        clips=1, states=1, depths=(1,), traces=1, long=12, gaps=()))
    out = tmp_path/'report.json'
    longer = two_episodes(tmp_path/'longer', 60)
    words = ['evaluate', world_folder, '--data', longer.folder, '--out', out, '--quick']
    assert main([str(word) for word in words]) == 0
    said = capsys.readouterr().out
    found = read_record(out, Report)
    assert found.world['sampler'].startswith('raster')
    assert 'wrong_action_ratio' not in found.metrics        # it has no noise levels
    assert found.metrics['quality']['world']['psnr']['mean'][0] > 5
    assert 'left out' in said                   # no judge of this video, no simulator


@pytest.mark.parametrize('flags, says', [
    (['--steps', '4'], 'steps belong to a diffusion world'),
    (['--engine', 'ring'], 'engine belong to a diffusion world'),
    (['--keys'], 'is a world of tokens: it is played along a trace'),
    (['--browser'], 'is a world of tokens: it is played along a trace')])
def test_flags_of_another_kind_of_world(world_folder, tmp_path, capsys, flags, says):
    words = ['play', str(world_folder), '--out', str(tmp_path/'a.mp4'), *flags]
    assert main(words) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path/'a.mp4').exists()


@pytest.mark.parametrize('settings, says', [
    (dict(top_p=0.), 'top_p is 0.0: a share in'),
    (dict(top_p=1.5), 'top_p is 1.5'),
    (dict(top_p=float('nan')), 'top_p is nan'),
    (dict(temperature=-1.), 'temperature is -1.0'),
    (dict(order='spiral'), 'no order "spiral"; there are raster, diagonal, rows')])
def test_mistakes_in_drawing(world_folder, settings, says):
    with pytest.raises(ValueError, match=says.split(';')[0]):
        TokenWorld.load(world_folder, device='cpu', **settings)


def test_a_folder_of_the_wrong_kind(videos, tmp_path):
    with pytest.raises(FileNotFoundError, match='tokens.json'): TokenWorld.load(DATA/'world')
    with pytest.raises(FileNotFoundError, match='codes.json'):
        train_tokens(tmp_path/'new', videos, DATA/'world', QUICK, TINY, 3, progress=False)
    assert not (tmp_path/'new').exists()


def test_a_tokenizer_of_another_training(world_folder, videos, tmp_path):
    train_codes(tmp_path/'other', videos, replace(QUICK, seed=1), SMALL, progress=False)
    for suffix in ('json', 'safetensors'):
        shutil.copy(tmp_path/'other'/'final'/f'codes.{suffix}', world_folder)
    with pytest.raises(ValueError, match='was trained with codes'): TokenWorld.load(world_folder)


def test_a_spoilt_tokens_json(world_folder):
    info = json.loads((world_folder/'tokens.json').read_text())
    info['shape']['rope'] = [4, 4, 4]
    (world_folder/'tokens.json').write_text(json.dumps(info))
    with pytest.raises(ValueError, match='must make the width'): TokenWorld.load(world_folder)


def test_frames_and_clips_of_another_size(world_folder, videos):
    world = TokenWorld.load(world_folder, device='cpu')
    with pytest.raises(RuntimeError, match='reset'): world.step(0)
    clip = videos.clip(0, 0, 3)
    with pytest.raises(ValueError, match='at least one frame'): world.reset(clip[:0])
    world.reset(clip)
    with pytest.raises(ValueError, match='a frame here is uint8'):
        world.append(np.zeros((24, 40, 3), np.uint8), 0)
    with pytest.raises(ValueError, match='no choice "jump"'): world.step('jump')
    small = CodeTokenizer(SMALL)
    with pytest.raises(ValueError, match='multiples of'):
        small.codes(np.zeros((1, 47, 80, 3), np.uint8))


def test_reset_is_all_that_the_future_depends_on(world_folder, videos):
    world = TokenWorld.load(world_folder, device='cpu')
    clip = videos.clip(0, 0, 8)
    def play():
        world.reset(clip[:3], 9)
        return [world.step(action) for action in clip.actions[3:]]
    once = play()
    world.reset(clip[5:], 1)
    world.step(1)
    assert np.array_equal(once, play())


def test_no_recipe_of_that_name(tmp_path, capsys):
    assert main(['compare', str(tmp_path/'out'), '--recipe', 'huge']) == 2
    assert 'no recipe "huge"; there are tiny, cpu, cuda' in capsys.readouterr().err
    assert not (tmp_path/'out').exists()


@pytest.mark.slow
def test_compare_goes_from_nothing_to_a_table_and_measures_nothing_twice(
        videos, tmp_path, capsys, monkeypatch):
    # the path is tried: fewer rows, and it draws, resamples and tries settings less often
    labels = ('NFD, equal steps, 4', 'NFD, equal hours, 4', 'tokens, raster', 'tokens, rows',
              'NFD+ as shipped, 2')
    rows_of = comparison.arm_rows
    def some_rows(m): return [row for row in rows_of(m) if row.label in labels]
    monkeypatch.setattr(comparison, 'arm_rows', some_rows)
    monkeypatch.setattr(comparison, 'resampled', partial(comparison.resampled, draws=10))
    monkeypatch.setattr(token_world, 'DRAWS', token_world.DRAWS[:2])
    monkeypatch.setattr(release, 'NOISES', (0., .1))
    monkeypatch.setattr(evaluation, 'load_branches', cache(evaluation.load_branches))
    words = ['compare', str(tmp_path/'out'), '--recipe', 'tiny', '--data', str(videos.folder)]
    assert main(words) == 0
    said = capsys.readouterr().out
    for label in labels: assert f'| {label} |' in said
    record = tmp_path/'out'/'comparison.json'
    found = read_record(record, ComparisonRecord)
    assert found.rows.keys() == found.speed.keys()
    assert found.rows['tokens, rows']['taught']['steps'] == 6       # what it learned, and tuning
    assert found.held_out['tokens_rows']['seconds'] > 0
    learned = read_record(tmp_path/'out'/'tokens_raster'/'final'/'tokens.json', TokensInfo)
    nearest = min(learned.sampling_trial, key=lambda tried: tried['texture'])
    assert learned.sampling == {name: nearest[name] for name in ('temperature', 'top_p')}
    before = record.stat().st_mtime_ns
    assert main(words) == 0
    assert record.stat().st_mtime_ns == before
    assert capsys.readouterr().out == said
