"""Commands that measure: `evaluate`, `bench`, `compare`, `pilots`, `endure`, `views`,
`decoders`, `prompts`."""

from pathlib import Path
from typing import Annotated

from nfd_ref.command import BRANCHES, DEPTH, JUDGE, MANY, SEEDS, STUDENT, VIDEO, WALKS, WORLD
from nfd_ref.command import (
    Wanted, called, chosen, command, engine_kwargs, within, world_class)

@command('world')
def cmd_evaluate(
    world:Path=WORLD,                   # folder of a world
    out:Annotated[Path, Wanted]=None,   # report, NAME.json; NAME.png is written as well
    data:Path=VIDEO,                    # video folder: its test episodes judge
    branches:Path=None,                 # from nfd-ref branches, of these episodes
    idm:Path=None,                      # from nfd-ref train idm, on this game
    walks:Path=None,                    # from nfd-ref walks, of this game
    depth:Path=None,                    # from nfd-ref train idm, on what nfd-ref depths recorded
    quick:bool=False,                   # under a minute: to see that it works, not to compare
    seed:int=0,                         # of the clips and the noise
    engine:str=None,                    # see 06b_engines; +bf16: half precision (the fastest)
    leaderboard:Path=None,              # JSON file to put a row into
    name:str=None,                      # of the world there (its folder)
    i3d:Path=None,                      # i3d_torchscript.pt of StyleGAN-V, if you have it: adds FVD
    vgg:Path=None,                      # vgg16.pt of StyleGAN3, if you have it: adds LPIPS
    guidance:float=None,                # push out of walls: see 07f_guidance (0)
):
    """Measure a world: quality, distance, actions, counterfactuals, drift, walls, memory.
    Held-out video and the simulator judge. Writes the numbers as JSON and a page of plots and film
    strips beside it. Branches, judge and walks come with the shipped video; of other video, what
    needs one that is not given is left out."""
    from nfd_ref.evaluation import (
        QUICK, Protocol, add_to_leaderboard, evaluate, leaderboard_row, read_leaderboard)
    within(0, SEEDS, seed=seed)
    if leaderboard: read_leaderboard(leaderboard)
    protocol = QUICK if quick else Protocol()
    if data == VIDEO:
        branches = branches or BRANCHES
        idm = idm or JUDGE
        walks = walks or WALKS
        depth = depth or DEPTH
    report = evaluate(world, data, branches, idm, out, protocol, seed, i3d=i3d, vgg=vgg,
                      walks=walks, depth=depth, world_class=world_class(world),
                      **chosen(guidance=guidance), **engine_kwargs(engine))

    words = 'nfd-ref evaluate'
    if world != WORLD: words += f' {world}'
    if data != VIDEO: words += f' --data {data}'
    words += f' --out report.json --seed {seed}'
    if engine: words += f' --engine {engine}'
    if guidance: words += f' --guidance {guidance:g}'
    if quick: words += ' --quick'
    row = leaderboard_row(report, name or called(world), words)
    if leaderboard: add_to_leaderboard(leaderboard, row)
    for key, value in row.items(): print(f'{key:20} {value}')
    tell_where_it_moves(report.metrics['changed'])
    tell_what_is_left_out(report)
    print(f'-> {out}, {out.with_suffix(".png")}')

def tell_where_it_moves(found):
    "PSNR on the pixels that changed: where most of a picture stands still, that of all hides it."
    if found['world']['mean'] is None: return print('PSNR of changed pixels: nothing changed')
    numbers = ', '.join(f'{name} {found[name]["mean"][0]:.1f}'
                        for name in ('world', 'copy_last', 'tokenizer'))
    print(f'PSNR of changed pixels, dB ({found["world"]["share"]:.0%} of all): {numbers}')

GIVERS = dict(                          # what gives a metric what it needs
    judge='--idm, from nfd-ref train idm',
    states='--branches, from nfd-ref branches',
    walks='--walks, from nfd-ref walks',
    depth='--walks and --depth, from nfd-ref depths and train idm')

