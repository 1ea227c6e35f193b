"""Published folders with something wrong: each is told in one line before anything is written."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.data.test_tokenizer import TEXT
from tests.families import cases, folders
from weft.data.tokenizer import Tokenizer
from weft.hub import tensor_files
from weft.hub.exported_tokenizer import exported_tokenizer
from weft.hub.published_folder import INDEX, SINGLE
from weft.hub.published_tokenizer import load_tokenizer
from weft.runtime.errors import UserError
from weft.sharding.mesh import MeshConfig
from weft.training.importing import import_run

LLAMA = cases.CASES['llama-grouped']


@pytest.fixture(autouse=True)
def begun() -> None:
    """JAX has its eight devices before an import would begin it with as many as its own mesh has."""
    jax.devices()


Q = 'model.layers.1.self_attn.q_proj.weight'


def edit(folder: Path, **fields) -> None:
    """Changes config.json; None takes a field out."""
    path = folder / 'config.json'
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def again(folder: Path, change) -> None:
    """Writes the weights again, with some of them changed."""
    found = folders.stored(folder)
    change(found)
    for path in folder.glob('*.safetensors*'):
        path.unlink()
    kinds = {name: (x.dtype, x.shape) for name, x in found.items()}
    tensor_files.write(folder / SINGLE, kinds, lambda name: found[name])


def rehead(folder: Path, change) -> None:
    """Changes the header of the weights, which is text."""
    path = folder / SINGLE
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], 'little')
    text = change(raw[8 : 8 + length].decode()).encode()
    path.write_bytes(len(text).to_bytes(8, 'little') + text + raw[8 + length :])


def reindex(folder: Path, **files: str) -> None:
    path = folder / INDEX
    index = json.loads(path.read_text())
    index['weight_map'] |= {Q: files['q']} if files else {}
    path.write_text(json.dumps(index))


def two(folder: Path, change=lambda folder: None) -> None:
    """As two files with an index."""
    found = folders.stored(folder)
    config = json.loads((folder / 'config.json').read_text())
    shutil.rmtree(folder)
    folders.write(folder, config, found, files=2)
    change(folder)


def pickled(folder: Path) -> None:
    (folder / SINGLE).rename(folder / 'pytorch_model.bin')


def outside(folder: Path) -> None:
    (folder / SINGLE).rename(folder.parent / 'elsewhere')
    (folder / SINGLE).symlink_to(folder.parent / 'elsewhere')


def duplicate(folder: Path) -> None:
    second = folder / 'model-00002-of-00002.safetensors'
    shutil.copy(folder / 'model-00001-of-00002.safetensors', second)


def swapped(found: dict) -> None:
    found['lm_head.weight'] = found['model.embed_tokens.weight'] + 1


def wide_bias(folder: Path) -> None:
    found = folders.named('glm4_moe-air')
    wide = {name: x.astype(np.float64) if name.endswith('correction_bias') else x for name, x in found.items()}
    folders.write(folder, cases.CASES['glm4_moe-air'], wide)


def cut(folder: Path, size: int) -> None:
    path = folder / SINGLE
    path.write_bytes(path.read_bytes()[:size])


def grow(folder: Path) -> None:
    with (folder / SINGLE).open('ab') as file:
        file.write(b'more')


def swap_offsets(text: str) -> str:
    """The last two tensors in each other's place."""
    header = json.loads(text)
    a, b = list(header)[-2:]
    header[a]['data_offsets'] = header[b]['data_offsets']
    return json.dumps(header)


