"""The chat's page: what its routes take and refuse, and in headless Chromium what a user sees and does."""

import asyncio
import json
import threading
from dataclasses import dataclass, field
from queue import Queue

import pytest
from browsing import contrast, find, press, until
from serving.live import running
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

from fastdllm.demo import web
from fastdllm.demo.conversation import Cost, Moment
from fastdllm.demo.web import chat_routes, page
from fastdllm.serving.app import AppSettings, make_app
from fastdllm.serving.command import LOOPBACK_NAMES
from fastdllm.serving.service import QueueFullError

from .test_chat import make_speaker

EVIL = "</script><img src=x onerror=alert(1)><!--"
COST = Cost(num_tokens=10, seconds=0.5, tokens_per_forward=2.5, num_prompt_tokens=40, cached_tokens=32)


@dataclass
class Asked:
    """An answer whose moments come when the test says so; None ends it."""

    messages: list
    settings: object
    max_new_tokens: int | None
    moments: Queue = field(default_factory=Queue)
    is_left: bool = False
    end: str = "stop"
    cost = COST

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.is_left = True

    async def __aiter__(self):
        while True:
            while self.moments.empty():
                await asyncio.sleep(0.01)
            moment = self.moments.get()
            if isinstance(moment, Exception):
                raise moment
            if moment is None:
                return
            yield moment

    def say(self, text, draft=()):
        self.moments.put(Moment(text, list(draft)))


class Questions:
    """A listener that keeps what it is asked, until the test answers."""

    max_new_tokens = 64
    is_quick = False  # whether each answer ends at once

    def __init__(self, speaker):
        self.speaker, self.asked = speaker, []

    def ask(self, messages, settings, max_new_tokens=None):
        self.speaker.check(settings)
        self.speaker.request(messages, settings, 1, 0)
        self.asked.append(Asked(messages, settings, max_new_tokens))
        if self.is_quick:
            self.asked[-1].moments.put(None)
        return self.asked[-1]

    def next(self, number):
        """Return question `number`, which the page is about to ask."""
        assert until(lambda: len(self.asked) > number)
        return self.asked[number]


def open_page(tokenizer, system="", **options):
    speaker = make_speaker(tokenizer, **options)
    questions = Questions(speaker)
    routes = chat_routes(speaker, questions, name=f"tiny {EVIL}", system=system)
    return questions, make_app(None, AppSettings(name="tiny", hosts=LOOPBACK_NAMES), routes)


def client_of(app):
    return TestClient(app, base_url="http://127.0.0.1:8000")


QUESTION = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
        ({"settings": {"mode": "slow"}}, "settings.mode"),
        ({"settings": {"threshold": 2.0}}, "must be in (0, 1], got 2.0"),
        ({"settings": {"reuse_k": 0}}, "reuse_k must be 1 or more"),
        ({"settings": {"reuse_k": 2**64}}, "settings.reuse_k"),
        ({"settings": {"subset": "top", "reuse_k": 2}}, "top"),
        ({"settings": {"mode": "verified"}}, "needs an adapter"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"colour": "red"}, "colour"),
        ({"messages": [{"role": "user", "content": "x" * 500}]}, "leaves no room for an answer"),
    ],
)
def test_a_wrong_question_is_refused_with_the_reason(byte_tokenizer, change, message):
    questions, app = open_page(byte_tokenizer)
    answer = client_of(app).post("/chat", json=QUESTION | change)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]
    assert not questions.asked


@pytest.mark.parametrize(
    ("error", "status"),
    [(QueueFullError("9 wait."), 429), (RuntimeError("the service is closed."), 503)],
)
def test_a_service_that_takes_no_more_says_so(byte_tokenizer, error, status):
    questions, app = open_page(byte_tokenizer)

    def refuse(*_):
        raise error

    questions.ask = refuse
    answer = client_of(app).post("/chat", json=QUESTION)
    assert answer.status_code == status and answer.json()["error"]["message"] == str(error)


