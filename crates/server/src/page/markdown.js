"use strict";
// Markdown as models write it, as elements. Text only ever becomes text nodes, so nothing a model writes can
// become markup or a script.

const markdown = (() => {
  const element = (name, ...children) => {
    const made = document.createElement(name);
    made.append(...children);
    return made;
  };

  // What stands inside a line. The first that matches anywhere is taken; the rest is done in turn.
  const inline = [
    [/`([^`]+)`/, (m) => element("code", m[1])],
    [/\*\*(\S(?:[^]*?\S)?)\*\*/, (m) => element("strong", ...spans(m[1]))],
    [/(?<![\w*])\*(\S(?:[^*]*?\S)?)\*(?![\w*])/, (m) => element("em", ...spans(m[1]))],
    [/(?<!\w)_(\S(?:[^_]*?\S)?)_(?!\w)/, (m) => element("em", ...spans(m[1]))],
    [/~~(\S(?:[^]*?\S)?)~~/, (m) => element("del", ...spans(m[1]))],
    [/\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)/, (m) => link(m[2], ...spans(m[1]))],
    [/https?:\/\/[^\s<>)"']+[^\s<>)"'.,:;!?]/, (m) => link(m[0], m[0])],
  ];

  const link = (url, ...children) => {
    const made = element("a", ...children);
    made.href = url;
    made.target = "_blank";
    made.rel = "noopener noreferrer";
    return made;
  };

  const spans = (text) => {
    let first = null;
    for (const [pattern, make] of inline) {
      const match = pattern.exec(text);
      if (match && (!first || match.index < first.match.index)) first = { match, make };
    }
    if (!first) return text ? [text] : [];
    const { match, make } = first;
    const before = text.slice(0, match.index);
    const rest = text.slice(match.index + match[0].length);
    return [...(before ? [before] : []), make(match), ...spans(rest)];
  };

  const lines = (texts) => texts.flatMap((text, i) => (i ? [element("br"), ...spans(text)] : spans(text)));

  const code = (text, language) => {
    const block = element("code", text);
    if (language) block.dataset.language = language;
    return element("pre", block);
  };

  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim());

  const table = (rows) => {
    const row = (name, line) => element("tr", ...cells(line).map((cell) => element(name, ...spans(cell))));
    const [head, , ...body] = rows;
    return element("table", element("thead", row("th", head)), element("tbody", ...body.map((line) => row("td", line))));
  };

  const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;

  // A list and the lists in it, from `at` on; returns the element and where it ends.
  const list = (all, at) => {
    const [, indent, mark] = ITEM.exec(all[at]);
    const made = element(/\d/.test(mark) ? "ol" : "ul");
    if (made.tagName === "OL") made.start = parseInt(mark, 10);
    while (at < all.length) {
      const match = ITEM.exec(all[at]);
      if (!match || match[1].length < indent.length) break;
      if (match[1].length === indent.length && /\d/.test(match[2]) !== /\d/.test(mark)) break;
      if (match[1].length > indent.length && made.lastChild) {
        const [inner, end] = list(all, at);
        made.lastChild.append(inner);
        at = end;
        continue;
      }
      const texts = [match[3]];
      for (at += 1; at < all.length && /^\s+\S/.test(all[at]) && !ITEM.test(all[at]); at += 1) texts.push(all[at].trim());
      made.append(element("li", ...lines(texts)));
      // A blank line between items ends nothing.
      if (all[at] === "" && ITEM.test(all[at + 1] ?? "")) at += 1;
    }
    return [made, at];
  };

  const blocks = (all) => {
    const made = [];
    let at = 0;
    while (at < all.length) {
      const line = all[at];
      const fence = /^\s*(`{3,}|~{3,})\s*([\w+#.-]*)/.exec(line);
      const heading = /^(#{1,6})\s+(.*?)\s*#*$/.exec(line);
      if (line.trim() === "") {
        at += 1;
      } else if (fence) {
        const end = all.findIndex((l, i) => i > at && l.trim().startsWith(fence[1]));
        made.push(code(all.slice(at + 1, end < 0 ? undefined : end).join("\n"), fence[2]));
        at = end < 0 ? all.length : end + 1;
      } else if (heading) {
        made.push(element(`h${Math.min(6, heading[1].length + 2)}`, ...spans(heading[2])));
        at += 1;
      } else if (/^\s*([-*_])(\s*\1){2,}\s*$/.test(line)) {
        made.push(element("hr"));
        at += 1;
      } else if (/^\s*>/.test(line)) {
        let end = at;
        while (end < all.length && /^\s*>/.test(all[end])) end += 1;
        made.push(element("blockquote", ...blocks(all.slice(at, end).map((l) => l.replace(/^\s*> ?/, "")))));
        at = end;
      } else if (ITEM.test(line)) {
        const [made_list, end] = list(all, at);
        made.push(made_list);
        at = end;
      } else if (line.includes("|") && /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/.test(all[at + 1] ?? "") && all[at + 1].includes("-")) {
        let end = at + 2;
        while (end < all.length && all[end].includes("|")) end += 1;
        made.push(table(all.slice(at, end)));
        at = end;
      } else {
        let end = at + 1;
        while (end < all.length && all[end].trim() !== "" && !/^(\s*(`{3,}|~{3,}|>)|#{1,6}\s)/.test(all[end]) && !ITEM.test(all[end])) end += 1;
        made.push(element("p", ...lines(all.slice(at, end))));
        at = end;
      }
    }
    return made;
  };

  return (text) => blocks(text.replaceAll("\r\n", "\n").split("\n"));
})();
