"""Speculation from the outside: random players on every engine that drafts, held to a world that
never guessed. Tiny models with random weights."""
import math
from functools import cache, partial
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nfd_ref import gains
from nfd_ref.cli import main
from nfd_ref.pacing import (
    Costs, NextAction, PacedGame, PaperClock, PaperWorld, key_events, measure_paced, paced_ways)
from nfd_ref.speculation import (
    Adaptive, RoundCosts, Speculator, best_size, expected_kept, kept_per_draft, persistent_trace,
    run_lengths)
from nfd_ref.storage import SpeculationRecord, read_record
from nfd_ref.streaming import FRESH_NOISE, START_NOISE, World
from nfd_ref.tokenizer import TOKENIZERS, Tokenizer
from nfd_ref.transformer import DiT, DiTConfig
from nfd_ref.video import ActionSpace, Clip

SPACE = ActionSpace('any', {'move': ('rest', 'left', 'right'), 'jump': ('no', 'yes')})
TINY = DiTConfig(d=32, layers=2, heads=2, rope=(4, 6, 6), window=4, actions=(3, 2))
SIZE = (48, 80)
MOST = 4                                        # frames of a draft here
ABLE = ('rolling', 'ring', 'merged', 'static', 'graph', 'native')      # compiled: as graph
FEW = settings(max_examples=25, deadline=None)
ACTIONS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), min_size=1, max_size=14)

def sticky(draws):
    "Random actions, each held for a random while: [(action, frames)] -> [f, k]."
    return np.array([action for action, held in draws for _ in range(held)])

PLAYERS = st.one_of(
    ACTIONS.map(np.array),
    st.lists(st.tuples(st.tuples(st.integers(0, 2), st.integers(0, 1)), st.integers(1, 6)),
             min_size=1, max_size=5).map(sticky))

def tiny_parts():
    "A network none of whose layers is zero, and a tokenizer."
    torch.manual_seed(0)
    dit = DiT(TINY)
    for p in dit.parameters(): nn.init.normal_(p, std=.1)
    return dit, Tokenizer(TOKENIZERS['small'])

def tiny_world(kind=World, engine='native', steps=2, sampler='consistency', **kwargs):
    "A small world. Its engine is not compiled (06b does that), and it codes the same clip once."
    dit, tok = tiny_parts()
    encode = tok.encode

    @cache
    def encode_once(raw, frames):
        return encode(np.frombuffer(raw, np.uint8).reshape(frames, *SIZE, 3).copy())
    tok.encode = lambda frames: encode_once(frames.tobytes(), len(frames))
    with mock.patch('torch.compile', lambda block, **kwargs: block):
        return kind(dit, tok, SPACE, SIZE, steps=steps, sampler=sampler, device='cpu',
                    engine=engine, **kwargs)

def clip(frames=3):
    rng = np.random.default_rng(0)
    actions = rng.integers(0, SPACE.sizes, (frames, 2))
    return Clip(rng.integers(0, 255, (frames, *SIZE, 3), dtype=np.uint8), actions, SPACE, 20.)

@pytest.fixture(scope='module')
def worlds():
    "{engine: (drafting world, world that never guesses)}, made when they are asked for."
    made = {}
    def of(engine):
        if engine not in made:
            made[engine] = (tiny_world(Speculator, engine, speculate=MOST),
                            tiny_world(World, engine, ahead=2 * MOST - 2))
        return made[engine]
    return of

def begin(*worlds):
    for world in worlds: world.reset(clip(), seed=5)

def draft_size(world, size): world.speculate = size

def shown_by(world, trace): return [world.step_latent(action).clone() for action in trace]

@pytest.mark.parametrize('engine', ABLE)
def test_after_any_trace_the_world_is_as_one_that_never_guessed(worlds, engine):
    drafting, plain = worlds(engine)

    @FEW
    @given(trace=PLAYERS, size=st.integers(1, MOST))
    def check(trace, size):
        draft_size(drafting, size)
        begin(drafting, plain)
        shown = shown_by(drafting, trace)
        drafting.settle()
        at = 0
        for held in kept_runs(trace, size):
            whole = held == size and not drafting.exact
            if whole: guess(plain, trace[at], size)     # a right guess leaves its rounding
            told(plain, shown[at:at + held], trace[at])
            at += held
        assert drafting.engine.next == plain.engine.next
        for action in ((1, 0), (1, 0), (2, 1)):
            mine = drafting.make_frame(action)
            assert torch.equal(mine, plain.make_frame(action))
            drafting.remember(mine, action)
            plain.remember(mine, action)
    check()

