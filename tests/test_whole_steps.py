"""A step is taken whole or not at all, however it is stopped: an error is raised inside every call
that a step makes, on every engine, and the frames that follow have the bits of undisturbed ones."""
import copy
import os
import pickle
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from tiny import noisy_dit

from nfd_ref.autoregression import TokensConfig, TokenTransformer
from nfd_ref.codes import CodesConfig, CodeTokenizer
from nfd_ref.engines import ENGINES
from nfd_ref.speculation import Speculator
from nfd_ref.streaming import World
from nfd_ref.token_world import TokenWorld
from nfd_ref.tokenizer import Tokenizer, TokenizerConfig
from nfd_ref.transformer import DiTConfig
from nfd_ref.video import ActionSpace, Clip

SPACE = ActionSpace('two', dict(go=('no', 'yes')))
SIZE = (16, 16)
SHAPE = dict(d=32, layers=2, heads=2, window=4, latents=4, grid=(4, 4), patch=2, actions=(2,),
             rope=(4, 6, 6))

HERE = [name for name in ENGINES if name not in ('compiled', 'graph')]

class Stop(BaseException): "Like Ctrl-C: no `Exception`."

def a_clip(frames=6):
    numbers = np.random.default_rng(0)
    frames = numbers.integers(0, 256, (frames, *SIZE, 3), dtype=np.uint8)
    return Clip(frames, np.ones((len(frames), 1), int), SPACE, 20.)

def diffusion_world(kind, engine, device='cpu', **more):
    tok = Tokenizer(TokenizerConfig(latents=4, width=8, mults=(1, 1), patch=2))
    return kind(noisy_dit(DiTConfig(**SHAPE)), tok, SPACE, SIZE, steps=2, engine=engine,
                device=device, **more)

def token_world():
    torch.manual_seed(0)
    tok = CodeTokenizer(CodesConfig(latents=4, width=8, mults=(1, 1), levels=(4, 4)))
    shape = TokensConfig(d=32, layers=2, heads=2, rope=(4, 6, 6), grid=(4, 4), vocabulary=16,
                         window=4, actions=(2,), order='diagonal')
    return TokenWorld(TokenTransformer(shape), tok, SPACE, SIZE, device='cpu')

@contextmanager
def stop_at(call):      # yields a list: the calls counted
    "Raise `Stop` inside the call of this number."
    counted = []
    left_out = ('__exit__', '__enter__', '__del__', 'stop_at')
    def trace(frame, event, arg):
        if event != 'call' or frame.f_code.co_name in left_out: return
        counted.append(frame.f_code.co_name)
        if len(counted) == call: raise Stop
    sys.setprofile(trace)
    try:
        yield counted
    finally:
        sys.setprofile(None)

def film(world, actions, stops=()):
    "Frames of a play in which step i is first stopped inside call `stops[i]`, and then done."
    world.reset(a_clip(), seed=1)
    frames = []
    stopped = 0
    for action, call in zip_longest(actions, stops):
        try:
            with stop_at(call): frame = world.step(action)
        except Stop:
            stopped += 1
            frame = world.step(action)
        frames.append(frame)
    assert stopped >= len(stops) / 3         # not every call is there in every step
    return np.stack(frames)

def calls_of_a_step(world):
    world.reset(a_clip(), seed=1)
    for _ in range(3): world.step(0)        # what is worked out once is worked out
    with stop_at(None) as counted: world.step(0)
    return len(counted)

def actions_of(frames): return np.random.default_rng(2).integers(0, 2, (frames, 1))

def never_torn(world, stride=1):
    "However a step is stopped, the frames are those of a world that nobody disturbed."
    calls = calls_of_a_step(world)
    stops = np.random.default_rng(3).permutation(np.arange(1, calls + 1, stride))
    actions = actions_of(len(stops))
    assert (film(world, actions, stops) == film(world, actions)).all()

@pytest.mark.parametrize('engine', HERE)
def test_a_step_that_is_stopped_never_was(engine):
    never_torn(diffusion_world(World, engine), stride=29)

@pytest.mark.long
@pytest.mark.parametrize('engine', HERE)
def test_every_third_call_of_a_step_may_fail(engine):
    never_torn(diffusion_world(World, engine), stride=3)

