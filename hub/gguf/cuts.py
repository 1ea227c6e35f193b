"""How text is cut before BPE, by the names that llama.cpp gave the ways: each as the tokenizer.json of that model has it."""

from typing import NamedTuple


class Cut(NamedTuple):
    patterns: tuple[str, ...] = ()  # one after another, each within what the others cut
    digits: bool = False  # each is cut from its neighbours, before anything else
    plain: bool = False  # by GPT-2's own pattern, last
    whole: bool = False  # what is a token as a whole is that, whatever its merges
    bos: bool = False  # a text begins with bos, where the header does not say


WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
SIGNS = r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
LLAMA3 = rf'{WORDS}\p{{N}}{{1,3}}|{SIGNS}'
QWEN2 = rf'{WORDS}\p{{N}}|{SIGNS}'
UPPER, LOWER = r'[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]', r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]'
CASED = (rf'[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+', rf'[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*')
SLASHED = r' ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+'
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT_4O = rf'{CASED[0]}{SHORT}|{CASED[1]}{SHORT}|\p{{N}}{{1,3}}|{SLASHED}'
TEKKEN = rf'{CASED[0]}|{CASED[1]}|\p{{N}}|{SLASHED}'
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CJK, KANA = '[一-龥ࠀ-一가-퟿]+', '[一-龥぀-ゟ゠-ヿ]+'
# As published for DeepSeek LLM: an old Unicode's letters with two cases.
DEEPSEEK_LETTERS = (
    'A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ'
    '-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉ'
    'ⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃'
)
DEEPSEEK_SIGNS = r'\s?[!-/:-~！-／：-～‘-‟　-。]+'
DEEPSEEK_V3 = (
    r'\p{N}{1,3}',
    KANA,
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r'|\s*[\r\n]+|\s+(?!\S)|\s+',
)
CUTS = {
    'default': Cut((r'[\p{P}\$\+<=>\^~\|`]+', GPT2, r'\p{N}+', '[0-9][0-9][0-9]')),
    **dict.fromkeys(('gpt-2', 'phi-2', 'mpt', 'olmo', 'exaone4', 'trillion', 'granite-docling'), Cut(plain=True)),
    **dict.fromkeys(
        ('smollm', 'starcoder', 'refact', 'command-r', 'codeshell', 'exaone'), Cut(digits=True, plain=True)
    ),
    **dict.fromkeys(('llama-bpe', 'llama3', 'llama-v3', 'falcon3', 'pixtral'), Cut((LLAMA3,), whole=True, bos=True)),
    **dict.fromkeys(('dbrx', 'smaug-bpe', 'chatglm-bpe'), Cut((LLAMA3,))),
    'glm4': Cut((LLAMA3,), whole=True),
    **dict.fromkeys(('qwen2', 'deepseek-r1-qwen', 'stablelm2', 'megrez', 'hunyuan'), Cut((QWEN2,))),
    **dict.fromkeys(('gpt-4o', 'llama4'), Cut((GPT_4O,))),
    'tekken': Cut((TEKKEN,), whole=True, bos=True),
    'deepseek-llm': Cut((r'[\r\n]', rf'\s?[{DEEPSEEK_LETTERS}]+', DEEPSEEK_SIGNS, r'\s+$', CJK, r'\p{N}+')),
    'deepseek-coder': Cut((r'[\r\n]', r'\s?\p{L}+', r'\s?\p{P}+', CJK, r'\p{N}')),
    'deepseek-v3': Cut(DEEPSEEK_V3),
}
