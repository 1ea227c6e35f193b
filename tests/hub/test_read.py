"""Published folders to runs and back: every number arrives, once, bit for bit."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.families import cases, folders
from tests.families.loading import GOLDENS, golden, read
from tests.memory import Peak
from weft.hub import published_folder, streaming, tensor_files
from weft.hub import read as hub
from weft.hub import write as publish
from weft.hub.families import Fields
from weft.hub.tensor_table import tensors
from weft.inference.run import open_run
from weft.inference.score import score
from weft.runtime.errors import UserError
from weft.sharding.mesh import MeshConfig, make_mesh
from weft.storage import array_slices as boxes
from weft.storage import shards
from weft.training.config import load_config
from weft.training.exporting import export_run
from weft.training.importing import import_run
from weft.training.report import weights_table

MESHES = {'one': MeshConfig(), 'all': MeshConfig(data=2, expert=2, tensor=2), 'stages': MeshConfig(stage=2, tensor=2)}
LLAMA = cases.CASES['llama-grouped']


@pytest.fixture(autouse=True)
def begun() -> None:
    """JAX has its eight devices before an import would begin it with as many as its own mesh has."""
    jax.devices()


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert (x.dtype, x.shape) == (b[name].dtype, b[name].shape), name
        assert x.tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize('name', cases.CASES)
def test_every_tensor_of_every_family_comes_back_bit_for_bit(name, tmp_path):
    found = folders.named(name, lambda tensor, shape: folders.bits(tensor, shape, jnp.bfloat16))
    published = hub.read(folders.write(tmp_path / 'source', cases.CASES[name], found))
    arrays = dict(published.arrays(make_mesh(MESHES['all'])))
    back = {one.name: streaming.published(one, arrays).astype(jnp.bfloat16) for one in published.table}
    back |= {copy: back[of] for copy, of in published.copies.items()}
    same({published.files.get(tensor, tensor): x for tensor, x in back.items()}, found)


@contextlib.contextmanager
def apart(block: int):
    """Devices whose memory is not the host's, filled and read in blocks of so many bytes."""
    with (
        mock.patch.object(streaming, 'BLOCK', block),
        mock.patch.object(shards, 'BLOCK', block),
        mock.patch.object(streaming, 'is_host', return_value=False),
        mock.patch.object(boxes, 'is_host', return_value=False),
    ):
        yield


@pytest.mark.parametrize('mesh', MESHES.values(), ids=MESHES)
@pytest.mark.parametrize('dtype', [np.float32, jnp.bfloat16], ids=['float32', 'bfloat16'])
def test_blocks_of_a_shard_are_put_together(dtype, mesh, tmp_path):
    found = {name: x.astype(dtype) for name, x in folders.named('phi3-plain-window').items()}
    published = hub.read(folders.write(tmp_path / 'source', cases.CASES['phi3-plain-window'], found))
    whole = dict(published.arrays(make_mesh(mesh)))
    with apart(10_000):
        parts = dict(published.arrays(make_mesh(mesh)))
        same({one.name: streaming.published(one, parts) for one in published.table}, found)
    for leaf, x in whole.items():
        assert x.sharding == parts[leaf].sharding
        assert np.asarray(x).tobytes() == np.asarray(parts[leaf]).tobytes(), leaf


MB = 2**20
WIDE = LLAMA | {'hidden_size': 1024, 'intermediate_size': 4096, 'num_hidden_layers': 6, 'vocab_size': 16_000}
WIDE |= {'num_attention_heads': 16, 'num_key_value_heads': 4}


@pytest.fixture(scope='module')
def wide(tmp_path_factory) -> Path:
    """A model of some 250 MB."""
    family, c = read(WIDE)
    table = tensors(family, c, hub.shapes_of(c))
    noise = folders.bits('noise', (2**16,), np.uint16) & 0x3FFF
    fill = lambda shape: np.resize(noise, shape).view(jnp.bfloat16)
    folder = tmp_path_factory.mktemp('wide') / 'source'
    return folders.write(folder, WIDE, {one.name: fill(one.shape) for one in table}, files=2)


