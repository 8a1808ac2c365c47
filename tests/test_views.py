"A world that knows again what it saw from the spot where the player stands."
import copy

import numpy as np
import pytest
import torch

from nfd_ref.cli import main
from nfd_ref.command import STUDENT, VIDEO
from nfd_ref.console import Console
from nfd_ref.session import Session, Setting, Start, replay
from nfd_ref.streaming import World, rollout
from nfd_ref.video import VideoFolder
from nfd_ref.views import STAYS, RememberingWorld, Spot

LEFT, RIGHT = 'turn left', 'turn right'


@pytest.fixture(scope='module')
def start(): return VideoFolder(VIDEO, 'test').clip(1, 150, 158)


@pytest.fixture(scope='module')
def world(): return RememberingWorld.load(STUDENT, device='cpu', engine='rolling', steps=1)


def stand(world, start):
    world.reset(start, seed=0)
    for _ in range(6): world.step('noop')


def test_a_view_comes_again(world, start):
    stand(world, start)
    seen = world.engine.last
    for action in [LEFT] * 20 + [RIGHT] * 19: world.step(action)
    again = world.make_frame(RIGHT)
    plain = World._make(world, torch.tensor([[[world.space.index(RIGHT)[0]]]]))
    assert (again - seen).abs().mean() < .6 * (plain - seen).abs().mean()


def test_a_step_that_fails_leaves_the_spot_as_it_was(world, start, monkeypatch):
    stand(world, start)
    before = world.spot.heading, world.spot.standing, len(world.spot.seen)
    def fail(latents): raise RuntimeError('no decoder')
    monkeypatch.setattr(world, 'decode', fail)
    with pytest.raises(RuntimeError, match='no decoder'): world.step(LEFT)
    assert (world.spot.heading, world.spot.standing, len(world.spot.seen)) == before


def test_a_copy_and_a_reset_have_seen_nothing(world, start):
    stand(world, start)
    assert world.spot.seen
    other = copy.copy(world)
    other.reset(start[:2])
    assert other.spot.seen == {} and world.spot.seen
    world.reset(start[:2])
    assert world.spot.seen == {}


def test_who_walks_sees_what_the_plain_world_makes(world, start):
    clip = VideoFolder(VIDEO, 'test').clip(1, 150, 170)
    clip.actions[8:] = 1
    plain = World.load(STUDENT, device='cpu', engine='rolling', steps=1)
    np.testing.assert_array_equal(rollout(world, clip), rollout(plain, clip))


def test_the_moves_that_stay_are_those_of_the_recorder():
    names = VideoFolder(VIDEO).space.fields['move']
    assert set(STAYS) == {name for name in names if name == 'noop' or name.startswith('turn ')}
    spot = Spot()
    for name in (LEFT, RIGHT): spot = spot.after(STAYS[name])
    assert spot.heading == 0


def test_a_game_of_other_actions_is_refused(start):
    plain = World.load(STUDENT, device='cpu')
    space = type(plain.space)('other', {'move': [f'm{i}' for i in range(9)]})
    with pytest.raises(ValueError, match='how far one of them turns'):
        RememberingWorld(plain.model, plain.tok, space, plain.size, device='cpu')


@pytest.fixture
def place(): return Start(str(VIDEO), VideoFolder(VIDEO, 'test').episodes[1].name, 150, 158)


def test_a_walk_by_hand_looks_up_and_is_made_again(place, tmp_path):
    session = Session.open(Setting(str(STUDENT), place, device='cpu', steps=1, views=.3))
    for keys in [[]] * 7 + [['KeyQ']] * 3 + [['KeyE']] * 3:
        session.hands.hold('me', keys)
        session.tick()
    assert len(session.world.spot.seen) == 4
    assert replay(session.save(tmp_path/'walk')).same


def test_the_console_offers_it_where_turns_are_known(place, tmp_path):
    console = Console([STUDENT], VIDEO, place, out=tmp_path, device='cpu', steps=1)
    assert 'views' in [control['name'] for control in console.menu()['controls']]
    for value in (.3, 0):
        console.change('views', value)
        assert console.state()['values']['views'] == value
        assert isinstance(console.session.world, RememberingWorld) == (value > 0)
    console.change('views', .3)
    with pytest.raises(ValueError, match='no drafts with them'): console.change('speculate', 2)
    console.close()


@pytest.mark.parametrize('known', [True, False])
def test_what_has_a_value_has_a_control(place, tmp_path, monkeypatch, known):
    monkeypatch.setattr('nfd_ref.console.turns_are_known', lambda space: known)
    console = Console([STUDENT], VIDEO, place, out=tmp_path, device='cpu', steps=1)
    controls = {control['name'] for control in console.menu()['controls']}
    assert console.state()['values'].keys() == controls
    assert ('views' in controls) == known
    console.close()


def test_the_commands_look_up(tmp_path, capsys):
    film = tmp_path/'a.mp4'
    assert main(['play', '--views', '.3', '--frames', '12', '--actions', 'noop*6, turn left*3',
                 '--out', str(film)]) == 0
    assert film.exists()
    for bad, said in ((['--views', '2'], 'a noise level in (0, 1)'),
                      (['--views', '.3', '--speculate', '4'], 'without drafts')):
        assert main(['play', *bad, '--frames', '2', '--out', str(tmp_path/'b.mp4')]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert not (tmp_path/'b.mp4').exists()
