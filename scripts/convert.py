"""Published models to runs and back.

python scripts/convert.py import ~/models/Llama-3.2-1B runs/llama      a run, as if it had been trained here
python scripts/convert.py import ~/models/model.Q4_K_M.gguf runs/llama  the same of a GGUF file
python scripts/convert.py export runs/llama ~/models/mine              a folder that transformers loads
python scripts/convert.py quantise runs/llama runs/llama-int8 --to int8  a run whose weights are rounded (scripts/compress.py)
"""

from pathlib import Path

from weft.scripts.entry import run
from weft.scripts.options import Parser


def main() -> None:
    parser = Parser(description=__doc__)
    ways = parser.add_subparsers(dest='way', required=True)
    dtypes = ('float32', 'bfloat16', 'float16')

    into = ways.add_parser(
        'import', help='a published folder (config.json, *.safetensors, tokenizer) or GGUF file to a run'
    )
    into.add_argument('source', metavar='HF_DIR|FILE.gguf')
    into.add_argument('run', metavar='RUN', help='the run to make, such as runs/llama')
    into.add_argument('--mesh', metavar='AXES', default='', help='the run’s own, such as expert=2,tensor=2')
    into.add_argument(
        '--dtype', choices=dtypes, help='of the weights; the source’s own otherwise, of blocks of few bits float32'
    )
    without = 'take a model that names code of its own, and do without that code'
    into.add_argument('--without-remote-code', action='store_true', help=without)
    ignored = 'of config.json, to pass over, such as rope_scaling.alpha; may be given several times'
    into.add_argument('--ignore', action='append', default=[], metavar='FIELD', help=ignored)

    out = ways.add_parser('export', help='a run to a published folder')
    out.add_argument('run', metavar='RUN', help='a folder such as runs/llama')
    out.add_argument('target', metavar='HF_DIR', help='the folder to make')
    out.add_argument('--mesh', metavar='AXES', help='to hold the weights meanwhile; the run’s own otherwise')
    out.add_argument('--dtype', choices=dtypes, help='of the tensors; those of the source or of the run otherwise')
    out.add_argument('--family', metavar='NAME', help='for a run that was not imported; the first that fits otherwise')

    less = ways.add_parser('quantise', help='a run to one whose matrices and tables are rounded')
    less.add_argument('run', metavar='RUN', help='a folder such as runs/llama')
    less.add_argument('target', metavar='RUN2', help='the run to make')
    less.add_argument('--to', required=True, choices=('int8', 'int4', 'fp8'), help='int4 in groups of 32 inputs')
    less.add_argument('--mesh', metavar='AXES', help='to hold the weights meanwhile; the run’s own otherwise')
    options = parser.parse_args()

    if options.way == 'quantise':
        from weft.scripts.compress import quantise

        quantise(options.run, options.target, options.to, options.mesh)
        return

    from weft.sharding.mesh import parse_mesh
    from weft.storage.buckets import at
    from weft.training.exporting import export_run
    from weft.training.importing import import_run

    if options.way == 'import':
        without_code, ignore = options.without_remote_code, options.ignore
        import_run(
            Path(options.source), Path(options.run), parse_mesh(options.mesh), options.dtype, without_code, ignore
        )
    else:
        mesh = None if options.mesh is None else parse_mesh(options.mesh)
        export_run(at(options.run), Path(options.target), options.dtype, options.family, mesh)


if __name__ == '__main__':
    run(main, lasting=True)
