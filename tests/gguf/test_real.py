"""Real files equal what transformers makes of them: `make parity` leaves that in the folder that GGUF_GOLDENS names."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.gguf.texts import texts
from weft.inference.run import open_run
from weft.inference.score import score
from weft.sharding.mesh import MeshConfig
from weft.training.importing import import_run

GOLDENS = sorted(Path(os.environ.get('GGUF_GOLDENS', '/nonexistent')).glob('*.npz'))


@pytest.mark.skipif(not GOLDENS, reason='needs what `make parity` makes of files that are installed')
@pytest.mark.parametrize('path', GOLDENS, ids=[path.stem for path in GOLDENS])
def test_logits_and_token_ids_are_those_of_transformers(path, tmp_path, optimized):
    jax.devices()
    with np.load(path, allow_pickle=False) as file:
        golden = {name: file[name] for name in file.files}
    import_run(Path(str(golden['path'])), tmp_path / 'run', MeshConfig(), dtype='float32')
    opened = open_run(str(tmp_path / 'run'), None)
    tokenizer = opened.tokenizer
    given = list(texts(golden['special'].tolist(), len(golden['lengths'])))
    wanted = np.split(golden['ids'], np.cumsum(golden['lengths'])[:-1])
    differing = [
        (text, ids, row.tolist())
        for text, ids, row in zip(given, tokenizer.encode_batch(given), wanted, strict=True)
        if ids != row.tolist()
    ]
    assert not differing, f'{len(differing)} of {len(given)}, the first {differing[0]}'
    assert [*tokenizer.prefix, *tokenizer.encode('a')] == golden['prefix'].tolist()
    with jax.set_mesh(opened.mesh):
        ((_, logits),) = score(opened.model, golden['tokens'])
    error = np.abs(logits[0, golden['at']] - golden['logits']).max() / np.abs(golden['logits']).max()
    print(f'{path.stem}: {len(given)} texts equal, logits within {error:.1e} of the largest')
    assert error < 1e-5
