"""
Scripts that run train.py with one function replaced, so that something happens at an exact moment:
a signal in the third step, a compiler that fails.

    script = stop_in_step(project, 3)
    project.run(script, *TINY, status=130)

Each function writes such a script into a project and returns its name. The script replaces a
function of a module and then runs train.py, which finds the replacement when it imports the module.

Besides, a small script for prepare/.
"""

RUN_TRAIN = '''
import runpy
import sys
from pathlib import Path

sys.argv[0] = str(Path(__file__).with_name('train.py'))
runpy.run_path(sys.argv[0], run_name='__main__')
'''

# train.py sets the learning rates once in every step, just before forward
STOP_IN_STEP = '''
import signal
from itertools import count

from pocket import optim

step_numbers = count(1)
set_learning_rates = optim.set_learning_rates

def stop(*args):
    if next(step_numbers) == STEP:
        signal.raise_signal(signal.SIGINT)
    set_learning_rates(*args)

optim.set_learning_rates = stop
'''

# An evaluation updates its progress bar after every batch
STOP_IN_EVALUATION = '''
import signal

from tqdm import tqdm

from pocket.distributed import rank

update = tqdm.update

def stop(bar, tokens):
    if rank == RANK and tokens > 0:
        signal.raise_signal(signal.SIGTERM)
    return update(bar, tokens)

tqdm.update = stop
'''

# The first thing that train.py does after its last step, in every process
INTERRUPT_AT_THE_END = '''
import signal

from pocket import distributed

shutdown = distributed.shutdown

def interrupt():
    signal.raise_signal(signal.SIGINT)
    shutdown()

distributed.shutdown = interrupt
'''

# torch.compile never fails itself, but the first call of what it returns can
FAIL_TO_COMPILE = '''
import torch

class NotCompiled(torch.nn.Module):
    def forward(self, *args, **batch):
        raise RuntimeError('no compiler')

torch.compile = lambda function: NotCompiled()
'''

# The processes after the first wait less long for the first to report a mistake
REPORT_SOON = '''
from pocket import errors

errors.SECONDS_TO_WAIT_FOR_THE_FIRST = 0.3
'''

# Somebody writes into the data while replies are generated from it
LOSE_DATA_IN_BLEU = '''
from pocket import evaluate
from pocket.errors import UserError

def bleu_of(*args):
    raise UserError('val.bin was written to while it was in use')

evaluate.bleu_of = bleu_of
'''

# The loss is fine, but the gradient is not
EXPLODE = '''
import torch

torch.nn.utils.get_total_norm = lambda gradients: torch.tensor(float('inf'))
'''


def write_wrapper(project, name, replacement):
    """Write a script that runs the code `replacement` and then train.py. Returns its name."""
    (project.root / name).write_text(replacement + RUN_TRAIN, encoding='utf-8')
    return name


def stop_in_step(project, step):
    """train.py, which gets SIGINT in its step number `step`; the first is 1."""
    return write_wrapper(project, 'stop_in_step.py', STOP_IN_STEP.replace('STEP', str(step)))


def stop_in_evaluation(project, rank=0, interrupt_at_the_end=False):
    """train.py, whose process `rank` gets SIGTERM in the middle of an evaluation.

    interrupt_at_the_end: all processes get SIGINT after their last step, too.
    """
    replacement = STOP_IN_EVALUATION.replace('RANK', str(rank))
    if interrupt_at_the_end:
        replacement += INTERRUPT_AT_THE_END
    return write_wrapper(project, 'stop_in_evaluation.py', replacement)


def fail_to_compile(project):
    """train.py without a compiler: calling what torch.compile returns raises RuntimeError."""
    return write_wrapper(project, 'fail_to_compile.py', FAIL_TO_COMPILE)


def report_soon(project):
    """train.py, whose processes after the first wait a moment, not seconds, before they report a
    mistake.
    """
    return write_wrapper(project, 'report_soon.py', REPORT_SOON)


def lose_data_in_bleu(project):
    """train.py, which can't read val when an evaluation computes BLEU."""
    return write_wrapper(project, 'lose_data_in_bleu.py', LOSE_DATA_IN_BLEU)


def explode(project):
    """train.py, whose gradient is infinite."""
    return write_wrapper(project, 'explode.py', EXPLODE)


# --------------------------------------------------------------------------------------------------
# A dataset of a few bytes

PREPARE_MADE = '''
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pocket.configurator import configure
from pocket.datasets import dataset_folder, write_stream
from pocket.tokenizer import make_tokenizer

data_dir: str | None = None  # where datasets live
configure(__file__, globals())
text = 'hello world ' * 50
write_stream(dataset_folder(data_dir, 'made'), make_tokenizer('byte'), text, text[:50], {}, 'none')
'''


def write_preparation(project):
    """Write prepare/made.py, for --dataset=made."""
    (project.root / 'prepare' / 'made.py').write_text(PREPARE_MADE, encoding='utf-8')
