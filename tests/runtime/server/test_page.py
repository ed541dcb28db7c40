"""The page, in a headless chromium: a clip is uploaded, asked about, and what was kept is drawn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.runtime.server.serving import running

webdriver = pytest.importorskip("selenium.webdriver", reason="the page is tested with selenium: pip install selenium")

from selenium.common.exceptions import TimeoutException  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

from examples import make_clip  # noqa: E402
from tango_runtime import VideoLLM  # noqa: E402
from tango_runtime.server.settings import Settings  # noqa: E402

TINY = Path(__file__).parents[3] / "models" / "tiny"
DRIVER, BROWSER = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(
    not (DRIVER and BROWSER), reason="the page needs a browser: apt install chromium chromium-driver"
)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder with a clip that the small checkpoint was not trained on, and its questions."""
    folder = tmp_path_factory.mktemp("page") / "videos"
    make_clip.main([str(folder), "--frames", "16"])
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory, videos):
    """A server of the small checkpoint."""
    from tango_export.export import Request, export

    output = tmp_path_factory.mktemp("page") / "tiny"
    export(Request("llava-ov", str(TINY / "llava"), str(TINY / "siglip"), output, context=4096, sink_positions=()))
    settings = Settings(decoders=1, media_root=videos, streams=2)
    with running({"tiny": VideoLLM(output, "ort-cpu")}, settings) as served:
        yield served


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    camera = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1300,1000", *camera):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(DRIVER)) as driver:
        yield driver


def wait(browser, condition):
    try:
        return WebDriverWait(browser, 60, poll_frequency=0.05).until(lambda _: condition())
    except TimeoutException as error:
        shown = find(browser, "body").text
        raise AssertionError(f"the page shows {shown!r} after {browser.get_log('browser')}") from error


def find(browser, selector):
    return browser.find_element(By.CSS_SELECTOR, selector)


def colors(browser):
    """Pixels of the frames that have the color of a salient token, and of a merged one."""
    script = """
    const near = (d, i, r, g, b) => Math.abs(d[i] - r) + Math.abs(d[i + 1] - g) + Math.abs(d[i + 2] - b) < 30;
    let salient = 0, merged = 0;
    for (const canvas of document.querySelectorAll("#grid canvas")) {
      const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
      for (let i = 0; i < data.length; i += 4) {
        salient += near(data, i, 255, 176, 0);
        merged += near(data, i, 64, 156, 255);
      }
    }
    return [salient, merged];
    """
    return browser.execute_script(script)


def test_a_clip_is_uploaded_asked_about_and_drawn(page, browser, videos):
    questions = [json.loads(line) for line in (videos / "questions.jsonl").read_text("utf-8").splitlines()]
    asked = next(q for q in questions if q["question"].startswith("What is the colo"))
    browser.get(page.url)
    wait(browser, lambda: find(browser, "#model").get_attribute("value") == "tiny")
    frames = find(browser, "#frames")
    frames.clear()
    frames.send_keys("16")
    find(browser, "#file").send_keys(str(videos / "clip.mp4"))
    wait(browser, lambda: "video tokens" in find(browser, "#counts").text)

    # The tokens are drawn on the frames, segments on the time line.
    assert len(browser.find_elements(By.CSS_SELECTOR, "#grid canvas")) == 16
    few = colors(browser)
    assert min(few) > 100
    assert browser.find_elements(By.CSS_SELECTOR, "#timeline button")
    kept = int(find(browser, "#counts").text.split()[0])

    # The truth, by the keyboard alone.
    find(browser, "#question").send_keys(asked["question"], Keys.ENTER)
    wait(browser, lambda: find(browser, "#turns .figures").text)
    assert find(browser, "#turns .answer").text.strip().lower() == asked["answer"].lower()
    assert f"{kept} of " in find(browser, "#turns .figures").text
    assert {"vision", "prune", "prefill"} <= set(find(browser, "#stages").text.split())

    # Another ratio prunes at once.
    find(browser, "#ratio").send_keys(Keys.ARROW_RIGHT * 25)
    wait(browser, lambda: int(find(browser, "#counts").text.split()[0]) > 1.5 * kept)
    wait(browser, lambda: sum(colors(browser)) > sum(few))

    # Salience, a frame by itself, the theme.
    find(browser, "input[value=heat]").click()
    assert sum(colors(browser)) < sum(few)
    find(browser, "#grid button").click()
    assert " salient, " in find(browser, "#caption").text
    find(browser, "#zoom").send_keys(Keys.ARROW_RIGHT)
    find(browser, "#zoom form button").click()
    assert not find(browser, "#zoom").is_displayed()
    background = "return getComputedStyle(document.body).backgroundColor"
    light = browser.execute_script(background)
    find(browser, "#theme").click()
    assert browser.execute_script(background) != light

    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert errors == []

    # A file that is not a video leaves no tokens of the one before.
    find(browser, "#file").send_keys(str(videos / "questions.jsonl"))
    wait(browser, lambda: "cannot be read" in find(browser, "#status").text)
    assert not browser.find_elements(By.CSS_SELECTOR, "#grid canvas, #timeline button, #stages dt")
    assert find(browser, "#counts").text == "No tokens yet"
    wait(browser, lambda: any("400" in entry["message"] for entry in browser.get_log("browser")))


