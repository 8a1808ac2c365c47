"""Commands that make what others use: `record`, `import`, `join`, `branches`, `walks`, `depths`,
`release`, `build`. Written by hand (see `command`)."""

import json
from pathlib import Path
from typing import Annotated

from nfd_ref.command import MANY, SEEDS, VIDEO, command, within

def pixels(size):
    "'80x48' -> (height, width), if a world can be trained on it."
    from nfd_ref.video import require_size
    try:
        width, height = map(int, size.split('x'))
    except ValueError:
        raise ValueError(f'--size {size}: wanted WIDTHxHEIGHT, such as 80x48') from None
    for side in (width, height):
        if not 8 <= side <= 2048: raise ValueError(f'--size {size}: sides of 8 to 2048 pixels')
    require_size((height, width), f'--size {size}')
    return height, width

@command('out')
def cmd_record(
    out:Path,                       # folder to record into; goes on where it was stopped
    episodes:int=24,                # how many
    test:int=4,                     # of these, held out
    length:int=600,                 # frames an episode at most
    scenario:str='my_way_home',     # of ViZDoom
    size:Annotated[str, dict(metavar='WxH')]='80x48',   # width and height in pixels
    crf:int=20,                     # H.264 quality, smaller is better
    seed:int=0,                     # the same seed gives the same frames
    tours:float=0.,                 # share of the player's choices that come back to a view
    flattest:float=1.,              # share of bare frames an episode may have (else: another one)
    workers:int=None,               # processes (one per core)
):
    """Record ViZDoom into a folder of video.
    Episodes of a scenario, played by a sticky, wall-avoiding player."""
    from nfd_ref.doom import Recorder, record
    height, width = pixels(size)
    within(1, MANY, episodes=episodes)
    within(0, MANY, test=test)
    within(2, MANY, length=length)
    within(0, 51, crf=crf)
    within(0, SEEDS, seed=seed)
    within(1, 1024, workers=workers)
    within(0, 1, tours=tours, flattest=flattest)
    recorder = Recorder(scenario, height, width, length, crf=crf, tours=tours, flattest=flattest)
    videos = record(out, recorder, episodes, test, seed, workers)
    print(f'{len(videos)} episodes, {videos.frames} frames -> {out} (fingerprint {videos.hash()})')

@command('out', 'recordings')
def cmd_import(
    out:Path,                       # folder of video to make: new
    recordings:Annotated[Path, dict(nargs='+')],    # videos, folders of them, patterns: takes/*.mp4
    space:Path=None,                # JSON with name, fields and keys of the game (what occurs)
    fps:float=20.,                  # pictures a second that are kept
    size:Annotated[str, dict(metavar='WxH')]=None,  # in pixels (80x48; of VPT's files 384x224)
    fit:str='crop',                 # how a frame gets that size: crop, pad or stretch
    length:int=1200,                # pictures of an episode at most
    test:int=1,                     # recordings held out, the last ones
    crf:int=18,                     # H.264 quality, smaller is better
):
    """Make a folder of video from recordings of any game.
    Beside each video lies a log of its name: .csv, .json or .jsonl with time, key and event (down
    or up), or a row for each frame; or one of VPT's. A folder made before can be given another
    size. See data/README.md."""
    from nfd_ref.recordings import import_recordings, unused_keys
    from nfd_ref.storage import from_json, read_json
    from nfd_ref.video import ActionSpace
    if not 0 < fps <= 240: raise ValueError(f'--fps {fps}: a rate above 0, at most 240')
    within(2, MANY, length=length)
    within(0, MANY, test=test)
    within(0, 51, crf=crf)
    if space: space = from_json(ActionSpace, read_json(space), space)
    videos = import_recordings(out, recordings, space, fps, pixels(size) if size else None, fit,
                               length, test, crf=crf)
    print(f'{len(videos)} episodes, {videos.frames} frames -> {out} (fingerprint {videos.hash()})')
    print('fields: ' + '; '.join(f'{field}: {", ".join(choices[:6])}' for field, choices
                                 in videos.space.fields.items()))
    unused = unused_keys(recordings, videos.space)
    counts = ', '.join(f'{key} ({count})' for key, count in unused.items())
    if unused: print(f'keys that play nothing: {counts}')

@command('out', 'recordings')
def cmd_join(
    out:Path,                       # folder of video to make: new
    recordings:Annotated[str, dict(nargs='+')],     # NAME=FOLDER, a world's name and its video
):
    """Join recordings of several worlds into one.
    Actions get one more field, in which of the worlds a frame plays. A network that learns from it
    can be told where it is: see nbs/10g_prompts.ipynb."""
    from nfd_ref.prompts import join_recordings
    pairs = [recording.partition('=') for recording in recordings]
    for name, equals, folder in pairs:
        if not name or not folder:
            raise ValueError(f'{name}{equals}{folder}: wanted NAME=FOLDER, such as maze=runs/maze')
    folders = {name: Path(folder) for name, _, folder in pairs}
    if len(folders) < len(pairs): raise ValueError('two worlds of one name')
    videos = join_recordings(out, folders)
    print(f'{len(videos)} episodes, {videos.frames} frames -> {out} (fingerprint {videos.hash()})')

