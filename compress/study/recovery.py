"""The same short training for all cells that are told to recover: what it brings back of what compression took."""

from pathlib import Path

from weft.compress.study.subjects import Say, train_run
from weft.training.config import load_config

# Of the text and the batches that the models learnt from, at the learning rate with which their training ended.
RECOVERY = {'steps': 30, 'learning_rate': 3e-4, 'warmup_steps': 5}


def recover(folder: Path, say: Say) -> None:
    """Trains a compressed run; its factors are weights like any others."""
    changes = [
        'mesh.data=1',
        f'training.steps={RECOVERY["steps"]}',
        f'optimizer.learning_rate={RECOVERY["learning_rate"]}',
        f'optimizer.warmup_steps={RECOVERY["warmup_steps"]}',
        f'checkpoint.every={RECOVERY["steps"]}',
        'metrics.validate_every=1000',
    ]
    train_run(load_config(folder / 'config.yaml', changes), folder.parent, say)
