"""A run from its config to its last checkpoint: all that has a clock, a file or a signal, around the pure step."""

import collections
import contextlib
import functools
import math
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from weft.data.prepare import Dataset
from weft.model.forward import place_rows
from weft.runtime import rendezvous as peers
from weft.runtime import signals, streams
from weft.runtime.device_memory import explain_oom
from weft.runtime.errors import Diverged, MachineError, OutOfMemory, UserError, machine_fault, shown
from weft.runtime.processes import Agreement
from weft.sharding.mesh import make_mesh, platform
from weft.storage import files as disk
from weft.storage.bucket_checkpoint import checkpoints_of
from weft.storage.buckets import Bucket
from weft.storage.checkpoint import Checkpoints, SaveFailed
from weft.storage.local_copy import LocalCopy
from weft.storage.lock import Lock
from weft.training import config as configs
from weft.training.config import RunConfig
from weft.training.evaluation import evaluate, spread
from weft.training.finite import RULE, check_saved, diverged, listed, not_finite
from weft.training.metrics import Metrics
from weft.training.prepare_run import open_prepared, prepare_run
from weft.training.progress import metrics_line, progress_bar
from weft.training.report import layout, memory_line, rate_line
from weft.training.state import abstract_state, items, restore, restore_imported, saved_config
from weft.training.step import init, train_step

MAX_IN_FLIGHT = 2  # steps that an accelerator may be given before the host reads the figures of the first


def train(config: RunConfig, runs: Path | Bucket, fresh: bool = False, console: Console | None = None) -> int:
    """Trains `runs/NAME` to its last step, continuing it where it has a checkpoint.

    Returns the exit code: 0 done; 129, 130 or 143 after SIGHUP, Ctrl-C or SIGTERM, with a checkpoint saved.
    Raises UserError, before anything is touched, where the config cannot run here or does not continue what is there;
    Diverged where its numbers are not finite any more, MachineError where the last save failed.
    """
    console = console or Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120, quiet=not peers.first())
    config.check_sizes()
    mesh = make_mesh(config.mesh)
    folder = runs / config.name
    # One process of one run writes; readers need no lock.
    lock = Lock(folder) if peers.first() else contextlib.nullcontext()
    with lock as held, contextlib.closing(LocalCopy(held.run if held else folder)) as local_copy:
        if peers.first():
            config, dataset = prepare_run(config, local_copy, fresh, console)
        # Where process 0 finds something wrong, all processes end with its exit code, here or wherever they are.
        corpus = peers.meet('the data is there', dataset.facts['sha256'] if peers.first() else None)
        if not peers.first():
            config, dataset = open_prepared(config, local_copy, corpus)
        with jax.set_mesh(mesh), explain_oom(lambda: memory_line(config, abstract_state(config))):
            return Run(config, local_copy, dataset, console, held).go()


