"""How good a model is beside the one it was made of: perplexity, KL divergence and cloze accuracy on two texts.

Intervals of perplexity and KL are over blocks of 256 tokens of one text, which are drawn anew (percentile bootstrap: Efron
1979, Bootstrap methods): they say how sure a number is had other blocks of this text been measured, not what another text
would give. In a draw are the same blocks for all quantities. The difference to the reference is taken token by token, before
anything is drawn: how hard a block is then falls out, and the interval is many times narrower than those of the two
perplexities. It is what verdicts are made of. Intervals of cloze accuracy are those of a proportion, over items.

The reference reads each text once, however many models are held to it: what its last layer gives is kept, [R, T, D], and its
logits are made of that again beside those of each model, a batch at a time. Logits of all tokens never exist together.

Letters: R rows of a text, T their columns, D model, N cloze items.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from weft.compress.blocks import per_token
from weft.compress.scoring import Scores, scores_of
from weft.compress.texts import TOKENS, Text, study_texts
from weft.inference.run import TrainedRun
from weft.interpret.intervals import Estimate, share
from weft.interpret.intervals import mean as mean_of
from weft.model.decoder import Decoder
from weft.model.forward import needs_causal, needs_no_stages
from weft.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class TextQuality:
    """Of a model on one text. What is relative to a reference is None where there is none."""

    text: str
    source: str
    sha256: str  # of the tokens that were measured
    tokens: int
    nats: Estimate  # cross-entropy a token; of so many blocks
    perplexity: Estimate  # its exponential
    cloze: Estimate | None  # the share of items that are right, of so many; who knows nothing has `cloze.CHANCE` right
    kl: Estimate | None = None  # KL(reference ‖ model) in nats a token, of whole distributions over the vocabulary
    excess: Estimate | None = None  # nats a token above the reference's, on the same tokens
    cloze_change: Estimate | None = None  # accuracy above the reference's, on the same items

    @property
    def perplexity_cost(self) -> Estimate | None:
        """Perplexity by the reference's, less 1: 0.04 is 4 % more."""
        return None if self.excess is None else mapped(lambda nats: exponential(nats) - 1, self.excess)


@dataclasses.dataclass(frozen=True)
class Quality:
    """Of a model on each text."""

    texts: tuple[TextQuality, ...]

    def on(self, text: str) -> TextQuality:
        """That on the text of a name."""
        return next(one for one in self.texts if one.text == text)

    def figures(self) -> dict[str, Any]:
        """As JSON, by the texts' names; estimates are objects of `value`, `low`, `high` and `of`, with null for infinity."""

        def plain(value: Any) -> Any:
            if not isinstance(value, Estimate):
                return value
            return {name: number if math.isfinite(number) else None for name, number in value._asdict().items()}

        found = {}
        for one in self.texts:
            fields = {field.name: plain(getattr(one, field.name)) for field in dataclasses.fields(one)}
            found[fields.pop('text')] = fields | {'perplexity_cost': plain(one.perplexity_cost)}
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """A model that others are held to, and what it made of the texts."""

    model: Decoder
    mesh: jax.sharding.Mesh
    texts: tuple[Text, ...]
    hidden: tuple[
        tuple[jax.Array, ...], ...
    ]  # of each text each batch's [B, T, D], as the LM head takes it, on the devices
    scores: tuple[Scores, ...]


def measure(run: TrainedRun, reference: TrainedRun | Reference | None = None, tokens: int = TOKENS) -> Quality:
    """How good a run is, and how near to the one it was made of, on about so many tokens of each of two texts.

    The texts are the reference run's (`texts.study_texts`) where one is given, for a compressed run may have none. Who
    measures many runs gives a `Reference` (`measured_reference`), on whose texts the run is measured then.

    Raises UserError for a reference of another tokenizer, vocabulary or mesh, for a run that is no causal language model, for
    one whose texts are not there, and for fewer tokens than two rows have; Diverged where the model gives no finite number.
    """
    if isinstance(reference, TrainedRun):
        reference = measured_reference(reference, tokens)
    if reference is not None:
        check_tokenizer(run, reference)
    texts = study_texts(run, tokens) if reference is None else reference.texts
    with jax.set_mesh(run.mesh):
        return model_quality(run.model, texts, reference)


