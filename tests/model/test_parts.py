"""What published folders hold decides: parts that config.json has and files lack, other names, fields that are passed over."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.families import cases, folders
from weft.hub import published_folder
from weft.hub import read as hub
from weft.model.config import changed
from weft.runtime.errors import UserError
from weft.sharding.mesh import MeshConfig, make_mesh
from weft.training.exporting import export_run
from weft.training.importing import import_run

HEAD = 'lm_head.weight'


@pytest.fixture(autouse=True)
def begun() -> None:
    """JAX has its eight devices before an import would begin it with as many as its own mesh has."""
    jax.devices()


def folder(
    place: Path, case: str, drop: tuple[str, ...] = (), more: dict[str, Any] | None = None, **fields: Any
) -> Path:
    """A case's folder without the tensors that begin so, with others, and with other fields in its config."""
    found = {name: x for name, x in folders.named(case).items() if not name.startswith(drop or ('\0',))}
    return folders.write(place / 'source', cases.CASES[case] | fields, found | (more or {}))


def there_and_back(source: Path, place: Path, ignore: tuple[str, ...] = ()) -> list[str]:
    """What an import says of a folder, which an export gives back: its tensors, and its fields."""
    said: list[str] = []
    import_run(source, place / 'run', MeshConfig(), ignore=ignore, say=said.append)
    export_run(place / 'run', place / 'target', say=str)
    stored, back = folders.stored(source), folders.stored(place / 'target')
    assert stored.keys() == back.keys()
    assert all(np.array_equal(stored[name], back[name]) for name in stored)
    config = json.loads((source / published_folder.CONFIG).read_text())
    assert json.loads((place / 'target' / published_folder.CONFIG).read_text()) == config | {'dtype': 'float32'}
    return said


def arrays(source: Path) -> dict[str, np.ndarray]:
    """What an import makes of a folder."""
    return {leaf: np.asarray(x) for leaf, x in hub.read(source).arrays(make_mesh(MeshConfig()))}


@pytest.mark.parametrize('case', ['deepseek_v3-as-published', 'glm4_moe-air'])
def test_layers_ahead_that_no_file_has_are_left_out_and_said(case, tmp_path):
    """As transformers saves such models."""
    source = folder(tmp_path, case, num_nextn_predict_layers=1)
    found = hub.read(source)
    assert (found.model.mtp.layers, found.absent) == (0, ('mtp',))
    assert (
        'has no layers that predict further ahead (num_nextn_predict_layers): imported without'
        in there_and_back(source, tmp_path)[1]
    )


@pytest.mark.parametrize('drop', ['model.layers.4.', 'model.layers.3.enorm', 'model.layers.4.shared_head.norm'])
def test_a_part_of_the_layers_ahead_is_an_error(drop, tmp_path):
    source = folder(tmp_path, 'deepseek_v3-two-ahead', (drop,))
    with pytest.raises(
        UserError, match=r'is missing.*it predicts further ahead, and the files have a part of what does'
    ):
        hub.read(source)


NEXT, POOLER, MASKED = 'cls.seq_relationship.', 'bert.pooler.', 'cls.predictions.'
BERT: list[tuple[str, tuple[str, ...], Any]] = [  # tensors that are missing; the parts that are absent, or what is told
    ('BertForPreTraining', (NEXT,), ('next_sentence',)),
    ('BertForPreTraining', (NEXT, POOLER), ('next_sentence', 'pooler')),
    ('BertForPreTraining', (NEXT, POOLER, MASKED), ('next_sentence', 'pooler', 'head')),
    ('BertForPreTraining', (NEXT + 'bias',), 'cls.seq_relationship.bias'),
    ('BertForMaskedLM', (NEXT, MASKED), ('head',)),
    ('BertForMaskedLM', (NEXT, MASKED + 'transform.'), 'cls.predictions.transform.dense.weight'),
    ('BertModel', (NEXT, MASKED), ()),
    ('BertModel', (NEXT, MASKED, POOLER), ()),
    ('BertModel', (NEXT, MASKED, POOLER + 'dense.bias'), 'bert.pooler.dense.bias'),
]


