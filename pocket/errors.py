"""Errors that the user can fix: one sentence on stderr and an exit status, not a traceback."""
import os
import signal
import sys
import time

# torchrun starts several processes and tells each one which it is. Errors need to know, so that
# only one process reports what all of them run into. pocket/distributed.py imports both from here.
world_size = int(os.environ.get('WORLD_SIZE') or 1)
rank = int(os.environ.get('RANK') or 0) if world_size > 1 else 0

# how PyTorch and the operating systems put it
OUT_OF_MEMORY = ('out of memory', 'not enough memory', "can't allocate memory")


class UserError(ValueError):
    """Something that the user can fix. Its text is one clear sentence, shown without a traceback.

    The text may quote anything, such as a damaged file: line breaks go, and a very long text loses
    its middle.

    >>> print(UserError('the file says:\\nnothing'))
    the file says: nothing
    """

    def __init__(self, text):
        text = ' '.join(text.splitlines())
        if len(text) >= 3000:
            text = f'{text[:1000]} … {text[-1000:]}'
        super().__init__(text)


def show_user_errors(script):
    """From now on an uncaught UserError, Ctrl-C or lack of memory ends in one sentence on stderr.

    Also switches stdin, stdout and stderr to UTF-8. script: the name that begins the sentence.
    """
    use_utf8()
    if rank > 0:  # only the first of several processes prints
        sys.stdout = open(os.devnull, 'w', encoding='utf-8')

    def hook(kind, error, traceback):
        if issubclass(kind, BrokenPipeError):
            sys.stderr.close()  # whoever read our output has gone: there is nobody to tell
            raise SystemExit(1)

        explained = explain(kind, error)
        if explained is None:
            return sys.__excepthook__(kind, error, traceback)
        text, status = explained

        if rank > 0:
            # All processes find the same mistake, and torchrun ends the others once the first has
            # reported it. So we wait, and report only if nobody ends us: then it is ours alone.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(3)
            text = f'process {rank}: {text}'

        if issubclass(kind, KeyboardInterrupt):
            print(file=sys.stderr)  # the terminal shows ^C on the current line
        print(f'{script}: {text}', file=sys.stderr)
        raise SystemExit(status)  # the interpreter takes its exit status from here

    sys.excepthook = hook


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
    if issubclass(kind, KeyboardInterrupt):
        return 'interrupted', 130

    out_of_memory = any(phrase in text.lower() for phrase in OUT_OF_MEMORY)
    if out_of_memory or issubclass(kind, MemoryError):
        advice = ('out of memory: lower --batch_size (and raise --gradient_accumulation_steps to '
                  'match), --block_size or the model size, or try --gradient_checkpointing')
        return advice, 2

    if 'gloo' in text or kind.__name__.startswith('Dist'):  # errors of torch.distributed
        reason = text.split('] ')[-1].split('. ')[0]
        return f'lost another process of this run, or never met it: {reason}', 1
    return None
