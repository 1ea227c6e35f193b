// Tries the X-ray pages that pages.py wrote: node tests/browser/xray.mjs FOLDER. Pictures go into the folder, to be looked at.

import assert from 'node:assert/strict';
import fs from 'node:fs';
import path from 'node:path';
import { fits, focusShows, launch, open } from './browser.mjs';

const folder = process.argv[2];
const PANELS = ['next', 'lens', 'attention', 'layers', 'heads', 'cells', 'experts', 'ablation', 'compare'];
const file = (name, kind = 'html') => path.join(folder, `${name}.${kind}`);
const report = (name) => JSON.parse(fs.readFileSync(file(name, 'json')));
const panel = (name) => `#panel-${name}`;
const spoken = (page) => page.evaluate(() => document.querySelector('.strip [aria-selected=true]').getAttribute('aria-label'));

/** An array of a report, with its dims. */
function numbers({ b64, dtype, shape }) {
  const bytes = Uint8Array.from(Buffer.from(b64, 'base64')).buffer;
  const data = new { u8: Uint8Array, u16: Uint16Array, u32: Uint32Array, f32: Float32Array }[dtype](bytes);
  return (...index) => data[index.reduce((place, i, dim) => place * shape[dim] + i, 0)];
}

/** Presses all there is to press in a panel, a few of each kind, and a place in each map. */
async function pressAll(page, name, calm, where) {
  const scope = panel(name);
  for (const [kind, most] of [['summary', 1], ['button:not(.thumbs button)', 12], ['.thumbs button', 3], ['tr.can', 3]]) {
    const there = await page.locator(`${scope} ${kind}`).count();
    for (let i = 0; i < Math.min(most, there); i++) {
      const one = page.locator(`${scope} ${kind}`).nth(i);
      if (await one.isVisible()) await one.evaluate((element) => element.click());
      calm(`${where}: ${kind} ${i}`);
    }
  }
  for (const list of await page.locator(`${scope} select`).all()) {
    for (const value of (await list.locator('option').evaluateAll((all) => all.map((option) => option.value))).slice(-12)) await list.selectOption(value);
    calm(`${where}: lists`);
  }
  const maps = await page.locator(`${scope} .heat`).count();
  for (let i = 0; i < maps; i++) {
    const map = page.locator(`${scope} .map`).nth(i);
    const cell = map.locator('td[data-r]:not(.none)').first();
    if (!(await cell.count())) continue;
    await cell.hover();
    const said = await map.locator('.readout').textContent();
    assert.equal(said, await cell.getAttribute('aria-label'), `${where}: map ${i} says what its cell holds`);
    await cell.click();
    calm(`${where}: map ${i}`);
  }
  const frame = page.locator(`${scope} .frame`);
  if (await frame.count()) {
    await frame.hover({ position: { x: 20, y: 60 } });
    assert.match(await page.locator(`${scope} .side .readout`).textContent(), /reads most/);
    await frame.click({ position: { x: 5, y: 5 } });
    assert.match(await spoken(page), /^token 0:/);
  }
}

async function everyPanel(browser, name) {
  for (const [width, scheme] of [[1400, 'light'], [1400, 'dark'], [400, 'light'], [400, 'dark']]) {
    const { page, calm } = await open(browser, file(name), { width, scheme });
    assert.equal(await page.evaluate(() => document.documentElement.dataset.theme), scheme);
    for (const one of PANELS) {
      const where = `${name}, ${one}, ${width} pixels, ${scheme}`;
      await page.click(`#tab-${one}`);
      assert.deepEqual(await page.locator('main > section:visible').evaluateAll((all) => all.map((s) => s.id)), [`panel-${one}`], where);
      assert.ok((await page.locator(`${panel(one)} .body`).innerText()).length > 20, `${where}: empty`);
      await fits(page, where);
      assert.ok(await page.evaluate(() => scrollY <= document.querySelector('header').offsetHeight), `${where}: does not begin at its top`);
      await page.evaluate(() => scrollTo(0, 0));
      await page.screenshot({ path: path.join(folder, `${name}-${one}-${width}-${scheme}.png`), fullPage: true });
      await steady(page, one, where);
      await pressAll(page, one, calm, where);
      await fits(page, `${where}, pressed`);
      calm(where);
    }
    await page.close();
  }
}

