"""
Getting along with other programs on the same cores: pocket/threads.py.

    pytest -n 0 tests/test_threads.py
"""
import os
import subprocess
import sys
import threading

import pytest
import torch
from conftest import CHECKOUT

from pocket import threads
from pocket.threads import Clocks, ExtraTeams, Load, Monitor

linux = pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')


@pytest.fixture
def clocks(monkeypatch):
    """Makes read_clocks() return what the test appends to this list, one after the other."""
    readings = [Clocks(wall=0, own=0, all=0, waiting=0)]
    monkeypatch.setattr(threads, 'read_clocks', lambda: readings.pop(0))
    return readings


@pytest.fixture
def no_teams(monkeypatch):
    """Records when teams come and go, instead of making threads."""
    events = []

    def summon(teams):
        if not teams.exist:
            events.append('summoned')
            teams.dismissed = threading.Event()

    monkeypatch.setattr(ExtraTeams, 'summon', summon)
    return events


@linux
def test_clocks_run_on():
    before = threads.read_clocks()
    sum(range(1_000_000))
    after = threads.read_clocks()
    assert after.wall > before.wall
    assert after.own > before.own
    assert after.all >= before.all > 0


def test_load_comes_and_goes(clocks, no_teams):
    monitor = Monitor(num_threads=2, num_cores=2, may_act=True)
    clocks.append(Clocks(wall=1, own=2.0, all=2.0, waiting=0))    # alone: two threads work
    clocks.append(Clocks(wall=2, own=3.1, all=4.0, waiting=0.9))  # another program has come
    clocks.append(Clocks(wall=3, own=4.7, all=5.8, waiting=1.0))  # it still takes 0.2 of a core
    clocks.append(Clocks(wall=4, own=6.6, all=7.8, waiting=1.0))  # it has gone

    monitor.look()
    assert not monitor.crowded and not monitor.extra_teams.exist
    for _ in range(2):
        monitor.look()
        assert monitor.crowded and monitor.extra_teams.exist
    monitor.look()
    assert not monitor.crowded and not monitor.extra_teams.exist
    assert no_teams == ['summoned']


def test_a_low_priority_program_shows_in_our_waiting(clocks, no_teams):
    monitor = Monitor(num_threads=2, num_cores=2, may_act=True)
    clocks.append(Clocks(wall=1, own=1.8, all=2.0, waiting=0.4))
    monitor.look()
    assert monitor.crowded


def test_a_program_on_a_spare_core_disturbs_nobody(clocks, no_teams):
    monitor = Monitor(num_threads=3, num_cores=4, may_act=True)
    clocks.append(Clocks(wall=1, own=3.0, all=4.0, waiting=0.0))
    monitor.look()
    assert not monitor.crowded


def test_ended_threads_are_no_negative_load():
    load = threads.load_between(Clocks(0, 0, 0, waiting=5.0), Clocks(1, 1, 0.9, waiting=1.0))
    assert load == Load(0.0, 0.0)


@pytest.mark.parametrize('num_threads, num_cores, count', [
    (2, 2, 1),    # 2 + 1 threads on 2 cores
    (16, 16, 1),
    (8, 16, 2),   # 8 + 7 threads are not more than 16 cores
    (4, 64, 21),  # in a container: 4 + 20 * 3 threads are 64
])
def test_there_are_more_threads_than_cores(num_threads, num_cores, count):
    assert ExtraTeams(num_threads, num_cores).count == count
    assert num_threads + count * (num_threads - 1) > num_cores


def test_what_the_user_has_set_remains(clocks, no_teams, monkeypatch):
    monkeypatch.setenv('OMP_WAIT_POLICY', 'ACTIVE')
    monkeypatch.setattr(sys, 'argv', ['train.py', '--dataset=a b'])
    monitor = Monitor(num_threads=2, num_cores=2, may_act=False)
    clocks.append(Clocks(wall=1, own=1.1, all=2.0, waiting=0.9))
    monitor.look()
    assert no_teams == []
    monkeypatch.setattr(threads, 'monitor', monitor)
    assert threads.describe_crowding() == (
        "other programs use 0.9 of the 2 CPU cores, which slows this one down, the more with "
        "OMP_WAIT_POLICY=ACTIVE: try OMP_WAIT_POLICY=passive python train.py '--dataset=a b'")


def test_others_are_not_blamed_for_our_own_threads(clocks, no_teams, monkeypatch):
    monitor = Monitor(num_threads=2, num_cores=2, may_act=True)
    clocks.append(Clocks(wall=1, own=2.0, all=2.0, waiting=0.9))
    monitor.look()
    monkeypatch.setattr(threads, 'monitor', monitor)
    assert monitor.crowded and threads.describe_crowding() is None


@pytest.mark.parametrize('files, expected', [
    ({'cpu.max': '150000 100000\n'}, 1.5),
    ({'cpu.max': 'max 100000\n'}, None),
    ({'cpu/cpu.cfs_quota_us': '50000\n', 'cpu/cpu.cfs_period_us': '100000\n'}, 0.5),
    ({'cpu/cpu.cfs_quota_us': '-1\n', 'cpu/cpu.cfs_period_us': '100000\n'}, None),
    ({'cpu.max': 'nonsense'}, None),
    ({}, None),
])
def test_quota_of_a_container(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads.cpu_quota(tmp_path) == expected


@pytest.mark.parametrize('env, expected', [
    ({}, True),
    ({'OMP_WAIT_POLICY': 'active'}, False),
    ({'GOMP_SPINCOUNT': '1000'}, False),
])
@linux
def test_start(env, expected, monkeypatch):
    for name in threads.WAITING_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(threads, 'monitor', None)
    monkeypatch.setattr(Monitor, 'start', lambda monitor: None)

    monkeypatch.setattr(torch, 'get_num_threads', lambda: 1)
    threads.share_cores()
    assert threads.monitor is None  # a single thread waits for nobody
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 2)
    threads.share_cores()
    assert threads.monitor.may_act == expected


# Prints whether an extra team's threads come, and go
COME_AND_GO = '''
import os, time
import torch
from pocket.threads import ExtraTeams

def becomes(count):
    for _ in range(500):
        if len(os.listdir('/proc/self/task')) == count:
            return True
        time.sleep(0.01)
    return False

torch.zeros(1 << 18).add_(1)
alone = len(os.listdir('/proc/self/task'))
teams = ExtraTeams(num_threads=2, num_cores=2)
teams.summon()
print(becomes(alone + 2))
teams.dismiss()
print(becomes(alone))
'''


@linux
def test_extra_team_comes_and_goes():
    """Its threads must end, otherwise ours would sleep for ever."""
    env = {**os.environ, 'OMP_NUM_THREADS': '2'}
    out = subprocess.check_output(
        [sys.executable, '-c', COME_AND_GO], cwd=CHECKOUT, env=env, text=True)
    assert out.split() == ['True', 'True']
