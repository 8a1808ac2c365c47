"""Commands that play a world: `play`, `translate`. Written by hand (see `command`)."""

import os
import sys
import webbrowser
from pathlib import Path
from typing import Annotated

from nfd_ref.command import MANY, SEEDS, STUDENT, VIDEO, WORLD, Wanted
from nfd_ref.command import chosen, command, engine_kwargs, within, world_class

VIEW = (0, 150)                         # episode and frame of the shipped video with a good view

@command('world')
def cmd_play(
    world:Path=STUDENT,         # folder of a world
    data:Path=None,             # video folder to start from (the clips that the world carries)
    clip:int=None,              # held-out episode to start from (0)
    start:int=None,             # frame of it to start at (0; of the shipped video 150, a view)
    picture:Path=None,          # start from one picture instead, repeated
    actions:str=None,           # a trace: "forward*20, turn left*15" (none: a walk of 240 frames)
    keys:bool=False,            # play in this terminal: keys below
    browser:bool=False,         # play in a page of your browser, on this machine
    replay:Path=None,           # a record, the .json beside a film: make its frames again
    frames:int=None,            # how many: the trace is cut or repeated (its own length)
    steps:int=None,             # denoising steps a frame (those measured best for this world)
    seed:int=0,                 # of the noise and of the made-up player
    device:str=None,            # cpu or cuda (cuda where there is one)
    out:Path=Path('play.mp4'),  # mp4 to write; a walk of yours has its record beside it
    gif:Path=None,              # GIF to write as well
    engine:str=None,            # see 06b_engines; +bf16: half precision (the fastest that starts)
    speculate:str=None,         # frames drafted at once, or auto: see 11_speculation (none)
    guidance:float=None,        # push out of walls: see 07f_guidance (0)
    views:float=None,           # look known views up, at this noise level: see 07j_memory (not)
):
    """Play a trained world: writes an mp4, prints the speed.
    It starts after a held-out clip and streams frames under a trace of actions or your keys.
    With --keys: W A S D walk, Q E turn, R T walk in a curve, space stands still, x leaves, + and -
    change the frames drafted at once; of other game the digits, as shown below the picture. With
    --browser the page shows the keys."""
    import numpy as np
    from nfd_ref.play import parse_actions, play, stroll
    from nfd_ref.session import Session, Setting
    from nfd_ref.speculation import Speculator
    from nfd_ref.streaming import World
    within(1, MANY, frames=frames, steps=steps)
    within(0, SEEDS, seed=seed)
    require_films(out, gif, keys)
    if replay: return play_again(replay, world, data or VIDEO, out, gif)

    settings = chosen(steps=steps, device=device, seed=seed) | engine_kwargs(engine)
    kind = world_class(world)
    if kind is not World and (keys or browser):
        raise ValueError(f'{world} is a world of tokens: it is played along a trace (--actions), '
                         'by hand only worlds of diffusion are')
    settings |= chosen(guidance=guidance)
    if views is not None:
        if kind is not World or speculate:
            raise ValueError('--views goes with a world of diffusion, without drafts')
        from nfd_ref.views import RememberingWorld
        kind = RememberingWorld
        settings['views'] = views
    if speculate:
        settings['speculate'] = draft_size(speculate)
        if settings['speculate'] == 'auto' and (keys or browser):
            raise ValueError('--speculate auto goes with a trace: what it drafts hangs on a clock, '
                             'and your walk could not be replayed; give a number')
        kind = Speculator
    game = kind.load(world, **settings)
    place = None
    if not picture:
        data = data or own_video(world, game)
        place = start_place(data, clip, start, game)
    past = start_from(picture, game) if picture else place.clip()
    if 'dtype' in settings: settings['dtype'] = str(game.engine.dtype).removeprefix('torch.')
    if picture and (keys or browser): raise ValueError('--picture goes with a trace, so far')
    if browser: return play_page(world, data, place, out, settings)
    if keys:
        setting = Setting(str(world), place, **settings).settled(game)
        return play_terminal(Session(game, past, seed, setting=setting), frames, out, gif)

    trace = parse_actions(actions, game.space) if actions else stroll(game.space, seed)
    if frames: trace = np.resize(trace, (frames, trace.shape[1]))       # cut, or repeated
    paths = [out, gif] if gif else [out]
    _, speed = play(game, past, trace, paths, keep=False)
    print(f'{speed.frames} frames at {speed.fps:.1f} FPS (median {speed.ms_median:.1f} ms, '
          f'p95 {speed.ms_p95:.1f} ms a frame, decoding included)')
    print(f'{about_world(game)} -> {", ".join(map(str, paths))}')
    if speculate: print(about_drafts(game.account))
    if speed.frames < len(trace):
        raise KeyboardInterrupt(f'after frame {speed.frames} of {len(trace)}; the film has them')

