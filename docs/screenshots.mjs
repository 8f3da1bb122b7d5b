// Pictures of the status page of a running server, and an accessibility check of it with axe-core.
//
//   npm install --prefix /tmp/browser puppeteer-core axe-core
//   SELECTN_NODE_MODULES=/tmp/browser/node_modules node docs/screenshots.mjs --url http://127.0.0.1:8000 --out docs/images
//
// With --ray http://127.0.0.1:8265 it takes Ray's dashboard too, its Serve page; its token is in $RAY_DASHBOARD_TOKEN.
// Without --out there is only the check. The key, if one is needed, is in $SELECTN_API_KEY. $CHROMIUM names the browser.
// Prints JSON; exit code 1: axe has found violations, or the page has written errors.
import { mkdirSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { parseArgs } from "node:util";

const { values } = parseArgs({ options: { url: { type: "string" }, out: { type: "string" }, ray: { type: "string" } } });
if (!values.url) throw new Error("--url is needed");
const require = createRequire(join(process.env.SELECTN_NODE_MODULES ?? "node_modules", "/"));
const puppeteer = require("puppeteer-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

const VIEWS = { desktop: { width: 1280, height: 900 }, phone: { width: 390, height: 844, isMobile: true, hasTouch: true } };
const SHOWN_PX = { desktop: 1800, phone: 1500 }; // of a page that may be longer
const SETTLED_MS = 2500;

async function look(browser, view, scheme) {
  const page = await browser.newPage();
  const errors = [];
  let asked = 0;
  page.on("pageerror", (error) => errors.push(String(error)));
  page.on("console", (line) => line.type() === "error" && errors.push(line.text()));
  page.on("request", (request) => {
    if (request.url().endsWith("/status.json")) asked += 1;
    if (!request.url().startsWith(values.url) && !request.url().startsWith("data:")) errors.push(`asked ${request.url()}`);
  });
  await page.setViewport(VIEWS[view]);
  await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
  await page.goto(`${values.url}/status`, { waitUntil: "load" });
  const violations = { form: [] };
  if (process.env.SELECTN_API_KEY) {
    await page.waitForSelector("#key-form:not([hidden])");
    errors.length = 0; // the browser notes the 401 that the page asks for the key after
    violations.form = await check(page);
    await page.type("#key", process.env.SELECTN_API_KEY);
    await page.keyboard.press("Enter");
  }
  await page.waitForSelector("#data:not([hidden])");
  await new Promise((done) => setTimeout(done, SETTLED_MS)); // a refresh is among what is looked at
  violations.page = await check(page);
  const size = await page.evaluate(() => ({
    wide: document.documentElement.scrollWidth, high: document.documentElement.scrollHeight,
    injected: document.querySelectorAll("main script, main img, main b").length, state: document.getElementById("state").textContent,
  }));
  if (values.out) {
    mkdirSync(values.out, { recursive: true });
    const clip = { x: 0, y: 0, width: VIEWS[view].width, height: Math.min(size.high, SHOWN_PX[view]) };
    await page.screenshot({ path: join(values.out, `status-${view}-${scheme}.webp`), type: "webp", quality: 75, clip });
  }
  const refreshes = asked - 1;
  await page.click("#pause");
  await new Promise((done) => setTimeout(done, SETTLED_MS));
  const whilePaused = asked - 1 - refreshes;
  await page.close();
  return { view, scheme, violations, errors, fits: size.wide <= VIEWS[view].width, injected: size.injected, state: size.state, refreshes, whilePaused };
}

async function rayDashboard(browser) {
  const page = await browser.newPage();
  await page.setViewport({ width: 1280, height: 900 });
  const token = process.env.RAY_DASHBOARD_TOKEN;
  if (token) {
    const { hostname } = new URL(values.ray);
    await browser.setCookie({ name: "ray-authentication-token", value: token, domain: hostname, path: "/" });
    await page.setExtraHTTPHeaders({ Authorization: `Bearer ${token}` });
  }
  await page.goto(`${values.ray}/#/serve`, { waitUntil: "load" });
  await new Promise((done) => setTimeout(done, 3 * SETTLED_MS));
  if (values.out) await page.screenshot({ path: join(values.out, "ray-dashboard-serve.webp"), type: "webp", quality: 75 });
  await page.close();
}

async function check(page) {
  await page.evaluate(axe); // by the debugger, which the page's own policy does not bind
  const { violations } = await page.evaluate(() => axe.run(document));
  return violations.map((each) => `${each.id}: ${each.nodes.map((node) => node.html.slice(0, 120)).join(" | ")}`);
}

const browser = await puppeteer.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox", "--disable-gpu", "--disable-lcd-text"], // grey text: smaller files
});
const looks = [];
try {
  for (const view of Object.keys(VIEWS)) for (const scheme of ["light", "dark"]) looks.push(await look(browser, view, scheme));
  if (values.ray) await rayDashboard(browser);
} finally {
  await browser.close();
}
console.log(JSON.stringify(looks, null, 2));
const isBad = (each) => each.violations.form.length || each.violations.page.length || each.errors.length || !each.fits || each.injected;
process.exitCode = looks.some(isBad) ? 1 : 0;
