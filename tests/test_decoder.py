"Decoders: the encoder is never touched, a run goes on to the same bits, misfits are refused."
from dataclasses import replace

import numpy as np
import pytest
import torch

from nfd_ref.cli import main
from nfd_ref.command import JUDGE, VIDEO, WORLD
from nfd_ref.decoder import (
    DECODER_RECIPE, DecodersRecord, Stacks, critic_curve, decoders_table, require_same_latents,
    train_decoder)
from nfd_ref.files import read_log
from nfd_ref.storage import load_tensors, read_record, shipped
from nfd_ref.tokenizer import load_tokenizer
from nfd_ref.video import VideoFolder, import_clips

SHORT = replace(DECODER_RECIPE, steps=4, batch=2, save_every=2, log_every=1)


def videos(): return VideoFolder(VIDEO, 'train')


def train(out, cfg=SHORT, **kwargs):
    return train_decoder(out, videos(), WORLD, JUDGE, cfg, .02, .003, limit=500, progress=False,
                         **kwargs)


def weights(folder): return load_tensors(folder/'tokenizer.safetensors')


def test_films_stay_within_their_episode():
    frames = torch.arange(12)[:, None, None, None].expand(12, 2, 2, 3)
    stacks = Stacks(frames, [5, 3, 4], span=4, batch=64)
    _, films = stacks(0)
    first = films[:, 0, 0, 0, 0]
    assert set(first.tolist()) == {0, 1, 8}         # the second episode is too short
    assert (films[:, :, 0, 0, 0] == first[:, None] + torch.arange(4)).all()
    with pytest.raises(ValueError, match='no episode has 6 frames'): Stacks(frames, [5], 6, 1)


def test_a_run_that_is_stopped_ends_at_the_same_bits_and_keeps_the_encoder(tmp_path):
    train(tmp_path/'whole')
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path/'stopped', on_save=stop_at(4))
    train(tmp_path/'stopped', resume=True)

    whole = weights(tmp_path/'whole'/'final')
    stopped = weights(tmp_path/'stopped'/'final')
    old = weights(WORLD)
    assert all(torch.equal(stopped[name], tensor) for name, tensor in whole.items())
    changed = {name.split('.')[0] for name in old if not torch.equal(old[name], whole[name])}
    assert changed == {'decoder'}
    assert [step for step, _ in critic_curve(tmp_path/'whole'/'log.jsonl')] == [1, 3]


def stop_at(step):
    def on_save(_, at):
        if at == step: raise KeyboardInterrupt
    return on_save


def test_a_step_in_two_passes_sees_what_one_pass_sees(tmp_path):
    for passes in (1, 2): train(tmp_path/str(passes), replace(SHORT, accumulate=passes))
    logs = [read_log(tmp_path/str(passes)/'log.jsonl') for passes in (1, 2)]
    for one, two in zip(*logs): assert one['loss'] == pytest.approx(two['loss'], rel=1e-3)


def test_a_run_that_is_there_is_not_written_over(tmp_path, capsys):
    out = tmp_path/'run'
    train(out)
    written = (out/'final'/'tokenizer.safetensors').stat().st_mtime_ns
    assert main(['train', 'decoder', '--data', str(VIDEO), '--out', str(out)]) == 2
    assert 'Traceback' not in capsys.readouterr().err
    assert (out/'final'/'tokenizer.safetensors').stat().st_mtime_ns == written


def test_a_judge_of_other_frames_is_refused(tmp_path, capsys):
    small = VideoFolder(VIDEO, 'train').clip(0, 0, 20)
    cut = replace(small, frames=np.ascontiguousarray(small.frames[:, :32]))
    import_clips(tmp_path/'small', [cut, cut], test=1)
    words = ['train', 'decoder', '--data', str(tmp_path/'small'), '--out', str(tmp_path/'run')]
    assert main(words) == 2
    assert 'a judge of frames of (48, 80); the video has (32, 80)' in capsys.readouterr().err
    assert not (tmp_path/'run').exists()


def test_an_empty_folder_of_runs_is_refused(tmp_path, capsys):
    out = tmp_path/'decoders.json'
    assert main(['decoders', str(tmp_path), '--out', str(out), '--clips', '2']) == 2
    assert 'no run of nfd-ref train decoder in it' in capsys.readouterr().err
    assert not out.exists()


def test_other_latents_are_refused(tmp_path):
    tok = load_tokenizer(WORLD)
    other = load_tokenizer(WORLD)
    require_same_latents(tok, other, tmp_path)
    with torch.no_grad(): other.encoder[1].weight.mul_(2)
    with pytest.raises(ValueError, match='encoder.1.weight differs'):
        require_same_latents(tok, other, tmp_path)


def test_a_decoder_of_a_run_plays_in_the_place_of_the_old_one(tmp_path, capsys):
    train(tmp_path/'run')
    world = tmp_path/'sharp'
    words = ['release', str(tmp_path/'run'/'final'), str(shipped('distilled')), str(world),
             '--clips', '4']
    assert main(words) == 0, capsys.readouterr().err
    film = tmp_path/'play.mp4'
    assert main(['play', str(world), '--out', str(film), '--actions', 'forward*3']) == 0
    assert film.exists()


def test_the_record_is_of_four_decoders():
    record = read_record(shipped('records')/'decoders.json', DecodersRecord)
    assert set(record.rows) == {'shipped', 'plain', 'perceptual', 'adversarial', 'both'}
    assert record.real['sharpness'] == record.real['change'] == 1
    assert decoders_table(record).count('\n') == 12        # head, rule, real film, ten
