"The pieces used alone: what is wrong is refused in our words, before a number is."
from pathlib import Path

import pytest
import torch
from tiny import noisy_dit

from nfd_ref.attention import KVCache
from nfd_ref.cli import main
from nfd_ref.consistency import CONSISTENCY_RECIPE, keep_student
from nfd_ref.engines import Native
from nfd_ref.kernel import require_stack
from nfd_ref.loop import load_moments, moments
from nfd_ref.storage import WorldInfo, read_record
from nfd_ref.transformer import DiTConfig

SHAPE = dict(d=32, layers=2, heads=2, window=4, latents=4, grid=(4, 4), patch=2, actions=(2,),
             rope=(4, 6, 6))

def frames(f):
    "Latents, levels and actions of `f` frames."
    return torch.zeros(1, f, 4, 4, 4), torch.zeros(1, f), torch.zeros(1, f, 1, dtype=int)

@pytest.mark.parametrize('name, given, says', [
    ('x', torch.zeros(1, 2, 4, 4, 8), 'takes latents .* 4, 4, 4'),
    ('x', torch.zeros(2, 4, 4, 4), 'takes latents'),
    ('x', torch.zeros(1, 3, 4, 4, 4), 'one noise level for each frame'),
    ('t', torch.zeros(1), 'one noise level for each frame'),
    ('actions', torch.zeros(1, 2, dtype=int), 'the fields of one action'),
    ('actions', torch.zeros(1, 2, 3, dtype=int), 'the fields of one action')])
def test_wrong_shapes_are_named(name, given, says):
    x, t, actions = frames(2)
    inputs = dict(x=x, t=t, actions=actions) | {name: given}
    with pytest.raises(ValueError, match=says): noisy_dit(DiTConfig(**SHAPE))(**inputs)

def test_a_cache_is_told_what_it_keeps():
    dit = noisy_dit(DiTConfig(**SHAPE))
    cache = dit.new_cache()
    with pytest.raises(ValueError, match='say write='): dit(*frames(1), cache)
    for write in (-1, 2):
        with pytest.raises(ValueError, match='can keep 0 to 1'): dit(*frames(1), cache, write=write)
    with pytest.raises(ValueError, match='a cache, if there is one'): dit(*frames(1), write=1)
    dit(*frames(1), cache, write=1)
    assert len(cache) == 1

def test_a_cache_that_is_longer_than_the_window_is_refused():
    dit = noisy_dit(DiTConfig(**SHAPE))
    cache = KVCache(4)              # the window is 4, with the frame being made
    for _ in range(4): dit(*frames(1), cache, write=1)
    with pytest.raises(ValueError, match='too long for a window of 4'):
        dit(*frames(1), cache, write=1)

def test_a_cache_that_was_counted_on_and_not_written_is_refused():
    dit = noisy_dit(DiTConfig(**SHAPE))
    cache = dit.new_cache()
    dit(*frames(1), cache, write=0)
    cache.next += 1                 # as if it had been kept
    with pytest.raises(ValueError, match='does not hold the last 1 frames'):
        dit(*frames(1), cache, write=0)

def test_scores_that_no_stack_holds_are_refused():
    require_stack(7, 33 * 84)       # the paper's
    with pytest.raises(ValueError, match='shorter window'): require_stack(5, 15 * 14_000)
    with pytest.raises(ValueError, match='shorter window'):
        Native(noisy_dit(DiTConfig(**SHAPE | dict(window=20_000))))

def test_a_student_s_folder_appears_whole(tmp_path, monkeypatch):
    seen = []
    def copy(file, to):
        seen.append((tmp_path/'final').exists())
        raise OSError('No space left')
    monkeypatch.setattr('nfd_ref.consistency.shutil.copy', copy)
    home = Path(__file__).parents[1]/'data'/'world'
    info = read_record(home/'world.json', WorldInfo)
    with pytest.raises(OSError, match='No space'):
        keep_student(tmp_path/'final', noisy_dit(DiTConfig(**SHAPE)), home, info,
                     CONSISTENCY_RECIPE, {}, data='0')
    assert seen == [False]
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('spoil, says', [
    ('gone', r'no tensor "weight\|exp_avg"; these weights belong to a model of another shape'),
    ('other shape', r'"weight\|exp_avg" is \[3, 3\], the config says \[3, 2\]')])
def test_moments_that_do_not_fit_are_named(spoil, says):
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    tensors = moments(model, optimizer)
    if spoil == 'gone': del tensors['weight|exp_avg']
    else: tensors['weight|exp_avg'] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=f'a.safetensors: {says}'):
        load_moments(model, optimizer, tensors, 'a.safetensors')

def test_compare_looks_at_its_judges_before_it_trains(tmp_path, capsys):
    for flag in ('--idm', '--branches', '--tokenizer'):
        assert main(['compare', str(tmp_path/'out'), flag, str(tmp_path/'none')]) == 2
        assert 'none' in capsys.readouterr().err
    assert not (tmp_path/'out').exists()
