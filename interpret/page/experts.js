// Panel: the paths of tokens through experts, how sure routers are, and how loads differ.

panels.experts = (() => {
  let map, detail, loads, layerPicker;

  const experts = () => current().experts;
  const E = () => report.model.experts;
  const place = (l) => experts().layers.indexOf(l); // of a layer among those with experts
  const sure = (dims, m, t) => 1 - dims.at(m, t) / Math.log(E());
  const KINDS = { word: 'words', number: 'numbers', punctuation: 'punctuation', space: 'space', other: 'other' };

  function build(root) {
    const { layers, chosen, weight, entropy } = experts();
    map = heatmap({
      label: 'The first expert of each token, layers by tokens',
      rows: range(layers.length).reverse().map((m) => ({ key: layers[m], label: String(layers[m]) })),
      columns: tokenColumns(),
      corner: 'layer',
      tokens: true,
      value: (l, t) => sure(entropy, place(l), t),
      text: (l, t) => String(chosen.at(place(l), t, 0)),
      say: (l, t) => {
        const m = place(l);
        const all = range(chosen.shape[2]).map((k) => `${chosen.at(m, t, k)} (${plain(weight.at(m, t, k), 3)})`);
        return `layer ${l}, ${tokenName(t)}: experts ${all.join(', ')}; certainty ${percent(sure(entropy, m, t))}`;
      },
      select: (layer, token) => go({ layer, token }),
      scale: scale({ high: 1, show: percent, name: "the router's certainty: 0 % torn between all experts, 100 % sure of one" }),
    });
    map.root.classList.add('numbers');
    detail = node('div');
    loads = node('div');
    layerPicker = picker('layer', layers.map(String), Math.max(place(state.layer), 0), (m) => go({ layer: layers[m] }));
    replace(
      root,
      node('h3', {}, 'The first expert of each token'),
      node('p', {}, 'The number in a square is that of the expert with the largest weight; the colour says how sure the router was.'),
      map.root,
      node('div', { class: 'beside' }, node('div', {}, node('h3', { class: 'of' }), detail), node('div', {}, node('h3', {}, 'Loads of one layer'), layerPicker.root, loads)),
    );
  }

  /** The share of choices that each expert gets. */
  function load(part, m) {
    const [, T, K] = part.chosen.shape;
    const counts = new Array(E()).fill(0);
    for (const t of range(T)) for (const k of range(K)) counts[part.chosen.at(m, t, k)] += 1 / (T * K);
    return counts;
  }

  const certainty = (part, m) => range(part.entropy.shape[1]).reduce((sum, t, _, all) => sum + sure(part.entropy, m, t) / all.length, 0);

  function update() {
    const { layers, chosen, weight, entropy, decode, load_by_kind: byKind } = experts();
    const t = state.token;
    const l = place(state.layer) < 0 ? layers[0] : state.layer;
    const m = place(l);
    map.point(l, t, true);
    layerPicker.set(m);
    replace(detail.parentElement.querySelector('h3.of'), 'The path of ', tokenChip(t, 'on'));
    const rows = range(layers.length).reverse().map((i) => ({
      on: i === m,
      select: () => go({ layer: layers[i] }),
      cells: [String(layers[i]), node('span', { class: 'chips' }, range(chosen.shape[2]).map((k) => node('span', {}, node('b', { class: 'badge' }, String(chosen.at(i, t, k))), ' ', node('small', {}, plain(weight.at(i, t, k), 3))))), bar(sure(entropy, i, t), 1), percent(sure(entropy, i, t))],
    }));
    replace(detail, table('Experts of the token', ['layer', 'experts, with their weights', 'certainty', ''], rows, 'bars'));

    const kinds = Object.keys(byKind);
    const sums = Object.fromEntries(kinds.map((kind) => [kind, range(E()).reduce((sum, e) => sum + byKind[kind].at(m, e), 0)]));
    const share = (i, e) => (sums[kinds[i]] ? byKind[kinds[i]].at(m, e) / sums[kinds[i]] : null); // none: not even one token
    const high = biggest(kinds.flatMap((_, i) => range(E()).map((e) => share(i, e) ?? 0)));
    const columns = range(E()).map((e) => ({ key: e, label: String(e) }));
    const kindMap = heatmap({
      label: 'Load of each expert by kind of token',
      rows: kinds.map((kind, i) => ({ key: i, label: KINDS[kind] ?? kind })),
      columns,
      corner: 'kind',
      value: share,
      say: (i, e) => (sums[kinds[i]] ? `${KINDS[kinds[i]] ?? kinds[i]}: expert ${e} gets ${percent(share(i, e))} (even would be ${percent(1 / E())})` : `the text has no ${KINDS[kinds[i]] ?? kinds[i]}`),
      scale: scale({ high, show: percent, name: 'share of the tokens of a kind that an expert gets' }),
    });
    const parts = [[`the text that was read (prefill, ${chosen.shape[1]} tokens)`, experts()]].concat(decode ? [[`what was written after it (decoding, ${decode.chosen.shape[1]} tokens)`, decode]] : []);
    const two = parts.map(([, part]) => load(part, m));
    const most = biggest(two.flat());
    const phase = heatmap({
      label: 'Load of each expert in prefill and in decoding',
      rows: parts.map((_, i) => ({ key: i, label: i ? 'decode' : 'prefill' })),
      columns,
      corner: 'phase',
      value: (i, e) => two[i][e],
      say: (i, e) => `${parts[i][0]}: expert ${e} gets ${percent(two[i][e])}`,
      scale: scale({ high: most, show: percent, name: 'share of choices that an expert gets' }),
    });
    const words = parts.map(([name, part]) => `${percent(certainty(part, m))} over ${name}`);
    const written = decode && [
      node('p', { class: 'key' }, `What the model wrote, each token with its experts in layer ${l}:`),
      node('p', {}, chips(decode.tokens.map((s, i) => [s, i]), (i) => range(decode.chosen.shape[2]).map((k) => decode.chosen.at(m, i, k)).join(', '))),
    ];
    replace(loads, node('h4', {}, 'By kind of token'), kindMap.root, node('h4', {}, 'Reading the text, and writing on'), node('p', { class: 'facts' }, `Mean certainty in layer ${l}: ${words.join('; ')}.`), phase.root, ...(written ?? []));
  }

  return { absent: () => (experts() ? null : 'This model has no experts: every layer has one feed-forward network, which the panel Cells shows.'), build, update };
})();