@pytest.mark.parametrize(('architecture', 'drop', 'expected'), BERT)
def test_bert_with_and_without_each_of_its_heads(architecture, drop, expected, tmp_path):
    source = folder(tmp_path, 'bert-pretraining', drop, architectures=[architecture])
    if isinstance(expected, str):
        with pytest.raises(UserError, match=f'tensor {expected} is missing'):
            hub.read(source)
        return
    found = hub.read(source)
    assert found.absent == expected
    assert bool(found.model.head) == (MASKED not in drop)
    assert bool(found.model.pooler) == (POOLER not in drop)


def test_a_head_that_no_file_of_a_decoder_has_is_missing_unless_its_class_has_none(tmp_path):
    with pytest.raises(UserError, match=r'lm_head.weight is missing.*a model without an LM head is a LlamaModel'):
        hub.read(folder(tmp_path, 'llama-grouped', (HEAD,)))
    with pytest.raises(UserError, match=r'embed_tokens.weight is missing'):
        hub.read(folder(tmp_path / 'less', 'llama-grouped', (HEAD, 'model.embed_tokens')))


def test_a_tied_embedding_may_stand_under_the_name_of_the_head(tmp_path):
    source = folder(tmp_path, 'mixtral-top-1-tied')
    whole = arrays(source)
    found = folders.stored(source)
    found[HEAD] = found.pop('model.embed_tokens.weight')
    other = folders.write(tmp_path / 'other' / 'source', cases.CASES['mixtral-top-1-tied'], found)
    assert all(np.array_equal(x, whole[leaf]) for leaf, x in arrays(other).items())
    assert there_and_back(other, tmp_path / 'other')[1:] == [f'{other} {NO_TOKENIZER}']


NO_TOKENIZER = 'has no tokenizer: the run can be scored with token ids, but neither decode nor evaluate text'
T5_NAMES = {  # what stands in place of shared.weight
    'decoder': ('decoder.embed_tokens.weight',),
    'both': ('encoder.embed_tokens.weight', 'decoder.embed_tokens.weight'),
}


@pytest.mark.parametrize('names', T5_NAMES)
def test_t5_without_shared_has_its_embedding_under_another_name(names, tmp_path):
    found = folders.named('t5-v1.1')
    table = found.pop('shared.weight')
    known = arrays(folder(tmp_path, 't5-v1.1'))
    source = folders.write(tmp_path / names, cases.CASES['t5-v1.1'], found | dict.fromkeys(T5_NAMES[names], table))
    assert all(np.array_equal(x, known[leaf]) for leaf, x in arrays(source).items())
    there_and_back(source, tmp_path / 'more')
    if names == 'both':
        other = dict(zip(T5_NAMES[names], (table, table + 1), strict=True))
        source = folders.write(tmp_path / 'differ', cases.CASES['t5-v1.1'], found | other)
        with pytest.raises(UserError, match=r'decoder.embed_tokens.weight differs from shared.weight'):
            hub.read(source)


@pytest.mark.parametrize('fields', [{}, {'tie_word_embeddings': True, 'scale_decoder_outputs': False}], ids=str)
def test_t5_without_a_head_is_tied_and_not_scaled_where_its_config_says_so(fields, tmp_path):
    """As transformers 5.24 computes it: a config without ties is of unscaled logits alone."""
    tied, scaled = (hub.read(folder(tmp_path / name, name)).model for name in ('t5-v1.1', 't5-before-v1.1'))
    assert (tied.embedding.tied, scaled.embedding.tied, scaled.head.scale) == (False, True, 1 / 8)
    source = folder(tmp_path, 't5-v1.1', (HEAD,), **fields)
    c = hub.read(source).model
    assert changed(c, {'embedding.tied': False}) == tied
    assert c.embedding.tied
    assert 'has no LM head: the embedding is it' in there_and_back(source, tmp_path)[1]