@command('out')
def cmd_branches(
    out:Path,                   # folder to record into: new
    data:Path=VIDEO,            # the recording
    states:int=16,              # how many
    seed:int=0,                 # of the choice of states
):
    """Play every action from saved simulator states.
    From states of the held-out episodes of a ViZDoom recording, record what every action leads to;
    `evaluate` compares the world with it."""
    from nfd_ref.doom import record_branches
    from nfd_ref.video import VideoFolder
    within(1, MANY, states=states)
    within(0, SEEDS, seed=seed)
    record_branches(out, VideoFolder(data, 'test'), states, seed=seed)
    print(f'{states} states -> {out}')

@command('out')
def cmd_walks(
    out:Path,                   # folder to record into: new
    walks:int=8,                # how many
    length:int=1064,            # frames of each
    seed:int=7,                 # of the walks: not that of video that was trained on
):
    """Record long walks that show rooms.
    `evaluate` asks on them whether a world sinks into walls."""
    from nfd_ref.doom import Recorder
    from nfd_ref.stuck import record_walks
    within(2, MANY, walks=walks)
    within(65, MANY, length=length)
    within(0, SEEDS, seed=seed)
    videos = record_walks(out, walks, Recorder(length=length, crf=23), seed)
    print(f'{len(videos)} walks, {videos.frames} frames -> {out}')

@command('out')
def cmd_depths(
    out:Path,                   # folder to record into: new
    episodes:int=130,           # how many; 25 are held out, half of fewer
    length:int=600,             # frames of each, at most
    seed:int=31,                # of the episodes: not that of video that was trained on
):
    """Record play with how far one sees at each frame, from the simulator's depth buffer.
    `nfd-ref train idm --data OUT` learns to read it from pictures, for `evaluate --depth`."""
    from nfd_ref.depth import record_depths
    from nfd_ref.doom import Recorder
    within(2, MANY, episodes=episodes)
    within(5, MANY, length=length)
    within(0, SEEDS, seed=seed)
    test = min(25, episodes // 2)
    videos = record_depths(out, episodes, Recorder(length=length, crf=23), seed, test)
    print(f'{len(videos)} episodes, {videos.frames} frames -> {out}')

@command('tokenizer', 'world', 'out')
def cmd_release(
    tokenizer:Path,             # folder of the trained tokenizer
    world:Path,                 # folder of the trained world
    out:Path,                   # the playable folder: must be new
    data:Path=VIDEO,            # video that judges it
    clips:int=64,               # held-out clips it is measured on
):
    "Put a tokenizer and a world together, measured on held-out video."
    from nfd_ref.release import release
    within(4, MANY, clips=clips)
    print(json.dumps(release(tokenizer, world, out, data, clips), indent=1))

@command('out')
def cmd_build(
    out:Path,                   # folder for all of it; OUT/play is playable
    recipe:str='cpu',           # cpu (two hours on two cores), cuda (a GPU) or tiny (a minute)
    tokenizer:Path=None,        # folder of a trained tokenizer (none: one is trained)
    data:Path=VIDEO,            # video that judges it
):
    """All of it: record, train both, release.
    Goes on where it was stopped. The recipe tiny shows that the path works, not what it can do;
    cuda is that of the shipped world, with --tokenizer data/world: two recordings, three trainings,
    214 + 89 + 209 seconds of steps on an H100, beside recording and encoding."""
    from nfd_ref.doom import Recorder, record
    from nfd_ref.release import release
    from nfd_ref.tokenizer import load_tokenizer
    from nfd_ref.training import RECIPES, train_tokenizer, train_world
    from nfd_ref.transformer import DITS
    from nfd_ref.video import VideoFolder
    if recipe not in RECIPES:
        raise ValueError(f'no recipe "{recipe}"; there are {", ".join(RECIPES)}')
    plan = RECIPES[recipe]

    def record_for(stage):
        folder = out/f'video_{stage.seed}'
        recorder = Recorder(crf=18, tours=stage.tours, flattest=stage.flattest)
        record(folder, recorder, stage.episodes, stage.test, stage.seed)
        return VideoFolder(folder, 'train'), VideoFolder(folder, 'test')

    if tokenizer is None:
        tokenizer = out/'tokenizer'/'final'
        if not tokenizer.exists():
            train, _ = record_for(plan.stages[0])
            train_tokenizer(tokenizer.parent, train, plan.tokenizer, resume=True)
    tok = load_tokenizer(tokenizer)

    world = None            # of the stage before
    for number, stage in enumerate(plan.stages, 1):
        train, test = record_for(stage)
        folder = out/f'world_{number}'
        if not (folder/'final').exists():
            train_world(folder, train, tok, stage.train, DITS[plan.preset], plan.length,
                        plan.levels, stage.mistakes, test, world, resume=True)
        world = folder/'final'
    metrics = release(tokenizer, world, out/'play', data, plan.clips)
    print(json.dumps(metrics['psnr']))
    print(f'-> nfd-ref play {out/"play"}')
