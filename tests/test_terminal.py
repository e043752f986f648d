"""
Chatting in a terminal, a real one: pocket/terminal.py and sample.py --chat.

    pytest -n 0 tests/test_terminal.py
"""
import os
import select
import sys
from contextlib import suppress

import pytest
from conftest import CHECKOUT

pty = pytest.importorskip('pty')  # Windows has none


class Terminal:
    """A Python program in a pseudoterminal."""

    def __init__(self, *args):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(CHECKOUT)
            os.environ['TERM'] = 'xterm'
            os.environ['INPUTRC'] = os.devnull
            os.execv(sys.executable, [sys.executable, *args])

    def read_until(self, text):
        """All that the program writes until this text comes."""
        screen = b''
        while text.encode() not in screen:
            ready, _, _ = select.select([self.fd], [], [], 60)
            assert ready, f'{text!r} did not come: {screen}'
            try:
                piece = os.read(self.fd, 4096)
            except OSError:  # the program has ended
                piece = b''
            assert piece, f'ended before {text!r} came: {screen}'
            screen += piece
        return screen.decode(errors='replace')

    def type(self, keys, then):
        """Press keys; returns all that is written until the text `then` comes."""
        os.write(self.fd, keys.encode())
        return self.read_until(then)

    def end(self):
        """Wait for the end of the program; returns its exit status."""
        with suppress(OSError):  # nobody has the other end any more
            while os.read(self.fd, 4096):
                pass
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


READ_TWICE = '''
import sys
{before}
from pocket import terminal
marked = terminal.edit_lines()
for _ in range(2):
    print(repr(terminal.read_input('you: ', marked)))
'''


@pytest.fixture(params=['GNU readline', 'no readline'])
def reader(request):
    """A program that prints what it reads, twice."""
    before = ''
    if request.param == 'no readline':
        before = 'sys.modules["readline"] = None'
    else:
        readline = pytest.importorskip('readline')
        if 'libedit' in readline.__doc__:
            pytest.skip('this Python has libedit')
    terminal = Terminal('-c', READ_TWICE.format(before=before))
    terminal.has_readline = request.param == 'GNU readline'
    terminal.start = terminal.read_until('you: ')
    return terminal


def paste(terminal, text):
    """What a terminal sends when somebody pastes a text and presses Enter."""
    if terminal.has_readline:
        assert '\x1b[?2004h' in terminal.start  # the program has asked for marks
        return f'\x1b[200~{text}\x1b[201~\r'
    return f'{text}\r'


def test_paste_of_several_lines_is_one_input(reader):
    assert repr('one\ntwo\n\nthree') in reader.type(paste(reader, 'one\ntwo\n\nthree'), "three'")
    assert repr('four') in reader.type('four\r', "four'")
    assert reader.end() == 0


def test_line_is_edited_and_called_back(reader):
    if not reader.has_readline:
        pytest.skip('a terminal alone can delete, but not move')
    left = '\x1b[D'
    up = '\x1b[A'
    assert "'Hello'" in reader.type(f'helo{left}l\x01\x1b[3~H\r', "'Hello'")
    assert "'Hello!'" in reader.type(f'{up}!\r', "'Hello!'")
    assert reader.end() == 0


def test_chat_in_a_terminal(trained):
    """sample.py reads so. (Whether it replies is for other tests.)"""
    terminal = Terminal(str(trained.root / 'sample.py'), '--out_dir=out/toy', '--chat',
                        '--max_new_tokens=2')
    terminal.read_until('> ')
    assert 'the conversation is forgotten' in terminal.type('/reset\r', '> ')
    assert "'/nonsense' is no command" in terminal.type('/nonsense\r', '> ')
    os.write(terminal.fd, b'quit\r')
    assert terminal.end() == 0