def measured_reference(run: TrainedRun, tokens: int = TOKENS) -> Reference:
    """A run that others are held to, on about so many tokens of each of its two texts; errors as `measure` has them."""
    texts = study_texts(run, tokens)
    with jax.set_mesh(run.mesh):
        return model_reference(run.model, texts)


def model_reference(model: Decoder, texts: Sequence[Text]) -> Reference:
    """As `measured_reference`, of a model on the current mesh and any texts of its tokenizer."""
    check_measurable(model)
    kept: list[tuple[jax.Array, ...]] = []
    scores = []
    for text in texts:
        hidden: list[jax.Array] = []
        scores.append(scores_of(model, text, keep=hidden))
        kept.append(tuple(hidden))
    return Reference(model, jax.sharding.get_mesh(), tuple(texts), tuple(kept), tuple(scores))


def model_quality(model: Decoder, texts: Sequence[Text], reference: Reference | None = None) -> Quality:
    """As `measure`, of a model on the current mesh, under `jax.set_mesh`, and any texts of its tokenizer."""
    check_measurable(model)
    if reference is None:
        return Quality(tuple(text_quality(text, scores_of(model, text)) for text in texts))
    mesh = jax.sharding.get_mesh()
    if mesh != reference.mesh:
        raise UserError(
            f'the mesh is {mesh_in_words(mesh)} and the reference’s {mesh_in_words(reference.mesh)}: open both on the same'
        )
    have, want = model.config.vocabulary, reference.model.config.vocabulary
    if have != want:
        raise UserError(
            f'model.vocabulary is {have} and the reference’s {want}: their distributions cannot be compared'
        )
    assert [text.sha256 for text in texts] == [text.sha256 for text in reference.texts], (
        'the reference read these texts'
    )
    return Quality(
        tuple(
            text_quality(text, scores_of(model, text, reference.model, hidden), beside)
            for text, hidden, beside in zip(texts, reference.hidden, reference.scores, strict=True)
        )
    )


def check_measurable(model: Decoder) -> None:
    """Raises UserError for a model, or a mesh, that this cannot measure."""
    needs_causal(model, 'measuring quality')
    needs_no_stages('measuring quality')
    if model.config.encoder:
        raise UserError('model.encoder is given: quality is measured of models without one')


def check_tokenizer(run: TrainedRun, reference: Reference) -> None:
    """Raises UserError where a run does not read text as the tokens of the reference's texts."""
    own = None if run.tokenizer is None else run.tokenizer.sha256
    if any(text.tokenizer_sha256 != own for text in reference.texts):
        raise UserError(
            f'{run.folder}: its tokenizer is not the reference’s, so that their tokens cannot be compared: give the run that '
            'this one was made of'
        )


def mesh_in_words(mesh: jax.sharding.Mesh) -> str:
    """A mesh in words: its axes that are above 1."""
    return ','.join(f'{axis}={size}' for axis, size in mesh.shape.items() if size > 1) or 'one device'


def text_quality(text: Text, scores: Scores, beside: Scores | None = None) -> TextQuality:
    """What scores of a text, beside those of the reference, say with their intervals."""
    live_RT = text.rows.segment_BT > 0
    quantities = [-scores.log_p_RT]
    if beside is not None:
        assert scores.kl_RT is not None, 'scored beside the reference'
        quantities += [scores.kl_RT, beside.log_p_RT - scores.log_p_RT]
    found = per_token(quantities, live_RT)
    right_N = text.cloze.is_right(scores.cloze_NC)
    return TextQuality(
        text=text.name,
        source=text.source,
        sha256=text.sha256,
        tokens=int(live_RT.sum()),
        nats=found[0],
        perplexity=mapped(exponential, found[0]),
        cloze=share(right_N) if len(right_N) else None,
        kl=found[1] if beside else None,
        excess=found[2] if beside else None,
        cloze_change=mean_of(right_N - text.cloze.is_right(beside.cloze_NC).astype(int))
        if beside and len(right_N)
        else None,
    )


def exponential(nats: float) -> float:
    """Its exponential, infinite where that is no number: a model may be damaged so much."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def mapped(function: Callable[[float], float], of: Estimate) -> Estimate:
    """An estimate of what grows with another, by a function of one number."""
    return Estimate(function(of.value), function(of.low), function(of.high), of.of)