def tell_what_is_left_out(report):
    "A line for each thing that would have added metrics, and a word on a judge that only guesses."
    from nfd_ref.evaluation import METRICS
    for need, giver in GIVERS.items():
        names = [m.name for m in METRICS if m.needs == need and m.name not in report.metrics]
        if names: print(f'left out: {", ".join(names)} (give {giver})')
    if 'actions' in report.metrics:
        recorded = report.metrics['actions']['recorded']
        count = len(recorded['per_action'])
        if recorded['f1'] < 2 / count:
            print(f'the judge reads real video hardly better than by chance (F1 {recorded["f1"]}, '
                  f'{count} actions): what it says of a world means little')

@command('world')
def cmd_bench(
    world:Path=WORLD,           # folder of a world
    preset:str=None,            # random weights at this shape: nfd_130m, nfd_310m or nfd_774m
    engines:str=None,           # comma-separated, baseline first; +bf16: half (all that run here)
    frames:int=100,             # timed frames of each
    steps:int=None,             # denoising steps a frame (those of the world)
    window:int=None,            # frames looked back at, with --preset
    growth:bool=False,          # instead: cost as frames, window, steps, batch and size grow
    busy:bool=False,            # instead: beside 0, 1 and 2 other programs that never rest
    speculate:bool=False,       # instead: drafts of 1 to 8 frames; --out is gone on with
    quality:bool=False,         # with --speculate: only what drafts do to the picture, no clocks
    threads:int=None,           # CPU threads (PyTorch's choice)
    device:str=None,            # cpu or cuda (cuda where there is one)
    out:Path=None,              # JSON file to write as well
):
    """How fast is it: the engines in turns, beside what the machine could do.
    Prints a protocol card, the measured roofline of this machine, the time of each engine, and the
    JSON of it all as the last line."""
    import torch
    from nfd_ref import speed
    from nfd_ref.engines import ENGINES
    from nfd_ref.growth import growth as measure_growth
    from nfd_ref.speculation import Speculator
    from nfd_ref.storage import BenchRecord, GrowthRecord, SpeculationRecord, require_record
    from nfd_ref.streaming import World
    within(1, 1024, threads=threads)
    kept = GrowthRecord if growth else SpeculationRecord if speculate else BenchRecord
    if out: require_record(out, kept)
    if threads: torch.set_num_threads(threads)
    within(1, MANY, frames=frames, steps=steps, window=window)
    if window and not preset:
        raise ValueError('--window goes with --preset: a trained world keeps its own')
    if quality and (preset or not speculate):
        raise ValueError('--quality goes with --speculate, and with a trained world')
    if growth:
        measure_growth(out, device)
        return

    def load(name, kind=World, **more):
        kwargs = chosen(steps=steps, device=device) | engine_kwargs(name) | more
        if preset: return speed.random_world(preset, window, kind, **kwargs)
        return kind.load(world, **kwargs)

    if speculate:
        name = called(world)
        if steps: name = f'{name} at {steps}'
        bench_drafts(lambda size: load(engines, Speculator, speculate=size), preset or name,
                     out, not preset, not quality)
        return

    kind = torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu')).type
    names = [name for name, engine in ENGINES.items() if kind in engine.devices]
    names += ['static+bf16', 'compiled+bf16', f'{names[-1]}+bf16']
    if busy: names = ['static', names[-1]]
    if engines: names = engines.split(',')
    worlds = {name: load(name) for name in names}
    start = speed.still(worlds[names[0]])
    if busy:
        speed.bench_busy(worlds, start, out, frames, min(20, frames))
        return
    speed.bench(worlds, start, out, frames, min(10, frames))

def bench_drafts(load, name, out, judged, clocks):
    "`bench --speculate`: of trained worlds the quality is measured as well, or alone."
    from nfd_ref.gains import Bench, bench_speculation, exam_of
    from nfd_ref.video import VideoFolder
    episodes = {}
    for split in ('train', 'test'):
        videos = VideoFolder(VIDEO, split)
        episodes[split] = [videos.clip(e).actions[1:] for e in range(len(videos))]
    exam = exam_of(VIDEO, JUDGE) if judged else None
    bench_speculation(Bench(load, episodes, exam), name, out, clocks)