def test_a_long_question_does_not_hold_up_the_answers_of_others(byte_tokenizer):
    questions, app = open_page(byte_tokenizer)
    ask, threads = questions.ask, []

    def remember(*arguments):
        threads.append(threading.current_thread())
        return ask(*arguments)

    async def loop_thread(request):
        threads.append(threading.current_thread())
        return Response()

    questions.ask, questions.is_quick = remember, True
    app.routes.append(Route("/loop", loop_thread))
    with client_of(app) as client:  # one event loop for both
        client.post("/chat", json=QUESTION)
        client.get("/loop")
    assert len(threads) == 2 and threads[0] is not threads[1]


def test_a_question_that_is_too_large_is_not_read(byte_tokenizer):
    question = {"messages": [{"role": "user", "content": "x" * 2**20}]}
    answer = client_of(open_page(byte_tokenizer)[1]).post("/chat", json=question)
    assert answer.status_code == 413 and "1,048,576 bytes" in answer.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"null"])
def test_what_is_no_question_is_refused(byte_tokenizer, body):
    client = client_of(open_page(byte_tokenizer)[1])
    answer = client.post("/chat", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def bodies():
    """Questions with something odd in any place, and JSON of any kind."""
    from hypothesis import strategies as st

    plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
    anything = st.recursive(plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner))
    number, word = st.one_of(plain, st.just(2)), st.one_of(plain, st.sampled_from(["user", "middle", "diffusion"]))
    role = st.sampled_from(["user", "assistant", "system", "tool"])
    turn = st.fixed_dictionaries({"role": role | plain, "content": st.text(max_size=9) | plain})
    wanted = st.fixed_dictionaries({}, optional=dict(mode=word, threshold=plain, reuse_k=number, subset=word))
    question = st.fixed_dictionaries(
        {"messages": st.lists(turn, max_size=3)}, optional=dict(settings=wanted, max_new_tokens=number)
    )
    return question | anything


def test_no_question_is_the_server_s_fault(byte_tokenizer):
    from hypothesis import example, given, settings

    questions, app = open_page(byte_tokenizer)
    client = client_of(app)
    seen = set()

    @settings(max_examples=150, deadline=None, database=None, derandomize=True)
    @given(body=bodies())
    @example(body=QUESTION)
    @example(body=QUESTION | {"settings": {"reuse_k": 2, "subset": "middle"}, "max_new_tokens": 10**40})
    def ask_anything(body):
        questions.is_quick = True
        content = json.dumps(body)
        status = client.post("/chat", content=content, headers={"content-type": "application/json"}).status_code
        assert status in (200, 400)
        seen.add(status)

    ask_anything()
    assert seen == {200, 400}


def test_another_site_s_page_gets_nothing(byte_tokenizer):
    """Neither by a form, which cannot send JSON, nor by a name of its own that leads here."""
    client = client_of(open_page(byte_tokenizer)[1])
    body = json.dumps(QUESTION)
    answer = client.post("/chat", content=body, headers={"content-type": "text/plain"})
    assert answer.status_code == 415 and "application/json" in answer.json()["error"]["message"]
    for name in ("evil.example", "127.0.0.1.evil.example:8000", "localhost.evil.example"):
        assert client.get("/", headers={"host": name}).status_code == 421
        assert client.post("/chat", json=QUESTION, headers={"host": name}).status_code == 421
    assert client.get("/", headers={"host": "localhost:8000"}).status_code == 200
    policy = client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "connect-src 'self'" in policy


def test_the_page_fetches_nothing_and_no_fact_ends_the_script():
    text = page({"name": EVIL})
    assert EVIL not in text and json.loads(text.split('id="facts">')[1].split("</script>")[0]) == {"name": EVIL}
    source = web.TEMPLATE.read_text()
    for word in ("http:", "https:", "@import", "url(", "innerHTML", "insertAdjacent", "document.write", "src="):
        assert word not in source


