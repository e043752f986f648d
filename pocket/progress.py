"""
How fast a training run goes and when it will be done: in the lines that train.py prints, and in a
bar between them.
"""
import math
import sys
import time
from contextlib import suppress
from datetime import timedelta

from pocket import distributed, threads
from pocket.errors import Output

# Weight of the newest step in the moving average of step times: it follows a load that changes
SMOOTHING = 0.02
SECONDS_BETWEEN_DRAWINGS = 0.2
EVALUATION_SHARE = 1 / 3  # a forward pass alone, of the time of forward and backward


class Progress:
    """The pace of a run, and its bar. The bar is for terminals only, and is drawn on stderr."""

    def __init__(self, train_state, max_iters, max_minutes, eval_interval, eval_targets,
                 clock=time.perf_counter):
        """max_minutes: None if max_iters alone ends the run. eval_targets: of one evaluation.

        clock: returns seconds that only increase.
        """
        self.max_iters = max_iters
        self.max_seconds = None if max_minutes is None else 60 * max_minutes
        self.eval_interval = eval_interval
        self.eval_targets = eval_targets
        self.clock = clock

        # What has been done
        self.step = self.first_step = train_state.step
        self.tokens = train_state.tokens
        self.loss = None
        self.start = clock() - train_state.seconds  # as if earlier parts had ended now
        self.latest = clock()        # the end of the latest step
        self.line = (self.tokens, self.latest)  # since when tokens_per_second counts

        # How fast
        self.tokens_per_second = 0.0
        self.timed_steps = 0
        self.step_seconds = None     # average
        self.step_tokens = None      # of the latest step
        self.eval_seconds = 0.0      # of the latest evaluation, of all processes

        # The bar
        self.show_bar = distributed.master_process and sys.stderr.isatty()
        self.bar = None
        self.drawn = 0.0
        if self.show_bar and isinstance(sys.stdout, Output):
            sys.stdout.before_write = self.hide
        self.advised = False

    # ----------------------------------------------------------------------------------------------
    # What train.py tells it

    def record_step(self, train_state, loss):
        """A step has been done."""
        now = self.clock()
        seconds = now - self.latest
        self.latest = now
        self.step_tokens = train_state.tokens - self.tokens
        self.tokens = train_state.tokens
        self.step = train_state.step
        self.loss = loss
        line_tokens, line_start = self.line
        self.tokens_per_second = (self.tokens - line_tokens) / max(1e-9, now - line_start)

        if self.step > self.first_step + 1:  # the first one takes longer: it sets everything up
            self.timed_steps += 1
            weight = max(SMOOTHING, 1 / self.timed_steps)
            before = self.step_seconds or 0.0
            self.step_seconds = before + weight * (seconds - before)
        if self.show_bar and now > self.drawn + SECONDS_BETWEEN_DRAWINGS:
            self.draw()

    def resume(self):
        """Call when training continues after an evaluation: the next step is timed from now."""
        self.latest = self.clock()
        self.line = (self.tokens, self.latest)

    # ----------------------------------------------------------------------------------------------
    # What it knows

    def seconds_left(self):
        """Seconds until the end of the run, evaluations included; None in its first step."""
        if self.max_seconds is not None:
            return max(0.0, self.max_seconds - (self.latest - self.start))
        if self.step_seconds is None:
            return None
        eval_seconds = self.eval_seconds
        if not eval_seconds:  # none so far: estimate it
            seconds_per_target = self.step_seconds / max(1, self.step_tokens)
            eval_seconds = EVALUATION_SHARE * self.eval_targets * seconds_per_target
        # Evaluations are due at multiples of eval_interval, and at the end
        all_evaluations = math.ceil(self.max_iters / self.eval_interval)
        past_evaluations = (self.step - 1) // self.eval_interval
        steps_left = self.max_iters - self.step
        return steps_left * self.step_seconds + (all_evaluations - past_evaluations) * eval_seconds

    def describe(self):
        """Speed since the last line, and time left: ', 28,400 tokens/s, 0:00:25 left'.

        After the first step, which says little about either, it is empty.
        """
        if self.step <= self.first_step + 1:
            return ''
        text = f', {self.tokens_per_second:,.0f} tokens/s'
        seconds_left = self.seconds_left()
        if seconds_left is not None:
            text += f', {timedelta(seconds=int(min(seconds_left, 1e13)))} left'
        return text

    def print_line(self, lr):
        """Print loss, learning rate, speed and time left; once also what makes the run slow."""
        print(f'step {self.step}: loss {self.loss:.4f}, lr {lr:.2e}{self.describe()}', flush=True)
        self.line = (self.tokens, self.latest)
        advice = threads.describe_crowding()
        if advice and not self.advised:
            print(f'advice: {advice}', flush=True)
            self.advised = True

    # ----------------------------------------------------------------------------------------------
    # The bar

    def draw(self):
        """Draw the bar, or draw it anew."""
        from tqdm import tqdm
        share = self.step / self.max_iters
        if self.max_seconds is not None:
            share = (self.latest - self.start) / self.max_seconds
        self.drawn = self.latest
        with suppress(OSError):  # the terminal was closed, and a signal is on its way
            if self.bar is None:
                self.bar = tqdm(total=1, leave=False, dynamic_ncols=True,
                                bar_format='{desc} |{bar}| {percentage:.0f} %{postfix}')
            self.bar.n = min(1.0, share)
            self.bar.set_description_str(f'step {self.step}', refresh=False)
            self.bar.set_postfix_str(f'loss {self.loss:.4f}{self.describe()}', refresh=False)
            self.bar.refresh()

    def hide(self):
        """Clear the bar, if there is one, so that something can be printed."""
        if self.bar is not None:
            with suppress(OSError):
                self.bar.close()
            self.bar = None