@command('out')
def cmd_compare(
    out:Path,                       # folder for all of it; out/comparison.json is the record
    recipe:str='cpu',               # tiny (minutes, to see it work), cpu, cpu_list or cuda (a GPU)
    data:Path=VIDEO,                # recording whose training episodes both arms learn from
    test:Path=VIDEO,                # video folder: its test episodes judge
    branches:Path=BRANCHES,         # from nfd-ref branches, of the same episodes
    idm:Path=JUDGE,                 # from nfd-ref train idm
    tokenizer:Path=WORLD,           # folder of the KL tokenizer
):
    """NFD against a token transformer, from nothing: train both, measure both.
    The same clips, as many steps, parameters within 3 %; then NFD once more, for as long as the
    tokens took. Goes on where it was stopped; what is in the record is not measured again."""
    from nfd_ref.comparison import compare, comparison_table
    from nfd_ref.doom import load_branches
    from nfd_ref.judge import load_judge
    from nfd_ref.rivals import PLANS, Materials
    from nfd_ref.tokenizer import load_tokenizer
    from nfd_ref.video import VideoFolder
    if recipe not in PLANS: raise ValueError(f'no recipe "{recipe}"; there are {", ".join(PLANS)}')
    load_branches(branches)             # what is wrong with them is said before the training
    judged = VideoFolder(test, 'test')
    load_judge(idm, judged.space.sizes)
    load_tokenizer(tokenizer)
    shipped = {
        'NFD as shipped, 4': (WORLD, {}),
        'NFD+ as shipped, 2': (STUDENT, {}),
        'NFD+ as shipped, 1': (STUDENT, dict(steps=1))}
    materials = Materials(out, PLANS[recipe], VideoFolder(data, 'train'), judged, tokenizer,
                          shipped)
    words = f'nfd-ref compare OUT --recipe {recipe}'
    record = compare(materials, out/'comparison.json', branches, idm, words)
    print(comparison_table(record))
    print(f'-> {out/"comparison.json"}')

@command('out')
def cmd_pilots(
    out:Path,                               # folder for all of them; out/pilots.json is the record
    data:Annotated[Path, Wanted]=None,      # a recording, from nfd-ref record
    minutes:float=20.,                      # of training, each: of one processor (GPU: of a clock)
    rows:str=None,                          # comma-separated, see 07h_pilots (all)
    home:Path=WORLD,                        # folder of a world: its tokenizer is everyone's
    test:Path=VIDEO,                        # video folder: its test episodes judge
    branches:Path=BRANCHES,                 # from nfd-ref branches, of the same episodes
    idm:Path=JUDGE,                         # from nfd-ref train idm
    walks:Path=WALKS,                       # from nfd-ref walks
    depth:Path=DEPTH,                       # from nfd-ref depths and train idm
):
    """What pays in training: small worlds from nothing, each with one change, all at one price.
    Goes on where it was stopped; what is in the record is not done again. Two of these commands
    with other rows may share the folder."""
    from nfd_ref.pilots import PILOTS, PilotFolders, PilotPlan, run_pilots
    if not 0 < minutes <= MANY: raise ValueError(f'--minutes {minutes:g}: a number above 0')
    names = rows.split(',') if rows else list(PILOTS)
    for name in names:
        if name not in PILOTS:
            raise ValueError(f'--rows: no pilot "{name}"; there are {", ".join(PILOTS)}')
    folders = PilotFolders(data, home, test, branches, idm, walks, depth)
    record = run_pilots(out, names, folders, PilotPlan(minutes=minutes))
    for name, row in record.rows.items():
        print(f'{name:10} {row["steps"]:5} steps  loss {row["loss"]:.4f}  '
              f'texture {row["texture"]:.2f}  what if {row["what_if"][0]:.0%}')
    print(f'-> {out/"pilots.json"}')

def folders_of(worlds):
    "Comma-separated folders of worlds, as {what each is called: folder}."
    named = [(called(Path(folder)), Path(folder)) for folder in worlds.split(',')]
    if len(dict(named)) < len(named): raise ValueError(f'--worlds {worlds}: two of one name')
    return dict(named)

