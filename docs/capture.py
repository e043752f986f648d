"""
Record a conversation with the bundled character as a picture that plays: docs/chat.svg.

    python docs/capture.py                                    in a clone that has no runs in out/
    python docs/capture.py --say="Hello." --say="Bye." --to=mine.svg

It opens a shell in a pseudo-terminal, types `python sample.py --chat` and what --say lists, key by
key, and notes when which characters appear. The typing is ours, at about the speed of a person;
the replies come from the model, when it gave them. The picture is an SVG in which each piece of
text is hidden until its time. It needs no script, so it also plays where README is shown, and where
nothing plays, all of the text is there.
"""
import html
import os
import re
import select
import struct
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

# Make pocket/ importable from any working directory
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pocket.configurator import configure
from pocket.errors import UserError
from pocket.files import ROOT, atomic_write, check_path

say: tuple[str, ...] = (           # what is said, one line after the other
    'hello there',
    'who are you?',
    'do you like the rain?',
    'how did you get lost?',
    'what are you afraid of?',
)
command = 'python sample.py --chat'  # what is typed first
to = 'docs/chat.svg'               # the picture
columns = 46                       # [20, 200] width; few enough to be readable on a phone
seed = 1                           # of the pauses between keys
if __name__ == '__main__':
    configure(__file__, globals())

SHELL_PROMPT = '$ '
SECONDS_TO_WAIT = 60    # for an answer, before it gives up
# What a terminal obeys and does not show, such as the sequence that announces a paste
CONTROL = re.compile('\x1b\\[[0-9;?]*[A-Za-z]|[\x00-\x09\x0b-\x1f\x7f]')


# ---- Recording


@dataclass
class Piece:
    """Characters that appeared at the same time."""

    seconds: float  # since the beginning
    text: str
    typed: bool     # by us: the terminal shows what one types