@pytest.fixture
def talk(driver, byte_tokenizer):
    """The page, opened, and the questions that it asks; it must end without a message on the console."""
    questions, app = open_page(byte_tokenizer, system="Be brief.", context="causal")
    driver.set_window_size(1000, 800)
    with running(app) as address:
        driver.get(address)
        driver.get_log("browser")  # what a page before it left
        yield driver, questions
        expected = ("400 (Bad Request)",)
        assert [m for m in driver.get_log("browser") if not any(word in m["message"] for word in expected)] == []
        driver.get("about:blank")


def ask(browser, text):
    from selenium.webdriver.common.keys import Keys

    find(browser, "#say")[0].send_keys(text, Keys.ENTER)


def cards(browser):
    script = "return [...document.querySelectorAll('.turn')].map(turn => [turn.classList[1], turn.innerText])"
    return [tuple(card) for card in browser.execute_script(script)]


def shown(browser, selector):
    """Return the texts at one moment: the page may change before the next."""
    script = "return [...document.querySelectorAll(arguments[0])].map(node => node.innerText)"
    return browser.execute_script(script, selector)


def test_masked_provisional_and_final_tokens_are_told_apart_while_they_come(talk):
    browser, questions = talk
    ask(browser, "hello")
    answer = questions.next(0)
    answer.say("", [None, "perhaps", None])
    assert until(lambda: shown(browser, ".turn .masked, .turn .draft") == ["░", "perhaps", "░"])
    answer.say(f"sure {EVIL} ", ["maybe", None])
    assert until(lambda: shown(browser, ".turn .draft") == ["maybe"])
    assert shown(browser, ".turn.assistant .said") == [f"sure {EVIL} maybe░"]
    forms = browser.execute_script(
        "const s = getComputedStyle(document.querySelector('.turn .draft')); return [s.fontStyle, s.textDecorationLine]"
    )
    assert forms == ["italic", "underline"]  # not by colour alone
    assert browser.execute_script("return document.querySelectorAll('img').length") == 0
    answer.say("end")
    answer.moments.put(None)
    note = "10 tokens · 20 tokens/s · 2.50 tokens per forward · 32 of 40 prompt tokens kept"
    assert until(lambda: note in cards(browser)[1][1]) and not find(browser, ".turn .draft, .turn .masked")
    assert until(lambda: answer.is_left)
    ask(browser, "more")
    contents = [(turn["role"], turn["content"]) for turn in questions.next(1).messages]
    said = ("assistant", f"sure {EVIL} end")
    assert contents == [("system", "Be brief."), ("user", "hello"), said, ("user", "more")]


def test_stop_escape_and_closing_the_tab_leave_the_answer(talk):
    from selenium.webdriver.common.keys import Keys

    browser, questions = talk
    ask(browser, "one")
    first = questions.next(0)
    first.say("half", ["x"])
    assert until(lambda: "half" in cards(browser)[1][1])
    find(browser, "#stop")[0].click()
    assert until(lambda: first.is_left) and until(lambda: cards(browser)[1][1].endswith("half\nstopped"))
    ask(browser, "two")
    second = questions.next(1)
    press(browser, Keys.ESCAPE)  # before anything was said
    assert until(lambda: second.is_left)
    assert until(lambda: [role for role, _ in cards(browser)] == ["user", "assistant"])
    assert find(browser, "#say")[0].get_attribute("value") == "two"  # nothing is lost
    press(browser, Keys.ENTER)
    third = questions.next(2)
    assert [turn["content"] for turn in third.messages][1:] == ["one", "half", "two"]
    browser.get("about:blank")
    assert until(lambda: third.is_left)


def test_two_tabs_have_conversations_of_their_own_that_outlive_a_reload(talk):
    browser, questions = talk
    address, first = browser.current_url, browser.current_window_handle
    ask(browser, "mine")
    browser.switch_to.new_window("tab")
    browser.get(address)
    assert cards(browser) == []
    ask(browser, "yours")
    for number, text in ((0, "to me"), (1, "to you")):
        questions.next(number).say(text)
        questions.next(number).moments.put(None)
    assert until(lambda: any("to you" in text for _, text in cards(browser))) and "mine" not in str(cards(browser))
    browser.close()
    browser.switch_to.window(first)
    assert until(lambda: "32 of 40" in str(cards(browser)))
    before = cards(browser)
    browser.refresh()
    assert cards(browser) == before and [role for role, _ in before] == ["user", "assistant"]
    find(browser, "#new")[0].click()
    assert cards(browser) == []


