"""What tests do in a browser: keys, waiting, and how readable a page is."""

import time


def press(browser, *keys):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def find(browser, selector):
    return browser.find_elements("css selector", selector)


def until(is_met):
    for _ in range(50):
        if is_met():
            return True
        time.sleep(0.05)
    return False


def contrast(browser, selector):
    """Return the ratio of relative luminances of text and ground (WCAG 2.1), 1 to 21."""
    script = """
      let node = document.querySelector(arguments[0]), ground = node;
      const colour = name => getComputedStyle(ground)[name].match(/[\\d.]+/g).map(Number);
      const ink = colour("color");
      while (ground.parentElement && colour("backgroundColor")[3] === 0) ground = ground.parentElement;
      return [ink, colour("backgroundColor")];
    """
    light, dark = sorted(map(luminance, browser.execute_script(script, selector)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(rgb):
    linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in (value / 255 for value in rgb[:3])]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