def watched(browser, question):
    """Asks a stream again and again; the first answer's figures."""
    find(browser, "#watch").click()
    find(browser, "#question").send_keys(question, Keys.ENTER)
    wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#turns .figures"))
    found = wait(browser, lambda: find(browser, "#turns .figures").text)
    find(browser, "#stop").click()
    wait(browser, lambda: not find(browser, "#stop").is_displayed())
    return found


def test_streams_are_opened_watched_and_closed(page, browser):
    browser.get(page.url)
    wait(browser, lambda: find(browser, "#model").get_attribute("value") == "tiny")
    find(browser, "#source").send_keys("rtsp://camera/", Keys.ENTER)
    wait(browser, lambda: "without --allow-rtsp" in find(browser, "#status").text)
    find(browser, "#source").clear()
    find(browser, "#source").send_keys("file:clip.mp4", Keys.ENTER)  # by the keyboard alone
    wait(browser, lambda: "file:clip.mp4" in find(browser, "#streams").text)
    wait(browser, lambda: "video tokens" in find(browser, "#counts").text)
    assert "lag" in watched(browser, "What is there?")
    assert find(browser, "#turns .answer").text
    find(browser, "#streams button[aria-label^=Close]").click()
    wait(browser, lambda: not browser.find_elements(By.CSS_SELECTOR, "#streams li"))
    assert page.metric("tango:streams") == 0
    assert not find(browser, "#ask").is_enabled()


def test_the_browsers_camera_is_a_stream(page, browser):
    browser.get(page.url)
    wait(browser, lambda: find(browser, "#model").get_attribute("value") == "tiny")
    find(browser, "#live").click()
    wait(browser, lambda: "video tokens" in find(browser, "#counts").text)
    assert "Camera of a browser" in find(browser, "#streams").text
    assert find(browser, "#live").get_attribute("aria-pressed") == "true"
    assert browser.find_elements(By.CSS_SELECTOR, "#grid canvas")
    find(browser, "#live").click()
    wait(browser, lambda: page.metric("tango:streams") == 0)
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert [entry for entry in errors if "403" not in entry["message"]] == []  # the forbidden camera of the test before


def test_it_fits_a_phone(page, browser):
    browser.set_window_size(500, 900)  # chromium's least; the page is laid out at 375
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 375, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    )
    browser.get(page.url)
    wait(browser, lambda: find(browser, "#model").get_attribute("value") == "tiny")
    width = "return [document.documentElement.scrollWidth, innerWidth]"
    assert browser.execute_script(width)[0] <= browser.execute_script(width)[1] == 375


def test_every_control_has_a_name(page, browser):
    browser.get(page.url)
    script = """
    return [...document.querySelectorAll("button, input, select, textarea")].filter((element) =>
      !(element.labels?.length || element.getAttribute("aria-label") || element.textContent.trim())).map((e) => e.id)
    """
    assert browser.execute_script(script) == []


def test_a_wrong_file_is_an_error_that_is_shown(page, browser, tmp_path):
    (tmp_path / "notes.mp4").write_text("no video")
    browser.get(page.url)
    wait(browser, lambda: find(browser, "#model").get_attribute("value") == "tiny")
    find(browser, "#file").send_keys(str(tmp_path / "notes.mp4"))
    wait(browser, lambda: "cannot be read" in find(browser, "#status").text)


def test_its_files_load_nothing_from_elsewhere(page):
    response = page.http().get("/")
    assert "default-src 'self'" in response.headers["content-security-policy"]
    assert response.headers["x-content-type-options"] == "nosniff"