def set_value(browser, name, value):
    script = "const e = get(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event('change'))"
    browser.execute_script(script, name, value)


def test_settings_go_with_the_question_and_wrong_ones_are_answered_with_the_reason(talk):
    browser, questions = talk
    assert find(browser, "#threshold")[0].get_attribute("value") == "0.7"  # the checkpoint's own
    set_value(browser, "threshold", "7")
    ask(browser, "hello")
    assert until(lambda: "must be in (0, 1], got 7" in shown(browser, "#wrong")[0])
    assert cards(browser) == [] and find(browser, "#say")[0].get_attribute("value") == "hello"
    for name, value in (("threshold", "0.5"), ("reuse_k", "3"), ("subset", "middle"), ("max_new_tokens", "9")):
        set_value(browser, name, value)
    ask(browser, "")
    first = questions.next(0)
    settings = first.settings
    assert (settings.mode, settings.threshold, settings.reuse_k, settings.subset) == ("diffusion", 0.5, 3, "middle")
    assert first.max_new_tokens == 9 and not find(browser, "#wrong")[0].is_displayed()
    first.moments.put(RuntimeError("out of memory"))
    assert until(lambda: shown(browser, "#wrong") == ["out of memory"])
    set_value(browser, "mode", "ar")
    assert not find(browser, "#threshold")[0].is_enabled()
    ask(browser, "")
    assert questions.next(1).settings.mode == "ar"
    diffusion, *_ = find(browser, "#mode option")
    assert diffusion.is_enabled()


def test_a_server_that_is_gone_is_said_and_the_message_stays(driver, byte_tokenizer):
    questions, app = open_page(byte_tokenizer)
    with running(app) as address:
        driver.get(address)
        ask(driver, "one")
        questions.next(0).say("so far")
        assert until(lambda: "so far" in str(cards(driver)))
    assert until(lambda: find(driver, "#wrong")[0].is_displayed()) and "so far" in str(cards(driver))
    ask(driver, "two")
    assert until(lambda: "is it still running?" in shown(driver, "#wrong")[0])
    assert find(driver, "#say")[0].get_attribute("value") == "two" and "two" not in str(cards(driver))
    driver.get("about:blank")
    driver.get_log("browser")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [500, 1200])
def test_it_is_readable_in_both_schemes_and_widths(talk, scheme, width):
    browser, questions = talk
    browser.set_window_size(width, 800)
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    ask(browser, "a" * 300)
    questions.next(0).say("b" * 300, [None, "c" * 300])
    assert until(lambda: find(browser, ".turn .draft"))
    script = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.execute_script(script) <= 0
    for selector in ("body", ".turn .said", ".turn .draft", ".turn .masked", ".who", "label", "footer .meta", "#send"):
        assert contrast(browser, selector) >= 4.5, f"{selector} is hard to read in {scheme}"
    assert find(browser, "#say")[0].is_displayed() and find(browser, "#stop")[0].is_displayed()


def test_it_can_be_used_from_the_keyboard(talk):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    browser, questions = talk
    assert browser.switch_to.active_element.get_attribute("id") == "say"
    ActionChains(browser).send_keys("a").key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()
    press(browser, "b", Keys.ENTER)
    assert questions.next(0).messages[-1]["content"] == "a\nb"
    questions.next(0).moments.put(None)
    assert until(lambda: find(browser, "#send")[0].is_enabled())
    reached = []
    for _ in range(12):
        press(browser, Keys.TAB)
        reached.append(browser.switch_to.active_element.get_attribute("id"))
    assert {"new", "mode", "threshold", "reuse_k", "subset", "max_new_tokens", "talk", "send"} <= set(reached)
