"""Trains a run: runs/NAME/ gets its config, tokenizer, metrics, picture and checkpoints. Run again, it continues.

python scripts/train.py configs/demo.yaml training.steps=100 mesh.data=2

Several processes train one run, each on its own devices: scripts/launch/ has ready files.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from weft.runtime.errors import UserError
from weft.scripts.entry import run
from weft.scripts.options import Parser

if TYPE_CHECKING:
    from weft.storage.buckets import Bucket


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument('config', help='a YAML file, such as configs/demo.yaml')
    parser.add_argument('overrides', nargs='*', metavar='key=value', help='such as training.steps=100')
    parser.add_argument('--fresh', action='store_true', help='move a run of that name aside and begin anew')
    parser.add_argument('--force', action='store_true', help='go on though the plan says that a step does not fit')
    parser.add_argument(
        '--runs', metavar='PATH', default='runs', help='the folder of all runs, gs://BUCKET/… and s3://BUCKET/… too'
    )
    from weft.runtime.processes import add_options

    add_options(parser)
    options = parser.parse_intermixed_args()

    from weft.runtime.processes import check_devices, detect_launch, initialize
    from weft.storage.buckets import at
    from weft.training.config import load_config
    from weft.training.run_folder import check_new

    runs = at(options.runs)
    config = load_config(options.config, options.overrides)
    check_new(runs, config.name)
    check_imported(Path(options.config).parent, runs, config.name, options.fresh)
    launch = detect_launch(vars(options))
    processes = (launch and launch.processes) or 1
    check_devices(config.mesh.size, processes, config.mesh)

    from weft.sharding.mesh import configure_jax

    configure_jax(config.mesh.size, config.compute.dtype, processes)
    if launch:
        initialize(launch, config.mesh.size)

    config.check_sizes()

    import jax

    from weft.planner.fits import plan_first
    from weft.runtime.rendezvous import first
    from weft.sharding.mesh import make_mesh

    make_mesh(config.mesh)  # says what is wrong with it
    line = plan_first(config, jax.local_devices()[0], processes, options.force)
    if first():
        print(line, flush=True)

    from weft.training.loop import train

    return train(config, runs, options.fresh)


def check_imported(folder: Path, runs: 'Path | Bucket', name: str, fresh: bool) -> None:
    """Raises UserError where the config is that of an imported model, and the run would not begin from its weights."""
    from weft.training.config import RECORD

    if not (folder / RECORD).is_file():
        return
    same = isinstance(runs, Path) and (runs / name).resolve() == folder.resolve()
    if not same or fresh:
        raise UserError(
            f'{folder} is an imported model, and {runs / name}{" --fresh" if fresh else ""} would begin from random weights: '
            f'leave its name, with --runs {folder.resolve().parent}; for another run of it, import it again under another name'
        )


if __name__ == '__main__':
    run(main, lasting=True)
