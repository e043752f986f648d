"""Errors that the person at the keyboard can mend, in one sentence and without a traceback."""
import os
import signal
import sys
import time

RANK = int(os.environ.get('RANK') or 0) if int(os.environ.get('WORLD_SIZE') or 1) > 1 else 0  # of torchrun's processes, which one this is


class UserError(ValueError):
    """Something that the person at the keyboard can mend: its text is one clear sentence, shown without a traceback."""

    def __init__(self, text):
        text = ' '.join(text.splitlines())  # what it quotes can be anything
        super().__init__(text if len(text) < 3000 else f'{text[:1000]} … {text[-1000:]}')


def show_user_errors(script):
    """From here on an uncaught UserError, Ctrl-C or lack of memory ends in one sentence on stderr, not in a traceback.

    And text is UTF-8 wherever it comes from or goes to: a console or file that can't hold a character is no error.
    """
    for name, mode in (('stdin', 'r'), ('stdout', 'w'), ('stderr', 'w')):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, mode, encoding='utf-8'))
        elif hasattr(stream, 'reconfigure'):
            stream.reconfigure(encoding='utf-8', errors='replace')
    if RANK:  # of torchrun's processes the first speaks
        sys.stdout = open(os.devnull, 'w', encoding='utf-8')

    def hook(kind, error, traceback):
        text = str(error)
        if issubclass(kind, UserError):
            status = 2
        elif issubclass(kind, KeyboardInterrupt):
            text, status = 'interrupted', 130
        elif issubclass(kind, MemoryError) or any(
                s in text.lower() for s in ('out of memory', 'not enough memory', "can't allocate memory")):
            text, status = ('out of memory: lower --batch_size (and raise --gradient_accumulation_steps to match), --block_size '
                            'or the model, or try --gradient_checkpointing'), 2
        elif issubclass(kind, BrokenPipeError):
            sys.stderr.close()  # whoever read our output has left: nothing to say, nobody to say it to
            raise SystemExit(1)
        elif 'gloo' in text or kind.__name__.startswith('Dist'):  # torch.distributed's errors
            text, status = f'lost another process of this run, or never met it: {text.split("] ")[-1].split(". ")[0]}', 1
        else:
            return sys.__excepthook__(kind, error, traceback)
        if RANK:  # all find the same mistakes, and torchrun ends us when the first has said so: only what it does not see is ours
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            time.sleep(3)
            text = f'process {RANK}: {text}'
        print('\n' * issubclass(kind, KeyboardInterrupt) + f'{script}: {text}', file=sys.stderr)
        raise SystemExit(status)  # the interpreter takes its exit status from here
    sys.excepthook = hook
