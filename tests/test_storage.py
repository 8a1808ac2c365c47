"What is kept on disk: whole files or none, records read strictly, weights that fit."
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from nfd_ref.loop import TrainConfig
from nfd_ref.storage import (
    DatasetInfo, JudgeInfo, Report, TokenizerInfo, WorldInfo, fingerprint, from_json, load_into,
    load_model, load_tensors, lock, provenance, read_json, read_record, save_model, save_tensors,
    shipped, unlock, write_aside, write_json, write_record)
from nfd_ref.tokenizer import TokenizerConfig
from nfd_ref.transformer import DiTConfig

ROOT = Path(__file__).parents[1]
SPACE = {'name': 'walker', 'fields': {'jump': ['none', 'jump']}}

@dataclass
class Shape:
    width: int
    depth: int = 1

class Model(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.layers = nn.Sequential(*(nn.Linear(cfg.width, cfg.width) for _ in range(cfg.depth)))

def info(**changes):
    return TokenizerInfo(shape=asdict(Shape(3)), train={}, data='abc', **changes)

# ---- whole files

@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt, SystemExit])
def test_write_aside_leaves_nothing(tmp_path, error):
    (tmp_path/'old.txt').write_text('old')
    with pytest.raises(error):
        with write_aside(tmp_path/'old.txt') as aside:
            aside.write_text('new')
            raise error
    with pytest.raises(error):
        with write_aside(tmp_path/'dir') as aside:
            aside.mkdir()
            (aside/'x').write_text('x')
            raise error
    assert [path.name for path in tmp_path.iterdir()] == ['old.txt']
    assert (tmp_path/'old.txt').read_text() == 'old'

def test_write_aside_replaces_a_file_and_makes_its_folder(tmp_path):
    for text in ('first', 'second'):
        with write_aside(tmp_path/'new'/'a.txt') as aside:
            aside.write_text(text)
            assert aside.parent == tmp_path/'new' and aside.name.startswith('.')
    assert [path.name for path in (tmp_path/'new').iterdir()] == ['a.txt']
    assert (tmp_path/'new'/'a.txt').read_text() == 'second'

def test_write_aside_removes_what_a_killed_process_left(tmp_path):
    "Its own kind alone: another file's half, and that of a living process, are not its business."
    for half in ('.a[1].999999999.part.txt', '.b.999999999.part.txt', '.a[1].999999999.part.npy',
                 f'.a[1].{os.getppid()}.part.txt'):
        (tmp_path/half).write_text('half')
    (tmp_path/'.a[1].999999998.part.txt').mkdir()
    with write_aside(tmp_path/'a[1].txt') as aside: aside.write_text('whole')
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([
        'a[1].txt', '.b.999999999.part.txt', '.a[1].999999999.part.npy',
        f'.a[1].{os.getppid()}.part.txt'])

def test_write_aside_complains_if_nothing_was_written(tmp_path):
    with pytest.raises(FileNotFoundError):
        with write_aside(tmp_path/'a.txt'): pass
    assert not list(tmp_path.iterdir())

def test_what_is_no_json_leaves_the_old_file(tmp_path):
    write_json(tmp_path/'a.json', {'a': 1})
    with pytest.raises(TypeError): write_json(tmp_path/'a.json', {'a': object()})
    assert read_json(tmp_path/'a.json') == {'a': 1}
    assert os.listdir(tmp_path) == ['a.json']

@pytest.mark.parametrize('data', [b'', b'{"a": ', b'\xff\xfe'])
def test_bad_json_is_named(tmp_path, data):
    (tmp_path/'a.json').write_bytes(data)
    with pytest.raises(ValueError, match='a.json: not readable as JSON'):
        read_json(tmp_path/'a.json')
    with pytest.raises(FileNotFoundError, match='b.json: no such file'):
        read_json(tmp_path/'b.json')

# ---- records

WORLD = WorldInfo(
    shape={'d': 8},
    train={'lr': .1},
    data='abc',
    action_space=SPACE,
    fps=20,
    size=(48, 80),
    before=('first', 'second'))

REPORT = Report(protocol={}, seed=0, data='abc', weights={}, world={}, metrics={})

DATASET = DatasetInfo(fps=20, action_space=SPACE)

@pytest.mark.parametrize('record', [info(), WORLD, REPORT, DATASET, replace(DATASET, test=())])
def test_a_record_comes_back(tmp_path, record):
    write_record(tmp_path/'a.json', record)
    assert read_record(tmp_path/'a.json', type(record)) == record
    assert None not in read_json(tmp_path/'a.json').values()

