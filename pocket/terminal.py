"""Reading what a person types into a terminal: with arrow keys, a history, and whole pastes."""
import sys
from contextlib import suppress

SECONDS_BETWEEN_PASTED_LINES = 0.05


def edit_lines():
    """From now on input() has arrow keys and a history, where Python comes with readline.

    Returns whether a paste of several lines is one input, too. That needs GNU's readline and a
    terminal that marks what is pasted, as nearly all do; Python switches it off. The readline of
    macOS and of uv's Python is another one, libedit; Windows has none.
    """
    try:
        import readline
    except ImportError:
        return False
    readline.parse_and_bind('set enable-bracketed-paste on')
    return 'libedit' not in (readline.__doc__ or '')


def is_waiting(seconds):
    """Whether somebody has typed something that was not read yet; waits for it so long."""
    import select
    with suppress(OSError, ValueError):  # Windows can't look at a terminal
        return bool(select.select([sys.stdin], [], [], seconds)[0])
    return False


def read_input(prompt, pastes_are_marked):
    """What a person types up to Enter, or pastes. Raises EOFError at the end of the input.

    pastes_are_marked: as edit_lines() says. If not, lines that arrive right behind the first are of
    the same paste, unless they were typed ahead, before there was a prompt.
    """
    is_terminal = sys.stdin.isatty()
    typed_ahead = is_terminal and is_waiting(0)
    text = input(prompt)
    if pastes_are_marked or typed_ahead or not is_terminal:
        return text
    with suppress(EOFError):
        while is_waiting(SECONDS_BETWEEN_PASTED_LINES):
            text += '\n' + input()
    return text
