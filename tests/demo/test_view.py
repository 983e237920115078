"""The trace page: what is written into it, and in headless Chromium what it does; the latter where a browser is."""

import html.parser
import json
import re
import time

import pytest
from browsing import contrast, find, press, until

from fastdllm.decoding.trace import Choice, Trace, TraceStep, Unmasked, write_trace
from fastdllm.demo import view as view_module
from fastdllm.demo.view import ViewConfig, main, page, view

EVIL = "</script><img src=x onerror=alert(1)><!--"
WORDS = ["One", " ", EVIL, "\n", "two", "<|im_end|>"]


def unmasked(place, confidence):
    text = WORDS[place - 4] if place - 4 < len(WORDS) else "past"
    other = Choice(token=7, text="</script>", probability=0.01)
    return Unmasked(place=place, token=place, text=text, confidence=confidence, alternatives=[other])


def step(kind, seconds, tokens, reused=()):
    return TraceStep(kind=kind, seconds=seconds, rows=4, reused=list(reused), tokens=tokens)


def make_trace(mode, steps, **changes):
    fields = dict(label="tiny", device="cpu", dtype="float32", timing="undisturbed", num_layers=4, num_prompt_tokens=4)
    fields |= dict(block_size=1 if mode == "ar" else 4, prompt=EVIL, text="One two", num_tokens=6, settings={})
    return Trace(mode=mode, steps=steps, **{**fields, **changes})


def autoregressive(**changes):
    tokens = [step("token", 2.0 + number, [unmasked(4 + number, 0.9)]) for number in range(6)]
    return make_trace("ar", [step("prefill", 1.0, []), *tokens], **changes)


def diffusion(**changes):
    steps = [
        step("prefill", 1.0, []),
        step("full", 2.0, [unmasked(4, 0.95), unmasked(6, 0.4)]),
        step("reuse", 2.5, [unmasked(5, 0.8), unmasked(7, 0.5)], reused=[1, 2]),
        step("append", 3.0, [unmasked(8, 0.9)]),
        step("full", 4.0, [unmasked(9, 0.99), unmasked(10, 0.9)]),  # the last one stands behind the end
    ]
    return make_trace("diffusion", steps, settings={"policy": "threshold", "threshold": 0.9}, **changes)


class Scripts(html.parser.HTMLParser):
    """Collects what stands in each script element, as a browser ends them, and every attribute that fetches."""

    def __init__(self):
        super().__init__()
        self.scripts, self.tags, self.fetches = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.scripts += [""] if tag == "script" else []
        self.fetches += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "script":
            self.scripts[-1] += data


def test_no_token_ends_the_script_or_becomes_markup_and_nothing_is_fetched():
    traces = [autoregressive(), diffusion()]
    parsed = Scripts()
    parsed.feed(page(traces))
    assert len(parsed.scripts) == 2 and "img" not in parsed.tags and not parsed.fetches
    content = json.loads(parsed.scripts[0])
    assert [token["text"] for token in content[0]["steps"][3]["tokens"]] == [EVIL] and len(content) == 2
    assert not re.search(r"https?:|//\w+\.|@import|url\(|fetch\(|XMLHttp", view_module.TEMPLATE.read_text())


def test_a_run_folder_and_single_files_go_into_one_page(tmp_path, capsys):
    run = tmp_path / "a run, [odd]"
    write_trace(run / "traces" / "a.0.json", autoregressive())
    write_trace(tmp_path / "other.json", diffusion(label="other"))
    main([str(run), str(tmp_path / "other.json"), str(run / "traces" / "a.0.json")])
    output = run / "traces.html"
    assert capsys.readouterr().out == f"wrote {output}\n"
    parsed = Scripts()
    parsed.feed(output.read_text())
    assert [trace["label"] for trace in json.loads(parsed.scripts[0])] == ["tiny", "other"]  # each file once
    assert view(ViewConfig(sources=[str(tmp_path / "other.json")])) == tmp_path / "traces.html"
    assert view(ViewConfig(sources=[str(run)], output=str(tmp_path / "x.html"))) == tmp_path / "x.html"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "view needs a run folder or a trace file"),
        (["empty"], "empty holds no traces/*.json; make some with"),
        (["none.json"], "none.json: no such file"),
        (["row.json"], "row.json must have format fastdllm-trace"),
    ],
)
def test_what_holds_no_trace_is_refused_with_a_way_out(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "row.json").write_text('{"cell": "x"}')
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.fixture
def browser(driver, tmp_path):
    """The page of an AR and a diffusion trace, opened from disk; it must end without a message on the console."""
    (tmp_path / "page.html").write_text(page([autoregressive(), diffusion(), diffusion(label="second", problem=1)]))
    driver.set_window_size(1200, 900)
    driver.get(f"file://{tmp_path}/page.html")
    yield driver
    assert driver.get_log("browser") == []


def texts(browser, panel):
    spans = "[...document.querySelectorAll('.answer')[arguments[0]].children]"
    return browser.execute_script(f"return {spans}.map(s => s.hidden ? '' : s.textContent)", panel)