@torch.inference_mode()
def guess(world, action, size):
    "Let a plain world's engine make so many frames at once."
    numbers = range(world.engine.next, world.engine.next + size)
    noise = torch.cat([world.noise(i, START_NOISE) for i in numbers], 1)
    fresh = torch.cat([world.noise(i, FRESH_NOISE) for i in numbers], 1)
    actions = torch.as_tensor(np.array(action)).expand(1, size, -1)
    world.engine.make_frame(world.sample, noise, actions, fresh)

def told(world, latents, action):
    "Frames of one draft that were kept, as one portion."
    actions = torch.as_tensor(np.array(action)).expand(1, len(latents), -1)
    with torch.inference_mode(): world._remember(torch.cat(latents, 1), actions)

def kept_runs(trace, size):
    "The prefix rule, said in another way: every run is cut into pieces of `size`."
    pieces = []
    for run in run_lengths(trace):
        pieces += [size] * (run // size)
        if run % size: pieces.append(run % size)
    return pieces

@pytest.mark.parametrize('engine', ABLE)
def test_prepared_frames_are_those_that_would_have_come(worlds, engine):
    drafting, plain = worlds(engine)
    guess_lists = st.lists(ACTIONS.map(lambda list_: list_[:3]), min_size=14, max_size=14)

    @FEW
    @given(trace=ACTIONS, guesses=guess_lists)
    def check(trace, guesses):
        draft_size(drafting, 1)
        begin(drafting, plain)
        for action, some in zip(trace, guesses):
            if some: drafting.prepare(*some)
            assert torch.equal(drafting.step_latent(action), plain.step_latent(action))
    with mock.patch.object(drafting, 'decode', lambda latents: None): check()

def test_branches_are_one_batch_and_the_same_bits(worlds):
    drafting, plain = worlds('native')
    draft_size(drafting, 1)
    counted = []
    real = drafting.engine.forward
    def forward(x, inputs):
        counted.append(x.shape[1])
        return real(x, inputs)

    @FEW
    @given(trace=ACTIONS, order=st.permutations([(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]))
    def check(trace, order):
        begin(drafting, plain)
        for action in trace:
            counted.clear()
            waiting = drafting.current is not None          # it enters with the first pass
            drafting.prepare(*order)
            assert counted == [6 + waiting] + [6] * (drafting.steps - 1)
            assert torch.equal(drafting.step_latent(action), plain.step_latent(action))
        assert drafting.account.drafted == 6 * len(trace)
        assert drafting.account.discarded == 5 * len(trace)
    with (mock.patch.object(drafting, 'decode', lambda latents: None),
          mock.patch.object(drafting.engine, 'forward', forward)): check()

def test_the_length_of_the_ring_changes_no_bit_in_the_kernel(worlds):
    drafting, _ = worlds('native')
    short = tiny_world(World, 'native')
    assert short.engine.ahead < drafting.engine.ahead
    draft_size(drafting, 1)
    begin(drafting, short)
    for action in persistent_trace(SPACE, 20, .5, seed=3):      # around both rings
        drafting.prepare(action, (0, 0))
        assert torch.equal(drafting.step_latent(action), short.step_latent(action))

@pytest.mark.parametrize('engine', [name for name in ABLE if name != 'rolling'])
def test_every_ring_makes_rivals(worlds, engine):
    drafting, plain = worlds(engine)
    draft_size(drafting, 1)                         # to the same past, to the bit
    begin(drafting, plain)
    shown_by(drafting, [(2, 1)] * 6)                # the window has turned over
    shown_by(plain, [(2, 1)] * 6)
    drafting.settle()
    actions = torch.tensor([[[1, 0], [0, 1], [2, 1]]])
    noises = [torch.cat([drafting.noise(drafting.engine.next, kind)] * 3, 1)
              for kind in (START_NOISE, FRESH_NOISE)]
    made = {}
    for make in ('make_rivals', 'make_frame'):
        before = drafting.engine.mark()
        with torch.inference_mode():
            made[make] = getattr(drafting.engine, make)(
                drafting.sample, noises[0], actions, noises[1])
        drafting.engine.rewind(before)

    alone = torch.cat([plain.make_frame(action) for action in actions[0]], 1)
    assert torch.allclose(made['make_rivals'], alone, atol=1e-3)
    assert torch.equal(made['make_rivals'], alone) or engine != 'native'
    assert not torch.allclose(made['make_frame'], alone, atol=1e-3)     # frames that follow

@pytest.mark.parametrize('size', range(2, MOST + 1))
@pytest.mark.parametrize('change', range(1, 2 * MOST))
def test_a_change_at_every_place_of_a_draft(worlds, change, size):
    drafting, plain = worlds('native')
    draft_size(drafting, size)
    begin(drafting, plain)
    trace = [(1, 0)] * change + [(2, 1)] * 3
    shown = shown_by(drafting, trace)
    drafting.settle()
    for latents, action in zip(shown, trace): plain.remember(latents, action)
    assert torch.equal(drafting.make_frame((0, 0)), plain.make_frame((0, 0)))
    drafts = math.ceil(change / size) + math.ceil(3 / size)
    assert drafting.account.drafted == drafts * size
    assert drafting.account.discarded == drafts * size - len(trace)

def test_the_first_frame_of_a_draft_is_the_frame_that_would_have_come(worlds):
    drafting, plain = worlds('native')
    draft_size(drafting, MOST)
    begin(drafting, plain)
    for action in [(0, 0), (1, 0), (2, 0), (0, 1)] * 5:         # never the same twice
        assert torch.equal(drafting.step_latent(action), plain.step_latent(action))
    assert drafting.account.acceptance == 0

def test_later_frames_of_a_draft_are_others(worlds):
    drafting, plain = worlds('native')
    draft_size(drafting, MOST)
    begin(drafting, plain)
    first, second = ((drafting.step_latent((1, 0)), plain.step_latent((1, 0))) for _ in range(2))
    assert torch.equal(*first)
    assert not torch.equal(*second)

def test_a_draft_of_n_begins_with_the_draft_of_fewer(worlds):
    drafting, _ = worlds('native')
    begin(drafting)
    four = drafting.draft((1, 0), 4)
    drafting.engine.rewind(four.before)
    two = drafting.draft((1, 0), 2)
    assert torch.equal(two.latents, four.latents[:, :2])

@pytest.mark.parametrize('engine', ABLE)
def test_a_pass_that_fails_in_a_draft_changes_nothing(worlds, engine):
    drafting, plain = worlds(engine)
    draft_size(drafting, MOST)
    for calls in range(drafting.steps):
        begin(drafting, plain)
        shown = drafting.step_latent((1, 0))
        drafting.settle()
        plain.remember(shown, (1, 0))
        with failing(drafting, calls), pytest.raises(RuntimeError, match='out of memory'):
            drafting.step_latent((2, 1))
        assert drafting.engine.next == plain.engine.next
        assert torch.equal(drafting.make_frame((2, 0)), plain.make_frame((2, 0)))

def failing(world, calls):
    "Let the engine fail after so many passes."
    left = iter([False] * calls)
    forward = 'run' if world.engine.name == 'rolling' else 'forward'
    real = getattr(world.engine, forward)
    def fail(*args, **kwargs):
        if next(left, True): raise RuntimeError('out of memory')
        return real(*args, **kwargs)
    return mock.patch.object(world.engine, forward, fail)

def test_what_cannot_be_is_refused_and_changes_nothing(worlds):
    for wrong in (0, -1, 2.5, True, 'often'):
        with pytest.raises(ValueError, match="from 1 up, or 'auto'"):
            tiny_world(Speculator, speculate=wrong)
    with pytest.raises(ValueError, match='"recompute" makes one frame at a time'):
        tiny_world(Speculator, 'recompute', speculate=2)

    drafting, _ = worlds('native')
    draft_size(drafting, MOST)
    begin(drafting)
    want = shown_by(drafting, [(1, 0)] * 6)
    begin(drafting)
    got = shown_by(drafting, [(1, 0)] * 2)
    with pytest.raises(ValueError): drafting.step_latent((7, 0))       # in the middle of a draft
    with pytest.raises(ValueError): drafting.step_latent('fly')
    with pytest.raises(ValueError, match='room for 1 to 4; start it with speculate=9'):
        drafting.draft((1, 0), 9)
    got += shown_by(drafting, [(1, 0)] * 4)
    assert all(map(torch.equal, got, want))

def test_not_before_reset():
    world = tiny_world(Speculator, speculate=2)
    for call in (world.step, world.step_latent, world.prepare, world.draft):
        with pytest.raises(RuntimeError, match='reset'): call((0, 0))

def test_a_ring_says_when_a_pass_is_too_long_for_it(worlds):
    _, plain = worlds('static')
    begin(plain)
    shown_by(plain, [(0, 0)] * 12)
    x = torch.zeros(1, 12, TINY.latents, *TINY.grid)
    a = torch.zeros(1, 12, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match='take a larger `ahead`'):
        plain.engine.velocity(x, torch.ones(1, 12), a)

def test_other_doors_settle_first(worlds):
    drafting, plain = worlds('native')
    draft_size(drafting, MOST)
    begin(drafting, plain)
    shown = shown_by(drafting, [(1, 0)])
    plain.remember(shown[0], (1, 0))
    frame = clip().frames[0]
    for world in (drafting, plain): world.append(frame, (2, 0))
    assert torch.equal(drafting.make_frame((0, 1)), plain.make_frame((0, 1)))
    shown_by(drafting, [(1, 0)])
    begin(drafting, plain)
    assert drafting.current is None
    assert drafting.account.shown == 0
    assert torch.equal(drafting.make_frame((0, 1)), plain.make_frame((0, 1)))

@pytest.mark.parametrize('engine', ('rolling', 'static', 'native'))
def test_the_books_say_what_the_engine_did(worlds, engine):
    drafting, _ = worlds(engine)
    draft_size(drafting, 3)
    begin(drafting)
    counted = []
    real = drafting.engine.run
    def run(x, *args, **kwargs):
        counted.append(x.shape[1])
        return real(x, *args, **kwargs)
    trace = persistent_trace(SPACE, 40, .8, seed=2)
    with mock.patch.object(drafting.engine, 'run', run):
        shown_by(drafting, trace)
        drafting.settle()
    account = drafting.account
    assert account.calls == len(counted)
    assert account.passes == sum(counted)
    assert account.shown == 40
    assert account.shown + account.discarded == account.drafted
    kept = kept_per_draft(run_lengths(trace), 3)
    assert account.shown / account.drafts == pytest.approx(kept)

@given(runs=st.lists(st.integers(1, 30), min_size=1), size=st.integers(1, 9))
def test_kept_per_draft_counts_the_pieces(runs, size):
    trace = np.concatenate([[[i % 2, 0]] * run for i, run in enumerate(runs)])
    assert kept_per_draft(runs, size) == pytest.approx(len(trace) / len(kept_runs(trace, size)))

@given(p=st.floats(0, .99), size=st.integers(1, 12))
def test_expected_kept_is_the_closed_form(p, size):
    assert expected_kept(p, size) == pytest.approx((1 - p**size) / (1 - p))

def test_adaptive_follows_the_costs_and_the_player():
    free = RoundCosts({n: 10. for n in range(1, 5)}, {n: 10. for n in range(1, 5)}, 1.)
    dear = RoundCosts({n: 10. * n for n in range(1, 5)}, {n: 10. * n for n in range(1, 5)}, 1.)
    steady = [(1, 0)] * 30
    restless = [(i % 3, 0) for i in range(30)]
    for costs, trace, want in ((free, steady, 4), (dear, steady, 1), (free, restless, 1)):
        adaptive = Adaptive(4, costs)
        for action in trace: adaptive.note(np.array(action))
        assert adaptive.choose() == want
    assert best_size(free, [30]) == 4

def test_auto_measures_itself_once_and_plays_the_same_frames_as_none():
    world = tiny_world(Speculator, speculate='auto')
    plain = tiny_world(World, ahead=world.engine.ahead)
    begin(world, plain)
    assert world.adaptive.costs is not None
    world.adaptive.costs = RoundCosts({n: 10. * n for n in range(1, 5)},
                                      {n: 10. * n for n in range(1, 5)}, 1.)
    for action in persistent_trace(SPACE, 20, .9, seed=1):
        assert torch.equal(world.step_latent(action), plain.step_latent(action))
    assert world.account.discarded == 0

# ---- a paced game

ONE_EACH = Costs(RoundCosts({1: 1., MOST: 1.}, {1: 1., MOST: 1.}, 0.),      # ms a draft
                 first={n: float(n) for n in range(1, 5)}, again={n: float(n) for n in range(1, 4)},
                 jitter=[1.])

@FEW
@given(trace=ACTIONS, guesses=st.lists(ACTIONS.map(lambda some: some[:2]), min_size=14,
                                       max_size=14), size=st.sampled_from((1, MOST)))
def test_the_paper_world_keeps_the_rules_of_the_real_one(worlds, trace, guesses, size):
    drafting, _ = worlds('native')
    draft_size(drafting, size)
    begin(drafting)
    clock = PaperClock()
    paper = PaperWorld(ONE_EACH, clock, size)
    with mock.patch.object(drafting, 'decode', lambda latents: None):
        for action, some in zip(trace, guesses):
            for world in (drafting, paper):
                if some and sum(action) % 2: world.prepare(*some)
                world.step(action)
            assert round(1e3 * clock.now()) == drafting.account.drafts

@given(trace=PLAYERS, seed=st.integers(0, 99))
def test_keys_come_in_the_frame_before_the_one_they_change(trace, seed):
    keys = key_events(trace, .05, seed)
    assert len(keys) == len(run_lengths(trace)) - 1
    for key in keys:
        frame = int(np.ceil(key.time / .05))
        assert (np.array(key.action) == trace[frame]).all()
        assert (trace[frame] != trace[frame - 1]).any()

@given(trace=PLAYERS, way=st.sampled_from(sorted(paced_ways())))
def test_a_game_that_is_fast_enough_answers_every_key(trace, way):
    clock = PaperClock()
    game = PacedGame(PaperWorld(ONE_EACH, clock, paced_ways()[way].speculate), clock,
                     key_events(trace, .05), paced_ways()[way], ONE_EACH, NextAction([trace]))
    played = game.run(len(trace), trace[0].tolist())
    assert len(played.key_to_picture) == len(run_lengths(trace)) - 1
    assert played.overtaken == 0
    assert all(wait <= 55 for wait in played.key_to_picture)
    assert len(played.late) == len(trace)
    assert 0 <= played.busy() <= 1

def test_guesses_are_the_likeliest_first_and_never_twice():
    guesser = NextAction([np.array([[0], [1], [0], [1], [0], [2]])])
    assert guesser.likeliest((0,), 5) == [(0,), (1,), (2,)]
    assert guesser.likeliest((2,), 2) == [(2,), (1,)]
    assert NextAction().likeliest((4,), 3) == [(4,)]

# ---- the record and the commands

def test_a_record_is_gone_on_with(tmp_path, monkeypatch):
    for name, value in dict(SIZES=(1, 2, 3, 4), FRAMES=12, COINS=(.5,), REPEATS=1).items():
        monkeypatch.setattr(gains, name, value)
    monkeypatch.setattr(gains, 'measure_paced', partial(measure_paced, real_frames=4))
    episodes = {split: [persistent_trace(SPACE, 30, .8, seed)] for seed, split in
                enumerate(('train', 'test'))}
    def load(size): return tiny_world(Speculator, speculate=size)

    out = tmp_path/'record.json'
    bench = gains.Bench(load, episodes)
    record = gains.bench_speculation(bench, 'tiny', out)
    for size in gains.SIZES: assert bench.worlds[size].speculate == size    # for the quality
    found = record.worlds['tiny']
    assert list(found) == ['card', 'costs', 'throughput', 'paced']
    assert found['throughput']['recorded']['1']['speedup'] == 1
    assert found['throughput']['recorded']['2']['shown'] == 12
    paced = found['paced']['paper']['rapid']
    assert paced['none']['found'] == 0
    again = gains.bench_speculation(gains.Bench(load, episodes), 'tiny', out)
    assert again.worlds['tiny'] == read_record(out, SpeculationRecord).worlds['tiny']
    assert again.worlds['tiny']['costs'] == found['costs']         # not measured a second time
    quick = gains.bench_speculation(gains.Bench(load, episodes), 'other', out, clocks=False)
    assert list(quick.worlds['other']) == ['card']

def test_play_shows_its_counters(tmp_path, capsys):
    command = ['play', '--device', 'cpu', '--frames', '6', '--out', str(tmp_path/'a.mp4')]
    assert main([*command, '--speculate', '2']) == 0
    assert 'drafts: 6 frames made for 6 shown, of the guesses 100% kept' in capsys.readouterr().out
    assert main([*command, '--speculate', 'often']) == 2
    assert 'a number of frames, or auto' in capsys.readouterr().err
    for hands in ('--keys', '--browser'):
        assert main([*command, hands, '--speculate', 'auto']) == 2
        assert 'could not be replayed; give a number' in capsys.readouterr().err
    assert main([*command, '--speculate', '0']) == 2
    assert 'at least 1' in capsys.readouterr().err