MISTAKES = {
    'no folder': (shutil.rmtree, ['no such folder']),
    'no config': (lambda f: (f / 'config.json').unlink(), ['config.json', 'not a published model']),
    'config is no JSON': (lambda f: (f / 'config.json').write_text('{'), ['config.json', 'not readable as JSON']),
    'config is a list': (lambda f: (f / 'config.json').write_text('[]'), ['JSON object, not list']),
    'unknown architecture': (
        lambda f: edit(f, architectures=['LlamaForCausalLLM']),
        ['LlamaForCausalLLM', "did you mean 'LlamaForCausalLM'"],
    ),
    'unknown architecture, another than it looks like': (
        lambda f: edit(f, architectures=['MambaForCausalLM']),
        ['MambaForCausalLM', 'not supported; the families are llama, mistral, '],
    ),
    'no architecture': (lambda f: edit(f, architectures=None), ['config.json: architectures is missing', 'Llama']),
    'null architecture': (
        lambda f: (f / 'config.json').write_text(json.dumps(LLAMA | {'architectures': None})),
        ['config.json: architectures is null: it must name the class'],
    ),
    'heads that do not divide': (
        lambda f: edit(f, num_key_value_heads=3),
        ['config.json: num_key_value_heads is 3 and num_attention_heads 4: ', 'nearest that works: '],
    ),
    'odd heads': (lambda f: edit(f, head_dim=15), ['config.json: head_dim is 15: ', 'even; nearest: 16']),
    'more experts chosen than there are': (
        lambda f: edit(f, architectures=['MixtralForCausalLM'], num_local_experts=2, num_experts_per_tok=3),
        ['config.json: num_experts_per_tok is 3 and num_local_experts 2: '],
    ),
    'tokenizer of another format': (
        lambda f: (f / 'tekken.json').write_text('{}'),
        ['tekken.json: is in Mistral’s own format, which is not read', 'tokenizer.json'],
    ),
    'start token beyond the vocabulary': (
        lambda f: edit(f, **cases.CASES['t5-v1.1'] | {'decoder_start_token_id': 200}),
        ['config.json: decoder_start_token_id is 200: ', 'less than vocab_size, which is 200'],
    ),
    'unknown field': (lambda f: edit(f, rope_thetta=1), ['rope_thetta is 1', "did you mean 'rope_theta'"]),
    'unsupported value': (lambda f: edit(f, hidden_act='relu'), ['hidden_act', "'relu'", "'silu'"]),
    'remote code': (lambda f: edit(f, auto_map={'AutoModel': 'x.Y'}), ['auto_map', '--without-remote-code']),
    'quantised': (
        lambda f: edit(f, quantization_config={'quant_method': 'awq'}),
        ['quantization_config', "'awq'", 'fp8', 'mxfp4'],
    ),
    'pickled weights': (pickled, ['pytorch_model.bin', 'safetensors', 'save_pretrained']),
    'other weights': (lambda f: (f / SINGLE).rename(f / 'model.gguf'), ['model.gguf', 'safetensors']),
    'no weights': (lambda f: (f / SINGLE).unlink(), ['neither', SINGLE, INDEX]),
    'link that leaves': (outside, [SINGLE, 'leaves the folder']),
    'missing tensor': (lambda f: again(f, lambda found: found.pop(Q)), [f'tensor {Q} is missing']),
    'missing tensors': (
        lambda f: edit(f, num_hidden_layers=3),
        ['tensor model.layers.2.input_layernorm.weight is missing (and 8 more)'],
    ),
    'extra tensor': (
        lambda f: again(f, lambda found: found.update(more=np.zeros(3, np.float32))),
        ['tensor more [3]', 'lost'],
    ),
    'extra layers': (lambda f: edit(f, num_hidden_layers=1), ['model.layers.1.', '(and 8 more)']),
    'misshapen tensor': (
        lambda f: again(f, lambda found: found.update({Q: np.zeros((64, 32), np.float32)})),
        [Q, '[64, 32]', '[64, 64]'],
    ),
    'untied head': (
        lambda f: (again(f, swapped), edit(f, tie_word_embeddings=True)),
        ['lm_head.weight', 'tie_word_embeddings', 'model.embed_tokens.weight'],
    ),
    'whole numbers': (
        lambda f: again(f, lambda found: found.update({Q: found[Q].astype(np.int8)})),
        [Q, 'int8', 'quantization_config'],
    ),
    'float64': (
        lambda f: again(f, lambda found: found.update({Q: found[Q].astype(np.float64)})),
        ['float64', '--dtype'],
    ),
    'float64 where float32 is kept': (
        lambda f: (shutil.rmtree(f), wide_bias(f)),
        ['float64', '--dtype'],
    ),
    'index that leaves': (lambda f: two(f, lambda f: reindex(f, q='../other.safetensors')), ["'../other.safetensors'"]),
    'absolute index': (lambda f: two(f, lambda f: reindex(f, q='/etc/passwd')), ["'/etc/passwd'"]),
    'index of no file': (lambda f: two(f, lambda f: reindex(f, q='none.safetensors')), ['none.safetensors', 'missing']),
    'index of another file': (
        lambda f: two(f, lambda f: reindex(f, q='model-00002-of-00002.safetensors')),
        [Q, 'model-00002-of-00002', 'does not have it'],
    ),
    'index is no JSON': (lambda f: two(f, lambda f: (f / INDEX).write_text('x')), [INDEX, 'JSON']),
    'index without a map': (lambda f: two(f, lambda f: (f / INDEX).write_text('{}')), [INDEX, 'weight_map']),
    'tensor in two files': (lambda f: two(f, duplicate), ['is in both', 'model-00001', 'model-00002']),
    'empty file': (lambda f: cut(f, 0), [SINGLE, '0 bytes']),
    'cut in the header': (lambda f: cut(f, 100), [SINGLE, 'cut off']),
    'cut in the numbers': (lambda f: cut(f, 30000), [SINGLE, 'cut off']),
    'more at the end': (grow, [SINGLE, 'belongs to no tensor']),
    'huge header': (
        lambda f: (f / SINGLE).write_bytes(b'\xff' * 7 + b'\0' + b'{}'),
        [str(2**56 - 1), '100000000'],
    ),
    'header is no JSON': (lambda f: rehead(f, lambda text: 'x' + text[1:]), ['header is not a JSON object']),
    'header is a list': (lambda f: rehead(f, lambda text: '[]'), ['not a JSON object']),
    'a name twice': (lambda f: rehead(f, lambda text: text.replace('layers.0', 'layers.1')), ['twice', 'layers.1']),
    'unknown dtype': (lambda f: rehead(f, lambda text: text.replace('"F32"', '"F31"', 1)), ["'F31'", 'F32']),
    'negative size': (lambda f: rehead(f, lambda text: text.replace('[64,', '[-64,', 1)), ['-64', 'whole numbers']),
    'size and bytes differ': (lambda f: rehead(f, lambda text: text.replace('[64,', '[63,', 1)), ['needs', 'bytes']),
    'overlap': (lambda f: rehead(f, swap_offsets), ['the header is wrong']),
    'entry without a shape': (lambda f: rehead(f, lambda text: text.replace('"shape"', '"form"', 1)), ['shape']),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_a_mistake_is_told_in_one_line_before_anything_is_written(name, tmp_path):
    change, words = MISTAKES[name]
    folder = folders.write(tmp_path / 'source', LLAMA, folders.named('llama-grouped'))
    change(folder)
    with pytest.raises(UserError) as error:
        import_run(folder, tmp_path / 'runs' / 'run', MeshConfig(), say=str)
    line = str(error.value)
    assert '\n' not in line
    assert all(word in line for word in words), line
    assert not (tmp_path / 'runs').exists()


def test_a_tokenizer_may_be_larger_than_the_model_and_ids_beyond_are_refused_in_texts(tmp_path):
    folder = folders.write(tmp_path / 'source', LLAMA, folders.named('llama-grouped'))
    files = exported_tokenizer(Tokenizer.train([TEXT], 300), 64)
    description = json.loads(files['tokenizer.json'])
    flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
    description['added_tokens'].append({'id': 300, 'content': '<|im_end|>', 'special': True} | flags)
    for name, content in (files | {'tokenizer.json': json.dumps(description).encode()}).items():
        (folder / name).write_bytes(content)
    lines: list[str] = []
    import_run(folder, tmp_path / 'run', MeshConfig(), say=lines.append)
    assert any('its tokenizer has 301 tokens and its embedding 200 rows' in line for line in lines)
    tokenizer = load_tokenizer(tmp_path / 'run')
    assert (tokenizer.embedded, tokenizer.vocabulary) == (200, 301)
    assert tokenizer.encode('\0') == [tokenizer.id_of('<0x00>')]
    with pytest.raises(UserError, match=r"token '<\|im_end\|>' has id 300, and the model’s embedding has 200 rows"):
        tokenizer.encode('a<|im_end|>')
