"""What a run needs before its first step: its whole config and prepared data, made by one process and read by the others."""

import contextlib
from pathlib import Path

from rich.console import Console

from weft.data.prepare import Dataset, load, prepare
from weft.data.tokenizer import Tokenizer
from weft.hub.published_tokenizer import load_tokenizer
from weft.runtime.errors import MachineError, UserError, shown
from weft.storage import files as disk
from weft.storage.bucket_checkpoint import checkpoints_of
from weft.storage.local_copy import LocalCopy, set_aside
from weft.training import config as configs
from weft.training.config import RECORD, RunConfig
from weft.training.state import saved_config


def prepare_run(config: RunConfig, local_copy: LocalCopy, fresh: bool, console: Console) -> tuple[RunConfig, Dataset]:
    """The complete config and the data, made where they are not there. One process does this."""
    folder = local_copy.folder
    if fresh and folder.exists():
        # The new run is made beside the old one, which stays where it is until nothing can be wrong any more.
        staging = LocalCopy(folder.with_name(f'.{folder.name}.new'))
        disk.remove(staging.local)
        try:
            config, dataset = prepare_data(config, staging, console)
            aside = set_aside(folder)
            local_copy.adopt(staging)
        except BaseException:
            with contextlib.suppress(MachineError):  # the next one clears it, if this disk cannot
                disk.remove(staging.local)
            raise
        finally:
            staging.close()
        console.print(f'moved the earlier {folder} aside to {aside}')
    else:
        config, dataset = prepare_data(config, local_copy, console)
    local_copy.push()
    return config, dataset


def open_prepared(config: RunConfig, local_copy: LocalCopy, corpus: str) -> tuple[RunConfig, Dataset]:
    """What another process made ready. Raises UserError where its folder is not the one seen here."""
    folder = local_copy.folder
    local_copy.fetch()
    try:
        dataset = load(local_copy.local, lambda line: None, load_tokenizer)  # process 0 has said it
    except UserError as error:
        raise UserError(f'{error}; the processes of a run need one run folder that all of them see') from None
    if dataset.facts['sha256'] != corpus:
        raise UserError(
            f'{folder} holds other data here than for process 0: the processes of a run need one run folder'
        )
    return config.with_vocabulary(dataset.tokenizer.embedded), dataset


def prepare_data(config: RunConfig, local_copy: LocalCopy, console: Console) -> tuple[RunConfig, Dataset]:
    """The complete config and the data. Raises UserError where they do not fit each other or the run's last checkpoint."""
    checkpoints = checkpoints_of(local_copy.folder)
    steps = checkpoints.steps()
    if steps:
        configs.check_continues(saved_config(checkpoints, steps[-1]), config, begun=steps[-1] > 0)
        if steps[-1] > config.training.steps:
            raise UserError(
                f'training.steps is {config.training.steps} and run {config.name!r} has taken {steps[-1]} steps already; '
                f'nearest that works: {steps[-1]}'
            )

    local_copy.fetch()
    tokenizer = imported_tokenizer(local_copy.local)

    def complete(dataset: Dataset) -> RunConfig:
        whole = config.with_vocabulary(dataset.tokenizer.embedded)
        whole.check_sizes()
        return whole

    encoder = config.model.encoder
    dataset = prepare(
        config.data,
        local_copy.local,
        config.training.sequence_length,
        say=console.print,
        check=complete,
        pairs=encoder is not None,
        start=encoder.start_token if encoder else None,
        tokenizer=tokenizer,
        read_tokenizer=load_tokenizer,
    )
    if steps and steps[-1] > 0:
        meta = checkpoints.meta(steps[-1])
        if meta.get('corpus') != dataset.facts['sha256']:
            raise UserError(
                f'{local_copy.folder / "data"} was made from corpus {dataset.facts["sha256"][:12]} and checkpoint {steps[-1]} '
                f'from {shown(meta.get("corpus"), 12)}: the prepared data was replaced; restore it, or begin anew with --fresh'
            )
    return complete(dataset), dataset


def imported_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of an imported model, which training keeps; None for a run that learns its own."""
    if not (folder / RECORD).is_file():
        return None
    found = load_tokenizer(folder)
    if found is None:
        raise UserError(
            f'{folder} was imported without a tokenizer, and text cannot become its tokens; import it with one to train it'
        )
    return found