def require_films(out, gif, recorded):
    "Can the films be written, and the record beside one of a walk of yours?"
    from nfd_ref.storage import PlayRecord, require_out, require_record
    if gif: require_out(gif, '.gif')
    if recorded: require_record(out.with_suffix('.json'), PlayRecord)
    require_out(out, *(['.mp4'] if recorded else ['.mp4', '.gif']))

def draft_size(text):
    "'4' or 'auto', as `Speculator` takes it."
    if text == 'auto': return text
    if not text.isdecimal(): raise ValueError(f'--speculate {text}: a number of frames, or auto')
    within(1, 64, speculate=int(text))
    return int(text)

def about_drafts(account):
    "What drafting did, in one line."
    found = account.summary()
    kept = 'nothing guessed' if found['acceptance'] is None else f'{found["acceptance"]:.0%} kept'
    return (f'drafts: {found["drafted"]} frames made for {found["shown"]} shown, of the guesses '
            f'{kept}; {found["calls_per_frame"]:.2f} network calls and '
            f'{found["passes_per_frame"]:.2f} frames through it per frame shown')

def own_video(folder, game):
    "What a world is begun from when nothing is said: its own clips, or the shipped video."
    from nfd_ref.session import home_video
    from nfd_ref.video import VideoFolder
    try:
        return home_video(folder)
    except ValueError:
        shipped = VideoFolder(VIDEO, 'test')
        if (shipped.space, shipped.size) != (game.space, game.size): raise
        return VIDEO

def start_place(data, clip, start, game):
    "Where a walk begins: a `Start` of a window's length, where the episode has so many frames."
    from nfd_ref.session import Start
    from nfd_ref.video import VideoFolder
    videos = VideoFolder(data, 'test')
    if data == VIDEO and clip is None and start is None: clip, start = VIEW
    clip = clip or 0
    start = start or 0
    last = len(videos) - 1
    if not 0 <= clip <= last:
        raise ValueError(f'--clip {clip}: there are {last + 1} held-out episodes, 0..{last}')
    episode = videos.episodes[clip]
    stop = max(min(start + game.model.cfg.window, episode.frames), start + 1)
    return Start(str(data), episode.name, start, stop)

def play_terminal(session, frames, out, gif):
    "Play in this terminal, and keep the walk."
    from nfd_ref.terminal import play_keys
    play_keys(session, frames)
    count = len(session.take)
    if count == 0: return print('0 frames')
    record = session.save(out, gif=gif)
    print(f'{count} frames -> {record.with_suffix(".mp4")}, {record}')

def play_page(world, data, place, out, setting):
    "Serve the player to a browser of this machine until Ctrl-C."
    from nfd_ref.console import Console
    from nfd_ref.player import Page
    worlds = [world, *(folder for folder in (STUDENT, WORLD) if is_sister(folder, world))]
    films = out.parent/'played'
    page = Page(Console(worlds, data, place, out=films, **setting))
    print(f'{page.url}\nfilms go to {films}; Ctrl-C ends it', flush=True)
    has_screen = sys.platform != 'linux' or any(map(os.environ.get, ('DISPLAY', 'WAYLAND_DISPLAY')))
    if has_screen: webbrowser.open(page.url)
    try:
        page.thread.join()
    except KeyboardInterrupt:
        page.close()

