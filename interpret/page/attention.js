// Panel: attention patterns of every head, one of them enlarged, and what the selected token reads.

panels.attention = (() => {
  let thumbs, large, band, sides, readout, title, layerPicker, headPicker, reads, table_, ramp;

  const NAMED = 24; // tokens whose names find room beside the enlarged head
  const DOES = {
    [ROLES.previous]: 'reads the token before',
    [ROLES.first]: 'rests on the first token',
    [ROLES.duplicate]: 'reads earlier copies of the token',
    [ROLES.induction]: 'reads what came after an earlier copy',
  };

  const pattern = () => current().attention.pattern;
  const heads = () => report.model.heads;
  const weights = () => scale({ high: 1, power: 0.5, name: 'weight (small ones are drawn stronger than they are)' });
  /** Whether a head has a pattern: a query's weights sum to 1, so a layer without attention is all zeros. */
  const seen = (l, n) => {
    const T = count();
    const from = (l * heads() + n) * T * T;
    return pattern().data.subarray(from, from + T * T).some((x) => x > 0);
  };

  /** A letter for each role in the report, and two where one is taken. */
  function badges() {
    const taken = new Map();
    for (const name of [...new Set(range(report.model.layers).flatMap((l) => range(heads()).map((n) => roleOf(l, n))))].filter(Boolean).sort()) {
      const letter = name[0].toUpperCase();
      taken.set(name, [...taken.values()].includes(letter) ? letter + (name[1] ?? '') : letter);
    }
    return taken;
  }

  /** Draws a head's pattern, a pixel a weight; what lies in the future of a token is grey. */
  function draw(canvas, l, n, colours) {
    const T = count();
    canvas.width = canvas.height = T;
    const brush = canvas.getContext('2d');
    const image = brush.createImageData(T, T);
    const ahead = dark() ? [58, 61, 68] : [226, 226, 226];
    const from = (l * heads() + n) * T * T;
    for (let i = 0; i < T * T; i++) {
      const x = pattern().data[from + i];
      const rgb = x === 0 && i % T > Math.floor(i / T) ? ahead : colours[x];
      image.data.set([rgb[0], rgb[1], rgb[2], 255], 4 * i);
    }
    brush.putImageData(image, 0, 0);
  }

  function top(l, n, q) {
    const { key, weight } = current().attention.top;
    return range(3).map((k) => [key.at(l, n, q, k), weight.at(l, n, q, k)]).filter(([, w]) => w > 0);
  }

  const told = (l, n, q) => {
    const three = top(l, n, q).map(([k, w]) => `${tokenName(k)} ${plain(w, 3)}`).join(', ');
    return `${tokenName(q)} reads most: ${three || 'nothing'}`;
  };

  function build(root) {
    ramp = weights();
    const colours = lookup(ramp);
    const letters = badges();
    const { layers } = report.model;
    readout = node('p', { class: 'readout long' });
    title = node('h3');
    large = node('canvas', { class: 'pattern' });
    band = node('i', { class: 'band' });
    const frame = node('div', { class: 'frame', tabindex: '0', role: 'img', 'aria-label': 'The chosen head, enlarged' }, large, band);
    const T = count();
    const names = () => (T > NAMED ? [] : range(T).map((t) => node('span', {}, short(visible(word(current().tokens[t]))))));
    const side = (name) => node('div', { class: name, 'aria-hidden': 'true', style: { '--tokens': String(T) } }, names());
    sides = [side('above'), side('left')];
    const spot = (event) => {
      const box = large.getBoundingClientRect();
      const place = (x, size) => clamp(Math.floor((x / size) * count()), 0, count() - 1);
      return [place(event.clientY - box.top, box.height), place(event.clientX - box.left, box.width)];
    };
    frame.addEventListener('mousemove', (event) => {
      const [q, k] = spot(event);
      const x = pattern().at(state.layer, state.head, q, k);
      readout.textContent = `${k > q ? 'not seen: it comes later. ' : `here ${tokenName(k)}: about ${plain(x / 255, 2)}. `}${told(state.layer, state.head, q)}`;
    });
    frame.addEventListener('mouseleave', () => (readout.textContent = told(state.layer, state.head, state.token)));
    frame.addEventListener('click', (event) => go({ token: spot(event)[0] }));
    frame.addEventListener('keydown', (event) => {
      const by = { ArrowUp: -1, ArrowDown: 1 }[event.key];
      if (!by) return;
      event.preventDefault();
      go({ token: clamp(state.token + by, 0, count() - 1) });
    });

    thumbs = node('div', { class: 'thumbs', role: 'grid', 'aria-label': 'Heads, a row a layer', style: { '--heads': String(heads()) } });
    for (const l of range(layers).reverse()) {
      const cells = range(heads()).map((n) => {
        const canvas = node('canvas', {});
        draw(canvas, l, n, colours);
        const name = roleOf(l, n);
        const button = node('button', { type: 'button', tabindex: '-1', 'data-l': String(l), 'data-n': String(n), 'aria-label': `layer ${l}, head ${n}${name ? `: ${name}` : ''}`, title: `layer ${l}, head ${n}${name ? `: ${name}` : ''}` }, canvas);
        if (name) button.append(node('b', { class: name === ROLES.first ? 'sink' : null }, letters.get(name)));
        return node('span', { role: 'gridcell' }, button);
      });
      thumbs.append(node('div', { role: 'row' }, node('span', { role: 'rowheader' }, String(l)), cells));
    }
    thumbs.addEventListener('click', (event) => {
      const button = event.target.closest('button');
      if (button) go({ layer: Number(button.dataset.l), head: Number(button.dataset.n) });
    });
    thumbs.addEventListener('keydown', (event) => {
      const move = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!move) return;
      event.preventDefault();
      event.stopPropagation();
      go({ layer: clamp(state.layer + move[0], 0, layers - 1), head: clamp(state.head + move[1], 0, heads() - 1) });
      thumbs.querySelector('[tabindex="0"]').focus({ preventScroll: true });
    });

    const legend = [...letters].map(([name, letter]) => node('span', {}, node('b', { class: 'badge' }, letter), ` ${name}${DOES[name] ? `: ${DOES[name]}` : ''} `));
    layerPicker = picker('layer', layerNames(), state.layer, (layer) => go({ layer }));
    headPicker = picker('head', range(heads()).map(String), state.head, (head) => go({ head }));
    reads = node('p', { class: 'running' });
    table_ = node('div');
    replace(
      root,
      node('p', { class: 'key roles' }, legend.length ? ['Roles of heads, found on random tokens and not on this text (no letter: no role is strong enough): ', legend] : 'No head scores high enough to be given a role.'),
      node(
        'div', { class: 'beside' },
        node('div', { class: 'matrix' }, node('p', { class: 'axes' }, 'rows: layers, the last on top · columns: heads 0 to ', String(heads() - 1)), node('div', { class: 'scroll' }, thumbs)),
        node(
          'div', { class: 'side' },
          title, node('div', { class: 'pickers' }, layerPicker.root, headPicker.root), ramp.legend(), readout,
          node('p', { class: 'axes' }, 'rows ↓ the token that reads · columns → the token that is read · grey: comes later, not seen'),
          node('div', { class: `labelled ${T > NAMED ? 'bare' : ''}` }, sides, frame),
        ),
      ),
      node('h3', {}, 'What the selected token reads in this head'),
      reads,
      table_,
    );
  }

  function update() {
    const { layer: l, head: n, token: t } = state;
    thumbs.querySelectorAll('button[tabindex="0"]').forEach((old) => {
      old.setAttribute('tabindex', '-1');
      old.removeAttribute('aria-current');
    });
    const button = thumbs.querySelector(`button[data-l="${l}"][data-n="${n}"]`);
    button.setAttribute('tabindex', '0');
    button.setAttribute('aria-current', 'true');
    const box = thumbs.parentElement;
    const line = button.closest('[role=row]');
    if (line.offsetTop < box.scrollTop || line.offsetTop + line.offsetHeight > box.scrollTop + box.clientHeight) box.scrollTop = line.offsetTop - box.clientHeight / 2;
    layerPicker.set(l);
    headPicker.set(n);
    draw(large, l, n, lookup(ramp));
    large.style.setProperty('width', '100%');
    const T = count();
    band.style.setProperty('top', `${(100 * t) / T}%`);
    band.style.setProperty('height', `${100 / T}%`);
    replace(title, `Layer ${l}, head ${n}`, roleOf(l, n) ? `: ${roleOf(l, n)}` : '');
    for (const box of sides) [...box.children].forEach((one, i) => one.classList.toggle('on', i === t && box === sides[1]));
    readout.textContent = seen(l, n) ? told(l, n, t) : `Layer ${l} makes no attention pattern: its mixer is of another kind.`;
    reads.replaceChildren(
      ...range(T).map((k) => {
        const rgb = ramp.colour(pattern().at(l, n, t, k) / 255);
        const span = tokenChip(k, k === t ? 'on' : k > t ? 'later' : '');
        if (k <= t) {
          span.style.setProperty('background-color', css(rgb));
          span.style.setProperty('color', ink(rgb));
        }
        return span;
      }),
    );
    const rows = range(heads()).map((head) => ({
      on: head === n,
      select: () => go({ head }),
      cells: [String(head), roleOf(l, head), chips(top(l, head, t).map(([k, w]) => [current().tokens[k], w]), (w) => plain(w, 3))],
    }));
    replace(table_, node('h3', {}, `All heads of layer ${l}: the three tokens that `, tokenChip(t, 'on'), ' reads most, with exact weights'), table('Heads of the layer', ['head', 'role', 'reads'], rows));
  }

  return { absent: () => (current().attention ? null : 'No layer of this model makes attention patterns.'), build, update };
})();
