"""
Threads on a CPU that others use, too: why one busy neighbor makes training ten times slower, and
what we do about it.

PyTorch cuts the work of an operation into equal parts, one for each core, and all threads wait for
the slowest. They wait by spinning: looking again and again whether the others are done. On an idle
machine that is fastest, because a thread that sleeps needs long to wake up. But as soon as another
program takes a core for a few milliseconds, the thread that should run there falls behind, the
others spin until it is done, and the kernel, for which spinning is work like any other, gives them
the time that it needs. Then sleeping is far better. Measured in docs/LOG.md.

The variables OMP_WAIT_POLICY and GOMP_SPINCOUNT choose between the two, but for good, and before
the program starts. GNU's OpenMP (libgomp), which PyTorch's packages for Linux contain, has another
switch. As its manual says at GOMP_SPINCOUNT, threads soon go to sleep as long as there are more of
them than cores. So we look every second whether our threads have to share their cores. While they
do, an idle team of OpenMP threads exists beside the one that works (ExtraTeams); when the others
have gone, it is dismissed. Results don't change: the team that works keeps its size.
"""
import math
import os
import shlex
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

# What users can set instead; then it is left alone
WAITING_VARIABLES = ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')
SIZE_VARIABLES = ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OMP_THREAD_LIMIT')

# Cores that others take from us. With a third of one, spinning and sleeping are about equally fast
CROWDED = 0.3
ALONE_AGAIN = 0.15
FIRST_LOOK = 0.2  # seconds
INTERVAL = 1.0    # seconds


# --------------------------------------------------------------------------------------------------
# Looking


class Clocks(NamedTuple):
    """Clocks that run on, in seconds."""
    wall: float
    own: float      # processor time of this process
    all: float      # processor time of all processes, on the cores that we may use
    waiting: float  # time in which our threads could have run, but other threads had the core


class Load(NamedTuple):
    """Averages between two readings of the clocks, in cores."""
    others: float   # what other processes used
    waiting: float  # how many of our threads were waiting for a core


def read_clocks():
    """The Clocks now, from Linux's /proc. Takes less than a millisecond. Raises OSError."""
    wall = time.perf_counter()
    own = time.process_time()
    ours = {f'cpu{number}' for number in os.sched_getaffinity(0)}
    ticks = 0
    for line in Path('/proc/stat').read_text(encoding='ascii').splitlines():
        name, *numbers = line.split()
        if name in ours:
            user, nice, system, _idle, _iowait, irq, softirq = map(int, numbers[:7])
            ticks += user + nice + system + irq + softirq

    waiting = 0
    for task in Path('/proc/self/task').iterdir():
        with suppress(OSError):  # the thread has ended, or the kernel does not count this
            waiting += int((task / 'schedstat').read_text(encoding='ascii').split()[1])
    return Clocks(wall, own, ticks / os.sysconf('SC_CLK_TCK'), waiting / 1e9)


def load_between(before, after):
    """The Load between two readings of the clocks.

    >>> before = Clocks(wall=10, own=3, all=100, waiting=1)
    >>> load_between(before, Clocks(wall=12, own=6, all=104, waiting=3))
    Load(others=0.5, waiting=1.0)
    """
    seconds = max(1e-9, after.wall - before.wall)
    own = after.own - before.own
    others = (after.all - before.all - own) / seconds
    waiting = (after.waiting - before.waiting) / seconds  # below 0 if threads have ended
    return Load(max(0.0, others), max(0.0, waiting))


def is_crowded(load, spare_cores, crowded_before):
    """Whether our threads have to share cores.

    spare_cores: those that we have no threads for. Others can have them. It takes more load to make
    a machine crowded than to keep it so, otherwise it would go back and forth.

    >>> is_crowded(Load(others=1.0, waiting=0.0), spare_cores=0, crowded_before=False)
    True
    >>> is_crowded(Load(others=1.0, waiting=0.0), spare_cores=2, crowded_before=False)
    False
    >>> is_crowded(Load(others=0.0, waiting=0.2), spare_cores=0, crowded_before=False)
    False
    >>> is_crowded(Load(others=0.0, waiting=0.2), spare_cores=0, crowded_before=True)
    True
    """
    limit = ALONE_AGAIN if crowded_before else CROWDED
    return load.others - spare_cores > limit or load.waiting > limit


