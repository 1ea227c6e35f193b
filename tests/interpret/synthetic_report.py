"""Reports of an X-ray with the sizes of SmolLM2-135M and made-up numbers: for tests of the page, which needs no model."""

import base64
import re
from typing import Any

import numpy as np

# L layers, N heads, T tokens, D model dim, F hidden units, M layers of experts, E experts, K experts a token.
D, F, VOCABULARY = 576, 1536, 49152
MOST_CELLS = 1500  # that a report tells of
E, K = 16, 2
KINDS = ('word', 'number', 'punctuation', 'space')  # those that the text has; 'other' is the fifth
TEXT = """The company Apple sells phones, and its new phone costs 999 dollars.
When Mary and John went to the store, John gave a drink to Mary. Then she said “thank you” and went home.

def add(a, b):
    return a + b
The capital of France is Paris, the capital of Spain is Madrid"""
STORY = re.findall(r'\n+| *\w+| ?[^\w\s]', TEXT)
OTHER = [*STORY[:2], ' apple', ' tastes', ' sweet', *STORY[5:]]
SYLLABLES = (
    'ba',
    'ter',
    'lo',
    'ning',
    'ca',
    'pri',
    'son',
    'the',
    'qui',
    'um',
    'ed',
    'ing',
    'or',
    'mi',
    'za',
    'ré',
    '中',
    '!',
    'X',
    '7',
)


def array(values: np.ndarray, dtype: str) -> dict[str, Any]:
    """An array as a report holds it."""
    kinds = {'u8': '<u1', 'u16': '<u2', 'u32': '<u4', 'f16': '<f2', 'f32': '<f4'}
    raw = np.ascontiguousarray(values, kinds[dtype]).tobytes()
    return {'b64': base64.b64encode(raw).decode(), 'dtype': dtype, 'shape': list(values.shape)}


def rounded(values: np.ndarray) -> Any:
    """Plain numbers of six significant digits."""
    return np.vectorize(lambda x: float(f'{x:.6g}'), otypes=[object])(values).tolist()


