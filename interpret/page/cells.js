// Panel: the feed-forward network as a memory of keys and values (Geva et al. 2020, arXiv:2012.14913).

panels.cells = (() => {
  let map, detail, layerPicker;

  const cells = () => current().cells_top;
  const dense = (l) => report.model.kinds[l] === 'dense';
  const share = (l, t) => (dense(l) ? cells().share.at(l, t, 0) : null);

  function build(root) {
    detail = node('div');
    layerPicker = picker('layer', layerNames(), state.layer, (layer) => go({ layer }));
    map = heatmap({
      label: 'Share of the strongest cell, layers by tokens',
      rows: layersDown(report.model.layers),
      columns: tokenColumns(),
      tokens: true,
      corner: 'layer',
      value: share,
      say: (l, t) => (dense(l) ? `layer ${l}, ${tokenName(t)}: cell ${cells().cell.at(l, t, 0)} makes ${percent(share(l, t))} of what the layer's cells add, by length` : `layer ${l} has experts: see the panel Experts`),
      select: (layer, token) => go({ layer, token }),
      scale: scale({ high: peak(cells().share), power: 0.5, show: percent, name: "the strongest cell's share of what the layer's cells add, by length" }),
    });
    replace(root, layerPicker.root, detail, node('h3', {}, 'Where one cell does much'), node('p', {}, 'Dark: a single cell makes a large part of what the cells of the layer add at that token. Choose a place to see its cells.'), map.root);
  }

  /** A training text; `turned` where the cell fires there with the other sign than here, and so does the opposite. */
  function example({ before, token, after, activation }, here) {
    const turned = activation * here < 0 ? ' (the other way round) ' : '';
    return node('li', {}, node('small', {}, `${signed(activation)} ${turned}`), node('bdi', {}, readable(before), node('mark', {}, readable(token)), readable(after)));
  }

  function card(cell, activation, part, high) {
    const known = report.cells[`${state.layer}:${cell}`];
    const facts = node('p', { class: 'facts' }, `fires with ${signed(activation)}: ${percent(part)} of what all cells of the layer add here, by length`, known ? `; its value has length ${plain(known.norm)}` : '');
    const head = [node('h4', {}, `Cell ${cell}`), bar(part, high), facts];
    if (!known) return node('li', { class: 'card' }, head, node('p', {}, 'Its value is not in this page, which keeps those of the cells that fire most.'));
    const turned = activation < 0;
    const logit = (x) => signed(turned ? -x : x); // of the vector as it is added here
    const lists = [
      node('p', {}, node('b', {}, turned ? 'Firing negatively, it lowers: ' : 'Its value promotes: '), chips(known.promotes, logit)),
      node('p', {}, node('b', {}, turned ? 'and promotes: ' : 'and lowers: '), chips(known.suppresses, logit)),
    ];
    let texts;
    if (known.texts === null) texts = node('p', { class: 'quiet' }, 'Training texts that fire it: not indexed. Make the index with ', node('code', {}, 'scripts/xray.py index RUN'), ' (of an imported model with ', node('code', {}, '--data FILES'), '), then this report anew.');
    else if (!known.texts.length) texts = node('p', { class: 'quiet' }, 'No text of the index fires it.');
    else texts = node('div', {}, node('b', {}, 'Training texts that fire it most, at the marked token, and how strongly:'), node('ul', { class: 'texts' }, known.texts.map((one) => example(one, activation))));
    return node('li', { class: 'card' }, head, lists, texts);
  }

  function update() {
    const { layer: l, token: t } = state;
    layerPicker.set(l);
    map.point(l, t, true);
    if (!dense(l)) {
      replace(detail, node('p', { class: 'absent' }, `Layer ${l} has experts instead of one feed-forward network: the panel Experts shows their paths.`));
      return;
    }
    const shown = range(cells().cell.shape[2]).filter((k) => cells().share.at(l, t, k) > 0);
    const rest = shown.reduce((sum, k) => sum + cells().share.at(l, t, k), 0);
    const high = shown.length ? cells().share.at(l, t, 0) : 1;
    const index = report.index ? ` The index was made over ${report.index.tokens.toLocaleString('en')} tokens of ${readable(report.index.source)}.` : '';
    replace(
      detail,
      node('h3', {}, `The cells of layer ${l} that fire most at `, tokenChip(t, 'on')),
      node('p', { class: 'facts' }, `These ${shown.length} of ${report.model.hidden.toLocaleString('en')} cells make ${percent(rest)} of what all of them add, by length.${index}`),
      node('ol', { class: 'cards' }, shown.map((k) => card(cells().cell.at(l, t, k), cells().activation.at(l, t, k), cells().share.at(l, t, k), high))),
    );
  }

  return { absent: () => (cells() ? null : 'Every layer of this model has experts: the panel Experts shows them.'), build, update };
})();
