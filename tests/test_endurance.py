"Endurance: a record whose worlds are kept, walks that fit, and answers that are known."
import numpy as np
import pytest

from nfd_ref.cli import main
from nfd_ref.command import WALKS
from nfd_ref.endurance import EnduranceRecord, keys_read, longest, sharpness, stations_of
from nfd_ref.storage import read_record, shipped
from nfd_ref.video import VideoFolder, import_clips


def test_stations_are_whole():
    assert stations_of(100) == [0]
    assert stations_of(1000) == [0, 400, 900]
    assert stations_of(999) == [0, 400]


def test_longest_stretch():
    assert longest(np.array([1, 1, 0, 1], bool)) == 2
    assert longest(np.zeros(3, bool)) == 0
    assert longest(np.ones(3, bool)) == 3


def test_sharpness_of_stripes():
    stripes = np.zeros((2, 4, 6, 3), np.uint8)
    stripes[:, :, ::2] = 255                        # steps of 1 across, of 0 down
    assert sharpness(stripes) == pytest.approx(.5)


def test_keys_of_several_films_are_scored_together(monkeypatch):
    read = iter([([[1]], [[1]], [[0.]]), ([[2]], [[1]], [[0.]])])
    monkeypatch.setattr('nfd_ref.endurance.judge',
                        lambda *_: tuple(np.array(part) for part in next(read)))
    walks = [VideoFolder(WALKS).clip(0, 0, 3)] * 2
    films = [walk.frames for walk in walks]
    assert keys_read(films, walks, None) == pytest.approx((2 / 3 + 0) / 2, abs=1e-4)


def test_short_walks_are_refused_in_one_line(tmp_path, capsys):
    clips = (VideoFolder(WALKS).clip(e, 0, 100) for e in range(2))
    import_clips(tmp_path/'walks', clips, test=1)
    words = ['endure', str(tmp_path/'out.json'), '--walks', str(tmp_path/'walks')]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert 'a walk of 100 frames; wanted are 64 to start from and 100 to look at' in said
    assert not (tmp_path/'out.json').exists()


def test_worlds_of_one_name_are_refused(tmp_path, capsys):
    words = ['endure', str(tmp_path/'out.json'), '--walks', str(WALKS), '--worlds']
    assert main([*words, 'runs/a/final,runs/b/final']) == 2         # ... and neither is there
    assert 'no such folder' in capsys.readouterr().err
    assert main([*words, 'runs/a/final,data/a']) == 2
    assert 'two of one name' in capsys.readouterr().err


def test_the_record_is_of_what_ships():
    record = read_record(shipped('records')/'endurance.json', EnduranceRecord)
    assert set(record.rows) == {'world', 'distilled'}
    assert len(record.stations) == len(record.real['f1']) == 5