class Run:
    """One process' life with a run. Use it under `jax.set_mesh`."""

    def __init__(
        self, config: RunConfig, local_copy: LocalCopy, dataset: Dataset, console: Console, lock: Lock | None = None
    ):
        self.config, self.local_copy, self.dataset, self.console = config, local_copy, dataset, console
        self.folder = local_copy.folder
        self.checkpoints = checkpoints_of(local_copy.folder, config.checkpoint.keep, lock)
        self.unsaved: str | None = None  # why the last save failed, if it did
        self.unsent: str | None = None  # why the last upload of what stands beside the checkpoints failed, if it did
        self.asked = 0  # the signal that stops it
        self.train_step = jax.jit(functools.partial(train_step, config), donate_argnums=0)

    def go(self) -> int:
        """Restores or begins, trains, validates, saves. Returns the exit code."""
        config, console = self.config, self.console
        # Process 0 says where to begin: a shared folder may show the others something older.
        saved = peers.at_first('the first step', lambda: max(self.checkpoints.steps(), default=None))
        first, self.tokens = saved or 0, 0
        if first:
            self.state = restore(self.checkpoints, first, config)
            check_saved(self.checkpoints, first, items(self.state), 'from which no training goes on')
            self.tokens = peers.at_first('tokens so far', lambda: tokens_so_far(self.checkpoints, first))
            console.print(f'continuing {self.folder} after step {first}')
            if peers.first() and (joined := rate_line(saved_config(self.checkpoints, first), config, first)):
                console.print(joined)
        elif saved == 0:
            model = restore_imported(self.checkpoints, config)
            check_saved(self.checkpoints, 0, model, 'from which no training begins')
            self.state = jax.jit(functools.partial(init, config), donate_argnums=0)(model)
            console.print(f'beginning from the weights imported into {self.folder}{widened(self.checkpoints, config)}')
        else:
            self.state = jax.jit(functools.partial(init, config))()
        if peers.first():
            disk.make_folder(self.local_copy.local)
            disk.write(self.local_copy.local / 'config.yaml', configs.dump(config).encode())
        console.print(layout(config, self.state.model))
        self.metrics = Metrics(self.local_copy.local, first, console.print) if peers.first() else None
        self.agree = Agreement(late=0 if platform() == 'cpu' else MAX_IN_FLIGHT)
        try:
            with signals.noted(self.heard) as self.noted, contextlib.ExitStack() as last:
                last.callback(self.checkpoints.close)
                last.callback(self.end)
                self.push()
                self.loop(first)
                self.asked = Agreement(late=0)(self.noted.stop)  # the signal may have come to another process
                self.settle(wait=True)
        except (Diverged, OutOfMemory):
            raise
        except (MachineError, OSError) as error:  # of the files beside the checkpoints
            raise MachineError(f'{machine_fault(error)}; {self.newest()}') from error
        if self.unsaved:
            raise MachineError(f'the last save failed: {self.unsaved}; {self.newest()}')
        if self.unsent:
            raise MachineError(f'{self.folder} lacks the last rows of its metrics: {self.unsent}; {self.newest()}')
        if self.asked:
            name, rest = signal.Signals(self.asked).name, config.training.steps - self.last
            then = 'run again to continue' if rest else 'it was the last one'
            console.print(f'stopped by {name} after step {self.last}, saved; {then}')
            return 128 + self.asked
        console.print(f'done: {self.folder}')
        return 0

    def heard(self, number: int) -> None:
        """A signal asks for the end of the run. Called in another thread, whatever this one does."""
        # A terminal that closes may send SIGHUP more than once.
        at_once = 'SIGINT' if number == signal.SIGHUP else 'once more'
        self.console.print(f'{signal.Signals(number).name}: saving after this step; {at_once} to stop at once')

    def settle(self, wait: bool = False) -> None:
        """Says if the save under way has failed: a run of one process goes on, and tries again at the next."""
        try:
            look = self.checkpoints.wait if wait else self.checkpoints.check
            look()
        except Exception as error:
            self.failed(error)

    def failed(self, error: Exception) -> None:
        """A save has failed by what the machine refused. Raises anything else."""
        fault = str(error) if isinstance(error, SaveFailed) else machine_fault(error)
        lock = self.checkpoints.lock
        if fault is None or peers.several() or (lock is not None and lock.lost):  # the run is another process' now
            raise error
        self.unsaved = fault
        streams.say(f'error: a save failed: {shown(fault, 500)}; {self.newest()}; training goes on, to the next save')

    def newest(self) -> str:
        """What a run that goes on will begin with."""
        try:
            steps = self.checkpoints.steps()
        except (MachineError, UserError):  # a bucket that fails: this is a part of the line that says so
            return 'which checkpoint is the newest cannot be seen now'
        return f'the newest whole checkpoint is of step {steps[-1]}' if steps else 'there is no whole checkpoint'

    def loop(self, first: int) -> None:
        """Steps `first` + 1 to the last."""
        config, t = self.config, self.config.training
        self.last = first
        waiting: collections.deque[tuple[int, dict[str, Any]]] = collections.deque()
        if first == t.steps:
            self.console.print(f'{self.folder} has taken all of its {t.steps} steps already')
            return
        with progress_bar(self.console, t.steps) as bar:
            self.console.print('compiling the first step')
            task = bar.add_task('compiling', total=t.steps, completed=first, loss='', speed='')
            self.clock, self.clock_tokens = self.begun = time.perf_counter(), self.tokens
            for step in range(first + 1, t.steps + 1):
                take = functools.partial(self.dataset.train.batch, config.seed, step - 1, t.batch)
                self.state, metrics = self.train_step(self.state, place_rows(t.batch, take))
                self.last = step
                waiting.append((step, metrics))
                number = self.agree(self.noted.take())  # once a step: a signal that comes later ends the next one
                stop, asked = number not in (0, signal.SIGUSR1), number == signal.SIGUSR1
                due = step == t.steps or stop
                validate = step % config.metrics.validate_every == 0 or step == t.steps
                save = step % config.checkpoint.every == 0 or due or asked
                self.settle()
                # A CPU that simulates devices aborts when many steps wait for each other; a checkpoint wants all rows written.
                in_flight = 0 if platform() == 'cpu' or validate or save else MAX_IN_FLIGHT
                while len(waiting) > in_flight:
                    row = self.row(*waiting.popleft())
                    if row['step'] == first + 1:  # it compiled, which is no part of the speed
                        self.clock, self.clock_tokens = time.perf_counter(), self.tokens
                    newest = row['step'] == step
                    if newest and validate:
                        row |= self.validate(everything=step == t.steps)
                    if row['step'] % config.metrics.every == 0 or (newest and (validate or due)):
                        self.log(row)
                    if speed := row.get('tokens_per_second'):
                        bar.update(task, speed=f'{speed:,.0f} tokens/s')
                    bar.update(task, completed=row['step'], description='training', loss=f'loss {row["loss"]:.4f}')
                if asked:
                    self.console.print(f'SIGUSR1: saving step {step}, and going on')
                if save:
                    self.save(step)
                if stop:
                    break

    def row(self, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
        """The row of a step, once the device has it. Raises Diverged where a number of it is not finite."""
        metrics = jax.device_get(metrics)
        self.tokens += int(metrics['tokens'])
        row = {name: float(metrics[name]) for name in ('loss', 'grad_norm', 'learning_rate')}
        row = {'step': step, **row, 'tokens': self.tokens}
        if not math.isfinite(row['loss']) or not math.isfinite(row['grad_norm']):
            raise self.diverged(f'step {step} has loss {row["loss"]} and gradient norm {row["grad_norm"]}')
        return row | {name: value.tolist() for name, value in metrics.items() if name not in row}

    def log(self, row: dict[str, Any]) -> None:
        """Writes a row, with the speed since the last one; time spent validating and saving is not counted."""
        # A process' first step alone has no span but the one in which it compiled.
        steady = self.tokens > self.clock_tokens
        clock, tokens = (self.clock, self.clock_tokens) if steady else self.begun
        row['tokens_per_second'] = (self.tokens - tokens) / (time.perf_counter() - clock - row.pop('seconds', 0))
        if self.metrics:
            self.metrics.log(row)
        if 'validation_loss' in row:
            self.push()
        if not self.console.is_terminal or 'validation_loss' in row:
            self.console.print(metrics_line(row, self.config.training.steps, steady), highlight=False)
        self.clock, self.clock_tokens = time.perf_counter(), self.tokens

    def validate(self, everything: bool) -> dict[str, float]:
        """Loss on the validation split, or on rows spread over it, without dropout."""
        began = time.perf_counter()
        rows = self.dataset.validation
        numbers = spread(len(rows) if everything else self.config.metrics.validation_rows, len(rows))
        try:
            found = evaluate(self.state.model, self.dataset.tokenizer, rows, numbers, self.config.training.batch)
        except Diverged as error:
            raise self.diverged(f'validation after step {self.last}: {error}') from None
        return {
            'validation_loss': found.nats_per_token,
            'validation_bits_per_byte': found.bits_per_byte,
            'seconds': time.perf_counter() - began,
        }

    def push(self) -> None:
        """Uploads what a bucket has beside its checkpoints, or says why not. Raises MachineError if the run was taken over."""
        if self.metrics is None:
            return
        self.checkpoints.check_lock()
        self.metrics.flush()
        try:
            self.local_copy.push()
            self.unsent = None
        except (MachineError, UserError) as error:
            self.checkpoints.check_lock()
            self.unsent = shown(error, 500)
            streams.say(f'error: an upload failed: {self.unsent}; training goes on, to the next one')

    def end(self) -> None:
        """Writes what the metrics still hold, unless the run is another process' now."""
        if self.metrics and self.checkpoints.is_ours():
            self.metrics.close()
            self.push()
        elif self.metrics:
            self.metrics.abandon()

    def diverged(self, what: str) -> Diverged:
        """What to raise where numbers are not finite any more."""
        self.settle(wait=True)  # the last one from before may be under way
        return diverged(what, self.checkpoints, self.config)

    def save(self, step: int) -> None:
        """Begins a checkpoint; it is written while training goes on."""
        began = time.perf_counter()
        if names := not_finite(items(self.state)):
            raise self.diverged(f'after step {step} {listed(names)} holds {RULE}, and is not saved')
        self.push()  # a run that goes on from this checkpoint has the rows up to it
        facts = {'step': step, 'tokens': self.tokens, 'corpus': self.dataset.facts['sha256'], 'seed': self.config.seed}
        # Step N's rows follow from (seed, N): the next sample is the data's whole position.
        facts['next_sample'] = step * self.config.training.batch
        files = {}
        if peers.first():
            content = (self.local_copy.local / 'config.yaml').read_bytes()
            files = {'config.yaml': content, **self.dataset.tokenizer.files()}
        self.settle(wait=True)
        try:
            self.checkpoints.save(step, items(self.state), facts, files)
            self.unsaved = None
        except Exception as error:
            self.failed(error)
        self.clock += time.perf_counter() - began


def tokens_so_far(checkpoints: Checkpoints, step: int) -> int:
    """How many tokens a run had seen at a checkpoint."""
    found = checkpoints.meta(step).get('tokens')
    if type(found) is not int:
        raise UserError(f'{checkpoints.run}/checkpoints/{step}/meta.json does not say how many tokens the run had seen')
    return found


def widened(checkpoints: Checkpoints, config: RunConfig) -> str:
    """In what dtype an imported model is trained on, where that is not its own; the end of a sentence."""
    stored, kept = saved_config(checkpoints, 0).compute.parameter_dtype, config.compute.parameter_dtype
    if stored == kept:
        return ''
    return f', in {kept}: small steps would be lost in {stored} (compute.weight_dtype={stored} keeps that)'
