"""Takes the pictures of docs/guide from the real thing: the server's page, and a report.

    make demo
    python docs/pictures.py demo/bundle demo/videos

Needs selenium, and a chromium with its driver on the PATH.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import sleep

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from tango_runtime import VideoLLM

GUIDE = Path(__file__).parent / "guide"
FRAMES = 16

#: Size of the browser's window, and how much the pictures are made smaller.
WIDTH, HEIGHT, SCALE = 1300, 1440, 0.8

#: Colors of a picture: enough for the page's own, and few enough for 300 kB.
COLORS = 128

PATIENCE_S = 300


@contextmanager
def server(bundle: Path) -> Iterator[str]:
    """The address of a server."""
    command = [sys.executable, "-m", "tango_runtime.cli.main", "serve", str(bundle), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if found := re.search(r"http://\S+:\d+", line):
                    yield found.group()
                    break
        finally:
            process.terminate()


@contextmanager
def browser() -> Iterator[webdriver.Chrome]:
    """A chromium without a screen."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for argument in ("--headless=new", "--no-sandbox", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}"):
        options.add_argument(argument)
    with webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver"))) as driver:
        yield driver


def take(driver: webdriver.Chrome, name: str) -> None:
    """Saves what the browser shows as docs/guide/NAME.png."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "shot.png"
        driver.save_screenshot(str(file))
        shot = Image.open(file).convert("RGB")
    small = shot.resize((round(shot.width * SCALE), round(shot.height * SCALE)), Image.Resampling.LANCZOS)
    small.quantize(COLORS, dither=Image.Dither.NONE).save(GUIDE / f"{name}.png", optimize=True)


def show_answers(driver: webdriver.Chrome, url: str, clip: Path, questions: list[str]) -> None:
    """Asks on the page."""

    def find(selector: str) -> list[webdriver.remote.webelement.WebElement]:
        return driver.find_elements(By.CSS_SELECTOR, selector)

    def wait(condition: Callable[[], object]) -> None:
        WebDriverWait(driver, PATIENCE_S, poll_frequency=0.1).until(lambda _: condition())

    driver.get(url)
    wait(lambda: find("#model")[0].get_attribute("value"))
    frames = find("#frames")[0]
    frames.clear()
    frames.send_keys(str(FRAMES))
    find("#file")[0].send_keys(str(clip.resolve()))
    wait(lambda: "video tokens" in find("#counts")[0].text)
    for asked, question in enumerate(questions):
        find("#question")[0].send_keys(question, Keys.ENTER)
        wait(lambda asked=asked: len(shown := find("#turns .figures")) > asked and shown[-1].text)
    driver.execute_script(
        "document.querySelector('video').currentTime = 1; document.activeElement.blur(); scrollTo(0, 0)"
    )
    sleep(1)  # the video seeks


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(description="Take the pictures of docs/guide.")
    parser.add_argument("bundle", type=Path, help="bundle of models/tiny")
    parser.add_argument("videos", type=Path, help="folder of examples/make_clip.py")
    args = parser.parse_args()
    lines = (args.videos / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    questions, clip = [json.loads(line)["question"] for line in lines], args.videos / "clip.mp4"
    with browser() as driver, tempfile.TemporaryDirectory() as folder:
        with server(args.bundle) as url:
            show_answers(driver, url, clip, questions[:2])
            take(driver, "page")
        llm, report = VideoLLM(args.bundle), Path(folder) / "kept.html"
        llm.report(llm.generate(clip, questions[-1], frames=FRAMES), clip.name).write(report)
        driver.get(report.as_uri())
        sleep(1)  # the frames are drawn
        take(driver, "report")


if __name__ == "__main__":
    main()
