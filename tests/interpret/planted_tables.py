"""A run whose tables are planted: what is near to what, and which word answers which question, is known.

Letters: V vocabulary, D model.
"""

from pathlib import Path

import jax
import numpy as np

from weft.data.tokenizer import Tokenizer
from weft.model.config import AttentionConfig, EmbeddingConfig, MLPConfig, ModelConfig
from weft.sharding.mesh import MeshConfig, make_mesh
from weft.storage.checkpoint import Checkpoints
from weft.storage.manifest import leaves_by_path
from weft.training import config as configs
from weft.training.config import RunConfig, TrainingConfig
from weft.training.step import init

PAIRS = [('man', 'woman'), ('king', 'queen'), ('boy', 'girl'), ('duke', 'lady')]
OTHERS = ['river', 'bank', 'house', 'apple', 'tree', 'stone']
WORDS = [word for pair in PAIRS for word in pair] + OTHERS
QUESTIONS = ': gender\n' + '\n'.join(' '.join(p + q) for p in PAIRS for q in PAIRS if p != q) + '\n'
D = 16


def input_vectors() -> dict[str, np.ndarray]:
    """Of each pair a direction of its own, one way of being female for all, and other words away from them."""
    axes = np.eye(D, dtype=np.float32)
    pairs = {word: axes[i] + 0.5 * axes[8] * (word == pair[1]) for i, pair in enumerate(PAIRS) for word in pair}
    return pairs | {word: 3 * axes[9 + i] for i, word in enumerate(OTHERS)}


def output_vectors() -> dict[str, np.ndarray]:
    """Each word has the next one's direction nearest to its own: they stand on a spiral."""
    angle = {word: 0.02 * i * i for i, word in enumerate(WORDS)}
    return {word: np.array([np.cos(a), np.sin(a), *[0] * (D - 2)], np.float32) for word, a in angle.items()}


def planted_run(folder: Path, mesh: MeshConfig, has_tokenizer: bool = True) -> Path:
    """A decoder of two layers with a head of its own, imported as it were: weights, tokenizer and config."""
    text = ''.join(f'a {word} a {word} the {word}\n' for word in WORDS)
    tokenizer = Tokenizer.train([text * 20], 400)
    V = tokenizer.vocabulary
    model = ModelConfig(
        layers=2,
        model_dim=D,
        attention=AttentionConfig(heads=2),
        mlp=MLPConfig(dim=32),
        embedding=EmbeddingConfig(tied=False),
        vocabulary=V,
    )
    config = RunConfig(
        name='planted', mesh=mesh, model=model, training=TrainingConfig(steps=1, batch=4, sequence_length=64)
    )
    with jax.set_mesh(make_mesh(mesh)):
        weights = leaves_by_path(jax.jit(lambda: init(config).model)())
    (input_name,), (head_name,) = ([name for name in weights if one in name] for one in ('embed_VD', 'head_DV'))
    for name, vectors in ((input_name, input_vectors()), (head_name, output_vectors())):
        leaf = weights[name]
        # Other tokens stand apart from all words.
        noise_VD = 0.02 * np.random.default_rng(0).standard_normal((leaf.size // D, D))
        table = (np.eye(D)[15] + noise_VD).astype(leaf.dtype)
        for word, x_D in vectors.items():
            (i,) = tokenizer.encode(f' {word}')
            table[i] = x_D
        weights[name] = jax.device_put(table if name == input_name else table.T, leaf.sharding)
    files = {'config.yaml': configs.dump(config).encode(), **(tokenizer.files() if has_tokenizer else {})}
    facts = {'step': 0, 'tokens': 0, 'corpus': None, 'seed': 0, 'next_sample': 0}
    Checkpoints(folder).save_weights(0, 'model', iter(weights.items()), facts, files)
    (folder / 'config.yaml').write_bytes(files['config.yaml'])
    return folder