def cpu_quota(root='/sys/fs/cgroup'):
    """How many cores a container may use on average, such as 1.5; None if there is no limit.

    Such a limit is no number of cores that one could see: all of them can be used, but only for
    some time out of each tenth of a second. Threads that spin waste it.
    """
    root = Path(root)
    with suppress(OSError, ValueError):  # version 2 of control groups: '150000 100000'
        quota, period = (root / 'cpu.max').read_text(encoding='ascii').split()
        return None if quota == 'max' else int(quota) / int(period)
    with suppress(OSError, ValueError):  # version 1: -1 without a limit
        quota = int((root / 'cpu/cpu.cfs_quota_us').read_text(encoding='ascii'))
        period = int((root / 'cpu/cpu.cfs_period_us').read_text(encoding='ascii'))
        return quota / period if quota > 0 else None
    return None


# --------------------------------------------------------------------------------------------------
# Acting


class ExtraTeams:
    """Idle OpenMP threads that make libgomp count more threads than cores.

    Each Python thread has an OpenMP team of its own, from its first parallel operation to its end.
    """

    def __init__(self, num_threads, num_cores):
        """num_threads: of each team, at least 2; the one that works exists already."""
        spare_cores = max(0, num_cores - num_threads)
        self.count = spare_cores // (num_threads - 1) + 1
        self.dismissed = None  # an Event while the teams exist

    @property
    def exist(self):
        return self.dismissed is not None

    def summon(self):
        if self.exist:
            return
        self.dismissed = threading.Event()
        for _ in range(self.count):
            threading.Thread(target=self.idle, args=(self.dismissed,), daemon=True).start()

    def dismiss(self):
        if self.exist:
            self.dismissed.set()
            self.dismissed = None

    @staticmethod
    def idle(dismissed):
        import torch
        # Large enough to be done in parallel: it makes the team
        torch.zeros(32768 * torch.get_num_threads()).add_(1)
        dismissed.wait()


class Monitor:
    """Looks again and again whether our threads have to share cores, in a thread of its own."""

    def __init__(self, num_threads, num_cores, may_act):
        """may_act: whether to switch between spinning and sleeping, or only to know."""
        self.num_cores = num_cores
        self.spare_cores = max(0, num_cores - num_threads)
        self.may_act = may_act
        self.extra_teams = ExtraTeams(num_threads, num_cores)
        self.clocks = read_clocks()
        self.load = Load(0.0, 0.0)
        self.crowded = False
        self.process = os.getpid()

    def look(self):
        """Update load and crowded, and switch."""
        before = self.clocks
        self.clocks = read_clocks()
        self.load = load_between(before, self.clocks)
        self.crowded = is_crowded(self.load, self.spare_cores, self.crowded)
        if not self.may_act:
            return
        if self.crowded:
            self.extra_teams.summon()
        else:
            self.extra_teams.dismiss()

    def start(self):
        threading.Thread(target=self.watch, name='thread monitor', daemon=True).start()

    def watch(self):
        interval = FIRST_LOOK
        with suppress(OSError, ValueError):  # no more files may be opened: it stays as it is
            while True:
                time.sleep(interval)
                self.look()
                interval = INTERVAL


# --------------------------------------------------------------------------------------------------
# What others call

monitor = None  # the Monitor of this process, once share_cores() has started it


def share_cores():
    """Get along with other programs: suit the waiting of PyTorch's threads to the load.

    For Linux and the CPU; elsewhere, and with a single thread, it does nothing. What the user has
    set in OMP_WAIT_POLICY, GOMP_SPINCOUNT or OMP_NUM_THREADS remains.
    """
    global monitor
    if sys.platform != 'linux':
        return
    if monitor is not None and monitor.process == os.getpid():  # a fork has no monitor
        return
    import torch
    quota = cpu_quota()
    if quota is not None and not any(name in os.environ for name in SIZE_VARIABLES):
        torch.set_num_threads(min(torch.get_num_threads(), math.ceil(quota)))
    num_threads = torch.get_num_threads()
    if num_threads == 1:  # nobody waits
        return

    may_act = not any(name in os.environ for name in WAITING_VARIABLES)
    with suppress(OSError, ValueError):  # /proc is missing, or not as we know it
        monitor = Monitor(num_threads, len(os.sched_getaffinity(0)), may_act)
        monitor.start()


def describe_crowding():
    """A sentence for the user if other programs slow this one down, else None."""
    if monitor is None or not monitor.crowded:
        return None
    if monitor.load.others < ALONE_AGAIN:  # our own threads are in each other's way
        return None
    busy = max(monitor.load.others, monitor.load.waiting)
    text = (f'other programs use {busy:.1f} of the {monitor.num_cores} CPU cores, which slows this '
            f'one down')
    if monitor.may_act:
        return text
    settings = [f'{name}={os.environ[name]}' for name in WAITING_VARIABLES if name in os.environ]
    if os.environ.get('OMP_WAIT_POLICY', '').lower() == 'passive':
        return text
    return (f'{text}, the more with {" ".join(settings)}: '
            f'try OMP_WAIT_POLICY=passive python {shlex.join(sys.argv)}')