def test_steps_show_both_sides_on_one_time_axis(browser):
    from selenium.webdriver.common.keys import Keys

    assert texts(browser, 0) == [""] * 6 and texts(browser, 1) == [""] * 7
    press(browser, Keys.ARROW_RIGHT)  # both prefills end at 1 s
    assert texts(browser, 0) == [""] * 6 and texts(browser, 1) == ["░"] * 4 + [""] * 3  # the block in work
    press(browser, Keys.ARROW_RIGHT)
    assert texts(browser, 0) == ["One"] + [""] * 5 and texts(browser, 1)[:4] == ["One", "░", EVIL, "░"]
    assert [one.text for one in find(browser, ".answer")[1].find_elements("css selector", ".newest")] == ["One", EVIL]
    press(browser, Keys.ARROW_RIGHT)  # 2.5 s: the diffusion side alone moves
    assert texts(browser, 0) == ["One"] + [""] * 5 and texts(browser, 1)[:4] == ["One", " ", EVIL, "⏎\n"]
    press(browser, Keys.ARROW_LEFT)
    assert texts(browser, 1)[:4] == ["One", "░", EVIL, "░"]
    press(browser, Keys.END)
    assert texts(browser, 0)[-1] == "<|im_end|>" and texts(browser, 1)[4:] == ["two", "<|im_end|>", "past"]
    counts = [one.text for one in find(browser, ".count")]
    assert counts[0] == "6 of 6 tokens · 7 of 7 passes · 1 tokens/s"
    assert counts[1] == "6 of 6 tokens, 1 behind the end · 5 of 5 passes · 2 tokens/s"
    assert [one.text for one in find(browser, ".behind")] == ["past"]
    find(browser, "#back")[0].click()
    assert texts(browser, 0)[-1] == "" and find(browser, "#clock")[0].text == "6.00 s of 7.00 s"


def test_playing_runs_at_the_chosen_speed_and_stops_at_the_end(browser):
    from selenium.webdriver.common.keys import Keys

    started = time.perf_counter()
    press(browser, Keys.SPACE)
    time.sleep(1.5)
    press(browser, Keys.SPACE)
    played, shown = time.perf_counter() - started, browser.execute_script("return state.now")
    assert 1.2 < shown <= played and find(browser, "#play")[0].text == "Play"
    browser.execute_script("state.now = 6.9")
    find(browser, "#play")[0].click()
    assert until(lambda: find(browser, "#play")[0].text == "Play")
    assert browser.execute_script("return state.now") == 7 and texts(browser, 0)[-1] == "<|im_end|>"


def test_focus_and_hover_show_alternatives(browser):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    press(browser, Keys.END)
    browser.execute_script("document.querySelectorAll('.answer')[1].children[0].focus()")
    press(browser, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    tip = find(browser, "#tip")[0]
    assert tip.is_displayed() and "place 3 · pass 2 (full)" in tip.text
    assert [row.text.split(" id ")[0] for row in tip.find_elements("css selector", "tr")] == [
        f"40.0 % {EVIL}",
        "1.0 % </script>",
    ]
    assert browser.execute_script("return document.querySelectorAll('img').length") == 0
    press(browser, Keys.ESCAPE)
    assert not tip.is_displayed()
    ActionChains(browser).move_to_element(
        find(browser, ".answer")[0].find_elements("css selector", "span")[4]
    ).perform()
    assert tip.is_displayed() and "90.0 % two" in tip.text


def test_colours_bars_and_the_choice_of_a_trace_follow_the_traces(browser):
    from selenium.webdriver.common.keys import Keys

    press(browser, Keys.END)
    script = "return [...document.querySelectorAll('.answer')[1].children].map(s => s.style.background)"
    by_step = browser.execute_script(script)
    assert by_step[0] == by_step[2] != by_step[1] == by_step[3] and by_step[6] == ""
    browser.execute_script("let c = get('colour'); c.value = 'confidence'; c.dispatchEvent(new Event('change'))")
    by_confidence = browser.execute_script(script)
    assert len(set(by_confidence[:6])) == 6
    bars = find(browser, ".panel:nth-child(2) .passes i")
    script = "return panels[1].bars.map(bar => [bar.style.width, bar.firstChild.style.height])"
    geometry = browser.execute_script(script)
    assert len(bars) == 5 and [height for _, height in geometry] == ["100%", "100%", "50%", "100%", "100%"]
    assert float(geometry[2][0].rstrip("%")) == pytest.approx(100 * 0.5 / 7, abs=0.01)  # of the longer trace's 7 s
    assert "layers 1, 2 reused" in bars[2].get_attribute("title")
    browser.execute_script("let c = panels[0].choice; c.value = '2'; c.dispatchEvent(new Event('change'))")
    assert "second" in find(browser, ".panel select option:checked")[0].text
    assert browser.execute_script("return state.total") == 4 and texts(browser, 0) == texts(browser, 1)


def test_a_single_trace_stands_alone(browser, tmp_path):
    (tmp_path / "one.html").write_text(page([diffusion()]))
    browser.get(f"file://{tmp_path}/one.html")
    find(browser, "#forward")[0].click()
    find(browser, "#forward")[0].click()
    assert len(find(browser, ".panel")) == 1 and texts(browser, 0)[0] == "One"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [500, 1200])
def test_it_is_readable_in_both_schemes_and_widths(browser, scheme, width):
    from selenium.webdriver.common.keys import Keys

    browser.set_window_size(width, 900)
    features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
    press(browser, Keys.END)
    script = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.execute_script(script) <= 0
    columns = browser.execute_script("return getComputedStyle(get('panels')).gridTemplateColumns.split(' ').length")
    assert columns == (2 if width == 1200 else 1)
    for selector in ("body", ".meta", ".count", "#play", ".answer span", "#keys"):
        assert contrast(browser, selector) >= 4.5, f"{selector} is hard to read in {scheme}"