@pytest.mark.parametrize('record', [info(), WORLD, REPORT, DATASET])
def test_a_record_is_read_strictly(tmp_path, record):
    write_record(tmp_path/'a.json', record)
    good = read_json(tmp_path/'a.json')
    cls = type(record)

    def complaint(values):
        write_json(tmp_path/'a.json', values)
        with pytest.raises(ValueError, match='a.json: ') as e: read_record(tmp_path/'a.json', cls)
        return str(e.value)

    assert 'unknown field "colour"' in complaint(good | {'colour': 'red'})
    assert f'format 99, but {cls.__name__} is format' in complaint(good | {'format': 99})
    assert 'format 99' in complaint({'format': 99, 'colour': 'red'})    # the better reason first
    assert 'a JSON object is wanted' in complaint([good])
    if 'kind' in good: assert "kind 'frog'" in complaint(good | {'kind': 'frog'})

    for name in needed(cls):
        less = {key: value for key, value in good.items() if key != name}
        assert f'no field "{name}"' in complaint(less)

def needed(cls):
    "Names of the fields that must be there."
    with pytest.raises(TypeError) as e: cls()
    return [word for word in str(e.value).split("'") if word in cls.__dataclass_fields__]

def test_every_record_needs_something():
    for record in (info(), WORLD, REPORT, DATASET): assert len(needed(type(record))) >= 2

def test_one_kind_is_not_another(tmp_path):
    write_record(tmp_path/'tokenizer.json', info())
    with pytest.raises(ValueError, match="kind 'tokenizer', but JudgeInfo is kind 'idm'"):
        read_record(tmp_path/'tokenizer.json', JudgeInfo)

@pytest.mark.parametrize('fps', ['20', None, 0, -1, True, [20]])
def test_frames_per_second_are_a_number(fps):
    with pytest.raises(ValueError, match='x.json: not a valid DatasetInfo: fps is a number'):
        from_json(DatasetInfo, {'fps': fps, 'action_space': SPACE}, 'x.json')

# ---- weights

def test_a_model_comes_back(tmp_path):
    model = Model(Shape(3))
    save_model(tmp_path, model, info(commit='abc'), dtype=torch.float32)
    assert sorted(os.listdir(tmp_path)) == ['tokenizer.json', 'tokenizer.safetensors']
    again, about = load_model(tmp_path, TokenizerInfo, Model, Shape)
    weights = fingerprint(tmp_path/'tokenizer.safetensors')
    assert about == info(commit='abc', weights=weights)
    assert not again.training and again.cfg == Shape(3)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)

def test_a_model_and_the_files_beside_it_appear_together(tmp_path):
    (tmp_path/'a.json').write_text('{}')
    def save(*files): save_model(tmp_path/'final', Model(Shape(3)), info(), beside=files)
    with pytest.raises(FileNotFoundError): save(tmp_path/'a.json', tmp_path/'none.json')
    assert os.listdir(tmp_path) == ['a.json']
    save(tmp_path/'a.json')
    assert sorted(os.listdir(tmp_path/'final')) == [
        'a.json', 'tokenizer.json', 'tokenizer.safetensors']

def test_halves_come_back_as_floats(tmp_path):
    model = Model(Shape(3))
    save_model(tmp_path, model, info())
    stored = load_tensors(tmp_path/'tokenizer.safetensors')
    assert {value.dtype for value in stored.values()} == {torch.float16}
    again, _ = load_model(tmp_path, TokenizerInfo, Model, Shape)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value.half().float(), rtol=0, atol=0)

def test_whole_numbers_keep_their_type(tmp_path):
    save_tensors(tmp_path/'a.safetensors', {'i': torch.arange(3), 'x': torch.ones(2)}, torch.half)
    stored = load_tensors(tmp_path/'a.safetensors')
    assert stored['i'].dtype == torch.int64 and stored['x'].dtype == torch.float16

def test_missing_and_cut_weights_are_named(tmp_path):
    path = tmp_path/'a.safetensors'
    with pytest.raises(FileNotFoundError, match='a.safetensors: no such weights'):
        load_tensors(path)
    save_tensors(path, {'x': torch.ones(99)})
    whole = fingerprint(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match='a.safetensors: not a whole safetensors file'):
        load_tensors(path)
    assert len(whole) == 16 and fingerprint(path) != whole

