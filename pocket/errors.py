"""Errors that the user can fix: one sentence on stderr and an exit status, not a traceback."""
import atexit
import errno
import os
import reprlib
import signal
import sys
import time


# torchrun starts several processes and tells each one which it is. Errors need to know, so that
# only one process reports what all of them run into. pocket/distributed.py imports both from here.
def read_environment(name, default):
    """A whole number from an environment variable; ends the script with a sentence if it is none.

    >>> read_environment('POCKETGPT_UNSET', 1)
    1
    """
    text = os.environ.get(name) or str(default)
    if text.isascii() and text.isdecimal() and len(text) < 10:
        return int(text)
    print(f'the environment variable {name} must be a whole number, got {text!r}: unset it, or '
          f'start with torchrun', file=sys.stderr)
    raise SystemExit(2)


world_size = max(1, read_environment('WORLD_SIZE', 1))
rank = read_environment('RANK', 0) if world_size > 1 else 0
SECONDS_TO_WAIT_FOR_THE_FIRST = 3  # of several processes, to report what may be everybody's mistake

# how PyTorch and the operating systems put it
OUT_OF_MEMORY = ('out of memory', 'not enough memory', "can't allocate memory")

# What no script can do without, and what to say if it is missing
PACKAGES = ('numpy', 'requests', 'safetensors', 'torch', 'tqdm')
HOW_TO_INSTALL = ('pip install -r requirements.txt, or, if that is done, activate its virtual '
                  'environment first: . .venv/bin/activate')

# What the surroundings of a script can do to any file that it reads or writes
REFUSALS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO,
            errno.ELOOP, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE}


# --------------------------------------------------------------------------------------------------
# Showing what may come from anybody

CONTROL_CHARACTERS = {}  # … and what is shown in their place
for code in (*range(32), *range(127, 160)):
    if chr(code) not in '\n\t':
        CONTROL_CHARACTERS[code] = f'\\x{code:02x}'

# Those of Unicode that turn the direction of what follows, so that other words seem to stand there
# (https://trojansource.codes), or hide it. Joiners and marks stay: emoji and scripts need them
for code in (*range(0x202a, 0x202f), *range(0x2066, 0x2070), *range(0xfff9, 0xfffc)):
    CONTROL_CHARACTERS[code] = f'\\u{code:04x}'


def show_control_characters(text):
    r"""The text with its control characters made visible, but for line breaks and tabs.

    A terminal obeys them: it lets a text clear the screen, or fill the clipboard.

    >>> print(show_control_characters('\x1b[2Jhello \u202e'))
    \x1b[2Jhello \u202e
    """
    return text.translate(CONTROL_CHARACTERS)


def short_repr(value):
    """repr(), but short, and of anything: of nested lists the first few, of a number its ends.

    >>> short_repr(10**5000), short_repr('x'), short_repr([[1] * 9] * 9)[:30]
    ('a number too long to show', "'x'", '[[1, 1, 1, 1, 1, 1, ...], [1, ')
    """
    try:
        return SHORT_REPR.repr(value)
    except ValueError:  # Python does not print more than 4,300 digits
        return 'a number too long to show'
    except Exception:  # of an object in a config file, say
        return f'a {type(value).__name__}'


SHORT_REPR = reprlib.Repr()
SHORT_REPR.maxstring = 200
SHORT_REPR.maxother = 200


# --------------------------------------------------------------------------------------------------
# Errors


class UserError(ValueError):
    """Something that the user can fix. Its text is one clear sentence, shown without a traceback.

    The text may quote anything, such as a damaged file: line breaks go, control characters become
    visible, and a very long text loses its middle.

    >>> print(UserError('the file says:\\nnothing'))
    the file says: nothing
    """

    def __init__(self, text):
        text = ' '.join(text.splitlines())
        if len(text) >= 3000:
            text = f'{text[:1000]} … {text[-1000:]}'
        super().__init__(show_control_characters(text))


class OutputError(Exception):
    """stdout can't be written to: the disk is full, or whoever read it has gone (then is_pipe).

    It is no OSError: who handles those, of the files that he writes, would take it for one of them.
    """

    def __init__(self, error):
        super().__init__(f'cannot write to stdout: {error.strerror or error}')
        self.is_pipe = isinstance(error, BrokenPipeError)