@command('out')
def cmd_endure(
    out:Path,                           # NAME.json, the record; NAME.png is written as well
    walks:Annotated[Path, Wanted]=None, # folder of long walks, from nfd-ref walks
    worlds:str=f'{WORLD},{STUDENT}',    # comma-separated: folders of worlds
    data:Path=VIDEO,                    # video folder: its training episodes say what is normal
    idm:Path=JUDGE,                     # from nfd-ref train idm
    depth:Path=DEPTH,                   # from nfd-ref depths and train idm
):
    """What is left of a world after thousands of frames: walls, textures, sharpness, keys.
    Each world makes all walks under their keys, and what it shows is laid beside the simulator's.
    The record is written after each world; worlds that are in it are not asked again."""
    from nfd_ref.endurance import endurance_table, endure
    folders = {name: (folder, {}) for name, folder in folders_of(worlds).items()}
    record = endure(folders, out, walks, data, idm, depth)
    print(endurance_table(record))
    print(f'-> {out}, {out.with_suffix(".png")}')

@command('out')
def cmd_views(
    out:Path,                               # NAME.json, the record
    worlds:str=f'{WORLD},{STUDENT}',        # comma-separated: folders of worlds
    branches:Path=BRANCHES,                 # from nfd-ref branches: turns on the spot
):
    """Is a view the same when it comes again?
    After a look aside and a whole turn: as the worlds are, and when a view that was seen from this
    spot is looked up, at several levels of noise. See nbs/07j_memory.ipynb."""
    from nfd_ref.views import measure_views
    record = measure_views(out, folders_of(worlds), branches)
    for name, levels in record.rows.items():
        for level, found in levels.items():
            aside = found['memory']['left_right']['20']['back']
            around = found['memory']['turn']['back']
            print(f'{name}, {level}: {aside:.0f} degrees off after 20 left and 20 right, '
                  f'{around:.0f} after a whole turn')
    print(f'-> {out}')

@command('runs')
def cmd_decoders(
    runs:Path,                              # folder with runs of train decoder
    out:Annotated[Path, Wanted]=None,       # NAME.json, the record; NAME.png is written as well
    world:Path=STUDENT,                     # folder of a world: it dreams, its decoder is compared
    data:Path=VIDEO,                        # video folder: its test episodes judge
    idm:Path=JUDGE,                         # from nfd-ref train idm
    depth:Path=DEPTH,                       # from nfd-ref depths and train idm
    clips:int=32,                           # held-out clips
):
    """Decoders of the same latents beside each other: sharpness, textures, keys.
    Each paints the same real frames, and the same dreams of a world."""
    from nfd_ref.decoder import DecodersProtocol, compare_decoders, decoders_table
    within(2, MANY, clips=clips)
    record = compare_decoders(out, runs, world, data, idm, depth, DecodersProtocol(clips=clips))
    print(decoders_table(record))
    print(f'-> {out}, {out.with_suffix(".png")}')

@command('out')
def cmd_prompts(
    out:Path,                               # NAME.json, the record; NAME.mp4 is written as well
    worlds:Annotated[str, Wanted]=None,     # comma-separated: folders of networks of two worlds
    data:Annotated[Path, Wanted]=None,      # folder from nfd-ref join: its test episodes judge
    idm:Path=JUDGE,                         # from nfd-ref train idm, of the keys without the world
    starts:int=16,                          # held-out clips of each world
):
    """Name another world in mid-stream: after how many frames does the picture follow?
    With the past kept, read again under the new name, and made anew in the new look."""
    from nfd_ref.prompts import PromptsProtocol, measure_prompts
    within(1, MANY, starts=starts)
    networks = folders_of(worlds)
    record = measure_prompts(out, networks, data, idm, PromptsProtocol(starts=starts))
    for name, ways in record.rows.items():
        for way, found in ways.items():
            shown = ', '.join(f'{world} {ends["shown"][-1]:.0%}' for world, ends in found.items())
            print(f'{name}, {way}: at the end it shows {shown}')
    print(f'-> {out}, {out.with_suffix(".mp4")}')
