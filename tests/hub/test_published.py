"""Published sizes (configs/models/): what each YAML says is what its publisher's config says, and it has exactly the
publisher's parameters. From shapes alone: no array is made.

published/NAME.json holds the publisher's config.json, as far as it says something of the model.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from tests.families.loading import read
from weft.hub.families import Family, families
from weft.hub.tensor_table import array_shapes, tensors, unpadded
from weft.model import cost
from weft.model.config import ModelConfig
from weft.model.decoder import weights_of
from weft.sharding.mesh import MeshConfig, make_mesh
from weft.training.config import load_config

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / 'configs/models'


@dataclasses.dataclass(frozen=True)
class Published:
    """A published model's parameters.

    Attributes:
        total: of the model in the YAML, as published, without scales and buffers.
        source: where the official figure is from, or 'by shapes' where the publisher gives none that is exact.
        official: that figure: numbers in the published files.
        beside: how many of them belong to no parameter of the model in the YAML, and what they are.
        active: of a token, in a mixture of experts.
    """

    total: int
    source: str
    official: int | None = None
    beside: Callable[[ModelConfig], int] = lambda c: 0
    active: int | None = None


def scales(c: ModelConfig) -> int:
    """DeepSeek-V3's: one for each 128 × 128 of a quantised matrix."""
    family = next(one for one in families() if one.name == 'deepseek_v3')
    found = tensors(family, c, array_shapes(c))
    quantised = [one.shape for one in found if '_proj' in one.name and 'eh_proj' not in one.name]
    return sum(math.prod(-(-n // 128) for n in shape) for shape in quantised)


def copied(c: ModelConfig) -> int:
    """The embedding and the head once more, which published files have in each layer that predicts further ahead."""
    return 2 * c.mtp.layers * c.vocabulary * c.model_dim


def siglip(c: ModelConfig, D=1152, F=4304, layers=27, patches=64 * 64) -> int:
    """The vision tower (patches of 14 × 14 × 3, learned positions, biases and LayerNorms) and its projection to the model."""
    layer = 4 * (D * D + D) + (2 * D * F + F + D) + 4 * D
    return (3 * 14 * 14 * D + D) + patches * D + layers * layer + 2 * D + (D + D * c.model_dim)


INDEX = 'model.safetensors.index.json, metadata.total_size, 2 bytes a number'
COUNT = 'count of safetensors on its page'
PUBLISHED = {
    'gpt2': Published(
        124_439_808,
        f'openai-community/gpt2, {COUNT}: the causal masks attn.bias are among them',
        137_022_720,
        lambda c: c.layers * c.max_positions**2,
    ),
    'llama-3.1-8b': Published(8_030_261_248, f'meta-llama/Llama-3.1-8B, {INDEX}', 16_060_522_496 // 2),
    'llama-3.1-70b': Published(70_553_706_496, f'meta-llama/Llama-3.1-70B, {INDEX}', 141_107_412_992 // 2),
    'llama-3.1-405b': Published(405_853_388_800, f'meta-llama/Llama-3.1-405B, {INDEX}', 811_706_777_600 // 2),
    'mistral-7b': Published(7_241_732_096, f'mistralai/Mistral-7B-v0.1, {INDEX}', 14_483_464_192 // 2),
    'mixtral-8x7b': Published(
        46_702_792_704, f'mistralai/Mixtral-8x7B-v0.1, {INDEX}', 93_405_585_408 // 2, active=12_879_925_248
    ),
    'mixtral-8x22b': Published(
        140_620_634_112, f'mistralai/Mixtral-8x22B-v0.1, {INDEX}', 281_241_268_224 // 2, active=39_152_031_744
    ),
    'qwen3-8b': Published(8_190_735_360, f'Qwen/Qwen3-8B, {INDEX}', 16_381_470_720 // 2),
    'qwen3-30b-a3b': Published(
        30_532_122_624, f'Qwen/Qwen3-30B-A3B, {INDEX}', 61_064_245_248 // 2, active=3_353_032_704
    ),
    'qwen3-235b-a22b': Published(
        235_093_634_560, f'Qwen/Qwen3-235B-A22B, {INDEX}', 470_187_269_120 // 2, active=22_190_763_520
    ),
    'olmoe-1b-7b': Published(
        6_919_161_856, f'allenai/OLMoE-1B-7B-0924, {INDEX}', 13_838_323_712 // 2, active=1_282_017_280
    ),
    'deepseek-v2-lite': Published(
        15_706_484_224, f'deepseek-ai/DeepSeek-V2-Lite, {INDEX}', 31_412_968_448 // 2, active=2_661_150_208
    ),
    'deepseek-v3': Published(
        684_489_845_504,
        f'deepseek-ai/DeepSeek-V3, {COUNT}: scales are among them',
        684_531_386_000,
        scales,
        active=37_552_297_472,
    ),
    'gemma-2-9b': Published(9_241_705_984, f'google/gemma-2-9b, {COUNT}', 9_241_705_984),
    'gemma-3-27b': Published(
        27_009_346_304,
        f'google/gemma-3-27b-pt, {COUNT}: the vision tower is among them',
        27_432_406_640,
        siglip,
    ),
    'gpt-oss-20b': Published(
        20_914_757_184,
        'by shapes; arXiv:2508.10925, table 1: 20.91 B, 3.61 B active without the embedding',
        active=4_187_440_704,
    ),
    'gpt-oss-120b': Published(
        116_829_156_672,
        'by shapes; arXiv:2508.10925, table 1: 116.83 B, 5.13 B active without the embedding',
        active=5_711_982_912,
    ),
    'grok-1': Published(
        315_684_820_992, 'by shapes of xai-org/grok-1, run.py; its README: 314 B', active=83_756_587_008
    ),
    'phi-3-mini': Published(3_821_079_552, f'microsoft/Phi-3-mini-4k-instruct, {INDEX}', 7_642_159_104 // 2),
    'glm-4.5-air': Published(
        110_468_824_832,
        f'zai-org/GLM-4.5-Air, {COUNT}',
        110_468_824_832,
        active=13_424_129_664,
    ),
    'bert-base': Published(110_106_428, f'google-bert/bert-base-uncased, {COUNT}', 110_106_428),
    't5-v1.1-base': Published(247_577_856, 'by shapes of google/t5-v1_1-base'),
    'transformer-base': Published(63_082_496, 'by shapes; arXiv:1706.03762, table 3: 65 million'),
}


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(make_mesh(MeshConfig())):
        yield


def model(name: str) -> ModelConfig:
    return load_config(CONFIGS / f'{name}.yaml').model


def publishers(name: str) -> dict[str, Any]:
    """The publisher's config, without the images."""
    config = json.loads((HERE / f'published/{name}.json').read_text())
    if 'text_config' in config:
        own = {'architectures': ['Gemma3ForCausalLM'], 'vocab_size': 262_208}  # what transformers takes for the second
        config = own | config['text_config']
    if name == 'bert-base':  # its files hold this one's tensors, whatever its config says
        config['architectures'] = ['BertForPreTraining']
    return config


def count(c: ModelConfig) -> int:
    """Numbers in our arrays, without the rows that fill up the vocabulary."""
    return sum(math.prod(unpadded(weight, c)) for weight in weights_of(c).values())


def padding(c: ModelConfig) -> int:
    return (c.padded_vocabulary - c.vocabulary) * (c.model_dim * (1 if c.embedding.tied else 2) + c.head_bias)


def read_published(name: str) -> tuple[Family, ModelConfig]:
    return read(publishers(name))


WITH_CONFIG = [name for name in PUBLISHED if name != 'transformer-base']  # which is published as a paper


def test_every_published_config_has_its_count():
    assert {path.stem for path in CONFIGS.glob('*.yaml')} == set(PUBLISHED)


@pytest.mark.parametrize('name', PUBLISHED)
def test_parameters_are_exactly_the_publishers(name):
    c, published = model(name), PUBLISHED[name]
    assert count(c) + copied(c) == published.total
    assert published.official in (None, published.total + published.beside(c)), published.source
    assert sum(cost.parameters(c).values()) - padding(c) + copied(c) == published.total
    assert cost.active_parameters(c) - padding(c) == (published.active or published.total)
    assert bool(c.moe) == bool(published.active)


@pytest.mark.parametrize('name', PUBLISHED)
def test_a_config_is_a_run_that_its_own_mesh_holds(name):
    path, published = CONFIGS / f'{name}.yaml', PUBLISHED[name]
    config = load_config(path)
    assert config.name == name
    first, *about = path.read_text(encoding='utf-8').split('name: ')[0].splitlines()
    if config.model.causal:
        config.check_sizes()
        assert first.startswith(f'# python scripts/train.py configs/models/{name}.yaml data.source=')
    for number in filter(None, (published.total, published.active)):
        assert f'{number:,}' in ' '.join(about), 'the comment tells the parameters'


@pytest.mark.parametrize('name', WITH_CONFIG)
def test_a_config_is_what_its_family_reads_of_the_publishers(name):
    family, wanted = read_published(name)
    c = model(name)
    assert c == wanted
    assert sum(math.prod(one.shape) for one in tensors(family, c, array_shapes(c))) == PUBLISHED[name].total
