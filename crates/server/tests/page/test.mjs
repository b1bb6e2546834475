// The page of `bevel serve` in a browser: `node test.mjs BEVEL [SCREENSHOTS]`. `.ci/page` installs what it needs.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { mkdirSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { chromium } from "playwright-core";

const [bevel, shots] = process.argv.slice(2);
if (shots) mkdirSync(shots, { recursive: true });

// A server of the model inside the program, and its address.
function serve(...options) {
  const args = ["serve", "tiny-austen", "--port", "0", "--json", "-q", "--chat-template", "chatml", ...options];
  const server = spawn(bevel, args, { stdio: ["ignore", "pipe", "inherit"] });
  return new Promise((resolve, reject) => {
    let text = "";
    server.on("exit", (code) => reject(new Error(`the server ended with ${code}`)));
    server.stdout.on("data", (data) => {
      text += data;
      try {
        resolve({ url: JSON.parse(text).url, stop: () => server.kill() });
      } catch {
        // Not all of it is there yet.
      }
    });
  });
}

const tests = {
  async "a message is answered, with figures"({ page, say }) {
    const answer = await say("Who is Emma?");
    assert.ok((await answer.locator(".content").innerText()).length > 0);
    assert.match(await answer.locator(".figures").innerText(), /\d+ tokens, [\d.]+ a second; first after \d+ ms, \d+ read/);
    assert.equal(await page.locator(".message").count(), 2);
    assert.equal(await page.locator(".waiting").count(), 0);
  },

  async "an answer can be stopped, retried, and its question edited"({ page, say, settled }) {
    // An answer that does not end by itself.
    const endless = (route) => route.continue({ postData: JSON.stringify({ ...route.request().postDataJSON(), ignore_eos: true }) });
    await page.route("**/v1/chat/completions", endless);
    await set(page, "max_tokens", "900");
    await page.fill("#composer", "Tell me everything.");
    await page.keyboard.press("Enter");
    await page.waitForFunction(() => document.querySelector(".message.assistant .content")?.innerText.length > 5);
    await page.keyboard.press("Escape");
    await settled();
    const answer = page.locator(".message.assistant");
    assert.equal(await answer.locator(".figures").innerText(), "stopped");
    await page.unroute("**/v1/chat/completions");

    await set(page, "max_tokens", "12");
    await set(page, "temperature", "0");
    await answer.hover();
    await answer.getByText("Retry").click();
    await settled();
    const first = await answer.locator(".content").innerText();
    await answer.hover();
    await answer.getByText("Retry").click();
    await settled();
    assert.equal(await answer.locator(".content").innerText(), first, "temperature 0 says the same again");

    await page.focus("#composer");
    await page.keyboard.press("ArrowUp");
    await page.locator(".message.user textarea").fill("And now?");
    await page.keyboard.press("Enter");
    await settled();
    assert.equal(await page.locator(".message.user .content").innerText(), "And now?");
    assert.equal(await page.locator(".message").count(), 2);
    await say("One more.");
    assert.equal(await page.locator(".message").count(), 4);
  },

  async "conversations stay in the browser"({ page, say }) {
    await set(page, "max_tokens", "8");
    await say("First one");
    await page.click("#toggle-chats");
    await page.click("#new-chat");
    await say("Second one");
    await page.reload();
    await page.locator(".message").nth(1).waitFor();
    assert.equal(await page.locator(".message.user .content").innerText(), "Second one");
    if (await page.locator("#chats").isHidden()) await page.click("#toggle-chats");
    await page.locator("#chat-list button", { hasText: /^First one$/ }).click();
    assert.equal(await page.locator(".message.user .content").innerText(), "First one");
    page.once("dialog", (dialog) => dialog.accept());
    await page.getByLabel("Delete “Second one”").click();
    assert.equal(await page.locator("#chat-list li").count(), 1);
  },

  async "what a model writes is shown as markdown and never becomes markup"({ page, shot }) {
    const text = [
      "# Title", "Some **bold**, *slanted*, `code_with_*stars*`, ~~gone~~ and [a link](https://example.org/a_b).",
      "<img src=x onerror=\"window.broken = true\"><script>window.broken = true</script>",
      "[bad](javascript:alert(1))", "", "- one", "  - inner", "- two", "", "3. three", "4. four", "",
      "| a | b |", "|---|--:|", "| 1 | `x` |", "", "> quoted", "", "```rust", "fn main() { println!(\"<b>\"); }", "```", "", "---", "last",
    ].join("\n");
    const html = await page.evaluate((written) => {
      const div = document.createElement("div");
      div.append(...markdown(written));
      return div.innerHTML;
    }, text);
    for (const part of [
      "<h3>Title</h3>", "<strong>bold</strong>", "<em>slanted</em>", "<code>code_with_*stars*</code>", "<del>gone</del>",
      "<a href=\"https://example.org/a_b\" target=\"_blank\" rel=\"noopener noreferrer\">a link</a>", "&lt;img src=x", "&lt;script&gt;",
      "[bad](javascript:alert(1))", "<ul><li>one<ul><li>inner</li></ul></li><li>two</li></ul>", "<ol start=\"3\"><li>three</li><li>four</li></ol>",
      "<th>a</th>", "<td><code>x</code></td>", "<blockquote><p>quoted</p></blockquote>",
      "<pre><code data-language=\"rust\">fn main() { println!(\"&lt;b&gt;\"); }</code></pre>", "<hr>", "<p>last</p>",
    ]) assert.ok(html.includes(part), `${part} in ${html}`);
    assert.equal(await page.evaluate(() => window.broken), undefined);
    // Shown as an answer, to be looked at.
    await page.evaluate((written) => {
      chat.messages = [{ role: "user", content: "Show me all of it." }, { role: "assistant", content: written, model: "tiny-austen" }];
      show();
    }, text);
    await shot("markdown");
  },

  async "light and dark, wide and narrow"({ page, say, shot }) {
    await set(page, "max_tokens", "40");
    await page.click("#toggle-live");
    await say("What of Mr. Darcy?");
    await page.waitForFunction(() => /\d/.test(document.getElementById("live-blocks").innerText));
    assert.match(await page.locator("#live-queue").innerText(), /^\d+, \d+$/);
    const ground = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
    await set(page, "theme", "light");
    const light = await ground();
    await shot("light");
    await set(page, "theme", "dark");
    assert.notEqual(await ground(), light);
    await page.click("#toggle-settings");
    await shot("dark-settings");
    await page.click("#toggle-settings");
    await page.setViewportSize({ width: 375, height: 700 });
    await shot("phone");
    const overflow = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
    assert.ok(overflow <= 0, `${overflow} pixels too wide`);
    for (const id of ["composer", "send", "toggle-settings", "toggle-chats"]) {
      const box = await page.locator(`#${id}`).boundingBox();
      assert.ok(box && box.x >= 0 && box.x + box.width <= 375 && box.y + box.height <= 700, id);
      assert.ok(box.height >= 40, `${id} is large enough for a thumb`);
    }
  },

  async "the keyboard is enough"({ page, settled }) {
    await page.focus("body");
    const reached = new Set();
    for (let i = 0; i < 12; i += 1) {
      await page.keyboard.press("Tab");
      reached.add(await page.evaluate(() => document.activeElement.id || document.activeElement.className));
    }
    for (const id of ["skip", "toggle-chats", "model", "toggle-live", "toggle-settings", "composer", "send"]) {
      assert.ok(reached.has(id), `${id} among ${[...reached]}`);
    }
    await page.focus("#composer");
    await page.keyboard.type("a");
    await page.keyboard.press("Shift+Enter");
    await page.keyboard.type("b");
    assert.equal(await page.inputValue("#composer"), "a\nb");
    await page.keyboard.press("Enter");
    await settled();
    assert.equal(await page.locator(".message.user .content").innerText(), "a\nb");
  },

  async "what the server refuses is said"({ page, say }) {
    await set(page, "temperature", "-3");
    const answer = await say("Hello");
    assert.match(await answer.locator(".content").innerText(), /`temperature`: expected a number from 0 up/);
    assert.ok((await answer.getAttribute("class")).includes("failed"));
  },
};