class Maker:
    """What one report's parts share: sizes, the table of strings, the source of numbers."""

    def __init__(self, layers: int, heads: int, experts: bool, seed: int):
        self.L, self.N, self.M = layers, heads, max(layers - 1, 1) if experts else 0
        self.random = np.random.default_rng(seed)
        words = [''.join(self.random.choice(SYLLABLES, self.random.integers(1, 4))) for _ in range(3000)]
        self.strings = list(
            dict.fromkeys([*STORY, *OTHER, *(' ' + word if i % 2 else word for i, word in enumerate(words))])
        )

    def number(self, token: str) -> int:
        if token not in self.strings:
            self.strings.append(token)
        return self.strings.index(token)

    def words(self, *shape: int) -> np.ndarray:
        return self.random.integers(0, len(self.strings), shape)

    def normal(self, *shape: int, size: float = 1.0) -> np.ndarray:
        return self.random.normal(0, size, shape)

    def likely(self, *shape: int, sharp: float) -> np.ndarray:
        """Probabilities in falling order along the last dim, which leave a rest."""
        scores = np.exp(self.random.normal(0, sharp, (*shape[:-1], shape[-1] + 30)))
        return -np.sort(-scores / scores.sum(-1, keepdims=True), axis=-1)[..., : shape[-1]]

    def text(self, tokens: list[str]) -> dict[str, Any]:
        L, N, T = self.L, self.N, len(tokens)
        numbers = [self.number(token) for token in tokens]
        top_L1TK, likely_L1TK = self.words(L + 1, T, 5), self.likely(L + 1, T, 5, sharp=1.0)
        decided_T = self.random.integers(L // 2, L + 1, T)
        for t in range(T):
            top_L1TK[decided_T[t] :, t, 0] = top_L1TK[L, t, 0]
            likely_L1TK[decided_T[t] :, t] = np.sort(self.likely(L + 1 - decided_T[t], 5, sharp=2.5), axis=0)
        likely_L1TK /= np.maximum(likely_L1TK.sum(-1, keepdims=True) * 1.1, 1)  # five of them leave a rest
        probability_TK = np.concatenate(
            [likely_L1TK[L], np.sort(likely_L1TK[L][:, -1:] * self.random.random((T, 5)))[:, ::-1] / 50], 1
        )
        next_TK = np.concatenate([top_L1TK[L], self.words(T, 5)], 1)
        actual = [*rounded(np.exp(-self.random.exponential(2, T - 1)) * 0.9), None]
        right = self.random.integers(0, 11, T - 1)
        rank = [*map(int, np.where(right == 10, self.random.integers(11, 900, T - 1), right + 1)), None]
        for t in range(T - 1):
            if right[t] < 10:
                next_TK[t, right[t]], actual[t] = numbers[t + 1], float(f'{probability_TK[t, right[t]]:.6g}')
        top_L1TK[L], entropy_L1T = next_TK[:, :5], self.random.random((L + 1, T)) * np.linspace(9, 3, L + 1)[:, None]
        return {
            'text': ''.join(tokens),
            'ids': self.random.integers(0, VOCABULARY, T).tolist(),
            'tokens': numbers,
            'next': {
                'top': next_TK.tolist(),
                'probability': rounded(probability_TK),
                'entropy': rounded(entropy_L1T[L]),
                'actual': {'probability': actual, 'rank': rank},
            },
            'lens': {
                'top': array(top_L1TK, 'u32'),
                'probability': array(likely_L1TK, 'f32'),
                'entropy': array(entropy_L1T, 'f32'),
                'answer': array(np.where(np.arange(L + 1)[:, None] < decided_T, 0.02, likely_L1TK[..., 0]), 'f32'),
                'decided': decided_T.tolist(),
            },
            'attention': self.attention(L, N, T),
            'heads': self.heads(L, N, T),
            'layers': {
                'attention_norm': array(np.exp(self.normal(L, T, size=0.4)) * 4, 'f32'),
                'feed_forward_norm': array(np.exp(self.normal(L, T, size=0.4)) * 6, 'f32'),
                'residual_norm': array(np.cumsum(np.exp(self.normal(L + 1, T, size=0.4)), 0) * 3, 'f32'),
                'attention_cosine': array(np.tanh(self.normal(L, T, size=0.3)), 'f32'),
                'feed_forward_cosine': array(np.tanh(self.normal(L, T, size=0.3)), 'f32'),
                'attention_answer': array(self.normal(L, T), 'f32'),
                'feed_forward_answer': array(self.normal(L, T) * np.linspace(0.2, 3, L)[:, None], 'f32'),
                'embedding_answer': array(self.normal(T), 'f32'),
                'constant_answer': array(np.zeros(T), 'f32'),
            },
            'cells_top': {
                'cell': array(self.random.integers(0, F, (L, T, 5)), 'u32'),
                'activation': array(self.normal(L, T, 5, size=4), 'f32'),
                'share': array(self.likely(L, T, 5, sharp=1.5), 'f32'),
            },
            'experts': self.experts(T) if self.M else None,
            'ablation': {
                'answer': int(top_L1TK[L, -1, 0]),
                'logprob': float(f'{np.log(probability_TK[-1, 0]):.6g}'),
                'heads': array(self.normal(L, N, size=0.05) - (self.random.random((L, N)) > 0.95), 'f32'),
                'attention': array(-self.random.exponential(0.3, L), 'f32'),
                'feed_forward': array(-self.random.exponential(0.8, L), 'f32'),
                'experts': array(self.normal(self.M, E, size=0.2), 'f32') if self.M else None,
                'cells': [
                    {'layer': int(layer), 'cell': int(cell), 'change': float(f'{change:.6g}')}
                    for layer, cell, change in zip(
                        self.random.integers(0, L, 20),
                        self.random.integers(0, F, 20),
                        self.normal(20, size=0.1),
                        strict=True,
                    )
                ],
            },
        }

    def attention(self, L: int, N: int, T: int) -> dict[str, Any]:
        """Patterns that are sharp, look at the first token, or at the one before."""
        behind_TT = np.arange(T)[:, None] - np.arange(T)
        scores_LNTT = self.random.normal(0, 1.5, (L, N, T, T)) + 5.0 * (np.arange(T) == 0) * (
            self.random.random((L, N, 1, 1)) > 0.3
        )
        scores_LNTT += 8.0 * (behind_TT == 1) * (self.random.random((L, N, 1, 1)) > 0.9)
        weight_LNTT = np.exp(np.where(behind_TT < 0, -np.inf, scores_LNTT))
        weight_LNTT /= weight_LNTT.sum(-1, keepdims=True)
        key_LNTK = np.argsort(-weight_LNTT, axis=-1, kind='stable')[..., :3]
        weight_LNTK = np.take_along_axis(weight_LNTT, key_LNTK, -1)
        return {
            'pattern': array(np.round(255 * weight_LNTT), 'u8'),
            'top': {'key': array(key_LNTK, 'u16'), 'weight': array(weight_LNTK, 'f32')},
        }

    def heads(self, L: int, N: int, T: int) -> dict[str, Any]:
        score = lambda: self.random.random((L, N)) ** 4
        previous, first, duplicate, induction = score(), score(), score(), score()
        names = ('previous', 'first', 'duplicate', 'induction')
        best = np.argmax([previous, first, duplicate, induction], 0)
        high = np.max([previous, first, duplicate, induction], 0) > 0.6
        return {
            'previous': array(previous, 'f32'),
            'first': array(first, 'f32'),
            'duplicate': array(duplicate, 'f32'),
            'induction': array(induction, 'f32'),
            **{f'{name}_random': array(score(), 'f32') for name in names},
            'repeats': T // 3,
            'role': [[names[best[l, n]] if high[l, n] else '' for n in range(N)] for l in range(L)],
            'write_norm': array(np.exp(self.normal(L, N, T, size=0.6)), 'f32'),
            'answer': array(self.normal(L, N, T, size=0.3), 'f32'),
            'promotes': array(self.words(L, N, T, 3), 'u32'),
        }

    def routed(self, T: int) -> dict[str, Any]:
        scores_MTE = np.exp(self.normal(self.M, T, E, size=1.5))
        scores_MTE /= scores_MTE.sum(-1, keepdims=True)
        chosen_MTK = np.argsort(-scores_MTE, axis=-1)[..., :K]
        weight_MTK = np.take_along_axis(scores_MTE, chosen_MTK, -1)
        return {
            'chosen': array(chosen_MTK, 'u16'),
            'weight': array(weight_MTK / weight_MTK.sum(-1, keepdims=True), 'f32'),
            'entropy': array(-(scores_MTE * np.log(scores_MTE)).sum(-1), 'f32'),
        }

    def experts(self, T: int) -> dict[str, Any]:
        loads = {kind: array(self.random.dirichlet(np.full(E, 0.5), self.M), 'f32') for kind in KINDS}
        layers = list(range(self.L - self.M, self.L))
        return {
            'layers': layers,
            **self.routed(T),
            'decode': {
                **self.routed(16),
                'ids': self.random.integers(0, VOCABULARY, 16).tolist(),
                'tokens': self.words(16).tolist(),
            },
            'load_by_kind': loads,
        }

    def cell(self, layer: int, number: int, index: bool) -> dict[str, Any]:
        pairs = lambda n, sign: [
            [int(s), float(f'{sign * x:.6g}')]
            for s, x in zip(self.words(n), -np.sort(-self.random.random(n)), strict=True)
        ]
        words = lambda n: ' '.join(self.strings[i % len(self.strings)] for i in self.random.zipf(1.3, n))
        texts = [
            {
                'before': words(12),
                'token': words(1),
                'after': words(6),
                'activation': float(f'{9 - i - self.random.random():.6g}'),
            }
            for i in range(5)
        ]
        return {
            'layer': layer,
            'cell': number,
            'promotes': pairs(10, 1),
            'suppresses': pairs(5, -1),
            'norm': float(f'{np.exp(self.normal(1))[0]:.6g}'),
            'texts': texts if index else None,
        }


def synthetic_report(
    layers: int = 30,
    heads: int = 9,
    tokens: int = 64,
    experts: bool = False,
    against: bool = False,
    index: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """A report as the analysis makes it; with experts, all layers but the first have them; with `against`, of two texts."""
    make = Maker(layers, heads, experts, seed)
    texts = [make.text(story[:tokens]) for story in ((STORY, OTHER) if against else (STORY,))]
    kinds = ['dense'] * (layers - make.M) + ['experts'] * make.M
    cells: dict[str, Any] = {}
    for text in texts:
        cell_LTK = np.frombuffer(base64.b64decode(text['cells_top']['cell']['b64']), '<u4').reshape(layers, -1, 5)
        for layer, t in make.random.permutation(
            [(layer, t) for layer in range(layers) for t in range(len(text['tokens']))]
        ):
            for number in cell_LTK[layer, t] if kinds[layer] == 'dense' and len(cells) < MOST_CELLS else ():
                cells.setdefault(f'{layer}:{number}', make.cell(int(layer), int(number), index))
    T = len(texts[0]['tokens'])
    same = [a == b for a, b in zip(texts[0]['tokens'], texts[-1]['tokens'], strict=True)]
    cosine_LA = np.clip(1 - np.linspace(0, 1, layers + 1)[:, None] * make.random.random(T), 0, 1)
    share = lambda *shape: array(make.random.random(shape) ** 6, 'f32')
    positions = [*range(2, min(9, T - 1)), T - 1]
    below = [np.flatnonzero(column < 0.9) for column in cosine_LA.T]
    return {
        'version': 1,
        'title': 'X-ray of smollm2: ' + ' and '.join(text['text'] for text in texts),
        'made': {
            'command': 'scripts/xray.py runs/smollm2 --text …',
            'weft': '0.1.0',
            'run': 'runs/smollm2',
            'step': 0,
            'seconds': 92.4,
        },
        'model': {
            'name': 'smollm2',
            'layers': layers,
            'heads': heads,
            'kv_heads': max(heads // 3, 1),
            'model_dim': D,
            'hidden': F,
            'experts': E if experts else None,
            'top_k': K if experts else None,
            'vocabulary': VOCABULARY,
            'parameters': 134515008,
            'kinds': kinds,
        },
        'texts': texts,
        'compare': {
            'alignment': [[t, t] for t in range(T)],
            'cosine': array(cosine_LA, 'f32'),
            'parted': [int(rows[0]) if len(rows) and same[t] else None for t, rows in enumerate(below)],
        }
        if against
        else None,
        'patch': {
            'answers': [texts[0]['ablation']['answer'], texts[1]['ablation']['answer']],
            'clean': 3.25,
            'corrupted': -2.5,
            'positions': positions,
            'residual': share(layers, len(positions)),
            'attention': share(layers, len(positions)),
            'feed_forward': share(layers, len(positions)),
            'heads': array(make.random.normal(0, 0.1, (layers, heads)), 'f32'),
        }
        if against
        else None,
        'patch_reason': None,
        'cells': cells,
        'index': {'tokens': 1_000_000, 'source': 'data/stories.txt'} if index else None,
        'strings': make.strings,
    }