@pytest.mark.parametrize('mesh', ['one', 'all'])
@pytest.mark.parametrize('way', ['host', 'apart'])
def test_memory_beyond_the_sharded_weights_is_the_largest_tensor_and_a_little(wide, mesh, way):
    """A little: a 16th of 1 GiB, for weights a 16th of some 4 GB."""
    devices = make_mesh(MESHES[mesh])
    published = hub.read(wide)
    largest = max(source.read().nbytes for source in published.sources.values())
    with contextlib.nullcontext() if way == 'host' else apart(8 * MB), Peak() as peak:
        arrays = dict(published.arrays(devices))
    weights = sum(shard.data.nbytes for x in arrays.values() for shard in x.addressable_shards)
    assert weights > 230 * MB
    assert peak.bytes < weights + largest + 64 * MB, (peak.bytes, weights, largest)


@pytest.mark.parametrize('mesh', ['one', 'all'])
def test_an_import_holds_one_array_at_a_time(wide, mesh, tmp_path):
    published = hub.read(wide)
    arrays = [int(np.prod(shape.shape)) * shape.dtype.itemsize for shape in published.shapes.values()]
    with mock.patch.object(shards, 'BLOCK', 8 * MB), Peak() as peak:
        import_run(wide, tmp_path / 'run', MESHES[mesh], say=str)
    assert peak.bytes < max(arrays) + 64 * MB, (peak.bytes, max(arrays))
    assert max(arrays) + 64 * MB < sum(arrays) / 2


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
    opened = open_run(tmp_path / 'runs' / 'run', needs_text=False)
    assert opened.config.compute.weight_dtype == ('bfloat16' if kind == 'bfloat16' else 'float32')
    export_run(tmp_path / 'runs' / 'run', tmp_path / 'target', say=str)
    same(folders.stored(tmp_path / 'target'), found)
    written = json.loads((tmp_path / 'target' / 'config.json').read_text())
    assert written == config | {'torch_dtype': opened.config.compute.weight_dtype}
    for name in ('chat_template.jinja', 'generation_config.json'):
        assert (tmp_path / 'target' / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / 'target' / 'modeling_glm4.py').exists()


ODD = {  # of the bias of a router's choices, of the norms, of all others; what weights are kept in
    'narrow bias': ('bfloat16', 'bfloat16', 'bfloat16', 'bfloat16'),
    'narrow bias of wide weights': ('bfloat16', 'float32', 'float32', 'float32'),
    'half bias': ('float16', 'bfloat16', 'bfloat16', 'bfloat16'),
    'half norms': ('float32', 'float16', 'bfloat16', 'float32'),
}


@pytest.mark.parametrize('name', ODD)
def test_each_tensor_is_given_back_in_its_own_dtype(name, tmp_path):
    bias, norm, other, kept = ODD[name]
    kind = lambda tensor: bias if tensor.endswith('correction_bias') else norm if 'norm' in tensor else other
    found = {
        tensor: x.astype(jnp.dtype(kind(tensor))) for tensor, x in folders.named('deepseek_v3-as-published').items()
    }
    assert len({x.dtype for x in found.values()}) == len({bias, norm, other})
    source = folders.write(tmp_path / 'source', cases.CASES['deepseek_v3-as-published'], found)
    assert hub.read(source).compute.weight_dtype == kept
    import_run(source, tmp_path / 'run', MESHES['one'], say=str)
    export_run(tmp_path / 'run', tmp_path / 'target', say=str)
    same(folders.stored(tmp_path / 'target'), found)


def test_an_imported_run_has_the_logits_of_transformers(tmp_path):
    known = golden(GOLDENS / 'llama-grouped.npz')
    source = folders.write(tmp_path / 'source', known.config, folders.named('llama-grouped'), files=2)
    import_run(source, tmp_path / 'run', MESHES['all'], say=str)
    opened = open_run(tmp_path / 'run', needs_text=False)
    with pytest.raises(UserError, match='imported without a tokenizer'):
        open_run(tmp_path / 'run')
    with jax.set_mesh(opened.mesh):
        found = np.concatenate([logits for _, logits in score(opened.model, known.ids)])
    found = found[known.at[:, 0], known.at[:, 1], : known.logits.shape[1]]
    assert np.abs(found - known.logits).max() <= 1e-5 * np.abs(known.logits).max()


def test_what_exists_is_not_overwritten(tmp_path):
    folder = folders.write(tmp_path / 'source', LLAMA, folders.named('llama-grouped'))
    (tmp_path / 'run').mkdir()
    with pytest.raises(UserError, match='run: exists already'):
        import_run(folder, tmp_path / 'run', MeshConfig(), say=str)
    import_run(folder, tmp_path / 'other', MeshConfig(), say=str)
    with pytest.raises(UserError, match='source: exists already'):
        export_run(tmp_path / 'other', folder, say=str)
    with pytest.raises(UserError, match=r'mesh.tensor is 3'):
        import_run(folder, tmp_path / 'third', MeshConfig(tensor=3), say=str)


