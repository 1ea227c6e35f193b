"""Published folders that a stranger spoiled: each becomes a run that holds what its files say, or one line says why not."""

import contextlib
import json
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from tests.families import cases as families
from tests.families import folders
from tests.fuzz import Case, note, rng
from tests.fuzz.spoiled import TEMPLATE, WAYS
from tests.hub.test_tokenizer_goldens import files_of
from weft.hub import published_folder, tensor_files
from weft.hub.chat import chat_templates
from weft.hub.streaming import published
from weft.runtime.errors import UserError
from weft.sharding.mesh import MeshConfig, make_mesh
from weft.training import importing

NAME, COUNT, QUICK, SECONDS, IN_PROCESS = 'folders', 3000, 120, 10.0, True
GROWTH = 3 * 2**29  # bytes by which one case may raise what a process has held in memory
LONGEST = 1000  # characters of a message, without the folder's own name
TEXT = 'the cat  sat on\tthe mat, 12.5 été\n'
BASES = {  # a family's case, the golden folder whose tokenizer it has, and in how many files its weights are
    'llama': ('llama-grouped', 'json_template_PreTrainedTokenizerFast_True', 2),
    'mixtral': ('mixtral-plain', 'llama_chatml', 1),
    'deepseek': ('deepseek_v3-two-ahead', 'json_roberta', 1),
    'gpt2': ('gpt2-by-layer', 'gpt2', 1),
    'gpt_oss': ('gpt_oss-as-published', 'json_added_by_its_config', 3),
    'gemma3': ('gemma3-as-published', 'gemma', 1),
    't5': ('t5-v1.1', 't5', 1),
    'marian': ('marian-published', 'marian', 1),
    'bert': ('bert-plain', 'json_flags', 1),
    'phi3': ('phi3-longrope-long', 'unigram', 2),
    'fp8': ('qwen3-plain', 'qwen2', 1),
}


class Fault(AssertionError):
    """What no folder may lead to."""


def cases(seed: int, count: int) -> Iterator[Case]:
    """A family's folder, and the way in which it is spoiled."""
    for number in range(count):
        draw = rng(seed, number, NAME)
        base, way = draw.choice(list(BASES)), draw.choices(list(WAYS), list(WAYS.values()))[0]
        yield Case(number, f'{base}: {way.__name__.replace("_", " ")}', (base, way, seed))


def check(case: Case, scratch: Path) -> str | None:
    base, way, seed = case.content
    folder, run = scratch / 'folder', scratch / 'runs' / 'run'
    shutil.copytree(scratch.parent / 'bases' / base, folder)
    what = way(folder, rng(seed, case.number, way.__name__))
    before, held = _state(scratch), _held()
    try:
        came = outcome(folder, run)
    except UserError as error:
        if fault := _wrong_with(str(error), folder):
            return f'{what}: {fault}'
        came = 'refused'
    except BaseException as error:  # a panic of a Rust library is no Exception
        error.add_note(what)
        raise
    note(came)
    if (grown := _held() - held) > GROWTH:
        return f'{what}: {came} with {grown >> 20} MiB more memory'
    if _state(scratch) != before:
        return f'{what}: {came}, and something was written'
    return None


def prepare(place: Path) -> None:
    """Writes the folders that are spoiled, once."""
    if not (place / 'bases').exists():
        shutil.rmtree(place / 'bases.new', ignore_errors=True)
        write_bases(place / 'bases.new').rename(place / 'bases')


def write_bases(root: Path) -> Path:
    """Whole folders of several families and kinds of tokenizers."""
    for name, (case, tokenizer, files) in BASES.items():
        found = folders.named(case)
        config = families.CASES[case] | {'eos_token_id': 2, 'bos_token_id': 1}
        if name == 'fp8':
            found, config = _in_fp8(found), config | {'quantization_config': FP8}
        folder = folders.write(root / name, config, found, files)
        for file, content in files_of(tokenizer).items():
            if file != 'config.json':
                (folder / file).write_bytes(content)
        (folder / 'generation_config.json').write_text(json.dumps({'eos_token_id': [2, 3], 'top_p': 0.9}))
        if name in ('llama', 'gemma3'):
            (folder / 'chat_template.jinja').write_text(TEMPLATE)
        if name == 'mixtral':
            config = json.loads((folder / 'tokenizer_config.json').read_text())
            templates = [{'name': 'default', 'template': TEMPLATE}, {'name': 'tools', 'template': TEMPLATE}]
            (folder / 'tokenizer_config.json').write_text(json.dumps(config | {'chat_template': templates}))
    return root


FP8 = {'quant_method': 'fp8', 'fmt': 'e4m3', 'activation_scheme': 'dynamic', 'weight_block_size': [16, 32]}


def _in_fp8(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    packed = {}
    for name, x in folders.in_bfloat16(found).items():
        packed[name] = x
        if '_proj.weight' in name:
            packed[name] = (x * 4).astype(jnp.float8_e4m3fn)
            packed[f'{name}_scale_inv'] = np.full((-(-x.shape[0] // 16), -(-x.shape[1] // 32)), 0.25, np.float32)
    return packed


def outcome(folder: Path, run: Path) -> str:
    """What an import does before it writes, and the numbers that it would write."""
    one = importing.examine(folder, run.name, MeshConfig())
    chat_templates(one.files, str(folder))
    if one.tokenizer:
        with contextlib.suppress(UserError):  # a text may have tokens that the model does not know
            ids = one.tokenizer.encode(TEXT)
            one.tokenizer.decode(ids, whole=True)
    ours = dict(one.found.arrays(make_mesh(MeshConfig())))
    if not one.found.fields.values.get('quantization_config'):
        theirs = _numbers(folder)
        for tensor in one.found.table:
            mine, wanted = published(tensor, ours), theirs[one.found.files.get(tensor.name, tensor.name)]
            with np.errstate(all='ignore'):
                same = np.array_equal(mine, wanted.astype(mine.dtype), equal_nan=True)
            if not same or (mine.dtype == wanted.dtype and mine.tobytes() != wanted.tobytes()):
                raise Fault(f'tensor {tensor.name!r} is not what the file says')
    return 'accepted'


def _numbers(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of a folder, read without Weft."""
    found, names = {}, {published_folder.SINGLE}
    if not (folder / published_folder.SINGLE).exists():
        names = set(json.loads((folder / published_folder.INDEX).read_bytes())['weight_map'].values())
    for path in (folder / name for name in names):
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], 'little')
        for name, entry in json.loads(raw[8:start]).items():
            if name != '__metadata__':
                begin, end = (start + at for at in entry['data_offsets'])
                dtype = tensor_files.DTYPES[entry['dtype']]
                found[name] = np.frombuffer(raw[begin:end], dtype).reshape(entry['shape'])
    return found


def _wrong_with(message: str, folder: Path) -> str | None:
    """What is wrong with a message, beside the name that the user gave the folder."""
    message = message.replace(str(folder), 'F')
    if not message.isprintable():
        return f'what troubles a terminal: {message[:300]!r}'
    if not 5 < len(message) <= LONGEST:
        return f'a message of {len(message)} characters: {message[:LONGEST]!r}'
    return None


def _state(place: Path) -> list[tuple]:
    return sorted((str(path), path.lstat().st_size, path.lstat().st_mtime_ns) for path in place.rglob('*'))


def _held() -> int:
    """The most bytes that this process has held in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
