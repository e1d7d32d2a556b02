"""Training through Lightning, in a way that an interrupted run ends with the very bits of an uninterrupted one.

The batch of a step depends on the seed and the step alone, the learning rate on the step alone, and a checkpoint keeps
the rest: weights, the optimizer's moments, the losses so far and the state of torch's generators, from which the
dropout masks come. To Lightning the whole run is one endless epoch, which ends at its last step.
"""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from safetensors.torch import save_model
from torch import Tensor

from nacre.applications.application import Application
from nacre.applications.callbacks import Checkpoints, History, Interrupted, Interruption, OnStep, Progress
from nacre.applications.checkpoint import RECORD, check_continues, read_checkpoint
from nacre.applications.data import Batch, Data, TextData
from nacre.applications.files import replacing

RUN_FILES = ("last.ckpt", "metrics.csv", "weights.safetensors", "loss.png", "run.json")
"""All that a run writes into its folder."""


@dataclass
class Result:
    """What came of a run.

    Args:
        step: the step it stands at.
        steps: the step it was to reach.
        training_loss: the loss of every step, by step (from 1).
        validation: ``validation_loss`` and ``accuracy`` or ``perplexity``, by step.
        seconds: the time of all steps and validations, over all the parts of an interrupted run.
        validation_seconds: the share of the validations in it.
        folder: where its files are, if any.
    """

    step: int
    steps: int
    training_loss: dict[int, float]
    validation: dict[int, dict[str, float]]
    seconds: float
    validation_seconds: float
    folder: Path | None

    @property
    def finished(self) -> bool:
        """Whether the run reached its last step."""
        return self.step == self.steps

    @property
    def final(self) -> dict[str, float]:
        """The last validation."""
        return self.validation[max(self.validation)] if self.validation else {}


class _TrainingBatches:
    """The batches from a step on, without end."""

    def __init__(self, application: Application, first_step: int) -> None:
        self.application, self.first_step = application, first_step

    def __iter__(self) -> Iterator[Batch]:
        step = self.first_step
        while True:
            yield self.application.data.training_batch(step, self.application.recipe.batch_size, self.application.seed)
            step += 1


class _ValidationBatches:
    """The batches of one validation."""

    def __init__(self, data: Data) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Batch]:
        return self.data.validation_batches()


class _Lesson(LightningModule):
    """An application in the form that Lightning trains."""

    def __init__(self, application: Application) -> None:
        super().__init__()
        self.application = application
        self.model = application.model
        self._generators: dict[str, Tensor] | None = None

    def training_step(self, batch: Batch, index: int) -> Tensor:
        return self._loss(batch)[0]

    def validation_step(self, batch: Batch, index: int) -> None:
        loss, accuracy = self._loss(batch)
        found = {"validation_loss": loss, "accuracy": accuracy}
        self.log_dict(found, on_epoch=True, logger=False, batch_size=batch[1].numel())

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        inputs, targets = batch[0], batch[1].flatten()
        logits = self.model(inputs).flatten(0, -2)
        loss = self.model.get_submodule("criterion")(logits, targets)
        return loss, (logits.argmax(dim=-1) == targets).float().mean()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        recipe, steps = self.application.recipe, self.application.steps
        optimizer = recipe.optimizer(self.model)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: recipe.learning_rate_at(step, steps) / recipe.learning_rate
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train_dataloader(self) -> _TrainingBatches:
        return _TrainingBatches(self.application, first_step=self.trainer.global_step)

    def val_dataloader(self) -> _ValidationBatches:
        return _ValidationBatches(self.application.data)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[RECORD] = self.application.settings()
        checkpoint["generators"] = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            checkpoint["generators"]["cuda"] = torch.cuda.get_rng_state(self.device)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._generators = checkpoint["generators"]

    def on_train_start(self) -> None:
        if self._generators is not None:
            torch.set_rng_state(self._generators["cpu"])
            if self.device.type == "cuda" and "cuda" in self._generators:
                torch.cuda.set_rng_state(self._generators["cuda"], self.device)