SHORT = {  # a case, and the architecture as which it is published
    'qwen3-biases-tied': 'Qwen3ForCausalLM',  # as Qwen3's embedding models are
    'llama-grouped': 'LlamaForCausalLM',
    'gpt2-untied-unscaled-exact-gelu': 'GPT2LMHeadModel',
}


@pytest.mark.parametrize('case', SHORT)
def test_names_without_the_prefix_are_those_of_the_same_model(case, tmp_path):
    found = {name.removeprefix('model.').removeprefix('transformer.'): x for name, x in folders.named(case).items()}
    assert found.keys() != folders.named(case).keys()
    source = folders.write(tmp_path / 'source', cases.CASES[case], found)
    assert hub.read(source).family.architectures[0] == SHORT[case]
    there_and_back(source, tmp_path)


def test_a_model_without_a_head_may_have_names_with_the_prefix(tmp_path):
    source = folder(tmp_path, 'llama-grouped', (HEAD,), architectures=['LlamaModel'])
    found = hub.read(source)
    assert (found.model.head, found.absent) == (None, ())
    there_and_back(source, tmp_path)


def test_fields_are_passed_over_by_name_said_kept_and_given_back(tmp_path):
    scaling = {'type': 'linear', 'factor': 4.0, 'alpha': [1.0]}
    source = folder(tmp_path, 'llama-linear-scaling', rope_scaling=scaling, logit_temperature=2.0)
    with pytest.raises(UserError, match=r'alpha is \[1.0\].*--ignore rope_scaling.alpha passes it over'):
        hub.read(source)
    asked = ('rope_scaling.alpha', 'logit_temperature')
    with pytest.raises(UserError, match=r'logit_temperature is 2.0.*--ignore logit_temperature passes it over'):
        hub.read(source, ignore=asked[:1])
    said = there_and_back(source, tmp_path, asked)
    assert [line.partition(': ')[2] for line in said[1:3]] == [f'{name} is passed over, as asked' for name in asked]
    with pytest.raises(
        UserError, match=r"--ignore rope_scaling.alph: .*has no such field; did you mean 'rope_scaling.alp"
    ):
        hub.read(source, ignore=('rope_scaling.alph',))
    with pytest.raises(UserError, match='num_hidden_layers is missing'):
        hub.read(source, ignore=(*asked, 'num_hidden_layers'))


@pytest.mark.parametrize('left', [{}, {'quant_method': None, 'bits': None}], ids=str)
def test_what_is_left_of_a_quantization_says_nothing(left, tmp_path):
    assert hub.read(folder(tmp_path, 'llama-grouped', quantization_config=left)).compute.weight_dtype == 'float32'
    source = folder(tmp_path / 'other', 'llama-grouped', quantization_config={'quant_method': 'bitsandbytes'})
    with pytest.raises(UserError, match='bitsandbytes'):
        hub.read(source)
    assert hub.read(source, ignore=('quantization_config',)).ignored == ('quantization_config',)


def test_what_sentence_transformers_has_beside_a_model_is_kept(tmp_path):
    source = folder(tmp_path, 'bert-headless')
    (source / '1_Pooling').mkdir()
    (source / '1_Pooling' / 'config.json').write_text('{"pooling_mode_cls_token": true}')
    (source / 'modules.json').write_text('[]')
    (source / '2_Dense').mkdir()
    (source / '2_Dense' / 'model.safetensors').write_bytes(b'no weights of this model')
    there_and_back(source, tmp_path)
    for name in ('modules.json', '1_Pooling/config.json'):
        assert (tmp_path / 'target' / name).read_bytes() == (source / name).read_bytes()
    (source / '1_Pooling' / 'config.json').unlink()
    (source / '1_Pooling').rmdir()
    (tmp_path / 'elsewhere').mkdir()
    (tmp_path / 'elsewhere' / 'config.json').write_text('{}')
    (source / '1_Pooling').symlink_to(tmp_path / 'elsewhere')
    with pytest.raises(UserError, match=r'1_Pooling/config.json: is a link that leaves the folder'):
        published_folder.side_files(source)