def is_sister(folder, world):
    "Is this another world of the same game, of the same size?"
    from nfd_ref.storage import WorldInfo, read_record
    both = [read_record(path/'world.json', WorldInfo) for path in (folder, world)]
    one, other = [(info.action_space, info.size) for info in both]
    return one == other and folder.resolve() != world.resolve()

def play_again(path, world, data, out, gif):
    "The film of a record, made again."
    from nfd_ref.session import replay
    film = replay(path, world, data)
    verdict = 'the same frames, to the bit' if film.same else (
        'other frames than recorded: another processor, engine or number of threads')
    paths = [out, gif] if gif else [out]
    for name in paths: film.write(name)
    print(f'{len(film.frames)} frames, {verdict} -> {", ".join(map(str, paths))}')

def start_from(path, world):
    "One picture, of any size, as a clip to start from."
    import numpy as np
    from PIL import Image, UnidentifiedImageError
    from nfd_ref.translation import still
    height, width = world.size
    try:
        picture = Image.open(path).convert('RGB').resize((width, height))
    except UnidentifiedImageError:
        raise ValueError(f'{path}: not a picture') from None
    return still(np.asarray(picture), world.space)

@command('video')
def cmd_translate(
    video:Path,                         # mp4 to give the world's look
    actions:Annotated[Path, Wanted]=None,   # npz with the array `actions`, one row a frame
    world:Path=STUDENT,                 # folder of a world
    strength:float=.5,                  # how much is made anew, in (0, 1)
    calls:int=1,                        # of the network, for a frame
    look:Path=None,                     # mp4 in the world's look: its first frames come before
    seed:int=0,                         # of the noise
    out:Path=Path('translated.mp4'),    # mp4 to write
    engine:str=None,                    # see 06b_engines; +bf16: half precision
):
    """Give a video the look of a world, frame by frame, true to its motion.
    Every frame is noised and brought down again behind those made before. No training."""
    import numpy as np
    from tqdm.auto import tqdm
    from nfd_ref.loop import interruptible
    from nfd_ref.storage import require_out
    from nfd_ref.streaming import World
    from nfd_ref.translation import translate
    from nfd_ref.video import Clip, load_actions, read_frames, write_video
    within(1, MANY, calls=calls)
    within(0, SEEDS, seed=seed)
    require_out(out, '.mp4')
    game = World.load(world, **engine_kwargs(engine))
    rows, _ = load_actions(actions)
    clip = Clip(read_frames(video, size=game.size), rows, game.space, game.fps)
    past = None
    if look:
        seen = read_frames(look, size=game.size)[:8]
        past = Clip(seen, np.tile(game.space.rest, (len(seen), 1)), game.space, game.fps)

    def made(asked_to_stop):
        film = translate(game, clip, strength, calls, past, seed)
        for frame in tqdm(film, 'translate', len(clip), unit='frame'):
            yield frame
            if asked_to_stop(): return

    with interruptible() as asked_to_stop:
        count = write_video(out, made(asked_to_stop), game.fps, pix_fmt='yuv420p')
    print(f'{count} frames, {about_world(game)} -> {out}')
    if count < len(clip):
        raise KeyboardInterrupt(f'after frame {count} of {len(clip)}; the film has them')

def about_world(world):
    "How a world is being played, in one line."
    import torch
    height, width = world.size
    precision = str(world.engine.dtype).removeprefix('torch.')
    engine = world.engine.name if precision == 'float32' else f'{world.engine.name}, {precision}'
    machine = f'CPU, {torch.get_num_threads()} threads'
    if world.device.type == 'cuda': machine = torch.cuda.get_device_name(world.device)
    passes = f'{world.steps} {world.sampler} steps'
    if world.guidance: passes += f', guidance {world.guidance:g}'
    if world.context_noise is None: passes = f'{world.steps} passes, {world.sampler}'
    return f'{width}x{height} pixels, {passes}, engine {engine}, {machine}'
