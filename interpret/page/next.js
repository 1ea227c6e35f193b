// Panel: the text, how surprising each of its tokens was, and what the model expects next.

panels.next = (() => {
  let bars, names, ten, about;

  const NAMED = 48; // tokens whose names find room under their bars, on a wide page

  /** −log2 of the probability that the model gave a token before it came, in bits; null for the first. */
  const surprise = (t) => (t === 0 ? null : -Math.log2(Math.max(current().next.actual.probability[t - 1], 2 ** -40)));

  function build(root) {
    bars = node('div', { class: 'surprises', role: 'img', 'aria-label': 'How surprising each token was, in bits' });
    ten = node('div', { class: 'tall' });
    names = node('div', { class: `names ${count() > 24 ? 'many' : ''}`, 'aria-hidden': 'true' });
    if (count() <= NAMED) names.append(...range(count()).map((t) => node('span', {}, short(visible(word(current().tokens[t]))))));
    about = node('p', { class: 'facts' });
    const high = biggest(range(count()).slice(1).map(surprise));
    bars.append(
      ...range(count()).map((t) => {
        const bits = surprise(t);
        const text = bits === null ? 'nothing came before' : `surprise ${plain(bits, 1)} bits: it had ${percent(current().next.actual.probability[t - 1])}`;
        const column = node('span', { title: `${tokenName(t)}: ${text}`, onclick: () => go({ token: t }) }, node('i', { style: { height: `${(100 * (bits ?? 0)) / (high || 1)}%` } }));
        return column;
      }),
    );
    const surprises = node(
      'div',
      {},
      node('h3', {}, 'How surprising was each token?'),
      node('p', {}, `Each bar is a token of the text: the higher, the less probable the model found it just before it came. The highest is ${plain(high, 1)} bits; one bit more means half the probability. The first token has no bar, for nothing came before it.`),
      bars,
      names,
    );
    replace(root, about, node('div', { class: 'beside even' }, ten, surprises));
  }

  function update() {
    const { next, tokens } = current();
    const t = state.token;
    const last = t === tokens.length - 1;
    const followed = last ? null : tokens[t + 1];
    const shown = next.probability[t];
    const rows = next.top[t].map((s, i) => ({
      cells: [String(i + 1), wordChip(s, s === followed ? 'right' : ''), bar(shown[i], 1), percent(shown[i]), s === followed ? 'came next' : ''],
    }));
    if (!last && !next.top[t].includes(followed)) {
      const p = next.actual.probability[t];
      rows.push({ cells: [String(next.actual.rank[t]), wordChip(followed, 'right'), bar(p, 1), percent(p), 'came next'] });
    }
    replace(ten, table('The most probable next tokens', ['', 'token', '', 'probability', ''], rows, 'bars'));
    const sure = Math.exp(next.entropy[t]);
    const surprised = surprise(t);
    replace(
      about,
      'After ', tokenChip(t, 'on'), ` the model is as unsure as between ${plain(sure, 1)} equally likely tokens (entropy ${plain(next.entropy[t])} nats). `,
      surprised === null ? 'The token itself was the first: there was nothing to be surprised by.' : `The token itself came with a surprise of ${plain(surprised, 1)} bits.`,
    );
    for (const box of [bars, names]) [...box.children].forEach((column, i) => column.classList.toggle('on', i === t));
  }

  return { absent: () => null, build, update };
})();