/** What stands around the values of a token stays where it is when another token is chosen, and that is fast. */
async function steady(page, one, where) {
  const tops = () => page.locator(`${panel(one)} h2, ${panel(one)} .body > .map, ${panel(one)} .matrix, #tabs`).evaluateAll((all) => all.map((e) => Math.round(e.getBoundingClientRect().top + scrollY)));
  await page.locator('.strip').first().focus();
  await page.keyboard.press('Home');
  const before = await tops();
  const count = await page.locator('.strip').first().locator('[data-t]').count();
  const begin = Date.now();
  for (let i = 1; i < Math.min(count, 6); i++) await page.keyboard.press('ArrowRight');
  const each = (Date.now() - begin) / 5;
  const after = await tops();
  if (one !== 'cells') assert.deepEqual(after, before, `${where}: things move`); // cards are as high as their texts
  assert.ok(each < 500, `${where}: another token takes ${each} ms`);
}

async function keyboard(browser) {
  const { page, calm } = await open(browser, file('dense'), { width: 1400 });
  const focus = () => page.evaluate(() => document.activeElement.id || document.activeElement.getAttribute('role') || document.activeElement.tagName);
  const tab = async (wanted) => {
    for (let i = 0; i < 40 && (await focus()) !== wanted; i++) {
      await page.keyboard.press('Tab');
      await focusShows(page, `on the way to ${wanted}`);
    }
    assert.equal(await focus(), wanted);
  };
  await tab('theme');
  await page.keyboard.press('Enter');
  assert.equal(await page.evaluate(() => document.documentElement.dataset.theme), 'dark');
  await tab('listbox');
  const last = await spoken(page);
  await page.keyboard.press('ArrowLeft');
  assert.notEqual(await spoken(page), last);
  await page.keyboard.press('Home');
  assert.match(await spoken(page), /^token 0:/);
  assert.equal(await page.evaluate(() => document.querySelector('.strip').getAttribute('aria-activedescendant')), 'token-0-0');
  await tab('tab-next');
  await page.keyboard.press('ArrowRight');
  assert.equal(await focus(), 'tab-lens');
  await tab('TD');
  const place = () => page.evaluate(() => document.activeElement.getAttribute('aria-label'));
  const from = await place();
  await page.keyboard.press('ArrowDown');
  await page.keyboard.press('ArrowRight');
  await focusShows(page, 'in the logit lens');
  assert.notEqual(await place(), from);
  assert.match(await spoken(page), /^token 1:/);
  await page.keyboard.press('Shift+Tab');
  await page.locator('#tab-lens').focus();
  await page.keyboard.press('ArrowRight');
  for (let i = 0; i < 10 && !(await page.evaluate(() => document.activeElement.matches('.thumbs button'))); i++) await page.keyboard.press('Tab');
  const head = await place();
  await page.keyboard.press('ArrowRight');
  assert.notEqual(await place(), head);
  await focusShows(page, 'on a head');
  await page.click('#tab-layers');
  const rows = page.locator(`${panel('layers')} tr.can`);
  await rows.nth(4).focus();
  await page.keyboard.press('ArrowDown');
  await focusShows(page, 'on a row');
  await page.keyboard.press('Enter');
  assert.equal(await rows.nth(5).getAttribute('aria-current'), 'true', 'Enter chooses a row');
  assert.ok(await rows.nth(5).evaluate((element) => element === document.activeElement), 'and leaves the focus on it');
  calm('by keyboard');
  const hash = await page.evaluate(() => location.hash);
  await page.close();
  const again = await open(browser, file('dense'), { width: 1400, hash });
  assert.match(await spoken(again.page), /^token 1:/);
  assert.ok(await again.page.isVisible(panel('layers')));
  await again.page.close();
}