def test_weights_that_do_not_fit_are_named():
    model = Model(Shape(3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    good = {name: value + 1 for name, value in before.items()}
    less = {name: value for name, value in good.items() if name != 'layers.0.bias'}
    wrong = good | {'layers.0.weight': torch.ones(4, 3)}
    cases = [
        (less, 'no tensor "layers.0.bias"'),
        (good | {'more': torch.ones(1)}, 'tensor "more" is not of this model'),
        (wrong, r'"layers.0.weight" is \[4, 3\], the config says \[3, 3\]')]
    for tensors, message in cases:
        with pytest.raises(ValueError, match=f'here: {message}'): load_into(model, tensors, 'here')
        for name, value in model.state_dict().items(): assert (value == before[name]).all()
    assert load_into(model, good, 'here') is model
    assert (model.state_dict()['layers.0.bias'] == before['layers.0.bias'] + 1).all()

def test_a_folder_that_is_no_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere: no such folder'):
        load_model(tmp_path/'nowhere', TokenizerInfo, Model, Shape)
    with pytest.raises(FileNotFoundError, match='tokenizer.json: no such file'):
        load_model(tmp_path, TokenizerInfo, Model, Shape)
    save_model(tmp_path, Model(Shape(3)), replace(info(), shape={'width': 3, 'colour': 1}))
    with pytest.raises(ValueError, match='tokenizer.json: not a valid Shape: unknown field'):
        load_model(tmp_path, TokenizerInfo, Model, Shape)
    save_model(tmp_path, Model(Shape(3)), replace(info(), shape={'width': 5}))
    with pytest.raises(ValueError, match='tokenizer.safetensors: "layers.0.bias" is'):
        load_model(tmp_path, TokenizerInfo, Model, Shape)

def test_weights_that_are_no_numbers_are_refused():
    model = Model(Shape(3))
    good = dict(model.state_dict())
    for value, message in (
        (torch.full((3,), torch.nan), 'nan or infinite'),
        (torch.full((3,), torch.inf), 'nan or infinite'),
        (torch.ones(3, dtype=torch.int8), 'of type torch.int8'),
        (torch.ones(3, dtype=torch.complex64), 'of type torch.complex64')):
        with pytest.raises(ValueError, match=message):
            load_into(model, good | {'layers.0.bias': value}, 'here')

def test_one_flipped_bit_is_noticed(tmp_path):
    save_model(tmp_path, Model(Shape(3)), info())
    path = tmp_path/'tokenizer.safetensors'
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match='not the weights that tokenizer.json tells of'):
        load_model(tmp_path, TokenizerInfo, Model, Shape)

@pytest.mark.parametrize('cls, values, says', [
    (DiTConfig, dict(layers='8'), "layers is a whole number, not '8'"),
    (DiTConfig, dict(layers=True), 'layers is a whole number'),
    (DiTConfig, dict(layers=None), 'layers is a whole number'),
    (DiTConfig, dict(rope=3), r'rope is a list such as \[8, 28, 28\], not 3'),
    (DiTConfig, dict(rope=['8', 28, 28]), 'rope is a list'),
    (DiTConfig, dict(qk_norm=1), 'qk_norm is true or false'),
    (TokenizerConfig, dict(mults=3), 'mults is a list'),
    (TrainConfig, dict(lr=float('nan')), 'lr is a number')])
def test_fields_have_types(cls, values, says):
    with pytest.raises(ValueError, match=f'x.json: not a valid {cls.__name__}: {says}'):
        from_json(cls, values, 'x.json')

@pytest.mark.parametrize('size', (['48', '80'], [48], [48, 80, 3], [48., 80], [True, 80], 48))
def test_the_size_of_a_frame_is_two_whole_numbers(size):
    values = read_json(shipped('world')/'world.json') | dict(size=size)
    with pytest.raises(ValueError, match='size is two whole numbers'):
        from_json(WorldInfo, values, 'x.json')

def test_a_number_may_be_whole():
    assert from_json(TrainConfig, dict(lr=1), 'x.json').lr == 1

@pytest.mark.parametrize('size', [0, -1, 10**9])
def test_sizes_beyond_reason_are_refused_before_they_are_made(tmp_path, size):
    save_model(tmp_path, Model(Shape(3)), replace(info(), shape={'width': size}))
    with pytest.raises(ValueError, match=f'tokenizer.json: width is {size}, wanted 1 to'):
        load_model(tmp_path, TokenizerInfo, Model, Shape)

def test_provenance_needs_no_git(monkeypatch):
    assert json.dumps(provenance())
    monkeypatch.setenv('PATH', '')
    about = provenance()
    assert about['commit'] is None and about['torch'] == torch.__version__

HOLD = '''
import sys, time
from nfd_ref.storage import lock
lock(sys.argv[1])
print('held', flush=True)
time.sleep(100)
'''

def test_one_writer_at_a_time(tmp_path):
    pytest.importorskip('fcntl')
    holder = subprocess.Popen([sys.executable, '-c', HOLD, str(tmp_path)], cwd=ROOT,
                              stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == 'held\n'
    with pytest.raises(FileExistsError, match='another process is writing this run'):
        lock(tmp_path)
    holder.kill()
    holder.wait()
    lock(tmp_path)          # a lock ends with its owner
    lock(tmp_path)          # and its owner may ask again
    unlock(tmp_path)

FULL = '''
import resource, sys
from pathlib import Path
import numpy as np
import torch
from nfd_ref.storage import *
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))     # as if the disk were full then
folder = Path(sys.argv[1])
numbers = torch.zeros(100_000)

def array(path):
    with write_aside(path) as tmp: new_array(tmp, np.float32, (100_000,))

writers = dict(
    json=lambda path: write_json(path, numbers.tolist()),
    tensors=lambda path: save_tensors(path, dict(numbers=numbers)),
    array=array)
for name, write in writers.items():
    try:
        write(folder/name)
    except OSError as e:
        print(name)
'''

def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path):
    pytest.importorskip('resource')
    ran = subprocess.run([sys.executable, '-c', FULL, str(tmp_path)], cwd=ROOT,
                         capture_output=True, text=True)
    assert ran.stdout.split() == ['json', 'tensors', 'array'], ran.stderr
    assert list(tmp_path.iterdir()) == []
