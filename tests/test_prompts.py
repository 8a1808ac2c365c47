"Two recordings as one, and a world that is named in mid-stream."
from dataclasses import replace

import numpy as np
import pytest
import torch

from nfd_ref.cli import main
from nfd_ref.command import STUDENT, VIDEO
from nfd_ref.prompts import WAYS, Prompted, join_recordings
from nfd_ref.streaming import World
from nfd_ref.training import begin_with
from nfd_ref.transformer import DiT
from nfd_ref.video import NULL, Clip, VideoFolder, import_clips


def short(folder, size=(48, 80), fps=20.):
    "Three short episodes of the shipped video."
    videos = VideoFolder(VIDEO, 'train')
    def clips():
        for e in range(3):
            clip = videos.clip(e, 0, 24)
            yield Clip(clip.frames[:, :size[0], :size[1]], clip.actions, clip.space, fps)
    return import_clips(folder, clips()).folder


@pytest.fixture(scope='module')
def joined(tmp_path_factory):
    folder = tmp_path_factory.mktemp('joined')
    worlds = dict(here=short(folder/'a'), there=short(folder/'b'))
    return join_recordings(folder/'both', worlds)


def two_worlds(space, scale, **settings):
    "The shipped student with a field of worlds; the name of each weighs `scale`."
    shipped = World.load(STUDENT, device='cpu', engine='rebuild')
    model = DiT(replace(shipped.model.cfg, actions=space.sizes))
    begin_with(model, STUDENT)
    torch.manual_seed(0)
    rows = len(shipped.model.action.table.weight)
    model.action.table.weight.data[rows:] = scale * torch.randn(3, model.cfg.d)
    return Prompted(World(model, shipped.tok, space, shipped.size, steps=1, sampler='consistency',
                          device='cpu', **settings))


def test_joined_episodes_say_where_they_play(joined):
    assert joined.space.fields['world'] == ('here', 'there')
    assert [name for name, _ in joined.episodes][::3] == ['here_ep_00000', 'there_ep_00000']
    for e, (name, _) in enumerate(joined.episodes):
        assert set(joined.actions(e)[1:, 1]) == {int(name.startswith('there'))}
        assert (joined.actions(e)[0] == NULL).all()
    held_out = VideoFolder(joined.folder, 'test')
    assert [name for name, _ in held_out.episodes] == ['here_ep_00002', 'there_ep_00002']


def test_joining_again_gives_the_same_bytes(joined, tmp_path):
    worlds = {name: joined.folder.parent/folder for name, folder in (('here', 'a'), ('there', 'b'))}
    assert join_recordings(tmp_path/'again', worlds).hash() == joined.hash()


@pytest.mark.parametrize('other, said', (
    (dict(size=(32, 80)), r'frames of \(32, 80\)'), (dict(fps=10.), '10 a second')))
def test_what_does_not_fit_together_is_refused(tmp_path, other, said):
    worlds = dict(a=short(tmp_path/'a'), b=short(tmp_path/'b', **other))
    with pytest.raises(ValueError, match=said): join_recordings(tmp_path/'out', worlds)
    assert not (tmp_path/'out').exists()


def test_the_command_joins_or_says_in_one_line_why_not(tmp_path, capsys):
    short(tmp_path/'a')
    for bad, said in ((['maze'], 'wanted NAME=FOLDER'), (['a=x', 'a=y'], 'two worlds of one name'),
                      ([f'a={tmp_path/"a"}', f'b={tmp_path/"c"}'], 'no such folder')):
        assert main(['join', str(tmp_path/'out'), *bad]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count('\n') == 1
        assert not (tmp_path/'out').exists()
    assert main(['join', str(tmp_path/'out'), f'a={tmp_path/"a"}', f'b={tmp_path/"a"}']) == 0
    assert len(VideoFolder(tmp_path/'out')) == 6


def test_new_fields_begin_as_if_they_were_not_there(joined):
    shipped = World.load(STUDENT, device='cpu', engine='rebuild', steps=1)
    clip = joined.clip(0)
    prompted = two_worlds(joined.space, 0., engine='rebuild')
    prompted.reset(clip[:8])
    shipped.reset(replace(clip[:8], actions=clip.actions[:8, :1], space=shipped.space), 0)
    for move, _ in clip.actions[8:12]:
        assert (prompted.step([move, 1]) == shipped.step([move])).all()


def test_another_space_is_not_gone_on_from(joined):
    cfg = World.load(STUDENT, device='cpu').model.cfg
    with pytest.raises(ValueError, match='action.table.weight'):
        begin_with(DiT(replace(cfg, actions=(2, 9))), STUDENT)


@pytest.mark.parametrize('way', WAYS)
def test_a_name_counts_from_the_next_frame_on(joined, way):
    clip = joined.clip(0)
    prompted = two_worlds(joined.space, .1, engine='rebuild')

    def play(*names):
        prompted.reset(clip[:8])
        films = []
        for i, action in enumerate(clip.actions[8:12]):
            if i == 2:
                for name in names: prompted.name(name, way)
            films.append(prompted.step(action))
        return np.stack(films)

    stays, changed = play(), play('there')
    assert (stays[:2] == changed[:2]).all()
    assert (stays[2:] != changed[2:]).any()
    assert prompted.named == 1
    if way == 'keep': assert (play('there', 'here') == stays).all()     # nothing was touched
    assert (play('there') == changed).all()             # and the same keys give the same film


def test_the_past_is_as_long_as_the_window(joined):
    prompted = two_worlds(joined.space, 0.)
    clip = joined.clip(0)
    prompted.reset(clip)
    assert len(prompted.past) == len(clip)
    for _ in range(60): prompted.step(clip.actions[1])
    assert len(prompted.past) == prompted.world.model.cfg.window