class Output:
    """sys.stdout, in which writing either succeeds or raises OutputError, and then stops for good.

    on_failure: called with the OutputError instead, if set. before_write: called before anything is
    written, if set; it clears a progress bar. On a terminal control characters are made visible.
    """

    def __init__(self, stream):
        self.stream = stream
        self.is_terminal = stream.isatty()
        self.on_failure = None
        self.before_write = None

    def write(self, text):
        if self.before_write is not None:
            self.before_write()
        if self.is_terminal:
            text = show_control_characters(text)
        try:
            return self.stream.write(text)
        except OSError as e:
            self.fail(e)

    def flush(self):
        try:
            self.stream.flush()
        except OSError as e:
            self.fail(e)

    def fail(self, error):
        """From now on all output goes nowhere: also what is still in a buffer."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)
        failure = OutputError(error)
        if self.on_failure is None:
            raise failure from None
        self.on_failure(failure)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def show_user_errors(script):
    """From now on an uncaught UserError, Ctrl-C or lack of memory ends in one sentence on stderr.

    Also switches stdin, stdout and stderr to UTF-8, and makes stdout an Output. script: the name
    that begins the sentence.
    """
    use_utf8()
    if rank > 0:  # only the first of several processes prints
        sys.stdout = open(os.devnull, 'w', encoding='utf-8')
    if not isinstance(sys.stdout, Output):
        sys.stdout = Output(sys.stdout)
        atexit.register(flush_at_exit, script)

    def hook(kind, error, traceback):
        if issubclass(kind, BrokenPipeError) or getattr(error, 'is_pipe', False):
            raise SystemExit(1)  # whoever read our output has gone: there is nobody to tell

        explained = explain(kind, error)
        if explained is None:
            return sys.__excepthook__(kind, error, traceback)
        text, status = explained

        if rank > 0:
            # All processes find the same mistake, and torchrun ends the others once the first has
            # reported it. So we wait, and report only if nobody ends us: then it is ours alone.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(SECONDS_TO_WAIT_FOR_THE_FIRST)
            text = f'process {rank}: {text}'

        if getattr(sys.stdout, 'before_write', None) is not None:
            sys.stdout.before_write()
        if issubclass(kind, KeyboardInterrupt):
            print(file=sys.stderr)  # the terminal shows ^C on the current line
        print(f'{script}: {text}', file=sys.stderr)
        raise SystemExit(status)  # the interpreter takes its exit status from here

    sys.excepthook = hook


def flush_at_exit(script):
    """Write what was printed last. The interpreter would do so too, but complain at length."""
    try:
        sys.stdout.flush()
    except OutputError as e:
        if not e.is_pipe:
            print(f'{script}: {e}', file=sys.stderr, flush=True)
        os._exit(1)
    except ValueError:
        pass  # somebody has closed it


def use_utf8():
    """Make the standard streams UTF-8 whatever the locale, and no character an error."""
    for name, mode in (('stdin', 'r'), ('stdout', 'w'), ('stderr', 'w')):
        stream = getattr(sys, name)
        if stream is None:  # whoever started us closed it
            setattr(sys, name, open(os.devnull, mode, encoding='utf-8'))
        elif hasattr(stream, 'reconfigure'):
            stream.reconfigure(encoding='utf-8', errors='replace')


def explain(kind, error):
    """(sentence, exit status), or None if the error is a bug: that deserves its traceback."""
    text = str(error)
    if issubclass(kind, UserError):
        return text, 2
    if issubclass(kind, OutputError):
        return text, 1
    if issubclass(kind, OSError) and error.filename is not None and error.errno in REFUSALS:
        return f'cannot use {show_control_characters(str(error.filename))}: {error.strerror}', 2
    if issubclass(kind, KeyboardInterrupt):
        return 'interrupted', 130
    if issubclass(kind, ModuleNotFoundError) and error.name in PACKAGES:
        return f'{error.name} is not installed for {sys.executable}: {HOW_TO_INSTALL}', 2

    out_of_memory = any(phrase in text.lower() for phrase in OUT_OF_MEMORY)
    if out_of_memory or issubclass(kind, MemoryError):
        advice = ('out of memory: lower --batch_size (and raise --gradient_accumulation_steps to '
                  'match), --block_size or the model size, or try --gradient_checkpointing')
        return advice, 2

    if 'gloo' in text or kind.__name__.startswith('Dist'):  # errors of torch.distributed
        reason = text.split('] ')[-1].split('. ')[0]
        return f'lost another process of this run, or never met it: {reason}', 1
    return None