/** Numbers on the page are those of the report. */
async function exact(browser) {
  const { texts, strings, model } = report('dense');
  const [{ next, tokens, ablation, lens, attention, layers }] = texts;
  const t = 7;
  const { page, calm } = await open(browser, file('dense'), { width: 1400, hash: `#next&token=${t}&layer=3&head=2` });
  const shown = await page.locator(`${panel('next')} .tall tbody tr`).first().innerText();
  const [token, probability] = [strings[next.top[t][0]], next.probability[t][0]];
  const near = (text, x, tolerance) => assert.ok(Math.abs(parseFloat(text.replace('\u2212', '-')) - x) <= tolerance, `${text} is not ${x}`);
  assert.ok(shown.includes(token.replaceAll(' ', '·')), `${shown} lacks ${token}`);
  near(shown.match(/([\d.]+)\u00a0%/)[1], 100 * probability, 0.06);
  const said = async (one, r, c, i = 0) => {
    await page.click(`#tab-${one}`);
    return page.locator(`${panel(one)} .heat`).nth(i).locator(`td[data-r="${r}"][data-c="${c}"]`).getAttribute('aria-label');
  };
  near((await said('lens', 12, t)).match(/the answer has ([\d.]+)/)[1], 100 * numbers(lens.answer)(12, t), 0.06);
  assert.ok((await said('lens', 12, t)).includes(`“${strings[numbers(lens.top)(12, t, 0)].replaceAll(' ', '·')}”`));
  near((await said('ablation', 5, 4)).match(/: (\S+) nats/)[1], numbers(ablation.heads)(5, 4), 0.0006);
  await page.click('#tab-attention');
  const reads = await page.locator(`${panel('attention')} .side .readout`).innerText();
  const [key, weight] = [numbers(attention.top.key)(3, 2, t, 0), numbers(attention.top.weight)(3, 2, t, 0)];
  assert.ok(reads.includes(`(${t}) reads most: “${strings[tokens[key]].replaceAll(' ', '·')}” (${key}) ${weight.toFixed(3)}`), reads);
  const pattern = numbers(attention.pattern);
  const drawn = await page.locator(`${panel('attention')} .frame canvas`).evaluate((canvas) => [canvas.width, ...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data]);
  const T = tokens.length;
  assert.equal(drawn[0], T);
  const red = (q, k) => drawn[1 + 4 * (q * T + k)];
  for (const q of [10, 30, 60]) for (const [a, b] of [[0, 1], [2, q], [q - 1, q]]) {
    if (pattern(3, 2, q, a) > pattern(3, 2, q, b)) assert.ok(red(q, a) <= red(q, b), 'a larger weight is drawn darker');
  }
  await page.click('#tab-layers');
  const sum = [...Array(model.layers).keys()].reduce((s, l) => s + numbers(layers.attention_answer)(l, t) + numbers(layers.feed_forward_answer)(l, t), 0);
  const whole = await page.locator(`${panel('layers')} figure tr`).last().locator('td').last().innerText();
  near(whole, sum + numbers(layers.embedding_answer)(t) + numbers(layers.constant_answer)(t), 0.06);
  calm('exact');
  await page.close();
}

async function markup(browser) {
  const { page, calm } = await open(browser, file('evil'), { width: 1400 });
  for (const one of PANELS) {
    await page.click(`#tab-${one}`);
    await pressAll(page, one, calm, `evil, ${one}`);
    const found = await page.evaluate(() => [window.ran, document.images.length, document.scripts.length, document.querySelectorAll('[onerror]').length]);
    assert.deepEqual(found, [undefined, 0, 2, 0], one);
    assert.ok((await page.locator('#texts').innerText()).includes('<img'), 'markup is shown as text');
  }
  calm('evil');
  await page.close();
}

async function absences(browser) {
  const { page, calm } = await open(browser, file('absent'), { width: 400 });
  for (const one of ['attention', 'heads', 'cells', 'experts', 'compare']) {
    await page.click(`#tab-${one}`);
    assert.ok((await page.locator(`${panel(one)} .absent`).innerText()).length > 20, one);
  }
  calm('absent');
  await page.close();
}

const browser = await launch();
try {
  const jobs = { exact, keyboard, markup, absences };
  for (const [name, job] of Object.entries(jobs)) {
    await job(browser);
    console.log(`xray: ${name}: as it should be`);
  }
  for (const name of ['dense', 'experts', 'against', 'absent', 'one_token']) {
    await everyPanel(browser, name);
    console.log(`xray: ${name}: every panel at 1400 and 400 pixels, light and dark, clicked through`);
  }
} finally {
  await browser.close();
}
