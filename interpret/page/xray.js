// Starts the page: reads the data, draws the text as tokens, and shows the panel that is chosen.

const ORDER = ['next', 'lens', 'attention', 'layers', 'heads', 'cells', 'experts', 'ablation', 'compare'];
const built = new Map(); // panel → what it was built for
const tab = (name) => document.getElementById(`tab-${name}`);
const section = (name) => document.getElementById(`panel-${name}`);

/** Goes to another token, layer, head, text or panel, and shows it. */
function go(change) {
  if ('layer' in change && !('row' in change)) change = { ...change, row: undefined };
  Object.assign(state, change);
  state.token = clamp(state.token, 0, count() - 1);
  show();
  if ('panel' in change) scrollTo(0, Math.min(scrollY, document.querySelector('header').offsetHeight)); // to its beginning
}

function show() {
  const choices = () => [...section(state.panel).querySelectorAll('tr.can')];
  const held = choices().indexOf(document.activeElement); // a table that is drawn anew keeps the focus
  for (const name of ORDER) {
    const on = name === state.panel;
    tab(name).setAttribute('aria-selected', String(on));
    tab(name).tabIndex = on ? 0 : -1;
    section(name).hidden = !on;
  }
  const panel = panels[state.panel];
  const body = section(state.panel).querySelector('.body');
  const absent = panel.absent();
  const of = `${state.panel === 'compare' ? 'both' : state.text} ${document.documentElement.dataset.theme}`;
  if (absent) {
    replace(body, node('p', { class: 'absent' }, absent));
    built.delete(state.panel);
  } else {
    if (built.get(state.panel) !== of) panel.build(body);
    built.set(state.panel, of);
    panel.update();
  }
  if (held >= 0 && !choices().includes(document.activeElement)) choices()[held]?.focus({ preventScroll: true });
  strips.forEach((strip, i) => strip.point(i === state.text ? state.token : null));
  const { panel: name, ...rest } = state;
  const place = Object.entries(rest).filter(([, value]) => value !== undefined).map(([key, value]) => `${key}=${value}`);
  history.replaceState(null, '', `#${name}&${place.join('&')}`);
}

let strips = [];

/** A text as a row of tokens of which one is selected, by a click or by the arrow keys. */
function strip(text, i) {
  const spans = text.tokens.map((s, t) => {
    const span = node('span', { role: 'option', id: `token-${i}-${t}`, 'aria-selected': 'false', 'data-t': String(t), 'aria-label': `token ${t}: ${visible(word(s))}` });
    span.textContent = readable(word(s));
    if (span.textContent === '') span.textContent = '∅';
    return span;
  });
  const box = node('div', { class: 'strip', role: 'listbox', tabindex: '0', 'aria-label': report.texts.length > 1 ? `Tokens of text ${'AB'[i]}` : 'Tokens of the text' });
  spans.forEach((span, t) => {
    box.append(span);
    if (word(text.tokens[t]).endsWith('\n')) box.append(node('br'));
  });
  box.addEventListener('click', (event) => {
    const span = event.target.closest('[data-t]');
    if (span) go({ text: i, token: Number(span.dataset.t) });
  });
  box.addEventListener('keydown', (event) => {
    const to = { ArrowLeft: state.token - 1, ArrowRight: state.token + 1, Home: 0, End: spans.length - 1 }[event.key];
    if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    go({ text: i, token: i === state.text ? to : 0 });
  });
  let old = null;
  const point = (t) => {
    old?.setAttribute('aria-selected', 'false');
    old = t === null ? null : spans[t];
    if (!old) return box.removeAttribute('aria-activedescendant');
    old.setAttribute('aria-selected', 'true');
    box.setAttribute('aria-activedescendant', old.id);
    if (old.offsetTop < box.scrollTop || old.offsetTop + old.offsetHeight > box.scrollTop + box.clientHeight) box.scrollTop = old.offsetTop - box.clientHeight / 2;
  };
  const label = report.texts.length > 1 ? [node('b', { class: 'badge' }, 'AB'[i])] : [];
  return { root: node('div', { class: 'line' }, label, box), point };
}