// Sets a field of the settings.
async function set(page, name, value) {
  await page.evaluate(([id, text]) => {
    const field = document.getElementById(id);
    field.value = text;
    field.dispatchEvent(new Event("change"));
  }, [name, value]);
}

const profile = mkdtempSync(join(tmpdir(), "page-test-"));
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
});
const open = await serve();
const locked = await serve("--api-key", "secret");
let failed = 0;

async function run(name, test, url) {
  const context = await browser.newContext({ viewport: { width: 1200, height: 800 } });
  const page = await context.newPage();
  const problems = [];
  page.on("pageerror", (error) => problems.push(String(error)));
  page.on("console", (message) => {
    // A refused request is logged by the browser itself.
    if (message.type() === "error" && !message.text().includes("the server responded with a status of 4")) problems.push(message.text());
  });
  page.setDefaultTimeout(20_000);
  const settled = () => page.locator("#send").waitFor();
  const say = async (text) => {
    await page.fill("#composer", text);
    await page.click("#send");
    await page.waitForFunction(() => document.getElementById("composer").value === "");
    await settled();
    return page.locator(".message.assistant").last();
  };
  const shot = (file) => shots && page.screenshot({ path: join(shots, `${file}.png`) });
  try {
    await page.goto(url);
    await test({ page, say, settled, shot });
    assert.deepEqual(problems, []);
    console.log(`ok     ${name}`);
  } catch (error) {
    failed += 1;
    console.log(`FAILED ${name}: ${error.stack}`);
    await shot(`failed-${failed}`);
  }
  await context.close();
}

for (const [name, test] of Object.entries(tests)) await run(name, test, open.url);
await run("a key is asked for", async ({ page, say }) => {
  await page.locator("#settings").waitFor();
  await page.fill("#key", "secret");
  await page.keyboard.press("Tab");
  await page.waitForFunction(() => document.getElementById("model").value === "tiny-austen");
  await set(page, "max_tokens", "8");
  const answer = await say("Hello");
  assert.ok(!(await answer.getAttribute("class")).includes("failed"));
}, locked.url);

await browser.close();
open.stop();
locked.stop();
rmSync(profile, { recursive: true, force: true });
process.exit(failed ? 1 : 0);
