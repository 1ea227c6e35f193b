"""Published folders to runs and back: every number arrives, once, bit for bit; every mistake is told in one line."""

import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.run import open_run
from decoding.score import score
from model import hub, streaming
from sharding.mesh import MeshConfig, make_mesh
from tests.families import cases, folders
from tests.families.loading import GOLDENS, golden
from training.conversion import export_run, import_run

MESHES = {'one': MeshConfig(), 'all': MeshConfig(data=2, expert=2, tensor=2), 'stages': MeshConfig(stage=2, tensor=2)}
LLAMA = cases.CASES['llama-grouped']


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert (x.dtype, x.shape) == (b[name].dtype, b[name].shape), name
        assert x.tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize('name', cases.CASES)
def test_every_tensor_of_every_family_comes_back_bit_for_bit(name, tmp_path):
    """Also in blocks much smaller than an array, whose bits may be anything."""
    found = {tensor: folders.bits(tensor, array.shape, jnp.bfloat16) for tensor, array in folders.named(name).items()}
    published = hub.read(folders.write(tmp_path / 'source', cases.CASES[name], found))
    arrays = dict(published.arrays(make_mesh(MESHES['all'])))
    same({one.name: streaming.published(one, arrays).astype(jnp.bfloat16) for one in published.table}, found)


@pytest.mark.parametrize('mesh', MESHES.values(), ids=MESHES)
@pytest.mark.parametrize('dtype', [np.float32, jnp.bfloat16, np.float16], ids=['float32', 'bfloat16', 'float16'])
def test_blocks_of_a_shard_are_put_together(dtype, mesh, tmp_path):
    found = {tensor: folders.bits(tensor, x.shape, dtype) for tensor, x in folders.named('phi3-plain-window').items()}
    published = hub.read(folders.write(tmp_path / 'source', cases.CASES['phi3-plain-window'], found))
    whole = dict(published.arrays(make_mesh(mesh)))
    with mock.patch.object(streaming, 'BLOCK', 5000):
        parts = dict(published.arrays(make_mesh(mesh)))
    for leaf, x in whole.items():
        assert x.sharding == parts[leaf].sharding
        assert np.asarray(x).tobytes() == np.asarray(parts[leaf]).tobytes(), leaf
    same({one.name: streaming.published(one, parts) for one in published.table}, found)


@pytest.mark.parametrize('mesh', ['one', 'all'])
@pytest.mark.parametrize('kind', ['float32', 'bfloat16', 'mixed'])
def test_a_run_gives_back_what_it_was_imported_from(kind, mesh, tmp_path):
    found = folders.named('glm4_moe-air')
    narrow = folders.in_bfloat16(found)
    found = {
        'float32': found,
        'bfloat16': narrow | {name: x for name, x in found.items() if name.endswith('correction_bias')},
        'mixed': narrow | {name: x for name, x in found.items() if 'norm' in name},
    }[kind]
    config = cases.CASES['glm4_moe-air'] | {'torch_dtype': 'bfloat16'}
    source = folders.write(tmp_path / 'source', config, found, files=3)
    (source / 'chat_template.jinja').write_text('{{ messages }}')
    (source / 'generation_config.json').write_text('{"eos_token_id": [1, 2]}')
    (source / 'modeling_glm4.py').write_text('raise SystemExit')
    import_run(source, tmp_path / 'runs' / 'run', MESHES[mesh], say=str)
    opened = open_run(tmp_path / 'runs' / 'run')
    assert opened.config.model.weight_dtype == ('bfloat16' if kind == 'bfloat16' else 'float32')
    export_run(tmp_path / 'runs' / 'run', tmp_path / 'target', say=str)
    same(folders.stored(tmp_path / 'target'), found)
    written = json.loads((tmp_path / 'target' / 'config.json').read_text())
    assert written == config | {'torch_dtype': opened.config.model.weight_dtype}
    for name in ('chat_template.jinja', 'generation_config.json'):
        assert (tmp_path / 'target' / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / 'target' / 'modeling_glm4.py').exists()


def test_an_imported_run_has_the_logits_of_transformers(tmp_path):
    known = golden(GOLDENS / 'llama-grouped.npz')
    source = folders.write(tmp_path / 'source', known.config, folders.named('llama-grouped'), files=2)
    import_run(source, tmp_path / 'run', MESHES['all'], say=str)
    opened = open_run(tmp_path / 'run')
    with jax.set_mesh(opened.mesh):
        found = np.concatenate([logits for _, logits in score(opened.model, known.ids)])
    found = found[known.at[:, 0], known.at[:, 1], : known.logits.shape[1]]
    assert np.abs(found - known.logits).max() <= 1e-5 * np.abs(known.logits).max()
