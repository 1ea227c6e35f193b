// A headless chromium whose pages may load nothing but their own file, and what holds of every page.
//   CHROMIUM=/path/to/chromium   another browser than Debian's

import assert from 'node:assert/strict';
import { createRequire } from 'node:module';
import path from 'node:path';
import { pathToFileURL } from 'node:url';

const { chromium } = createRequire(path.resolve('.browser', 'package.json'))('playwright-core');
const FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-background-networking'];

/** A browser with a profile of its own, which playwright makes and removes. */
export const launch = () => chromium.launch({ executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium', args: FLAGS });

/** Opens a page of a width and a colour scheme; `calm` fails if it has raised an error, said one, or asked for anything else. */
export async function open(browser, file, { width, scheme = 'light', hash = '' }) {
  const page = await browser.newPage({ viewport: { width, height: 900 }, colorScheme: scheme });
  const url = pathToFileURL(path.resolve(file)).href;
  const wrong = [];
  page.on('console', (message) => ['error', 'warning'].includes(message.type()) && wrong.push(message.text()));
  page.on('pageerror', (error) => wrong.push(error.stack));
  page.on('dialog', (dialog) => (wrong.push(`a dialog: ${dialog.message()}`), dialog.dismiss()));
  page.on('request', (request) => request.url().split('#')[0] !== url && wrong.push(`asked for ${request.url()}`));
  await page.goto(url + hash);
  await page.waitForSelector('body:not(.waiting)');
  const calm = (where) => assert.deepEqual(wrong, [], where);
  return { page, calm };
}

/** Nothing sticks out of the window. */
export async function fits(page, where) {
  const [needed, there] = await page.evaluate(() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]);
  assert.ok(needed <= there, `${where}: ${needed} pixels wide in a window of ${there}`);
}

/** Where the element that has the focus shows that it has. */
export async function focusShows(page, where) {
  const style = await page.evaluate(() => {
    const { outlineStyle, outlineWidth } = getComputedStyle(document.activeElement);
    return [document.activeElement.matches(':focus-visible'), outlineStyle, parseFloat(outlineWidth)];
  });
  assert.ok(style[0] && style[1] !== 'none' && style[2] >= 2, `${where}: the focus is not to be seen (${style})`);
}
