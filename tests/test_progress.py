"""
Speed, time left and the bar between the lines of a training run: pocket/progress.py.

    pytest -n 0 tests/test_progress.py
"""
import io
import sys
from types import SimpleNamespace

import pytest

from pocket import errors, threads
from pocket.progress import Progress


class Clock:
    """A clock that stands still until a test moves it on."""
    now = 1000.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock():
    return Clock()


def train(progress, state, clock, seconds, steps=1):
    """Take steps of 100 tokens that last so many seconds each."""
    for _ in range(steps):
        clock.now += seconds
        state.step += 1
        state.tokens += 100
        progress.record_step(state, loss=1.5)


def new_state(step=0, seconds=0.0):
    return SimpleNamespace(step=step, tokens=100 * step, seconds=seconds)


def test_time_left_ignores_the_first_step(clock):
    state = new_state()
    progress = Progress(state, 100, None, 1000, eval_targets=0, clock=clock)
    train(progress, state, clock, seconds=60)  # memory is allocated, kernels are compiled
    assert progress.describe() == ''
    train(progress, state, clock, seconds=1, steps=9)
    assert progress.seconds_left() == pytest.approx(90)


def test_time_left_includes_evaluations(clock):
    state = new_state()
    progress = Progress(state, 100, None, 40, eval_targets=3000, clock=clock)
    train(progress, state, clock, seconds=1, steps=10)
    # Three evaluations to come (40, 80, 100), of 3,000 targets each, at a third of 0.01 s
    assert progress.seconds_left() == pytest.approx(90 + 3 * 10)
    train(progress, state, clock, seconds=1, steps=30)
    assert progress.seconds_left() == pytest.approx(60 + 3 * 10)  # that of step 40 comes now

    clock.now += 5
    progress.eval_seconds = 5.0
    progress.resume()
    train(progress, state, clock, seconds=1)
    assert progress.seconds_left() == pytest.approx(59 + 2 * 5)
    assert progress.tokens_per_second == pytest.approx(100)  # without the evaluation


def test_time_left_follows_the_load(clock):
    state = new_state()
    progress = Progress(state, 10_000, None, 10_000, eval_targets=0, clock=clock)
    train(progress, state, clock, seconds=1, steps=100)
    train(progress, state, clock, seconds=3, steps=200)
    assert progress.seconds_left() == pytest.approx(3 * 9700, rel=0.02)


def test_time_left_by_the_clock(clock):
    state = new_state(step=50, seconds=60.0)  # resumed after a minute
    progress = Progress(state, 10_000, 2.0, 10_000, eval_targets=0, clock=clock)
    train(progress, state, clock, seconds=5, steps=2)
    assert progress.seconds_left() == pytest.approx(50)
    assert progress.describe() == ', 20 tokens/s, 0:00:50 left'


def test_lines(clock, capsys, monkeypatch):
    state = new_state()
    progress = Progress(state, 100, None, 1000, eval_targets=0, clock=clock)
    monkeypatch.setattr(threads, 'describe_crowding', lambda: 'others are busy')
    train(progress, state, clock, seconds=2)
    progress.print_line(0.01)
    train(progress, state, clock, seconds=0.5, steps=9)
    progress.print_line(0.02)
    captured = capsys.readouterr()
    assert captured.err == ''  # no bar: this is no terminal
    assert captured.out.splitlines() == [
        'step 1: loss 1.5000, lr 1.00e-02',
        'advice: others are busy',  # once
        'step 10: loss 1.5000, lr 2.00e-02, 200 tokens/s, 0:00:45 left',
    ]


def test_bar_makes_room_for_lines(clock, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, 'stderr', screen)
    monkeypatch.setattr(sys, 'stdout', errors.Output(screen))
    state = new_state()
    progress = Progress(state, 4, None, 1000, eval_targets=0, clock=clock)
    train(progress, state, clock, seconds=1, steps=3)
    assert 'step 3 |' in screen.getvalue()
    assert '75 %, loss 1.5000' in screen.getvalue()

    print('a line')
    before, _, line = screen.getvalue().rpartition('\r')
    assert line == 'a line\n'
    assert before.rpartition('\r')[2].isspace()  # the bar was cleared
    print('another line')
    assert screen.getvalue().endswith('a line\nanother line\n')
    assert progress.bar is None


def test_closed_terminal_does_not_end_a_run(clock, monkeypatch):
    class Closed(Terminal):
        def write(self, text):
            raise OSError(5, 'Input/output error')

    monkeypatch.setattr(sys, 'stderr', Closed())
    state = new_state()
    progress = Progress(state, 4, None, 1000, eval_targets=0, clock=clock)
    train(progress, state, clock, seconds=1, steps=3)
    progress.hide()