@pytest.mark.long
@pytest.mark.parametrize('engine, device', [('compiled', 'cpu'), ('graph', 'cuda')])
def test_a_compiled_step_that_is_stopped_never_was(engine, device):
    if device == 'cuda' and not torch.cuda.is_available(): pytest.skip('wants a GPU')
    never_torn(diffusion_world(World, engine, device), stride=7)

@pytest.mark.parametrize('engine, sizes', [('rolling', 2), ('native', 3)])
def test_a_draft_that_is_stopped_never_was(engine, sizes):
    never_torn(diffusion_world(Speculator, engine, speculate=sizes), stride=29)

def test_a_frame_of_tokens_that_is_stopped_never_was():
    never_torn(token_world(), stride=29)

@pytest.mark.parametrize('engine', HERE)
def test_reset_forgets_a_frame_of_no_numbers(engine):
    world = diffusion_world(World, engine)
    actions = actions_of(3)
    clean = film(world, actions)
    for _ in range(2): world.remember(torch.full((1, 1, 4, 4, 4), torch.nan), 0)
    world.step_latent(0)
    assert (film(world, actions) == clean).all()

def test_a_reset_that_fails_leaves_no_half_a_past():
    world = diffusion_world(World, 'static')
    world.reset(a_clip())
    with pytest.raises(Stop), mock.patch.object(world.engine, 'run', side_effect=Stop):
        world.reset(a_clip())
    with pytest.raises(RuntimeError, match='reset'): world.step(0)

# ---- one world, several users

def test_a_copy_has_a_past_of_its_own():
    for kind, more in ((World, {}), (Speculator, dict(speculate=2))):
        world = diffusion_world(kind, 'static', **more)
        actions = actions_of(6)
        alone = film(world, actions)
        world.reset(a_clip(), seed=1)
        made = [world.step(action) for action in actions[:3]]
        twin = copy.copy(world)
        assert twin.model is world.model
        with pytest.raises(RuntimeError, match='reset'): twin.step(0)
        assert (film(twin, actions) == alone).all()
        made += [world.step(action) for action in actions[3:]]
        assert (np.stack(made) == alone).all()

@pytest.mark.parametrize('engine', ['rolling', 'native'])
def test_what_cannot_be_copied_says_what_to_do(engine):
    world = diffusion_world(World, engine)
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r'copy\.copy\(world\) is another one'): copied(world)

@pytest.mark.parametrize('batch', [False, True])
def test_environments_over_one_world_do_not_meet(batch):
    from nfd_ref.environment import WorldEnv, WorldVectorEnv
    world = diffusion_world(World, 'static')
    def make():
        if batch: return WorldVectorEnv(world, [a_clip()], num_envs=2)
        return WorldEnv(world, [a_clip()])
    def play(env): return env.step(np.ones(2, int) if batch else 1)[0]
    alone = make()
    with pytest.raises(RuntimeError, match='reset'): play(alone)
    alone.reset(seed=1)
    wanted = [play(alone) for _ in range(4)]
    first = make()
    first.reset(seed=1)
    seen = [play(first) for _ in range(2)]
    second = copy.copy(first)
    with pytest.raises(RuntimeError, match='reset'): play(second)
    second.reset(seed=2)
    for _ in range(2):
        play(second)
        seen.append(play(first))
    assert (np.stack(seen) == np.stack(wanted)).all()

FORK = """
import os, signal, torch
from test_whole_steps import World, a_clip, diffusion_world
torch.randn(500, 500) @ torch.randn(500, 500)       # the parent has started its threads
if child := os.fork(): os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
signal.alarm(60)
world = diffusion_world(World, 'static')
world.reset(a_clip())
torch.randn(500, 500) @ torch.randn(500, 500)
os._exit(7)
"""

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork here')
def test_a_world_can_be_opened_in_a_forked_process():
    env = dict(os.environ, OMP_NUM_THREADS='2')
    ran = subprocess.run([sys.executable, '-W', 'ignore', '-c', FORK], env=env,
                         cwd=Path(__file__).parent)
    assert ran.returncode == 7

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork here')
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('make', [partial(diffusion_world, World, 'native'), token_world])
def test_a_forked_process_is_told_and_does_not_hang(make):
    world = make()
    world.reset(a_clip())
    child = os.fork()
    if child == 0:
        told = 0
        for use in (partial(world.step, 0), partial(world.reset, a_clip())):
            try: use()
            except RuntimeError as problem: told += 'forked' in str(problem)
        os._exit(told)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    world.step(0)
