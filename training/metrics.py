"""What a run writes down about itself: metrics.jsonl, TensorBoard, loss.png."""

import json
import os
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from training.picture import draw

DRAWN = ('step', 'loss', 'router.max_share', 'validation_loss', 'validation_bits_per_byte')


class Metrics:
    """Appends rows to folder/metrics.jsonl and folder/tensorboard, and draws folder/loss.png.

    Rows after `step` belong to steps that a restored checkpoint does not know: they are cut, so that no step stands
    there twice.
    """

    def __init__(self, folder: Path, step: int):
        self.folder = folder
        self.path = folder / 'metrics.jsonl'
        rows = [row for row in read(self.path) if row['step'] <= step]
        _replace(self.path, ''.join(json.dumps(row) + '\n' for row in rows))
        self.rows = [brief(row) for row in rows]
        self.file = self.path.open('a', encoding='utf-8')
        self.board = SummaryWriter(str(folder / 'tensorboard'), purge_step=step + 1)

    def log(self, row: dict[str, Any]) -> None:
        """One row; all of its numbers go to TensorBoard too."""
        self.rows.append(brief(row))
        self.file.write(json.dumps(row) + '\n')
        self.file.flush()
        for name, value in row.items():
            if name == 'router.load':
                for layer, shares in enumerate(value):
                    for expert, share in enumerate(shares):
                        self.board.add_scalar(f'router.load/layer {layer}/expert {expert}', share, row['step'])
            elif name != 'step':
                self.board.add_scalar(name, value, row['step'])

    def flush(self) -> None:
        """Writes what is pending."""
        if not self.file.closed:
            self.board.flush()

    def close(self) -> None:
        """Writes what is pending, and the picture."""
        self.file.close()
        self.board.close()
        if self.rows:
            draw(self.rows, self.folder / 'loss.png', self.folder.name)


class Unwritten:
    """The metrics of a process that does not write them: process 0 does."""

    def log(self, row: dict[str, Any]) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def brief(row: dict[str, Any]) -> dict[str, Any]:
    """What `draw` needs of a row, which a long run keeps in memory."""
    kept = {name: value for name, value in row.items() if name in DRAWN}
    return kept | ({'experts': len(row['router.load'][0])} if 'router.load' in row else {})


def read(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a metrics.jsonl; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding='utf-8').split('\n')
    return [json.loads(line) for line in lines[:-1]]  # what follows the last newline is not whole


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix('.tmp')
    temporary.write_text(text, encoding='utf-8')
    os.replace(temporary, path)
