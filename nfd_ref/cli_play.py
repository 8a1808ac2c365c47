"""Commands that play a world: `play`, `lab`. Written by hand (see `command`)."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from nfd_ref.command import MANY, ROOT, SEEDS, STUDENT, VIDEO
from nfd_ref.command import chosen, command, engine_kwargs, within, world_class

VIEW = (0, 150)                         # episode and frame of the shipped video with a good view

@command('world')
def cmd_play(
    world:Path=STUDENT,         # folder of a world
    data:Path=VIDEO,            # video folder to start from
    clip:int=None,              # held-out episode to start from (0)
    start:int=None,             # frame of it to start at (0; of the shipped video 150, a view)
    actions:str=None,           # a trace: "forward*20, turn left*15" (none: a walk of 240 frames)
    keys:bool=False,            # play with the keys, in this terminal
    frames:int=None,            # how many: the trace is cut or repeated (its own length)
    steps:int=None,             # denoising steps a frame (those measured best for this world)
    seed:int=0,                 # of the noise and of the made-up player
    device:str=None,            # cpu or cuda (cuda where there is one)
    out:Path=Path('play.mp4'),  # mp4 to write
    gif:Path=None,              # GIF to write as well
    engine:str=None,            # see 06b_engines; +bf16: half precision (the fastest that starts)
):
    """Play a trained world: writes an mp4, prints the speed.
    It starts after a held-out clip and streams frames under a trace of actions or your keys."""
    import numpy as np
    from nfd_ref.play import parse_actions, play, play_keys, stroll
    from nfd_ref.video import VideoFolder, write_video
    within(1, MANY, frames=frames, steps=steps)
    within(0, SEEDS, seed=seed)

    settings = chosen(steps=steps, device=device, seed=seed) | engine_kwargs(engine)
    game = world_class(world).load(world, **settings)
    videos = VideoFolder(data, 'test')
    if data == VIDEO and clip is None and start is None: clip, start = VIEW
    clip = clip or 0
    start = start or 0
    last = len(videos) - 1
    if not 0 <= clip <= last:
        raise ValueError(f'--clip {clip}: there are {last + 1} held-out episodes, 0..{last}')
    stop = min(start + game.model.cfg.window, videos.episodes[clip].frames)
    past = videos.clip(clip, start, max(stop, start + 1))

    if keys:
        seen, _ = play_keys(game, past, frames)
        if len(seen): write_video(out, seen, game.fps)
        print(f'{len(seen)} frames -> {out}')
        return

    trace = parse_actions(actions, game.space) if actions else stroll(game.space, seed)
    if frames: trace = np.resize(trace, (frames, trace.shape[1]))       # cut, or repeated
    paths = [out, gif] if gif else [out]
    _, speed = play(game, past, trace, paths)
    print(f'{speed.frames} frames at {speed.fps:.1f} FPS (median {speed.ms_median:.1f} ms, '
          f'p95 {speed.ms_p95:.1f} ms a frame, decoding included)')
    print(f'{about_world(game)} -> {", ".join(map(str, paths))}')

def about_world(world):
    "How a world is being played, in one line."
    import torch
    height, width = world.size
    precision = str(world.engine.dtype).removeprefix('torch.')
    engine = world.engine.name if precision == 'float32' else f'{world.engine.name}, {precision}'
    machine = f'CPU, {torch.get_num_threads()} threads'
    if world.device.type == 'cuda': machine = torch.cuda.get_device_name(world.device)
    passes = f'{world.steps} {world.sampler} steps'
    if world.context_noise is None: passes = f'{world.steps} passes, {world.sampler}'
    return f'{width}x{height} pixels, {passes}, engine {engine}, {machine}'

@command()
def cmd_lab():
    "Open JupyterLab at the notebooks."
    if not find_spec('jupyterlab'):
        raise ImportError('JupyterLab is not installed: pip install -c constraints.txt jupyterlab')
    sys.exit(subprocess.call([sys.executable, '-m', 'jupyterlab', str(ROOT/'nbs')]))