class Terminal:
    """A shell in a pseudo-terminal, and the pieces of text that have appeared in it."""

    def __init__(self):
        try:
            import fcntl
            import pty
            import termios
        except ImportError:
            raise UserError('Windows has no pseudo-terminals: record the chat on Linux, on a Mac '
                            'or in WSL') from None
        pid, self.master = pty.fork()
        if pid == 0:    # the new process
            os.chdir(ROOT)
            # A dumb terminal has no colors and moves no cursor, so text is all that appears
            environment = {**os.environ, 'TERM': 'dumb', 'PS1': SHELL_PROMPT, 'PYTHONUTF8': '1'}
            environment.pop('ENV', None)
            os.execvpe('sh', ['sh', '-i', '+m'], environment)   # +m: without job control
        # 50 lines of 500 columns: lines are not broken here, but by wrap()
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack('HHHH', 50, 500, 0, 0))
        self.pieces = []
        self.begin = time.monotonic()

    def text(self):
        """All that has appeared."""
        return ''.join(piece.text for piece in self.pieces)

    def read(self, typed=False):
        """Wait a little for new text; returns whether there was some."""
        ready, _, _ = select.select([self.master], [], [], 0.02)
        if not ready:
            return False
        try:
            received = os.read(self.master, 65536).decode('utf-8', 'replace')
        except OSError:     # the shell has ended
            return False
        received = CONTROL.sub('', received)
        self.pieces.append(Piece(time.monotonic() - self.begin, received, typed))
        return True

    def read_until(self, end):
        """Read until the text ends with end, and nothing more comes."""
        deadline = time.monotonic() + SECONDS_TO_WAIT
        while self.read() or not self.text().endswith(end):
            if time.monotonic() > deadline:
                raise UserError(f'nothing that ends with {end!r} within {SECONDS_TO_WAIT} s, but '
                                f'{self.text()[-300:]!r}')

    def read_for(self, seconds, typed=False):
        """Read for that long."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.read(typed)

    def type(self, line, rng):
        """Press a key for each character, as fast as a person, then Enter."""
        for character in line:
            os.write(self.master, character.encode())
            self.read_for(rng.uniform(0.04, 0.11), typed=True)
        self.read_for(0.2, typed=True)
        os.write(self.master, b'\n')


def record(command, lines, rng):
    """Run a command that chats and say lines to it; returns the pieces of text that appeared."""
    terminal = Terminal()
    terminal.read_until(SHELL_PROMPT)
    terminal.read_for(0.5)
    terminal.type(command, rng)
    for line in lines:
        before = len(terminal.text())
        terminal.read_until('you: ')
        reply = terminal.text()[before:]
        terminal.read_for(0.6 + 0.025 * len(reply))     # somebody reads it
        terminal.type(line, rng)
    terminal.read_until('you: ')
    pieces = list(terminal.pieces)
    os.write(terminal.master, b'/quit\nexit\n')
    terminal.read_for(1)
    os.close(terminal.master)
    return pieces


# ---- Drawing

LINE_HEIGHT = 20
FONT_SIZE = 14
COLUMN = 0.62 * FONT_SIZE   # the widest of the fonts below
MARGIN = 16                 # around the text
GAP = 6                     # between the screen and the text of a page beside it
# Names of speakers and the shell's prompt are faint, what was typed is strong
STYLE = f'''
.screen {{ fill: #fbfaf8; stroke: #dcd7ce }}
text {{
  font: {FONT_SIZE}px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre; fill: #23211e;
}}
.name {{ fill: #6b665e }}
.typed {{ fill: #a8480f; font-weight: 600 }}
@media (prefers-color-scheme: dark) {{
  .screen {{ fill: #191817; stroke: #3b3834 }}
  text {{ fill: #e9e5df }}
  .name {{ fill: #a09a91 }}
  .typed {{ fill: #f09a63 }}
}}
tspan {{ animation: wait 0s }}
@keyframes wait {{ from, to {{ visibility: hidden }} }}
@media (prefers-reduced-motion: reduce) {{ tspan {{ animation: none }} }}
'''


@dataclass
class Character:
    """One character of the screen."""

    text: str
    seconds: float
    style: str      # a class of STYLE, '' for the others


def characters_of(pieces):
    """The pieces as a list of Character."""
    characters = []
    for piece in pieces:
        style = 'typed' if piece.typed else ''
        characters += [Character(text, piece.seconds, style) for text in piece.text]

    text = ''.join(character.text for character in characters)
    for match in re.finditer(r'^(\$|[\w ]+:) ', text, re.M):
        for character in characters[match.start():match.end()]:
            character.style = 'name'
    return characters


def wrap(characters, columns):
    """The lines of the screen, lists of Character, broken between words."""
    lines = []
    line = []
    for character in [*characters, Character('\n', 0, '')]:
        if character.text != '\n':
            line.append(character)
            continue
        text = ''.join(character.text for character in line)
        position = 0
        for part in textwrap.wrap(text, columns, break_on_hyphens=False) or ['']:
            begin = text.index(part, position)
            position = begin + len(part)
            lines.append(line[begin:position])
        line = []
    return lines


def draw(pieces, columns):
    """The pieces as an SVG that shows each at its time."""
    lines = wrap(characters_of(pieces), columns)
    width = round(columns * COLUMN + 2 * MARGIN + 2 * GAP)
    height = len(lines) * LINE_HEIGHT + 2 * MARGIN
    drawn = [draw_line(line, number) for number, line in enumerate(lines) if line]
    return '\n'.join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img">',
        '<title>A conversation in a terminal</title>',
        f'<style>{STYLE}</style>',
        f'<rect class="screen" x="{GAP + 0.5}" y="0.5" width="{width - 2 * GAP - 1}" '
        f'height="{height - 1}" rx="8"/>',
        *drawn,
        '</svg>\n',
    ])


def draw_line(line, number):
    """A line of the screen as a <text>, with a <tspan> for characters of one style and time."""
    spans = []
    first = 0
    for end in range(1, len(line) + 1):
        begin = line[first]
        if end < len(line):
            after = line[end]
            if (after.seconds, after.style) == (begin.seconds, begin.style):
                continue
        text = html.escape(''.join(character.text for character in line[first:end]), quote=False)
        style = f' class="{begin.style}"' if begin.style else ''
        milliseconds = round(1000 * begin.seconds)
        spans.append(f'<tspan{style} style="animation-duration:{milliseconds}ms">{text}</tspan>')
        first = end
    y = MARGIN + number * LINE_HEIGHT + FONT_SIZE
    return f'<text x="{GAP + MARGIN}" y="{y}" xml:space="preserve">{"".join(spans)}</text>'


if __name__ == '__main__':
    if any(ROOT.glob('out/*/*.pt')):
        raise UserError('out/ has runs, and sample.py --chat would talk to the newest: '
                        'record the chat in a fresh clone')
    target = check_path(to)
    pieces = record(command, say, Random(seed))
    picture = draw(pieces, columns).encode()
    atomic_write(target, lambda file: file.write(picture))
    print(''.join(piece.text for piece in pieces))
    print(f'{target}: {len(picture) / 1e3:.0f} kB, {pieces[-1].seconds:.0f} s')
