"""What happens beside the training steps: the record of the losses, the progress bar, the checkpoints."""

import csv
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from nacre.applications.files import replacing

OnStep = Callable[[int, int, float], object]
"""Called after every step with the step (from 1), the steps in all, and the training loss."""


class History(Callback):
    """The losses of a run by step, kept over interruptions inside the checkpoints.

    Args:
        metric: what to report of a validation beside its loss: ``accuracy`` or ``perplexity``.
        on_step: called after every step.
    """

    def __init__(self, metric: str, on_step: OnStep | None = None) -> None:
        self.metric = metric
        self.on_step = on_step
        self.training_loss: dict[int, float] = {}
        self.learning_rate: dict[int, float] = {}
        self.elapsed: dict[int, float] = {}
        self.validation: dict[int, dict[str, float]] = {}
        self.validation_seconds = 0.0
        self._start = 0.0

    @property
    def seconds(self) -> float:
        """The time of the run up to its last record, validations included."""
        return max(self.elapsed.values(), default=0.0)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._start = time.perf_counter() - self.seconds

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        self.learning_rate[trainer.global_step + 1] = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        step, loss = trainer.global_step, outputs["loss"].item()
        self.training_loss[step] = loss
        self.elapsed[step] = time.perf_counter() - self._start
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss must stay finite; it was {loss} at step {step:,}. Lower the learning rate."
            )
        if self.on_step is not None:
            self.on_step(step, trainer.max_steps, loss)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        step, loss = trainer.global_step, float(trainer.callback_metrics["validation_loss"])
        accuracy = float(trainer.callback_metrics["accuracy"])
        metric = accuracy if self.metric == "accuracy" else math.exp(min(loss, 700.0))
        self.validation[step] = {"validation_loss": loss, self.metric: metric}
        now = time.perf_counter() - self._start
        self.validation_seconds += now - self.elapsed[step]
        self.elapsed[step] = now

    def state_dict(self) -> dict[str, Any]:
        names = ("training_loss", "learning_rate", "elapsed", "validation", "validation_seconds")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def write_csv(self, path: Path) -> None:
        """One row a step; the validation's columns are filled where there was one."""
        columns = ["step", "learning_rate", "training_loss", "validation_loss", self.metric, "seconds"]
        with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            for step, loss in self.training_loss.items():
                measured = {"learning_rate": self.learning_rate[step], "training_loss": loss}
                seconds = f"{self.elapsed[step]:.3f}"
                writer.writerow({"step": step, "seconds": seconds} | measured | self.validation.get(step, {}))


class Progress(ProgressBar):
    """One bar over all the steps on a terminal, and a line after every validation anywhere."""

    def __init__(self, history: History) -> None:
        super().__init__()
        self.history = history
        self._bar: tqdm | None = None

    def disable(self) -> None:
        """Lightning switches the bar off this way on all but one process."""
        self._bar = None

    def enable(self) -> None:
        """The bar opens when training starts."""

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        # disable=None: no bar where the output is not a terminal
        self._bar = tqdm(
            total=trainer.max_steps,
            initial=trainer.global_step,
            unit="step",
            file=sys.stdout,
            disable=None,
            leave=False,
        )

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {self.history.training_loss[trainer.global_step]:.3f}", refresh=False)
            self._bar.update()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        step = trainer.global_step
        found = self.history.validation[step]
        line = f"step {step:>{len(str(trainer.max_steps))}}   training loss {self.history.training_loss[step]:.3f}"
        line += "".join(f"   {name.replace('_', ' ')} {value:.3f}" for name, value in found.items())
        tqdm.write(line, file=sys.stdout)

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if self._bar is not None:
            self._bar.close()


class Interrupted(Exception):
    """The user asked to stop, and the run stopped between two steps."""


class Interruption:
    """Ctrl-C, or a wish of the system to end, granted between two steps; the second one ends the program at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.wanted = False
        self._before: dict[int, Any] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Listen while the block runs; signals reach the main thread alone."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._before = {number: signal.signal(number, self._ask) for number in self.SIGNALS}
        try:
            yield
        finally:
            self._listen_no_more()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.wanted = True
        self._listen_no_more()

    def _listen_no_more(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Checkpoints(Callback):
    """Saves the run after every validation and when it is interrupted, and stops it at its last step.

    Args:
        folder: where ``last.ckpt`` and ``metrics.csv`` are written; None to write nothing.
        history: the losses so far.
        interruption: the user's wish to stop.
        validate_every: the steps between two validations.
    """

    def __init__(self, folder: Path | None, history: History, interruption: Interruption, validate_every: int) -> None:
        self.folder = folder
        self.history = history
        self.interruption = interruption
        self.validate_every = validate_every

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if trainer.global_step == trainer.max_steps:
            trainer.should_stop = True  # which makes Lightning validate once more before it ends
        elif self.interruption.wanted and trainer.global_step % self.validate_every:
            self._save(trainer)
            raise Interrupted

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._save(trainer)
        if self.interruption.wanted and trainer.global_step < trainer.max_steps:
            raise Interrupted

    def _save(self, trainer: Trainer) -> None:
        if self.folder is not None:
            with replacing(self.folder / "last.ckpt") as partial:
                trainer.save_checkpoint(partial)
            self.history.write_csv(self.folder / "metrics.csv")
