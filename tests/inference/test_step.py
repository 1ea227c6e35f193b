"""The cache of a step: its rows are filled up for TPUs, and what is in them is the same."""

import jax
import numpy as np
import pytest

from tests.families.cases import CASES
from tests.families.loading import read
from tests.models import filled
from weft.inference import step as steps
from weft.inference.step import decode, empty_cache, encode, prefill
from weft.model.forward import place
from weft.model.layers import cross
from weft.sharding.mesh import MeshConfig, make_mesh

ROWS, PROMPT, NEW = 2, 6, 3


@pytest.mark.parametrize(
    ('name', 'mesh'),
    [
        ('llama-grouped', MeshConfig(context=2, tensor=4)),
        ('deepseek_v2-lite', MeshConfig()),
        ('t5-v1.1', MeshConfig(tensor=2)),
    ],
    ids=str,
)
def test_rows_that_are_filled_up_for_tpus_change_nothing(name, mesh, monkeypatch):
    c = read(CASES[name])[1]
    ids = np.random.default_rng(0).integers(0, c.vocabulary, (ROWS, PROMPT + NEW), dtype=np.int32)
    lengths = np.full(ROWS, PROMPT, np.int32)
    found, widths = {}, {}
    for kind in ('cpu', 'tpu'):
        monkeypatch.setattr(steps, 'platform', lambda kind=kind: kind)
        monkeypatch.setattr(cross, 'platform', lambda kind=kind: kind)
        read_source = jax.jit(lambda *known: encode(*known))  # traced anew
        with jax.set_mesh(make_mesh(mesh)):
            model = filled(c)
            source = read_source(model, *place((ids, np.full(ROWS, 5, np.int32)))) if c.encoder else None
            cache = empty_cache(model, ROWS, PROMPT + NEW + 1, source)
            widths[kind] = [leaf.shape[-1] // mesh.tensor for leaf in jax.tree.leaves(cache) if leaf.ndim == 4]
            logit_BV, cache = jax.jit(prefill)(model, cache, *place((ids[:, :PROMPT], lengths)))
            chose, run = [np.asarray(logit_BV)], jax.jit(decode)
            for t in range(PROMPT, PROMPT + NEW):
                logit_BV, cache = run(model, cache, *place((ids[:, t], np.full(ROWS, t, np.int32))))
                chose.append(np.asarray(logit_BV))
            found[kind] = np.stack(chose)
    assert all(width < 128 for width in widths['cpu'])
    assert widths['tpu'] == [128] * len(widths['cpu'])
    np.testing.assert_allclose(found['tpu'], found['cpu'], atol=1e-6 * np.abs(found['cpu']).max())