def test_what_a_killed_import_left_is_gone_at_the_next_and_no_other_folder(tmp_path):
    folder = folders.write(tmp_path / 'source', LLAMA, folders.named('llama-grouped'))
    runs = tmp_path / 'runs'
    for name in (
        '.run.abcd_123.partial',
        '.run.more.abcd_123.partial',
        '.runs.abcd_123.partial',
        'run.abcd_123.partial',
    ):
        (runs / name / 'checkpoints').mkdir(parents=True)
    with publish.staged(runs / 'run') as living:  # another process at work on that name
        import_run(folder, runs / 'other', MeshConfig(), say=str)
        with publish.staged(runs / 'run') as second:
            assert living.is_dir()
            assert second.is_dir()
        shutil.move(runs / 'run', tmp_path / 'first')
    left = sorted(path.name for path in runs.iterdir())
    assert left == ['.run.more.abcd_123.partial', '.runs.abcd_123.partial', 'other', 'run', 'run.abcd_123.partial']


def test_a_place_where_no_run_can_be_made_is_told_in_one_line(tmp_path):
    folder = folders.write(tmp_path / 'source', LLAMA, folders.named('llama-grouped'))
    (tmp_path / 'file').write_text('in the way')
    for place in (tmp_path / 'file' / 'run', tmp_path / 'file' / 'more' / 'run', tmp_path / ('long' * 100) / 'run'):
        with pytest.raises(UserError, match=r'cannot be made: (Not a directory|File exists|File name too long): '):
            import_run(folder, place, MeshConfig(), say=str)
    with (
        mock.patch.object(Path, 'mkdir', side_effect=PermissionError(13, 'Permission denied', '/runs')),
        pytest.raises(UserError, match=r'run: cannot be made: Permission denied: /runs'),
    ):
        import_run(folder, tmp_path / 'runs' / 'run', MeshConfig(), say=str)


@pytest.mark.parametrize(('said', 'length', 'most'), [(512, 512, 512), (131_072, 4096, 131_072), (None, 2048, 2048)])
def test_the_config_of_an_import_is_true_and_fits(said, length, most, tmp_path):
    config = {name: value for name, value in LLAMA.items() if name != 'max_position_embeddings'}
    config |= {'max_position_embeddings': said} if said else {}
    lines = []
    folder = folders.write(tmp_path / 'source', config, folders.named('llama-grouped'))
    import_run(folder, tmp_path / 'run', MeshConfig(), say=lines.append)
    written = load_config(tmp_path / 'run' / 'config.yaml')
    assert written.training.sequence_length == length
    assert (written.data.source, written.data.vocabulary) == (None, None)
    with pytest.raises(UserError, match=r'data.source is null: name what to learn from.*data.source=notes/'):
        written.data.paths  # noqa: B018
    opened = open_run(tmp_path / 'run', needs_text=False, stacked=True)
    assert opened.context == most
    # What training prints of the same weights is the same number, and how many fill up the vocabulary.
    count = sum(x.size for x in folders.named('llama-grouped').values())
    assert f'{count:,} parameters' in lines[0]
    table = weights_table(opened.model)
    padding = 2 * (256 - 200) * 64
    assert list(table.columns[1].cells)[-2:] == [f'{count:,}', f'{padding:,}']


def test_an_import_that_fails_leaves_nothing(tmp_path):
    folder = folders.write(tmp_path / 'source', LLAMA, folders.named('llama-grouped'))
    with (
        mock.patch.object(tensor_files.Stored, 'read', side_effect=OSError('gone')),
        pytest.raises(OSError, match='gone'),
    ):
        import_run(folder, tmp_path / 'runs' / 'run', MeshConfig(), say=str)
    assert not (tmp_path / 'runs').exists()


def test_a_head_that_repeats_the_embedding_is_kept_and_given_back(tmp_path):
    found = folders.named('mixtral-top-1-tied')
    found['lm_head.weight'] = found['model.embed_tokens.weight']
    found['model.layers.0.self_attn.rotary_emb.inv_freq'] = np.ones(8, np.float32)
    config = cases.CASES['mixtral-top-1-tied']
    folder = folders.write(tmp_path / 'source', config, found)
    import_run(folder, tmp_path / 'run', MeshConfig(), say=str)
    export_run(tmp_path / 'run', tmp_path / 'target', say=str)
    same(folders.stored(tmp_path / 'target'), {name: x for name, x in found.items() if 'inv_freq' not in name})


