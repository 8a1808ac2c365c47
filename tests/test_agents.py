"What agents' libraries ask of an environment, by their own checks."
import warnings
from pathlib import Path

import pytest

from nfd_ref.environment import as_env
from nfd_ref.session import starts_of
from nfd_ref.streaming import World

DATA = Path(__file__).parents[1]/'data'

def test_stable_baselines3_finds_nothing_to_say():
    "Spaces, types, seeds, the answers of `reset` and `step`; a warning is an error."
    checks = pytest.importorskip('stable_baselines3.common.env_checker')
    world = World.load(DATA/'distilled', device='cpu', engine='static')
    starts = starts_of(DATA/'my_way_home', world.model.cfg.window, count=2)
    env = as_env(world, [start.clip() for start in starts], length=5, render_mode='rgb_array')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        checks.check_env(env)

def test_its_check_would_see_a_frame_of_another_type():
    checks = pytest.importorskip('stable_baselines3.common.env_checker')
    world = World.load(DATA/'distilled', device='cpu', engine='static')
    start, = starts_of(DATA/'my_way_home', world.model.cfg.window, count=1)

    class Float(as_env):
        "Frames are not what its space says."
        def step(self, action):
            frame, *more = super().step(action)
            return frame.astype('float32'), *more

    with pytest.raises(AssertionError): checks.check_env(Float(world, [start.clip()]))
