"Pilots: each is one change at one price, goes on where it was stopped, and is refused in one line."
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nfd_ref.cli import main
from nfd_ref.command import BRANCHES, DEPTH, JUDGE, VIDEO, WALKS, WORLD
from nfd_ref.evaluation import Protocol
from nfd_ref.loop import TrainConfig, fit
from nfd_ref.pilots import (
    PILOTS, Muon, PilotFolders, PilotPlan, PilotsRecord, clips_for, config_of, run_pilots)
from nfd_ref.storage import read_json, read_record
from nfd_ref.transformer import DiT, DiTConfig
from nfd_ref.video import VideoFolder, import_clips

RECORD = Path(__file__).parents[1]/'data'/'records'/'pilots.json'
SHAPE = DiTConfig(d=64, layers=1, heads=1, window=4)


@pytest.fixture
def folders(tmp_path):
    "Eight short episodes to learn from, and what ships to be judged by."
    videos = VideoFolder(VIDEO, 'train')
    clips = (videos.clip(e, 0, 30) for e in range(9))
    import_clips(tmp_path/'recording', clips, test=1)
    return PilotFolders(tmp_path/'recording', WORLD, VIDEO, BRANCHES, JUDGE, WALKS, DEPTH)


def learn(out, steps, resume=False):
    "A little network and Muon, the same batches every time; the folder."
    def loss(model, batch, numbers, part, device):
        x, t, actions, target = batch
        return (model(x, t, actions) - target).pow(2).mean(), {}

    def batches(step):
        numbers = torch.Generator().manual_seed(step)
        x = torch.randn(2, 4, SHAPE.latents, *SHAPE.grid, generator=numbers)
        return x, torch.full((2, 4), .5), torch.zeros(2, 4, 1, dtype=torch.long), x.flip(1)

    torch.manual_seed(0)
    cfg = TrainConfig(steps=6, batch=2, warmup=1, save_every=3, log_every=1)
    if steps < 6:
        def stop(model, step):
            if step > steps: raise KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt):
            fit(out, DiT(SHAPE), loss, batches, cfg, progress=False, on_save=stop, optimizer=Muon)
    else:
        fit(out, DiT(SHAPE), loss, batches, cfg, resume=resume, progress=False, optimizer=Muon)
    return out/'step_000006'


def test_muon_goes_on_to_the_same_bits(tmp_path):
    whole = learn(tmp_path/'whole', 6)
    learn(tmp_path/'stopped', 3)
    went_on = learn(tmp_path/'stopped', 6, resume=True)
    for name in ('model', 'ema', 'optimizer'):
        one, two = (load_file(folder/f'{name}.safetensors') for folder in (whole, went_on))
        assert one.keys() == two.keys()
        for key in one: assert torch.equal(one[key], two[key]), key
    kept = [key.rpartition('|')[2] for key in one if 'attn.qkv' in key]
    assert kept == ['exp_avg']          # of a matrix one average, AdamW keeps two


@pytest.mark.parametrize('name', PILOTS)
def test_a_pilot_changes_one_thing(name):
    pilot, base = PILOTS[name], PILOTS['base']
    plan = PilotPlan()
    DiT(replace(plan.shape, **pilot.shape))
    cfg = config_of(pilot, plan, 1000)
    changed = [
        pilot.shape != {} and 'window' not in pilot.shape,
        pilot.length != base.length,        # a longer window has longer clips, and fewer
        cfg.batch * pilot.length != 16 * 24 and pilot.length == base.length,
        cfg.seed != plan.train.seed,
        pilot.levels != base.levels,
        pilot.mistakes > 0,
        pilot.share < 1,
        pilot.optimizer is not None]
    assert sum(changed) == (name != 'base')
    if pilot.length != base.length: assert cfg.batch * pilot.length == 16 * 24


def test_who_sees_a_part_of_the_recording_encodes_that_part(tmp_path, folders):
    cfg = TrainConfig(batch=2)
    counts = {}
    for name in ('base', 'little'):
        videos = folders.videos(PILOTS[name])
        clips = clips_for(tmp_path, name, folders.tokenizer, videos, cfg)
        counts[name] = len(clips.latents)
    assert counts == dict(base=240, little=30)
    shared = (tmp_path/'base'/'latents.npy').samefile(tmp_path/'latents.npy')
    assert shared and not (tmp_path/'little'/'latents.npy').samefile(tmp_path/'latents.npy')


@pytest.mark.slow
def test_a_stopped_pilot_goes_on_with_its_number_of_steps(tmp_path, monkeypatch, folders):
    plan = PilotPlan(
        minutes=.02,
        train=TrainConfig(batch=2, warmup=1),
        shape=SHAPE,
        batches=1,
        protocol=Protocol(clips=1, states=1, depths=(1,), gaps=(), walks=2, walk=4, long=4,
                          long_walks=1))
    def stopped(*args, **kwargs): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr('nfd_ref.pilots.ask_pilot', stopped)
        with pytest.raises(KeyboardInterrupt):
            run_pilots(tmp_path, ['muon'], folders, plan, progress=False)
    steps = read_json(tmp_path/'muon_cost.json')['steps']
    assert not (tmp_path/'pilots.json').exists()
    row = run_pilots(tmp_path, ['muon'], folders, plan, progress=False).rows['muon']
    assert row['steps'] == steps
    assert row['tokens'] == steps * 2 * 24 * 15
    assert (tmp_path/'pilots.png').exists()

    dearer = replace(plan, minutes=600.)            # refused before anything is trained
    with pytest.raises(ValueError, match='Give another folder'):
        run_pilots(tmp_path, ['base'], folders, dearer, progress=False)
    assert not (tmp_path/'base').exists()
    (tmp_path/'pilots.json').unlink()
    with pytest.raises(ValueError, match='a pilot of 0.02 minutes; these are of 600'):
        run_pilots(tmp_path, ['muon'], folders, dearer, progress=False)


def test_mistakes_are_one_line(tmp_path, capsys):
    def says(*words):
        assert main(['pilots', str(tmp_path/'out'), *words]) == 2
        return capsys.readouterr().err
    video = ['--data', str(VIDEO)]
    assert 'no pilot "tall"; there are base, seed' in says(*video, '--rows', 'tall')
    assert '--minutes 0' in says(*video, '--minutes', '0')
    assert 'no such folder of video' in says('--data', str(tmp_path/'none'))
    assert not (tmp_path/'out').exists()


def test_the_record_is_of_one_price():
    record = read_record(RECORD, PilotsRecord)
    assert 'base' in record.rows and 'seed' in record.rows
    for name, row in record.rows.items():
        assert row['what'] == PILOTS[name].what
        spent = row['steps'] * row['step_seconds']
        assert spent == pytest.approx(60 * record.minutes, rel=.01), name