def test_weights_in_another_dtype(tmp_path):
    found = folders.named('llama-grouped')
    folder = folders.write(tmp_path / 'source', LLAMA | {'auto_map': {}}, found)
    import_run(folder, tmp_path / 'run', MeshConfig(), 'bfloat16', without_remote_code=True, say=str)
    export_run(tmp_path / 'run', tmp_path / 'target', say=str)
    same(folders.stored(tmp_path / 'target'), folders.in_bfloat16(found))
    assert json.loads((tmp_path / 'target' / 'config.json').read_text()) == LLAMA | {'dtype': 'bfloat16'}
    export_run(tmp_path / 'run', tmp_path / 'wide', 'float32', say=str)
    same(
        folders.stored(tmp_path / 'wide'),
        {name: x.astype(np.float32) for name, x in folders.in_bfloat16(found).items()},
    )


def test_many_files_with_an_index(tmp_path):
    found = folders.named('llama-grouped')
    kinds = {name: (x.dtype, x.shape) for name, x in found.items()}
    publish.write(tmp_path / 'target', LLAMA, {}, kinds, lambda name: found[name], file_bytes=60_000)
    files = sorted(path.name for path in (tmp_path / 'target').glob('*.safetensors'))
    assert len(files) > 3
    assert files[0] == f'model-00001-of-{len(files):05}.safetensors'
    same(folders.stored(tmp_path / 'target'), found)
    index = json.loads((tmp_path / 'target' / published_folder.INDEX).read_text())
    assert index['metadata']['total_size'] == sum(x.nbytes for x in found.values())


def test_older_names_and_files_without_the_prefix_are_given_back(tmp_path):
    names = {
        'gpt2-plain': lambda name: name.removeprefix('transformer.'),
        'bert-plain': lambda name: name.replace('LayerNorm.weight', 'LayerNorm.gamma'),
    }
    for case, rename in names.items():
        found = {rename(name): x for name, x in folders.named(case).items()}
        assert found.keys() != folders.named(case).keys()
        folder = folders.write(tmp_path / case, cases.CASES[case], found)
        import_run(folder, tmp_path / f'{case}-run', MESHES['all'], say=str)
        export_run(tmp_path / f'{case}-run', tmp_path / f'{case}-target', say=str)
        same(folders.stored(tmp_path / f'{case}-target'), found)


@pytest.mark.parametrize('name', cases.CASES)
def test_a_model_that_was_not_imported_finds_a_family(name):
    _, c = read(cases.CASES[name])
    c = dataclasses.replace(c, dropout=0.1)
    family, fields = publish.published_config(c, 512)
    found = family.model(Fields({**fields}))
    assert dataclasses.replace(found, dropout=0.1) == c


NOT_SAID = {  # a config with changes -> the family that it is, or the whole refusal
    ('demo', ''): 'no published family can say this model; the nearest is mixtral, which would need '
    'model.moe.first_dense_layers=0',
    ('demo', 'model.moe.first_dense_layers=0'): 'mixtral',
    ('demo', 'model.attention.qk_norm=true'): 'qwen3_moe',
    (
        'demo',
        'model.moe=null model.mlp.activation=relu',
    ): 'no published family can say this model; the nearest is llama, which would need model.mlp.activation=swiglu',
    (
        'reverse',
        '',
    ): 'no published family can say this model; the nearest is t5, which would need model.attention.scale=1.0, '
    'model.embedding.tied=false',
    ('reverse', 'model.attention.scale=1.0 model.embedding.tied=false'): 't5',
}


@pytest.mark.parametrize('name', NOT_SAID, ids=' '.join)
def test_a_model_of_no_family_is_told_what_the_nearest_would_need(name):
    config, changes = name
    c = load_config(f'configs/{config}.yaml', ['model.vocabulary=300', *changes.split()]).model
    if c.encoder:
        c = dataclasses.replace(c, encoder=dataclasses.replace(c.encoder, start_token=1))
    try:
        found = publish.published_config(c, 512)[0].name
    except UserError as error:
        found = str(error)
    assert found == NOT_SAID[name]


def test_a_model_that_is_not_of_the_family_asked_for_is_told_what_that_would_need():
    _, c = read(LLAMA)
    with pytest.raises(UserError, match=r'cannot be said as qwen2, which would need model.attention.qkv_bias=true$'):
        publish.published_config(c, 512, 'qwen2')