def train(
    application: Application,
    *,
    folder: str | Path | None = None,
    resume: str | Path | None = None,
    device: str = "cpu",
    progress: bool = False,
    on_step: OnStep | None = None,
) -> Result:
    """Train an application's model, in place, to the end of its recipe.

    The same application, seed and number of threads give the same weights bit for bit on a CPU, whether the run was
    interrupted and resumed or not. torch's global generator is left as it was, and the model in evaluation mode.

    Args:
        application: model, data and recipe.
        folder: where to write ``last.ckpt`` and ``metrics.csv`` after every validation, and at the end
            ``weights.safetensors``, ``loss.png`` and ``run.json``. Default None: nothing is written.
        resume: a checkpoint to go on from. Only the recipe's length may differ from the run that wrote it.
        device: ``cpu`` or ``cuda``. Default ``cpu``.
        progress: whether to show a progress bar and a line after every validation. Default False.
        on_step: called after every step with the step (from 1), the steps in all, and the training loss.

    Raises:
        ValueError: no such device, a damaged checkpoint, or one of another run; nothing has been changed then.
        FloatingPointError: the loss became infinite or not a number.
        KeyboardInterrupt: Ctrl-C in a run without a folder. With one, the run saves a checkpoint and returns.

    Example:
        >>> from nacre.applications import Recipe, build
        >>> from nacre.applications.data import TextData
        >>> data = TextData("to be or not to be. " * 50, block=8)
        >>> recipe = Recipe(batch_size=4, learning_rate=1e-2, steps=3)
        >>> result = train(build("gru", data=data, recipe=recipe, width=8, block=8))
        >>> result.finished, sorted(result.training_loss), sorted(result.final)
        (True, [1, 2, 3], ['perplexity', 'validation_loss'])
    """
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"a run needs the device cpu, or cuda where there is one; got {device!r}. Leave it out.")
    if resume is not None:
        check_continues(resume, read_checkpoint(resume), application)
    if folder is not None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
    history, interruption = History(application.data.metric, on_step), Interruption()
    checkpoints = Checkpoints(folder, history, interruption, application.validate_every)
    lesson = _Lesson(application)
    accelerators = [torch.cuda.current_device()] if device == "cuda" else []
    with _quiet(), torch.random.fork_rng(accelerators), interruption.watched():
        torch.manual_seed(application.seed)
        trainer = _trainer(application, device, [history, *([Progress(history)] if progress else []), checkpoints])
        application.model.train()
        try:
            trainer.fit(lesson, ckpt_path=resume, weights_only=True)
        except Interrupted:
            if folder is None:
                raise KeyboardInterrupt from None
    application.model.eval()
    result = Result(
        step=lesson.trainer.global_step,
        steps=application.steps,
        training_loss=history.training_loss,
        validation=history.validation,
        seconds=history.seconds,
        validation_seconds=history.validation_seconds,
        folder=folder,
    )
    if folder is not None and result.finished:
        _write_result(folder, application, history, result)
    return result


def _trainer(application: Application, device: str, callbacks: list[Any]) -> Trainer:
    return Trainer(
        accelerator=device,
        devices=1,
        plugins=[LightningEnvironment()],
        max_steps=application.steps,
        val_check_interval=application.validate_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=application.recipe.gradient_clip,
        callbacks=callbacks,
        enable_progress_bar=any(isinstance(callback, Progress) for callback in callbacks),
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's hints at other settings; its errors still come through."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for message in ("GPU available but not used", r"`isinstance\(treespec, LeafSpec\)` is deprecated"):
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        logger.setLevel(level)


def _write_result(folder: Path, application: Application, history: History, result: Result) -> None:
    history.write_csv(folder / "metrics.csv")
    metadata = {"settings": json.dumps(application.settings())}
    if isinstance(application.data, TextData):
        metadata["vocabulary"] = application.data.vocabulary.characters
    with replacing(folder / "weights.safetensors") as partial:
        save_model(application.model, str(partial), metadata)
    with replacing(folder / "loss.png") as partial:
        _draw_losses(partial, application, result)
    summary = application.settings() | {
        "description": application.data.description,
        "parameters": sum(parameter.numel() for parameter in application.model.parameters()),
        "steps": result.steps,
        "seconds": round(result.seconds, 3),
        "validation_seconds": round(result.validation_seconds, 3),
        "torch": torch.__version__,
        **result.final,
    }
    with replacing(folder / "run.json") as partial:
        partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def _draw_losses(path: Path, application: Application, result: Result) -> None:
    figure = Figure(figsize=(8, 5))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.1, 0.12, 0.87, 0.8))
    axes.plot(list(result.training_loss), list(result.training_loss.values()), linewidth=0.8, label="training")
    losses = [found["validation_loss"] for found in result.validation.values()]
    axes.plot(list(result.validation), losses, marker="o", markersize=4, label="validation")
    axes.set(xlabel="step", ylabel="loss", title=f"{application.name}, {application.layers} layers")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png", dpi=120)