function heading() {
  const { title, made, model } = report;
  document.title = title;
  document.getElementById('title').textContent = title;
  const grouped = model.kv_heads && model.kv_heads !== model.heads ? ` (${model.kv_heads} of keys and values)` : '';
  const many = (n, name) => `${n.toLocaleString('en')} ${name}${n === 1 ? '' : 's'}`;
  const heads = model.heads ? [`${many(model.heads, 'head')}${grouped}`] : [];
  const size = many(model.layers, 'layer');
  const width = `vectors of ${model.model_dim.toLocaleString('en')} numbers`;
  const experts = model.experts ? [`${many(model.experts, 'expert')}, ${model.top_k} a token`] : [];
  const cells = model.hidden ? [`feed-forward networks of ${many(model.hidden, 'cell')}`] : [];
  const parts = [model.name, size, ...heads, width, ...cells, ...experts, `${model.parameters.toLocaleString('en')} parameters`, `vocabulary of ${model.vocabulary.toLocaleString('en')}`];
  document.getElementById('model').textContent = parts.join(' · ');
  const foot = `Made from ${visible(made.run)} at step ${made.step.toLocaleString('en')} by Weft ${made.weft} in ${plain(made.seconds, 1)} s: `;
  document.getElementById('made').append(foot, node('code', {}, made.command));
}

function themes() {
  const system = matchMedia('(prefers-color-scheme: dark)');
  const button = document.getElementById('theme');
  let own = null;
  const set = () => {
    const theme = own ?? (system.matches ? 'dark' : 'light');
    document.documentElement.dataset.theme = theme;
    button.textContent = theme === 'dark' ? '☀ light' : '☾ dark';
  };
  system.addEventListener('change', () => (set(), show()));
  button.addEventListener('click', () => {
    own = document.documentElement.dataset.theme === 'dark' ? 'light' : 'dark';
    set();
    show();
  });
  set();
}

/** Where the page's address says to begin; else at the last token and the layer that decided it. */
function begin() {
  const { lens } = report.texts[0];
  state.token = report.texts[0].tokens.length - 1;
  state.layer = lens ? clamp(lens.decided[state.token] - 1, 0, report.model.layers - 1) : 0;
  const [name, ...pairs] = location.hash.slice(1).split('&');
  if (ORDER.includes(name)) state.panel = name;
  const most = { text: report.texts.length, layer: report.model.layers, head: report.model.heads, row: report.model.layers + 1 };
  for (const [key, value] of pairs.map((pair) => pair.split('='))) {
    const n = Number(value);
    if (key in most && Number.isInteger(n) && n >= 0 && n < most[key]) state[key] = n;
    if (key === 'token' && Number.isInteger(n) && n >= 0) state.token = n;
  }
  state.token = clamp(state.token, 0, count() - 1);
}

async function start() {
  report = await unpack(JSON.parse(document.getElementById('data').textContent));
  heading();
  begin();
  themes();
  strips = report.texts.map(strip);
  document.getElementById('texts').replaceChildren(...strips.map((one) => one.root));
  if (strips.length > 1) document.querySelector('.hint').append(' Panels tell of the text whose token is chosen; “Two texts” of both.');
  const tabs = document.getElementById('tabs');
  tabs.addEventListener('click', (event) => {
    const button = event.target.closest('[role=tab]');
    if (button) go({ panel: button.dataset.panel });
  });
  tabs.addEventListener('keydown', (event) => {
    const at = ORDER.indexOf(state.panel);
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: ORDER.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    go({ panel: ORDER[(to + ORDER.length) % ORDER.length] });
    tab(state.panel).focus();
  });
  document.addEventListener('keydown', (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || event.ctrlKey || event.metaKey || event.altKey || event.target.closest('select, input')) return;
    event.preventDefault();
    go({ token: state.token + by });
  });
  document.body.classList.remove('waiting');
  show();
}

start().catch((error) => {
  document.getElementById('waiting').textContent = `This page could not be shown: ${error.message}. It needs a browser of 2023 or newer.`;
  throw error;
});
